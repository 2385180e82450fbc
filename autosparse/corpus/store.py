"""The corpus: a folder of finished IRP runs.

A run is a folder named by its run_id. `run.safetensors` holds `survival/NAME` (uint8) per prunable
parameter, and, unless the card can make them again, `initial/NAME` and `rest/NAME` for the rest of
the initial state; its header is the card. `finished.json` is written last and holds the SHA-256 of
the file and of every tensor in it, and the run's row of the index: a folder without it is not part
of the corpus. `index.parquet` is derived and can be made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.core.files import (
    place,
    read_card,
    read_json,
    read_tensors,
    replacing,
    sha256_of_file,
    write_json,
    write_tensors,
)
from autosparse.models import zoo
from autosparse.sparsity import masks
from autosparse.sparsity.ticket import Ticket

logger = logging.getLogger(__name__)

FORMAT = 1
RUN, FINISHED, INDEX = "run.safetensors", "finished.json", "index.parquet"
REPORT = "report"
NO_RUNS = (INDEX, REPORT, "mlflow.json", "mlflow.db", "mlartifacts")
"""Names in a corpus folder that are not runs."""
OF_DATA = ("data_fingerprint", "normalisation")
"""Entries of a run's card that its tickets' cards have too, as those of `prune` do."""


@dataclass(frozen=True)
class IRPRun:
    """A finished run: initial values, survival per weight, and the card."""

    initial: dict[str, Tensor]
    """Per prunable parameter its value at init."""
    survival: dict[str, Tensor]
    """Per prunable parameter, uint8 of its shape: the number of levels each weight survived."""
    rest: dict[str, Tensor]
    """The rest of the state dict at init."""
    card: dict[str, Any]
    """Config, model, data, and per level density, accuracy and seconds."""
    rewound: dict[str, Tensor] = field(default_factory=dict)
    """The whole state dict after step k of level 0, where the run rewound to that; else {}."""

    @property
    def levels(self) -> int:
        """N: survival lies in 0..N."""
        return self.card["config"]["levels"]

    def masks(self, level: int) -> dict[str, Tensor]:
        """Return the masks of a level, 0 (dense) to N: survival >= level."""
        if not 0 <= level <= self.levels:
            raise UsageError(f"the run has levels 0 to {self.levels}, not {level}")
        return {name: survival >= level for name, survival in self.survival.items()}

    def ticket(self, level: int) -> Ticket:
        """Return the level's winning ticket, at its initial values (or those after step k)."""
        chosen = self.masks(level)
        source = self.rewound or self.initial
        values = {name: source[name][mask] for name, mask in chosen.items()}
        rest = {name: self.rewound.get(name, tensor) for name, tensor in self.rest.items()}
        config = self.card["config"]
        steps = config.get("rewind_steps", 0)
        before = self.card["levels"][:level]
        card = {
            "model": self.card["model"],
            "data": config["data"],
            **{key: self.card[key] for key in OF_DATA if key in self.card},
            "criterion": "irp",
            "options": {"run_id": self.card["run_id"], "level": level, "label": config["label"]},
            **({"rewind_steps": steps} if steps else {}),
            "sparsity": masks.sparsity(chosen),
            "image_passes": sum(each.get("image_passes", 0) for each in before),
            "seconds": sum(each["seconds"] for each in before),
            "seed": config["seed"],
            "versions": self.card["versions"],
        }
        return Ticket(chosen, values, rest, card)


def write_run(folder: Path, run: IRPRun, *, store_initial: bool = True) -> None:
    """Write a finished run; the commit marker comes last.

    Without `store_initial` the file holds 1 byte per prunable weight instead of 5: the initial
    state is made again from the card's model and seed when the run is read, and its hash checked.
    """
    tensors = {f"survival/{name}": tensor for name, tensor in run.survival.items()}
    if store_initial:
        tensors |= {f"initial/{name}": tensor for name, tensor in run.initial.items()}
        tensors |= {f"rest/{name}": tensor for name, tensor in run.rest.items()}
    tensors |= {f"rewound/{name}": tensor for name, tensor in run.rewound.items()}
    write_tensors(folder / RUN, tensors, {"kind": "irp", "format": FORMAT, **run.card})
    marker = {
        "sha256": sha256_of_file(folder / RUN),
        "tensors": {name: sha256_of_tensor(tensor) for name, tensor in tensors.items()},
        "row": row_of(run.card),
    }
    write_json(folder / FINISHED, marker)


def sha256_of_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order, in hex."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def is_finished(folder: Path) -> bool:
    """Return whether the run in `folder` is part of the corpus."""
    return (folder / FINISHED).is_file()


def marker_of(folder: Path) -> dict[str, Any]:
    """Read a run's commit marker; raise UsageError that names it when it is damaged."""
    marker = read_json(folder / FINISHED)
    if not isinstance(marker, dict) or "sha256" not in marker:
        raise UsageError(f"{folder / FINISHED} holds no SHA-256; the file is damaged")
    return marker


