"""The cells of a study trained by Ray Tune: one trial per cell, finished cells found on disk.

Tune's own state is never read again: which cells are over is known from their folders, so a study
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from autosparse.core.errors import UsageError
from autosparse.core.files import write_json
from autosparse.core.progress import Bar, Progress
from autosparse.criteria.pruning import DENSE
from autosparse.data import identity
from autosparse.integrations import ray as cluster
from autosparse.study import grid, labels, local, plan, search
from autosparse.study.config import StudyConfig
from autosparse.study.grid import StudyCell
from autosparse.study.local import Tracker

logging.getLogger("ray.tune").setLevel(logging.ERROR)

METRIC = "validation_accuracy"
RETRIES = 10
"""How often a cell is tried again after its worker or node has died; see ray.RETRIES."""
TUNE = "tune"
"""Folder of Tune's own files; removed at the beginning and at the end."""

Resolve = Callable[[dict[str, Any]], StudyCell]
"""What Tune suggests -> the cell."""


def run(config: StudyConfig, planned: list[StudyCell], tracker: Tracker | None = None) -> None:
    """Train every cell that is not over, as many at a time as the cluster fits.

    A cell that fails for its own reason is recorded in its folder's `failed.json` and does not
    stop the others; a worker or node that dies is tried again, from the cell's checkpoint.
    """
    cluster.connect()
    cluster.check_fits(
        config.cpus_per_trial, config.gpus_per_trial, config.memory_gb_per_trial, "cell", "trial"
    )
    folder = Path(config.out)
    shutil.rmtree(folder / TUNE, ignore_errors=True)
    with Progress() as progress:
        watch = _Watch(tracker, progress, config, plan.left(config, planned))
        _run_all(config, planned, watch)
    shutil.rmtree(folder / TUNE, ignore_errors=True)


def _run_all(config: StudyConfig, planned: list[StudyCell], watch: _Watch) -> None:
    searched = config.search == plan.OPTUNA
    todo = {cell.key: cell for cell in planned if not cell.over}
    if searched:
        todo = {key: cell for key, cell in todo.items() if cell.label == DENSE}
    if todo:
        space = {"cell": tune.grid_search(list(todo))}
        _tune(config, partial(_named, todo), space, watch, planned)
    for part in search.parts(config) if searched else ():
        _search(config, part, watch)


def _named(cells: dict[str, StudyCell], suggestion: dict[str, Any]) -> StudyCell:
    return cells[suggestion["cell"]]


def _search(config: StudyConfig, part: tuple[int, float], watch: _Watch) -> None:
    """Let Optuna choose the cells of one model and sparsity; it is told of those that are over."""
    cells = search.begun(config, *part)
    over = [cell for cell in cells if cell.over]
    if len(over) >= search.samples(config):
        return
    left = config.samples - len(over)  # Of a few choices, Optuna suggests some again.
    space = {"label": tune.choice(labels.labels(config))}
    space |= {key: _domain(values) for key, values in config.space.items()}
    begun = [_suggestion(cell) for cell in cells if not cell.over][:left]
    model, sparsity = part
    # Another seed for each part, and after each restart: Optuna would begin with the same again.
    seed = len(over) + 1000 * model + int(1e6 * sparsity)
    algorithm = optuna_search()(
        space, metric=METRIC, mode="max", seed=seed, points_to_evaluate=begun or None
    )
    for cell in over:
        algorithm.add_evaluated_point(_suggestion(cell), cell.history()[-1][METRIC])
    resolve = partial(search.suggested, config, *part)
    begin = partial(search.write_point, config, *part)
    _tune(config, resolve, {}, watch, cells, algorithm=algorithm, samples=left, begin=begin)


def _suggestion(cell: StudyCell) -> dict[str, Any]:
    return {"label": cell.label, **cell.point}


