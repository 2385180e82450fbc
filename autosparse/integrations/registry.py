"""The registry in MLflow: AutoS models and trained checkpoints, with what they came from.

Models are saved as exported programs, so they load while pickle deserialization is forbidden.
`champion` is the version to use, `challenger` the one that wants to be: `promote` holds them
against each other on recorded metrics before it moves the alias.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import mlflow.pytorch
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from torch import nn

from autosparse.autos import features
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.core.files import read_json, write_bytes
from autosparse.integrations.mlflow import RUN_FILE, client, log_corpus
from autosparse.models import zoo
from autosparse.report import drawing
from autosparse.sparsity.ticket import Ticket, load_state
from autosparse.study.table import best_results
from autosparse.study.trainings import RESULT, TRAINED

AUTOS = "autos"
CACHE = Path(os.environ.get("AUTOSPARSE_CACHE", "~/.cache/autosparse")).expanduser() / "tickets"
CHAMPION, CHALLENGER, FORMER = "champion", "challenger", "former-champion"


# Links that work in MLflow's pages


def run_link(found: MlflowClient, run: str, text: str, artifact: str = "") -> str:
    """Return a Markdown link to a run, or to one of its artifacts."""
    experiment = found.get_run(run).info.experiment_id
    where = f"#/experiments/{experiment}/runs/{run}"
    return f"[{text}]({where}{f'/artifacts/{artifact}' if artifact else ''})"


def version_link(name: str, version: int | str) -> str:
    """Return a Markdown link to a version of a registered model."""
    return f"[{name} version {version}](#/models/{name}/versions/{version})"


# Registering


def register_autos(path: Path, run: str) -> int:
    """Register an AutoS file as a version of `autos`; return the version.

    A version of the same fingerprint is found and not made again.
    """
    network = AutoS.load(path)
    example = torch.randn(4, len(features.names_of(network.kind)))
    best = network.card["best"]
    numbers = {name: f"{value:.6g}" for name, value in best.items() if name != "epoch"}
    tags = {"fingerprint": network.fingerprint, "corpus": network.card["corpus"],
            "held_out": held_out_of(network.card),
            "features": network.kind, "head": network.head, **numbers}  # fmt: skip
    says = "predicted survival"
    if network.head == "survival":
        densities = ", ".join(f"{100 * each:g}" for each in network.densities)
        says = f"log-odds inside the layers of being alive at {densities} % density"
    found = MlflowClient()
    text = (
        f"**AutoS** ({network.kind} features): features at initialization → {says}.\n\n"
        f"| | |\n|---|---|\n| inputs | {', '.join(features.names_of(network.kind))} |\n"
        f"| fitted on | {len(network.card['trained_on'])} IRP runs, corpus "
        f"`{network.card['corpus']}` |\n| validation MSE | {best['validation_mse']:.4f} (a "
        f"constant: {network.card['baseline_mse']:.4f}) |\n"
        f"| rank correlation | {best['validation_rank_correlation']:.3f} |\n\n"
        f"{_irp_links(found, network.card)}"
    )
    return _register(AUTOS, network, example, run, tags, text, path)


def held_out_of(card: dict[str, Any]) -> str:
    """Return 16 hex digits of the runs that an AutoS was validated on."""
    return hashlib.sha256(" ".join(sorted(card.get("held_out", []))).encode()).hexdigest()[:16]


def _irp_links(found: MlflowClient, card: dict[str, Any]) -> str:
    """Return links to the IRP runs that an AutoS was fitted on, as far as MLflow knows them."""
    links, parents = [], set()
    experiments = [each.experiment_id for each in found.search_experiments()]
    for run_id in [*card["trained_on"], *card.get("held_out", [])]:
        for run in found.search_runs(experiments, f"tags.run_id = '{run_id}'", max_results=1):
            held = " (held out)" if run_id in card.get("held_out", []) else ""
            links.append(run_link(found, run.info.run_id, f"{run.info.run_name}") + held)
            parents.add(run.data.tags.get("mlflow.parentRunId", ""))
    lines = [f"Corpus: {run_link(found, run, 'its runs')}\n\n" for run in sorted(parents) if run]
    return "".join(lines) + (f"IRP runs: {', '.join(links)}\n" if links else "")


def register_ticket(
    path: Path, result: dict[str, Any], run: str, autos_version: int | None = None
) -> int:
    """Register a trained ticket as a version of `<model>-sparse`; return the version.

    The version holds the dense model (zero where pruned) and, beside it, the ticket file.
    """
    ticket = Ticket.load(path)
    model = zoo.from_recipe(ticket.card["model"])
    load_state(model, ticket)
    recipe, card = ticket.card["model"], ticket.card
    size = recipe["image_size"]
    example = torch.randn(2, recipe["in_chans"], size, size)
    tags = {
        "sparsity": f"{result['sparsity']:g}",
        "criterion": result["criterion"],
        "test_accuracy": f"{result['test_accuracy']:.6g}",
        "validation_accuracy": f"{result['validation_accuracy']:.6g}",
        "data": card["data"]["name"],
        "data_fingerprint": result.get("data_fingerprint", card.get("data_fingerprint", "")),
        "test_fingerprint": result.get("test_fingerprint", ""),
        "ticket": ticket.fingerprint,
        "fingerprint": ticket.content_hash,
    }
    if "autos" not in card:
        autos_version = None
    else:
        autos_version = autos_version or _autos_version(card["autos"])
        tags |= {"corpus": card["corpus"], "autos": card["autos"]}
        tags |= {"autos_version": str(autos_version)} if autos_version else {}
    text = (
        f"**{recipe['name']}** at {result['sparsity']:.0%} sparsity by {result['criterion']}, "
        f"trained on {card['data']['name']}.\n\n| | |\n|---|---|\n"
        f"| test accuracy | {result['test_accuracy']:.2%} |\n"
        f"| validation accuracy | {result['validation_accuracy']:.2%} |\n"
        f"| parameters | {result['parameters']:,} |\n"
        f"| checkpoint | {result['checkpoint_bytes']:,} bytes |\n| seed | {result['seed']} |\n\n"
        f"{_lineage(MlflowClient(), run, ticket, path, autos_version)}\n\n"
        "Takes normalised images [batch, channels, height, width]; returns logits. "
        f"The compact form is the artifact `{path.name}` of the source run.\n"
    )
    return _register(f"{recipe['name']}-sparse", model, example, run, tags, text, path)


def _lineage(
    found: MlflowClient, run: str, ticket: Ticket, path: Path, autos_version: int | None
) -> str:
    """Return a line of links: trained in, ticket, AutoS, corpus; and the figure if there is one."""
    links = [f"trained in {run_link(found, run, found.get_run(run).info.run_name or 'its run')}"]
    parent = found.get_run(run).data.tags.get("mlflow.parentRunId")
    if parent:
        links.append(
            f"part of {run_link(found, parent, found.get_run(parent).info.run_name or parent)}"
        )
    links.append(f"ticket `{ticket.fingerprint}`")
    if autos_version:
        links.append(version_link(AUTOS, autos_version))
        links.append(f"corpus `{ticket.card['corpus']}`")
    text = "Lineage: " + " ← ".join(links)
    owner = parent or run
    figures = [each.path for each in found.list_artifacts(owner, "figures")]
    if figures:
        chosen = next((each for each in figures if "accuracy" in each), figures[0])
        text += f"\n\nFigure: {run_link(found, owner, Path(chosen).name, chosen)}"
    return text


def _autos_version(fingerprint: str) -> int | None:
    for version in MlflowClient().search_model_versions(f"name = '{AUTOS}'"):
        if version.tags.get("fingerprint") == fingerprint:
            return int(version.version)
    return None


def _register(
    name: str,
    model: nn.Module,
    example: torch.Tensor,
    run: str,
    tags: dict[str, str],
    text: str,
    path: Path,
) -> int:
    found = MlflowClient()
    for version in found.search_model_versions(f"name = '{name}'"):
        if version.tags.get("fingerprint") == tags["fingerprint"]:
            return int(version.version)
    model = model.eval().cpu()
    with torch.no_grad():
        signature = infer_signature(example.numpy(), model(example).numpy())
    before = found.get_run(run).info.status
    with mlflow.start_run(run_id=run):
        info = mlflow.pytorch.log_model(
            model,
            name=name,
            input_example=example.numpy(),
            signature=signature,
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
        )
        mlflow.log_artifact(str(path), artifact_path="tickets" if name != AUTOS else AUTOS)
    if before == "RUNNING":
        found.update_run(run, status="RUNNING")
    with redirect_stderr(io.StringIO()):  # It says there what we print ourselves.
        made = mlflow.register_model(info.model_uri, name, tags=tags)
    found.update_model_version(name, made.version, description=text)
    return int(made.version)


def describe(name: str) -> None:
    """Write a registered model's page: what it is, and where every alias leads, with numbers."""
    found = MlflowClient()
    aliases = found.get_registered_model(name).aliases
    rows = []
    for alias, number in sorted(aliases.items(), key=lambda each: _order(each[0])):
        tags = found.get_model_version(name, str(number)).tags
        cells = [f"`@{alias}`", f"[version {number}](#/models/{name}/versions/{number})"]
        cells += [_shown(key, tags.get(key, "")) for key in _SHOWN[name == AUTOS]]
        rows.append("| " + " | ".join(cells) + " |")
    head = ["alias", "version", *(key.replace("_", " ") for key in _SHOWN[name == AUTOS])]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]
    text = _ABOUT[name == AUTOS] + "\n\n" + "\n".join(lines) + "\n"
    found.update_registered_model(name, text)


