"""Running a sweep with Ray Tune: one trial per cell, finished cells found on disk.

Tune's own state is never read again: which cells are over is known from their folders, so a sweep
whose driver or cluster was killed goes on with the same command, whatever Tune had written.
"""

from __future__ import annotations

import os

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "1000")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from autosparse.core.config import run_id
from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import write_json
from autosparse.core.locks import claimed
from autosparse.core.progress import Bar, Progress
from autosparse.data import identity
from autosparse.integrations import ray as cluster
from autosparse.study import compare, sweep
from autosparse.study.compare import Trial
from autosparse.study.config import SweepConfig
from autosparse.study.sweep import SweepCell

logging.getLogger("ray.tune").setLevel(logging.ERROR)

METRIC = "validation_accuracy"
RETRIES = 10
"""How often a cell is tried again after its worker or node has died."""
TUNE = "tune"
"""Folder of Tune's own files; removed at the beginning and at the end."""

Resolve = Callable[[dict[str, Any]], SweepCell]
"""What Tune suggests -> the cell."""


@dataclass
class Swept:
    """What `run` did."""

    folder: Path
    cells: list[SweepCell] = field(default_factory=list)
    """All cells of the sweep."""
    found: list[str] = field(default_factory=list)
    """Cells that were over before."""


def run(config: SweepConfig) -> Swept:
    """Train every cell that is not over, as many at a time as the cluster fits.

    A cell that fails for its own reason is recorded in its folder's `failed.json` and does not
    stop the others; a worker or node that dies is tried again, from the cell's checkpoint.
    """
    folder = cluster.output_folder(config.out)
    config = replace(config, out=str(folder))
    sweep.check_whole(config)
    planned = sweep.cells(config)
    if config.search == sweep.OPTUNA:
        _optuna()
    swept = Swept(folder, found=[cell.key for cell in planned if cell.over])
    with claimed(folder), _tracked(config, folder) as tracker:
        if tracker:
            tracker.catch_up([cell for cell in planned if cell.over])
        if _left(config, planned):
            cluster.connect()
            _check_fits(config)
            shutil.rmtree(folder / TUNE, ignore_errors=True)
            with Progress() as progress:
                _run_all(config, planned, _Watch(tracker, progress, config, planned))
            shutil.rmtree(folder / TUNE, ignore_errors=True)
        swept.cells = sweep.cells(config)
    return swept


def _left(config: SweepConfig, planned: list[SweepCell]) -> int:
    """Return how many cells are to be done."""
    left = sum(not cell.over for cell in planned if cell.trial.label == compare.DENSE)
    if config.search == sweep.GRID:
        return sum(not cell.over for cell in planned)
    for study in sweep.studies(config):
        over = sum(cell.over for cell in sweep.begun(config, *study))
        left += max(config.samples - over, 0)
    return left


def _run_all(config: SweepConfig, planned: list[SweepCell], watch: _Watch) -> None:
    dense = [cell for cell in planned if cell.trial.label == compare.DENSE]
    grid = planned if config.search == sweep.GRID else dense
    points = [_as_point(config, cell) for cell in grid if not cell.over]
    if points:
        space = {"point": tune.grid_search(points)}
        _tune(config, partial(_from_point, config), space, watch, planned)
    if config.search == sweep.OPTUNA:
        for study in sweep.studies(config):
            _study(config, study, watch)


def _as_point(config: SweepConfig, cell: SweepCell) -> dict[str, Any]:
    """Return a cell as plain data."""
    model = next(n for n, each in enumerate(config.models) if each == cell.config.model)
    return {"model": model, "variation": cell.variation, "trial": vars(cell.trial)}


def _from_point(config: SweepConfig, suggestion: dict[str, Any]) -> SweepCell:
    point = suggestion["point"]
    found = sweep.comparison(config, point["model"], point["variation"])
    return SweepCell(found, Trial(**point["trial"]), point["variation"], config.asha)


