"""Sweep criteria over sparsities, seeds, models and training options with Ray Tune.

On a cluster:
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python ray_jobs/sweep_sparsity.py --config configs/sweep/digits.yaml
Add --runtime-env configs/ray_env.yaml to leave data and outputs out of what is uploaded.
By itself (starts a local Ray; --dry-run prints the cells and what they cost):
    python ray_jobs/sweep_sparsity.py --config configs/sweep/digits.yaml
"""

from __future__ import annotations

import sys

from autosparse.cli.arguments import guarded, parse
from autosparse.cli.next_steps import say_next
from autosparse.study.config import SweepConfig


def main(arguments: list[str]) -> None:
    """Run the study of the config; print its table."""
    config = parse(SweepConfig, arguments, "sweep_sparsity.py", __doc__)
    from autosparse.cli import studies

    studies.run(config)
    say_next("sweep_sparsity.py", config)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
