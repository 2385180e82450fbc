"""Models of the user's own: whether they run, and one line that says why not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError, UserError
from autosparse.data.sets import DataSource
from autosparse.models.contract import of_the_machine, remedy
from autosparse.models.restore import untouched
from autosparse.models.zoo import device_of


def check_runs(model: nn.Module, data: DataSource | Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raise UsageError if a model of the user's own fails on the data that are given.

    Without this, criteria that never run the model would make a ticket of a broken one.
    """
    if not isinstance(data, DataSource):
        first = next(iter(data), None)
        image = None if first is None else first[0][:1].to(device_of(model))
    elif hasattr(model, "autosparse_recipe"):  # It was made for the data.
        return
    else:
        image = ones(model, (data.in_chans, data.image_size, data.image_size))
    if image is not None:
        run(model, image)


def run(model: nn.Module, image: Tensor) -> None:
    """Run a model on an image [1, ...], in eval mode; raise UsageError if it fails."""
    with untouched(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            model(image)
        except Exception as error:
            if of_the_machine(error) or isinstance(error, UserError):
                raise
            raise UsageError(own_failure(model, image.shape[1:], error)) from error


def ones(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Return an image of ones, of the model's dtype and device."""
    weight = next(model.parameters())
    return torch.ones(1, *shape, dtype=weight.dtype, device=weight.device)


def own_failure(model: nn.Module, shape: Sequence[int], error: Exception) -> str:
    """Return the error of a model that raised when it was called, in one line."""
    message = " ".join(str(error).split()) or "no message"
    kind = type(error).__name__
    name = type(model).__name__
    where = f"in its own forward, on an image {list(shape)}"
    return f"{name} raised {kind} {where}: {message}{remedy(error)}"
