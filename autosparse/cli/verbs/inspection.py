"""`autosparse inspect`: what a file or folder is."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from autosparse.core.errors import UsageError
from autosparse.core.files import place, read_card
from autosparse.core.progress import UNLIMITED, print_table, shortened, terminal_width


def print_cards(paths: list[str]) -> None:
    """Print what a file or folder is, its card, and a row per layer or run."""
    for path in paths:
        if place(path).is_dir():
            _inspect_folder(place(path))
        else:
            _inspect_file(path)


def _inspect_folder(path: Path) -> None:
    from autosparse.corpus.store import RUN, SPARE, Corpus, is_finished, shown

    if is_finished(path):
        _inspect_file(str(path / RUN))
        return
    corpus = Corpus(path)
    rows = corpus.table()
    print(f"corpus {path}, fingerprint {corpus.fingerprint}, {len(rows)} finished runs")
    print_table([shown(row) for row in rows], spare=SPARE)


def _inspect_file(path: str) -> None:
    from autosparse.sparsity.ticket import Ticket

    header = read_card(path)
    kind = header.get("kind")
    if kind == "ticket":
        ticket = Ticket.load(path)
        print(f"ticket {path}, fingerprint {ticket.fingerprint}, sparsity {ticket.sparsity:.4%}")
        live = ticket.card.pop("live", {})
        _print_card(ticket.card)
        rows = [
            {
                **row,
                "shape": "x".join(map(str, row["shape"])),
                "live": live.get(row["layer"], "?"),
                "units": _units(ticket.masks[row["layer"]]),
            }
            for row in ticket.table()
        ]
        print_table(rows, spare=("units", "density"))
    elif kind == "autos":
        print(f"AutoS {path}, fingerprint {header['fingerprint']}, features {header['features']}")
        history = header["card"].pop("history", [])
        _print_card({"inputs": header["inputs"], "hidden": header["hidden"], **header["card"]})
        if history:
            print_table(history)
    elif kind == "irp":
        print(f"IRP run {path}, run_id {header['run_id']}")
        levels = header.pop("levels")
        _print_card({key: header[key] for key in ("model", "config", "versions")})
        print_table(level_rows(levels))
    else:
        raise UsageError(f"{path} is no ticket, IRP run or AutoS file")


def level_rows(levels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the levels of an IRP run as they are printed; what a card has in common goes."""
    return [
        {
            "level": entry["level"],
            "density": f"{entry['density']:.2%}",
            "kept": entry["kept"],
            "loss": entry["train_loss"],
            "validation accuracy": f"{entry['validation_accuracy']:.1%}",
            "images/s": entry.get("images_per_second", ""),
            "seconds": entry["seconds"],
        }
        for entry in levels
    ]


def _units(mask: Any) -> str:
    """Return how many outputs of a layer keep a weight, of how many."""
    return f"{int(mask.flatten(1).any(1).sum())}/{len(mask)}"


def _print_card(card: dict[str, Any]) -> None:
    """Print a card as YAML, one key a line, and no line wider than the terminal."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Lists of single values stay on one line."""

    def listed(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
        alone = not any(isinstance(each, dict | list) for each in values)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=alone)

    Dumper.add_representer(list, listed)
    width = terminal_width()
    text = yaml.dump(card, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=UNLIMITED)
    for line in text.splitlines():
        for each in _wrapped(f"  {line}", width):
            print(each)


def _wrapped(line: str, width: int) -> list[str]:
    """Return a line in lines of at most `width`, further ones two deeper; long words shortened."""
    indent = len(line) - len(line.lstrip(" ")) + 4
    words = [shortened(word, max(8, width - indent)) for word in line.split(" ")]
    return textwrap.wrap(
        " ".join(words), width, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    ) or [""]  # fmt: skip
