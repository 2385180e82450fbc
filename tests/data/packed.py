"""Shards of given samples, in the order they come in."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from autosparse.data import pack
from autosparse.data.config import PackConfig
from autosparse.data.manifest import SPLITS


def write_shards(
    samples: Iterable[tuple[str, bytes, int]],
    root: Path,
    classes: Sequence[str],
    *,
    per_shard: int = 1000,
) -> None:
    """Write (split, encoded image, label) samples as shards."""
    config = PackConfig(per_shard=per_shard, workers=1)
    parts: dict[str, list[pack.Sample]] = {split: [] for split in SPLITS}
    for split, image, label in samples:
        parts[split].append((image, label))
    pack.write(pack._cut(parts, config), list(classes), root, config)
