"""What each verb of `autosparse` does, once its config is parsed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosparse.config import (
    CompareConfig,
    ExportConfig,
    FitConfig,
    IRPConfig,
    PackConfig,
    PruneConfig,
    QuickstartConfig,
    SparseTrainConfig,
)
from autosparse.errors import RunFailed, UsageError, unknown
from autosparse.files import is_local, place, read_card
from autosparse.progress import Progress, print_table

if TYPE_CHECKING:
    from autosparse.data.tars import Shard


def quickstart(config: QuickstartConfig) -> None:
    """Run the whole path."""
    from autosparse import quickstart as steps

    steps.run(config)


def irp(config: IRPConfig) -> None:
    """Do one IRP run and print its levels."""
    from autosparse import corpus, irp

    if is_local(config.out):
        config = replace(config, out=str(place(config.out).absolute()))
    with Progress() as progress:
        total = (config.levels + 1) * config.training.epochs
        bar = progress.bar("IRP", total=total, unit="epochs")

        def on_level(entry: dict[str, Any]) -> None:
            bar.describe(f"IRP: density {entry['density']:.3g} done")
            bar.set((entry["level"] + 1) * config.training.epochs)

        folder = irp.run_irp(config, on_epoch=lambda level, epoch: bar.advance(), on_level=on_level)
    run = corpus.read_run(folder)
    print_table(run.card["levels"], title=str(folder))
    if config.ticket is not None:
        run.ticket(run.levels).save(config.ticket)
        print(f"{config.ticket}: the ticket of level {run.levels}")


def fit(config: FitConfig) -> None:
    """Fit AutoS, save it, and print how well it predicts runs it has not seen."""
    from autosparse import fit_scorer, fit_survival

    fit_autos = (fit_survival if config.head == "survival" else fit_scorer).fit
    with Progress() as progress:
        bar = progress.bar("fitting AutoS", total=config.epochs, unit="epochs")
        network = fit_autos(config, on_epoch=lambda _: bar.advance())
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
        ]
    )


def prune(config: PruneConfig) -> None:
    """Prune a model and save the ticket."""
    from autosparse import pruning

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


def compare(config: CompareConfig) -> None:
    """Train tickets and twins, print the table with verdicts, and draw it."""
    from contextlib import nullcontext

    from autosparse import compare, verdicts
    from autosparse.figures import comparison

    planned = compare.trials(config)
    out = Path(config.out)
    left = [trial for trial in planned if not compare.is_done(config, trial)]
    print(f"{len(planned)} trainings, {len(planned) - len(left)} of them found in {out}")
    source = compare.load(config)
    tracked = config.tracking and bool(left)
    if tracked:
        from autosparse.integrations import mlflow

        os.environ.setdefault("MLFLOW_TRACKING_URI", mlflow.tracking_uri())
    observer = _tracker() if tracked else None
    with mlflow.parent_run("compare", out) if tracked else nullcontext() as run:
        with Progress() as progress:
            bar = progress.bar("comparing", len(left), "trainings")
            for trial in left:
                bar.describe(f"comparing: {trial.name}")
                compare.run_trial(config, trial, source, observer=observer)
                bar.advance()
        results = [compare.run_trial(config, trial, source) for trial in planned]
        rows = verdicts.table(config, results, verdicts.training_passes(config, source))
        path = verdicts.write_report(config, rows, results)
        figure = comparison(
            rows, out / "comparison.png", f"{config.model.name} on {config.data.name}"
        )
        if run is not None:
            mlflow.log_report(run, list(verdicts.shown(rows)), [figure])
    print_table(list(verdicts.shown(rows)), "per cent; passes: of one image; cost: of one training")
    print(f"figure: {figure}\nall figures and intervals: {path}")


def train(config: SparseTrainConfig) -> None:
    """Train tickets one after another in this process."""
    from autosparse import data, models, results
    from autosparse.sparse_training import cells, train_cell, unsent
    from autosparse.steppers import PlainStepper, check
    from autosparse.watching import StepWatch, told_to_stop

    device = models.choose_device(config.device)
    check(config.training)
    planned = list(cells(fetched(config), device=str(device)))
    found = []
    wanted = config.tracking and not all(cell.done and not unsent(cell) for cell in planned)
    with tracking(wanted) as observer, Progress() as progress, told_to_stop() as stop:
        for cell in planned:
            result = train_cell(
                cell,
                config,
                data.load(cell.data).to(device),
                lambda model, steps: PlainStepper(model, config.training, steps),
                device=str(device),
                observer=observer,
                watch=StepWatch(progress, cell.name),
                stop=stop,
            )
            found.append(result)
    results.show(found)


def export(config: ExportConfig) -> None:
    """Write a trained ticket in another format."""
    from autosparse import exporting

    source = _local_ticket(config.ticket)
    ticket = exporting.trained_ticket(source)
    if config.format not in exporting.FORMATS:
        raise unknown("format", config.format, exporting.FORMATS)
    beside = source / "trained" if source.is_dir() else source.with_suffix("")
    out = Path(config.out or f"{beside}{exporting.ENDINGS[config.format]}")
    found = exporting.export(ticket, config.format, out)
    print(f"{out}: {found['bytes']:,} bytes, {ticket.kept:,} weights kept")


def _local_ticket(name: str) -> Path:
    """Return a ticket's path; one of the registry is fetched."""
    if not name.startswith("models:/"):
        return Path(name)
    from autosparse.integrations.registry import fetch_ticket

    return fetch_ticket(name)