_SHOWN = {
    True: ("validation_mse", "validation_rank_correlation", "corpus"),
    False: ("sparsity", "criterion", "test_accuracy", "data"),
}
_ABOUT = {
    True: "Predicts from what is known at initialization how long a weight survives iterative "
    "rewind pruning. `@champion` is the one to prune with.",
    False: "Checkpoints of tickets: pruned at initialization, then trained. `@champion` is the "
    "one to use; `@sparsity-95` the best of the last sweep at 95 % sparsity, by validation "
    "accuracy, and so on.",
}
"""For AutoS, and for checkpoints."""


def _shown(key: str, text: str) -> str:
    """Return accuracies and sparsities in per cent."""
    if key in ("test_accuracy", "sparsity") and text:
        return f"{100 * float(text):.4g} %"
    return text


def _order(alias: str) -> tuple[int, str]:
    first = (CHAMPION, CHALLENGER, FORMER)
    return (first.index(alias) if alias in first else len(first), alias)


def set_alias(name: str, alias: str, version: int) -> None:
    """Point an alias of a registered model at a version; the model's page says so."""
    MlflowClient().set_registered_model_alias(name, alias, str(version))
    describe(name)


def alias_of(name: str, alias: str) -> int | None:
    """Return the version that an alias points at, or None."""
    try:
        return int(MlflowClient().get_model_version_by_alias(name, alias).version)
    except MlflowException:
        return None


