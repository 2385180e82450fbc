"""What each verb of `autosparse` does, once its config is parsed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from autosparse.autos.config import FitConfig
from autosparse.cli.verbs.inspection import level_rows
from autosparse.core.errors import unknown
from autosparse.core.files import is_local, local_place, place
from autosparse.core.progress import Progress, print_table
from autosparse.criteria.config import PruneConfig
from autosparse.irp.config import IRPConfig
from autosparse.study.config import ExportConfig, SparseTrainConfig


def run_irp(config: IRPConfig) -> None:
    """Do one IRP run and print its levels."""
    from autosparse.corpus.store import read_run
    from autosparse.irp import run

    if is_local(config.out):
        config = replace(config, out=str(place(config.out).absolute()))
    run.check_whole(config)
    with Progress() as progress:
        total = (config.levels + 1) * config.training.epochs
        bar = progress.bar("IRP", total=total, unit="epochs")

        def on_level(entry: dict[str, Any]) -> None:
            bar.describe(f"IRP: density {entry['density']:.3g}")
            bar.set((entry["level"] + 1) * config.training.epochs)

        folder = run.run_irp(config, on_epoch=lambda level, epoch: bar.advance(), on_level=on_level)
    finished = read_run(folder)
    print_table(level_rows(finished.card["levels"]), title=str(folder))
    if config.ticket is not None:
        finished.ticket(finished.levels).save(config.ticket)
        print(f"{config.ticket}: the ticket of level {finished.levels}")


def fit_autos(config: FitConfig) -> None:
    """Fit AutoS, save it, and print how well it predicts runs it has not seen."""
    from autosparse.autos import fit, fit_heads
    from autosparse.core.files import check_file

    check_file(config.out)
    fitting = fit_heads if config.head == "survival" else fit
    with Progress() as progress:
        bar = progress.bar("fitting AutoS", total=config.epochs, unit="epochs")
        network = fitting.fit(config, on_epoch=lambda _: bar.advance())
    network.save(config.out)
    card = network.card
    print_table(
        [
            {
                "AutoS": config.out,
                "fingerprint": network.fingerprint,
                "trained on": f"{len(card['trained_on'])} runs",
                "held out": f"{len(card['held_out'])} runs",
                "validation MSE": card["best"]["validation_mse"],
                "constant's MSE": card["baseline_mse"],
                "rank correlation": card["best"]["validation_rank_correlation"],
            }
        ],
        spare=("fingerprint",),
    )


def prune_model(config: PruneConfig) -> None:
    """Prune a model and save the ticket."""
    from autosparse.core.files import check_file
    from autosparse.criteria import pruning

    pruning.check(config)
    check_file(config.out)
    ticket = pruning.prune_as(config)
    ticket.save(config.out)
    total, card = sum(mask.numel() for mask in ticket.masks.values()), ticket.card
    print(
        f"{config.out}: {ticket.kept:,} of {total:,} weights kept ({ticket.sparsity:.2%} "
        f"sparsity), fingerprint {ticket.fingerprint}"
    )
    if "live" in card:
        dead = ticket.kept - sum(card["live"].values())
        print(f"effective density {card['effective_density']:.4%}: {dead:,} kept weights lie on "
              f"no path from input to output")  # fmt: skip
    if card["criterion"] != pruning.DENSE:
        print(f"cost: {card['image_passes']:,.0f} image passes (forward and backward), "
              f"{card['seconds']:.2f} s")  # fmt: skip


def train_tickets(config: SparseTrainConfig) -> None:
    """Train tickets one after another in this process."""
    from autosparse.data import sets
    from autosparse.models import zoo
    from autosparse.study.cells import cells, check_config
    from autosparse.study.table import show_trainings
    from autosparse.study.trainings import train_cell, unsent
    from autosparse.training.checks import check_plain
    from autosparse.training.steppers import PlainStepper
    from autosparse.training.watching import StepWatch, told_to_stop

    device = zoo.choose_device(config.device)
    check_plain(config.training)
    check_config(config)
    with sets.remembered():
        planned = list(cells(fetched(config), device=str(device)))
        trained = []
        wanted = config.tracking and not all(cell.done and not unsent(cell) for cell in planned)
        with tracking(wanted) as observer, Progress() as progress, told_to_stop() as stop:
            for cell in planned:
                result = train_cell(
                    cell,
                    config,
                    sets.load(cell.data).to(device),
                    lambda model, steps: PlainStepper(model, config.training, steps),
                    device=str(device),
                    observer=observer,
                    watch=StepWatch(progress, cell.name),
                    stop=stop,
                )
                trained.append(result)
    show_trainings(trained)


def export_ticket(config: ExportConfig) -> None:
    """Write a trained ticket in another format."""
    from autosparse.study import export

    out = local_place(config.out) if config.out else None
    source = _local_ticket(config.ticket)
    ticket = export.trained_ticket(source)
    if config.format not in export.FORMATS:
        raise unknown("format", config.format, export.FORMATS)
    beside = source / "trained" if source.is_dir() else source.with_suffix("")
    out = out or Path(f"{beside}{export.ENDINGS[config.format]}")
    written = export.write(ticket, config.format, out, slimmed=config.slim)
    print(f"{out}: {written['bytes']:,} bytes, {ticket.kept:,} weights kept")
    if "parameters" in written:
        before, after = written["parameters"]
        print(f"slimmed: {after:,} of {before:,} parameters are left, zeros among them")
    if "kept_score" in written:
        shares = written["kept_score"]
        worst = min(shares, key=shares.get)
        print(
            f"2:4 in {len(shares)} layers; least is left of {worst}: "
            f"{100 * shares[worst]:.2f} % of sum |weight|"
        )


def _local_ticket(name: str) -> Path:
    """Return a ticket's path; one of the registry is fetched."""
    if not name.startswith("models:/"):
        return Path(name).expanduser()
    from autosparse.integrations.registry import fetch_ticket

    return fetch_ticket(name)


def draw_figures(paths: list[str]) -> None:
    """Draw every figure that applies to what folders or files hold."""
    from autosparse.report import drawing

    for path in paths:
        for figure in drawing.draw(path):
            print(figure)


def write_reports(paths: list[str]) -> None:
    """Write one page of HTML for every folder."""
    from autosparse.report import page

    for path in paths:
        print(page.write(path))


def fetched(config: SparseTrainConfig) -> SparseTrainConfig:
    """Put local files where `tickets` names registered ones."""
    names = [config.tickets] if isinstance(config.tickets, str) else config.tickets
    if not any(name.startswith("models:/") for name in names):
        return config
    return replace(config, tickets=[str(_local_ticket(name)) for name in names])


@contextmanager
def tracking(wanted: bool) -> Iterator[Any]:
    """Give an Observer that logs to MLflow, and send what is left at the end; None if unwanted."""
    if not wanted:
        yield None
        return
    from autosparse.integrations.mlflow import Tracker
    from autosparse.integrations.mlflow_spool import Spooled

    observer = Spooled(Tracker())
    try:
        yield observer
    finally:
        observer.close()