def read_run(folder: Path) -> IRPRun:
    """Read a finished run; raise UsageError when it is unfinished or its file was changed."""
    if not is_finished(folder):
        raise UsageError(f"{folder} holds no finished IRP run")
    if not (folder / RUN).is_file():
        raise UsageError(f"{folder} is half copied: {FINISHED} is there, {RUN} is not")
    if sha256_of_file(folder / RUN) != marker_of(folder)["sha256"]:
        raise UsageError(f"{folder / RUN} is not what was written (its SHA-256 differs)")
    tensors, card = read_tensors(folder / RUN)
    groups: dict[str, dict[str, Tensor]] = {
        "initial": {}, "survival": {}, "rest": {}, "rewound": {}
    }  # fmt: skip
    for name, tensor in tensors.items():
        group, _, parameter = name.partition("/")
        groups[group][parameter] = tensor
    if not groups["initial"]:
        groups["initial"], groups["rest"] = _made_again(card, folder)
    # safetensors sorts by size and name: put them back in the model's order.
    initial, survival = (
        {name: groups[group][name] for name in card["prunable"]}
        for group in ("initial", "survival")
    )
    return IRPRun(initial, survival, groups["rest"], card, groups["rewound"])


def _made_again(card: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Build the initial state from the card's model and seed: prunable weights, and the rest."""
    model = zoo.from_recipe(card["model"])
    state = model.state_dict()
    masks_ = {name: torch.ones_like(state[name], dtype=torch.bool) for name in card["prunable"]}
    dense = Ticket.from_model(model, masks_, {})
    if dense.content_hash != card["initial_hash"]:
        raise UsageError(
            f"{folder}: its initial weights cannot be made again with these versions (the run was "
            f"made with {card['versions']})"
        )
    return {name: state[name] for name in card["prunable"]}, dense.rest


class Corpus:
    """The finished runs below a folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = place(path)
        if not self.path.is_dir():
            raise UsageError(f"no corpus at {self.path}: it is not a folder")

    def folders(self) -> list[Path]:
        """Return the folders of all finished runs, by run_id; raise UsageError if there is none."""
        finished = sorted(child for child in self.path.iterdir() if is_finished(child))
        if not finished:
            raise UsageError(f"the corpus {self.path} has no finished run; grow it first")
        return finished

    def cards(self) -> list[dict[str, Any]]:
        """Return the cards of all finished runs, by run_id."""
        return [read_card(folder / RUN) for folder in self.folders()]

    def read(self, run_id: str) -> IRPRun:
        """Read one run."""
        return read_run(self.path / run_id)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of which runs are there, and their content."""
        entries = [(folder.name, marker_of(folder)["sha256"]) for folder in self.folders()]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]

    def table(self) -> list[dict[str, Any]]:
        """Return a row per finished run, from `index.parquet`, or from the run itself."""
        known = {row["run_id"]: row for row in self._indexed()}
        children = sorted(child for child in self.path.iterdir() if child.name not in NO_RUNS)
        rows = []
        for child in children:
            if child.name in known:
                rows.append(known[child.name])
            elif is_finished(child):
                rows.append(_row(child))
        return rows

    def _indexed(self) -> list[dict[str, Any]]:
        import pyarrow
        import pyarrow.parquet

        path = self.path / INDEX
        try:
            with path.open("rb") as file:
                return pyarrow.parquet.read_table(pyarrow.BufferReader(file.read())).to_pylist()
        except FileNotFoundError:
            return []
        except (pyarrow.ArrowException, OSError) as error:
            problem = str(error).strip().splitlines()[0]
            logger.warning(
                "%s is damaged (%s); the runs are read instead, `autosparse corpus index %s` makes "
                "it anew",
                path, problem, self.path,
            )  # fmt: skip
            return []

    def write_index(self) -> Path:
        """Write `index.parquet`, a row per finished run, from the runs themselves."""
        import pyarrow
        import pyarrow.parquet

        path = self.path / INDEX
        rows = [_row(folder) for folder in self.folders()]
        with replacing(path) as temporary:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
        return path


SPARE = ("weights", "seconds", "levels", "seed", "data")
"""Columns of `shown` that a narrow terminal goes without."""


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Shorten a row of the index so that it fits a terminal."""
    return {
        "run": row["run_id"],
        "model": row["model"],
        "data": row["data"],
        "seed": row["seed"],
        "label": row["label"],
        "levels": row["levels"],
        "weights": row["prunable_weights"],
        "dense acc.": f"{row['dense_accuracy']:.1%}",
        "last acc.": f"{row['final_accuracy']:.1%} at {row['final_density']:.1%}",
        "seconds": round(row["seconds"], 1),
    }


def _row(folder: Path) -> dict[str, Any]:
    return marker_of(folder).get("row") or row_of(read_card(folder / RUN))


def data_name(data: dict[str, Any]) -> str:
    """Return the name of the data set on a card: for images or shards that of their folder."""
    if data.get("root") and data["name"] in ("folder", "shards"):
        return Path(data["root"]).name
    return data["name"]


def row_of(card: dict[str, Any]) -> dict[str, Any]:
    """Return a run's row of the index."""
    config, levels = card["config"], card["levels"]
    return {
        "run_id": card["run_id"],
        "model": config["model"]["name"],
        "data": data_name(config["data"]),
        "seed": config["seed"],
        "label": config["label"],
        "schedule": config["schedule"],
        "levels": config["levels"],
        "final_density": config["final_density"],
        "prunable_weights": card["prunable_weights"],
        "dense_accuracy": levels[0]["validation_accuracy"],
        "final_accuracy": levels[-1]["validation_accuracy"],
        "seconds": sum(level["seconds"] for level in levels),
    }
