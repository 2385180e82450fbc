"""Which weights lie on a path from input to output, and choosing such that do.

A random ticket of a per cent has half of its weights on no path, and where layers are narrow no
path at all. What lies on none is worth nothing: it can change what the network says by a constant
at most.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autosparse.core.memory import keep_freed_blocks
from autosparse.models import roles
from autosparse.models.gradients import note, spend
from autosparse.models.numerics import exactly
from autosparse.models.zoo import called, device_of
from autosparse.sparsity.masks import Masks, keep_counts, top
from autosparse.sparsity.paths import (
    CannotFollow,
    NothingTakenAway,
    followed,
    only_paths,
    without_shifts,
)

SIDE = 64
"""Of the images by which networks are thinned, where they take smaller ones: paths through a weight
are the same at any size, but for kernels that see padding only."""
GAIN = 0.75
"""Of what is neither weight nor shift, where only being live counts. Not one, for which there would
be no path beside f: (1 - gain) * x + gain * f(x)."""
ROUNDS = 32
"""In how many rounds a network is thinned, unless said otherwise."""


def live(model: nn.Module, masks: Mapping[str, Tensor], shape: tuple[int, ...]) -> Masks:
    """Return which of the kept weights lie on a path from the input to an output.

    The others can change what the network says by a constant at most; A. Vysogorets and J. Kempe,
    Connectivity Matters (JMLR 2023), arXiv 2107.02306, count them out of the "effective" density.

    Args:
        model: dense.
        masks: per prunable parameter, True = kept.
        shape: [C, H, W] of an image; a 3x3 kernel on one pixel has eight weights that see padding
            only.
    """
    found = within_reach(model, masks, shape)
    return {name: mask & found[name] for name, mask in masks.items()}


def onto_paths(
    model: nn.Module,
    masks: Masks,
    scores: Mapping[str, Tensor],
    shape: tuple[int, ...],
    *,
    within: Masks | None = None,
) -> Masks:
    """Return masks whose dead weights are exchanged for live ones of the same layer.

    What is dead (see `live`) makes room for the highest scores among the weights that would lie
    on a path of living weights; where a layer has too few of them, its best dead ones stay. Every
    layer keeps as many weights as before. Where nothing is live, no single weight would be, and the
    whole network is thinned (see `thinned`), unless a layer keeps none: then nothing can be done.
    The result lies inside `within`, as `masks` do.
    """
    alive = live(model, masks, shape)
    counts = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    if all(counts.values()) and not any(mask.any() for mask in alive.values()):
        found = thinned(model, scores, counts, shape, within=within)
        return {name: mask.to(masks[name].device) for name, mask in found.items()}
    found = within_reach(model, alive, shape)
    if within is not None:
        found = {name: each & within[name] for name, each in found.items()}
    return _exchanged(masks, alive, found, scores)


def _exchanged(
    masks: Masks, alive: Masks, reach: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> Masks:
    found = {}
    for name, mask in masks.items():
        score, count = {name: scores[name]}, int(mask.count_nonzero())
        room = count - int(alive[name].count_nonzero())
        free = reach[name] & ~alive[name]
        new = min(room, int(free.count_nonzero()))
        found[name] = alive[name] | keep_counts(score, {name: new}, within={name: free})[name]
        dead = mask & ~found[name]
        rest = count - int(found[name].count_nonzero())
        found[name] |= keep_counts(score, {name: rest}, within={name: dead})[name]
    return found


def within_reach(
    model: nn.Module, masks: Mapping[str, Tensor], shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return which weights lie on a path, or would if they were kept too.

    Every kept weight gets a random positive value. Other parameters are `GAIN`, but zero where they
    are added to the signal (biases, positions; see roles.py), norms and activations are left out,
    and differences of signals are sums; where a norm computes with several channels, these hear of
    each other. A weight is in reach if the gradient of the output by it depends on the image.
    Signals are rescaled after every module, so that no gate saturates.

    Raises CannotFollow where such a network cannot be computed.
    """
    network = _Network(model, masks, shape, torch.float64, GAIN)
    network.keep(masks)
    with exactly(network.images.device):
        first, second = network.gradients(), network.gradients(image=1)
    return {name: (first[name] != second[name]).to(mask.device) for name, mask in masks.items()}