# The verbs


def add(path: Path) -> list[dict[str, Any]]:
    """Register an AutoS file, or the best cells of a study; return a row per version.

    The best of a model and sparsity is that of the highest validation accuracy, and gets the
    alias `sparsity-NN`. A first version becomes champion; later ones challenger.
    """
    kind = drawing.kind_of(path)
    if kind == drawing.AUTOS:
        return [_add_autos(path)]
    if kind == drawing.STUDY:
        return _add_study(path)
    raise UsageError(f"{path}: only an AutoS file, a sweep or a comparison can be added")


def _add_autos(path: Path) -> dict[str, Any]:
    found, experiment = client()
    network = AutoS.load(path)
    wanted = f"tags.autos = '{network.fingerprint}' and tags.kind = 'fit'"
    runs = found.search_runs([experiment], wanted, max_results=1)
    if runs:
        run = runs[0].info.run_id
    else:
        tags = {"autos": network.fingerprint, "kind": "fit", "corpus": network.card["corpus"]}
        run = found.create_run(experiment, tags=tags, run_name=f"fit {path.stem}").info.run_id
        for epoch in network.card["history"]:
            for key, value in epoch.items():
                if key != "epoch":
                    found.log_metric(run, key, value, step=epoch["epoch"])
        log_corpus(found, run, "corpus", network.card["corpus"])
        with TemporaryDirectory() as folder:  # Nothing is written beside a file of the package.
            for figure in drawing.draw_autos(path, None, Path(folder)):
                found.log_artifact(run, str(figure), "figures")
    version = register_autos(path, run)
    found.set_terminated(run)
    return _row(AUTOS, version, _contend(AUTOS, version))


