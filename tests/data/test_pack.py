"""Packing shards: the same bytes every time, whatever is killed, and readable by others."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autosparse.core.errors import UsageError
from autosparse.data import sets
from autosparse.data.check import verify
from autosparse.data.config import DataConfig, PackConfig
from autosparse.data.encode import encoded
from autosparse.data.manifest import MANIFEST, read_manifest
from autosparse.data.pack import RECORDS, pack
from autosparse.data.samples import scan
from autosparse.data.tars import INDEX, read_index
from tests.cli.test_main import refuse, run
from tests.conftest import flip, holder
from tests.data.packed import write_shards

FOUR = PackConfig(per_shard=4, workers=1)


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    """20 images of cats, 10 of dogs to train on, 3 and 3 to test; a PNG named .jpg among them."""
    root = tmp_path_factory.mktemp("pets")
    for split, counts in (("train", (20, 10)), ("test", (3, 3))):
        for name, count, first in zip(("cat", "dog"), counts, (0, 100), strict=True):
            (root / split / name).mkdir(parents=True)
            for number in range(first, first + count):
                kind = "PNG" if number % 7 == 0 else "JPEG"
                image = Image.new("L", (12, 10), number + 50 * (split == "test"))
                image.save(root / split / name / f"{number:03d}.jpg", kind)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_packed_folder_is_what_the_folder_is(pets, tmp_path):
    """Validation is cut from train in the same way; bytes are copied."""
    shards = pack(str(pets), tmp_path / "s", FOUR)
    # 30 to train on, of which 15 % (4.5, rounded to 4) are held out: 26, 4 and 6 by fours.
    assert [(shard.split, shard.count) for shard in shards] == (
        [("train", 4)] * 6 + [("train", 2)] + [("validation", 4)] + [("test", 4), ("test", 2)]
    )
    packed = sets.load(DataConfig("shards", str(tmp_path / "s"), image_size=8, workers=0))
    folder = sets.load(DataConfig("folder", str(pets), image_size=8))
    for split in ("train", "validation", "test"):
        ours, theirs = (
            sorted(zip(part.images.flatten(1).tolist(), part.labels.tolist(), strict=True))
            for part in (getattr(packed, split), getattr(folder, split))
        )
        assert ours == theirs
    assert read_manifest(tmp_path / "s" / MANIFEST).classes == ["cat", "dog"]
    assert not (tmp_path / "s" / RECORDS).exists()


def test_index_says_where_the_images_are(pets, tmp_path):
    root = tmp_path / "s"
    shards = pack(str(pets), root, FOUR)
    index = read_index(root / INDEX, shards)
    originals = {path.read_bytes() for path in pets.glob("*/*/*.jpg")}
    for shard in shards:
        assert torch.equal(index[shard.name], scan(root / shard.name))
        content = (root / shard.name).read_bytes()
        for offset, size, _ in index[shard.name].tolist():
            assert content[offset : offset + size] in originals


def test_order_is_shuffled_by_the_seed_and_bytes_are_the_same_every_time(pets, tmp_path):
    for name, config in {
        "one": FOUR,
        "two": replace(FOUR, workers=2),
        "other": replace(FOUR, seed=1),
    }.items():
        pack(str(pets), tmp_path / name, config)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    labels = [
        [int(label) for number in range(6)
         for label in scan(tmp_path / name / f"train-{number:06d}.tar")[:, 2]]
        for name in ("one", "other")
    ]  # fmt: skip
    assert labels[0] != labels[1]
    assert labels[0] != sorted(labels[0])


def test_bytes_depend_on_nothing_but_names_contents_and_labels(tmp_path):
    """As tarfile writes them by itself: no owner, no time; an image, then its label."""
    images = [b"P5 2 2 255\n" + bytes([grey] * 4) for grey in range(3)]
    write_shards([("train", image, 7) for image in images], tmp_path / "s", ["x"] * 8)
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place, image in enumerate(images):
            for ending, content in (("pgm", image), ("cls", b"7")):
                member = tarfile.TarInfo(f"train000000_{place:06d}.{ending}")
                member.size, member.mode = len(content), 0o444
                tar.addfile(member, io.BytesIO(content))
    assert (tmp_path / "s" / "train-000000.tar").read_bytes() == expected.getvalue()


def test_packing_again_keeps_what_is_finished(pets, tmp_path):
    root = tmp_path / "s"
    pack(str(pets), root, FOUR)
    before = {path: path.stat().st_mtime_ns for path in root.iterdir()}
    found = []
    assert len(pack(str(pets), root, FOUR, on_shard=found.append)) == 10
    assert not found
    assert {path: path.stat().st_mtime_ns for path in root.iterdir()} == before


def test_two_do_not_pack_into_one_folder(pets, tmp_path):
    with holder(tmp_path / "s") as process:
        with pytest.raises(UsageError, match=f"being worked on by process {process.pid} "):
            pack(str(pets), tmp_path / "s", FOUR)
        assert [path.name for path in (tmp_path / "s").iterdir()] == ["claim.lock"]
    pack(str(pets), tmp_path / "s", FOUR)
    assert not list((tmp_path / "s").glob("*claim*"))
    with holder(tmp_path / "s"):  # What is finished is only looked at.
        assert len(pack(str(pets), tmp_path / "s", FOUR)) == 10


def test_other_options_do_not_mix_with_finished_shards(pets, tmp_path):
    pack(str(pets), tmp_path / "s", FOUR)
    with pytest.raises(UsageError, match="other images or options"):
        pack(str(pets), tmp_path / "s", replace(FOUR, quality=50))


PACKING = """
import sys
from autosparse.data.config import PackConfig
from autosparse.data import pack
def count(shard):
    print(shard.name, flush=True)