def first_dead(model: nn.Module, masks: Mapping[str, Tensor], shape: tuple[int, ...]) -> str:
    """Return the first layer from which on nothing depends on the image, of a dead network.

    Args: see `live`.
    """
    network = _Network(model, masks, shape, torch.float64, GAIN)
    network.keep(masks)
    with exactly(network.images.device):
        hears = network.hears_of_the_image()
    last = max((place for place, hearing in enumerate(hears.values()) if hearing), default=-1)
    called = list(hears) or list(masks)
    return called[min(last + 1, len(called) - 1)]


@torch.no_grad()
def thinned(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    counts: Mapping[str, int],
    shape: tuple[int, ...],
    *,
    within: Masks | None = None,
    rounds: int = ROUNDS,
    tilt: float = 0.0,
) -> Masks:
    """Keep `counts[name]` weights of every layer, on paths as far as that can be had.

    The network is thinned in rounds, each layer by the same factor every time. What lies on no
    path any more goes first, then the lowest score + tilt * log(sum over the paths through the
    weight); what is dead at the end is exchanged (see `onto_paths`). In the sums each kept weight
    counts with a random positive value: they are those of SynFlow (H. Tanaka et al. 2020, arXiv
    2006.05467) with such values instead of |w|. With Gumbel noise as scores that is drawing in
    proportion to sums ** tilt.

    Args:
        model: dense.
        scores: finite, per prunable parameter.
        counts: how many weights each layer keeps, at most as many as it has in `within`.
        shape: [C, H, W] of an image.
        within: masks to begin with; by default everything.
        rounds: one more pass of an image each.
        tilt: 0 for the scores alone; higher: weights that share units.
    """
    device = device_of(model)
    if device.type == "cpu":
        keep_freed_blocks()
    scores = {name: score.to(device) for name, score in scores.items()}
    begun = within or {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}
    begun = {name: mask.to(device) for name, mask in begun.items()}
    with exactly(device):
        network = _small_network(model, begun, shape)
        network.keep(begun)
        layers = {n: _Layer(begun[n], score, counts[n], tilt) for n, score in scores.items()}
        for number in range(1, rounds + 1):
            sums = network.gradients()
            for name, layer in layers.items():
                gone = layer.thin(sums.pop(name), number / rounds)
                network.weights[name].view(-1).index_fill_(0, gone.long(), 0)
        chosen = {name: layer.mask() for name, layer in layers.items()}
        through = network.paths_through()
        alive = {name: mask & (through.pop(name) > 0) for name, mask in chosen.items()}
        network.keep(alive)
        through = network.paths_through()
    reach = {name: (through.pop(name) > 0) & mask for name, mask in begun.items()}
    return _exchanged(chosen, alive, reach, scores)


def best_on_paths(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    counts: Mapping[str, int],
    shape: tuple[int, ...],
    **options: Any,
) -> Masks:
    """Thin a network (see `thinned`, whose `options` these are); if that cannot be, go by scores.

    A network whose paths cannot be followed is told in a warning, and on the ticket's card. What
    else goes wrong (memory that runs out, say) is raised.
    """
    try:
        return thinned(model, scores, counts, shape, **options)
    except CannotFollow as error:
        warnings.warn(
            f"the paths through {type(model).__name__} cannot be followed ({error}); weights are "
            "chosen without them",
            stacklevel=2,
        )
        note("chosen_without_paths", str(error))
        return keep_counts(scores, counts, within=options.get("within"))


