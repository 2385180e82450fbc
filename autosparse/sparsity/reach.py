"""Finds the weights that lie on a path from input to output, and chooses masks whose weights do.

At a density of one per cent a random ticket has half of its weights on no path, and none on a path
where layers are narrow. Such a weight is worth nothing: it adds a constant to the output at most.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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
AT_ONCE = 1 << 26
"""Most weights that a GPU thins at once: sorting takes some 30 bytes for each."""
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
    model: nn.Module,
    masks: Masks,
    scores: Mapping[str, Tensor],
    shape: tuple[int, ...],
    *,
    within: Masks | None = None,
) -> Masks:
    """Return masks whose dead weights are exchanged for live ones of the same layer.

    Dead weights (see `live`) give way to the highest scores among those that would lie on a path of
    living weights; where a layer has too few of those, its best dead ones stay. Every layer keeps
    as many weights as before. If nothing is live, no single exchange helps, and the whole network
    is thinned (see `thinned`), unless a layer keeps no weight: then there is no path to be had.
    The result lies inside `within`, as `masks` do.
    """
    alive = live(model, masks, shape)
    counts = masks_module.counts(masks)
    if all(counts.values()) and not any(mask.any() for mask in alive.values()):
        chosen = thinned(model, scores, counts, shape, within=within)
        return {name: mask.to(masks[name].device) for name, mask in chosen.items()}
    reached = within_reach(model, alive, shape)
    if within is not None:
        reached = {name: each & within[name] for name, each in reached.items()}
    return _exchanged(masks, alive, reached, scores)


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
    is in reach if the output's gradient with respect to it depends on the image.

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
        parts = _parts(network.weights, begun, scores, counts)
        gradients = network.repeated()
        for number in range(1, rounds + 1):
            sums = gradients()
            for part in parts:
                part.thin(sums, number / rounds, tilt)
        chosen = {name: mask for part in parts for name, mask in part.masks().items()}
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
    """The weights of a layer that are left; each round costs in proportion to their number."""

    def __init__(self, name: str, weight: Tensor, mask: Tensor, score: Tensor, count: int) -> None:
        self.name, self.weight, self.count = name, weight.view(-1), count
        self.places = _narrow(mask.flatten().nonzero().squeeze(1), mask.numel())
        self.size = len(self.places)
        self.score = score.flatten().index_select(0, self.places).float()
        self.shape = mask.shape

    def thin(self, sums: dict[str, Tensor], done: float, tilt: float) -> None:
        """Set weights to zero, once the share `done` of the rounds is over."""
        paths = sums.pop(self.name).flatten().index_select(0, self.places).abs_()
        stays = top(_rated(self.score, paths, tilt), _left(self.size, self.count, done)).numpy()
        stay, go = (torch.from_numpy(np.flatnonzero(each)) for each in (stays, ~stays))
        self.weight.index_fill_(0, self.places.index_select(0, go).long(), 0)
        self.places, self.score = (x.index_select(0, stay) for x in (self.places, self.score))

    def masks(self) -> Masks:
        """Return where the weights that are left lie."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        mask.view(-1).index_fill_(0, self.places.long(), True)
        return {self.name: mask}


