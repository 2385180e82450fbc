"""Grow a corpus of IRP runs with Ray.

On a cluster:
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python ray_jobs/grow_corpus.py --config configs/corpus/digits.yaml
Add --runtime-env configs/ray_env.yaml to leave data and outputs out of what is uploaded.
By itself (starts a local Ray; --dry-run prints the plan and what it costs):
    python ray_jobs/grow_corpus.py --config configs/corpus/digits.yaml
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from autosparse.cli.arguments import guarded, parse
from autosparse.cli.next_steps import say_next
from autosparse.irp.config import CorpusConfig


def main(arguments: list[str]) -> None:
    """Grow the corpus of the config; print its table."""
    config = parse(CorpusConfig, arguments, "grow_corpus.py", __doc__)
    from autosparse.core.progress import print_table
    from autosparse.corpus.store import SPARE, Corpus, shown
    from autosparse.integrations import ray

    folder = ray.output_folder(config.out)
    if config.dry_run:
        from autosparse.irp import plan

        rows = plan.table(config, folder)
        print_table([plan.shown(row) for row in rows], title=f"plan of {folder}")
        print(plan.summary(rows, config))
        return
    grown = ray.grow(config)
    if grown.found or grown.done:
        rows = [shown(row) for row in Corpus(folder).table()]
        print_table(rows, title=f"corpus {folder}", spare=SPARE)
    if grown.done:
        _draw(config, folder)
    print(f"{len(grown.done)} runs done, {len(grown.found)} found finished: {folder}")
    ray.raise_if_failed(grown)
    say_next("grow_corpus.py", replace(config, out=str(folder)))


def _draw(config: CorpusConfig, folder: Path) -> None:
    """Draw the corpus's figures, and log them if the plan is tracked."""
    from autosparse.report.corpus import write_report

    figures = write_report(folder)
    print(f"figures: {figures[0].parent}")
    if config.tracking:
        from autosparse.integrations import mlflow

        mlflow.log_figures(folder, figures[0].parent)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