def _study(config: SweepConfig, study: tuple[int, float], watch: _Watch) -> None:
    """Let Optuna choose the cells of one model and sparsity; it is told of those that are over."""
    cells = sweep.begun(config, *study)
    over = [cell for cell in cells if cell.over]
    left = config.samples - len(over)
    if left < 1:
        return
    space = {"label": tune.choice(compare.labels(sweep.comparison(config, 0, {})))}
    space |= {key: _domain(values) for key, values in config.space.items()}
    begun = [_suggestion(cell) for cell in cells if not cell.over][:left]
    model, sparsity = study
    seed = len(over) + 1000 * model + int(1e6 * sparsity)
    search = _optuna()(
        space, metric=METRIC, mode="max", seed=seed, points_to_evaluate=begun or None
    )
    for cell in over:
        search.add_evaluated_point(_suggestion(cell), cell.history()[-1][METRIC])
    resolve = partial(sweep.suggested, config, *study)
    begin = partial(sweep.write_point, config, *study)
    _tune(config, resolve, {}, watch, cells, search=search, samples=left, begin=begin)


def _suggestion(cell: SweepCell) -> dict[str, Any]:
    return {"label": cell.trial.label, **cell.variation}


def _domain(values: Any) -> Any:
    if isinstance(values, list):
        return tune.choice(values)
    whole = isinstance(values["low"], int) and isinstance(values["high"], int)
    if values.get("log"):
        kind = tune.lograndint if whole else tune.loguniform
    else:
        kind = tune.randint if whole else tune.uniform
    return kind(values["low"], values["high"] + 1 if whole else values["high"])


def _optuna() -> Any:
    """Return Tune's Optuna search; raise UsageError where Optuna is missing."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise UsageError("search optuna needs Optuna: pip install 'autosparse[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch


def _tune(
    config: SweepConfig,
    resolve: Resolve,
    space: dict[str, Any],
    watch: _Watch,
    known: list[SweepCell],
    search: Any = None,
    samples: int = 1,
    begin: Resolve | None = None,
) -> None:
    """Run one experiment of Tune; raise nothing for cells that fail.

    `begin` writes down what was suggested, when its cell begins.
    """
    watch.resolve = resolve
    resources = {"cpu": config.cpus_per_trial, "gpu": config.gpus_per_trial}
    if config.memory_gb_per_trial:
        resources["memory"] = int(config.memory_gb_per_trial * 1e9)
    trainable = tune.with_resources(
        partial(_train, begin or resolve, config.cpus_per_trial), resources
    )
    scheduler = PerGroup(config, resolve, known) if config.asha else FIFOScheduler()
    Tuner(
        trainable,
        param_space=space,
        tune_config=TuneConfig(
            search_alg=search, scheduler=scheduler, num_samples=samples, reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=RunConfig(
            storage_path=str(Path(config.out) / TUNE), name="sweep", verbose=0,
            failure_config=FailureConfig(max_failures=RETRIES), callbacks=[watch],
        ),
    ).fit()  # fmt: skip


def _train(begin: Resolve, cpus: float, suggestion: dict[str, Any]) -> None:
    """Train one cell inside a Tune trial, and report its epochs; an error in one line."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))
    try:
        with identity.looked_at_once():
            cell = begin(suggestion)
            compare.run_trial(
                cell.config,
                cell.trial,
                _loaded(cell),
                on_epoch=lambda epoch: tune.report(vars(epoch)),
            )
        tune.report({"cell": "finished", METRIC: cell.history()[-1][METRIC]})
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        tune.report({"error": line, METRIC: float("nan")})


_SOURCES: dict[Any, Any] = {}


def _loaded(cell: SweepCell) -> Any:
    """Load the data once per worker; a sweep has one data set."""
    key = (run_id(cell.config.data), cell.config.data, cell.config.device)
    if key not in _SOURCES:
        _SOURCES.clear()
        _SOURCES[key] = compare.load(cell.config)
    return _SOURCES[key]


