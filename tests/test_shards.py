"""Shards: written and read whole, shared out exactly once, and every damage named."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from autosparse import data
from autosparse.config import DataConfig, run_id
from autosparse.data.shards import MANIFEST, ShardStream, write_shards
from autosparse.data.source import MemorySplit
from autosparse.errors import UsageError

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
            yield split, picture(grey), "png", grey % 3


def expected(split: str) -> list[tuple[int, int]]:
    return [(STARTS[split] + place, (STARTS[split] + place) % 3) for place in range(COUNTS[split])]


@pytest.fixture
def root(tmp_path):
    """Shards of 4 samples; the last ones hold 1, 3 and 3."""
    write_shards(samples(), tmp_path / "insects", CLASSES, per_shard=4)
    return tmp_path / "insects"


def config(root: Path, streamed: bool = True, workers: int = 0, **changes) -> DataConfig:
    limit = {"memory_limit_gb": 0} if streamed else {}
    return DataConfig("shards", str(root), image_size=8, workers=workers, **limit, **changes)


def pairs(batches) -> list[tuple[int, int]]:
    """Return (grey, label) of every image of some batches."""
    return [
        pair
        for images, labels in batches
        for pair in zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)
    ]


def read_everything(root: Path, streamed: bool) -> list[tuple[int, int]]:
    source = data.load(config(root, streamed))
    return [pair for split in COUNTS for pair in pairs(getattr(source, split).once(4))]


# reading


def test_streamed_and_in_memory_give_what_was_written(root):
    stream, whole = data.load(config(root)), data.load(config(root, streamed=False))
    assert isinstance(stream.train, ShardStream)
    assert isinstance(whole.train, MemorySplit)
    for split in COUNTS:
        assert pairs(getattr(stream, split).once(4)) == expected(split)
        assert pairs(getattr(whole, split).once(4)) == expected(split)
        assert len(getattr(stream, split)) == len(getattr(whole, split)) == COUNTS[split]
    assert (stream.num_classes, stream.in_chans, stream.image_size) == (3, 3, 8)


def test_worker_processes_give_every_image_once(root):
    split = data.load(config(root, workers=2)).train
    assert sorted(pairs(split.once(4))) == expected("train")


def test_batches_have_the_size_asked_for(root):
    sizes = [len(labels) for _, labels in data.load(config(root)).test.once(4)]
    assert sizes == [4, 4, 3]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_shards(samples(), tmp_path / name, CLASSES, per_shard=4)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]
    # 25, 7 and 11 samples by 4 make 7, 2 and 3 shards, with the manifest 13 files.
    assert len(files[0]) == 13


def test_validation_is_cut_from_train_where_there_is_none(tmp_path):
    some = [sample for sample in samples() if sample[0] != "validation"]
    write_shards(some, tmp_path / "insects", CLASSES, per_shard=4)
    source = data.load(config(tmp_path / "insects", streamed=False))
    both = pairs(source.train.once(9)) + pairs(source.validation.once(9))
    assert sorted(both) == expected("train")
    assert len(source.validation) >= len(CLASSES)
    with pytest.raises(UsageError, match="validation"):
        data.load(config(tmp_path / "insects"))


# sharing out


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_counts_every_image_once(root, world_size):
    """Uneven: 3 shards with 4, 4 and 3 images; two of five ranks have none."""
    split = data.load(config(root)).test
    ranks = [pairs(split.once(2, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(pair for rank in ranks for pair in rank) == expected("test")


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_rank_makes_as_many_batches(root, world_size):
    split = data.load(config(root)).train
    for epoch in range(4):
        ranks = [
            list(split.shuffled(1, seed=5, epoch=epoch, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        assert {len(batches) for batches in ranks} == {split.steps(1, world_size)}
        seen = [pair for batches in ranks for pair in pairs(batches)]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(expected("train"))


def test_steps_are_what_the_smallest_shards_allow(root):
    split = data.load(config(root)).train
    # 6 shards of 4 and one of 1. A rank of two has at least 3 shards: 1 + 4 + 4 = 9 images.
    assert [split.steps(size, 2) for size in (1, 2, 4, 10)] == [9, 4, 2, 0]
    assert split.steps(4) == 25 // 4


def test_more_ranks_than_shards_are_refused(root):
    split = data.load(config(root)).test
    with pytest.raises(UsageError, match="3 shards"):
        list(split.shuffled(1, seed=0, epoch=0, rank=0, world_size=4))


# order


def shuffled(root: Path, seed: int, epoch: int, workers: int = 0) -> list[tuple[int, int]]:
    return pairs(data.load(config(root, workers=workers)).train.shuffled(5, seed=seed, epoch=epoch))


def test_order_comes_from_seed_and_epoch(root):
    torch.manual_seed(0)
    first = shuffled(root, 1, 0)
    torch.manual_seed(1)
    assert shuffled(root, 1, 0) == first
    assert sorted(first) == expected("train")
    assert shuffled(root, 1, 1) != first
    assert shuffled(root, 2, 0) != first


def test_order_is_the_same_again_with_workers(root):
    assert shuffled(root, 1, 0, workers=2) == shuffled(root, 1, 0, workers=2)


def test_the_number_of_workers_is_part_of_a_streamed_runs_identity(root):
    """Samples come from the workers in turn, so their order depends on how many there are."""
    two, three = (replace(config(root), workers=workers) for workers in (2, 3))
    assert run_id(two) != run_id(three)
    assert run_id(replace(two, name="folder")) == run_id(replace(three, name="folder"))


def test_a_rank_sees_other_images_every_epoch(root):
    split = data.load(config(root)).train
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
    """A whole tar, of the size in the manifest; only the count tells."""
    with TarWriter(str(root / VICTIM), mtime=0.0) as tar:
        for place in range(left):
            tar.write({"__key__": f"{place}", "png": picture(204 + place), "cls": b"0"})
    edit(root, bytes=(root / VICTIM).stat().st_size)
    with pytest.raises(UsageError, match=VICTIM):
        read_everything(root, streamed)


@pytest.mark.parametrize("count", [3, 5])
def test_count_that_differs_from_the_manifest_is_named(root, count):
    edit(root, count=count)
    with pytest.raises(UsageError, match=rf"{VICTIM}.* 4 samples.* {count}"):
        read_everything(root, True)


def test_worker_names_a_damaged_shard_in_one_line(root):
    edit(root, count=3)
    with pytest.raises(UsageError, match=VICTIM) as caught:
        pairs(data.load(config(root, workers=1)).test.once(4))
    assert "Traceback" not in str(caught.value)


def test_shuffled_notices_a_short_shard(root):
    edit(root, "train-000003.tar", count=5)
    with pytest.raises(UsageError, match=r"train-000003\.tar"):
        shuffled(root, 0, 0)


def test_missing_shard_is_named(root):
    (root / VICTIM).unlink()
    with pytest.raises(UsageError, match=VICTIM):
        data.load(config(root))


def test_grown_shard_is_named(root):
    replace_shard(root, (root / VICTIM).read_bytes() + b"\0" * 512, in_manifest=False)
    with pytest.raises(UsageError, match=VICTIM):
        data.load(config(root))


def test_changed_label_is_noticed(root):
    """Only the SHA-256 of the manifest tells."""
    content = bytearray((root / VICTIM).read_bytes())
    place = offsets(root, 0)[1]
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
        {"png": picture(0), "cls": b"cat"},
        {"png": b"damaged", "cls": b"0"},
        {"png": picture(0), "cls": b"3"},
        {"png": picture(0), "cls": b"-1"},
    ],
    ids=["no cls", "no image", "no number", "damaged image", "no such class", "negative"],
)
def test_wrong_sample_is_named_with_its_shard(root, sample):
    with TarWriter(str(root / VICTIM), mtime=0.0) as tar:
        tar.write({"__key__": "odd", **sample})
    edit(root, count=1, bytes=(root / VICTIM).stat().st_size)
    with pytest.raises(UsageError, match=rf"{VICTIM}.*odd"):
        read_everything(root, True)


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
        data.load(config(root))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": 3, "classes": ["a"]}'])
def test_garbled_manifest_is_named(root, content):
    (root / MANIFEST).write_text(content)
    with pytest.raises(UsageError, match=MANIFEST):
        data.load(config(root))


def test_folder_without_manifest_is_named(tmp_path):
    with pytest.raises(UsageError, match=MANIFEST):
        data.load(config(tmp_path))


def test_limit_is_refused_where_it_cannot_be_kept(root):
    assert len(data.load(config(root, streamed=False, train_limit=9)).train) == 9
    with pytest.raises(UsageError, match="train_limit"):
        data.load(config(root, train_limit=9))
