"""Tars that others made: read as WebDataset reads them, or refused in a line that helps."""

import gc
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from webdataset import ShardWriter, TarWriter, WebDataset
from webdataset.tariterators import base_plus_ext

from autosparse.core.errors import UsageError
from autosparse.data import sets
from autosparse.data.check import adopt, verify
from autosparse.data.config import DataConfig, IndexConfig
from autosparse.data.manifest import MANIFEST, Reading, read_manifest
from autosparse.data.samples import scan
from autosparse.data.tars import INDEX
from tests.cli.test_main import refuse, run
from tests.conftest import flip
from tests.data.packed import write_shards
from tests.data.test_shards import CLASSES, COUNTS, expected, pairs, picture, samples

Member = tuple[str, bytes]


def image(grey: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: list[Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def plain(greys: list[int], labels: list[int] | None = None) -> list[Member]:
    """Return members of samples whose label is their place, unless it is given."""
    labels = labels or list(range(len(greys)))
    return [
        member
        for grey, label in zip(greys, labels, strict=True)
        for member in ((f"{grey:03d}.png", image(grey)), (f"{grey:03d}.cls", b"%d" % label))
    ]


def greys(path: Path, reading: Reading | None = None) -> list[tuple[int, int]]:
    """Return (grey, label) of a tar's samples."""
    found, content = [], path.read_bytes()
    for offset, size, label in scan(path, reading).tolist():
        with Image.open(io.BytesIO(content[offset : offset + size])) as opened:
            found.append((opened.convert("L").getpixel((0, 0)), label))
    return found


def foreign(root: Path) -> Path:
    """Write a tar of two classes for each split."""
    for place, word in enumerate(("train", "val", "test")):
        write_tar(root / f"x-{word}-000.tar", plain([place * 10, place * 10 + 1]))
    return root


def config(root: object, tmp_path: Path, **changes) -> DataConfig:
    settings = {"image_size": 8, "workers": 0, "memory_limit_gb": 0, **changes}
    return DataConfig("shards", str(root), cache=str(tmp_path / "cache"), **settings)


# splits by words


@pytest.mark.parametrize("name", ["constraint-000.tar", "latest-000.tar", "evaluate_0.tar"])
def test_letters_inside_a_word_are_no_split(tmp_path, name):
    write_tar(tmp_path / name, plain([1, 2]))
    with pytest.raises(UsageError, match=rf"{name}.*--split"):
        adopt(tmp_path)
    assert not (tmp_path / MANIFEST).exists()
    shards = adopt(tmp_path, IndexConfig(split="train"))
    assert [shard.split for shard in shards] == ["train"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet1k-train-0000.tar", "train"), ("TRAINING_3.tar", "train"),
        ("train0001.tar", "train"), ("train/0000.tar", "train"), ("Valid/a/7.tar", "validation"),
        ("test/constraint.tar", "test"), ("train/x_test_1.tar", "test"),
    ],
)  # fmt: skip
def test_the_nearest_word_says_the_split(tmp_path, name, split):
    write_tar(tmp_path / name, plain([1, 2]))
    write_tar(tmp_path / "test-1.tar", plain([1, 2]))
    write_tar(tmp_path / "z-train.tar", plain([1, 2]))  # The last one becomes validation.
    assert {shard.name: shard.split for shard in adopt(tmp_path)}[name] == split


def test_a_name_of_two_splits_and_an_unknown_split_are_refused(tmp_path):
    write_tar(tmp_path / "train-test-0.tar", plain([1]))
    with pytest.raises(UsageError, match="says test and train"):
        adopt(tmp_path)
    with pytest.raises(UsageError, match="unknown split 'tran'"):
        adopt(tmp_path, IndexConfig(split="tran"))


# labels


def test_classes_without_an_image_are_named_once(tmp_path):
    for word in ("train", "test"):
        write_tar(tmp_path / f"{word}-0.tar", plain([1, 2, 3, 4], [1, 2, 3, 4]))
    with pytest.warns(UserWarning, match="1 of 5 classes have no image: 0; .*from 1") as told:
        adopt(tmp_path)
    assert len(told) == 1
    assert read_manifest(tmp_path / MANIFEST).classes == ["0", "1", "2", "3", "4"]


def test_a_label_far_from_all_others_is_refused_unless_the_number_of_classes_is_given(tmp_path):
    write_tar(tmp_path / "train-0.tar", plain([0, 1, 2]))
    write_tar(tmp_path / "test-0.tar", plain([3, 4], [0, 99999]))
    with pytest.raises(UsageError, match=r"test-0\.tar sample 004: label 99999 .*--classes"):
        adopt(tmp_path)
    assert not (tmp_path / MANIFEST).exists() and not (tmp_path / INDEX).exists()
    with pytest.raises(UsageError, match=r"test-0\.tar sample 004.*99999 is none of the 10"):
        adopt(tmp_path, IndexConfig(classes="10"))
    with pytest.warns(UserWarning, match="99996 of 100000 classes"):
        adopt(tmp_path, IndexConfig(classes="100000"))
    assert len(read_manifest(tmp_path / MANIFEST).classes) == 100_000


def test_a_list_of_classes_gives_names_and_takes_them_for_labels(tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    named = [("0.png", image(5)), ("0.cls", b"bee\n"), ("1.png", image(6)), ("1.cls", b"2")]
    for word in ("train", "test"):
        write_tar(tmp_path / "s" / f"{word}-0.tar", named)
    with pytest.raises(UsageError, match=r"'bee', which is no number"):
        adopt(tmp_path / "s")
    with pytest.warns(UserWarning, match="no image: ant"):
        adopt(tmp_path / "s", IndexConfig(classes=str(tmp_path / "names.txt")))
    assert read_manifest(tmp_path / "s" / MANIFEST).classes == ["ant", "bee", "cat"]
    assert not [problem for _, problem in verify(tmp_path / "s") if problem]
    with pytest.raises(UsageError, match=r"nowhere\.txt is no number and no file"):
        adopt(tmp_path, IndexConfig(classes="nowhere.txt"))


# keys


@pytest.mark.parametrize("apart", [False, True])
def test_a_key_that_comes_twice_is_refused_with_both_places(tmp_path, apart):
    twice = plain([1, 1]) if not apart else [*plain([1]), *plain([7]), *plain([1])]
    path = write_tar(tmp_path / "train-0.tar", twice)
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar if member.name == "001.png"]
    first, second = (0, 2) if not apart else (0, 4)
    with pytest.raises(UsageError) as caught:
        scan(path)
    for part in (f"member {first} ", f"member {second} ", *(f"byte {n})" for n in places), "'001'"):
        assert part in str(caught.value)


NAMES = [
    "a.jpg", "a.JPG", "d/a.seg.png", "d.v2/a.cls", "./0001.jpg", "/x/0001.jpg", "img.v2.0001.jpg",
    "2024.01.05.jpg", "noext", "d.e/noext", "a.", "é.jpg", "a b.cls", "x/__init__.py", "a..jpg",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_extensions_are_webdatasets(name):
    key, extension = base_plus_ext(name)
    assert Reading().key(name) == (None if key is None else (key, extension.lower()))


def odd_members() -> list[Member]:
    return [
        ("__meta__", b"x"), ("__index__/a.jpg", b"x"), ("__meta__.json", b"{}"),
        (".DS_Store", b"x"), ("d/.DS_Store", b"x"), ("d/._001.jpg", b"x"), ("README", b"x"),
        ("d/001.JPG", image(9, "JPEG")), ("d/001.CLS", b" 1\n"),
    ]  # fmt: skip


def test_hidden_and_meta_members_are_skipped_and_endings_may_be_upper_case(tmp_path):
    path = write_tar(tmp_path / "train-0.tar", odd_members())
    assert greys(path) == [(9, 1)]


def test_members_of_a_key_need_not_lie_side_by_side(tmp_path):
    together = plain([1, 2, 3])
    path = write_tar(tmp_path / "train-0.tar", [*together[::2], *reversed(together[1::2])])
    assert greys(path) == [(1, 0), (2, 1), (3, 2)]


def test_dotted_keys_take_an_option_that_the_line_names(tmp_path):
    members = [
        (f"img.v2.000{n}.{ending}", content)
        for n in range(3)
        for ending, content in (("jpg", image(n, "JPEG")), ("cls", b"%d" % n))
    ]
    for word in ("train", "test"):
        write_tar(tmp_path / f"{word}-0.tar", members)
    with pytest.raises(UsageError, match=r"sample img has 3 images .*--dotted true"):
        adopt(tmp_path)
    adopt(tmp_path, IndexConfig(dotted=True))
    assert [p for _, p in verify(tmp_path) if p] == []
    (tmp_path / INDEX).unlink()
    assert pairs(sets.load(config(tmp_path, tmp_path, memory_limit_gb=1)).test.once(4)) == [
        (0, 0), (1, 1), (2, 2)
    ]  # fmt: skip


def test_one_image_with_a_long_extension_is_the_image(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.left.png", image(3)), ("a.left.cls", b"1")])
    assert greys(path) == [(3, 1)]


def test_labels_in_json_take_an_option_that_the_line_names(tmp_path):
    for word in ("train", "test"):
        members = [
            member
            for n in range(3)
            for member in ((f"{n}.jpg", image(n, "JPEG")),
                           (f"{n}.json", json.dumps({"class_id": n, "url": "x"}).encode()),
                           (f"{n}.txt", b"a caption"))
        ]  # fmt: skip
        write_tar(tmp_path / f"{word}-0.tar", members)
    with pytest.raises(UsageError, match=r"no cls, only jpg, json, txt; .*--label json:KEY.*class"):
        adopt(tmp_path)
    with pytest.raises(UsageError, match=r"its json has no 'label', only class_id, url"):
        adopt(tmp_path, IndexConfig(label="json:label"))
    with pytest.raises(UsageError, match=r"its txt is 'a caption'"):
        adopt(tmp_path, IndexConfig(label="txt"))
    assert run("shards", "index", str(tmp_path), "--label", "json:class_id") == 0
    assert [label for _, label in greys(tmp_path / "test-0.tar", Reading("json:class_id"))] == [
        0, 1, 2
    ]  # fmt: skip
    (tmp_path / INDEX).unlink()
    source = sets.load(config(tmp_path, tmp_path, memory_limit_gb=1))
    assert source.test.labels.tolist() == [0, 1, 2]


# formats and places


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("bmp", "BMP"), ("ppm", "PPM"), ("webp", "WEBP"), ("tif", "TIFF"), ("gif", "GIF")],
)
def test_usual_formats_are_read(tmp_path, ending, kind):
    path = write_tar(tmp_path / "a.tar", [(f"a.{ending}", image(7, kind)), ("a.cls", b"1")])
    assert greys(path) == [(7, 1)]


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz", "train-0.tar"])
def test_compressed_tars_are_refused_in_one_line(tmp_path, name):
    content = write_tar(tmp_path / "a.tar", plain([1, 2])).read_bytes()
    (tmp_path / "a.tar").unlink()
    (tmp_path / name).write_bytes(gzip.compress(content))
    with pytest.raises(UsageError, match=rf"{name} is compressed.*unpack it to a plain \.tar"):
        adopt(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "cut in a header", "flipped"])
