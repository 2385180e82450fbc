"""Parses the arguments of a command into its settings; a mistake becomes one line.

Only the standard library is imported until arguments are parsed, so that importing this is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from autosparse.cli.remedies import checked, unknown_key
from autosparse.core import logs
from autosparse.core.errors import UsageError, UserError

Config = TypeVar("Config")
WORDS = ("yes", "no", "on", "off", "y", "n")
"""YAML 1.1 takes these for true or false, YAML 1.2 does not."""
OWN_OPTIONS = ("config", "print_config", "help")
"""Options that jsonargparse gives every command that takes settings."""


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
        print(
            "interrupted; run the same command again (what was finished is kept)", file=sys.stderr
        )
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
    parser = parser_of(kind, prog=program, description=description)
    values = parsed(parser, spelt_out(kind, arguments))
    return config_of(kind, parser, values)


def parser_of(kind: type | None, **options: Any) -> Any:
    """Return a parser of jsonargparse that takes the settings of `kind`, if there is one."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)
    if kind is not None:
        parser.add_argument("--config", action="config", help="YAML file; several may be given")
        parser.add_class_arguments(kind)
    return parser


def parsed(parser: Any, arguments: list[str]) -> Any:
    """Parse arguments; raise UsageError with the parser's own message."""
    import argparse

    try:
        return parser.parse_args(arguments)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise _in_words(error, parser) from error


def config_of(kind: type[Config], parser: Any, values: Any) -> Config:
    """Return the settings of `kind` that were parsed."""
    values.pop("config", None)
    try:
        config = kind(**vars(parser.instantiate(values)))
    except (ValueError, TypeError) as error:
        raise _in_words(error, parser) from error
    _unquote(config)
    return config


def _in_words(error: Exception, parser: Any) -> UsageError:
    line = " ".join(str(error).split())
    return UsageError(f"{line} (`{parser.prog} --help` says what there is)")


def spelt_out(kind: type | None, arguments: list[str]) -> list[str]:
    """Write options with underscores, and `true` after those that are true or false and bare.

    In a setting of any type (`--options.scorer no`) a word that only YAML 1.1 takes for true or
    false is quoted. Raises UsageError for a key that is no setting of `kind`, also in a file, and
    for a value that cannot be one of its setting.
    """
    keys = {} if kind is None else keys_of(kind)
    spelt, name, any_type = [], "", False
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        if argument.startswith("--") and argument != "--":
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            _check_key(name.removesuffix("+"), keys)
            any_type = name not in keys and _in_mapping(name, keys)
            if name == "config" and kind is not None:
                _check_file(value if equals else following, keys)
            spelt.append(f"--{name}")
            if equals:
                value = _quoted(value) if any_type else checked(name, keys.get(name), value)
                spelt[-1] += f"={value}"
                name, any_type = "", False
            elif keys.get(name) is bool and following.startswith("--"):
                spelt.append("true")
        else:
            if not name and argument[:1] == "-" and argument[1:2].isalpha() and argument != "-h":
                raise unknown_key(argument[1:], keys)
            value = _quoted(argument) if any_type else checked(name, keys.get(name), argument)
            spelt.append(value)
            name, any_type = "", False
    return spelt


def keys_of(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return the dotted names of all settings, those of inner settings too, and their types."""
    keys = {}
    for name, hint in get_type_hints(kind).items():
        keys[prefix + name] = hint
        for inner in (hint, *get_args(hint)):
            if is_dataclass(inner) and isinstance(inner, type):
                keys |= keys_of(inner, f"{prefix}{name}.")
    return keys


def _check_key(name: str, keys: dict[str, Any]) -> None:
    """Raise UsageError unless a dotted name is a setting, or lies in one that takes any keys."""
    if name in keys or name in OWN_OPTIONS or name.endswith(".help") or _in_mapping(name, keys):
        return
    raise unknown_key(name, keys)


def _in_mapping(name: str, keys: dict[str, Any]) -> bool:
    """Whether a dotted name lies in a setting that takes any keys."""
    parts = name.split(".")
    return any(_is_mapping(keys.get(".".join(parts[:end]))) for end in range(1, len(parts)))


def _quoted(value: str) -> str:
    return f'"{value}"' if value.lower() in WORDS else value


def _unquote(config: Any) -> None:
    """Take the quotes off again in settings of any type, where the parser leaves them."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        if is_dataclass(value):
            _unquote(value)
        elif isinstance(value, dict):
            for key, text in value.items():
                if isinstance(text, str) and text == _quoted(text[1:-1]) != text[1:-1]:
                    value[key] = text[1:-1]


def _is_mapping(hint: Any) -> bool:
    """Whether a setting takes any keys, as its type hint says."""
    return any(dict in (each, get_origin(each)) for each in (hint, *get_args(hint)))


def _check_file(path: str, keys: dict[str, Any]) -> None:
    """Raise UsageError that names a --config file that is missing, no mapping, or of other keys."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"config file {path!r} cannot be read: {problem}") from None
    if not isinstance(content, dict):
        raise UsageError(f"config file {path!r} holds no settings (key: value)")
    try:
        _check_mapping(content, keys)
    except UsageError as error:
        raise UsageError(f"config file {path!r}: {error}") from None


def _check_mapping(content: dict[Any, Any], keys: dict[str, Any], prefix: str = "") -> None:
    for key, value in content.items():
        _check_key(f"{prefix}{key}", keys)
        if isinstance(value, dict) and not _is_mapping(keys.get(f"{prefix}{key}")):
            _check_mapping(value, keys, f"{prefix}{key}.")
