"""`autosparse quickstart`: the whole path on embedded real data, with the commands it runs.

Every step is found finished by its output, so a second run only draws and prints.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import autosparse
from autosparse import criteria
from autosparse.autos.config import FitConfig
from autosparse.cli.arguments import parse
from autosparse.cli.config import QuickstartConfig
from autosparse.core.config import plain
from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import check_folder, read_card
from autosparse.core.locks import claimed
from autosparse.core.progress import Progress, print_table
from autosparse.corpus.store import Corpus, is_finished
from autosparse.criteria import prune
from autosparse.data import sets
from autosparse.irp.config import CorpusConfig
from autosparse.irp.run import run_folder
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.study import results
from autosparse.study.cells import Cell, cells
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import TRAINED

TARGET = ModelConfig("test_byobnet")
"""The model that is pruned and trained; the corpus has never seen it."""
SPARSITIES = (0.9, 0.95)
CRITERIA = ("autos", "snip", "synflow", "erk", "random", "magnitude")
RANKS = 2


def run(config: QuickstartConfig) -> None:
    """Grow a corpus, fit AutoS, prune, train with DeepSpeed, register, draw, and say what next."""
    started = time.perf_counter()
    if config.seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {config.seeds}")
    out = Path(config.out).absolute()
    _check(out)
    with claimed(out):
        _run(out, config.seeds, started)


def _check(out: Path) -> None:
    """Raise UsageError for what is missing, before the first step."""
    check_folder(out)
    for file in ("configs/corpus/digits.yaml", "configs/scorer/digits.yaml",
                 "configs/train/digits.yaml", "ray_jobs/grow_corpus.py",
                 "launch/train_sparse.py"):  # fmt: skip
        _source(file)
    for name in ("ray", "mlflow", "deepspeed"):
        if find_spec(name) is None:
            raise UsageError(f"quickstart needs {name}: pip install -e . in the source tree")


def _run(out: Path, seeds: int, started: float) -> None:
    corpus = _grow(out)
    scorer = _fit(out, corpus)
    tickets = _prune(out, scorer, seeds)
    trained = _train(out, tickets)
    found = [cell.result() for cell in trained]
    figure = _draw(out, results.summary(found))
    names = _register(out, scorer, trained, figure)
    _say_what_next(out, figure, names, time.perf_counter() - started)


def _heading(text: str, command: list[str] | None = None) -> None:
    print(f"\n── {text} " + "─" * max(0, 76 - len(text)), flush=True)
    if command:
        print("$ " + shlex.join(command).replace(str(Path.cwd()) + os.sep, ""), flush=True)


def _source(path: str) -> Path:
    """Return a file of the source tree, which quickstart's commands are run from."""
    found = Path(autosparse.__file__).parent.parent / path
    if not found.exists():
        raise UsageError(
            f"{found} is not there; quickstart needs the source tree: pip install -e ."
        )
    return found


def _command(command: list[str], failure: str, **environment: str) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise RunFailed(
            f"{failure} (exit code {done.returncode}); the same command goes on from here"
        )


def _grow(out: Path) -> Path:
    file, folder = _source("configs/corpus/digits.yaml"), out / "corpus"
    plan = replace(parse(CorpusConfig, ["--config", str(file)], "", None), out=str(folder)).runs()
    command = [sys.executable, str(_source("ray_jobs/grow_corpus.py")),
               "--config", str(file), "--out", str(folder)]  # fmt: skip
    _heading(f"1  a corpus of {len(plan)} IRP runs, with Ray", ["python", *command[1:]])
    if all(is_finished(run_folder(each)) for each in plan):
        print(f"found {len(plan)} finished runs in {folder}")
    else:
        _command(command, "growing the corpus failed")
    return folder


def _fit(out: Path, corpus: Path) -> Path:
    from autosparse.cli.verbs import fit_autos

    file, path = _source("configs/scorer/digits.yaml"), out / "autos.safetensors"
    overrides = ["--config", str(file), "--corpus", str(corpus), "--out", str(path)]
    _heading("2  AutoS, fitted on the corpus", ["autosparse", "fit", *overrides])
    config = parse(FitConfig, overrides, "", None)
    card = read_card(path)["card"] if path.exists() else {}
    wanted = {**plain(config), "corpus": "", "out": ""}
    if card.get("corpus") == Corpus(corpus).fingerprint and card.get("config") == wanted:
        print(f"found {path}")
    else:
        fit_autos(config)
    return path


def _prune(out: Path, scorer: Path, seeds: int) -> list[Path]:
    source = sets.load("digits")
    fingerprint = read_card(scorer)["fingerprint"]
    plan = [(prune.DENSE, 0.0, seed) for seed in range(seeds)] + [
        (criterion, sparsity, seed)
        for seed in range(seeds)
        for sparsity in SPARSITIES
        for criterion in CRITERIA
    ]
    _heading(
        f"3  {len(plan)} tickets of {TARGET.name}, which is not in the corpus",
        ["autosparse", "prune", "--model.name", TARGET.name, "--criterion", "autos",
         "--options.scorer", str(scorer), "--sparsity", "0.95", "--seed", "0", "--out",
         str(out / "tickets" / "autos-95-seed0.safetensors")],
    )  # fmt: skip
    paths = []
    with Progress() as progress:
        bar = progress.bar("pruning", total=len(plan), unit="tickets")
        for criterion, sparsity, seed in plan:
            path = out / "tickets" / f"{criterion}-{sparsity * 100:.0f}-seed{seed}.safetensors"
            if not _is_there(path, criterion, fingerprint):
                model = zoo.create_for(source, TARGET, seed)
                options = {"scorer": str(scorer)} if criterion == "autos" else None
                prune.prune(model, source, criterion, sparsity, seed=seed, options=options).save(
                    path
                )
            paths.append(path)
            bar.advance()
    return paths


