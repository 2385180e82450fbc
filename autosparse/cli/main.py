"""`autosparse VERB`: parses the verb's config and calls its function.

Only the standard library is imported until a verb runs, so that `--help` is quick.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from autosparse.core import logs
from autosparse.core.errors import UsageError, UserError, unknown

VERBS: dict[str, tuple[str | None, str]] = {
    "quickstart": ("QuickstartConfig", "the whole path on embedded real data, in minutes"),
    "irp": ("IRPConfig", "one run of iterative rewind pruning, into a corpus"),
    "fit": ("FitConfig", "fit AutoS on a corpus"),
    "prune": ("PruneConfig", "prune a timm model at initialization, save the ticket"),
    "compare": (
        "CompareConfig",
        "train tickets and their twins: does the choice of weights matter?",
    ),
    "train": ("SparseTrainConfig", "train tickets (or a dense model) in one process"),
    "export": ("ExportConfig", "write a trained ticket as a dense state dict, ONNX or ticket"),
    "corpus": (None, "look after a corpus: ls, verify, index, merge, export-parquet, report"),
    "shards": (None, "pack images into shards; verify them; index tars that others wrote"),
    "figures": (None, "draw all that applies to a sweep, comparison, corpus or AutoS file"),
    "report": (None, "one page of HTML of a sweep, comparison or corpus"),
    "registry": (None, "models in MLflow: ls, add the best of a sweep, promote"),
    "inspect": (None, "print the card and layers of a ticket, corpus, IRP run or AutoS file"),
}
"""Verb -> its config class in config.py, and what it does."""

USAGE = {
    "corpus": """ls DIR | verify DIR | index DIR | report DIR | merge SOURCE … DIR
                         | export-parquet DIR FILE""",
    "shards": "pack SRC DIR [--KEY VALUE …] | verify DIR | index DIR [--KEY VALUE …]",
    "figures": "DIR … | AUTOS.safetensors CORPUS",
    "report": "DIR …",
    "registry": """ls | add DIR | promote NAME --version N [--metric test_accuracy]
                         [--better lower|higher] [--force true]""",
}
"""What follows a verb that takes paths."""

SETTINGS = {("shards", "pack"): "PackConfig", ("shards", "index"): "IndexConfig"}
"""Actions that take settings after their paths, and the config class."""

WITH_OPTIONS = ("registry",)
"""Verbs that read options of their own after what USAGE says."""

Config = TypeVar("Config")


def main() -> None:
    """Run `autosparse` with the arguments of the command line."""
    sys.exit(guarded(_main, sys.argv[1:]))


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


def _main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("autosparse"))
        return
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    kind, description = VERBS[verb]
    configs = import_module("autosparse.core.config")
    kind_of_action = SETTINGS.get((verb, rest[0])) if rest else None
    if kind_of_action:
        paths = _before_options(rest)
        program = f"autosparse {verb} {rest[0]}"
        config = parse(getattr(configs, kind_of_action), rest[len(paths) :], program, description)
        arguments_of_verb: tuple[Any, ...] = (paths, config)
    elif kind is None:
        arguments_of_verb = (_paths(verb, rest),)
    else:
        arguments_of_verb = (
            parse(getattr(configs, kind), rest, f"autosparse {verb}", description),
        )
    getattr(import_module("autosparse.cli.verbs"), verb)(*arguments_of_verb)


def _before_options(arguments: list[str]) -> list[str]:
    """Return the leading arguments that are no options."""
    first = next((n for n, each in enumerate(arguments) if each.startswith("-")), len(arguments))
    return arguments[:first]


def _help() -> str:
    lines = [
        "usage: autosparse VERB [--config FILE.yaml] [--KEY VALUE …]",
        "",
        "Learn from lottery tickets which weights matter; train only what survives.",
        "",
        *(f"  {verb:<11} {description}" for verb, (_, description) in VERBS.items()),
        "",
        "`autosparse VERB --help` lists a verb's settings, `--print_config` prints them.",
    ]
    return "\n".join(lines)


def _paths(verb: str, arguments: list[str]) -> list[str]:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: autosparse {verb} {USAGE.get(verb, 'PATH …')}\n\n{VERBS[verb][1]}")
        if not arguments:
            raise UsageError(f"autosparse {verb} needs a path")
        sys.exit(0)
    option = next((each for each in arguments if each.startswith("-")), None)
    if option and verb not in WITH_OPTIONS:
        raise UsageError(f"autosparse {verb} takes paths only, not {option}")
    return arguments


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
    return kind(**vars(values))


def _spelt_out(arguments: list[str], parser: Any) -> list[str]:
    """Write options with underscores, and `true` after those that are true or false and bare."""
    flags = {f"--{a.dest}" for a in parser._actions if getattr(a, "_typehint", None) is bool}
    found = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            argument = f"--{name.replace('-', '_')}{equals}{value}"
        found.append(argument)
        if argument in flags and following.startswith("--"):
            found.append("true")
    return found


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