def _domain(values: Any) -> Any:
    if isinstance(values, list):
        return tune.choice(values)
    whole = isinstance(values["low"], int) and isinstance(values["high"], int)
    if values.get("log"):
        kind = tune.lograndint if whole else tune.loguniform
    else:
        kind = tune.randint if whole else tune.uniform
    return kind(values["low"], values["high"] + 1 if whole else values["high"])


def optuna_search() -> Any:
    """Return Tune's Optuna search; raise UsageError where Optuna is missing."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise UsageError("search optuna needs Optuna: pip install 'autosparse[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch


def _tune(
    config: StudyConfig,
    resolve: Resolve,
    space: dict[str, Any],
    watch: _Watch,
    known: list[StudyCell],
    algorithm: Any = None,
    samples: int = 1,
    begin: Resolve | None = None,
) -> None:
    """Run one experiment of Tune; raise nothing for cells that fail.

    `begin` records a suggestion when the training of its cell begins.
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
            search_alg=algorithm, scheduler=scheduler, num_samples=samples, reuse_actors=True,
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
            local.run_cell(
                cell, local.load(cell.config), on_epoch=lambda epoch: tune.report(vars(epoch))
            )
        tune.report({"cell": "finished", METRIC: cell.history()[-1][METRIC]})
    except Exception as error:
        tune.report({"error": local.in_one_line(error), METRIC: float("nan")})


class PerGroup(FIFOScheduler):
    """ASHA with brackets of its own for every model, data set, sparsity and seed.

    What finished and stopped cells had reached is entered first, so a study that goes on
    stops the same cells as an unbroken one.
    """

    def __init__(self, config: StudyConfig, resolve: Resolve, known: list[StudyCell]) -> None:
        super().__init__()
        self.config, self.resolve = config, resolve
        self.brackets: dict[Any, AsyncHyperBandScheduler] = {}
        for cell in known:
            if cell.over:
                self._enter(cell)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def _of(self, cell: StudyCell) -> AsyncHyperBandScheduler:
        if cell.group not in self.brackets:
            self.brackets[cell.group] = AsyncHyperBandScheduler(
                time_attr="epoch", metric=METRIC, mode="max",
                max_t=self.config.training.epochs + 1, grace_period=self.config.asha_epochs,
                reduction_factor=self.config.asha_factor,
            )  # fmt: skip
        return self.brackets[cell.group]

    def _enter(self, cell: StudyCell) -> None:
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
    """Moves the progress bar, logs to MLflow, and records which cells were stopped or failed."""

    resolve: Resolve

    def __init__(
        self, tracker: Tracker | None, progress: Progress, config: StudyConfig, cells: int
    ) -> None:
        self.tracker, self.config = tracker, config
        self.histories: dict[str, list[dict[str, Any]]] = {}
        self.errors: dict[str, str] = {}
        self.total, self.over = cells, 0
        epochs = self.total * config.training.epochs
        self.bar: Bar = progress.bar(f"training {Path(config.out).name}", epochs, "epochs")

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its callbacks, but what it writes is never read again."""
        return {}

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        cell = self.resolve(trial.config)
        self.histories.setdefault(cell.key, [])
        self.bar.describe(
            f"training {Path(self.config.out).name}: {self.over}/{self.total} cells ({cell.name})"
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
            cell.failed(error)
        elif cell.state != "finished":
            write_json(cell.folder / grid.STOPPED, {"history": self.histories[cell.key]})
        self._ended(cell)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        cell = self.resolve(trial.config)
        lines = str(getattr(trial, "get_error", lambda: "")() or "it died").strip().splitlines()
        cell.failed(lines[-1])
        self._ended(cell)

    def _ended(self, cell: StudyCell) -> None:
        if cell.over:
            (cell.folder / grid.FAILED).unlink(missing_ok=True)
        self.histories.pop(cell.key, None)
        self.over += 1
        self.bar.set(self.over * self.config.training.epochs + self._running())
        if self.tracker:
            self.tracker.end(cell)

    def _running(self) -> int:
        return sum(len(each) for each in self.histories.values())
