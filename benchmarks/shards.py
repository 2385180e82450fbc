"""How fast images come from shards: JPEGs of 300 to 500 px, to uint8 batches of 224 px.

    python -m benchmarks.shards --json shards.json

Photo-like images are made on the fly: CIFAR-10's, enlarged, where its folder is at hand
(AUTOSPARSE_CIFAR or data/cifar10), otherwise smooth noise; with fine noise on top, each 16 times,
so that an epoch takes seconds and starting the processes little of it. Peers, in turn
with ours, with the same number of processes: decoding alone (the same decoder on images in memory,
each copy by itself and in random order, as a reader meets them; nothing collected), timm's reader
of WebDataset with its loader, torchvision's ImageFolder with a DataLoader; the last two as they
come, centre crop, without augmentation. Then what a shard costs where there are very many of two
images, and no index: a first epoch by one process, over the number of shards.

The readers above keep their processes from one run, an epoch, to the next; they are started, and
the SHA-256 of the shards is checked, before the clock starts, as in a training's first epoch.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from autosparse.data import sets
from autosparse.data.check import adopt
from autosparse.data.config import DataConfig, PackConfig
from autosparse.data.decode import decode
from autosparse.data.pack import pack
from autosparse.data.tars import INDEX
from benchmarks.report import RUNS, figure, publish, seconds_in_turn

SMALL = 1500
PICTURES, COPIES, CLASSES, SIZE, BATCH = 960, 16, 10, 224, 64
IMAGES = PICTURES * COPIES
SIDES = ((500, 375), (375, 500), (500, 333), (400, 300), (300, 400))
HELD: list[bytes] = []
"""The encoded images, for the processes that only decode."""


def pictures(count: int) -> Iterator[Image.Image]:
    """Yield photo-like images of 300 to 500 px, always the same ones."""
    rng = np.random.default_rng(0)
    folder = Path(os.environ.get("AUTOSPARSE_CIFAR", "data/cifar10")) / "test"
    small = sorted(folder.glob("*/*.jpg"))
    random.Random(0).shuffle(small)
    for number in range(count):
        width, height = SIDES[number % len(SIDES)]
        if small:
            start = Image.open(small[number % len(small)]).convert("RGB")
        else:
            start = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        pixels = np.asarray(start.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        noisy = pixels + rng.normal(0, 6, pixels.shape)
        yield Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_images(root: Path, count: int = PICTURES, copies: int = COPIES) -> None:
    """Write train, validation and test folders; only train is read."""
    for number, picture in enumerate(pictures(count)):
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        content = stream.getvalue()
        HELD.extend(bytes(bytearray(content)) for _ in range(copies))
        for split in ("train", "validation", "test") if number < CLASSES else ("train",):
            folder = root / split / f"{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                (folder / f"{number:06d}-{copy}.jpg").write_bytes(content)
    random.Random(0).shuffle(HELD)


def decode_part(part: tuple[int, int]) -> int:
    """Decode every n-th image; return how many."""
    mine = HELD[part[0] :: part[1]]
    torch.set_num_threads(1)
    for content in mine:
        decode(content, SIZE)
    return len(mine)


def alone(pool: ProcessPoolExecutor, workers: int) -> None:
    """Decode all images and throw them away."""
    parts = [(worker, workers) for worker in range(workers)]
    assert sum(pool.map(decode_part, parts)) == IMAGES


def ours(root: Path, workers: int) -> Callable[[], None]:
    """Return a job that reads an epoch from shards."""
    config = DataConfig("shards", str(root), image_size=SIZE, memory_limit_gb=0, workers=workers)
    split = sets.load(config).train

    def job() -> None:
        seen = sum(len(labels) for _, labels in split.shuffled(BATCH, seed=0, epoch=0))
        assert seen == IMAGES

    return job


def timm_reader(root: Path, workers: int) -> Callable[[], None]:
    """Return a job that reads an epoch through timm, on the CPU."""
    from timm.data import create_dataset, create_loader

    dataset: Any = create_dataset(
        "wds/x", str(root), split="train", is_training=True, batch_size=BATCH, input_key="jpg"
    )
    loader: Any = create_loader(
        dataset, (3, SIZE, SIZE), BATCH, is_training=True, no_aug=True, num_workers=workers,
        use_prefetcher=False, device=torch.device("cpu"), pin_memory=False,
        persistent_workers=True,
    )  # fmt: skip

    def job() -> None:
        seen = sum(len(labels) for _, labels in loader)
        assert seen >= IMAGES

    return job


def image_folder(root: Path, workers: int) -> Callable[[], None]:
    """Return a job that reads an epoch of files by torchvision's usual means."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.PILToTensor()]
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(root / "train"), transforms.Compose(steps)),
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
    )

    def job() -> None:
        seen = sum(len(labels) for _, labels in loader)
        assert seen == IMAGES

    return job


