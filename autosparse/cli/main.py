"""`autosparse VERB`: parses the verb's settings and calls its function.

jsonargparse parses a verb's settings and prints their help. It takes longer to import than `--help`
may take, so groups of commands, which have no settings, are argparse's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import takewhile
from typing import Any

from autosparse.cli.arguments import config_of, guarded, keys_of, parsed, parser_of, spelt_out
from autosparse.cli.next_steps import say_next
from autosparse.cli.remedies import check_no_bare_word
from autosparse.core.errors import UsageError, unknown

DESCRIPTION = "Learn from lottery tickets which weights matter; train only what survives."
PATH, PATHS = {"path": None}, {"path": "+"}


@dataclass(frozen=True)
class Verb:
    """A command, or a group of commands."""

    does: str
    """What it does, for help."""
    function: str = ""
    """Module below `autosparse.cli`, and function, that is called with the paths and settings."""
    settings: str | None = None
    """Package and class of its settings, in the package's config.py."""
    paths: Mapping[str, str | None] = field(default_factory=dict)
    """What comes before the settings: name -> how many, as argparse's `nargs`."""
    actions: dict[str, Verb] = field(default_factory=dict)
    """Of a group: its commands."""


VERBS = {
    "quickstart": Verb(
        "the whole path on embedded real data, in minutes",
        "quickstart.run", "cli.QuickstartConfig",
    ),
    "irp": Verb(
        "one run of iterative rewind pruning, into a corpus", "verbs.run_irp", "irp.IRPConfig"
    ),
    "fit": Verb("fit AutoS on a corpus", "verbs.fit_autos", "autos.FitConfig"),
    "prune": Verb(
        "prune a timm model at initialization, save the ticket",
        "verbs.prune_model", "criteria.PruneConfig",
    ),
    "compare": Verb(
        "train tickets and their twins: does the choice of weights matter?",
        "studies.run", "study.StudyConfig",
    ),
    "train": Verb(
        "train tickets (or a dense model) in one process",
        "verbs.train_tickets", "study.SparseTrainConfig",
    ),
    "export": Verb(
        "write a trained ticket as a state dict, ONNX, a smaller network or a ticket",
        "verbs.export_ticket", "study.ExportConfig",
    ),
    "measure": Verb(
        "what a ticket or timm model costs, pruned and slimmed: operations, bytes, milliseconds",
        "verbs.measuring.print_costs", "study.MeasureConfig", {"source": None},
    ),
    "corpus": Verb("look after a corpus", actions={
        "ls": Verb("list the finished runs", "verbs.corpus_actions.ls", paths=PATH),
        "verify": Verb("check every byte", "verbs.corpus_actions.verify", paths=PATH),
        "index": Verb("write the index anew", "verbs.corpus_actions.index", paths=PATH),
        "merge": Verb("copy the runs of corpora into another one", "verbs.corpus_actions.merge",
                      paths={"source": "+", "into": None}),
        "report": Verb("draw what is in it", "verbs.corpus_actions.draw", paths=PATH),
    }),
    "shards": Verb("pack images into shards, or look after a folder of shards", actions={
        "pack": Verb("pack a folder of images, or a torchvision set", "verbs.shards_actions.pack",
                     "data.PackConfig", {"source": None, "folder": None}),
        "verify": Verb("check every byte", "verbs.shards_actions.verify", paths=PATH),
        "index": Verb("write manifest and index for tars that others wrote",
                      "verbs.shards_actions.index", "data.IndexConfig", PATH),
    }),
    "figures": Verb(
        "draw all that applies to a sweep, comparison, corpus or AutoS file",
        "verbs.draw_figures", paths=PATHS,
    ),
    "report": Verb(
        "one page of HTML of a sweep, comparison or corpus", "verbs.write_reports", paths=PATHS
    ),
    "registry": Verb("models in MLflow", actions={
        "ls": Verb("list the versions of all models", "verbs.registry_actions.ls"),
        "add": Verb("register an AutoS file, or the best of a sweep", "verbs.registry_actions.add",
                    paths=PATH),
        "promote": Verb("make a version champion if it is better",
                        "verbs.registry_actions.promote", "cli.PromoteConfig", {"name": None}),
    }),
    "inspect": Verb(
        "print the card and layers of a ticket, corpus, IRP run or AutoS file",
        "verbs.inspection.print_cards", paths=PATHS,
    ),
}  # fmt: skip


def main() -> None:
    """Run `autosparse` with the arguments of the command line."""
    sys.exit(guarded(_main, sys.argv[1:]))


def _main(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        from importlib.metadata import version

        print(version("autosparse"))
        return
    verb, program, rest = Verb(DESCRIPTION, actions=VERBS), "autosparse", list(arguments)
    while verb.actions:
        if not arguments or rest[:1] in (["-h"], ["--help"]):
            _group(program, verb).print_help()
            return
        name = rest.pop(0) if rest else ""
        if not name:
            raise UsageError(f"{program} needs one of {', '.join(verb.actions)}")
        if name not in verb.actions:
            raise unknown(f"command of {program}", name, verb.actions)
        verb, program = verb.actions[name], f"{program} {name}"
    _run(verb, program, rest)


def _group(program: str, verb: Verb) -> argparse.ArgumentParser:
    """Return what prints the help of a group of commands, without the settings of each."""
    parser = argparse.ArgumentParser(
        program, description=verb.does, epilog=f"`{program} COMMAND --help` says more of each."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, each in verb.actions.items():
        commands.add_parser(name, help=each.does)
    return parser


def _run(verb: Verb, program: str, arguments: list[str]) -> None:
    """Parse what comes after the names of a command, and call its function."""
    kind = settings_class(verb.settings) if verb.settings else None
    if kind is not None and not verb.paths:
        check_no_bare_word(program, arguments, keys_of(kind))
    parser = parser_of(kind, prog=program, description=verb.does)
    if any(each.startswith("--print_config") for each in arguments):  # Paths are no settings.
        paths = list(takewhile(lambda each: not each.startswith("-"), arguments))
        parsed(parser, spelt_out(kind, arguments[len(paths) :]))
    for name, count in verb.paths.items():
        parser.add_argument(name, nargs=count, metavar=name.upper())
    values = parsed(parser, spelt_out(kind, arguments))
    paths = {name: values.pop(name) for name in verb.paths}
    settings = [] if kind is None else [config_of(kind, parser, values)]
    module, _, function = verb.function.rpartition(".")
    getattr(import_module(f"autosparse.cli.{module}"), function)(*paths.values(), *settings)
    command, config = program.removeprefix("autosparse "), settings[0] if settings else None
    say_next(command, config, paths)


def settings_class(name: str) -> type[Any]:
    """Return the class that a verb's `settings` names."""
    package, _, kind = name.partition(".")
    return getattr(import_module(f"autosparse.{package}.config"), kind)
