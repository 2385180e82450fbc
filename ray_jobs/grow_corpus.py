"""Grow a corpus of IRP runs with Ray.

On a cluster:
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python ray_jobs/grow_corpus.py --config configs/corpus/digits.yaml
By itself (starts a local Ray):
    python ray_jobs/grow_corpus.py --config configs/corpus/digits.yaml
"""

from __future__ import annotations

import sys

from autosparse.cli import guarded, parse
from autosparse.config import CorpusConfig


def main(arguments: list[str]) -> None:
    """Grow the corpus of the config; print its table."""
    config = parse(CorpusConfig, arguments, "grow_corpus.py", __doc__)
    from autosparse.corpus import Corpus, shown
    from autosparse.integrations import ray
    from autosparse.progress import print_table

    grown = ray.grow(config)
    ray.raise_if_failed(grown)
    rows = [shown(row) for row in Corpus(grown.folder).table()]
    print_table(rows, title=f"corpus {grown.folder}")
    print(f"{len(grown.done)} runs done, {len(grown.found)} found finished: {grown.folder}")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
