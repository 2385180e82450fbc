"""A network made into a sum over its paths, of which reach.py takes the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.models import roles
from autosparse.models.gradients import spend
from autosparse.models.numerics import exactly
from autosparse.models.zoo import called
from autosparse.sparsity.paths import (
    CannotFollow,
    NothingTakenAway,
    followed,
    only_paths,
    without_shifts,
)


class PathNetwork:
    """A copy of a network that sums over paths; each kept weight has a random positive value.

    Biases and positions are zero, norms and activations are left out (see paths.py), and signals
    are rescaled after every module, so that nothing overflows and no gate saturates.

    Args:
        model: dense; it is copied.
        masks: per prunable parameter, True = kept; only the names count here, see `keep`.
        shape: [C, H, W] of an image.
        dtype: to compute in.
        gain: the value of parameters that are neither weights nor added to the signal (gains).
    """

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
                    drawn = torch.rand(
                        parameter.shape, generator=generator, dtype=dtype, device="cpu"
                    )
                    parameter.copy_(drawn.add_(0.5))
        device = next(iter(self.weights.values())).device
        images = torch.rand(2, *shape, generator=generator, dtype=dtype, device="cpu")
        self.images = images.add_(0.5).to(device)
        with followed(model):
            seen = roles.of(self.copy, self.images[:1])
        with torch.no_grad():
            for name, parameter in others.items():
                parameter.fill_(0 if name in seen.shifts else gain)
        only_paths(self.copy, mixing=True)
        self.remeasure = _rescale_everywhere(self.copy)
        self.finite = False
        self._wake([others[name] for name in seen.tokens])

    @torch.no_grad()
    def _wake(self, tokens: list[Tensor]) -> None:
        """Set tokens to one if there are dead layers while they are zero, as in class attention."""
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

        Signals are scaled as they were for image 0, so call it for that one first.
        """
        gradients = self._gradients(image)
        spend(1)
        return gradients

    def repeated(self) -> Callable[[], dict[str, Tensor]]:
        """Return a function for many calls of `gradients()`, between which only weights change.

        On a GPU it launches the whole pass at once, and what it returned is good until its next
        call.
        """
        if not self.images.is_cuda:
            return self.gradients
        if not self.finite:
            self.gradients()
        recorded = _Recorded.of(lambda: self._gradients(0), self.images.device)
        return self.gradients if recorded is None else recorded

    def _gradients(self, image: int) -> dict[str, Tensor]:
        if image == 0:
            self.remeasure()
        with torch.enable_grad(), followed(self.copy), NothingTakenAway():
            total = _sum(self.copy(self.images[image : image + 1]))
            if not self.finite and not torch.isfinite(total):
                raise CannotFollow(
                    f"the sum over the paths of {type(self.copy).__name__} is not finite"
                )
            by_weight = torch.autograd.grad(
                total, list(self.weights.values()), materialize_grads=True
            )
        self.finite = True  # Later passes have fewer weights; asking again would stall a GPU.
        return dict(zip(self.weights, by_weight, strict=True))

    def paths_through(self) -> dict[str, Tensor]:
        """Return the sum over the paths through every weight, kept or not; 0: dead."""
        with exactly(self.images.device):
            first, second = self.gradients(), self.gradients(image=1)
        return {
            name: torch.where(each == second.pop(name), 0, each.abs_())
            for name, each in first.items()
        }

    @torch.enable_grad()
    def depends_on_the_image(self) -> dict[str, bool]:
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
        return {
            name: sums[: len(sums) // 2] != sums[len(sums) // 2 :] for name, sums in outputs.items()
        }


class _Recorded:
    """What a function computes on a GPU, recorded once and launched again as a whole (CUDA graph).

    A pass of one small image is thousands of launches, each of which takes the host longer than
    the GPU. What is read lies where it lay, and so does what is returned.
    """

    def __init__(self, compute: Callable[[], dict[str, Tensor]], device: torch.device) -> None:
        self.device, self.graph = device, torch.cuda.CUDAGraph()
        # The outer stream is put back even where ending the recording fails.
        with (
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(
                self.graph,
                stream=torch.cuda.Stream(device),
                capture_error_mode="thread_local",
            ),
        ):
            self.found = compute()

    @classmethod
    def of(cls, compute: Callable[[], dict[str, Tensor]], device: torch.device) -> _Recorded | None:
        """Record a function that has been called before; None if it waits for the GPU."""
        with torch.cuda.device(device):
            random = torch.cuda.default_generators[torch.cuda.current_device()]
        before = random.clone_state()
        try:
            return cls(compute, device)
        except (RuntimeError, CannotFollow):
            # The device's random numbers believe that the recording goes on, and would fail.
            random.graphsafe_set_state(before)
            return None

    def __call__(self) -> dict[str, Tensor]:
        spend(1)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return dict(self.found)


def _sum(output: Any) -> Tensor:
    """Return the sum over an output: a tensor, or lists and dicts of tensors, nested or not."""
    if isinstance(output, Tensor):
        return output.sum()
    parts = list(output.values()) if isinstance(output, Mapping) else list(output)
    return torch.stack([_sum(part) for part in parts if part is not None]).sum()


def _rescale_everywhere(model: nn.Module) -> Callable[[], None]:
    """Divide every module's output by the largest value of its first output.

    Returns a function after which the next output counts as the first. No value leaves the device.
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
