"""`autosparse quickstart`: the whole path on embedded real data, with the commands it runs.

A step whose output is there is not done again, so a second run only draws and prints.
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

import autosparse
from autosparse.autos.config import FitConfig
from autosparse.cli import studies
from autosparse.cli.arguments import parse
from autosparse.cli.config import QuickstartConfig
from autosparse.core.config import plain
from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import check_folder, local_place, read_card
from autosparse.core.locks import claimed
from autosparse.core.progress import print_table
from autosparse.corpus.store import Corpus, is_finished
from autosparse.irp.config import CorpusConfig
from autosparse.irp.run import run_folder
from autosparse.report.drawing import quickstart_figure
from autosparse.study.config import StudyConfig

TARGET = "test_byobnet"
"""The model that is pruned and trained; the corpus has never seen it."""
CONFIGS = {"corpus": "configs/corpus/digits.yaml", "scorer": "configs/scorer/digits.yaml",
           "study": "configs/compare/quickstart.yaml"}  # fmt: skip


def run(config: QuickstartConfig) -> None:
    """Grow a corpus, fit AutoS, prune, train with DeepSpeed, register, draw, and say what next."""
    started = time.perf_counter()
    if config.seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {config.seeds}")
    out = local_place(config.out).absolute()
    _check(out)
    with claimed(out):
        _run(out, config.seeds, started)


def _check(out: Path) -> None:
    """Raise UsageError for what is missing, before the first step."""
    check_folder(out)
    for file in (*CONFIGS.values(), "ray_jobs/grow_corpus.py"):
        _source(file)
    for name in ("ray", "mlflow", "deepspeed"):
        if find_spec(name) is None:
            raise UsageError(f"quickstart needs {name}: pip install -e . in the source tree")


def _run(out: Path, seeds: int, started: float) -> None:
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{out.absolute() / 'mlflow.db'}")
    corpus = _grow(out)
    scorer = _fit(out, corpus)
    _study(out, scorer, seeds)
    figure = quickstart_figure(out)
    names = _register(out, scorer)
    _say_what_next(figure, names, time.perf_counter() - started)


def _heading(text: str, command: list[str] | None = None) -> None:
    print(f"\n── {text} " + "─" * max(0, 76 - len(text)), flush=True)
    if command:
        print("$ " + shlex.join(command).replace(str(Path.cwd()) + os.sep, ""), flush=True)


def _source(path: str) -> Path:
    """Return a file of the source tree, which quickstart's commands are run from."""
    file = Path(autosparse.__file__).parent.parent / path
    if not file.exists():
        raise UsageError(f"{file} is not there; quickstart needs the source tree: pip install -e .")
    return file


def _command(command: list[str], failure: str, **environment: str) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise RunFailed(
            f"{failure} (exit code {done.returncode}); the same command goes on from here"
        )


def _grow(out: Path) -> Path:
    file, folder = _source(CONFIGS["corpus"]), out / "corpus"
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

    file, path = _source(CONFIGS["scorer"]), out / "autos.safetensors"
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


def _study(out: Path, scorer: Path, seeds: int) -> None:
    """Prune and train: criteria by sparsities by seeds, under DeepSpeed."""
    listed = ",".join(str(seed) for seed in range(seeds))
    options = json.dumps({"autos": {"scorer": str(scorer)}})
    arguments = ["--config", str(_source(CONFIGS["study"])), "--seeds", listed,
                 "--options", options, "--out", str(out / "study")]  # fmt: skip
    _heading(f"3  tickets of {TARGET}, which is not in the corpus, and sparse training with "
             "DeepSpeed", ["autosparse", "compare", *arguments])  # fmt: skip
    studies.run(parse(StudyConfig, arguments, "", None))


def _register(out: Path, scorer: Path) -> list[str]:
    """Register AutoS and the best ticket of each sparsity, by validation accuracy."""
    from autosparse.integrations import registry

    _heading("4  registry", ["autosparse", "registry", "add", str(out / "study")])
    rows = [*registry.add(scorer), *registry.add(out / "study")]
    print_table(rows, spare=registry.SPARE)
    return [f"models:/{row['model']}@{alias}" for row in rows for alias in _aliases(row)]


def _aliases(row: dict[str, str]) -> list[str]:
    return [each.strip() for each in row["aliases"].split(",") if each.strip()]


def _say_what_next(figure: Path, names: list[str], seconds: float) -> None:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    best = next(name for name in reversed(names) if name.endswith("@champion"))
    print(f"\nFigure: {figure}\nDone in {seconds:.0f} s. To browse runs and registered models:\n")
    print(f"  mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri {uri}\n")
    print(f"then open http://127.0.0.1:5000. To use a registered model:\n\n"
          f'  MLFLOW_TRACKING_URI={uri} python -c \\\n'
          f'    "import mlflow; print(mlflow.pytorch.load_model(\'{best}\'))"')  # fmt: skip
