"""Making a network a sum over paths: no norms, activations or shifts, and no weight below zero.

For criteria that sum over paths, and to find the weights that lie on one (reach.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autosparse.core.errors import UsageError, UserError
from autosparse.models.contract import joined, of_the_machine
from autosparse.models.restore import copied
from autosparse.models.standardised import as_plain
from autosparse.models.zoo import CONV_OR_LINEAR, expected_shape

ACTIVATIONS = (
    "torch.nn.modules.activation",
    "timm.layers.activations",
    "timm.layers.activations_me",
)
GATES = (
    "Sigmoid",
    "HardSigmoid",
    "Hardsigmoid",
    "HardSigmoidMe",
    "Softmax",
    "GLU",
    "CReLU",
    "MultiheadAttention",
)
"""Activations that stay: factors between 0 and 1, and functions of several values together."""
POOLS: dict[type, type] = {nn.MaxPool2d: nn.AvgPool2d, MaxPool2dSame: AvgPool2dSame}
"""Pools that take the largest value, and those that take the mean of the same ones."""
SINGLY = ("batch", "instance", "filterresponse", "evonorm2db")
"""Parts of the class names of norms that scale every channel by itself."""
ADDING: dict[str, Callable] = {
    "sub": torch.add,
    "subtract": torch.add,
    "rsub": torch.add,
    "sub_": Tensor.add_,
    "subtract_": Tensor.add_,
}
"""Name in torch of a subtraction -> the addition in its place."""
HALF = (torch.float16, torch.bfloat16)
DOUBLED = 64
"""How many blocks are doubled in one test: 2^64 is far below float32's largest, 2^128."""


class CannotFollow(Exception):
    """The sum over a network's paths cannot be computed; the message says why."""


@contextmanager
def followed(network: nn.Module) -> Iterator[None]:
    """Turn errors in computing a changed copy of a network into CannotFollow.

    Errors of memory or of the device pass through: they say nothing about the network.
    """
    try:
        yield
    except (UserError, CannotFollow):
        raise
    except Exception as error:
        if of_the_machine(error):
            raise
        message = (str(error).strip() or "no message").splitlines()[0]
        name = type(network).__name__
        raise CannotFollow(f"{name} without norms: {type(error).__name__}: {message}") from error


def image_shape(model: nn.Module, batches: Any = ()) -> tuple[int, ...]:
    """Return [C, H, W] of the batches, or of what the model was built for."""
    first = next(iter(batches), None)
    shape = tuple(first[0].shape[1:]) if first is not None else expected_shape(model)
    if shape is None:
        raise UsageError(
            f"{type(model).__name__} does not say what images it takes: give a batch as data"
        )
    return shape


def without_shifts(model: nn.Module, trainable: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy with absolute weights and no biases, in eval mode.

    Only the parameters named in `trainable` need a gradient. Kernels are not standardised, and
    activations are not in place, as their input may be needed elsewhere once norms are gone. Half
    precision becomes float32.
    """
    plain = as_plain(copied(model)).eval()
    plain._apply(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)
    with torch.no_grad():
        for name, tensor in plain.state_dict().items():
            if name.rpartition(".")[2] in ("bias", "running_mean"):
                tensor.zero_()
            elif tensor.is_floating_point():
                tensor.abs_()
    for module in plain.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    for name in trainable:
        plain.get_parameter(name).requires_grad_(True)
    plain.register_forward_hook(lambda module, given, outputs: joined(outputs))
    return plain


class Gate(nn.Module):
    """In place of an activation: the identity, or recorded patterns of where it was above zero."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns: list[Tensor] | None = None

    def forward(self, signal: Tensor, *_: Any) -> Tensor:
        """Multiply by the next recorded pattern, if there are any."""
        if self.patterns is None:
            return signal
        return signal * self.patterns.pop(0)


def only_paths(model: nn.Module, *, mixing: bool = False) -> dict[str, Gate]:
    """Take norms, dropout and activations out of a model, in place; return the gates by name.

    An activation's gate has the name that the activation had, the first if it has several.

    Args:
        model: is changed.
        mixing: put a `Mixing` where a norm computes with several channels, instead of nothing.
    """
    gates: dict[str, Gate] = {}
    stand_ins: dict[nn.Module, nn.Module] = {}
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):
            path = f"{parent_name}.{name}" if parent_name else name
            if child is None:
                continue
            if child in stand_ins:
                setattr(parent, name, stand_ins[child])
            elif _is_activation(child):
                gates[path] = stand_ins[child] = Gate()
                setattr(parent, name, gates[path])
            elif _is_norm(child):
                inner = getattr(child, "act", None)
                stand_in = _mixing_like(child) if mixing else nn.Identity()
                if inner is not None and _is_activation(inner):
                    if inner not in stand_ins:
                        gates[f"{path}.act"] = stand_ins[inner] = Gate()
                    gate = stand_ins[inner]
                    stand_in = nn.Sequential(stand_in, gate) if mixing else gate
                stand_ins[child] = stand_in
                setattr(parent, name, stand_in)
            elif _is_pool(child):
                setattr(parent, name, _average_like(child))
    return gates


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__name__ in GATES:
        return False
    return kind.__module__ in ACTIVATIONS or kind.__name__ == "GammaAct"


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm by its name (there are many kinds), and holds no layer."""
    name = type(module).__name__.lower()
    holds_layer = any(isinstance(each, CONV_OR_LINEAR) for each in module.modules())
    return "norm" in name and not holds_layer


class Mixing(nn.Module):
    """In place of a norm over channels: each channel depends on those that it is scaled with.

    Args:
        groups: how many groups of channels are scaled together; 0: all channels, at each place.
        dim: of the channels.
        shifts: the norm subtracts a mean, so that even a channel of zeros depends on the others.
    """

    def __init__(self, groups: int, dim: int, *, shifts: bool) -> None:
        super().__init__()
        self.groups, self.dim, self.shifts = groups, dim, shifts

    def forward(self, signal: Tensor) -> Tensor:
        """Add the channels' mean, or multiply by it."""
        if self.groups:
            parts = signal.unflatten(self.dim, (self.groups, -1))
            mean = parts.mean(tuple(range(2, parts.ndim)), keepdim=True)
            mean = mean.expand_as(parts).flatten(1, 2)
        else:
            mean = signal.mean(self.dim, keepdim=True)
        return signal + mean if self.shifts else signal * (1 + mean)


