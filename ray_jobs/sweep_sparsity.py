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
from dataclasses import replace
from typing import TYPE_CHECKING

from autosparse.cli.arguments import guarded, parse
from autosparse.study.config import SweepConfig

if TYPE_CHECKING:
    from autosparse.integrations.tune import Swept


def main(arguments: list[str]) -> None:
    """Do the sweep of the config; print its table."""
    config = parse(SweepConfig, arguments, "sweep_sparsity.py", __doc__)
    from autosparse.core.progress import print_table
    from autosparse.integrations import ray
    from autosparse.study import sweep

    sweep.check(config)
    config = replace(config, out=str(ray.output_folder(config.out)))
    if config.dry_run:
        rows, line = sweep.dry_run(config)
        print_table(rows, title=f"sweep {config.out}")
        print(line)
        return
    from autosparse.integrations import tune

    swept = tune.run(config)
    _report(config, swept)
    tune.raise_if_failed(swept)


def _report(config: SweepConfig, swept: Swept) -> None:
    """Write table, figures and report of what is finished, and print the table."""
    from autosparse.core.progress import print_table
    from autosparse.data import sets
    from autosparse.study import sweep

    rows = sweep.table(config, swept.cells, sets.load(config.data))
    path = sweep.write_report(config, rows, swept.cells)
    if rows:
        title = "per cent; passes: of one image; cost: of one training"
        print_table(list(sweep.shown(rows)), title)
    states = [cell.state for cell in swept.cells]
    print(
        f"{states.count('finished')} cells finished, {states.count('stopped')} stopped early, "
        f"{len(swept.found)} of them found; {states.count('failed')} failed"
    )
    failed = sweep.failures(swept.cells)
    if failed:
        print_table([{"failed": key, "error": error} for key, error in failed.items()])
    if not rows:
        return
    from autosparse.report import page as report

    if all(row["label"] == "dense" for row in rows):
        print(f"all intervals: {path}; nothing sparse is finished yet")
        return
    page = report.write(path.parent)
    if config.tracking:
        from autosparse.integrations.tracking import log_sweep

        log_sweep(path.parent, rows)
    print(f"page with all figures: {page}\nall intervals: {path}")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
