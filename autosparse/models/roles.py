"""The role of each parameter in a network, seen in one pass of an image; names play no part.

A gain is multiplied onto the signal (a norm's weight, LayerScale, ReZero, a gate); a shift is
added to it, or put beside it (biases, positions, tokens). The signal is what depends on the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from autosparse.models.restore import untouched

FAINT = 0.01
"""A gain whose largest entry is no larger hides the layers behind it: their gradients shrink to a
hundredth."""
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
MULTIPLIES = ("mul", "mul_", "addcmul", "addcmul_")
ADDS = ("add", "add_", "sub", "sub_", "cat", "stack", "where", "copy_", "index_put", "index_put_")
BESIDE = ("cat", "stack", "where", "copy_", "index_put", "index_put_")
"""Operators that put a token beside the signal, and add nothing to it."""
SHIFTING = ("bias", "attn_mask")
"""Endings of the names that operators have for arguments that are added."""
MATRIX_PRODUCTS = ("addmm", "baddbmm", "addmv", "addbmm")
"""Their first argument is added, the others are multiplied."""


@dataclass
class Roles:
    """The roles of a model's parameters. All keys are their names."""

    gains: dict[str, float] = field(default_factory=dict)
    """Multiplied onto the signal -> the largest size of what was multiplied."""
    shifts: set[str] = field(default_factory=set)
    """Only ever added to the signal or put beside it."""
    tokens: set[str] = field(default_factory=set)
    """Those of the shifts that are put beside the signal."""
    elsewhere: set[str] = field(default_factory=set)
    """Used while another module than the one that holds them was at work."""


@torch.no_grad()
def of(model: nn.Module, image: Tensor) -> Roles:
    """Return the parameters' roles, seen in one pass in eval mode, which is not counted as cost.

    Args:
        model: its modes and buffers are left as they were.
        image: [1, ...] of the model's device and dtype.
    """
    trace = _Trace(model, image)
    with untouched(model), trace.following():
        model.eval()
        model(image)
    return trace.roles()


def faint(model: nn.Module, image: Tensor, limit: float = FAINT) -> list[str]:
    """Return the gains that are nowhere larger than `limit`, and so hide the layers behind them.

    Args:
        model: weights of its Conv and Linear layers do not count as gains.
        image: see `of`.
        limit: 0 for those only that are zero.
    """
    small = [name for name, parameter in _gains_perhaps(model) if _size(parameter) <= limit]
    gains = of(model, image).gains if small else {}
    return [name for name in small if gains.get(name, math.inf) <= limit]


def _gains_perhaps(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters that may be gains: no biases, and no weights of Conv and Linear layers."""
    known: set[int] = set()
    for module in model.modules():
        kinds = ("weight", "bias") if isinstance(module, LAYERS) else ("bias",)
        for kind in kinds if isinstance(module, (*LAYERS, *NORMS)) else ():
            known.add(id(getattr(module, kind, None)))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and id(parameter) not in known:
            yield name, parameter


def _size(tensor: Tensor) -> float:
    """Return the largest size of a value."""
    low, high = tensor.detach().aminmax()
    return max(abs(float(low)), abs(float(high)))


@contextmanager
def replaced(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, parameters have other values; afterwards their own again, bit for bit."""
    before = {name: model.get_parameter(name).detach().clone() for name in values}
    try:
        set_values(model, values)
        yield
    finally:
        set_values(model, before)


@torch.no_grad()
def set_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters, by name."""
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


@dataclass(frozen=True)
class _Made:
    """Which parameters a tensor was made of; it does not depend on the image."""

    names: frozenset[str]
    alone: bool
    """Whether it holds parts of them side by side or added up, and no products of several."""


class _Trace(TorchDispatchMode):
    """Follows a pass operator by operator, and records where parameters meet the signal."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.model = model
        self.signal, self.made = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self.signal[image] = True
        self.at_work: list[nn.Module] = []
        self.holders: dict[str, list[nn.Module]] = {}
        self.met: dict[str, set[str]] = {}
        self.gains: dict[str, float] = {}
        self.elsewhere: set[str] = set()
        holders: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for each in module._parameters.values():
                holders.setdefault(id(each), []).append(module)
        for name, parameter in model.named_parameters():
            self.made[parameter] = _Made(frozenset([name]), True)
            self.holders[name] = holders[id(parameter)]

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow what is computed inside, and which module is at work."""
        handles = []
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._begin, prepend=True))
            handles.append(module.register_forward_hook(self._end, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, given: Any) -> None:
        self.at_work.append(module)

    def _end(self, module: nn.Module, given: Any, output: Any) -> None:
        if self.at_work:
            self.at_work.pop()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = operator(*args, **kwargs)
        given = list(_arguments(operator, args, kwargs))
        made = [(key, each, self.made[each]) for key, each in given if each in self.made]
        if any(each in self.signal for _, each in given):
            for key, tensor, source in made:
                self._meet(operator.overloadpacket.__name__, key, tensor, source)
            self._mark_signal(output)
        elif made:
            for key, tensor, source in made:
                if "norm" in operator.overloadpacket.__name__ and key == "weight":
                    self._multiplied(tensor, source)  # Of a kernel, where that is standardised.
            self._mark_made(operator.overloadpacket.__name__, output, [each for *_, each in made])
        return output

    def _meet(self, operator: str, key: str, tensor: Tensor, source: _Made) -> None:
        kind = _role(operator, key)
        if kind == "gain":
            self._multiplied(tensor, source)
        if kind in ("shift", "token") and not source.alone:
            kind = "other"
        working = self.at_work[-1] if self.at_work else None
        for name in source.names:
            self.met.setdefault(name, set()).add(kind)
            if working not in self.holders[name]:
                self.elsewhere.add(name)

    def _multiplied(self, tensor: Tensor, source: _Made) -> None:
        size = _size(tensor) if tensor.numel() else 0.0
        for name in source.names:
            self.gains[name] = max(self.gains.get(name, 0.0), size)

    def _mark_signal(self, output: Any) -> None:
        for tensor in _tensors(output):
            self.signal[tensor] = True
            base = tensor._base
            if base is not None and base not in self.made:
                self.signal[base] = True

    def _mark_made(self, operator: str, output: Any, sources: list[_Made]) -> None:
        names = frozenset().union(*(each.names for each in sources))
        together = len(names) == 1 or operator in ADDS
        made = _Made(names, together and all(each.alone for each in sources))
        for tensor in _tensors(output):
            if tensor not in self.made:
                self.made[tensor] = made

    def roles(self) -> Roles:
        """Return the roles seen so far."""
        shifts = {name for name, kinds in self.met.items() if kinds <= {"shift", "token"}}
        tokens = {name for name in shifts if "token" in self.met[name]}
        return Roles(self.gains, shifts, tokens, self.elsewhere)


def _role(operator: str, key: str) -> str:
    if key.endswith(SHIFTING) or (operator in MATRIX_PRODUCTS and key == "self"):
        return "shift"
    if operator in MULTIPLIES:
        return "shift" if operator.startswith("addcmul") and key == "self" else "gain"
    if key == "weight" and "norm" in operator:
        return "gain"
    if operator in BESIDE:
        return "token"
    return "shift" if operator in ADDS else "other"


def _arguments(operator: Any, args: Sequence[Any], kwargs: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield an operator's tensors with the names of its arguments."""
    names = [argument.name for argument in operator._schema.arguments]
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        for tensor in _tensors(value):
            yield name, tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