def _mixing_like(norm: nn.Module) -> nn.Module:
    """Return the Mixing in place of a norm; the identity where each channel is scaled by itself."""
    kind = type(norm).__name__.lower()
    if any(word in kind for word in SINGLY):
        return nn.Identity()
    groups = getattr(norm, "num_groups", getattr(norm, "groups", 0))
    last = -1 if "2d" not in kind and not groups else 1
    shifts = isinstance(norm, nn.LayerNorm | nn.GroupNorm)
    return Mixing(groups, getattr(norm, "channel_dim", last), shifts=shifts)


def _is_pool(module: nn.Module) -> TypeGuard[nn.MaxPool2d]:
    return type(module) in POOLS and module.dilation in (1, (1, 1))


def _average_like(pool: nn.MaxPool2d) -> nn.Module:
    return POOLS[type(pool)](pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


class NothingTakenAway(TorchFunctionMode):
    """Inside, where one signal is subtracted from another they are added.

    Both are paths. In x + gain * (f(x) - x) those through f and those around it would cancel, at
    any gain once signals are rescaled.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        adding = ADDING.get(getattr(function, "__name__", ""))
        if adding is not None and all(_is_signal(each) for each in args[:2]):
            function = adding
        return function(*args, **(kwargs or {}))


def _is_signal(value: Any) -> bool:
    """Whether it depends on a weight; coordinates and the like do not."""
    return isinstance(value, Tensor) and value.requires_grad


def activation_patterns(
    model: nn.Module, names: Mapping[str, Any], run: Callable[[], Any]
) -> dict[str, list[Tensor]]:
    """Return, by activation, where each of its inputs was above zero while `run` ran."""
    patterns: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str) -> Callable:
        return lambda module, inputs: patterns[name].append(inputs[0].detach() > 0)

    handles = [model.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return patterns


class Rescaling:
    """Divides the signal by a power of two after every block, and adds up the exponents.

    The sum stays on the device until it is asked for.
    """

    def __init__(self) -> None:
        self.count: Tensor | int = 0

    @property
    def log2(self) -> int:
        """Exponent of all that the signal was divided by since this was last set to 0."""
        return int(self.count)

    @log2.setter
    def log2(self, value: int) -> None:
        self.count = value

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        power, exponent = _power(output)
        self.count = self.count + exponent
        return output / power


def rescale_between_blocks(linear: nn.Module, images: Tensor) -> Rescaling | None:
    """Keep a deep linear network from overflowing, if that changes no ratio of paths.

    Scaling the signal at one point scales all paths alike if every path runs through that point.
    This is tested: the outputs of n blocks are doubled, and the network's output must be 2^n times
    as large, to the last bit. Returns None if it is not.
    """
    blocks = list(_blocks(linear))
    if not blocks:
        return None
    powers: dict[nn.Module, Tensor] = {}

    def divide(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        powers[module], _ = _power(output)
        return output / powers[module]

    with torch.no_grad():
        with _hooked(blocks, divide):
            before = linear(images)
        blocks = [block for block in blocks if block in powers]
        for start in range(0, len(blocks), DOUBLED):
            some = blocks[start : start + DOUBLED]
            factors = {each: (2.0 if each in some else 1.0) / powers[each] for each in powers}
            with _hooked(blocks, lambda module, _, output, f=factors: output * f[module]):
                after = linear(images)
            if not torch.isfinite(after).all() or not torch.equal(after, before * 2.0 ** len(some)):
                return None
    if not blocks:
        return None
    rescaling = Rescaling()
    for block in blocks:
        block.register_forward_hook(rescaling)
    return rescaling


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost sequences."""
    for child in module.children():
        if isinstance(module, nn.Sequential) and not isinstance(child, nn.Sequential):
            yield child
        else:
            yield from _blocks(child)


@contextmanager
def _hooked(blocks: list[nn.Module], hook: Any) -> Iterator[None]:
    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _power(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the power of two at or below the largest value, and its exponent; 1 if none is.

    Both on the device of the values, which is not waited for.
    """
    peak = output.detach().amax()
    mantissa, exponent = torch.frexp(peak)  # The mantissa is 1/2 to 1.
    usable = (peak > 0) & (peak < torch.inf)
    return torch.where(usable, peak / (2 * mantissa), 1), torch.where(usable, exponent - 1, 0)