class _Layers:
    """The weights of many layers that are left, thinned as `_Layer` does, but all in one go.

    On a GPU it is launches that cost, not weights; and how many go is known beforehand, so that
    nothing waits for it. Among weights on no path ties may be broken otherwise: `_Layer` rounds
    their scores (see `_rated`).
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        masks: Masks,
        scores: Mapping[str, Tensor],
        counts: Mapping[str, int],
    ) -> None:
        self.weights = weights
        whole = torch.cat([masks[name].flatten() for name in weights])
        self.kept = whole.to(next(iter(weights.values())).dtype)
        pieces = self.kept.split([each.numel() for each in weights.values()])
        pairs = zip(weights.items(), pieces, strict=True)
        self.by_layer = {name: piece.view(weight.shape) for (name, weight), piece in pairs}
        self.sizes = torch.stack([masks[name].count_nonzero() for name in weights]).tolist()
        self.counts = [counts[name] for name in weights]
        self.lefts = self.sizes
        self.places = _narrow(whole.nonzero().squeeze(1), whole.numel())
        flat = torch.cat([scores[name].flatten().float() for name in weights])
        self.score = flat.index_select(0, self.places)
        numbers = torch.arange(len(weights), dtype=torch.int16, device=flat.device)
        sizes = torch.tensor(self.sizes, device=flat.device)
        self.layer = numbers.repeat_interleave(sizes, output_size=len(self.places))

    def thin(self, sums: dict[str, Tensor], done: float, tilt: float) -> None:
        """Set weights to zero, once the share `done` of the rounds is over."""
        flat = torch.cat([sums.pop(name).flatten() for name in self.weights])
        parts = self._ranked(flat.index_select(0, self.places).abs_(), tilt).split(self.lefts)
        pairs = zip(self.sizes, self.counts, strict=True)
        self.lefts = [_left(size, count, done) for size, count in pairs]
        goes = [part[left:] for part, left in zip(parts, self.lefts, strict=True)]
        stays = [part[:left] for part, left in zip(parts, self.lefts, strict=True)]
        self.kept.index_fill_(0, self.places.index_select(0, torch.cat(goes)).long(), 0)
        torch._foreach_mul_(list(self.weights.values()), list(self.by_layer.values()))
        stay = torch.cat(stays).sort().values
        self.places, self.score, self.layer = (
            each.index_select(0, stay) for each in (self.places, self.score, self.layer)
        )

    def _ranked(self, paths: Tensor, tilt: float) -> Tensor:
        """Return positions layer by layer, the best first; ties: the first ones; see `_rated`.

        `paths` is overwritten.
        """
        dead = ~(paths > 0)
        lifted = paths.clamp_(min=torch.finfo(paths.dtype).tiny).log_().mul_(tilt).add_(self.score)
        order = torch.where(dead, self.score, lifted).sort(descending=True, stable=True).indices
        groups = (self.layer * 2 + dead).index_select(0, order)
        return order.index_select(0, groups.sort(stable=True).indices)

    def masks(self) -> Masks:
        """Return where the weights that are left lie."""
        return {name: kept.bool() for name, kept in self.by_layer.items()}


def _parts(
    weights: Mapping[str, Tensor],
    masks: Masks,
    scores: Mapping[str, Tensor],
    counts: Mapping[str, int],
) -> Sequence[_Layer | _Layers]:
    """Return what thins the layers in the order of the scores: each apart on a CPU."""
    ordered = {name: weights[name] for name in scores}
    if all(weight.device.type == "cpu" for weight in ordered.values()):
        return [_Layer(n, w, masks[n], scores[n], counts[n]) for n, w in ordered.items()]
    return [_Layers(part, masks, scores, counts) for part in _cut(ordered, AT_ONCE)]


def _narrow(places: Tensor, size: int) -> Tensor:
    """Return positions below `size` in as few bytes as hold them."""
    return places.int() if size < 1 << 31 else places


def _cut(weights: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Cut into parts of at most `most` weights, or of one layer."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, weight in weights.items():
        if parts[-1] and weight.numel() + sum(each.numel() for each in parts[-1].values()) > most:
            parts.append({})
        parts[-1][name] = weight
    return parts


def _left(size: int, count: int, done: float) -> int:
    """Return how many of a layer's weights are left when the share `done` of rounds is over."""
    most = round(size ** (1 - done) * max(count, 1) ** done)
    return min(size, count if done == 1 else max(count, most))


def _rated(score: Tensor, paths: Tensor, tilt: float) -> Tensor:
    """Return score + tilt * log(paths); weights on no path rank below all others, by their score.

    `paths` is overwritten.
    """
    on_path = paths > 0
    lifted = paths.clamp_(min=torch.finfo(paths.dtype).tiny).log_().mul_(tilt).add_(score)
    if not on_path.any() or on_path.all():
        return lifted
    best_dead = score.masked_fill(on_path, -torch.inf).max()
    worst_alive = lifted.masked_fill(~on_path, torch.inf).min()
    dead = score.sub(best_dead).add_(worst_alive).sub_(1)
    return torch.where(on_path, lifted, dead)


def _small_network(
    model: nn.Module, masks: Mapping[str, Tensor], shape: tuple[int, ...]
) -> PathNetwork:
    """Return the network for images of at most `SIDE`, or of `shape` where it takes no other."""
    small = (shape[0], *(min(side, SIDE) for side in shape[1:]))
    if small != tuple(shape) and not any(map(_takes_one_size, model.modules())):
        try:
            network = PathNetwork(model, masks, small, torch.float32)
            network.gradients()
            return network
        except CannotFollow:
            pass  # It takes images of one size only.
    return PathNetwork(model, masks, shape, torch.float32)


def _takes_one_size(module: nn.Module) -> bool:
    """Whether it is a patch embedding of timm's that refuses images of other sizes."""
    strict = getattr(module, "strict_img_size", False)
    return bool(strict) and getattr(module, "img_size", None) is not None