def test_a_tar_that_ends_early_is_not_taken_for_whole(tmp_path, damage):
    path = write_tar(tmp_path / "train-0.tar", plain([1, 2, 3]))
    with tarfile.open(path) as tar:
        third = tar.getmember("003.png").offset
    if damage == "flipped":
        flip(path, third + 5)
    else:
        os.truncate(path, third + 100 * (damage == "cut in a header"))
    with pytest.raises(UsageError, match=rf"cut or damaged after 2 samples .*at byte {third}\)"):
        scan(path)


def test_tars_of_other_tools_are_whole(tmp_path):
    for name, content in plain([1, 2, 3]):
        (tmp_path / name).write_bytes(content)
    files = sorted(path.name for path in tmp_path.iterdir())
    for number, options in enumerate((["-b1"], [], ["--format=pax"], ["--format=ustar"])):
        path = tmp_path / f"{number}.tar"
        subprocess.run(["tar", "-cf", path, *options, *files], cwd=tmp_path, check=True)
        assert greys(path) == [(1, 0), (2, 1), (3, 2)]
    with TarWriter(str(tmp_path / "w.tar")) as tar:
        tar.write({"__key__": "a", "png": image(4), "cls": b"1"})
    assert greys(tmp_path / "w.tar") == [(4, 1)]


