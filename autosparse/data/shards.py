"""WebDataset shards with a manifest: a cut or changed shard is an error, not fewer samples.

A shard folder holds tars named by split, `train-000000.tar`, `validation-000000.tar`,
`test-000000.tar`, each sample `KEY.jpg` (or png, webp) and `KEY.cls`, and `manifest.json`:
{"format": 1, "classes": [...], "shards": [{"name", "split", "count", "bytes", "sha256"}]}.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from autosparse.config import DataConfig
from autosparse.data.decode import decode
from autosparse.data.folder import DEFAULT_SIZE, IMAGENET_MEAN, IMAGENET_STD
from autosparse.data.source import (
    Batch,
    DataSource,
    MemorySplit,
    choose_augment,
    first_cause,
    in_memory,
)
from autosparse.errors import UsageError
from autosparse.files import read_json, replacing, sha256_of_file, write_json

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation", "test")
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Shard:
    """One tar of the manifest."""

    name: str
    split: str
    count: int
    bytes: int
    sha256: str


def load_shards(config: DataConfig) -> DataSource:
    """Return shards as a source: in memory if the decoded images fit, otherwise streamed."""
    root = Path(config.root or "").expanduser()
    manifest, shards = read_manifest(root)
    size = config.image_size or DEFAULT_SIZE
    classes = len(manifest["classes"])
    parts: dict[str, Any] = {
        split: ShardStream(
            root, [s for s in shards if s.split == split], size, classes, config.workers
        )
        for split in SPLITS
    }
    for split in ("train", "test"):
        if not parts[split].shards:
            raise UsageError(f"{root / MANIFEST} lists no {split} shard")
    augment = choose_augment(config.augment, "shift+flip")
    if 3 * size * size * sum(len(part) for part in parts.values()) <= config.memory_limit_gb * 1e9:
        whole = {name: part.in_memory() for name, part in parts.items() if len(part)}
        return in_memory(
            root.name,
            whole["train"],
            whole["test"],
            validation=whole.get("validation"),
            num_classes=classes,
            validation_fraction=config.validation_fraction,
            train_limit=config.train_limit,
            augment=augment,
        )
    if not parts["validation"].shards:
        raise UsageError(f"{root} is too large for memory and has no validation shards")
    if config.train_limit:
        raise UsageError(f"data.train_limit works in memory only; {root} is streamed")
    return DataSource(
        name=root.name,
        **parts,
        num_classes=classes,
        in_chans=3,
        image_size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augment=augment,
        fingerprint=hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16],
    )


def read_manifest(root: Path) -> tuple[dict[str, Any], list[Shard]]:
    """Read the manifest and check that every shard is there with its size."""
    manifest = read_json(root / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"{root / MANIFEST} is not a manifest of shards of format {FORMAT}")
    try:
        shards = [_shard(**entry) for entry in manifest["shards"]]
        classes = manifest["classes"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{root / MANIFEST} is not a manifest of shards ({error})") from None
    if not classes:
        raise UsageError(f"{root / MANIFEST} names no classes")
    for shard in shards:
        path = root / shard.name
        if not path.is_file():
            raise UsageError(f"shard {path} is in the manifest but not on disk")
        if path.stat().st_size != shard.bytes:
            raise UsageError(
                f"shard {path} has {path.stat().st_size} bytes, the manifest says {shard.bytes}: "
                "it is cut or changed; copy it again"
            )
    return manifest, shards


def _shard(name: str, split: str, count: int, bytes: int, sha256: str) -> Shard:
    if split not in SPLITS:
        raise ValueError(f"{name}: split {split!r} is none of {', '.join(SPLITS)}")
    return Shard(str(name), split, int(count), int(bytes), str(sha256))


def write_shards(
    samples: Iterable[tuple[str, bytes, str, int]],
    root: str | Path,
    classes: Sequence[str],
    *,
    per_shard: int = 1000,
) -> None:
    """Write (split, encoded image, its extension, label) samples as shards, manifest last."""
    root = Path(root)
    pending: dict[str, list[tuple[bytes, str, int]]] = {split: [] for split in SPLITS}
    written: list[Shard] = []
    for split, image, extension, label in samples:
        pending[split].append((image, extension, label))
        if len(pending[split]) == per_shard:
            written.append(_write_shard(root, split, written, pending[split]))
            pending[split] = []
    for split in SPLITS:
        if pending[split]:
            written.append(_write_shard(root, split, written, pending[split]))
    content = {
        "format": FORMAT,
        "classes": list(classes),
        "shards": [vars(shard) for shard in written],
    }
    write_json(root / MANIFEST, content)


def _write_shard(
    root: Path, split: str, written: list[Shard], samples: list[tuple[bytes, str, int]]
) -> Shard:
    from webdataset import TarWriter

    number = sum(shard.split == split for shard in written)
    name = f"{split}-{number:06d}.tar"
    with replacing(root / name) as temporary, TarWriter(str(temporary), mtime=0.0) as tar:
        for place, (image, extension, label) in enumerate(samples):
            key = f"{split}{number:06d}_{place:06d}"
            tar.write({"__key__": key, extension: image, "cls": str(label).encode()})
    path = root / name
    return Shard(name, split, len(samples), path.stat().st_size, sha256_of_file(path))


@dataclass(frozen=True)
class ShardStream:
    """A split read from shards by worker processes.

    The order of an epoch comes from (seed, epoch): all shards are shuffled, then dealt out to
    ranks and workers, so that a rank sees other shards every epoch.
    """

    root: Path
    shards: Sequence[Shard]
    size: int
    classes: int
    workers: int
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)

    def _deal(self, order: Sequence[int], rank: int, world_size: int) -> list[Shard]:
        return [self.shards[place] for place in order[rank::world_size]]

    def steps(self, batch_size: int, world_size: int = 1) -> int:
        """Whole batches that every rank can make, whichever shards it is dealt."""
        fewest = sorted(shard.count for shard in self.shards)[: len(self.shards) // world_size]
        return sum(fewest) // batch_size

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        if len(self.shards) < world_size:
            raise UsageError(
                f"{self.root} has {len(self.shards)} shards, fewer than the {world_size} ranks"
            )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        salt = int(torch.randint(2**31, (1,), generator=generator))
        steps = self.steps(batch_size, world_size)
        mine = self._deal(order, rank, world_size)
        yield from islice(self._batches(mine, batch_size, shuffle_seed=salt), steps)

    def once(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        yield from self._batches(self._deal(range(len(self.shards)), rank, world_size), batch_size)

    def _batches(
        self, shards: list[Shard], batch_size: int, shuffle_seed: int | None = None
    ) -> Iterator[Batch]:
        if not shards:
            return
        import webdataset

        samples = webdataset.DataPipeline(
            _Samples(self.root, shards),
            *([webdataset.shuffle(1000, seed=shuffle_seed)] if shuffle_seed is not None else []),
            webdataset.map(partial(_decoded, size=self.size, classes=self.classes)),
        )
        loader = webdataset.WebLoader(
            samples, batch_size=None, num_workers=min(self.workers, len(shards))
        )
        try:
            for images, labels in _collected(loader, batch_size):
                yield images.to(self.device), labels.to(self.device)
        except UsageError as error:
            raise first_cause(error) from error

    def in_memory(self) -> MemorySplit:
        """Check every shard's SHA-256, then decode the whole split."""
        for shard in self.shards:
            path = self.root / shard.name
            if sha256_of_file(path) != shard.sha256:
                raise UsageError(
                    f"shard {path} is not what the manifest says (its SHA-256 differs)"
                )
        parts = list(self.once(256))
        return MemorySplit(
            torch.cat([images.cpu() for images, _ in parts]),
            torch.cat([labels.cpu() for _, labels in parts]),
        )

    def to(self, device: torch.device) -> ShardStream:
        return replace(self, device=device)


