"""Means of gradients over given batches (and ranks), and what they cost in image passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from autosparse.core.errors import UsageError
from autosparse.models.contract import LossFn as LossFn
from autosparse.models.contract import outputs_of

Batch = tuple[Tensor, Tensor]
Batches = Iterable[Batch]
Network = Callable[[Tensor], Any]
Take = Callable[[int, Tensor], None]
"""(place among the tensors, gradient with respect to it, which may be overwritten)."""


class Shared(Sequence[Batch]):
    """This rank's share of the batches: a mean over it is taken over those of all ranks.

    Every rank must hold one (it may be empty) and call the same functions in the same order. The
    batches are not copied.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __getitem__(self, place: Any) -> Any:
        return self.batches[place]


@dataclass
class Cost:
    """What a computation cost, in forward-backward passes of one image."""

    image_passes: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)
    """Entries for the ticket's card, mostly about deviations from what was asked for."""


_COST: ContextVar[Cost | None] = ContextVar("cost", default=None)


@contextmanager
def counting() -> Iterator[Cost]:
    """Count the image passes that are made inside."""
    cost = Cost()
    token = _COST.set(cost)
    try:
        yield cost
    finally:
        _COST.reset(token)


def spend(images: float, passes: float = 1.0) -> None:
    """Count `passes` forward-backward passes over each of `images` images.

    A forward pass alone counts as 1/3 and a backward pass as 2/3; differentiating a gradient
    once more costs about as much as the pass that made it.
    """
    cost = _COST.get()
    if cost is not None:
        cost.image_passes += images * passes


def note(key: str, value: Any) -> None:
    """Add an entry to the card of the ticket that is being made."""
    cost = _COST.get()
    if cost is not None:
        cost.notes[key] = value


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Network:
    """Return images -> outputs of the model with `weights` in place of its own."""

    def network(images: Tensor) -> Any:
        return functional_call(model, dict(weights), (images,))

    return lambda images: outputs_of(network, images)


def mean_of(
    batches: Batches,
    part: Callable[[Tensor, Tensor], Sequence[Tensor | None]],
    like: Mapping[str, Tensor],
    *,
    passes: float = 1.0,
) -> dict[str, Tensor]:
    """Return the mean over all samples of what `part` gives per batch, by name.

    Args:
        batches: (images, labels); sizes may differ. A `Shared` list is summed over the ranks.
        part: (images, labels) -> per entry of `like` the batch's mean (None: zero).
        like: tensors of the same shapes, dtypes and device, by name.
        passes: forward-backward passes over its images that one call of `part` takes.

    Raises UsageError if there are no samples.
    """
    mean = _Mean(like)
    for images, labels in batches:
        parts = list(part(images, labels))
        for place, tensor in enumerate(parts):
            parts[place] = None
            if tensor is not None:
                mean.add(place, tensor * len(labels))
            del tensor
        mean.samples += len(labels)
    return mean.finished(isinstance(batches, Shared), passes)


class _Mean:
    """A mean over samples, by name, added up tensor by tensor."""

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.like, self.samples = dict(like), 0
        self.sums: list[Tensor | None] = [None] * len(self.like)

    def add(self, place: int, tensor: Tensor) -> None:
        """Add a sum over samples to the place-th tensor; `tensor` may be overwritten."""
        sum_ = self.sums[place]
        if sum_ is None:
            self.sums[place] = tensor
        else:
            sum_.add_(tensor)

    def finished(self, shared: bool, passes: float) -> dict[str, Tensor]:
        """Return the means, over all ranks if `shared`; count what they cost."""
        whole = [
            torch.zeros_like(like) if sum_ is None else sum_
            for like, sum_ in zip(self.like.values(), self.sums, strict=True)
        ]
        self.sums.clear()
        samples = settle(whole, self.samples, shared, passes)
        return {name: sum_.div_(samples) for name, sum_ in zip(self.like, whole, strict=True)}


def settle(sums: Sequence[Tensor], samples: int, shared: bool, passes: float) -> int:
    """Add up over the ranks if `shared`, in place; return the samples and count their passes.

    Raises UsageError if there are no samples.
    """
    if shared:
        count = torch.tensor([samples], device=sums[0].device)
        dist.all_reduce(count)
        for sum_ in sums:
            dist.all_reduce(sum_)
        samples = int(count)
    if not samples:
        raise UsageError("no batch to compute gradients on")
    spend(samples, passes)
    return samples


def gathered(batches: Batches, device: torch.device) -> Sequence[Batch]:
    """Return the batches of all ranks, in the order of the ranks; they need not be `Shared`.

    Those that were shared are on `device`, also on a rank without a share.
    """
    if not isinstance(batches, Shared):
        return batches if isinstance(batches, Sequence) else list(batches)
    everyone: list[list[Batch]] = [[] for _ in range(dist.get_world_size())]
    mine = [(images.cpu(), labels.cpu()) for images, labels in batches]
    dist.all_gather_object(everyone, mine)
    return [(images.to(device), labels.to(device)) for part in everyone for images, labels in part]


def mean_gradients(
    model: nn.Module | Network, parameters: Mapping[str, Tensor], batches: Batches, loss_fn: LossFn
) -> dict[str, Tensor]:
    """Return dL/dθ for each of `parameters`, the mean over all samples of all batches.

    Args:
        model: in the mode that is wanted; its buffers may change (see `untouched`).
        parameters: those to differentiate with respect to, by name.
        batches: (images, labels) on the model's device; sizes may differ.
        loss_fn: (outputs, labels) -> mean loss of the batch.
    """
    return mean_over_gradients(model, parameters, batches, loss_fn, lambda g: [g])