class _Layer:
    """The weights of a layer that are left; what is done with them costs no more than they are.

    All is done on the device of the scores. How many weights go is known beforehand, so that a GPU
    is never waited for.
    """

    def __init__(self, mask: Tensor, score: Tensor, count: int, tilt: float) -> None:
        self.shape, self.count, self.tilt = mask.shape, count, tilt
        self.places = _narrow(mask.flatten().nonzero().squeeze(1), mask.numel())
        self.size = len(self.places)
        self.score = score.flatten().index_select(0, self.places).float()

    def thin(self, gradient: Tensor, done: float) -> Tensor:
        """Remove weights once the share `done` of the rounds is over; return their places."""
        most = round(self.size ** (1 - done) * max(self.count, 1) ** done)
        left = self.count if done == 1 else max(self.count, most)
        paths = gradient.flatten().index_select(0, self.places).abs_()
        stay, go = _parted(_rated(self.score, paths, self.tilt), left)
        gone = self.places.index_select(0, go)
        self.places, self.score = (x.index_select(0, stay) for x in (self.places, self.score))
        return gone

    def mask(self) -> Tensor:
        """Return where the weights that are left lie."""
        found = torch.zeros(self.shape, dtype=torch.bool, device=self.places.device)
        found.view(-1).index_fill_(0, self.places.long(), True)
        return found


def _narrow(places: Tensor, size: int) -> Tensor:
    """Return positions below `size` in as few bytes as hold them."""
    return places.int() if size < 1 << 31 else places


