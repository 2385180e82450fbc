"""What MLflow's pages say of registered models: Markdown, with links to what they came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from autosparse.autos import features
from autosparse.autos.network import AutoS
from autosparse.sparsity.ticket import Ticket

AUTOS = "autos"
"""The registered model that holds AutoS; all others hold checkpoints."""
FIRST = ("champion", "challenger", "former-champion")
"""Aliases in the order of a page; all others follow by name."""


def of_autos(network: AutoS, server: MlflowClient) -> str:
    """Return the page of a version of AutoS."""
    best, card = network.card["best"], network.card
    says = "predicted survival"
    if network.head == "survival":
        densities = ", ".join(f"{100 * each:g}" for each in network.densities)
        says = f"log-odds inside the layers of being alive at {densities} % density"
    facts = {
        "inputs": ", ".join(features.names_of(network.kind)),
        "fitted on": f"{len(card['trained_on'])} IRP runs, corpus `{card['corpus']}`",
        "validation MSE": f"{best['validation_mse']:.4f} (a constant: {card['baseline_mse']:.4f})",
        "rank correlation": f"{best['validation_rank_correlation']:.3f}",
    }
    return (
        f"**AutoS** ({network.kind} features): features at initialization → {says}.\n\n"
        f"{_facts(facts)}\n{_irp_links(server, card)}"
    )


def of_ticket(
    ticket: Ticket, result: Mapping[str, Any], path: Path, run: Run, autos_version: int | None,
    server: MlflowClient,
) -> str:  # fmt: skip
    """Return the page of a version of a pruned and trained model.

    Args:
        ticket: the trained ticket, from `path`.
        result: of its training.
        path: a file of that name lies beside the model.
        run: the training's run.
        autos_version: the version of AutoS that chose the ticket, if one did.
        server: what is asked for the study's run.
    """
    recipe, card = ticket.card["model"], ticket.card
    facts = {
        "test accuracy": f"{result['test_accuracy']:.2%}",
        "validation accuracy": f"{result['validation_accuracy']:.2%}",
        "parameters": f"{result['parameters']:,}",
        "checkpoint": f"{result['checkpoint_bytes']:,} bytes",
        "seed": result["seed"],
    }
    return (
        f"**{recipe['name']}** at {result['sparsity']:.0%} sparsity by {result['criterion']}, "
        f"trained on {card['data']['name']}.\n\n{_facts(facts)}\n"
        f"{_lineage(server, run, ticket, autos_version)}\n\n"
        "Takes normalised images [batch, channels, height, width]; returns logits. "
        f"The compact form is the artifact `{path.name}` of the source run.\n"
    )


def of_model(name: str, aliases: Mapping[str, tuple[Any, dict[str, str]]]) -> str:
    """Return the page of a model: what it is, and where every alias leads, with its numbers.

    Args:
        name: of the registered model.
        aliases: alias -> version and the version's tags.
    """
    if name == AUTOS:
        about = ("Predicts from what is known at initialization how long a weight survives "
                 "iterative rewind pruning. `@champion` is the one to prune with.")  # fmt: skip
        keys = ("validation_mse", "validation_rank_correlation", "corpus")
    else:
        about = (
            "Checkpoints of tickets: pruned at initialization, then trained. `@champion` is the "
            "one to use; `@sparsity-95` the best of the last sweep at 95 % sparsity, by "
            "validation accuracy, and so on."
        )
        keys = ("sparsity", "criterion", "test_accuracy", "data")
    head = ["alias", "version", *(key.replace("_", " ") for key in keys)]
    lines = [_row(head), "|" + "---|" * len(head)]
    order = {alias: place for place, alias in enumerate(FIRST)}
    for alias in sorted(aliases, key=lambda each: (order.get(each, len(order)), each)):
        version, tags = aliases[alias]
        shown = [_shown(key, tags.get(key, "")) for key in keys]
        lines.append(_row([f"`@{alias}`", _version(name, version, "version"), *shown]))
    return about + "\n\n" + "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _facts(facts: Mapping[str, Any]) -> str:
    """Return a table of two columns."""
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in facts.items())


def _shown(key: str, text: str) -> str:
    """Return accuracies and sparsities in per cent."""
    if key in ("test_accuracy", "sparsity") and text:
        return f"{100 * float(text):.4g} %"
    return text


def _link(run: Run, text: str = "", artifact: str = "") -> str:
    """Return a link to a run (by its name, unless `text` is given), or to one of its artifacts."""
    where = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    where += f"/artifacts/{artifact}" if artifact else ""
    return f"[{text or run.info.run_name}]({where})"


def _version(name: str, version: Any, text: str) -> str:
    return f"[{text} {version}](#/models/{name}/versions/{version})"


def _irp_links(server: MlflowClient, card: Mapping[str, Any]) -> str:
    """Return links to the IRP runs that an AutoS was fitted on, as far as MLflow knows them."""
    links, parents = [], set()
    experiments = [each.experiment_id for each in server.search_experiments()]
    held_out = card.get("held_out", [])
    for run_id in [*card["trained_on"], *held_out]:
        for run in server.search_runs(experiments, f"tags.run_id = '{run_id}'", max_results=1):
            links.append(_link(run) + (" (held out)" if run_id in held_out else ""))
            parents.add(run.data.tags.get("mlflow.parentRunId", ""))
    corpora = [_link(server.get_run(each), "its runs") for each in sorted(parents - {""})]
    lines = [f"Corpus: {each}\n\n" for each in corpora]
    return "".join(lines) + (f"IRP runs: {', '.join(links)}\n" if links else "")


def _lineage(server: MlflowClient, run: Run, ticket: Ticket, autos_version: int | None) -> str:
    """Return a line of links: trained in, ticket, AutoS, corpus; and the figure if there is one."""
    links, parent = [f"trained in {_link(run)}"], run.data.tags.get("mlflow.parentRunId")
    owner = server.get_run(parent) if parent else run
    if parent:
        links.append(f"part of {_link(owner)}")
    links.append(f"ticket `{ticket.fingerprint}`")
    if autos_version:
        links.append(_version(AUTOS, autos_version, f"{AUTOS} version"))
        links.append(f"corpus `{ticket.card['corpus']}`")
    text = "Lineage: " + " ← ".join(links)
    figures = [each.path for each in server.list_artifacts(owner.info.run_id, "figures")]
    if figures:
        chosen = next((each for each in figures if "accuracy" in each), figures[0])
        text += f"\n\nFigure: {_link(owner, Path(chosen).name, chosen)}"
    return text
