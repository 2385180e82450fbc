"""What is left of a network's latency and size once a ticket is slimmed: ONNX Runtime on this CPU.

    python -m benchmarks.deploy --json deploy.json
    python -m benchmarks.deploy --models resnet18 --sparsities 0.98 --side 64

Tickets are random ones of ERK, at initialization with noise on biases and running statistics, so
that constants are there to be folded. Times are of the processor, one thread, dense and slimmed in
turn. Latency depends on shapes alone; accuracy needs trainings and is not measured here.
"""

from __future__ import annotations

import time
import warnings

import torch
from torch import nn

from autosparse.criteria.pruning import prune
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity.slim import slim
from autosparse.study.export import dense_model
from autosparse.study.measure import costs, latencies, onnx_runner
from benchmarks.report import figure, options, publish

GOAL_SECONDS = 20


def made(name: str, side: int) -> nn.Module:
    """Return a timm model whose biases and running statistics are no initial ones."""
    model = zoo.create(ModelConfig(name), num_classes=1000, in_chans=3, image_size=side, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in model.parameters():
            if each.dim() == 1:
                each.add_(torch.randn(each.shape, generator=generator), alpha=0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
    return model.eval()


def pruned(model: nn.Module, sparsity: float, criterion: str, side: int) -> nn.Module:
    """Return the model with zeros where it is pruned."""
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        data = [(images, torch.arange(4))]
        return dense_model(prune(model, data, criterion, sparsity))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv2_100"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.95, 0.98, 0.99])
    parser.add_argument("--criteria", nargs="+", default=["erk", "autos"])
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--export", default="resnet50", help="model whose slimming is timed")
    arguments = parser.parse_args()
    figures, sizes, shape = {}, {}, (3, arguments.side, arguments.side)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    for name in arguments.models:
        model = made(name, arguments.side)
        for criterion in arguments.criteria:
            runners, key = {}, f"{name}_{criterion}"
            found = onnx_runner(model, images)
            if found is None:
                raise SystemExit("pip install 'autosparse[onnx]' first")
            runners["dense"] = found[0]
            sizes[f"{key}_dense"] = {**costs(model, images), "onnx_bytes": found[1]}
            for sparsity in arguments.sparsities:
                small = slim(pruned(model, sparsity, criterion, arguments.side), images)
                label = f"{100 * sparsity:g}"
                runners[label], taken = onnx_runner(small, images) or found
                sizes[f"{key}_{label}"] = {**costs(small, images), "onnx_bytes": taken}
            times = latencies(runners, images[:1], arguments.runs)
            for label in list(runners)[1:]:
                ratios = [a / b for a, b in zip(times[label], times["dense"], strict=True)]
                figures[f"onnx_latency_vs_dense_{label}_{key}"] = figure(
                    ratios, "of dense", "<= 0.35 at 98 %, with units chosen for it", "dense ONNX"
                )
    if arguments.export:
        model = pruned(made(arguments.export, arguments.side), 0.98, "erk", arguments.side)
        seconds = []
        for clock in (time.perf_counter, time.process_time):
            started = clock()
            slim(model, images)
            seconds.append(clock() - started)
        figures[f"slim_seconds_{arguments.export}"] = figure(
            seconds[:1], "s", f"< {GOAL_SECONDS}", "none"
        )
        figures[f"slim_processor_seconds_{arguments.export}"] = figure(
            seconds[1:], "s", f"< {GOAL_SECONDS}", "none"
        )
    publish(figures, __doc__, arguments, sizes=sizes, side=arguments.side)


if __name__ == "__main__":
    main()