def _is_there(path: Path, criterion: str, fingerprint: str) -> bool:
    """Whether a ticket is there, made by this AutoS, and with today's defaults."""
    if not path.exists():
        return False
    card = read_card(path)["card"]
    if criterion != prune.DENSE and card.get("changed_defaults", {}) != (
        criteria.get(criterion).changed_defaults(())
    ):
        return False
    return criterion != "autos" or card["autos"] == fingerprint


def _train(out: Path, tickets: list[Path]) -> list[Cell]:
    file = _source("configs/train/digits.yaml")
    listed = json.dumps([str(path) for path in tickets])
    overrides = ["--config", str(file), "--tickets", listed, "--out", str(out / "trained")]
    config = parse(SparseTrainConfig, overrides, "", None)
    script = str(_source("launch/train_sparse.py"))
    ranks, accelerator = _ranks()
    launcher = ["--num_accelerators", str(ranks), "--log_level", "error", "--master_port", _port()]
    shown = ["--tickets", f"{out / 'tickets'}/*.safetensors", *overrides[4:]]
    _heading(
        f"4  sparse training, DeepSpeed on {ranks} ranks",
        ["deepspeed", "--num_accelerators", str(ranks), script, *overrides[:2], *shown],
    )
    planned = list(cells(config))
    left = sum(not cell.done for cell in planned)
    if not left:
        print(f"found {len(planned)} trained tickets in {out / 'trained'}")
        results.show(cell.result() for cell in planned)
        return planned
    from autosparse.integrations.mlflow import parent_run, tracking_uri

    with parent_run("quickstart", out):
        _command(
            [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, script, *overrides],
            "sparse training failed",
            MLFLOW_TRACKING_URI=tracking_uri(out),
            **accelerator,
        )
    return planned


def _ranks() -> tuple[int, dict[str, str]]:
    """Return how many ranks to start, and the environment that makes DeepSpeed use them."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), {}
    return RANKS, {"DS_ACCELERATOR": "cpu"}


def _port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _draw(out: Path, rows: list[dict[str, Any]]) -> Path:
    from autosparse.report.figures import accuracy_against_sparsity

    seeds = max(row["seeds"] for row in rows)
    title = f"{TARGET.name} on digits, mean ± standard deviation of {seeds} seeds"
    return accuracy_against_sparsity(rows, out / "accuracy.png", title)


def _register(out: Path, scorer: Path, trained: list[Cell], figure: Path) -> list[str]:
    """Register AutoS, the best checkpoint of each sparsity, and AutoS's own at the highest.

    Best is by validation accuracy; the test split has no say.
    """
    from autosparse.integrations import mlflow, registry

    _heading("5  registry")
    name = f"{TARGET.name}-sparse"
    chosen = {f"sparsity-{sparsity * 100:.0f}": _best(trained, sparsity) for sparsity in SPARSITIES}
    chosen[registry.AUTOS] = _best(trained, SPARSITIES[-1], registry.AUTOS)
    chosen[registry.CHAMPION] = chosen[f"sparsity-{SPARSITIES[-1] * 100:.0f}"]
    with mlflow.parent_run("quickstart", out) as run:
        autos_version = registry.register_autos(scorer, run)
        registry.set_alias(registry.AUTOS, registry.CHAMPION, autos_version)
        rows = [{"model": registry.AUTOS, "version": autos_version, "alias": registry.CHAMPION,
                 "what": "features at initialization → predicted survival"}]  # fmt: skip
        for alias, cell in chosen.items():
            result = cell.result()
            version = registry.register_ticket(cell.folder / TRAINED, result, run, autos_version)
            registry.set_alias(name, alias, version)
            what = f"{result['sparsity']:.0%} by {result['criterion']}, test accuracy "
            what += f"{result['test_accuracy']:.1%}"
            rows.append({"model": name, "version": version, "alias": alias, "what": what})
        mlflow.log_report(run, results.summary(cell.result() for cell in trained), [figure])
    print_table(rows)
    return [f"models:/{row['model']}@{row['alias']}" for row in rows]


def _best(trained: list[Cell], sparsity: float, criterion: str | None = None) -> Cell:
    mine = [
        cell
        for cell in trained
        if cell.result()["sparsity"] == sparsity and criterion in (None, cell.result()["criterion"])
    ]
    return max(mine, key=lambda cell: cell.result()["validation_accuracy"])


def _say_what_next(out: Path, figure: Path, names: list[str], seconds: float) -> None:
    from autosparse.integrations.mlflow import tracking_uri

    uri = tracking_uri(out)
    print(f"\nFigure: {figure}\nDone in {seconds:.0f} s. To browse runs and registered models:\n")
    print(f"  mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri {uri}\n")
    print(f"then open http://127.0.0.1:5000. To use a registered model:\n\n"
          f'  MLFLOW_TRACKING_URI={uri} python -c \\\n'
          f'    "import mlflow; print(mlflow.pytorch.load_model(\'{names[-1]}\'))"')  # fmt: skip