def _collected(samples: Iterable[tuple[Tensor, int]], batch_size: int) -> Iterator[Batch]:
    """Collect samples into batches; the last one may be smaller."""
    images: list[Tensor] = []
    labels: list[int] = []
    for image, label in samples:
        images.append(image)
        labels.append(label)
        if len(labels) == batch_size:
            yield torch.stack(images), torch.tensor(labels)
            images, labels = [], []
    if labels:
        yield torch.stack(images), torch.tensor(labels)


class _Samples(IterableDataset):
    """The undecoded samples of some shards, each shard's number checked against the manifest."""

    def __init__(self, root: Path, shards: Sequence[Shard]) -> None:
        self.root, self.shards = root, shards

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for shard in self.shards[first::step]:
            yield from self._read(self.root / shard.name, shard.count)

    def _read(self, path: Path, expected: int) -> Iterator[dict]:
        import webdataset

        seen = 0
        try:
            for sample in webdataset.WebDataset(
                [str(path)],
                shardshuffle=False,
                nodesplitter=None,
                workersplitter=None,
                empty_check=False,
            ):
                seen += 1
                yield sample
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UsageError(
                f"shard {path} is cut or damaged after {seen} of {expected} samples "
                f"({type(error).__name__})"
            ) from error
        if seen != expected:
            raise UsageError(
                f"shard {path} gave {seen} samples, the manifest says {expected}: it is damaged"
            )


def _decoded(sample: dict, *, size: int, classes: int) -> tuple[Tensor, int]:
    where = f"{sample['__url__']} sample {sample['__key__']}"
    key = next((key for key in IMAGE_KEYS if key in sample), None)
    if key is None or "cls" not in sample:
        raise UsageError(f"{where} has no image (jpg, png, webp) or no cls")
    try:
        image, label = decode(sample[key], size), int(sample["cls"])
    except (UsageError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error
    if not 0 <= label < classes:
        raise UsageError(f"{where}: label {label} is none of the {classes} classes")
    return image, label
