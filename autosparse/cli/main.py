"""`autosparse VERB`: parses the verb's config and calls its function.

Only the standard library is imported until a verb runs, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from autosparse.cli.arguments import guarded, parse
from autosparse.core.errors import UsageError, unknown

VERBS: dict[str, tuple[str | None, str]] = {
    "quickstart": ("cli.QuickstartConfig", "the whole path on embedded real data, in minutes"),
    "irp": ("irp.IRPConfig", "one run of iterative rewind pruning, into a corpus"),
    "fit": ("autos.FitConfig", "fit AutoS on a corpus"),
    "prune": ("criteria.PruneConfig", "prune a timm model at initialization, save the ticket"),
    "compare": (
        "study.StudyConfig",
        "train tickets and their twins: does the choice of weights matter?",
    ),
    "train": ("study.SparseTrainConfig", "train tickets (or a dense model) in one process"),
    "export": (
        "study.ExportConfig",
        "write a trained ticket as a state dict, ONNX, a smaller network or a ticket",
    ),
    "measure": (
        None,
        "what a ticket or timm model costs, pruned and slimmed: operations, bytes, milliseconds",
    ),
    "corpus": (None, "look after a corpus: ls, verify, index, merge, report"),
    "shards": (None, "pack images into shards; verify them; index tars that others wrote"),
    "figures": (None, "draw all that applies to a sweep, comparison, corpus or AutoS file"),
    "report": (None, "one page of HTML of a sweep, comparison or corpus"),
    "registry": (None, "models in MLflow: ls, add the best of a sweep, promote"),
    "inspect": (None, "print the card and layers of a ticket, corpus, IRP run or AutoS file"),
}
"""Verb -> package and class of its settings (in the package's config.py), and what it does."""

USAGE = {
    "corpus": "ls DIR | verify DIR | index DIR | report DIR | merge SOURCE … DIR",
    "shards": "pack SRC DIR [--KEY VALUE …] | verify DIR | index DIR [--KEY VALUE …]",
    "measure": "TICKET|MODEL [--KEY VALUE …]",
    "figures": "DIR … | AUTOS.safetensors CORPUS",
    "report": "DIR …",
    "registry": """ls | add DIR | promote NAME --version N [--metric test_accuracy]
                         [--better lower|higher] [--force true]""",
}
"""What follows a verb that takes paths."""

SETTINGS = {
    ("shards", "pack"): "data.PackConfig",
    ("shards", "index"): "data.IndexConfig",
    ("measure", ""): "study.MeasureConfig",
}
"""Actions that take settings after their paths, and the config class; "": verbs without actions."""

WITH_OPTIONS = ("registry",)
"""Verbs that read options of their own after what USAGE says."""


def main() -> None:
    """Run `autosparse` with the arguments of the command line."""
    sys.exit(guarded(_main, sys.argv[1:]))


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
    action = rest[0] if rest and (verb, rest[0]) in SETTINGS else ""
    kind_of_action = SETTINGS.get((verb, action)) if rest else None
    if kind_of_action:
        paths = _before_options(rest)
        program = f"autosparse {verb} {action}".rstrip()
        config = parse(settings_class(kind_of_action), rest[len(paths) :], program, description)
        arguments_of_verb: tuple[Any, ...] = (paths, config)
    elif kind is None:
        arguments_of_verb = (_paths(verb, rest),)
    else:
        arguments_of_verb = (parse(settings_class(kind), rest, f"autosparse {verb}", description),)
    if verb == "quickstart":  # It is a user of the other verbs.
        import_module("autosparse.cli.quickstart").run(*arguments_of_verb)
    else:
        getattr(import_module("autosparse.cli.verbs"), verb)(*arguments_of_verb)


def settings_class(name: str) -> type[Any]:
    """Return the class that `VERBS` or `SETTINGS` names."""
    package, _, kind = name.partition(".")
    return getattr(import_module(f"autosparse.{package}.config"), kind)


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
