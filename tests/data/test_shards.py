"""Shards: written and read whole, shared out exactly once, and every damage named."""

import errno
import gc
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile
import threading
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from autosparse.core.config import run_id
from autosparse.core.errors import RunFailed, UsageError
from autosparse.data import sets, tars
from autosparse.data.check import adopt, verify
from autosparse.data.config import DataConfig
from autosparse.data.manifest import MANIFEST, Shard
from autosparse.data.memory import MemorySplit
from autosparse.data.remote import Folder
from autosparse.data.shards import ShardSamples
from autosparse.data.stream import Stream
from autosparse.data.tars import INDEX
from autosparse.data.workers import Buffers
from tests.conftest import flip
from tests.data.packed import write_shards

CLASSES = ("ant", "bee", "cat")
COUNTS = {"train": 25, "validation": 7, "test": 11}
STARTS = {"train": 0, "validation": 100, "test": 200}
VICTIM = "test-000001.tar"


def picture(grey: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), grey).save(stream, "PNG")
    return stream.getvalue()


def samples():
    """Yield images of one grey each, which tells them apart, of class grey % 3."""
    for split, count in COUNTS.items():
        for grey in range(STARTS[split], STARTS[split] + count):
            yield split, picture(grey), grey % 3


def expected(split: str) -> list[tuple[int, int]]:
    return [(STARTS[split] + place, (STARTS[split] + place) % 3) for place in range(COUNTS[split])]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Shards of 4 samples; the last ones hold 1, 3 and 3."""
    folder = tmp_path_factory.mktemp("packed")
    write_shards(samples(), folder, CLASSES, per_shard=4)
    return folder


@pytest.fixture
def root(packed, tmp_path) -> Path:
    """A copy of the shards."""
    return Path(shutil.copytree(packed, tmp_path / "insects"))


def config(root: Path, streamed: bool = True, workers: int = 0, **changes) -> DataConfig:
    limit = {"memory_limit_gb": 0} if streamed else {}
    cache = str(root.parent / "cache")
    return DataConfig(
        "shards", str(root), image_size=8, workers=workers, cache=cache, **limit, **changes
    )


def pairs(batches) -> list[tuple[int, int]]:
    """Return (grey, label) of every image of some batches."""
    return [
        pair
        for images, labels in batches
        for pair in zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)
    ]


def read_everything(root: Path, streamed: bool) -> list[tuple[int, int]]:
    source = sets.load(config(root, streamed))
    return [pair for split in COUNTS for pair in pairs(getattr(source, split).once(4))]


# reading


def test_streamed_and_in_memory_give_what_was_written(root):
    stream, whole = sets.load(config(root)), sets.load(config(root, streamed=False))
    assert isinstance(stream.train, Stream)
    assert isinstance(whole.train, MemorySplit)
    for split in COUNTS:
        assert pairs(getattr(stream, split).once(4)) == expected(split)
        assert pairs(getattr(whole, split).once(4)) == expected(split)
        assert len(getattr(stream, split)) == len(getattr(whole, split)) == COUNTS[split]
    assert (stream.num_classes, stream.in_chans, stream.image_size) == (3, 3, 8)


def test_worker_processes_give_every_image_once(root):
    split = sets.load(config(root, workers=2)).train
    assert sorted(pairs(split.once(4))) == expected("train")


def test_batches_have_the_size_asked_for(root):
    sizes = [len(labels) for _, labels in sets.load(config(root)).test.once(4)]
    assert sizes == [4, 4, 3]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_shards(samples(), tmp_path / name, CLASSES, per_shard=4)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]
    # 25, 7 and 11 samples by 4 make 7, 2 and 3 shards, with manifest, index and timm's file 15.
    assert len(files[0]) == 15


def test_validation_is_cut_from_train_where_there_is_none(tmp_path):
    some = [sample for sample in samples() if sample[0] != "validation"]
    write_shards(some, tmp_path / "insects", CLASSES, per_shard=4)
    source = sets.load(config(tmp_path / "insects", streamed=False))
    both = pairs(source.train.once(9)) + pairs(source.validation.once(9))
    assert sorted(both) == expected("train")
    assert len(source.validation) >= len(CLASSES)
    with pytest.raises(UsageError, match="validation"):
        sets.load(config(tmp_path / "insects"))


# sharing out


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 13])
def test_evaluation_counts_every_image_once(root, world_size):
    """Uneven: 3 shards with 4, 4 and 3 images; two of 13 ranks have none."""
    split = sets.load(config(root)).test
    ranks = [pairs(split.once(2, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [pair for rank in ranks for pair in rank] == expected("test")
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 12])
def test_every_rank_makes_as_many_batches(root, world_size):
    split = sets.load(config(root)).train
    for epoch in range(3):
        ranks = [
            list(split.shuffled(2, seed=5, epoch=epoch, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in ranks} == {25 // (2 * world_size)}
        assert {len(labels) for batches in ranks for _, labels in batches} == {2}
        seen = [pair for batches in ranks for pair in pairs(batches)]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(expected("train"))


def test_steps_leave_out_less_than_one_global_batch(root):
    split = sets.load(config(root)).train
    assert [split.steps(size, 2) for size in (1, 2, 4, 12, 13)] == [12, 6, 3, 1, 0]
    assert split.steps(4) == 6


def test_fewer_shards_than_ranks_will_do(root):
    """The 11 test images lie in 3 shards."""
    split = sets.load(config(root)).test
    ranks = [
        pairs(split.shuffled(2, seed=0, epoch=0, rank=rank, world_size=5)) for rank in range(5)
    ]
    assert sorted(map(len, ranks)) == [2] * 5


# order


def shuffled(root: Path, seed: int, epoch: int, workers: int = 0) -> list[tuple[int, int]]:
    return pairs(sets.load(config(root, workers=workers)).train.shuffled(5, seed=seed, epoch=epoch))


def test_order_comes_from_seed_and_epoch(root):
    torch.manual_seed(0)
    first = shuffled(root, 1, 0)
    torch.manual_seed(1)
    assert shuffled(root, 1, 0) == first
    assert sorted(first) == expected("train")
    assert shuffled(root, 1, 1) != first
    assert shuffled(root, 2, 0) != first


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_order_does_not_depend_on_the_workers(root, workers):
    assert shuffled(root, 1, 0, workers=workers) == shuffled(root, 1, 0)


@pytest.mark.parametrize("kept", ["batches", "parts"])
def test_batches_that_are_kept_do_not_change(root, kept):
    """Worker processes write the next batches where the last ones were, once nothing holds them."""
    found = []
    for images, _ in sets.load(config(root, workers=2)).train.shuffled(2, seed=1, epoch=0):
        found.append(images[1:] if kept == "parts" else images)
    batches = sets.load(config(root)).train.shuffled(2, seed=1, epoch=0)
    again = [images[1:] if kept == "parts" else images for images, _ in batches]
    assert len(found) > 10 and all(map(torch.equal, found, again))


def test_rooms_are_free_again_once_nothing_holds_their_batch():
    buffers = Buffers(1, images=3, size=4)
    buffers.memory.zero_()
    places = len(buffers.memory)
    part = buffers.batch(buffers.take(), 3)[1:, 0]
    second = buffers.batch(buffers.take(), 2)
    assert second.shape == (2, 3, 4, 4) and len(buffers.lent) == 2
    taken = buffers.take()
    copy = buffers.batch(taken, 1)
    buffers.memory[taken].fill_(9)
    assert len(buffers.lent) == 2 and len(buffers.free) == places - 2 and not (copy == 9).any()
    del second
    assert len(buffers.free) == places - 1
    del part
    assert sorted(buffers.free) == list(range(places)) and not buffers.lent


def test_the_number_of_workers_is_no_part_of_a_runs_identity(root):
    assert run_id(config(root, workers=3)) == run_id(config(root, workers=2))
    assert run_id(config(root, lanes=3)) != run_id(config(root))


@pytest.mark.parametrize("lanes", [1, 3, 16])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_see_together_what_one_rank_sees(root, world_size, lanes):
    """Step by step, for the same global batch of 12, whatever the number of ranks."""
    split = sets.load(config(root, lanes=lanes)).train
    whole = [pairs([batch]) for batch in split.shuffled(12, seed=3, epoch=1)]
    ranks = [
        [
            pairs([batch])
            for batch in split.shuffled(
                12 // world_size, seed=3, epoch=1, rank=rank, world_size=world_size
            )
        ]
        for rank in range(world_size)
    ]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_skipped_steps_leave_the_tail(root, first):
    split = sets.load(config(root)).train
    whole = [
        [pairs([batch]) for batch in split.shuffled(3, seed=0, epoch=2, rank=rank, world_size=2)]
        for rank in (0, 1)
    ]
    for rank in (0, 1):
        tail = split.shuffled(3, seed=0, epoch=2, rank=rank, world_size=2, first=first)
        assert [pairs([batch]) for batch in tail] == whole[rank][first:]


def test_another_number_of_ranks_goes_on_where_the_first_stopped(root):
    """Two steps of 6 images on two ranks, the others on three: none is lost or repeated."""
    split = sets.load(config(root)).train
    before = [
        pair
        for rank in (0, 1)
        for pair in pairs(list(split.shuffled(3, seed=0, epoch=0, rank=rank, world_size=2))[:2])
    ]
    after = [
        pair
        for rank in (0, 1, 2)
        for pair in pairs(split.shuffled(2, seed=0, epoch=0, rank=rank, world_size=3, first=2))
    ]
    assert sorted(before + after) == sorted(pairs(split.shuffled(6, seed=0, epoch=0)))
    assert len(set(before + after)) == 24


def test_skipped_steps_read_nothing(root):
    """Only the last step is left, of the shards of four images; the others may be gone."""
    source = sets.load(config(root, lanes=1))
    order, _ = source.train.samples.order(0, 0)
    left = {(int(number) // 4) for number in order[20:24]}
    for number in set(range(7)) - left:
        (root / f"train-{number:06d}.tar").unlink()
    assert len(pairs(source.train.shuffled(4, seed=0, epoch=0, first=5))) == 4


def test_lanes_let_a_rank_read_its_own_shards_only(tmp_path):
    """64 samples in 16 shards, 4 lanes, 2 ranks, global batches of 8: half of the shards each."""
    some = [("train", picture(grey), 0) for grey in range(64)]
    others = [(split, picture(0), 0) for split in ("validation", "test")]
    write_shards([*some, *others], tmp_path / "a", ["x"], per_shard=4)
    split = sets.load(config(tmp_path / "a", lanes=4)).train
    ranks = [
        {grey // 4 for grey, _ in pairs(split.shuffled(4, seed=0, epoch=0, rank=r, world_size=2))}
        for r in (0, 1)
    ]
    assert [len(shards) for shards in ranks] == [8, 8]
    assert not ranks[0] & ranks[1]


def test_a_batch_mixes_images_of_many_shards(tmp_path):
    """By lanes of 16 samples each, a batch of 8 holds two of each lane."""
    samples_ = ShardSamples(
        Folder(tmp_path),
        [Shard(f"{n}", "train", 4, 1, "") for n in range(16)],
        classes=1,
        lanes=4,
    )
    order, lane = samples_.order(0, 0)
    assert sorted(order.tolist()) == list(range(64))
    assert lane.view(8, 8).sort(1).values.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 8
    for each in range(4):
        assert len({number // 4 for number in order[lane == each].tolist()}) == 4


def test_a_rank_sees_other_images_every_epoch(root):
    split = sets.load(config(root)).train
    seen = [
        frozenset(pairs(split.shuffled(1, seed=0, epoch=epoch, rank=0, world_size=2)))
        for epoch in range(4)
    ]
    assert len(set(seen)) > 1


# damage


def edit(root: Path, name: str = VICTIM, **changes) -> None:
    """Change a shard's entry in the manifest."""
    manifest = json.loads((root / MANIFEST).read_text())
    entry = next(entry for entry in manifest["shards"] if entry["name"] == name)
    entry.update(changes)
    (root / MANIFEST).write_text(json.dumps(manifest))


