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
from autosparse.integrations import registry_pages
from autosparse.integrations.mlflow import RUN_FILE, client, log_corpus
from autosparse.models import zoo
from autosparse.report import drawing
from autosparse.sparsity.ticket import Ticket, load_state
from autosparse.study.table import best_results
from autosparse.study.trainings import RESULT, TRAINED

AUTOS = "autos"
CACHE = Path(os.environ.get("AUTOSPARSE_CACHE", "~/.cache/autosparse")).expanduser() / "tickets"
CHAMPION, CHALLENGER, FORMER = "champion", "challenger", "former-champion"
SPARE = ("data", "sparsity", "criterion")
"""Columns of `listing` that a narrow terminal goes without."""


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
    text = registry_pages.of_autos(network, MlflowClient())
    return _register(AUTOS, network, example, run, tags, text, path)


def held_out_of(card: dict[str, Any]) -> str:
    """Return 16 hex digits of the runs that an AutoS was validated on."""
    return hashlib.sha256(" ".join(sorted(card.get("held_out", []))).encode()).hexdigest()[:16]


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
    if "autos" in card:
        autos_version = autos_version or _version_of(AUTOS, card["autos"])
        tags |= {"corpus": card["corpus"], "autos": card["autos"]}
        tags |= {"autos_version": str(autos_version)} if autos_version else {}
    else:
        autos_version = None
    text = registry_pages.of_ticket(ticket, result, path, run, autos_version, MlflowClient())
    return _register(f"{recipe['name']}-sparse", model, example, run, tags, text, path)


def _version_of(name: str, fingerprint: str) -> int | None:
    """Return the version of a model that has this fingerprint, if there is one."""
    for version in MlflowClient().search_model_versions(f"name = '{name}'"):
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
    version = _version_of(name, tags["fingerprint"])
    if version is not None:
        return version
    server = MlflowClient()
    model = model.eval().cpu()
    with torch.no_grad():
        signature = infer_signature(example.numpy(), model(example).numpy())
    before = server.get_run(run).info.status
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
        server.update_run(run, status="RUNNING")
    with redirect_stderr(io.StringIO()):  # It says there what we print ourselves.
        made = mlflow.register_model(info.model_uri, name, tags=tags)
    server.update_model_version(name, made.version, description=text)
    return int(made.version)


def describe(name: str) -> None:
    """Write a registered model's page: what it is, and where every alias leads, with numbers."""
    server = MlflowClient()
    aliases = server.get_registered_model(name).aliases
    tags = {alias: (number, server.get_model_version(name, str(number)).tags)
            for alias, number in aliases.items()}  # fmt: skip
    text = registry_pages.of_model(name, name == AUTOS, tags)
    server.update_registered_model(name, text)


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
    server, experiment = client()
    network = AutoS.load(path)
    wanted = f"tags.autos = '{network.fingerprint}' and tags.kind = 'fit'"
    runs = server.search_runs([experiment], wanted, max_results=1)
    if runs:
        run = runs[0].info.run_id
    else:
        tags = {"autos": network.fingerprint, "kind": "fit", "corpus": network.card["corpus"]}
        run = server.create_run(experiment, tags=tags, run_name=f"fit {path.stem}").info.run_id
        for epoch in network.card["history"]:
            for key, value in epoch.items():
                if key != "epoch":
                    server.log_metric(run, key, value, step=epoch["epoch"])
        log_corpus(server, run, "corpus", network.card["corpus"])
        with TemporaryDirectory() as folder:  # Nothing is written beside a file of the package.
            for figure in drawing.draw_autos(path, None, Path(folder)):
                server.log_artifact(run, str(figure), "figures")
    version = register_autos(path, run)
    server.set_terminated(run)
    return _row(AUTOS, version, _contend(AUTOS, version))


def _add_study(folder: Path) -> list[dict[str, Any]]:
    if not (folder / RUN_FILE).is_file():
        raise UsageError(f"{folder} was not tracked: run it again with --tracking true")
    server, experiment = client(folder)
    parent = read_json(folder / RUN_FILE)["run_id"]
    rows = []
    for (model, sparsity), result in best_results(drawing.report_of(folder)["results"]).items():
        cell = folder / "cells" / result["cell"]
        wanted = f"tags.cell = '{result['cell']}' and tags.`mlflow.parentRunId` = '{parent}'"
        runs = server.search_runs([experiment], wanted, max_results=1)
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
    registered = MlflowClient().get_model_version(name, str(version))
    aliases = sorted({str(each) for each in registered.aliases} | ({alias} if alias else set()))
    tags = registered.tags
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
    server = MlflowClient()
    rows = []
    for model in server.search_registered_models():
        if model.name == AUTOS or model.name.endswith("-sparse"):
            versions = server.search_model_versions(f"name = '{model.name}'")
            for version in sorted(versions, key=lambda each: int(each.version)):
                rows.append(_row(model.name, int(version.version), ""))
    return rows


def fetch_ticket(uri: str) -> Path:
    """Fetch the ticket behind a registered version, `models:/NAME@ALIAS` or `models:/NAME/N`.

    It goes into the cache folder, once for each version; raises UsageError if there is none.
    """
    server, _ = client()
    name, at, alias = uri.removeprefix("models:/").partition("@")
    try:
        if at:
            version = server.get_model_version_by_alias(name, alias)
        else:
            name, _, number = name.partition("/")
            version = server.get_model_version(name, number)
    except MlflowException as error:
        raise UsageError(f"{uri}: {error.message}") from None
    target = CACHE / f"{name}-{version.version}-{version.tags.get('ticket', 'ticket')}"
    if not list(target.glob("*.safetensors")):
        run = version.run_id or ""
        listed = server.list_artifacts(run, "tickets") if run else []
        paths = [each.path for each in listed if each.path.endswith(".safetensors")]
        if not paths:
            raise UsageError(f"{uri}: version {version.version} has no ticket beside it")
        with tempfile.TemporaryDirectory() as folder:
            local = Path(server.download_artifacts(run, paths[0], folder))
            write_bytes(target / local.name, local.read_bytes())
    return next(target.glob("*.safetensors"))
