"""The contract for a user's own model, loss and batches; one line says what breaks it.

Criteria call a model and a loss only through this module: whatever these raise reaches the user
with its own message. Outputs may be tensors, or tuples, lists and dicts of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree

from autosparse.core.errors import UsageError, UserError

LossFn = Callable[[Any, Tensor], Tensor]
"""(outputs, labels) -> mean loss."""
BATCH = "a batch is a pair (normalised images [B, C, H, W], labels [B])"
IGNORED = -100
"""A label that cross-entropy leaves out."""
PASS_ON = (UserError, torch.OutOfMemoryError)
"""Errors that are passed on as they are."""


def of_the_machine(error: BaseException) -> bool:
    """Whether an error is about memory or the device, not about what was computed."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | MemoryError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("can't allocate memory", "out of memory", "cuda error"))


@contextmanager
def gradients_on() -> Iterator[None]:
    """Run with autograd on, also inside `torch.no_grad` and `torch.inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def outputs_of(network: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Return a network's outputs for images [B, C, H, W].

    Whatever the network raises becomes a UsageError with its message.
    """
    try:
        return network(images)
    except PASS_ON:
        raise
    except Exception as error:
        raise UsageError(
            f"the model fails on images {list(images.shape)}: {_words(error)}{remedy(error)}"
        ) from error


def _words(error: Exception) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def remedy(error: Exception) -> str:
    """Return advice about a model's error, to be added to its message."""
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return "; batch norm needs larger batches, or scoring in eval mode"
    if isinstance(error, TypeError) and "required positional argument" in str(error):
        return "; it is called with the images alone: wrap it in a module that gives it the rest"
    return ""


def checked_loss(loss_fn: LossFn, model: nn.Module) -> LossFn:
    """Return `loss_fn` with a UsageError for what it raises, and for a result that is no loss."""
    without_classes = getattr(model, "num_classes", None) == 0

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        if loss_fn is cross_entropy and without_classes:
            raise UsageError(
                "the model has no classifier (num_classes=0), and the cross-entropy of features "
                "means nothing: build it with its classes, or pass loss_fn"
            )
        if loss_fn is cross_entropy:
            _check_labels(outputs, labels)
        try:
            value = loss_fn(outputs, labels)
        except PASS_ON:
            raise
        except Exception as error:
            name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
            raise UsageError(
                f"the loss ({name}) fails on outputs {_kind(outputs)} and labels {_kind(labels)}: "
                f"{_words(error)}; pass a loss_fn that takes them"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError(f"loss_fn must return the mean loss, one number, not {_kind(value)}")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise UsageError("the loss does not depend on the model's weights: see loss_fn")
        return value

    return loss


def _check_labels(outputs: Any, labels: Tensor) -> None:
    """Raise UsageError for a label that logits [B, C] have no class for."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        return
    if labels.ndim == 1 and not labels.is_floating_point():
        _check_range(labels, outputs.shape[1])


def _kind(value: Any) -> str:
    """Describe a value in few words: the shape of a tensor, the keys of a dict, a type."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def as_batch(batch: Any, *, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Return a user's batch as images and labels; raise UsageError that says what a batch is.

    Whole numbers become int64 labels, as losses want them. With `classes`, single labels must lie
    in 0 to classes - 1, or be IGNORED.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UsageError(f"{BATCH}, not {_kind(batch)}; data is a list or loader of such pairs")
    images, labels = batch
    for name, part in (("images", images), ("labels", labels)):
        if not isinstance(part, Tensor):
            raise UsageError(f"{BATCH}; the {name} are {_kind(part)}, not a tensor")
    if images.dtype == torch.uint8:
        raise UsageError(f"{BATCH}; the images are uint8: make them floats and normalise them")
    if not labels.ndim or not images.ndim or len(images) != len(labels) or not len(images):
        raise UsageError(f"{BATCH}; these are images {_kind(images)} and labels {_kind(labels)}")
    if labels.ndim == 1 and not labels.is_floating_point():
        labels = labels.long()
        if classes:
            _check_range(labels, classes)
    return _normal(images), _normal(labels)


def _check_range(labels: Tensor, classes: int) -> None:
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise UsageError(
            f"label {int(wrong[0])} is out of range: the model tells {classes} classes apart, "
            f"0 to {classes - 1}"
        )


def _normal(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may keep, also for one made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


class Checked:
    """A user's batches, checked as they are read; they can be read as often as the user's can."""

    def __init__(self, batches: Iterable[Any], classes: int | None) -> None:
        self.batches, self.classes = batches, classes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            drawn = iter(self.batches)
        except TypeError:
            raise UsageError(f"data is a list or loader of batches, and {BATCH}") from None
        for batch in drawn:
            yield as_batch(batch, classes=self.classes)


# Outputs of any type


def each_float(function: Callable[[Tensor], Tensor], outputs: Any) -> Any:
    """Return the outputs with `function` applied to every floating-point tensor among them."""

    def apply(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return _pytree.tree_map(apply, outputs)


def in_single(outputs: Any) -> Any:
    """Return the outputs with tensors of half precision as float32."""
    halves = (torch.bfloat16, torch.float16)
    return each_float(lambda part: part.float() if part.dtype in halves else part, outputs)


def joined(outputs: Any) -> Tensor:
    """Return outputs as one tensor: as they are, or all their floats side by side, [B, …]."""
    if isinstance(outputs, Tensor):
        return outputs
    floats: list[Tensor] = []
    each_float(lambda part: floats.append(part) or part, outputs)
    if not floats:
        raise UsageError(f"the model's outputs hold no tensor of floats: {_kind(outputs)}")
    return torch.cat([part.flatten(1) for part in floats], dim=1)
