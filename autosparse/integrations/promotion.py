"""Aliases of a registered model: the champion is the better of two versions that can be compared.

`champion` is the version to use, `challenger` the one that wants to be: `promote` holds them
against each other on recorded metrics before it moves the alias.
"""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from autosparse.core.errors import RunFailed, UsageError, unknown
from autosparse.integrations import registry_pages
from autosparse.integrations.mlflow import client
from autosparse.integrations.registry_pages import AUTOS

CHAMPION, CHALLENGER, FORMER = "champion", "challenger", "former-champion"
LOWER, HIGHER = "lower", "higher"
BETTER = {
    **dict.fromkeys(("test_accuracy", "validation_accuracy", "validation_rank_correlation",
                     "images_per_second"), HIGHER),
    **dict.fromkeys(("test_loss", "validation_loss", "train_loss", "validation_mse", "train_mse",
                     "parameters", "kept", "checkpoint_bytes", "seconds", "data_wait_share",
                     "skipped_steps", "image_passes"), LOWER),
}  # fmt: skip
"""Recorded metric -> which of two values is the better one."""


def set_alias(name: str, alias: str, version: int) -> None:
    """Point an alias of a registered model at a version; the model's page says so."""
    MlflowClient().set_registered_model_alias(name, alias, str(version))
    _describe(name)


def alias_of(name: str, alias: str) -> int | None:
    """Return the version that an alias points at, or None."""
    number = MlflowClient().get_registered_model(name).aliases.get(alias)
    return None if number is None else int(number)


def contend(name: str, version: int) -> None:
    """Make a version champion if there is none, else challenger."""
    champion = alias_of(name, CHAMPION)
    if champion != version:
        set_alias(name, CHALLENGER if champion else CHAMPION, version)


def _describe(name: str) -> None:
    """Write a registered model's page: what it is, and where every alias leads, with numbers."""
    server = MlflowClient()
    aliases = server.get_registered_model(name).aliases
    tags = {alias: (number, server.get_model_version(name, str(number)).tags)
            for alias, number in aliases.items()}  # fmt: skip
    server.update_registered_model(name, registry_pages.of_model(name, tags))


def promote(
    name: str,
    version: int,
    metric: str | None = None,
    force: bool = False,
    better: str | None = None,
) -> str:
    """Make a version champion if it is better than the present one; return what was done.

    Both must have been measured on the same images at the same sparsity (AutoS: on the same
    held-out runs of the same corpus). `better` says whether lower or higher is better, for a metric
    of which that is not known. Raises UsageError where they cannot be compared, RunFailed where the
    version is not better; with `force` neither is asked.
    """
    if better not in (None, LOWER, HIGHER):
        raise unknown("--better", str(better), (LOWER, HIGHER))
    client()
    metric = metric or ("validation_mse" if name == AUTOS else "test_accuracy")
    challenger = _version(name, version)
    number = alias_of(name, CHAMPION)
    if number == version:
        return f"{name} version {version} is champion already"
    if number is None:
        said = "there was no champion"
    else:
        champion = _version(name, number)
        said = (
            f"forced, over version {number}"
            if force
            else _compared(challenger, champion, metric, better)
        )
        set_alias(name, FORMER, number)
    set_alias(name, CHAMPION, version)
    if alias_of(name, CHALLENGER) == version:
        MlflowClient().delete_registered_model_alias(name, CHALLENGER)
        _describe(name)
    return f"{name} version {version} is champion: {said}"


def _compared(challenger: Any, champion: Any, metric: str, better: str | None) -> str:
    """Return in words that the challenger is better; raise UserError if it is not."""
    name, new, old = challenger.name, challenger.version, champion.version
    for tag, what in _same(name, metric).items():
        mine, theirs = (each.tags.get(tag, "") for each in (challenger, champion))
        if mine != theirs or not mine:
            raise UsageError(
                f"{name} versions {new} and {old} cannot be compared: their {what} "
                f"{'differs' if mine != theirs else 'is not known'} ({mine or 'not known'}, "
                f"{theirs or 'not known'}); --force true promotes all the same"
            )
    mine, theirs = (_recorded(each, metric) for each in (challenger, champion))
    wanted = better or BETTER.get(metric)
    if wanted is None:
        raise UsageError(f"is lower or higher {metric} better? Say --better lower or higher")
    if not (mine < theirs if wanted == LOWER else mine > theirs):
        raise RunFailed(
            f"{name} version {new} is not better than the champion, version {old}: {metric} "
            f"{mine:g} against {theirs:g} ({wanted} is better); --force true promotes all the same"
        )
    return f"{metric} {mine:g} against {theirs:g} of version {old}"


def _same(name: str, metric: str) -> dict[str, str]:
    """Return the tags that two versions must share -> what they say, for messages."""
    if name == AUTOS:
        return {"corpus": "corpus", "held_out": "choice of held-out runs"}
    if metric.startswith("test_"):
        return {"sparsity": "sparsity", "test_fingerprint": "test data"}
    return {"sparsity": "sparsity", "data_fingerprint": "data"}


def _recorded(version: Any, metric: str) -> float:
    """Return a number from a version's tags, or from the metrics of the run that trained it."""
    metrics = MlflowClient().get_run(version.run_id).data.metrics if version.run_id else {}
    known: dict[str, float] = {str(k).removeprefix("final/"): v for k, v in metrics.items()}
    try:
        return float(version.tags[metric])
    except (KeyError, ValueError):
        if metric in known:
            return known[metric]
    raise UsageError(
        f"{version.name} version {version.version} has no {metric}. Known: test_accuracy, "
        f"{', '.join(sorted(known))}"
    )


def _version(name: str, version: int) -> Any:
    server = MlflowClient()
    try:
        return server.get_model_version(name, str(version))
    except MlflowException:
        names = [model.name for model in server.search_registered_models()]
        if name not in names:
            raise unknown("registered model", name, names) from None
        raise UsageError(f"{name} has no version {version}") from None
