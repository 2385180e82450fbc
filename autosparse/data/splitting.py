"""Which images go where: splits and limits by class, and the order of an epoch; always the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from autosparse.core.errors import UsageError

SPLIT_SEED = 20240827
"""Fixes every split; not an option, so that a test image never becomes a training image. Any number
would do; splits that are made with the same seed and differ in purpose have salts 0, 1, 2."""


def epoch_seed(seed: int, epoch: int) -> int:
    """Return one number for a seed and an epoch, or another number below a million.

    1,000,003 is the first prime above a million: no two pairs give the same. What data make of it
    fits into torch's 64 bits for seeds of 32 bits.
    """
    if not -(1 << 31) <= seed < 1 << 32:
        raise UsageError(f"seed must be at most {(1 << 32) - 1}, got {seed}")
    return seed * 1_000_003 + epoch


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation that is fixed by (seed, epoch)."""
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    return torch.randperm(count, generator=generator)


def stratified(
    labels: Tensor, fraction: float, *, salt: int = 0, at_most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Split positions into (rest, chosen): `fraction` of every class chosen, always the same.

    The total is exact (rounded); what the classes' fractions leave over goes to the largest
    remainders. Every class of two or more images has at least one in each part if that is
    possible; many small classes may thus make the total larger, unless `at_most` is given.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED + salt)
    classes = labels.unique().tolist()
    places = {label: (labels == label).nonzero().squeeze(1) for label in classes}
    counts = _shares({label: len(places[label]) for label in classes}, fraction, at_most)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in classes:
        order = torch.randperm(len(places[label]), generator=generator)
        chosen[places[label][order[: counts[label]]]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def _shares(sizes: dict[int, int], fraction: float, at_most: int | None = None) -> dict[int, int]:
    """Divide round(fraction * total) among classes in proportion; each keeps an image or more."""
    total = round(fraction * sum(sizes.values()))
    ideal = {label: size * fraction for label, size in sizes.items()}
    most = {label: max(size - 1, 1) for label, size in sizes.items()}
    least = {label: min(1, most[label]) if size > 1 else 0 for label, size in sizes.items()}
    counts = {label: min(max(int(ideal[label]), least[label]), most[label]) for label in sizes}
    while (missing := total - sum(counts.values())) > 0:
        not_full = [label for label in sizes if counts[label] < most[label]]
        if not not_full:
            break
        not_full.sort(key=lambda label: counts[label] - ideal[label])
        for label in not_full[:missing]:
            counts[label] += 1
    while at_most is not None and sum(counts.values()) > at_most:
        spare = [label for label in sizes if counts[label] > least[label]]
        counts[max(spare, key=lambda label: counts[label] - ideal[label])] -= 1
    return counts


def limited_places(labels: Tensor, limit: int | None) -> Tensor:
    """Return the positions of `limit` images, stratified, always the same ones."""
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    classes = len(labels.unique())
    if limit < classes:
        raise UsageError(f"data.train_limit must be at least {classes}, one per class: {limit}")
    return stratified(labels, limit / len(labels), salt=1, at_most=limit)[1]


def warn_of_empty(labels: Tensor, classes: Iterable[str], where: str) -> None:
    """Warn if classes have no image; `where` begins the warning."""
    names = list(classes)
    counts = torch.bincount(labels, minlength=len(names))
    empty = [names[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if empty:
        some = ", ".join(empty[:5]) + (" …" if len(empty) > 5 else "")
        hint = "; are labels counted from 1?" if empty == names[:1] else ""
        warnings.warn(
            f"{where}: {len(empty)} of {len(names)} classes have no image: {some}{hint}",
            stacklevel=4,
        )
