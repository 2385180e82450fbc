"""Makes reference/configuration.md: every key of every settings class, from the code itself.

Made anew at every build, so it cannot be older than the code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import autosparse

PACKAGE = Path(autosparse.__file__).parent
TOP = """# Configuration

Every key of every settings class, made from the code when this site was built. A key is given on
the command line (`--training.epochs 30`) or in a file (`--config FILE.yaml`); later ones win. Keys
marked *where* say only where or how fast: they are left out of the hash that finished work is
found by.
"""


def classes() -> Iterator[tuple[str, type]]:
    """Yield (package, class) for every dataclass of autosparse/*/config.py."""
    for path in sorted(PACKAGE.glob("*/config.py")):
        module = import_module(f"autosparse.{path.parent.name}.config")
        for kind in vars(module).values():
            if (
                inspect.isclass(kind)
                and dataclasses.is_dataclass(kind)
                and kind.__module__ == module.__name__
            ):
                yield path.parent.name, kind


def meanings(kind: type) -> dict[str, str]:
    """Return what the string below each field says, in the class or in one that it extends."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if dataclasses.is_dataclass(each):
            found |= _meanings(each)
    return found


def _meanings(kind: type) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = tree.body[0].body  # pyright: ignore[reportAttributeAccessIssue]
    found = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            value = text.value
            if isinstance(value, ast.Constant) and isinstance(field.target, ast.Name):
                found[field.target.id] = " ".join(str(value.value).split())
    return found


def default_of(spec: dataclasses.Field[Any]) -> str:
    """Return a field's default as it is written in YAML or Python."""
    if spec.default_factory is not dataclasses.MISSING:
        value = spec.default_factory()
        if dataclasses.is_dataclass(value):
            return f"[{type(value).__name__}](#{type(value).__name__.lower()})"
        if isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            name = type(value[0]).__name__
            return f"one [{name}](#{name.lower()})"
        return f"`{value}`"
    if spec.default is dataclasses.MISSING:
        return "required"
    return "none" if spec.default is None else f"`{spec.default}`"


def cell(text: str) -> str:
    """Return a text that may stand in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def section(package: str, kind: type) -> str:
    """Return the section of one settings class."""
    known = meanings(kind)
    said = inspect.cleandoc(kind.__doc__ or "").replace("\n", " ")
    lines = [
        f"## {kind.__name__}", "", f"{said} (`autosparse/{package}/config.py`)", "",
        "| key | type | default | what it says |", "|---|---|---|---|",
    ]  # fmt: skip
    for spec in dataclasses.fields(kind):
        where = " *where*" if spec.metadata.get("identity", True) is False else ""
        lines.append(
            f"| `{spec.name}`{where} | {cell(str(spec.type))} | {cell(default_of(spec))} "
            f"| {cell(known.get(spec.name, ''))} |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the whole page."""
    return "\n".join([TOP, *(section(package, kind) for package, kind in classes())])