pack.pack(sys.argv[1], sys.argv[2], PackConfig(per_shard=4, workers=1), on_shard=count)
"""


@pytest.mark.slow
@pytest.mark.parametrize("finished", [1, 4])
def test_packing_goes_on_after_a_kill(pets, tmp_path, finished):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pack(str(pets), whole, FOUR)
    command = [sys.executable, "-c", PACKING, str(pets), str(killed)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for _ in range(finished):
            process.stdout.readline()
        assert os.getpgid(process.pid) == process.pid != os.getpgrp()
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    records = [path.stem for path in (killed / RECORDS).glob("*.json")]
    kept = {name: (killed / name).stat().st_mtime_ns for name in records}
    assert len(kept) >= finished
    for name in ("train-000005.tar", "index.safetensors", "_info.json", "manifest.json"):
        (killed / f".{name}.77.tmp").write_bytes(b"half")
    pack(str(pets), killed, FOUR)
    assert contents(killed) == contents(whole)
    assert {name: (killed / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "other options", "no record"])
def test_finished_shard_that_is_not_right_is_made_again(pets, tmp_path, damage):
    whole, root = tmp_path / "whole", tmp_path / "s"
    pack(str(pets), whole, FOUR)
    if damage == "other options":
        unfinished(pets, root, replace(FOUR, seed=3))
    else:
        unfinished(pets, root, FOUR)
        victim = root / "train-000001.tar"
        if damage == "flipped":
            flip(victim, 700)
        elif damage == "cut":
            victim.write_bytes(victim.read_bytes()[:1536])
        elif damage == "gone":
            victim.unlink()
        else:
            (root / RECORDS / "train-000001.tar.json").write_text("{")
    pack(str(pets), root, FOUR)
    assert contents(root) == contents(whole)


def unfinished(source: Path, root: Path, config: PackConfig) -> None:
    """Leave the folder as a kill just before the index would."""
    kept = root.with_name("records")
    shutil.rmtree(kept, ignore_errors=True)

    def keep(shard):
        kept.mkdir(exist_ok=True)
        for record in (root / RECORDS).glob("[!.]*.json"):
            shutil.copy(record, kept)

    pack(str(source), root, config, on_shard=keep)
    shutil.copytree(kept, root / RECORDS)
    for name in (MANIFEST, INDEX, "_info.json"):
        (root / name).unlink()


@pytest.mark.parametrize(
    ("size", "options", "kind", "expected"),
    [
        ((40, 20), {}, "PNG", (40, 20)),
        ((40, 20), {"resize": 10}, "JPEG", (20, 10)),
        ((20, 40), {"resize": 10}, "JPEG", (10, 20)),
        ((40, 20), {"resize": 20}, "PNG", (40, 20)),
        ((40, 20), {"resize": 50}, "PNG", (40, 20)),
        ((40, 20), {"resize": 50, "quality": 80}, "JPEG", (40, 20)),
        ((40, 20), {"quality": 80}, "JPEG", (40, 20)),
    ],
)
def test_images_are_made_smaller_only_if_asked(size, options, kind, expected):
    stream = io.BytesIO()
    Image.new("RGBA", size, (250, 0, 0, 255)).save(stream, "PNG")
    content, extension = encoded(stream.getvalue(), PackConfig(**options))
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == (kind, expected)
        assert np.abs(np.asarray(image.convert("RGB"), int) - [250, 0, 0]).max() < 5
    assert extension == {"PNG": "png", "JPEG": "jpg"}[kind]
    assert (content == stream.getvalue()) == (kind == "PNG")


def test_images_encoded_anew_are_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("L", (40, 20), 9).save(stream, "JPEG", exif=exif)
    content, _ = encoded(stream.getvalue(), PackConfig(resize=10))
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (10, 20)


@pytest.mark.parametrize(
    ("content", "options", "named"),
    [
        (b"GIF89a no", {}, r"odd\.jpg is no JPEG, PNG, WebP"),
        (b"", {}, r"odd\.jpg is empty"),
        (b"\xff\xd8\xff no", {"quality": 90}, r"odd\.jpg cannot be packed"),
    ],
)
def test_image_that_cannot_be_packed_is_named(tmp_path, content, options, named):
    (tmp_path / "odd.jpg").write_bytes(content)
    with pytest.raises(UsageError, match=named):
        encoded(tmp_path / "odd.jpg", PackConfig(**options))


def test_worker_names_the_image_and_nothing_looks_finished(pets, tmp_path):
    source = Path(shutil.copytree(pets, tmp_path / "pets"))
    (source / "train" / "cat" / "003.jpg").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"003\.jpg is no JPEG"):
        pack(str(source), tmp_path / "s", FOUR)
    assert not (tmp_path / "s" / MANIFEST).exists()


@pytest.mark.parametrize(
    "options",
    [{"per_shard": 0}, {"resize": 0}, {"quality": 101}, {"workers": 0}, {"seed": 1 << 64}],
)
def test_options_that_cannot_be_are_refused(pets, tmp_path, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        pack(str(pets), tmp_path / "s", PackConfig(**options))


def test_torchvision_set_is_packed_without_loss(tmp_path, monkeypatch):
    from tests.data.test_data import write_mnist

    write_mnist(tmp_path)
    monkeypatch.setenv("AUTOSPARSE_DATA", str(tmp_path))
    pack("mnist", tmp_path / "s", replace(FOUR, per_shard=30))
    packed = sets.load(DataConfig("shards", str(tmp_path / "s"), image_size=28, workers=0))
    plain = sets.load(DataConfig("mnist"))
    assert (packed.num_classes, len(packed.train)) == (10, len(plain.train))
    ours = sorted(packed.test.images[:, 0].flatten(1).tolist())
    assert ours == sorted(plain.test.images[:, 0].flatten(1).tolist())


def test_timm_reads_the_shards(pets, tmp_path):
    from timm.data import create_dataset

    pack(str(pets), tmp_path / "s", replace(FOUR, quality=90))
    info = json.loads((tmp_path / "s" / "_info.json").read_text())
    assert info["splits"]["train"]["num_samples"] == 26
    dataset = create_dataset("wds/x", str(tmp_path / "s"), split="test", input_key="jpg")
    labels = [label for _, label in dataset]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]


# the command line


def test_shards_are_packed_and_verified_by_the_command_line(pets, tmp_path, capsys):
    folder = str(tmp_path / "s")
    assert run("shards", "pack", str(pets), folder, "--per_shard", "5", "--resize", "8") == 0
    said = capsys.readouterr()
    assert "train" in said.out and "26" in said.out
    assert "packing: 36/36 images" in said.err
    assert run("shards", "verify", folder) == 0
    assert "10 shards" not in capsys.readouterr().out


def test_verify_names_every_bad_shard(pets, tmp_path, capsys):
    root = tmp_path / "s"
    pack(str(pets), root, FOUR)
    flip(root / "train-000001.tar", 700)
    (root / "test-000000.tar").unlink()
    (root / "train-000003.tar").write_bytes((root / "train-000003.tar").read_bytes()[:2048])
    assert run("shards", "verify", str(root)) == 1
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("shard ")]
    assert [next(part for part in line.split() if ".tar" in part)[-16:] for line in lines] == [
        "train-000001.tar", "train-000003.tar", "/test-000000.tar"
    ]  # fmt: skip
    assert "3 of 10 shards" in said.err


def test_verify_notices_an_index_that_lies(pets, tmp_path):
    from safetensors.torch import load_file, save_file

    root = tmp_path / "s"
    shards = pack(str(pets), root, FOUR)
    tensors = load_file(root / INDEX)
    tensors["test-000000.tar"][0, 2] ^= 1
    card = json.dumps({"sha256": {shard.name: shard.sha256 for shard in shards}})
    save_file(tensors, root / INDEX, {"card": card})
    bad = [shard.name for shard, problem in verify(root) if problem]
    assert bad == ["test-000000.tar"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["needs one of pack, verify, index"]),
        (["pak", "a", "b"], ["command of autosparse shards 'pak'", "'pack'"]),
        (["pack", "a"], ["required: folder"]),
        (["pack", "nowhere", "b"], ["nowhere is not a folder"]),
        (["pack", "a", "b", "--qality", "3"], ["'qality'", "'quality'"]),
        (["verify"], ["required: path"]),
        (["verify", "nowhere"], [MANIFEST]),
        (["index", "nowhere"], ["holds no tar"]),
    ],
)
def test_mistakes_with_shards_are_one_line(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse(capsys, ["shards", *arguments], *named)
