"""Compact parameters: a pruned weight is held as the 1-D parameter of its surviving values.

`hold_compact` replaces each pruned weight of a model by a parametrization of
`torch.nn.utils.parametrize`: forward scatters the values into a dense tensor, backward gathers the
gradient. Pruned weights do not exist: the optimizer, ZeRO, all-reduce and checkpoints see survivors
only.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from autosparse.core.errors import UsageError
from autosparse.models.standardised import keep_mask, mask_kernel, unmask
from autosparse.models.zoo import owner, unwrapped
from autosparse.sparsity import masks
from autosparse.sparsity.cpu_products import Pattern, available, pays, sparse_weight

SUFFIX = ".original"
MARK = "parametrizations."
GIVEN = "_dense_"
"""Prefix of the attribute in which a module finds its dense weight; see `hand_over`."""


@dataclass(frozen=True)
class Layout:
    """How a dense weight lies in memory."""

    shape: tuple[int, ...]
    channels_last: bool = False
    """For a kernel [out, in, height, width]: whether memory holds [out, height, width, in]."""

    def dense(self, memory: Tensor) -> Tensor:
        """Return the weight as a view of its memory, 1-D."""
        if not self.channels_last:
            return memory.view(self.shape)
        out, channels, height, width = self.shape
        return memory.view(out, height, width, channels).permute(0, 3, 1, 2)

    def memory(self, dense: Tensor) -> Tensor:
        """Return the memory, 1-D, of a weight; a copy if it is not laid out so."""
        return (dense.permute(0, 2, 3, 1) if self.channels_last else dense).reshape(-1)

    def places(self, index: Tensor) -> Tensor:
        """Return where in memory the entries at `index` of the flattened weight lie."""
        if not self.channels_last:
            return index
        channels, kernel = self.shape[1], self.shape[2] * self.shape[3]
        channel, pixel = index // kernel % channels, index % kernel
        return index // (channels * kernel) * (channels * kernel) + pixel * channels + channel


def _scattered(values: Tensor, places: Tensor, layout: Layout) -> Tensor:
    """Return the dense tensor. On CPUs `scatter_` took 0.5 to 0.8 of the time of `index_copy_`."""
    memory = values.new_zeros(math.prod(layout.shape))
    return layout.dense(memory.scatter_(0, places.long(), values))


class _Scatter(torch.autograd.Function):
    """Values [kept] -> dense tensor, zero where pruned; its gradient is the gather."""

    @staticmethod
    def forward(ctx, values: Tensor, places: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(places)
        ctx.layout = layout
        return _scattered(values, places, layout)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return ctx.layout.memory(gradient).index_select(0, places), None, None


_Made = tuple["weakref.ref[Tensor]", Tensor, Tensor, Layout]
"""A dense tensor, and the values, places and layout that it was made of."""


class _Rescatter:
    """Kept by autograd in place of a scattered weight: makes it again."""

    def __init__(self, made: _Made, kept: Tensor) -> None:
        _, self.values, self.places, self.layout = made
        self.version = self.values._version
        self.view = (kept.shape, kept.stride(), kept.storage_offset())

    def __call__(self) -> Tensor:
        if self.values._version != self.version:
            raise RuntimeError("compact values were changed between forward and backward")
        return _scattered(self.values, self.places, self.layout).as_strided(*self.view)


_SCATTERED: dict[int, _Made] | None = None
"""While `rescattering`: how each dense tensor was made, by its address."""


@contextmanager
def rescattering(enabled: bool = True) -> Iterator[None]:
    """Run a forward pass so that backward scatters each weight again when it needs it.

    Then a scattered weight exists only while its layer runs, forward or backward; otherwise
    autograd keeps all of them until backward. Under autocast it keeps the casts of the weights.
    """
    global _SCATTERED
    if not enabled:
        yield
        return
    before, _SCATTERED = _SCATTERED, {}

    def pack(tensor: Tensor) -> Tensor | _Rescatter:
        made = (_SCATTERED or {}).get(tensor.untyped_storage().data_ptr())
        if made is None or made[0]() is None:  # Another tensor may have that address by now.
            return tensor
        return _Rescatter(made, tensor)

    def unpack(kept: Tensor | _Rescatter) -> Tensor:
        return kept() if isinstance(kept, _Rescatter) else kept

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _SCATTERED = before


class DenseGradient:
    """Adds up the gradients of one dense weight over several forward passes."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        """[size], in the order of the flattened weight."""
        self.of_kernel = False

    def hear(self, gradient: Tensor, *, of_kernel: bool) -> None:
        """Add a gradient; where a kernel is made of the weight, only those of the kernel count."""
        if self.of_kernel and not of_kernel:
            return
        self.of_kernel = of_kernel
        if self.total is None:
            self.total = gradient.clone(memory_format=torch.contiguous_format).view(-1)
        else:
            self.total += gradient.reshape(-1)


class CompactWeight(nn.Module):
    """Parametrization of one weight by its surviving values.

    Args:
        mask: bool tensor of the weight's shape, True = kept. The positions of the survivors are
            stored (int32, in a buffer that is not in the state dict), and eight bytes of the mask's
            fingerprint, which are: so values of another ticket are refused. State dicts of earlier
            versions, without the fingerprint, are accepted.
    """

    index: Tensor
    fingerprint: Tensor
    moved: Tensor | None

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.layout = Layout(tuple(mask.shape))
        index = mask.flatten().nonzero().squeeze(1).int()
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("fingerprint", _mark(mask))
        self.register_buffer("moved", None, persistent=False)
        self.pattern: Pattern | None = None
        """Set if layers multiply with the survivors only; see cpu_products.py."""
        self.listener: DenseGradient | None = None
        """Set while the gradient of the dense weight is needed; then the weight is made dense."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        return self.layout.shape

    @property
    def places(self) -> Tensor:
        """Where the survivors lie in the memory of the dense weight, int32 [kept]."""
        return self.index if self.moved is None else self.moved

    def lay_out(self, *, channels_last: bool) -> None:
        """Make the dense weight with channels last, if it is 4-D, or in its own order.

        The order of the values stays: that of the flattened weight.
        """
        self.layout = Layout(self.shape, channels_last and len(self.shape) == 4)
        same = not self.layout.channels_last or math.prod(self.shape[2:]) == 1
        self.moved = None if same else self.layout.places(self.index)

    @torch.no_grad()
    def exchange(self, index: Tensor) -> None:
        """Change which weights survive, as many as before; in place.

        Args:
            index: where they are in the flattened weight, ascending, [kept].
        """
        self.index.copy_(index)
        if self.moved is not None:
            self.moved.copy_(self.layout.places(self.index))
        self.fingerprint.copy_(_mark(self.mask()))
        if self.pattern is not None:
            self.pattern = Pattern(self.index, self.shape)

    def forward(self, values: Tensor) -> Tensor:
        """Return the weight of shape `self.shape` for values of shape [kept], dense or sparse."""
        return self._made(values, of_kernel=False)

    def masked(self, kernel: Tensor) -> Tensor:
        """Return a kernel that was made of the whole weight with all but the survivors zero."""
        return self._made(self.right_inverse(kernel), of_kernel=True)

    def _made(self, values: Tensor, *, of_kernel: bool) -> Tensor:
        sparse = self.pattern is not None and values.device == self.pattern.ends.device
        if self.listener is None and sparse:
            return sparse_weight(values, self.pattern, lambda: self.dense(values))  # type: ignore[arg-type]
        dense = self.dense(values)
        if self.listener is not None and dense.requires_grad:
            dense.register_hook(partial(self.listener.hear, of_kernel=of_kernel))
        return dense

    def dense(self, values: Tensor) -> Tensor:
        """Return the dense weight of shape `self.shape` for values of shape [kept]."""
        dense: Tensor = _Scatter.apply(values, self.places, self.layout)  # type: ignore[assignment]
        if _SCATTERED is not None:
            made = (weakref.ref(dense), values.detach(), self.places, self.layout)
            _SCATTERED[dense.untyped_storage().data_ptr()] = made
        return dense

    def right_inverse(self, dense: Tensor) -> Tensor:
        """Return the surviving values, shape [kept], of a dense weight."""
        return dense.reshape(-1).index_select(0, self.index)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Load nothing: the state is the mask's fingerprint, which stays."""
        self.refuse_another(state_dict, prefix)

    def refuse_another(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Raise UsageError for the values of another mask."""
        theirs = state_dict.get(f"{prefix}fingerprint", self.fingerprint)
        if not torch.equal(theirs.to(self.fingerprint), self.fingerprint):
            name = prefix.removesuffix(".").rpartition(".")[0].replace(MARK, "")
            raise UsageError(
                f"this state dict is of another ticket: it keeps other weights of {name}; load "
                "it into a model that was made compact by the same ticket"
            )

    def mask(self) -> Tensor:
        """Return the mask: a bool tensor of the weight's shape."""
        flat = torch.zeros(self.shape, dtype=torch.bool, device=self.index.device).view(-1)
        return flat.index_fill_(0, self.index.long(), True).view(self.shape)


def _mark(mask: Tensor) -> Tensor:
    """Return the mask's fingerprint as eight bytes."""
    digits = bytearray.fromhex(masks.fingerprint({"": mask}))
    return torch.frombuffer(digits, dtype=torch.uint8).to(mask.device)


def _refuse_other_tickets(model: nn.Module, state: Any, prefix: str, *others: Any) -> None:
    """Refuse the values of other masks before any is loaded: torch loads layer by layer."""
    for path, module in model.named_modules():
        if isinstance(module, CompactWeight):
            module.refuse_another(state, f"{prefix}{path}.")


@torch.inference_mode(False)
def hold_compact(model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """Make the weights that masks do not keep whole compact; in place.

    Args:
        model: dense; a weight that several modules share stays shared.
        chosen: bool masks by parameter name, True = kept. What is pruned need not be zero.
    """
    unmask(model)
    if next(compact_weights(model), None) is None:
        model.register_load_state_dict_pre_hook(_refuse_other_tickets)
    for name, mask in chosen.items():
        if not mask.all():
            _register(model, name, mask)


def _register(model: nn.Module, name: str, mask: Tensor) -> None:
    """Register under every module that holds the weight; in the end they share one parameter.

    Registering makes the parameter itself 1-D, so each holder gets a copy of its own first.
    """
    weight = model.get_parameter(name)
    first: nn.Parameter | None = None
    for module, attribute in _holders(model, weight):
        copy = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        setattr(module, attribute, copy)
        parametrization = CompactWeight(mask.to(weight.device))
        mask_kernel(module)
        parametrize.register_parametrization(module, attribute, parametrization)
        _look_first(module, attribute)
        slot = module.parametrizations[attribute]  # type: ignore[index]
        if first is None:
            first = slot.original
        else:
            slot.original = first


def _look_first(module: nn.Module, attribute: str) -> None:
    """Have a module take the weight that `hand_over` gave it, if there is one, or else make it.

    So the parametrization need not be asked, which takes the host 10 microseconds a layer.
    """
    kind, given = type(module), GIVEN + attribute
    usual = getattr(kind, attribute)

    def weight(self: nn.Module) -> Tensor:
        return self.__dict__[given] if given in self.__dict__ else usual.fget(self)

    setattr(kind, attribute, property(weight, usual.fset))


def hand_over(module: nn.Module, attribute: str, weight: Tensor | None) -> None:
    """Give a module its weight, made dense elsewhere, for a while; None takes it away again."""
    if weight is None:
        module.__dict__.pop(GIVEN + attribute, None)
    else:
        module.__dict__[GIVEN + attribute] = weight


def _holders(model: nn.Module, weight: nn.Parameter) -> list[tuple[nn.Module, str]]:
    return [
        (module, attribute)
        for module in list(model.modules())
        for attribute, parameter in list(module.named_parameters(recurse=False))
        if parameter is weight
    ]


def multiply_sparse(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Let layers multiply with surviving weights only, where that is quicker; in place.

    It is quicker on CPUs with MKL, in float32 and float64, in wide layers with few survivors (see
    cpu_products.pays). Results differ from those of dense products by rounding.
    """
    for _, weight in compact_weights(model):
        weight.pattern = None
        able = enabled and available(weight.index.device)
        if able and pays(len(weight.index), weight.shape):
            weight.pattern = Pattern(weight.index, weight.shape)
    return model


def lay_out(model: nn.Module, *, channels_last: bool) -> nn.Module:
    """Lay out all weights with channels last (quicker on GPUs) or not; in place."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=form)  # type: ignore[call-overload]
    for _, weight in compact_weights(model):
        weight.lay_out(channels_last=channels_last)
    return model


@torch.inference_mode(False)
def densify(model: nn.Module) -> nn.Module:
    """Turn compact weights back into ordinary ones, zero where pruned; in place.

    Standardising convolutions (NFNet) go on masking the kernel that they make of the weight.
    """
    multiply_sparse(model, enabled=False)
    dense: dict[nn.Parameter, nn.Parameter] = {}
    for name, compact_weight in list(compact_weights(model)):
        module, attribute = owner(unwrapped(model), name)
        keep_mask(module, compact_weight.mask())
        _own_class(module)
        slot = module.parametrizations[attribute]  # type: ignore[index]
        values = slot.original
        slot.original = nn.Parameter(values.detach().clone(), values.requires_grad)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        plain = nn.Parameter(getattr(module, attribute).detach(), values.requires_grad)
        setattr(module, attribute, dense.setdefault(values, plain))
    return model


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module its own class, as removal changes the one that copies share."""
    shared = type(module)
    members = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def compact_weights(model: nn.Module) -> Iterator[tuple[str, CompactWeight]]:
    """Yield every compact weight by the name that the dense parameter had."""
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, CompactWeight):
            name = path.rpartition(".")[0].replace(MARK, "")
            yield name, module


def values_of(model: nn.Module, name: str) -> nn.Parameter:
    """Return the compact parameter [kept] of a weight, by the name that the dense one had."""
    module, attribute = owner(unwrapped(model), name)
    return module.parametrizations[attribute].original  # type: ignore[index, return-value]


def stored_name(name: str) -> str:
    """Return the name under which a compact model's state dict holds a weight's values."""
    path, _, attribute = name.rpartition(".")
    return f"{path}.{MARK}{attribute}{SUFFIX}".removeprefix(".")


def dense_name(name: str) -> str:
    """Return the dense parameter's name for a name in a compact model's `named_parameters`."""
    made_compact = MARK in name and name.endswith(SUFFIX)
    return name.replace(MARK, "").removesuffix(SUFFIX) if made_compact else name
