"""How many weights AutoS scores per second: timm's resnet50, 25 M weights, on the CPU.

    python -m benchmarks.scoring --json scoring.json

The gradient passes are left out: every criterion that looks at data pays the same for them.
`autos` is ours (both heads, features included), `paper_mlp` the paper's network.
`resnet50_seconds` is all of it: features, scores, layer counts and the choice on paths through the
network (for images of 224 px).
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from autosparse.autos.network import AutoS
from autosparse.criteria.autos import TILT, counts, noise_for
from autosparse.models.zoo import prunable
from autosparse.sparsity.reach import best_on_paths
from benchmarks.report import figure, publish, seconds_in_turn

SPARSITY = 0.95


def jobs(
    model: nn.Module, weights: dict[str, Tensor], gradients: dict[str, Tensor]
) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; `rest` goes on from what `autos` has left."""
    ours = AutoS("context", [16, 16], head="survival").eval()
    paper = AutoS("paper").eval()
    left = []

    def rate() -> None:
        densities = ours.layer_densities(weights, gradients, 1 - SPARSITY)
        left[:] = ours.odds(weights, gradients, 1 - SPARSITY), densities

    def choose() -> None:
        scores, densities = left
        generator = torch.Generator().manual_seed(0)
        noise = {name: noise_for("live", each, generator) for name, each in scores.items()}
        best_on_paths(model, noise, counts(densities, weights, SPARSITY), (3, 224, 224), tilt=TILT)

    return {
        "autos": rate,
        "rest": choose,
        "paper_mlp": lambda: paper.score(weights, gradients),
    }


def main() -> None:
    """Measure all in turn."""
    model = timm.create_model("resnet50", pretrained=False)
    weights = {name: weight.detach() for name, weight in prunable(model).items()}
    gradients = {name: torch.randn_like(weight) * 1e-3 for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    taken = seconds_in_turn(jobs(model, weights, gradients))
    rest = taken.pop("rest")
    figures = {
        f"{name}_weights_per_s": figure(
            [total / seconds for seconds in runs], "weights/s", ">= 1e7", "each other"
        )
        for name, runs in taken.items()
    }
    both = [first + second for first, second in zip(taken["autos"], rest, strict=True)]
    figures["resnet50_seconds"] = figure(both, "s", "<= 15", "none")
    publish(figures, __doc__)


if __name__ == "__main__":
    main()