class PerGroup(FIFOScheduler):
    """ASHA with brackets of its own for every model, sparsity and seed.

    What finished and stopped cells had reached is entered first, so a sweep that goes on
    stops the same cells as an unbroken one.
    """

    def __init__(self, config: SweepConfig, resolve: Resolve, known: list[SweepCell]) -> None:
        super().__init__()
        self.config, self.resolve = config, resolve
        self.brackets: dict[Any, AsyncHyperBandScheduler] = {}
        for cell in known:
            if cell.over:
                self._enter(cell)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def _of(self, cell: SweepCell) -> AsyncHyperBandScheduler:
        if cell.group not in self.brackets:
            self.brackets[cell.group] = AsyncHyperBandScheduler(
                time_attr="epoch", metric=METRIC, mode="max",
                max_t=self.config.training.epochs + 1, grace_period=self.config.asha_epochs,
                reduction_factor=self.config.asha_factor,
            )  # fmt: skip
        return self.brackets[cell.group]

    def _enter(self, cell: SweepCell) -> None:
        bracket, trial = self._of(cell), SimpleNamespace(trial_id=cell.key)
        bracket.on_trial_add(None, trial)  # type: ignore[arg-type]
        for epoch in cell.history():
            bracket.on_trial_result(None, trial, epoch)  # type: ignore[arg-type]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(self.resolve(trial.config)).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        bracket = self._of(self.resolve(trial.config))
        return bracket.on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        self._of(self.resolve(trial.config)).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(self.resolve(trial.config)).on_trial_remove(tune_controller, trial)


class _Watch(Callback):
    """Moves the bar, tells MLflow, and writes down which cells were stopped or failed."""

    def __init__(
        self, tracker: Any, progress: Progress, config: SweepConfig, planned: list[SweepCell]
    ) -> None:
        self.tracker, self.config = tracker, config
        self.resolve: Resolve = partial(_from_point, config)
        self.histories: dict[str, list[dict[str, Any]]] = {}
        self.errors: dict[str, str] = {}
        self.total, self.over = _left(config, planned), 0
        epochs = self.total * config.training.epochs
        self.bar: Bar = progress.bar(f"sweeping {Path(config.out).name}", epochs, "epochs")
        self.extra = 0

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; what it writes is never read again."""
        return {}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        cell = self.resolve(trial.config)
        self.histories.setdefault(cell.key, [])
        self.bar.describe(
            f"sweeping {Path(self.config.out).name}: {self.over}/{self.total} cells "
            f"({cell.trial.name})"
        )

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        cell = self.resolve(trial.config)
        if "error" in result:
            self.errors[cell.key] = result["error"]
        elif "epoch" in result:
            names = ("epoch", "train_loss", "validation_loss", METRIC, "learning_rate", "seconds")
            entry = {name: result[name] for name in names}
            self.histories.setdefault(cell.key, []).append(entry)
            if self.tracker:
                self.tracker.epochs(cell, [entry])
            self.bar.set(self.over * self.config.training.epochs + self._running())

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        cell = self.resolve(trial.config)
        error = self.errors.pop(cell.key, None)
        if error:
            self._failed(cell, error)
        elif not compare.is_done(cell.config, cell.trial):
            write_json(cell.folder / sweep.STOPPED, {"history": self.histories[cell.key]})
        self._ended(cell)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        cell = self.resolve(trial.config)
        lines = str(getattr(trial, "get_error", lambda: "")() or "it died").strip().splitlines()
        self._failed(cell, lines[-1])
        self._ended(cell)

    def _failed(self, cell: SweepCell, error: str) -> None:
        write_json(cell.folder / sweep.FAILED, {"error": error})

    def _ended(self, cell: SweepCell) -> None:
        if cell.over:
            (cell.folder / sweep.FAILED).unlink(missing_ok=True)
        self.histories.pop(cell.key, None)
        self.over += 1
        self.bar.set(self.over * self.config.training.epochs + self._running())
        if self.tracker:
            self.tracker.end(cell)

    def _running(self) -> int:
        return sum(len(each) for each in self.histories.values())


def _tracked(config: SweepConfig, folder: Path) -> Any:
    """Return a context that gives a tracker which logs to MLflow, or None."""
    if not config.tracking:
        return nullcontext()
    from autosparse.integrations.tracking import sweep_tracker

    return sweep_tracker(config, folder)


def _check_fits(config: SweepConfig) -> None:
    """Raise UsageError if no node could ever hold one cell; Tune would wait for ever."""
    cluster.check_fits(
        {"CPU": config.cpus_per_trial, "GPU": config.gpus_per_trial,
         "memory": config.memory_gb_per_trial * 1e9},
        "cell", "per_trial",
    )  # fmt: skip


def raise_if_failed(swept: Swept) -> None:
    """Raise RunFailed that names the cells that failed."""
    failed = [cell.key for cell in swept.cells if not cell.over]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(swept.cells)} cells failed: {', '.join(failed)}; "
            "the same command tries them again"
        )
