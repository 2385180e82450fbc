"""The registry in MLflow: AutoS models and trained checkpoints, with what they came from.

Models are saved as exported programs, so they load while pickle deserialization is forbidden.
Which version is to be used: promotion.py.
"""

from __future__ import annotations

import hashlib
import io
import os
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
from autosparse.integrations.mlflow import RUN_FILE, client, log_corpus, log_steps, nested_run
from autosparse.integrations.promotion import contend, set_alias
from autosparse.integrations.registry_pages import AUTOS
from autosparse.report import drawing
from autosparse.sparsity.ticket import Ticket
from autosparse.study.export import dense_model
from autosparse.study.table import best_of, best_results
from autosparse.study.trainings import RESULT, TRAINED

CACHE = Path(os.environ.get("AUTOSPARSE_CACHE", "~/.cache/autosparse")).expanduser() / "tickets"
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


def register_ticket(path: Path, result: dict[str, Any], run: str) -> int:
    """Register a trained ticket as a version of `<model>-sparse`; return the version.

    The version holds the dense model (zero where pruned) and, beside it, the ticket file.
    """
    ticket, server = Ticket.load(path), MlflowClient()
    recipe, card = ticket.card["model"], ticket.card
    model = dense_model(ticket)
    example = torch.randn(2, recipe["in_chans"], recipe["image_size"], recipe["image_size"])
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
    autos_version = None
    if "autos" in card:
        autos_version = _version_of(AUTOS, card["autos"])
        tags |= {"corpus": card["corpus"], "autos": card["autos"]}
        tags |= {"autos_version": str(autos_version)} if autos_version else {}
    trained_in = server.get_run(run)
    text = registry_pages.of_ticket(ticket, result, path, trained_in, autos_version, server)
    return _register(f"{recipe['name']}-sparse", model, example, run, tags, text, path)


def _version_of(name: str, fingerprint: str) -> int | None:
    """Return the version of a model that has this fingerprint, if there is one."""
    wanted = f"name = '{name}' and tags.fingerprint = '{fingerprint}'"
    versions = MlflowClient().search_model_versions(wanted, max_results=1)
    return int(versions[0].version) if versions else None


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
        log_steps(server, run, network.card["history"], "epoch")
        log_corpus(server, run, "corpus", network.card["corpus"])
        with TemporaryDirectory() as folder:  # Nothing is written beside a file of the package.
            for figure in drawing.draw_autos(path, Path(folder)):
                server.log_artifact(run, str(figure), "figures")
    version = register_autos(path, run)
    server.set_terminated(run)
    contend(AUTOS, version)
    return _row(AUTOS, version)


def _add_study(folder: Path) -> list[dict[str, Any]]:
    if not (folder / RUN_FILE).is_file():
        raise UsageError(f"{folder} was not tracked: run it again with --tracking true")
    server, experiment = client(folder)
    parent = read_json(folder / RUN_FILE)["run_id"]
    added, leading = [], {}
    results = best_results(drawing.report_of(folder)["results"])
    # Of one name there may be several models.
    best = best_of(results, lambda each: (each["model"], each["sparsity"]))
    for result in results:
        cell = folder / "cells" / result["cell"]
        run = nested_run(server, experiment, parent, result["cell"])
        if run is None:
            raise UsageError(f"MLflow does not know the cell {result['cell']}: run the study again")
        version = register_ticket(cell / TRAINED, read_json(cell / RESULT), run)
        name = f"{result['model']}-sparse"
        if any(result is each for each in best):
            set_alias(name, f"sparsity-{100 * result['sparsity']:g}".replace(".", "_"), version)
            leading[name] = version
        added.append((name, version))
    if not added:
        raise UsageError(f"{folder} has no finished ticket to register")
    for name, version in leading.items():  # The last of each model is its sparsest.
        contend(name, version)
    return [_row(name, version) for name, version in added]


def _row(name: str, version: int) -> dict[str, Any]:
    """Return what is printed of a version."""
    registered = MlflowClient().get_model_version(name, str(version))
    tags = registered.tags
    return {
        "model": name,
        "version": version,
        "aliases": ", ".join(sorted(map(str, registered.aliases))),
        "sparsity": tags.get("sparsity", ""),
        "criterion": tags.get("criterion", ""),
        "test accuracy": tags.get("test_accuracy", ""),
        "validation MSE": tags.get("validation_mse", ""),
        "data": tags.get("data", ""),
    }


def listing() -> list[dict[str, Any]]:
    """Return a row per version of our registered models, newest last."""
    client()
    versions = MlflowClient().search_model_versions(order_by=["name ASC", "version_number ASC"])
    return [
        _row(each.name, int(each.version))
        for each in versions
        if each.name == AUTOS or each.name.endswith("-sparse")
    ]


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
    tags = version.tags
    content = tags.get("fingerprint") or tags.get("ticket", "ticket")
    target = CACHE / f"{name}-{version.version}-{content}"
    if not list(target.glob("*.safetensors")):
        run = version.run_id or ""
        listed = server.list_artifacts(run, "tickets") if run else []
        paths = [each.path for each in listed if each.path.endswith(".safetensors")]
        if not paths:
            raise UsageError(f"{uri}: version {version.version} has no ticket beside it")
        with TemporaryDirectory() as folder:
            local = Path(server.download_artifacts(run, paths[0], folder))
            write_bytes(target / local.name, local.read_bytes())
    return next(target.glob("*.safetensors"))
