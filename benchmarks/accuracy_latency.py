"""Accuracy against latency: slimmed tickets, narrower dense networks, and Torch-Pruning.

    pip install 'autosparse[onnx]' torch-pruning
    python -m benchmarks.accuracy_latency --data cifar10 --json accuracy_latency.json
    python -m benchmarks.accuracy_latency --data cifar10 --nets resnet18_half   # one of them

Protocol, written before any of it was trained. Two nets that no choice was made on: resnet18 with
16, 32, 64 and 128 channels (0.7 M weights) and dla34 with 8, 8, 16, 32, 64 and 128 (1 M), both with
timm's own stem, on 20,000 training images of CIFAR-10 at 32 px, trained as `TRAINING` says, seeds
0, 1, 2 in this order: short trainings, for one thread of a CPU. Rows:

- dense, and the same net with fewer channels (`NARROWER`): the honest rivals;
- AutoS at 95 and 98 % with `units` 0, 0.5 and 1, slimmed after training;
- the trained dense net pruned by Torch-Pruning (magnitude of groups of channels, over all layers)
  to `KEPT` of its channels and trained again for as long: twice the cost of any other row.

Added after seed 0 was known, since timm's narrower resnet18 keeps its stem of 64 channels, where
half of its latency is: `uniform`, the net with fewer channels in all layers, stem included (the
criterion `random` with `units` 1: as many random channels everywhere).

Added after all other rows were known, to be fair to a rival: `torch_pruning_…_of_4`, the same with
Torch-Pruning's option `round_to=4`, as ONNX Runtime has quick kernels for multiples of four only.

Test accuracy is read once. Latency is that of the trained network itself, slimmed where it is a
ticket, in ONNX Runtime: one image, one thread, in turn with the dense one, median of `--runs`, mean
over the seeds. Nothing is changed after a row is known. The question: at equal latency, is a
slimmed ticket above the narrower dense net?

Every training is a part of its own in `--out` that is never done again; none begins once
`--minutes` are over. Run it again to go on.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autosparse.core.files import write_tensors
from autosparse.criteria.pruning import DENSE
from autosparse.data.config import DataConfig
from autosparse.models.config import ModelConfig
from autosparse.sparsity.slim import slim
from autosparse.study import grid, local
from autosparse.study.config import StudyConfig
from autosparse.study.export import dense_model, trained_ticket
from autosparse.study.measure import costs, latencies, onnx_runner
from autosparse.training.config import TrainingConfig
from autosparse.training.loop import evaluate, fit, seeded, steps_per_epoch
from autosparse.training.steppers import PlainStepper
from benchmarks.deploy import Part, Parts
from benchmarks.report import figure, options, publish


def _resnet(width: float) -> ModelConfig:
    return ModelConfig("resnet18", {"channels": [int(width * n) for n in (16, 32, 64, 128)]})


def _dla(width: float) -> ModelConfig:
    return ModelConfig("dla34", {"channels": [int(width * n) for n in (8, 8, 16, 32, 64, 128)]})


FAMILIES = {"resnet18": _resnet, "dla34": _dla}
NETS = {name: family(1) for name, family in FAMILIES.items()}
NARROWER = {
    name: {f"{width:g}": family(width) for width in (0.5, 0.25, 0.125)}
    for name, family in FAMILIES.items()
}
"""Net -> dense networks of its family by their width, as a share of its own."""
UNIFORM: dict[str, tuple[float, ...]] = {"resnet18": (0.5, 0.25, 0.125)}
"""Net -> share of the channels that is left in all layers alike, where `NARROWER` leaves some."""
SPARSITIES, UNITS = (0.95, 0.98), (0.0, 0.5, 1.0)
KEPT = (0.5, 0.25)
"""Share of the channels that Torch-Pruning keeps."""
RIVAL, OF_4 = "torch_pruning_", "_of_4"
"""Begin and end of the names of its rows; the end where channels are kept in multiples of four."""
TRAINING = TrainingConfig(epochs=6, batch_size=128, learning_rate=0.01, checkpoint_epochs=0)


def asked(label: str) -> tuple[str, float, float] | None:
    """Return criterion, sparsity and units of a row that is a ticket."""
    if label.startswith("uniform"):
        return "random", 1 - float(label.rsplit("_", 1)[1]) ** 2, 1.0
    if label[0].isdigit():
        sparsity, units = label.split("_units_")
        return "autos", float(sparsity) / 100, float(units)
    return None


class Table:
    """The trainings and measurements of one net."""

    def __init__(self, arguments: argparse.Namespace, parts: Parts, net: str) -> None:
        self.arguments, self.parts, self.net = arguments, parts, net
        self.dense: dict[int, Any] = {}  # The dense network in ONNX Runtime, by seed.
        self.labels = ["dense", *(f"width_{width}" for width in NARROWER[net])]
        self.labels += [f"uniform_{width:g}" for width in UNIFORM.get(net, ())]
        self.labels += [f"{s * 100:g}_units_{u:g}" for s in SPARSITIES for u in UNITS]
        if importlib.util.find_spec("torch_pruning"):
            self.labels += [f"{RIVAL}{kept:g}{of}" for of in ("", OF_4) for kept in KEPT]
        if arguments.rows:
            self.labels = [each for each in self.labels if each in ("dense", *arguments.rows)]

    def cell(self, label: str, seed: int) -> grid.StudyCell:
        """Return a row's training: a dense network, or a ticket."""
        criterion, sparsity, units = asked(label) or (DENSE, 0.0, 0.0)
        model = NETS[self.net]
        if label.startswith("width"):
            model = NARROWER[self.net][label.removeprefix("width_")]
        study = StudyConfig(
            model=model,
            data=DataConfig(
                "folder",
                root=str(self.arguments.data),
                image_size=self.arguments.side,
                train_limit=self.arguments.images,
                validation_fraction=0.05,
            ),
            criteria=["autos" if criterion == DENSE else criterion],
            sparsities=[sparsity],
            seeds=[seed],
            twins=[],
            units=units,
            training=replace(TRAINING, epochs=self.arguments.epochs, slim=units > 0),
            tracking=False,
            out=str(self.arguments.out / "trained"),
        )
        return next(each for each in grid.cells(study) if each.label == criterion)

    def train(self, label: str, seed: int) -> Part | None:
        """Return a row's accuracy with this seed, trained now if there is time."""
        if label.startswith(RIVAL):
            if self.train("dense", seed) is None:
                return None
            measure = partial(self.retrained, label, seed)
        else:
            measure = partial(self.trained, label, seed)
        return self.parts.get(f"{self.net}_{label}_seed{seed}", self.settings(), measure)

    def settings(self) -> list[Any]:
        """Return what a training depends on besides its row."""
        found = self.arguments
        return [str(found.data), found.side, found.images, found.epochs]

    def trained(self, label: str, seed: int) -> Part:
        """Train a cell of the study."""
        cell = self.cell(label, seed)
        result = local.run_cell(cell, local.load(cell.config))
        return {"accuracy": 100 * result["test_accuracy"], "dead": bool(result.get("dead"))}

    def retrained(self, label: str, seed: int) -> Part:
        """Prune the trained dense network by Torch-Pruning and train it again."""
        cell = self.cell("dense", seed)
        source = local.load(cell.config)
        model = self.fewer_channels(label, seed)
        config = cell.config.training
        steps = steps_per_epoch(source.train, config)
        with seeded(seed):
            stepper = PlainStepper(model, config, steps)
            fit(stepper, source, config, seed=seed)
        test = evaluate(stepper.evaluated(), source, source.test, config=config)
        self.kept_file(label, seed).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.kept_file(label, seed), model.state_dict(), {})
        return {"accuracy": 100 * test.accuracy}

    def kept_file(self, label: str, seed: int) -> Path:
        """Return where the values of a network that Torch-Pruning made are kept."""
        name = f"{self.net}_{label.removeprefix(RIVAL)}_seed{seed}.safetensors"
        return self.arguments.out / "torch_pruning" / name

    def fewer_channels(self, label: str, seed: int) -> nn.Module:
        """Return the trained dense network without the channels that Torch-Pruning takes away."""
        import torch_pruning

        model = dense_model(trained_ticket(self.cell("dense", seed).folder))
        images = torch.zeros(2, 3, self.arguments.side, self.arguments.side)
        torch_pruning.MagnitudePruner(
            model,
            images,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=1 - float(label.removeprefix(RIVAL).removesuffix(OF_4)),
            max_pruning_ratio=0.95,
            round_to=4 if label.endswith(OF_4) else None,
            ignored_layers=[model.get_classifier()],
        ).step()
        return model

    def network(self, label: str, seed: int) -> nn.Module:
        """Return a trained network as it is run: slimmed, where it is a ticket."""
        if label.startswith(RIVAL):
            model = self.fewer_channels(label, seed)
            model.load_state_dict(load_file(self.kept_file(label, seed)))
            return model.eval()
        model = dense_model(trained_ticket(self.cell(label, seed).folder))
        return slim(model, self.images()) if asked(label) else model

    def images(self) -> Tensor:
        """Return two images of noise: latency does not depend on what is seen."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, 3, self.arguments.side, self.arguments.side, generator=generator)

    def latency(self, label: str, seed: int) -> Part:
        """Measure a trained network in ONNX Runtime, in turn with the dense one."""
        images = self.images()
        model = self.network(label, seed)
        if seed not in self.dense:
            self.dense[seed] = onnx_runner(self.network("dense", seed), images)
        found, dense = onnx_runner(model, images), self.dense[seed]
        if found is None or dense is None:
            raise SystemExit("pip install 'autosparse[onnx]' first")
        runners = {"dense": dense[0], "it": found[0]}
        times = latencies(runners, images[:1], self.arguments.runs)
        ratios = [a / b for a, b in zip(times["it"], times["dense"], strict=True)]
        middle = {name: statistics.median(each) for name, each in times.items()}
        return {"of_dense": statistics.median(ratios), "ms": middle["it"], "onnx_bytes": found[1],
                "dense_ms": middle["dense"], **costs(model, images)}  # fmt: skip

    def row(self, label: str, trainings: dict[int, Part]) -> Part:
        """Return a row: accuracy of each seed, latency of each, and what it holds."""
        measured = {
            seed: self.parts.get(
                f"latency_{self.net}_{label}_seed{seed}",
                [*self.settings(), self.arguments.runs],
                partial(self.latency, label, seed),
            )
            for seed in trainings
        }
        return {
            "net": self.net,
            "row": label,
            "accuracy": {seed: each["accuracy"] for seed, each in trainings.items()},
            "latency": {seed: each for seed, each in measured.items() if each},
        }


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = options(__doc__)
    found.add_argument("--data", type=Path, required=True, help="folder with train/CLASS")
    found.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    found.add_argument("--rows", nargs="+", help="only these rows; dense is always among them")
    found.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    found.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    found.add_argument("--images", type=int, default=20000, help="to train on")
    found.add_argument("--epochs", type=int, default=TRAINING.epochs)
    found.add_argument("--runs", type=int, default=200, help="calls for a latency")
    found.add_argument("--no-latency", action="store_true", help="train only")
    found.add_argument("--minutes", type=float, default=600.0, help="no part begins later")
    found.add_argument("--out", type=Path, default=Path("accuracy_latency"), help="its folder")
    return found


def main() -> None:
    """Train what is left, seed by seed, then measure, and publish all that is there."""
    arguments = parser().parse_args()
    parts, rows = Parts(arguments.out, arguments.minutes), []
    tables = [Table(arguments, parts, net) for net in arguments.nets]
    trained: dict[tuple[str, str], dict[int, Part]] = {}
    for seed in arguments.seeds:
        for table in tables:
            for label in table.labels:
                found = table.train(label, seed)
                if found is not None:
                    trained.setdefault((table.net, label), {})[seed] = found
    if not arguments.no_latency:
        for table in tables:
            rows += [
                table.row(label, trained[table.net, label])
                for label in table.labels
                if (table.net, label) in trained
            ]
    figures = {}
    for row in rows:
        key = f"{row['row']}_{row['net']}"
        each = list(row["accuracy"].values())
        figures[f"accuracy_{key}"] = figure(each, "%", "none", "none")
        times = [one["of_dense"] for one in row["latency"].values()]
        if times:
            figures[f"latency_{key}"] = figure(times, "of dense", "none", "dense ONNX")
    publish(figures, __doc__, arguments, rows=rows, left=parts.left)
    if parts.left:
        print(f"{len(parts.left)} parts are left (from {parts.left[0]} on): run it again to go on")


if __name__ == "__main__":
    main()