def figures(paths: list[str]) -> None:
    """Draw every figure that applies to what folders or files hold."""
    from autosparse import drawing

    if len(paths) == 2 and drawing.kind_of(paths[0]) == drawing.AUTOS:
        file = place(paths[0])
        found = drawing.draw_autos(file, place(paths[1]), file.parent / drawing.FIGURES)
    else:
        found = [figure for path in paths for figure in drawing.draw(path)]
    for figure in found:
        print(figure)


def report(paths: list[str]) -> None:
    """Write one page of HTML for every folder."""
    from autosparse import report

    for path in paths:
        print(report.write(path))


def registry(arguments: list[str]) -> None:
    """List the registry, add to it, or promote a version."""
    action, rest = arguments[0], arguments[1:]
    if action not in REGISTRY_ACTIONS:
        raise unknown("registry action", action, REGISTRY_ACTIONS)
    REGISTRY_ACTIONS[action](rest)


def _registry_ls(arguments: list[str]) -> None:
    from autosparse.integrations import mlflow, registry

    _options(arguments, 0, {})
    rows = registry.listing()
    if not rows:
        print(f"nothing is registered in {mlflow.tracking_uri()}")
        return
    empty = {key for key in rows[0] if not any(row[key] for row in rows)}
    print_table([{k: v for k, v in row.items() if k not in empty} for row in rows])


def _registry_add(arguments: list[str]) -> None:
    from autosparse.integrations import registry

    (path,), _ = _options(arguments, 1, {})
    rows = registry.add(place(path))
    empty = {key for key in rows[0] if not any(row[key] for row in rows)}
    print_table([{k: v for k, v in row.items() if k not in empty} for row in rows])


def _registry_promote(arguments: list[str]) -> None:
    from autosparse.integrations import registry

    (name,), given = _options(arguments, 1, {"version": int, "metric": str, "force": _truth})
    if "version" not in given:
        raise UsageError("autosparse registry promote needs --version N")
    force = given.get("force", False)
    print(registry.promote(name, given["version"], given.get("metric"), force))


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def _options(
    arguments: list[str], names: int, known: dict[str, Callable[[str], Any]]
) -> tuple[list[str], dict[str, Any]]:
    """Split arguments into so many names and `--key value` options."""
    plain, given, rest = [], {}, list(arguments)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if not word.startswith("--"):
            plain.append(word)
            continue
        key = word.removeprefix("--")
        if key not in known:
            raise unknown("option", key, known)
        if not equals and not rest:
            raise UsageError(f"--{key} needs a value")
        value = value if equals else rest.pop(0)
        try:
            given[key] = known[key](value)
        except ValueError:
            raise UsageError(f"--{key} cannot be {value!r}") from None
    if len(plain) != names:
        raise UsageError(f"expected {names} name{'s' * (names != 1)}, got {plain}")
    return plain, given


