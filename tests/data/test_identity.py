"""Own data are known by content: other images are other work, whatever their folder is called."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autosparse.core.config import run_id
from autosparse.core.errors import UsageError
from autosparse.core.files import write_json
from autosparse.corpus.store import read_run
from autosparse.data import identity, sets
from autosparse.data import remote as remote_shards
from autosparse.data.config import DataConfig
from autosparse.data.identity import content, looked_at_once
from autosparse.irp import run
from autosparse.irp.config import IRPConfig
from autosparse.irp.replay import replay
from tests.conftest import QUICK, quick_irp
from tests.data.test_data import write_mnist


def picture(path: Path, shade: int) -> None:
    """Write an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path)


def pets(root: Path, shade: int = 0, each: int = 12) -> Path:
    for part in ("train", "test"):
        for place, name in enumerate(("cat", "dog")):
            for number in range(each):
                picture(root / part / name / f"{number}.png", (90 * place + shade + number) % 256)
    return root


def wanted(root: Path, tmp_path: Path, **changes) -> DataConfig:
    settings = {"image_size": 16, "cache": str(tmp_path / "cache"), "workers": 0, **changes}
    return DataConfig("folder", str(root), **settings)


@pytest.fixture()
def folder(tmp_path: Path) -> DataConfig:
    return wanted(pets(tmp_path / "v1" / "pets", each=2), tmp_path)


# What counts


def test_the_same_images_elsewhere_are_the_same_data(folder: DataConfig, tmp_path: Path):
    other = wanted(pets(tmp_path / "elsewhere" / "animals", each=2), tmp_path)
    assert content(folder) == content(other)
    assert run_id(IRPConfig(data=folder)) == run_id(IRPConfig(data=other))
    assert len(str(content(folder))) == 16


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_other_image_of_any_split_makes_other_data(
    folder: DataConfig, tmp_path: Path, part: str
):
    other = pets(tmp_path / "v2" / "pets", each=2)
    picture(other / part / "dog" / "1.png", 7)
    assert content(folder) != content(wanted(other, tmp_path))
    assert run_id(folder) != run_id(wanted(other, tmp_path))


def test_names_of_classes_and_files_count_but_not_what_is_no_image(folder: DataConfig):
    root, before = Path(str(folder.root)), content(folder)
    (root / "README.md").write_text("about")
    (root / ".cache").mkdir()
    picture(root / ".cache" / "1.png", 1)
    picture(root / "train" / "cat" / "._1.png", 1)
    assert content(folder) == before
    (root / "train" / "cat" / "1.png").rename(root / "train" / "dog" / "9.png")
    assert content(folder) != before


def test_named_sets_are_known_by_name():
    assert content(DataConfig("mnist", "/nowhere")) is None
    assert content(DataConfig()) is None


def test_links_are_followed_but_not_in_circles(folder: DataConfig):
    root, before = Path(str(folder.root)), content(folder)
    (root / "train" / "cat" / "again").symlink_to(root / "train")
    assert content(folder) == before
    (root / "train" / "bird").symlink_to(root / "train" / "cat")
    with_bird = content(folder)
    assert with_bird != before
    (root / "train" / "cat" / "gone.png").symlink_to(root / "nowhere")
    assert content(folder) not in (before, with_bird)


# What it costs


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    real = identity.sha256_of_file
    monkeypatch.setattr(
        identity, "sha256_of_file", lambda path: read.append(Path(path).name) or real(path)
    )
    return read


@pytest.fixture()
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all files that are there pass for long finished."""
    monkeypatch.setattr(identity, "SETTLED", -60)


def test_a_file_is_read_once(folder: DataConfig, settled: None, monkeypatch: pytest.MonkeyPatch):
    read = counted(monkeypatch)
    first = content(folder)
    assert len(read) == 8
    assert content(folder) == first
    assert len(read) == 8
    picture(Path(str(folder.root)) / "train" / "dog" / "0.png", 200)
    assert content(folder) != first
    assert read[8:] == ["0.png"]


def test_a_file_of_this_moment_is_read_again(folder: DataConfig, monkeypatch: pytest.MonkeyPatch):
    """It might change once more, in place, within the time stamp's grain."""
    read = counted(monkeypatch)
    content(folder)
    content(folder)
    assert len(read) == 16


