"""Runs a study for every command that has one, and prints its table and where its page is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from autosparse.core.progress import print_table
from autosparse.study.config import StudyConfig

if TYPE_CHECKING:
    from autosparse.integrations.studies import Done


def run(config: StudyConfig) -> None:
    """Run a study; print its table, and raise RunFailed for cells that failed."""
    from autosparse.integrations import studies
    from autosparse.study import plan

    plan.check(config)
    config = replace(config, out=str(studies.output_folder(config)))
    if config.dry_run:
        rows, line = plan.dry_run(config)
        print_table(rows, title=f"study {config.out}")
        print(line)
        return
    done = studies.run(config)
    _report(config, done)
    studies.raise_if_failed(done)


def _report(config: StudyConfig, done: Done) -> None:
    """Write table, figures and page of what is finished, and print the table."""
    from autosparse.report import page
    from autosparse.study import table

    rows = table.table(done.cells)
    path = table.write_report(config, rows, done.cells)
    if rows:
        table.show(rows)
    states = [cell.state for cell in done.cells]
    print(
        f"{states.count('finished')} cells finished, {states.count('stopped')} stopped early, "
        f"{len(done.found)} of them found; {states.count('failed')} failed"
    )
    failed = [
        {"failed": cell.key, "error": cell.error()} for cell in done.cells if cell.state == "failed"
    ]
    if failed:
        print_table(failed)
    if all(row["label"] == "dense" for row in rows):
        print(f"all intervals: {path}; nothing sparse is finished yet")
        return
    written = page.write(path.parent)
    if config.tracking:
        from autosparse.integrations.tracking import log_study

        log_study(path, rows)
    print(f"page with all figures: {written}\nall intervals: {path}")