def test_shards_in_folders_are_read(tmp_path):
    for place, split in enumerate(("train", "val", "test")):
        write_tar(tmp_path / "s" / split / "0000.tar", plain([place * 10, place * 10 + 1]))
    write_tar(tmp_path / "s" / ".cache" / "old.tar", plain([1]))
    shards = adopt(tmp_path / "s")
    assert [(shard.name, shard.split) for shard in shards] == [
        ("test/0000.tar", "test"), ("train/0000.tar", "train"), ("val/0000.tar", "validation")
    ]  # fmt: skip
    source = sets.load(config(tmp_path / "s", tmp_path))
    assert pairs(source.validation.once(4)) == [(10, 0), (11, 1)]


def test_a_share_of_the_tars_is_less_than_all_of_them(tmp_path):
    with pytest.raises(UsageError, match="validation_fraction must be at least 0 and below 1"):
        adopt(foreign(tmp_path), IndexConfig(validation_fraction=-0.5))


def test_a_pattern_or_a_tar_as_root_takes_these_shards_of_the_manifest(tmp_path):
    root = tmp_path / "s"
    for number in range(3):
        write_tar(root / f"train-{number:03d}.tar", plain([number * 10, number * 10 + 1]))
    for word in ("val", "test"):
        write_tar(root / f"{word}-000.tar", plain([90, 91]))
    with pytest.raises(UsageError, match=r"manifest\.json is not there: `autosparse shards index"):
        sets.load(config(root, tmp_path))
    adopt(root)
    pattern = f"{root}/{{train-{{001..002}},val-000,test-000}}.tar"
    some = sets.load(config(pattern, tmp_path))
    assert pairs(some.train.once(9)) == [(10, 0), (11, 1), (20, 0), (21, 1)]
    whole = sets.load(config(root, tmp_path))
    assert len(whole.train) == 6 and whole.fingerprint != some.fingerprint
    with pytest.raises(UsageError, match=r"lists no shard train-003\.tar"):
        sets.load(config(f"{root}/train-{{002..003}}.tar", tmp_path))
    with pytest.raises(UsageError, match="lists no test shard"):
        sets.load(config(f"{root}/train-001.tar", tmp_path))


