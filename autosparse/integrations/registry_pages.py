"""What MLflow's pages say of registered models: Markdown, with links to what they came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from autosparse.autos import features
from autosparse.autos.network import AutoS
from autosparse.sparsity.ticket import Ticket

FIRST = ("champion", "challenger", "former-champion")
"""Aliases in the order of a page; all others follow by name."""


def run_link(client: MlflowClient, run: str, text: str, artifact: str = "") -> str:
    """Return a Markdown link to a run, or to one of its artifacts."""
    experiment = client.get_run(run).info.experiment_id
    where = f"#/experiments/{experiment}/runs/{run}"
    return f"[{text}]({where}{f'/artifacts/{artifact}' if artifact else ''})"


def version_link(name: str, version: int | str) -> str:
    """Return a Markdown link to a version of a registered model."""
    return f"[{name} version {version}](#/models/{name}/versions/{version})"


def of_autos(network: AutoS, client: MlflowClient) -> str:
    """Return the page of a version of AutoS."""
    best, card = network.card["best"], network.card
    says = "predicted survival"
    if network.head == "survival":
        densities = ", ".join(f"{100 * each:g}" for each in network.densities)
        says = f"log-odds inside the layers of being alive at {densities} % density"
    return (
        f"**AutoS** ({network.kind} features): features at initialization → {says}.\n\n"
        f"| | |\n|---|---|\n| inputs | {', '.join(features.names_of(network.kind))} |\n"
        f"| fitted on | {len(card['trained_on'])} IRP runs, corpus "
        f"`{card['corpus']}` |\n| validation MSE | {best['validation_mse']:.4f} (a "
        f"constant: {card['baseline_mse']:.4f}) |\n"
        f"| rank correlation | {best['validation_rank_correlation']:.3f} |\n\n"
        f"{_irp_links(client, card)}"
    )


def _irp_links(client: MlflowClient, card: dict[str, Any]) -> str:
    """Return links to the IRP runs that an AutoS was fitted on, as far as MLflow knows them."""
    links, parents = [], set()
    experiments = [each.experiment_id for each in client.search_experiments()]
    for run_id in [*card["trained_on"], *card.get("held_out", [])]:
        for run in client.search_runs(experiments, f"tags.run_id = '{run_id}'", max_results=1):
            held = " (held out)" if run_id in card.get("held_out", []) else ""
            links.append(run_link(client, run.info.run_id, f"{run.info.run_name}") + held)
            parents.add(run.data.tags.get("mlflow.parentRunId", ""))
    lines = [f"Corpus: {run_link(client, run, 'its runs')}\n\n" for run in sorted(parents) if run]
    return "".join(lines) + (f"IRP runs: {', '.join(links)}\n" if links else "")


def of_ticket(
    ticket: Ticket,
    result: dict[str, Any],
    path: Path,
    run: str,
    autos_version: int | None,
    client: MlflowClient,
) -> str:
    """Return the page of a version of a pruned and trained model."""
    recipe, card = ticket.card["model"], ticket.card
    return (
        f"**{recipe['name']}** at {result['sparsity']:.0%} sparsity by {result['criterion']}, "
        f"trained on {card['data']['name']}.\n\n| | |\n|---|---|\n"
        f"| test accuracy | {result['test_accuracy']:.2%} |\n"
        f"| validation accuracy | {result['validation_accuracy']:.2%} |\n"
        f"| parameters | {result['parameters']:,} |\n"
        f"| checkpoint | {result['checkpoint_bytes']:,} bytes |\n| seed | {result['seed']} |\n\n"
        f"{_lineage(client, run, ticket, autos_version)}\n\n"
        "Takes normalised images [batch, channels, height, width]; returns logits. "
        f"The compact form is the artifact `{path.name}` of the source run.\n"
    )


def _lineage(client: MlflowClient, run: str, ticket: Ticket, autos_version: int | None) -> str:
    """Return a line of links: trained in, ticket, AutoS, corpus; and the figure if there is one."""
    links = [f"trained in {run_link(client, run, client.get_run(run).info.run_name or 'its run')}"]
    parent = client.get_run(run).data.tags.get("mlflow.parentRunId")
    if parent:
        links.append(
            f"part of {run_link(client, parent, client.get_run(parent).info.run_name or parent)}"
        )
    links.append(f"ticket `{ticket.fingerprint}`")
    if autos_version:
        links.append(version_link("autos", autos_version))
        links.append(f"corpus `{ticket.card['corpus']}`")
    text = "Lineage: " + " ← ".join(links)
    owner = parent or run
    figures = [each.path for each in client.list_artifacts(owner, "figures")]
    if figures:
        chosen = next((each for each in figures if "accuracy" in each), figures[0])
        text += f"\n\nFigure: {run_link(client, owner, Path(chosen).name, chosen)}"
    return text


def of_model(name: str, is_autos: bool, aliases: Mapping[str, tuple[Any, dict[str, str]]]) -> str:
    """Return the page of a model: what it is, and where every alias leads, with its numbers.

    Args:
        name: of the registered model.
        is_autos: whether it is AutoS, not a checkpoint.
        aliases: alias -> version and the version's tags.
    """
    keys = _SHOWN[is_autos]
    head = ["alias", "version", *(key.replace("_", " ") for key in keys)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for alias, (number, tags) in sorted(aliases.items(), key=lambda each: _order(each[0])):
        cells = [f"`@{alias}`", f"[version {number}](#/models/{name}/versions/{number})"]
        cells += [_shown(key, tags.get(key, "")) for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return _ABOUT[is_autos] + "\n\n" + "\n".join(lines) + "\n"


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
    return (FIRST.index(alias) if alias in FIRST else len(FIRST), alias)
