"""How many weights AutoS scores per second, features included: timm's resnet50, 25 M weights.

    python -m benchmarks.scoring --json scoring.json

The gradient passes are left out: every criterion that looks at data pays the same for them. The
peer calls the same network as a module on the features of a layer stacked as [N, F].
"""

from __future__ import annotations

import timm
import torch

from autosparse import features
from autosparse.models import prunable
from autosparse.scorer import AutoS
from benchmarks.report import figure, publish, seconds_in_turn


@torch.no_grad()
def stacked(network: AutoS, weights: dict, gradients: dict) -> None:
    """Score every layer by calling the module on all of its features at once."""
    found = features.contexts(weights, gradients)
    for name, weight in weights.items():
        pieces = features.layer_features(network.kind, weight, gradients[name], found[name])
        network(torch.cat([piece.T for piece in pieces]))


def main() -> None:
    """Measure both kinds of features."""
    model = timm.create_model("resnet50", pretrained=False)
    weights = {name: weight.detach() for name, weight in prunable(model).items()}
    gradients = {name: torch.randn_like(weight) * 1e-3 for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    figures = {}
    for kind in features.KINDS:
        network = AutoS(kind).eval()
        taken = seconds_in_turn(
            {
                "ours": lambda network=network: network.score(weights, gradients),
                "stacked": lambda network=network: stacked(network, weights, gradients),
            }
        )
        rates = [total / seconds for seconds in taken["ours"]]
        ratios = [b / a for a, b in zip(taken["ours"], taken["stacked"], strict=True)]
        figures[f"{kind}_weights_per_s"] = figure(rates, "weights/s", ">= 2e6", "none")
        figures[f"{kind}_vs_stacked"] = figure(ratios, "times as fast", ">= 1", "stacked module")
    publish(figures, __doc__)


if __name__ == "__main__":
    main()
