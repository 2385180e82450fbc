"""How fast images come from shards to the device: JPEGs of 300 to 500 px to batches at 224 px.

With 1 to 15 processes that decode. Beside it: torchvision decodes the same JPEGs on the GPU
(nvJPEG), whole, and resizes them there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from autosparse.data import sets
from autosparse.data.config import DataConfig, PackConfig
from autosparse.data.pack import pack
from benchmarks import shards
from benchmarks.gpu.goals import WORKERS
from benchmarks.gpu.measure import Recorder, Setting

PICTURES, COPIES, BATCH = 480, 12, 256
TINY_PICTURES, TINY_COPIES, TINY_BATCH = 20, 2, 4
SIDE, RUNS, PACKERS = 224, 3, 8
SHARE = 640
"""Images per worker and run, at most: some two seconds, however many workers."""


def run(setting: Setting, recorder: Recorder) -> None:
    torch.set_num_threads(1)
    pictures, copies, batch = PICTURES, COPIES, BATCH
    if setting.tiny:
        pictures, copies, batch = TINY_PICTURES, TINY_COPIES, TINY_BATCH
    with tempfile.TemporaryDirectory() as folder:
        files, packed = Path(folder, "files"), Path(folder, "shards")
        started = time.perf_counter()
        shards.write_images(files, pictures, copies)
        workers = 1 if setting.tiny else PACKERS
        pack(str(files), packed, PackConfig(per_shard=pictures * copies // 10, workers=workers))
        recorder.note("images", pictures * copies)
        recorder.note("writing_seconds", round(time.perf_counter() - started, 1))
        if setting.on_gpu:
            on_the_device(batch, setting, recorder)
        for workers in WORKERS[:2] if setting.tiny else reversed(WORKERS):
            job = reading(packed, workers, batch, setting)
            job()
            recorder.add(f"images_per_s_{workers}w", [job() for _ in range(RUNS)])


def reading(root: Path, workers: int, batch: int, setting: Setting) -> Callable[[], float]:
    """Return a job: read an epoch or as much as is each worker's; it returns images per second."""
    config = DataConfig("shards", str(root), image_size=SIDE, memory_limit_gb=0, workers=workers)
    source = sets.load(config).to(setting.device)

    def job() -> float:
        started, seen = time.perf_counter(), 0
        batches = source.train.shuffled(batch, seed=0, epoch=0)
        for images, labels in islice(batches, SHARE * workers // batch):
            source.prepare(images)
            seen += len(labels)
        setting.wait()
        return seen / (time.perf_counter() - started)

    return job


def on_the_device(batch: int, setting: Setting, recorder: Recorder) -> None:
    """Decode by nvJPEG, a batch at a time, and resize to squares."""
    held = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in shards.HELD]

    def job() -> float:
        started = time.perf_counter()
        for images in resized(held, batch, setting):
            images.float()
        setting.wait()
        return len(held) / (time.perf_counter() - started)

    job()
    recorder.add("nvjpeg_images_per_s", [job() for _ in range(RUNS)])


def resized(held: list[Tensor], batch: int, setting: Setting) -> Iterator[Tensor]:
    """Yield uint8 batches [B, 3, 224, 224] on the device."""
    from torchvision.io import ImageReadMode, decode_jpeg

    for start in range(0, len(held), batch):
        decoded = decode_jpeg(
            held[start : start + batch], mode=ImageReadMode.RGB, device=setting.device
        )
        small = [
            nn.functional.interpolate(
                image[None].float(), (SIDE, SIDE), mode="bilinear", antialias=True
            )
            for image in decoded
        ]
        yield torch.cat(small).round().byte()
