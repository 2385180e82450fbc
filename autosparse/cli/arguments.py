"""From the arguments of a command to its settings, and from a mistake to one line.

Only the standard library is imported until arguments are parsed, so that `--help` is quick.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from autosparse.core import logs
from autosparse.core.errors import UsageError, UserError

Config = TypeVar("Config")
WORDS = ("yes", "no", "on", "off", "y", "n")
"""That YAML 1.1 takes for true or false, and YAML 1.2 does not."""


def guarded(run: Callable[[list[str]], Any], arguments: list[str]) -> int:
    """Call `run(arguments)`; turn a user's mistake into one line and return the exit code."""
    from autosparse.data.identity import looked_at_once

    logs.to_stderr()
    try:
        with looked_at_once():
            run(arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse(
    kind: type[Config], arguments: list[str], program: str, description: str | None
) -> Config:
    """Build a config from `--config` files and `--key value` overrides, later ones winning.

    `--dry-run` is `--dry_run`, and a setting that is true or false is true when no value follows.
    Raises UsageError that names a wrong key, with the nearest right one, or a wrong value.
    `--help` and `--print_config` print and exit.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file; several may be given")
    parser.add_class_arguments(kind)
    arguments = _spelt_out(arguments, parser)
    _check_files(arguments)
    import argparse

    try:
        found = parser.parse_args(arguments)
        found.pop("config", None)
        values = parser.instantiate(found)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UsageError(_explain(str(error), parser, kind)) from error
    _unquote(values, parser)
    return kind(**vars(values))


def _spelt_out(arguments: list[str], parser: Any) -> list[str]:
    """Write options with underscores, and `true` after those that are true or false and bare.

    What a setting of any type (`--options.scorer no`) is given, is text where only YAML 1.1 takes
    it for true or false.
    """
    flags = {f"--{a.dest}" for a in parser._actions if getattr(a, "_typehint", None) is bool}
    free = tuple(f"--{a.dest}." for a in parser._actions if _is_free(a))
    found, text = [], False
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = f"--{name.replace('-', '_')}"
            text = name.startswith(free)
            argument = f"{name}{equals}{_quoted(value) if text else value}"
        elif text:
            argument, text = _quoted(argument), False
        found.append(argument)
        if argument in flags and following.startswith("--"):
            found.append("true")
    return found


def _is_free(action: Any) -> bool:
    """Whether an option holds settings by name, of any type."""
    return get_origin(getattr(action, "_typehint", None)) is dict


def _quoted(value: str) -> str:
    return f'"{value}"' if value.lower() in WORDS else value


def _unquote(values: Any, parser: Any) -> None:
    """Take the quotes off again, which the parser leaves where they are."""
    for action in filter(_is_free, parser._actions):
        settings = values
        for part in action.dest.split("."):
            settings = getattr(settings, part, None)
        for key, value in (settings or {}).items():
            if isinstance(value, str) and value == _quoted(value[1:-1]) != value[1:-1]:
                settings[key] = value[1:-1]


def _check_files(arguments: list[str]) -> None:
    """Raise UsageError that names a --config file which is missing or no YAML mapping."""
    import yaml

    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config":
            continue
        path = value if equals else (arguments[place + 1] if place + 1 < len(arguments) else "")
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            problem = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UsageError(f"config file {path!r} cannot be read: {problem}") from None
        if not isinstance(content, dict):
            raise UsageError(f"config file {path!r} holds no settings (key: value)")


def _explain(message: str, parser: Any, kind: type) -> str:
    """Shorten jsonargparse's message to one line and add the nearest key it knows."""
    line = " ".join(message.split())
    wrong = re.search(r"[Oo]ption '([^']+)'|unrecognized arguments: --([\w.]+)", line)
    if not wrong:
        return line
    name = wrong.group(1) or wrong.group(2)
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    leaves = {key.rpartition(".")[2] for key in keys} | set(keys) | _optional_keys(kind)
    close = difflib.get_close_matches(name, sorted(leaves), n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown config key {name!r}.{hint} ({line.partition(' Does not validate')[0]})"


def _optional_keys(kind: type) -> set[str]:
    """Return the keys of settings that are a config of their own or nothing."""
    inner = {each for hint in get_type_hints(kind).values() for each in get_args(hint)}
    return {spec.name for each in inner if is_dataclass(each) for spec in fields(each)}