def test_a_command_looks_once(folder: DataConfig):
    with looked_at_once():
        first = content(folder)
        picture(Path(str(folder.root)) / "train" / "dog" / "0.png", 200)
        assert content(folder) == first
    assert content(folder) != first


@pytest.mark.parametrize("garbage", [b"", b"[]", b'{"train/cat/0.png": 3}'])
def test_a_garbled_cache_is_made_anew(folder: DataConfig, settled: None, garbage: bytes):
    first = content(folder)
    (path,) = (Path(folder.cache) / "content").iterdir()
    path.write_bytes(garbage)
    assert content(folder) == first


def test_a_cache_that_cannot_be_written_is_said(
    folder: DataConfig, settled: None, tmp_path: Path, capsys
):
    (tmp_path / "file").write_text("")
    assert content(replace(folder, cache=str(tmp_path / "file"))) == content(folder)
    assert capsys.readouterr().err.startswith("warning: data.cache: cannot write ")


# Shards


def manifest(root: Path, digest: str, count: int = 3) -> DataConfig:
    shards = [
        {"name": f"{part}-0.tar", "split": part, "count": count, "bytes": 9, "sha256": digest}
        for part in ("train", "validation", "test")
    ]
    write_json(root / "manifest.json", {"format": 1, "classes": ["a"], "shards": shards})
    return DataConfig("shards", str(root))


def test_shards_are_known_by_the_hashes_of_their_manifest(tmp_path: Path):
    first, same = manifest(tmp_path / "a" / "pets", "12"), manifest(tmp_path / "b", "12")
    other = manifest(tmp_path / "b" / "pets", "34")
    assert run_id(first) == run_id(same) != run_id(other)
    changed = json.loads((tmp_path / "b" / "manifest.json").read_text())
    changed["shards"][2]["sha256"] = "56"
    write_json(tmp_path / "b" / "manifest.json", changed)
    assert run_id(same) != run_id(first), "only the test shard is another one"


@pytest.mark.parametrize("name", ["folder", "shards"])
def test_data_that_are_not_there_are_said_at_once(tmp_path: Path, name: str):
    settings = replace(quick_irp(str(tmp_path / "out")), data=DataConfig(name, "nowhere"))
    with pytest.raises(UsageError, match=r"data\.root nowhere is not a folder"):
        run.run_irp(settings)
    assert not (tmp_path / "out").exists()


def test_what_is_no_manifest_is_said_in_one_line(tmp_path: Path):
    with pytest.raises(UsageError, match=r"manifest.json is not there: `autosparse shards index"):
        run_id(DataConfig("shards", str(tmp_path)))
    write_json(tmp_path / "manifest.json", {"shards": [{"name": "x"}]})
    with pytest.raises(UsageError, match="is not a manifest of shards"):
        run_id(DataConfig("shards", str(tmp_path)))
    with pytest.raises(UsageError, match=r"set data\.allow_remote"):
        run_id(DataConfig("shards", "https://example.org/x"))


def test_shards_at_a_url_are_known_by_the_same_hashes(
    tmp_path: Path, remote: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote_shards, "SCHEMES", ("memory",))
    local = manifest(tmp_path / "pets", "12")
    content_ = (tmp_path / "pets" / "manifest.json").read_bytes()
    (remote / "manifest.json").write_bytes(content_)
    there = DataConfig("shards", str(remote), allow_remote=True, cache=str(tmp_path / "cache"))
    assert content(there) == content(local)
    with pytest.raises(UsageError, match=r"manifest\.json is not there, or its server"):
        content(replace(there, root=f"{remote}/nowhere"))


# Finished work