REGISTRY_ACTIONS: dict[str, Callable[[list[str]], None]] = {
    "ls": _registry_ls,
    "add": _registry_add,
    "promote": _registry_promote,
}


def _tracker() -> Any:
    from autosparse.integrations.mlflow import Tracker

    return Tracker()


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


def corpus(arguments: list[str]) -> None:
    """Look after a corpus."""
    action, paths = arguments[0], arguments[1:]
    if action not in CORPUS_ACTIONS:
        raise unknown("corpus action", action, CORPUS_ACTIONS)
    function, least, most = CORPUS_ACTIONS[action]
    if not least <= len(paths) <= most:
        raise UsageError(f"autosparse corpus {action} takes {USAGE_OF[action]}")
    function(*paths)


def _corpus_ls(path: str) -> None:
    from autosparse.corpus import Corpus, shown

    rows = Corpus(path).table()
    print_table([shown(row) for row in rows], f"{len(rows)} finished runs in {path}")


def _corpus_verify(path: str) -> None:
    from autosparse.upkeep import verify

    damaged, total = 0, 0
    for _, problems in verify(path):
        total += 1
        damaged += bool(problems)
        for problem in problems:
            print(problem)
    if damaged:
        raise RunFailed(
            f"{damaged} of {total} runs in {path} are damaged: remove their folders (nothing else "
            "is touched) and grow the corpus again, or merge a good copy"
        )
    print(f"{total} runs in {path}: every byte is what was written")


def _corpus_index(path: str) -> None:
    from autosparse.corpus import Corpus

    print(f"index of {len(Corpus(path).folders())} runs: {Corpus(path).write_index()}")


def _corpus_merge(*paths: str) -> None:
    from autosparse.upkeep import merge

    copied, there = merge(paths[:-1], paths[-1])
    print(f"{len(copied)} runs copied to {paths[-1]}, {len(there)} were there already")


def _corpus_export(path: str, file: str) -> None:
    from autosparse.upkeep import export_parquet

    print(f"{file}: {export_parquet(path, file):,} weights")


def _corpus_report(path: str) -> None:
    from autosparse.corpus import Corpus
    from autosparse.corpus_report import write_report

    with Progress() as progress:
        bar = progress.bar("reading gradients at init", len(Corpus(path).folders()), "runs")
        figures = write_report(path, on_run=bar.advance)
    for figure in figures:
        print(figure)


CORPUS_ACTIONS: dict[str, tuple[Callable[..., None], int, int]] = {
    "ls": (_corpus_ls, 1, 1),
    "verify": (_corpus_verify, 1, 1),
    "index": (_corpus_index, 1, 1),
    "report": (_corpus_report, 1, 1),
    "merge": (_corpus_merge, 2, 1000),
    "export-parquet": (_corpus_export, 2, 2),
}
"""Action -> function, least and most paths."""
USAGE_OF = {
    **dict.fromkeys(("ls", "verify", "index", "report"), "one corpus folder"),
    "merge": "one or more corpora and the corpus to copy their runs into",
    "export-parquet": "a corpus and the file to write",
}


def shards(arguments: list[str], config: PackConfig | None = None) -> None:
    """Pack images into shards, or look after a folder of shards."""
    action, paths = arguments[0], arguments[1:]
    if action not in SHARDS_ACTIONS:
        raise unknown("shards action", action, SHARDS_ACTIONS)
    wanted = 2 if action == "pack" else 1
    if len(paths) != wanted:
        what = "what to pack and a folder for the shards" if wanted == 2 else "one folder of shards"
        raise UsageError(f"autosparse shards {action} takes {what}")
    if action == "pack":
        _shards_pack(paths[0], paths[1], config or PackConfig())
    else:
        SHARDS_ACTIONS[action](*paths)


