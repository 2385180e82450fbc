"""How many weights AutoS scores per second: timm's resnet50, 25 M weights, on the CPU.

    python -m benchmarks.scoring --json scoring.json

The gradient passes are left out: every criterion that looks at data pays the same for them.
`autos` is ours (two heads, features included), `paper_table` the paper's as it is used here,
`paper_mlp` and `paper_resnet18` the paper's networks called on as many weights as take a moment.
`resnet50_seconds` is all of it: features, scores, layer counts, the choice on paths through the
network (for images of 224 px) and masks.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from autosparse.autos.network import AutoS
from autosparse.criteria.autos import TILT, counts, drawn, marked
from autosparse.models.zoo import prunable
from autosparse.sparsity import masks
from autosparse.sparsity.reach import best_on_paths
from benchmarks.report import figure, publish, seconds_in_turn

SPARSITY = 0.95
SAMPLES = {"paper_mlp": 1 << 20, "paper_resnet18": 1 << 9}
"""Weights that a network is called on, in batches of at most 4096."""


@torch.no_grad()
def called(network: AutoS, pairs: Tensor) -> None:
    """Call the network as it is on [N, 2]."""
    for part in pairs.split(4096):
        network(part)


def jobs(
    model: nn.Module, weights: dict[str, Tensor], gradients: dict[str, Tensor]
) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; `rest` goes on from what `autos` has left."""
    ours = AutoS("context", [16, 16], head="survival").eval()
    networks = {
        "paper_mlp": AutoS("paper").eval(),
        "paper_resnet18": AutoS("paper", backbone="resnet18").eval(),
    }
    table = AutoS("paper").eval()
    table.tabulate(torch.randn(10_000, 2))
    pairs = torch.randn(max(SAMPLES.values()), 2)
    left = []

    def rate() -> None:
        left[:] = ours.rate(weights, gradients, 1 - SPARSITY)

    def choose() -> None:
        scores, densities = left
        generator = torch.Generator().manual_seed(0)
        noise = {name: drawn(each, "live", 1.0, generator) for name, each in scores.items()}
        kept = counts(densities, weights, SPARSITY)
        chosen = best_on_paths(model, noise, kept, (3, 224, 224), tilt=TILT)
        masks.from_scores(marked(chosen, noise), SPARSITY)

    return {
        "autos": rate,
        "rest": choose,
        "paper_table": lambda: table.score(weights, gradients),
        **{
            name: lambda name=name: called(networks[name], pairs[: SAMPLES[name]])
            for name in networks
        },
    }


def main() -> None:
    """Measure all in turn."""
    model = timm.create_model("resnet50", pretrained=False)
    weights = {name: weight.detach() for name, weight in prunable(model).items()}
    gradients = {name: torch.randn_like(weight) * 1e-3 for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    taken = seconds_in_turn(jobs(model, weights, gradients))
    rest = taken.pop("rest")
    goals = {"autos": ">= 1e7", "paper_table": ">= 1e7"}
    figures = {
        f"{name}_weights_per_s": figure(
            [SAMPLES.get(name, total) / seconds for seconds in runs],
            "weights/s",
            goals.get(name, "none"),
            "each other",
        )
        for name, runs in taken.items()
    }
    both = [first + second for first, second in zip(taken["autos"], rest, strict=True)]
    figures["resnet50_seconds"] = figure(both, "s", "<= 15", "none")
    publish(figures, __doc__)


if __name__ == "__main__":
    main()