def test_endings_of_tars_may_be_upper_case(tmp_path):
    for word in ("TRAIN", "VAL", "TEST"):
        write_tar(tmp_path / "s" / f"{word}-0.TAR", plain([1, 2]))
    assert len(adopt(tmp_path / "s")) == 3
    pattern = f"{tmp_path}/s/{{TRAIN,VAL,TEST}}-0.TAR"
    assert len(sets.load(config(pattern, tmp_path)).train) == 2


def test_a_pattern_is_indexed(tmp_path):
    foreign(tmp_path)
    write_tar(tmp_path / "unrelated.tar", plain([1]))
    assert len(adopt(f"{tmp_path}/x-{{train,val,test}}-000.tar")) == 3


# opens and the disk


def epochs_of_small_shards(root: Path, shards: int) -> list[Counter[str]]:
    """Return how often each function, of Python or C, is called in a first and a second epoch.

    The shards have two images and no index. `open a tar` counts those of the opens.
    """
    for number in range(shards):
        write_tar(root / f"train-{number:03d}.tar", plain([number, number + 1]))
    for word in ("val", "test"):
        write_tar(root / f"{word}-000.tar", plain([1, 2]))
    adopt(root)
    (root / INDEX).unlink()
    split = sets.load(config(root, root.parent)).train
    calls: Counter[str] = Counter()

    def count(frame, event, argument):
        if event == "call":
            calls[frame.f_code.co_name] += 1
        elif event == "c_call":
            calls[argument.__name__] += 1
            if argument.__name__ == "open":
                calls["open a tar"] += any(str(each).endswith(".tar") for each in
                                           frame.f_locals.values())  # fmt: skip

    epochs = []
    gc.disable()  # What it collects is left by other tests.
    try:
        for epoch in range(2):
            calls.clear()
            sys.setprofile(count)
            seen = sum(len(labels) for _, labels in split.shuffled(4, seed=0, epoch=epoch))
            sys.setprofile(None)
            assert seen == 2 * shards
            epochs.append(calls.copy())
    finally:
        sys.setprofile(None)
        gc.enable()
    return epochs


