"""WebDataset shards with a manifest: a cut or changed shard is an error, not fewer samples.

A shard folder holds tars named by split, `train-000000.tar`, `validation-000000.tar`,
`test-000000.tar`, each sample `KEY.jpg` (or png, webp …) and `KEY.cls`, and `manifest.json`:
{"format": 1, "classes": [...], "shards": [{"name", "split", "count", "bytes", "sha256"}]}.
`autosparse shards pack` writes it, with an index of the samples. Each shard's size is checked at
the start, its SHA-256 when it is first read.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from autosparse.core.errors import UsageError
from autosparse.data.config import DataConfig
from autosparse.data.manifest import MANIFEST, SPLITS, Reading, Shard
from autosparse.data.remote import Folder, shards_of
from autosparse.data.samples import scan
from autosparse.data.source import DataSource
from autosparse.data.splitting import epoch_seed
from autosparse.data.stream import own_data
from autosparse.data.tars import INDEX, Files, check_members, key_of, read_index

BLOCK = 4096
"""Samples of a lane that are shuffled together: those of about four shards of 1,000, so that a lane
has few shards open at a time."""


def load_shards(config: DataConfig) -> DataSource:
    """Return shards as a source: in memory if the decoded images fit, otherwise streamed."""
    folder, manifest = shards_of(config)
    for shard in manifest.shards:
        folder.check(shard)
    folder.file(INDEX, needed=False)
    classes = len(manifest.classes)
    samples = {
        split: ShardSamples(
            folder,
            [shard for shard in manifest.shards if shard.split == split],
            classes,
            config.lanes,
            manifest.reading,
        )
        for split in SPLITS
    }
    for split in ("train", "test"):
        if not len(samples[split]):
            raise UsageError(f"{folder.root}/{MANIFEST} lists no {split} shard")

    def fingerprint() -> str:
        text = json.dumps(manifest.content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    return own_data(folder.name, samples, classes, config, fingerprint)


class ShardSamples:
    """The samples of one split's shards, read at random."""

    def __init__(
        self, folder: Folder, shards: Sequence[Shard], classes: int, lanes: int = 16,
        reading: Reading = Reading(),
    ) -> None:  # fmt: skip
        self.folder, self.shards, self.classes, self.lanes = folder, list(shards), classes, lanes
        self.reading = reading
        counts = torch.tensor([0, *(shard.count for shard in shards)])
        self.starts: list[int] = counts.cumsum(0).tolist()
        self.checked = torch.zeros(len(self.shards), dtype=torch.uint8).share_memory_()
        """1 for a shard that a process of this run has checked."""
        self._ends = torch.tensor(self.starts[1:])
        self._members: dict[int, np.ndarray] = {}
        self._paths: dict[int, Path] = {}
        self._files = Files()
        self._index: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return self.starts[-1]

    def order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the samples in an epoch's order, and each one's lane.

        Shuffled shards are laid end to end and cut into lanes, a lane is shuffled block by block,
        and the lanes are interleaved: wherever a batch begins, it takes as many of each lane.
        """
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        shards = torch.randperm(len(self.shards), generator=generator).tolist()
        whole = torch.cat([torch.arange(*self.starts[s : s + 2]) for s in shards])
        lanes = min(self.lanes, len(whole))
        pieces = [_in_blocks(piece, generator) for piece in whole.tensor_split(lanes)]
        table = torch.nn.utils.rnn.pad_sequence(pieces, padding_value=-1)
        lane = torch.arange(lanes).expand_as(table)
        there = table >= 0
        return table[there], lane[there]

    def share(self, rank: int, world_size: int) -> list[int]:
        """Return a rank's part of all samples: neighbours, so that it reads few shards."""
        first, last = (len(self) * each // world_size for each in (rank, rank + 1))
        return list(range(first, last))

    def prepare(self, numbers: list[int]) -> None:
        """Fetch, check and index the shards of these samples, where that has not been done.

        Worker processes begin at different shards, so that together they check each about once.
        """
        needed = torch.bucketize(torch.tensor(numbers), self._ends, right=True).unique().tolist()
        worker = get_worker_info()
        turn = worker.id * len(needed) // worker.num_workers if worker else 0
        for shard in needed[turn:] + needed[:turn]:
            self._fetch(shard)
            self._open(shard)

    def _fetch(self, number: int) -> None:
        if not self.checked[number]:
            self.folder.fetch(self.shards[number])
            self.checked[number] = 1

    def labels(self) -> Tensor:
        """Return every sample's label [N], from the index, or from the tars that it lacks."""
        for number in range(len(self.shards)):
            self._open(number)
        return torch.from_numpy(np.concatenate(
            [np.zeros(0, np.int64), *(self._members[n][:, 2] for n in range(len(self.shards)))]
        ))  # fmt: skip

    def _open(self, number: int) -> None:
        """Learn where the samples of a shard lie; one that the index lacks is walked through."""
        if number in self._members:
            return
        shard = self.shards[number]
        path = self._paths[number] = self.folder.path(shard)
        if self._index is None:
            self._index = read_index(self.folder.file(INDEX, needed=False), self.shards)
        members = self._index.get(shard.name)
        if members is None:
            self._fetch(number)
            members = scan(path, self.reading)
        check_members(members, path, shard, self.classes)
        self._members[number] = members.numpy()

    def _place(self, number: int) -> tuple[int, int]:
        shard = bisect_right(self.starts, number) - 1
        return shard, number - self.starts[shard]

    def read(self, number: int) -> tuple[bytes, int]:
        """Return a sample's encoded image and its label."""
        shard, place = self._place(number)
        offset, size, label = self._members[shard][place].tolist()
        return self._files.read(self._paths[shard], offset, size), label

    def name(self, number: int) -> str:
        """Return the shard and key of a sample."""
        shard, place = self._place(number)
        key = key_of(self._paths[shard], int(self._members[shard][place, 0]))
        return f"shard {self._paths[shard]} sample {key}"

    def neighbour(self, number: int) -> int:
        """Return the next sample of the same shard; after the last one its first."""
        shard, place = self._place(number)
        return self.starts[shard] + (place + 1) % self.shards[shard].count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}


def _in_blocks(piece: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffle a lane block by block."""
    blocks = piece.split(BLOCK)
    return torch.cat([block[torch.randperm(len(block), generator=generator)] for block in blocks])
