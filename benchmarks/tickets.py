"""Do AutoS's tickets beat the known ones? Held-out models, three seeds, every row of docs/autos.md.

    python -m benchmarks.tickets --json FILE --small [--data data/cifar10] [--out tickets]

`--small`: 95 % sparsity, CIFAR-10 at 16 px, 5,000 images, 6 epochs. `--long`: 95 %, 16 px, all
images, 14 epochs, so that 100 steps are about 1 % of a training (0.99 % of its image passes where
--data has train/ and test/, 1.16 % where a test set is split off, and 85 steps then 0.99 %); the
rows that need no more, some with 560 steps beside them, and IRP of 5 levels. Without either 90,
95, 98 and 99 %, 32 px, 10,000 images and 30 epochs. Without --data, scikit-learn's digits. Every
training is a cell of `autosparse compare`, found again if it is there: the command may be killed
and repeated. The figures are no ratios of speeds but test accuracies in per cent, a run per seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from autosparse.criteria.pruning import DENSE
from autosparse.data.config import DataConfig
from autosparse.models.config import ModelConfig
from autosparse.report.autos_figures import frontier
from autosparse.report.style import LABELS as LEGENDS
from autosparse.sparsity.twins import SHUFFLED
from autosparse.study import local, plan, table
from autosparse.study.config import StudyConfig
from autosparse.study.grid import StudyCell
from autosparse.study.labels import TICKET
from autosparse.training.config import TrainingConfig
from benchmarks.report import figure, options, publish

HELD_OUT = {
    "narrow": ModelConfig(
        "resnet10t", {"channels": [16, 32, 48, 64], "stem_width": 16}, small_stem=False
    ),
    "layer_norm": ModelConfig("test_efficientnet_ln"),
    "grouped": ModelConfig(
        "seresnext26t_32x4d",
        {"channels": [16, 32, 48, 64], "layers": [1, 1, 1, 1], "cardinality": 4, "stem_width": 16},
        small_stem=False,
    ),
}
PLAIN = {"narrow": "resnet10t-16/32/48/64", "grouped": "seresnext26t_32x4d-16/32/48/64"}
"""Model -> what figures call it: the name in timm, and the channels of its stages."""
RATE = 0.01
"""Peak learning rate: of 0.003, 0.01 and 0.03 the best for dense development models."""
SHORT = {"criterion": "short_irp", "levels": 7, "label": "lamp", "learning_rate": RATE}
AUTOS_100 = {
    "criterion": "autos_irp", "levels": 1, "steps_per_level": 100, "learning_rate": RATE,
}  # fmt: skip
LABELS = {
    "uniform": {},
    "erk": {},
    "magnitude": {},
    "lamp": {},
    "snip": {},
    "iter_snip": {},
    "grasp": {},
    "synflow": {},
    "autos_random": {"criterion": "autos", "choice": "random"},
    "autos_live": {"criterion": "autos", "choice": "live"},
    "autos_no_reuse": {"criterion": "autos", "reuse": 0.0},
    "short_magnitude": {**SHORT, "steps_per_level": 80, "label": "magnitude"},
    "short_lamp": {**SHORT, "steps_per_level": 80},
    "short_lamp_100": {**SHORT, "steps_per_level": 14},
    "autos_irp": {"learning_rate": RATE},
    "autos_irp_100": AUTOS_100,
    "autos_irp_any": {"criterion": "autos_irp", "learning_rate": RATE, "live": False},
    "irp": {"criterion": "irp", "label": "lamp", "levels": 8},
}
"""Row -> its options; the last is the ceiling: a full training at every level."""
NAMES = {
    **LEGENDS,
    "magnitude": "magnitude",
    "autos_random": "AutoS, any weights",
    "autos_live": "AutoS",
    "autos_no_reuse": "AutoS, reuse 0",
    "autos_paper": "AutoS (paper)",
    "short_magnitude": "short IRP, magnitude, 7 x 80 steps",
    "short_lamp": "short IRP, LAMP, 7 x 80 steps",
    "short_lamp_100": "short IRP, LAMP, 7 x 14 steps",
    "autos_irp": "AutoS IRP, 4 x 140 steps",
    "autos_irp_100": "AutoS IRP, 100 steps",
    "autos_irp_85": "AutoS IRP, 85 steps",
    "autos_irp_any": "AutoS IRP, 4 x 140 steps, off paths too",
    "irp": "full IRP, LAMP",
}
"""What legends call the rows."""
ASKED = ("autos_no_reuse", "autos_irp_any", "short_magnitude")
"""Rows of the short forms that are trained where --rows names them only."""
LONG = {
    "erk": {},
    "lamp": {},
    "snip": {},
    "grasp": {},
    "synflow": {},
    "autos_random": {"criterion": "autos", "choice": "random"},
    "autos_live": LABELS["autos_live"],
    "autos_no_reuse": LABELS["autos_no_reuse"],
    "short_lamp_100": LABELS["short_lamp_100"],
    "autos_irp": LABELS["autos_irp"],
    "autos_irp_100": AUTOS_100,
    "autos_irp_85": {**AUTOS_100, "steps_per_level": 85},
    "irp": {"criterion": "irp", "label": "lamp", "levels": 5},
}
"""The rows of the long form, without twins (AutoS's counts at random are a row)."""
TWINS = ("snip", "synflow", "short_lamp", "autos_irp", "autos_irp_100")
"""Rows whose shuffled twins are trained too; that of AutoS is autos_random."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = options(__doc__)
    form = found.add_mutually_exclusive_group()
    form.add_argument("--small", action="store_true", help="the reduced form")
    form.add_argument("--long", action="store_true", help="trainings of 10,000 steps")
    found.add_argument("--data", type=Path, help="folder with train/CLASS and test/CLASS")
    found.add_argument("--out", type=Path, default=Path("tickets"), help="folder for the cells")
    found.add_argument("--paper", type=Path, help="AutoS file with the paper's features: a row")
    found.add_argument("--scorer", type=Path, help="AutoS file; by default the package's")
    found.add_argument(
        "--models", default="narrow,layer_norm", help=f"of {', '.join(HELD_OUT)}; with commas"
    )
    found.add_argument(
        "--rows", help=f"with commas; by default all of the form but {', '.join(ASKED)}"
    )
    found.add_argument("--seeds", type=int, default=3, help="how many seeds")
    found.add_argument("--sparsities", help="with commas; by default as the form has it")
    found.add_argument("--guard", default="layer", help="layer; or live, for rows that give scores")
    return found


def config_of(arguments: argparse.Namespace, name: str) -> StudyConfig:
    """Return the comparison of one held-out model."""
    small = arguments.small or arguments.long
    labels = dict(LONG if arguments.long else LABELS)
    if arguments.paper:
        labels["autos_paper"] = {"criterion": "autos", "scorer": str(arguments.paper)}
    if arguments.rows:
        unknown = [row for row in arguments.rows.split(",") if row not in labels]
        if unknown:
            raise SystemExit(f"no such row: {unknown[0]}; there are {', '.join(labels)}")
        labels = {row: labels[row] for row in arguments.rows.split(",")}
    else:
        left_out = () if arguments.long else ASKED
        labels = {row: options for row, options in labels.items() if row not in left_out}
    if arguments.scorer:
        for label, row in labels.items():
            if label.startswith("autos") and label != "autos_paper":
                labels[label] = {**row, "scorer": str(arguments.scorer)}
    data = DataConfig("digits")
    epochs = 8
    if arguments.data:
        data = DataConfig(
            "folder",
            root=str(arguments.data),
            image_size=16 if small else 32,
            train_limit=None if arguments.long else 5_000 if small else 10_000,
            validation_fraction=0.05,
        )
        epochs = 14 if arguments.long else 6 if small else 30
    return StudyConfig(
        model=HELD_OUT[name],
        data=data,
        criteria=list(labels),
        options={label: row for label, row in labels.items() if row},
        sparsities=arguments.sparsities or ("0.95" if small else "0.9,0.95,0.98,0.99"),
        seeds=list(range(arguments.seeds)),
        twins=[SHUFFLED],
        guard=arguments.guard,
        training=TrainingConfig(epochs=epochs, learning_rate=RATE, checkpoint_epochs=0),
        tracking=False,
        device="cpu" if small else "auto",
        out=str(arguments.out / name),
    )


def wanted(config: StudyConfig, twins: tuple[str, ...] = TWINS) -> list[StudyCell]:
    """Return the trainings, seed by seed; twins: the rows whose shuffled ones are trained too."""
    return [cell for cell in plan.cells(config) if cell.twin == TICKET or cell.label in twins]


def shown(rows: list[dict], sparsity: float) -> list[dict]:
    """Return the points of the frontier at one sparsity."""
    keys = ("label", "accuracy", "spread", "seeds", "cost_share")
    return [
        {key: row[key] for key in keys} | {"name": NAMES.get(row["label"], row["label"])}
        for row in rows
        if row["label"] == DENSE or row["sparsity"] == sparsity
    ]


def main() -> None:
    """Train what is not there yet, and publish accuracies."""
    arguments = parser().parse_args()
    torch.set_num_threads(max(1, torch.get_num_threads()))
    figures = {}
    for name in arguments.models.split(","):
        config = config_of(arguments, name)
        source = local.load(config)
        found: dict[str, list[float]] = {}
        done = []
        for cell in wanted(config, () if arguments.long else TWINS):
            result = local.run_cell(cell, source)
            done.append(cell)
            accuracy = 100 * result["test_accuracy"]
            print(f"{name} {cell.name}: {accuracy:.1f}", flush=True)
            row = cell.label if cell.twin == TICKET else f"{cell.label}_{cell.twin}"
            at = "" if cell.label == DENSE else f"_{cell.sparsity * 100:g}"
            found.setdefault(f"{name}_{row}{at}", []).append(accuracy)
        rows = table.table(done)
        lowest = min(row["sparsity"] for row in rows if row["label"] != DENSE)
        images = arguments.data.name if arguments.data else config.data.name
        title = f"{PLAIN.get(name, config.model.name)}, {images}, {100 * lowest:g} % pruned"
        drawn = frontier(shown(rows, lowest), arguments.out / f"{name}.png", title)
        print(f"figure: {drawn}")
        figures |= {
            key: figure(runs, "% test accuracy", "none", "the other rows")
            for key, runs in found.items()
        }
    publish(figures, __doc__, arguments)


if __name__ == "__main__":
    main()