def edit_as_is(root: Path, name: str = VICTIM, **changes) -> None:
    """Let the manifest say what the shard is now, so that only other checks can tell."""
    content = (root / name).read_bytes()
    edit(root, name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), **changes)


def replace_shard(root: Path, content: bytes, in_manifest: bool) -> None:
    (root / VICTIM).write_bytes(content)
    if in_manifest:
        edit(root, bytes=len(content))


def offsets(root: Path, member: int) -> tuple[int, int]:
    """Return where the header and the data of the shard's n-th member begin."""
    with tarfile.open(root / VICTIM) as tar:
        found = tar.getmembers()[member]
    return found.offset, found.offset_data


CUTS = {
    "at a sample's boundary": lambda root: offsets(root, 4)[0],
    "inside a sample": lambda root: offsets(root, 5)[0],
    "inside a header": lambda root: offsets(root, 4)[0] + 100,
    "inside the header before the data": lambda root: offsets(root, 4)[1] - 100,
    "in an image": lambda root: offsets(root, 5)[1] + 20,
    "at the start": lambda root: 0,
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("in_manifest", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_cut_shard_is_named(root, cut, in_manifest, streamed):
    content = (root / VICTIM).read_bytes()[: CUTS[cut](root)]
    replace_shard(root, content, in_manifest)
    with pytest.raises(UsageError, match=VICTIM):
        read_everything(root, streamed)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("left", [0, 1, 3])
def test_shard_with_fewer_samples_is_named(root, left, streamed):
    """A whole tar, of the size and hash in the manifest; only the count tells."""
    with TarWriter(str(root / VICTIM), mtime=0.0) as tar:
        for place in range(left):
            tar.write({"__key__": f"{place}", "png": picture(204 + place), "cls": b"0"})
    edit_as_is(root)
    with pytest.raises(UsageError, match=rf"{VICTIM} has {left} samples, the manifest says 4"):
        read_everything(root, streamed)


@pytest.mark.parametrize("count", [3, 5])
def test_count_that_differs_from_the_manifest_is_named(root, count):
    edit(root, count=count)
    with pytest.raises(UsageError, match=rf"{VICTIM}.* 4 samples.* {count}"):
        read_everything(root, True)


@pytest.mark.parametrize("part", ["header", "label", "image", "padding", "end"])
@pytest.mark.parametrize("workers", [0, 1])
def test_flipped_bit_is_named_wherever_it_lies(root, part, workers):
    header, image = offsets(root, 2)
    label = offsets(root, 3)[1]
    place = {"header": header + 3, "image": image + 40, "label": label,
             "padding": image + 500, "end": (root / VICTIM).stat().st_size - 1}[part]  # fmt: skip
    flip(root / VICTIM, place)
    with pytest.raises(UsageError, match=rf"{VICTIM}.*SHA-256") as caught:
        pairs(sets.load(config(root, workers=workers)).test.once(4))
    assert len(str(caught.value).splitlines()) == 1
    train = sets.load(config(root, workers=workers)).train
    assert sorted(pairs(train.shuffled(5, seed=0, epoch=0))) == expected("train")


def test_each_shard_is_checked_once_in_a_run_by_whichever_process(root):
    """What changes after that is noticed by the next run; a shard cut meanwhile at once."""
    split = sets.load(config(root, workers=2)).test
    assert split.samples.checked.tolist() == [0, 0, 0]
    first = pairs(split.once(4))
    assert split.samples.checked.tolist() == [1, 1, 1]
    flip(root / VICTIM, (root / VICTIM).stat().st_size - 1)
    assert pairs(split.once(4)) == first
    (root / VICTIM).write_bytes((root / VICTIM).read_bytes()[: offsets(root, 4)[1] + 9])
    with pytest.raises(UsageError, match=rf"{VICTIM} was cut"):
        pairs(split.once(4))


def test_shard_that_goes_missing_is_named(root):
    split = sets.load(config(root)).test
    (root / VICTIM).unlink()
    with pytest.raises(UsageError, match=rf"{VICTIM}.*not on disk"):
        pairs(split.once(4))


def test_worker_names_a_damaged_shard_in_one_line(root):
    edit(root, count=3)
    with pytest.raises(UsageError, match=VICTIM) as caught:
        pairs(sets.load(config(root, workers=1)).test.once(4))
    assert len(str(caught.value).splitlines()) == 1


def test_shuffled_notices_a_short_shard(root):
    edit(root, "train-000003.tar", count=5)
    with pytest.raises(UsageError, match=r"train-000003\.tar"):
        shuffled(root, 0, 0)


def test_missing_shard_is_named(root):
    (root / VICTIM).unlink()
    with pytest.raises(UsageError, match=VICTIM):
        sets.load(config(root))


def test_grown_shard_is_named(root):
    replace_shard(root, (root / VICTIM).read_bytes() + b"\0" * 512, in_manifest=False)
    with pytest.raises(UsageError, match=VICTIM):
        sets.load(config(root))


def test_changed_label_is_noticed(root):
    """Only the SHA-256 of the manifest tells."""
    content = bytearray((root / VICTIM).read_bytes())
    place = offsets(root, 1)[1]
    assert content[place] == ord(b"0") + 204 % 3
    content[place] = ord(b"1")
    replace_shard(root, bytes(content), in_manifest=False)
    with pytest.raises(UsageError, match=VICTIM):
        read_everything(root, False)


@pytest.mark.parametrize(
    "sample",
    [
        {"png": picture(0)},
        {"cls": b"0"},
        {"png": picture(0), "cls": b"cow"},
        {"png": b"damaged", "cls": b"0"},
        {"png": picture(0), "cls": b"3"},
        {"png": picture(0), "cls": b"-1"},
    ],
    ids=["no cls", "no image", "no number", "damaged image", "no such class", "negative"],
)
def test_wrong_sample_is_named_with_its_shard(root, sample):
    with TarWriter(str(root / VICTIM), mtime=0.0) as tar:
        tar.write({"__key__": "odd", **sample})
    edit_as_is(root, count=1)
    with pytest.raises(UsageError, match=rf"{VICTIM}.*odd"):
        read_everything(root, True)


# images that cannot be decoded


def with_bad(root: Path, *greys: int) -> Path:
    """Write the same shards, then change some images to bytes that only begin like a PNG."""
    folder = root / "insects"
    write_shards(samples(), folder, CLASSES, per_shard=4)
    for grey in greys:
        split = next(split for split in COUNTS if 0 <= grey - STARTS[split] < COUNTS[split])
        path = folder / f"{split}-{(grey - STARTS[split]) // 4:06d}.tar"
        image = picture(grey)
        assert path.read_bytes().count(image) == 1
        path.write_bytes(path.read_bytes().replace(image, image[:8].ljust(len(image), b"x")))
        edit_as_is(folder, path.name)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_first_bad_image_stops_unless_some_are_allowed(tmp_path, workers):
    split = sets.load(config(with_bad(tmp_path, 9), workers=workers)).train
    others = multiprocessing.active_children()
    with pytest.raises(UsageError) as caught:
        pairs(split.shuffled(5, seed=0, epoch=0))
    left = [each for each in multiprocessing.active_children() if each not in others]
    assert not left, "the error, which is at hand, keeps no worker alive"
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in ("train-000002.tar", "train000002_000001", "data.max_bad_images allows 0"):
        assert part in message


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_give_way_to_their_neighbours(tmp_path, capfd, workers):
    """9 to the next of shard 8..11, 23 to the first of 20..23; the batches stay equal."""
    root = with_bad(tmp_path, 9, 23)
    split = sets.load(config(root, workers=workers, max_bad_images=2)).train
    for epoch in (0, 1):
        batches = list(split.shuffled(5, seed=0, epoch=epoch))
        assert [len(labels) for _, labels in batches] == [5] * 5
        wanted = [{9: 10, 23: 20}.get(grey, grey) for grey in range(25)]
        assert sorted(pairs(batches)) == sorted((grey, grey % 3) for grey in wanted)
    said = capfd.readouterr().err
    assert said.count("warning: ") == 2
    assert "train-000002.tar sample train000002_000001" in said
    assert "bad image 2 of at most 2" in said


def test_one_bad_image_too_many_stops_and_is_named(tmp_path):
    split = sets.load(config(with_bad(tmp_path, 1, 9, 23), max_bad_images=2)).train
    with pytest.raises(UsageError, match=r"train-00000[025]\.tar.*allows 2 bad images"):
        pairs(split.shuffled(5, seed=0, epoch=0))


def test_bad_images_of_all_splits_count_together(tmp_path):
    source = sets.load(config(with_bad(tmp_path, 9, 204), max_bad_images=1))
    pairs(source.train.shuffled(5, seed=0, epoch=0))
    with pytest.raises(UsageError, match="test-000001"):
        pairs(source.test.once(4))


def test_evaluation_leaves_bad_images_out(tmp_path):
    split = sets.load(config(with_bad(tmp_path, 204), max_bad_images=1)).test
    assert pairs(split.once(4)) == [pair for pair in expected("test") if pair[0] != 204]


def test_shard_of_bad_images_only_is_no_endless_search(tmp_path):
    split = sets.load(config(with_bad(tmp_path, 24), max_bad_images=9)).train
    with pytest.raises(UsageError, match="none of its neighbours"):
        pairs(split.shuffled(5, seed=0, epoch=0))


# tars that others wrote


def by_webdataset(root: Path) -> None:
    """Write the same samples by webdataset: other members between, long names, folders."""
    root.mkdir()
    for split, word in (("train", "train"), ("validation", "val"), ("test", "test")):
        with TarWriter(str(root / f"x-{word}-0.tar"), mtime=0.0) as tar:
            for grey, label in expected(split):
                key = f"{'long' * 40}/{grey:03d}"
                tar.write({"__key__": key, "cls": str(label).encode(), "json": b"{}",
                           "PNG": picture(grey), "txt": b"note"})  # fmt: skip


def test_foreign_tars_are_adopted(tmp_path):
    by_webdataset(tmp_path / "insects")
    adopt(tmp_path / "insects")
    for streamed in (False, True):
        found = read_everything(tmp_path / "insects", streamed)
        assert found == [pair for split in COUNTS for pair in expected(split)]
    assert all(problem is None for _, problem in verify(tmp_path / "insects"))


def test_shards_without_index_are_walked_through(root):
    (root / INDEX).unlink()
    assert read_everything(root, True) == [pair for split in COUNTS for pair in expected(split)]
    assert not (root.parent / "cache" / "index").exists()


def test_index_of_other_shards_is_not_used(root):
    """Written anew with one sample more, the index left behind."""
    with TarWriter(str(root / VICTIM), mtime=0.0) as tar:
        for grey in range(204, 209):
            tar.write({"__key__": f"{grey}", "png": picture(grey), "cls": b"0"})
    edit_as_is(root, count=5)
    found = pairs(sets.load(config(root)).test.once(4))
    assert found[4:9] == [(grey, 0) for grey in range(204, 209)]


def test_tars_without_a_split_in_their_name_are_refused(tmp_path):
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "a", "png": picture(0), "cls": b"0"})
    with pytest.raises(UsageError, match=r"a\.tar.*neither train"):
        adopt(tmp_path)


