"""`autosparse registry`: list the registry, add to it, promote a version."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from autosparse.cli.config import PromoteConfig
from autosparse.core.errors import UsageError
from autosparse.core.files import place
from autosparse.core.progress import print_table


def ls() -> None:
    """List all versions of our registered models."""
    from autosparse.integrations import mlflow, registry

    rows = registry.listing()
    if rows:
        _print(rows)
    else:
        print(f"nothing is registered in {mlflow.tracking_uri()}")


def add(path: str) -> None:
    """Register an AutoS file, or the best tickets of a sweep."""
    from autosparse.integrations import registry

    _print(registry.add(place(path)))


def promote(name: str, config: PromoteConfig) -> None:
    """Make a version champion, if it is better than the present one."""
    from autosparse.integrations import promotion

    if config.version < 1:
        raise UsageError("autosparse registry promote needs --version N, as `registry ls` lists it")
    print(promotion.promote(name, **asdict(config)))


def _print(rows: list[dict[str, Any]]) -> None:
    """Print the columns in which some row says something."""
    from autosparse.integrations import registry

    filled = [key for key in rows[0] if any(row[key] for row in rows)]
    print_table([{key: row[key] for key in filled} for row in rows], spare=registry.SPARE)