def small(root: Path, tmp_path: Path) -> IRPConfig:
    settings = quick_irp(str(tmp_path / "corpus"), levels=1)
    training = replace(QUICK, batch_size=10)
    return replace(settings, data=wanted(root, tmp_path), training=training, samples_per_class=2)


def test_two_folders_of_one_name_are_two_runs(tmp_path: Path, capsys):
    first = run.run_irp(small(pets(tmp_path / "v1" / "pets"), tmp_path))
    second = run.run_irp(small(pets(tmp_path / "v2" / "pets", shade=20), tmp_path))
    third = run.run_irp(small(pets(tmp_path / "copy" / "animals"), tmp_path))
    assert first == third != second


def test_a_run_of_data_known_by_name_is_told_of(tmp_path: Path, caplog):
    settings = small(pets(tmp_path / "v1" / "pets"), tmp_path)
    finished = run.run_irp(settings)
    former = []

    def former_folder() -> Path:
        former.append(run.run_folder(settings))
        return former[-1]

    identity.tell_of_former(former_folder, "finished.json")
    finished.rename(former[1])
    caplog.clear()
    assert run.run_irp(settings) == finished != former[1]
    (line,) = [each for each in caplog.messages if "is ignored" in each]
    assert f"{former[1]} was made by an earlier version" in line


def test_data_of_ones_own_are_known_by_content_however_they_are_held(folder: DataConfig):
    """Their fingerprint differs between memory and disk; what is finished stays so."""
    held, streamed = (sets.load(replace(folder, memory_limit_gb=each)) for each in (4.0, 0.0))
    assert held.fingerprint != streamed.fingerprint
    for source in (held, streamed):
        sets.check_found(held.fingerprint, source, Path("cell"))


class Stop(Exception):
    pass


def test_a_run_of_own_data_goes_on_however_they_are_held(tmp_path: Path) -> None:
    def stop(entry: dict) -> None:
        raise Stop

    config = small(pets(tmp_path / "pets"), tmp_path)
    with pytest.raises(Stop):
        run.run_irp(config, on_level=stop)
    streamed = replace(config.data, memory_limit_gb=0.0)
    folder = run.run_irp(replace(config, data=streamed))
    assert folder == run.run_folder(config)
    finished = read_run(folder)
    first, second = (replay(finished, 1, 1, sets.load(data)) for data in (config.data, streamed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = wanted(pets(tmp_path / "others", shade=7), tmp_path)
    with pytest.raises(UsageError, match="other data"):
        replay(finished, 1, 1, sets.load(other))


def test_a_named_set_with_other_images_is_not_taken_for_the_same(tmp_path: Path):
    write_mnist(tmp_path / "one")
    settings = replace(
        quick_irp(str(tmp_path / "corpus"), levels=1),
        data=DataConfig("mnist", str(tmp_path / "one"), image_size=16),
        training=replace(QUICK, batch_size=10),
        samples_per_class=1,
    )
    finished = run.run_irp(settings)
    assert run.run_irp(settings) == finished
    write_mnist(tmp_path / "two", grey=9)
    other = replace(settings, data=replace(settings.data, root=str(tmp_path / "two")))
    with pytest.raises(
        UsageError, match=f"{finished} was made from different images .*two holds now"
    ) as told:
        run.run_irp(other)
    assert "\n" not in str(told.value)
    gone = replace(settings, data=replace(settings.data, root=str(tmp_path / "nowhere")))
    assert run.run_irp(gone) == finished, "where there is nothing to compare with, it is as found"


def test_what_settings_say_of_images_is_what_they_are(tmp_path: Path):
    write_mnist(tmp_path)
    root = pets(tmp_path / "pets")
    for config in (DataConfig(), DataConfig("mnist", str(tmp_path)), wanted(root, tmp_path)):
        found, said = sets.load(config), sets.shape(config)
        assert said.num_classes in (None, found.num_classes)
        assert (said.in_chans, said.image_size) == (found.in_chans, found.image_size)