def mean_over_gradients(
    model: nn.Module | Network,
    parameters: Mapping[str, Tensor],
    batches: Batches,
    loss_fn: LossFn,
    parts: Callable[[Tensor], Sequence[Tensor]],
) -> dict[str, Tensor]:
    """Return what `parts` makes of each batch's gradients, added up and divided by the samples.

    Gradients are added up as they come, so no more than one of them exists beside the means.

    Args:
        model: as for `mean_gradients`, which this is for parts = [gradient].
        parameters: leaf tensors to differentiate with respect to, by name.
        batches: (images, labels) on the model's device; sizes may differ.
        loss_fn: (outputs, labels) -> mean loss of the batch.
        parts: a gradient, summed over the samples of a batch (it may be overwritten) -> the tensors
            to add up, each of its shape.

    Returns the k-th parts under the names, the first (k = 0) as they are, others with " k" added.
    """
    size = len(parameters)
    like = {
        f"{name} {kind}" if kind else name: tensor
        for kind in range(len(parts(torch.zeros(()))))
        for name, tensor in parameters.items()
    }
    mean = _Mean(like)

    def take(place: int, gradient: Tensor) -> None:
        for kind, each in enumerate(parts(gradient)):
            mean.add(kind * size + place, each)

    mean.samples = sum_gradients(model, parameters, batches, loss_fn, take)
    return mean.finished(isinstance(batches, Shared), 1.0)


def mean_hessian_times(
    vectors: Sequence[Tensor],
    model: nn.Module | Network,
    parameters: Mapping[str, Tensor],
    batches: Batches,
    loss_fn: LossFn,
) -> dict[str, Tensor]:
    """Return H v, the mean over all samples; H is the loss's Hessian with respect to `parameters`.

    Args:
        vectors: v, a tensor per parameter.
        model: as for `mean_gradients`, and the rest too.
    """

    def product(loss: Tensor, tensors: Sequence[Tensor], take: Take) -> None:
        gradients = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        edges = with_edges(gradients, vectors)
        del loss, gradients
        differentiate_again(edges, tensors, take)

    mean = _Mean(parameters)
    mean.samples = sum_gradients(model, parameters, batches, loss_fn, mean.add, product)
    return mean.finished(isinstance(batches, Shared), 2.0)


def sum_gradients(
    model: nn.Module | Network,
    parameters: Mapping[str, Tensor],
    batches: Batches,
    loss_fn: LossFn,
    take: Take,
    differentiate: Callable[[Tensor, Sequence[Tensor], Take], None] | None = None,
) -> int:
    """Give `take` each gradient dL/dθ, summed over a batch's samples; count the samples.

    `take` is called for every batch and parameter, with the place in `parameters` and a gradient
    that it may overwrite. Another `differentiate` than `backward_one_by_one` takes the same
    arguments, and gives something else of a parameter's shape.
    """
    samples, tensors = 0, list(parameters.values())
    for images, labels in batches:

        def take_sum(place: int, gradient: Tensor, count: int = len(labels)) -> None:
            take(place, gradient.mul_(count))

        loss = loss_fn(outputs_of(model, images), labels)
        (differentiate or backward_one_by_one)(loss, tensors, take_sum)
        del loss
        samples += len(labels)
    return samples


def backward_one_by_one(total: Tensor, tensors: Sequence[Tensor], take: Take) -> None:
    """Give `take` the gradient of each of the leaf `tensors` once it is computed, and free it.

    So they are never held all at once. `take` gets the place in `tensors` and the gradient.
    """
    with _handed_over(tensors, take):
        total.backward(inputs=list(tensors))


def with_edges(
    gradients: Iterable[Tensor | None], vectors: Iterable[Tensor]
) -> list[tuple[GradientEdge, Tensor]]:
    """Pair gradients, which have a graph, with vectors, without holding the gradients' values.

    None is left out, and gradients that depend on nothing.
    """
    return [
        (get_gradient_edge(gradient), vector)
        for gradient, vector in zip(gradients, vectors, strict=True)
        if gradient is not None and gradient.requires_grad
    ]


def differentiate_again(
    products: Sequence[tuple[GradientEdge, Tensor]],
    tensors: Sequence[Tensor],
    take: Take,
) -> None:
    """Give `take` d/dθ of the sum of gradients * vectors, as `backward_one_by_one` does.

    Args:
        products: see `with_edges`.
        tensors: θ, leaves.
        take: gets the place in `tensors` and the gradient, which it may overwrite.
    """
    if products:
        edges, vectors = zip(*products, strict=True)
        with _handed_over(tensors, take):
            torch.autograd.backward(edges, vectors, inputs=list(tensors))


@contextmanager
def _handed_over(tensors: Sequence[Tensor], take: Take) -> Iterator[None]:
    """Inside, `take` gets the gradients of the leaf `tensors`, which are then freed."""

    def hand_over(place: int, tensor: Tensor) -> None:
        gradient, tensor.grad = tensor.grad, None
        if gradient is not None:
            take(place, gradient)

    before = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    handles = [
        tensor.register_post_accumulate_grad_hook(partial(hand_over, place))
        for place, tensor in enumerate(tensors)
    ]
    try:
        yield
    finally:
        for handle, tensor, gradient in zip(handles, tensors, before, strict=True):
            handle.remove()
            tensor.grad = gradient
