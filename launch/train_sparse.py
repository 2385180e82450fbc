"""Train tickets (or a dense model) under DeepSpeed.

    deepspeed launch/train_sparse.py --config configs/train/digits.yaml \\
        --tickets 'tickets/*.safetensors' --out trained
On a machine without a GPU, with two ranks:
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 launch/train_sparse.py --config …
"""

from __future__ import annotations

import sys

from autosparse.cli.arguments import guarded, parse
from autosparse.study.config import SparseTrainConfig


def main(arguments: list[str]) -> None:
    """Train what the config names, on this rank."""
    arguments = [each for each in arguments if not each.startswith("--local_rank")]
    config = parse(SparseTrainConfig, arguments, "train_sparse.py", __doc__)
    from autosparse.cli.verbs import fetched, tracking
    from autosparse.integrations import deepspeed, deepspeed_ranks
    from autosparse.study.table import show_trainings

    if not deepspeed_ranks.is_first():
        deepspeed.train(config)  # Rank 0 tells which tickets there are.
        return
    with tracking(config.tracking) as observer:
        show_trainings(deepspeed.train(fetched(config), observer))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