def test_the_work_for_a_small_shard_does_not_grow_with_their_number(tmp_path):
    """1,500 of them once took 100 s an epoch: tars were closed and opened again for each image, and
    for each tar a file was written and synced."""
    few, many = (epochs_of_small_shards(tmp_path / str(count), count) for count in (20, 60))
    for shards, (first, second) in ((20, few), (60, many)):
        # For its hash, to see whether it is compressed, for the walk, and then for good.
        assert first["open a tar"] == 4 * shards
        assert not second["open a tar"]
        for call in ("fsync", "replace", "unlink", "fork", "fork_exec"):
            assert not first[call] + second[call]
    # All that is opened, looked up, read, or worked out, also in ways that nobody has thought of.
    for before, after in zip(few, many, strict=True):
        assert after.total() < 1.05 * 3 * before.total()
        assert after["stat"] <= 3 * before["stat"] and after["open"] <= 3 * before["open"]


# WebDataset itself


def test_webdataset_reads_our_shards(tmp_path):
    write_shards(samples(), tmp_path / "s", CLASSES, per_shard=4)
    for split in COUNTS:
        number = len(list((tmp_path / "s").glob(f"{split}-*.tar")))
        assert read_by_webdataset(f"{tmp_path}/s/{split}-{{000000..{number - 1:06d}}}.tar") == (
            expected(split)
        )


def read_by_webdataset(pattern: str) -> list[tuple[int, int]]:
    """Return (grey, label) of the samples, as WebDataset itself finds and decodes them."""
    found = []
    for pixels, label in (
        WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    ):
        assert (pixels == pixels[0, 0, 0]).all()
        found.append((int(pixels[0, 0, 0]), label))
    return found


def test_we_read_what_shard_writer_writes(tmp_path):
    """Text and numbers in cls, upper case, folders and dots in keys, notes between."""
    for split in COUNTS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer = ShardWriter(f"{tmp_path}/{split}-%03d.tar", maxcount=4, verbose=0)
        with writer:
            for place, (grey, label) in enumerate(expected(split)):
                ending = "PNG" if place % 2 else "png"
                writer.write({"__key__": f"v1.0/{split}/{grey:03d}", ending: picture(grey),
                              "cls": label if place % 3 else f"{label}\n".encode(),
                              "json": {"label": label}})  # fmt: skip
    adopt(tmp_path)
    pattern = f"{tmp_path}/{{train-00{{0..6}},validation-00{{0..1}},test-00{{0..2}}}}.tar"
    for root in (tmp_path, pattern):
        source = sets.load(config(root, tmp_path))
        for split in COUNTS:
            assert pairs(getattr(source, split).once(4)) == expected(split)
    for split, last in (("train", 6), ("validation", 1), ("test", 2)):
        theirs = f"{tmp_path}/{split}-{{000..00{last}}}.tar"
        assert read_by_webdataset(theirs) == expected(split)
    by_json = scan(tmp_path / "test-001.tar", Reading("json:label"))
    assert torch.equal(by_json, scan(tmp_path / "test-001.tar"))


def test_both_read_the_same_of_odd_members(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*odd_members(), *plain([3, 4])])
    theirs = [
        (sample["jpg" if "jpg" in sample else "png"], int(sample["cls"]))
        for sample in WebDataset(str(path), shardshuffle=False)
        if "cls" in sample
    ]
    content = path.read_bytes()
    ours = [(content[begin : begin + size], label) for begin, size, label in scan(path).tolist()]
    assert ours == theirs and len(ours) == 3


def test_mistakes_with_foreign_shards_are_one_line(tmp_path, capsys):
    write_tar(tmp_path / "latest.tar", plain([1]))
    refuse(capsys, ["shards", "index", str(tmp_path)], "latest.tar", "--split")
    with TarWriter(str(tmp_path / "train.tar")) as tar:
        tar.write({"__key__": "a", "txt": b"x"})
    refuse(capsys, ["shards", "index", f"{tmp_path}/train.tar"], "no image", "txt")
    refuse(capsys, ["shards", "index", str(tmp_path), "--lable", "x"], "'lable'", "'label'")
