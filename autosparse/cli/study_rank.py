"""One rank of a study under DeepSpeed; its launcher runs this module, see integrations/launched.py.

… --module autosparse.cli.study_rank STUDY.yaml
"""

from __future__ import annotations

import sys

from autosparse.cli.arguments import guarded, parse
from autosparse.study.config import StudyConfig


def main(arguments: list[str]) -> None:
    """Train the study of a settings file, on this rank."""
    files = [each for each in arguments if not each.startswith("--local_rank")]
    config = parse(StudyConfig, ["--config", *files], "study_rank", __doc__)
    from autosparse.integrations import launched

    launched.train(config)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
