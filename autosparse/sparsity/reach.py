"""Which weights lie on a path from input to output, and choosing such that do.

At a density of one per cent a random ticket has half of its weights on no path, and none on a path
where layers are narrow. Such a weight is worth nothing: it adds a constant to the output at most.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autosparse.core.memory import keep_freed_blocks
from autosparse.models.gradients import note
from autosparse.models.numerics import exactly
from autosparse.models.zoo import device_of
from autosparse.sparsity import masks as masks_module
from autosparse.sparsity.masks import Masks, keep_counts, top
from autosparse.sparsity.path_network import PathNetwork
from autosparse.sparsity.paths import CannotFollow

SIDE = 64
"""Pixels of the images that networks are thinned with, if they take images so small: paths are the
same at any size, except those of kernel positions that see padding only."""
GAIN = 0.75
"""The value of gains where only liveness is asked. Any but one, which would cut the path of x in
(1 - gain) * x + gain * f(x)."""
ROUNDS = 32
"""Rounds in which a network is thinned by default: AutoS's, chosen in docs/results/log.md."""


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
    reach = within_reach(model, masks, shape)
    return {name: mask & reach[name] for name, mask in masks.items()}


def onto_paths(
    model: nn.Module, masks: Masks, scores: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Masks:
    """Return masks whose dead weights are exchanged for live ones of the same layer.

    Dead weights (see `live`) give way to the highest scores among those that would lie on a path of
    living weights; where a layer has too few of those, its best dead ones stay. Every layer keeps
    as many weights as before. If nothing is live, no single exchange helps, and the whole network
    is thinned (see `thinned`), unless a layer keeps no weight: then there is no path to be had.
    """
    alive = live(model, masks, shape)
    counts = masks_module.counts(masks)
    if all(counts.values()) and not any(mask.any() for mask in alive.values()):
        chosen = thinned(model, scores, counts, shape)
        return {name: mask.to(masks[name].device) for name, mask in chosen.items()}
    return _exchanged(masks, alive, within_reach(model, alive, shape), scores)


def _exchanged(
    masks: Masks, alive: Masks, reach: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> Masks:
    """Return the masks with dead weights exchanged for the best in reach; see `onto_paths`."""
    chosen = {}
    for name, mask in masks.items():
        score, kept = {name: scores[name]}, alive[name]
        for candidates in (reach[name] & ~alive[name], mask):
            candidates = candidates & ~kept
            wanted = int(mask.count_nonzero()) - int(kept.count_nonzero())
            count = min(wanted, int(candidates.count_nonzero()))
            kept = kept | keep_counts(score, {name: count}, within={name: candidates})[name]
        chosen[name] = kept
    return chosen


def within_reach(
    model: nn.Module, masks: Mapping[str, Tensor], shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return which weights lie on a path, or would if they were kept too.

    That is told by a PathNetwork, in which every kept weight has a random positive value: a weight
    is in reach if the gradient of the output by it depends on the image.

    Raises CannotFollow where such a network cannot be computed.
    """
    network = PathNetwork(model, masks, shape, torch.float64, GAIN)
    network.keep(masks)
    with exactly(network.images.device):
        first, second = network.gradients(), network.gradients(image=1)
    return {name: (first[name] != second[name]).to(mask.device) for name, mask in masks.items()}


def first_dead(model: nn.Module, masks: Mapping[str, Tensor], shape: tuple[int, ...]) -> str:
    """Return the first layer from which on nothing depends on the image, of a dead network.

    Args: see `live`.
    """
    network = PathNetwork(model, masks, shape, torch.float64, GAIN)
    network.keep(masks)
    with exactly(network.images.device):
        depends = network.depends_on_the_image()
    last = max((place for place, each in enumerate(depends.values()) if each), default=-1)
    called = list(depends) or list(masks)
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
    begun = within or masks_module.dense(scores)
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

    A warning and the ticket's card say so if the paths cannot be followed. Any other error, such as
    memory that runs out, is raised.
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
    """The weights of a layer that are left; each round costs in proportion to their number.

    All is done on the device of the scores. How many weights go is known beforehand, so that
    nothing waits for a GPU.
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
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.places.device)
        mask.view(-1).index_fill_(0, self.places.long(), True)
        return mask


def _narrow(places: Tensor, size: int) -> Tensor:
    """Return positions below `size` in as few bytes as hold them."""
    return places.int() if size < 1 << 31 else places


def _parted(rated: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Return the positions of the `left` highest, ascending, and of the others; ties: first ones.

    On a CPU by a threshold; elsewhere by sorting, which needs no answer from the device.
    """
    if rated.device.type == "cpu":
        stays = top(rated, left).numpy()
        return torch.from_numpy(np.flatnonzero(stays)), torch.from_numpy(np.flatnonzero(~stays))
    return _parted_by_sorting(rated, left)


def _parted_by_sorting(rated: Tensor, left: int) -> tuple[Tensor, Tensor]:
    order = _narrow(rated.sort(descending=True, stable=True).indices, len(rated))
    return order[:left].sort().values, order[left:]


def _rated(score: Tensor, paths: Tensor, tilt: float) -> Tensor:
    """Return score + tilt * log(paths); weights on no path rank below all others, by their score.

    `paths` is overwritten.
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
) -> PathNetwork:
    """Return the network for images of at most `SIDE`, or of `shape` where it takes no other."""
    small = (shape[0], *(min(side, SIDE) for side in shape[1:]))
    if small != tuple(shape):
        try:
            network = PathNetwork(model, masks, small, torch.float32)
            network.gradients()
            return network
        except CannotFollow:
            pass  # It takes images of one size only.
    return PathNetwork(model, masks, shape, torch.float32)
