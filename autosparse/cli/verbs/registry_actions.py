"""`autosparse registry`: list the registry, add to it, promote a version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autosparse.core.errors import UsageError, unknown
from autosparse.core.files import place
from autosparse.core.progress import print_table


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
    from autosparse.integrations import promotion

    known = {"version": int, "metric": str, "force": _truth, "better": str}
    (name,), given = _options(arguments, 1, known)
    if "version" not in given:
        raise UsageError("autosparse registry promote needs --version N")
    print(promotion.promote(name, **given))


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