def _parted(rated: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the `left` highest, ascending, and of the others; ties: first ones.

    On a CPU by a threshold; elsewhere by sorting, which no one has to wait for.
    """
    if rated.device.type == "cpu":
        stays = top(rated, left).numpy()
        return torch.from_numpy(np.flatnonzero(stays)), torch.from_numpy(np.flatnonzero(~stays))
    return _parted_by_sorting(rated, left)


def _parted_by_sorting(rated: Tensor, left: int) -> tuple[Tensor, Tensor]:
    order = _narrow(rated.sort(descending=True, stable=True).indices, len(rated))
    return order[:left].sort().values, order[left:]


def _rated(score: Tensor, paths: Tensor, tilt: float) -> Tensor:
    """Return finite scores of which those on no path are the lowest, in their order.

    `paths` is used up.
    """
    on_path = paths > 0
    lifted = paths.clamp_(min=torch.finfo(paths.dtype).tiny).log_().mul_(tilt).add_(score)
    if not len(score) or (score.device.type == "cpu" and bool(on_path.all())):
        return lifted
    best_dead = score.masked_fill(on_path, -torch.inf).max()
    worst_alive = lifted.masked_fill(~on_path, torch.inf).min()
    dead = score.sub(best_dead).add_(worst_alive).sub_(1)
    return torch.where(on_path | ~on_path.any(), lifted, dead)


def _small_network(
    model: nn.Module, masks: Mapping[str, Tensor], shape: tuple[int, ...]
) -> _Network:
    """Return the network for images of at most `SIDE`, or of `shape` where it takes no other."""
    small = (shape[0], *(min(side, SIDE) for side in shape[1:]))
    if small != tuple(shape):
        try:
            network = _Network(model, masks, small, torch.float32)
            network.gradients()
            return network
        except CannotFollow:
            pass  # It takes images of one size only.
    return _Network(model, masks, shape, torch.float32)


class _Network:
    """A network as a sum over paths, each kept weight with a random positive value."""

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        gain: float = 1.0,
    ) -> None:
        plain = without_shifts(model, masks).to(dtype)
        self.copy = plain.to(memory_format=torch.contiguous_format)
        generator = torch.Generator().manual_seed(0)
        self.weights = {name: self.copy.get_parameter(name) for name in masks}
        others = {n: each for n, each in self.copy.named_parameters() if n not in masks}
        with torch.no_grad():
            for name, parameter in self.copy.named_parameters():
                if name in masks:
                    drawn = torch.rand(parameter.shape, generator=generator, dtype=dtype)
                    parameter.copy_(drawn.add_(0.5))
        device = next(iter(self.weights.values())).device
        self.images = (torch.rand(2, *shape, generator=generator, dtype=dtype) + 0.5).to(device)
        with followed(model):
            found = roles.of(self.copy, self.images[:1])
        with torch.no_grad():
            for name, parameter in others.items():
                parameter.fill_(0 if name in found.shifts else gain)
        only_paths(self.copy, mixing=True)
        self.remeasure = _rescale_everywhere(self.copy)
        self.finite = False
        self._wake([others[name] for name in found.tokens])

    @torch.no_grad()
    def _wake(self, tokens: list[Tensor]) -> None:
        """Let tokens be one where the whole network has dead layers without: class attention."""
        if tokens and not all(each.any() for each in self.gradients().values()):
            for token in tokens:
                token.fill_(1)

    def keep(self, masks: Mapping[str, Tensor]) -> None:
        """Set what is masked to zero; it stays so."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.mul_(masks[name].to(weight.device))

    def gradients(self, image: int = 0) -> dict[str, Tensor]:
        """Return the gradients of the summed outputs for one image of random positive pixels.

        Signals are scaled as they were for the first image, which is to be asked for first.
        """
        if image == 0:
            self.remeasure()
        with torch.enable_grad(), followed(self.copy), NothingTakenAway():
            total = _sum(self.copy(self.images[image : image + 1]))
            if not self.finite and not torch.isfinite(total):
                raise CannotFollow(
                    f"the sum over the paths of {type(self.copy).__name__} is not finite"
                )
            found = torch.autograd.grad(total, list(self.weights.values()), materialize_grads=True)
        self.finite = True  # Asked once: later passes have fewer weights, and the device goes on.
        spend(1)
        return dict(zip(self.weights, found, strict=True))

    def paths_through(self) -> dict[str, Tensor]:
        """Return the sum over the paths through every weight, kept or not; 0: dead."""
        with exactly(self.images.device):
            first, second = self.gradients(), self.gradients(image=1)
        return {
            name: torch.where(each == second.pop(name), 0, each.abs_())
            for name, each in first.items()
        }

    @torch.enable_grad()
    def hears_of_the_image(self) -> dict[str, bool]:
        """Return, by layer in the order of calls, whether its output depends on the image."""
        outputs: dict[str, list[Tensor]] = {}

        def record(name: str) -> Callable:
            def keep(module: nn.Module, given: Any, output: Any) -> None:
                outputs.setdefault(name, []).append(_sum(output).detach())

            return keep

        hooks = [called(self.copy, n).register_forward_hook(record(n)) for n in self.weights]
        self.remeasure()
        with followed(self.copy), NothingTakenAway():
            for image in self.images.split(1):
                self.copy(image)
        for hook in hooks:
            hook.remove()
        halves = {name: len(found) // 2 for name, found in outputs.items()}
        return {n: found[: halves[n]] != found[halves[n] :] for n, found in outputs.items()}


def _sum(output: Any) -> Tensor:
    """Return the sum over all that a model or module puts out: a tensor, or many in any nest."""
    if isinstance(output, Tensor):
        return output.sum()
    parts = list(output.values()) if isinstance(output, Mapping) else list(output)
    return torch.stack([_sum(part) for part in parts if part is not None]).sum()


def _rescale_everywhere(model: nn.Module) -> Callable[[], None]:
    """Divide every module's output by the largest value that it had the first time.

    Returns what makes the next time the first one. The values stay on the device.
    """

    def hook(peaks: list[Tensor]) -> Callable:
        def rescale(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return output
            number = calls.setdefault(id(peaks), 0)
            calls[id(peaks)] = number + 1
            if number == len(peaks):
                peak = output.detach().abs().amax() if output.numel() else output.new_zeros(())
                peaks.append(torch.where(peak > 0, peak, 1))
            return output / peaks[number]

        return rescale

    def forget() -> None:
        for peaks in measured:
            peaks.clear()

    calls: dict[int, int] = {}
    measured: list[list[Tensor]] = []
    model.register_forward_pre_hook(lambda *_: calls.clear())
    for module in model.modules():
        measured.append([])
        module.register_forward_hook(hook(measured[-1]))
    return forget