# from afar


@pytest.fixture
def served(root):
    """The shards behind a web server; yields (URL, names asked for)."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(root.parent))

        def log_message(self, *_):
            if self.command == "GET":
                asked.append(self.path.rpartition("/")[2])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/insects", asked
        server.shutdown()
        thread.join()


def remote_config(url: str, root: Path, **changes) -> DataConfig:
    return replace(config(root), root=url, allow_remote=True, **changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_fetched_once_and_read_as_local_ones(root, served, workers):
    url, asked = served
    source = sets.load(remote_config(url, root, workers=workers))
    assert not [name for name in asked if name.endswith(".tar")]
    assert pairs(source.test.once(4)) == expected("test")
    tars = [f"test-00000{number}.tar" for number in range(3)]
    assert sorted({name for name in asked if name.endswith(".tar")}) == tars
    asked.clear()
    again = sets.load(remote_config(url, root))
    assert pairs(again.test.once(4)) == expected("test")
    assert not [name for name in asked if name.endswith(".tar")]
    assert source.name == again.name == "insects"


def test_damaged_cache_is_fetched_again(root, served):
    url, asked = served
    pairs(sets.load(remote_config(url, root)).test.once(4))
    for path in (root.parent / "cache" / "shards").glob("*.tar"):
        flip(path, 700)
    asked.clear()
    assert pairs(sets.load(remote_config(url, root)).test.once(4)) == expected("test")
    assert len({name for name in asked if name.endswith(".tar")}) == 3


def test_shard_that_is_not_what_the_manifest_says_is_named_by_its_url(root, served):
    url, _ = served
    flip(root / VICTIM, 700)
    with pytest.raises(UsageError, match=rf"{url}/{VICTIM}.*SHA-256"):
        pairs(sets.load(remote_config(url, root)).test.once(4))
    assert len(list((root.parent / "cache" / "shards").glob("*.tar"))) == 1


def test_missing_remote_shard_is_named(root, served):
    url, _ = served
    (root / VICTIM).unlink()
    with pytest.raises(UsageError, match=rf"{url}/{VICTIM} is not there"):
        pairs(sets.load(remote_config(url, root)).test.once(4))


def test_a_network_that_fails_is_not_blamed_on_the_disk(root, served, monkeypatch):
    from fsspec.implementations.http import HTTPFile

    def fails(self, length=-1):
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    url, _ = served
    source = sets.load(remote_config(url, root))
    monkeypatch.setattr(HTTPFile, "read", fails)
    with pytest.raises(UsageError) as caught:
        pairs(source.test.once(4))
    assert "Connection reset" in str(caught.value)
    assert str(caught.value).startswith(f"cannot fetch {url}/test-00000")
    assert "cannot write" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "allowed", "named"),
    [
        ("http://127.0.0.1:1/x", False, "data.allow_remote"),
        ("s3://bucket/x", False, "data.allow_remote"),
        ("pipe:cat x", True, "commands are not run"),
        ("pipe://cat x", True, "commands are not run"),
        ("ftp://host/x", True, "only http"),
        ("http://127.0.0.1:1/x", True, "cannot be reached"),
    ],
)
def test_remote_roots_are_off_unless_allowed(tmp_path, place, allowed, named):
    wanted = DataConfig("shards", place, allow_remote=allowed, cache=str(tmp_path))
    with pytest.raises(UsageError, match=named):
        sets.load(wanted)


# manifests


def change_first(**changes):
    def change(manifest: dict) -> None:
        manifest["shards"][0].update(changes)

    return change


BAD_MANIFESTS = {
    "no shards": lambda manifest: manifest.pop("shards"),
    "no classes": lambda manifest: manifest.update(classes=[]),
    "unknown key": change_first(colour="red"),
    "missing key": lambda manifest: manifest["shards"][0].pop("sha256"),
    "count in words": change_first(count="four"),
    "unknown split": change_first(split="val"),
    "newer format": lambda manifest: manifest.update(format=2),
    "shard elsewhere": change_first(name="../train-000000.tar"),
    "hash elsewhere": change_first(sha256="../../train-000000"),
    "no test": lambda manifest: manifest.update(
        shards=[entry for entry in manifest["shards"] if entry["split"] != "test"]
    ),
    "no train": lambda manifest: manifest.update(
        shards=[entry for entry in manifest["shards"] if entry["split"] != "train"]
    ),
}


@pytest.mark.parametrize("fault", BAD_MANIFESTS)
def test_bad_manifest_is_named(root, fault):
    manifest = json.loads((root / MANIFEST).read_text())
    BAD_MANIFESTS[fault](manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=MANIFEST):
        sets.load(config(root))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": 3, "classes": ["a"]}'])
def test_garbled_manifest_is_named(root, content):
    (root / MANIFEST).write_text(content)
    with pytest.raises(UsageError, match=MANIFEST):
        sets.load(config(root))


def test_folder_without_manifest_is_named(tmp_path):
    with pytest.raises(UsageError, match=MANIFEST):
        sets.load(config(tmp_path))


def test_limit_is_refused_where_it_cannot_be_kept(root):
    assert len(sets.load(config(root, streamed=False, train_limit=9)).train) == 9
    with pytest.raises(UsageError, match="train_limit"):
        sets.load(config(root, train_limit=9))


def workers_of(batches) -> list[multiprocessing.Process]:
    """Take the first batch; return the two processes that were started for it."""
    others = multiprocessing.active_children()
    next(batches)
    workers = [each for each in multiprocessing.active_children() if each not in others]
    assert len(workers) == 2
    return workers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_workers_outlive_what_tells_a_training_to_stop(root, number):
    expected = shuffled(root, 0, 0)
    stream = sets.load(config(root, workers=2)).train
    batches = stream.shuffled(5, seed=0, epoch=0)
    workers = workers_of(batches)
    for worker in workers:
        os.kill(worker.pid, number)
    assert pairs(batches) == expected[5:]
    assert all(worker.is_alive() for worker in workers)


def test_workers_are_kept_from_one_epoch_to_the_next(root):
    split = sets.load(config(root, workers=2)).train
    others = multiprocessing.active_children()
    first = pairs(split.shuffled(1, seed=0, epoch=0))
    kept = {each.pid for each in multiprocessing.active_children() if each not in others}
    assert len(kept) == 2
    again = [pairs(split.to(torch.device("cpu")).shuffled(1, seed=0, epoch=e)) for e in (1, 0)]
    assert again[1] == first and sorted(again[0]) == sorted(first) != again[0]
    assert {each.pid for each in multiprocessing.active_children() if each not in others} == kept


@pytest.mark.parametrize("end", ["other size", "broken off", "dropped", "error in the caller"])
def test_workers_end_when_they_are_not_needed_any_more(root, end):
    split = sets.load(config(root, workers=2)).train
    others = multiprocessing.active_children()
    pairs(split.shuffled(1, seed=0, epoch=0))
    workers = [each for each in multiprocessing.active_children() if each not in others]
    assert len(workers) == 2
    if end == "other size":
        assert len(pairs(split.shuffled(3, seed=0, epoch=1))) == 24
    elif end == "broken off":
        for _ in split.shuffled(1, seed=0, epoch=1):
            break
    elif end == "dropped":
        del split
    else:
        with pytest.raises(ZeroDivisionError):
            for _ in split.shuffled(1, seed=0, epoch=1):
                1 / 0  # noqa: B018
        gc.collect()
    for worker in workers:
        worker.join(2)
    assert not any(worker.is_alive() for worker in workers)


def test_two_loops_over_a_split_at_once(root):
    split = sets.load(config(root, workers=1)).train
    expected = pairs(split.shuffled(1, seed=0, epoch=0))
    others = multiprocessing.active_children()
    together = zip(
        split.shuffled(1, seed=0, epoch=0), split.shuffled(1, seed=0, epoch=0), strict=True
    )
    assert [pairs([first]) + pairs([second]) for first, second in together] == [
        [each, each] for each in expected
    ]
    assert len(multiprocessing.active_children()) == len(others)


def test_a_worker_that_dies_between_two_epochs_is_told(root):
    split = sets.load(config(root, workers=1)).train
    others = multiprocessing.active_children()
    expected = pairs(split.shuffled(1, seed=0, epoch=0))
    (worker,) = [each for each in multiprocessing.active_children() if each not in others]
    worker.kill()
    worker.join()
    with pytest.raises(RunFailed, match="images died: killed by SIGKILL"):
        pairs(split.shuffled(1, seed=0, epoch=1))
    assert pairs(split.shuffled(1, seed=0, epoch=0)) == expected


def test_a_process_forked_meanwhile_leaves_the_workers_alone(root):
    """It holds copies of all that there is, and collects them."""
    split = sets.load(config(root, workers=1)).train
    expected = pairs(split.shuffled(1, seed=0, epoch=0))
    child = os.fork()
    if not child:
        del split
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert pairs(split.shuffled(1, seed=0, epoch=0)) == expected


@pytest.mark.slow
def test_a_worker_that_dies_is_told_where_a_batch_is_waited_for_and_not_before(root):
    """torch would raise an error in whatever line is being run."""
    batches = sets.load(config(root, workers=2)).train.shuffled(1, seed=0, epoch=0)
    workers = workers_of(batches)
    for worker in workers:
        worker.kill()
        worker.join()
    with pytest.raises(RunFailed, match=r"images died: killed by SIGKILL \(out of memory"):
        list(batches)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_little_shared_memory_is_told_in_one_line(monkeypatch, tmp_path, workers: int) -> None:
    """Room for 2 x 2 + 3 batches of 4 images; a process that touched more would be killed."""
    monkeypatch.setattr("autosparse.data.workers.SHARED", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    needed = (2 * 2 + 3) * 4 * 3 * 128 * 128
    assert len(Buffers(2, 2, 128).memory) == 7, "there is room for a smaller batch"
    if not workers:
        assert len(Buffers(0, 4, 128).memory) == 0
        return
    with pytest.raises(UsageError) as error:
        Buffers(2, 4, 128)
    assert str(error.value) == (
        f"{tmp_path} has 1 MB free, and 2 data.workers need {needed / 1e6:.0f} MB for their "
        "batches: give it more (docker run --shm-size), or lower data.workers or the batch"
    )


def open_files() -> list[str]:
    found = Path("/proc/self/fd")
    return [str(each.readlink()) for each in found.iterdir() if each.is_symlink()]


def test_shards_in_memory_may_be_mirrored_every_other_epoch(root):
    """The check for streamed sets refused it, before it was known that these fit into memory."""
    train = sets.load(replace(config(root), memory_limit_gb=4, augment="shift+altflip")).train
    assert isinstance(train, MemorySplit) and train.alternating
    with pytest.raises(UsageError, match="for images held in memory"):
        sets.load(replace(config(root), memory_limit_gb=0, augment="shift+altflip"))


def test_a_url_is_refused_before_anything_is_read(tmp_path):
    for url, problem in (("https://example.org/x", "set data.allow_remote to true"),
                         ("ftp://example.org/x", "only http, https, gs, s3"),
                         ("pipe:cat x.tar", "commands are not run")):  # fmt: skip
        with pytest.raises(UsageError, match=problem):
            sets.check_config(DataConfig("shards", url, cache=str(tmp_path / "cache")))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
def test_tars_are_closed_with_what_reads_them(tmp_path, recwarn):
    """Not left open for the garbage collector, which warns of each."""
    path = tmp_path / "a.tar"
    path.write_bytes(b"content")
    files = tars.Files()
    assert files.read(path, 3, 2) == b"te"
    assert str(path) in open_files()
    copied = pickle.loads(pickle.dumps(files))
    assert copied.read(path, 0, 3) == b"con"
    del files, copied
    gc.collect()
    assert str(path) not in open_files()
    assert not [each for each in recwarn if issubclass(each.category, ResourceWarning)]