def _add_study(folder: Path) -> list[dict[str, Any]]:
    if not (folder / RUN_FILE).is_file():
        raise UsageError(f"{folder} was not tracked: run it again with --tracking true")
    found, experiment = client(folder)
    parent = read_json(folder / RUN_FILE)["run_id"]
    rows = []
    for (model, sparsity), result in best_results(drawing.report_of(folder)["results"]).items():
        cell = folder / "cells" / result["cell"]
        wanted = f"tags.cell = '{result['cell']}' and tags.`mlflow.parentRunId` = '{parent}'"
        runs = found.search_runs([experiment], wanted, max_results=1)
        if not runs:
            raise UsageError(f"MLflow does not know the cell {result['cell']}: run the study again")
        full = read_json(cell / RESULT)
        version = register_ticket(cell / TRAINED, full, runs[0].info.run_id)
        name = f"{model}-sparse"
        set_alias(name, f"sparsity-{100 * sparsity:g}".replace(".", "_"), version)
        rows.append((name, sparsity, version))
    highest = {name: max(s for n, s, _ in rows if n == name) for name, _, _ in rows}
    if not rows:
        raise UsageError(f"{folder} has no finished ticket to register")
    return [
        _row(name, version, _contend(name, version) if sparsity == highest[name] else "")
        for name, sparsity, version in rows
    ]


def _contend(name: str, version: int) -> str:
    """Make a version champion if there is none, else challenger; return which."""
    champion = alias_of(name, CHAMPION)
    if champion == version:
        return CHAMPION
    alias = CHALLENGER if champion else CHAMPION
    set_alias(name, alias, version)
    return alias


def _row(name: str, version: int, alias: str) -> dict[str, Any]:
    """Return what is printed of a version."""
    found = MlflowClient().get_model_version(name, str(version))
    aliases = sorted({str(each) for each in found.aliases} | ({alias} if alias else set()))
    tags = found.tags
    return {
        "model": name,
        "version": version,
        "aliases": ", ".join(aliases),
        "sparsity": tags.get("sparsity", ""),
        "criterion": tags.get("criterion", ""),
        "test accuracy": tags.get("test_accuracy", ""),
        "validation MSE": tags.get("validation_mse", ""),
        "data": tags.get("data", ""),
    }


def listing() -> list[dict[str, Any]]:
    """Return a row per version of our registered models, newest last."""
    client()
    found = MlflowClient()
    rows = []
    for model in found.search_registered_models():
        if model.name == AUTOS or model.name.endswith("-sparse"):
            versions = found.search_model_versions(f"name = '{model.name}'")
            for version in sorted(versions, key=lambda each: int(each.version)):
                rows.append(_row(model.name, int(version.version), ""))
    return rows


def fetch_ticket(uri: str) -> Path:
    """Fetch the ticket behind a registered version, `models:/NAME@ALIAS` or `models:/NAME/N`.

    It goes into the cache folder, once for each version; raises UsageError if there is none.
    """
    found, _ = client()
    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            version = found.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.partition("/")
            version = found.get_model_version(name, number)
    except MlflowException as error:
        raise UsageError(f"{uri}: {error.message}") from None
    target = CACHE / f"{name}-{version.version}-{version.tags.get('ticket', 'ticket')}"
    if not list(target.glob("*.safetensors")):
        run = version.run_id or ""
        listed = found.list_artifacts(run, "tickets") if run else []
        paths = [each.path for each in listed if each.path.endswith(".safetensors")]
        if not paths:
            raise UsageError(f"{uri}: version {version.version} has no ticket beside it")
        with tempfile.TemporaryDirectory() as folder:
            local = Path(found.download_artifacts(run, paths[0], folder))
            write_bytes(target / local.name, local.read_bytes())
    return next(target.glob("*.safetensors"))