def write_small(root: Path) -> None:
    """Write very many tars of two small images, as others would."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for number in range(SMALL):
        split = "train" if number > 1 else ("val", "test")[number]
        with tarfile.open(root / f"{split}-{number:05d}.tar", "w") as tar:
            for place in range(2):
                stream = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG")
                for ending, content in (("jpg", stream.getvalue()), ("cls", b"%d" % place)):
                    member = tarfile.TarInfo(f"{number}_{place}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def ms_per_small_shard(root: Path) -> list[float]:
    """Return milliseconds a shard of a first epoch without an index, run by run."""
    write_small(root)
    adopt(root)
    (root / INDEX).unlink()
    config = DataConfig("shards", str(root), image_size=64, memory_limit_gb=0, workers=0,
                        cache=str(root / "cache"))  # fmt: skip
    found = []
    for _ in range(RUNS):
        split = sets.load(config).train
        started = time.perf_counter()
        seen = sum(len(labels) for _, labels in split.shuffled(BATCH, seed=0, epoch=0))
        found.append((time.perf_counter() - started) * 1000 / SMALL)
        assert seen > 2 * (SMALL - BATCH)
    return found


def ratios(taken: dict[str, list[float]], peer: str) -> list[float]:
    """Return how many times as fast as a peer ours was, run by run."""
    return [b / a for a, b in zip(taken["ours"], taken[peer], strict=True)]


def main() -> None:
    """Measure with one and two workers."""
    torch.set_num_threads(1)
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        files, shards = Path(folder, "files"), Path(folder, "shards")
        write_images(files)
        pack(str(files), shards, PackConfig(per_shard=IMAGES // 10))
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(1, context) as one, ProcessPoolExecutor(2, context) as two:
            single = seconds_in_turn({
                "ours": ours(shards, 1), "alone": lambda: alone(one, 1),
            })  # fmt: skip
            double = seconds_in_turn({
                "ours": ours(shards, 2), "alone": lambda: alone(two, 2),
                "timm": timm_reader(shards, 2), "folder": image_folder(files, 2),
            })  # fmt: skip
    for name, taken in (("1w", single), ("2w", double)):
        rates = [IMAGES / seconds for seconds in taken["ours"]]
        figures[f"images_per_s_{name}"] = figure(rates, "images/s", "none", "none")
        figures[f"vs_decode_{name}"] = figure(
            ratios(taken, "alone"), "times as fast", ">= 0.85", "decoding alone"
        )
    with tempfile.TemporaryDirectory() as folder:
        figures["ms_per_small_shard"] = figure(
            ms_per_small_shard(Path(folder, "small")), "ms", "<= 2", "none"
        )
    peers = (("vs_timm_reader", "timm", ">= 1.2", "timm's wds reader"),
             ("vs_image_folder", "folder", ">= 1", "ImageFolder + DataLoader"))  # fmt: skip
    for name, peer, goal, words in peers:
        figures[name] = figure(ratios(double, peer), "times as fast", goal, words)
    publish(figures, __doc__)


if __name__ == "__main__":
    main()