def _shards_pack(source: str, folder: str, config: PackConfig) -> None:
    from autosparse.data.pack import pack

    with Progress() as progress:
        bar = progress.bar("packing", total=0, unit="images")
        found = pack(
            source,
            folder,
            config,
            on_start=bar.of,
            on_shard=lambda shard: bar.advance(shard.count),
        )
    _print_shards(folder, found)


def _print_shards(folder: str, found: list[Shard]) -> None:
    rows = []
    for split in dict.fromkeys(shard.split for shard in found):
        mine = [shard for shard in found if shard.split == split]
        megabytes = sum(shard.bytes for shard in mine) / 1e6
        count = sum(shard.count for shard in mine)
        rows.append({"split": split, "shards": len(mine), "images": count, "MB": megabytes})
    print_table(rows, folder)


def _shards_verify(folder: str) -> None:
    from autosparse.data.check import verify
    from autosparse.data.tars import MANIFEST, read_manifest

    found = read_manifest(Path(folder) / MANIFEST).shards
    bad = 0
    with Progress() as progress:
        bar = progress.bar("verifying", sum(shard.bytes for shard in found) / 1e6, "MB")
        for shard, problem in verify(folder):
            bar.advance(shard.bytes / 1e6)
            if problem:
                bad += 1
                print(problem)
    if bad:
        raise RunFailed(f"{bad} of {len(found)} shards in {folder} are bad")
    print(f"{len(found)} shards in {folder}: every byte is what the manifest says")


def _shards_index(folder: str) -> None:
    from autosparse.data.check import adopt

    with Progress() as progress:
        bar = progress.bar("reading", len(list(Path(folder).glob("*.tar"))), "shards")
        found = adopt(folder, on_shard=bar.advance)
    _print_shards(folder, found)


SHARDS_ACTIONS: dict[str, Callable[..., None]] = {
    "pack": _shards_pack,
    "verify": _shards_verify,
    "index": _shards_index,
}


def inspect(paths: list[str]) -> None:
    """Print what a file or folder is, its card, and a row per layer or run."""
    for path in paths:
        if place(path).is_dir():
            _inspect_folder(place(path))
        else:
            _inspect_file(path)


def _inspect_folder(path: Path) -> None:
    from autosparse.corpus import RUN, Corpus, is_finished, shown

    if is_finished(path):
        _inspect_file(str(path / RUN))
        return
    corpus = Corpus(path)
    rows = corpus.table()
    print(f"corpus {path}, fingerprint {corpus.fingerprint}, {len(rows)} finished runs")
    print_table([shown(row) for row in rows])


def _inspect_file(path: str) -> None:
    from autosparse.ticket import Ticket

    header = read_card(path)
    kind = header.get("kind")
    if kind == "ticket":
        ticket = Ticket.load(path)
        print(f"ticket {path}, fingerprint {ticket.fingerprint}, sparsity {ticket.sparsity:.4%}")
        live = ticket.card.pop("live", {})
        _print_card(ticket.card)
        print_table([
            {**row, "shape": "x".join(map(str, row["shape"])), "live": live.get(row["layer"], "?")}
            for row in ticket.table()
        ])  # fmt: skip
    elif kind == "autos":
        print(f"AutoS {path}, fingerprint {header['fingerprint']}, features {header['features']}")
        history = header["card"].pop("history", [])
        _print_card({"inputs": header["inputs"], "hidden": header["hidden"], **header["card"]})
        if history:
            print_table(history)
    elif kind == "irp":
        print(f"IRP run {path}, run_id {header['run_id']}")
        levels = header.pop("levels")
        _print_card({key: header[key] for key in ("model", "config", "versions")})
        print_table(levels)
    else:
        raise UsageError(f"{path} is no ticket, IRP run or AutoS file")


def _print_card(card: dict[str, Any]) -> None:
    for key, value in card.items():
        print(f"  {key}: {value}")
