"""Folders of images as people have them: hidden ones, links, and other names for the parts."""

import warnings
from pathlib import Path

import pytest
from PIL import Image

from autosparse.core.errors import UsageError
from autosparse.data import sets
from autosparse.data.class_folders import listed
from autosparse.data.config import DataConfig, PackConfig
from autosparse.data.manifest import MANIFEST, read_manifest
from autosparse.data.pack import pack
from tests.data.test_data import contents, fill, in_memory_config, streamed_config


@pytest.fixture
def root(tmp_path) -> Path:
    fill(tmp_path / "pets" / "cat", 0, 3)
    fill(tmp_path / "pets" / "dog", 10, 3)
    return tmp_path / "pets"


def names(samples) -> list[tuple[str, int]]:
    return [(path.name, label) for path, label in samples]


PLAIN = [(f"{n:03d}.png", n // 10) for n in (0, 1, 2, 10, 11, 12)]


def test_hidden_folders_and_files_are_passed_over(root):
    fill(root / ".ipynb_checkpoints", 50, 1)
    fill(root / "cat" / ".thumbnails", 51, 1)
    (root / "cat" / "._000.png").write_bytes(b"Mac OS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples, classes = listed(root)
    assert (names(samples), classes) == (PLAIN, ["cat", "dog"])


def test_folders_inside_a_class_belong_to_it(root):
    fill(root / "cat" / "more", 4, 1)
    assert names(listed(root)[0])[:4] == [*PLAIN[:3], ("004.png", 0)]


def test_a_linked_class_is_followed_once_and_named_once(root, tmp_path):
    fill(tmp_path / "elsewhere", 20, 2)
    (root / "eel").symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"links that are followed: eel$") as told:
        samples, classes = listed(root)
    assert len(told) == 1
    assert classes == ["cat", "dog", "eel"] and names(samples)[6:] == [
        ("020.png", 2), ("021.png", 2)
    ]  # fmt: skip


def test_a_link_to_another_class_is_no_class(root, tmp_path):
    (root / "a-puppy").symlink_to(root / "dog")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    pattern = r"left out: gone \(a link to nothing\), a-puppy \(the same folder as dog\)"
    with pytest.warns(UserWarning, match=pattern):
        samples, classes = listed(root)
    assert (names(samples), classes) == (PLAIN, ["cat", "dog"])


@pytest.mark.parametrize("target", ["..", "../dog", "."])
def test_links_inside_a_class_add_no_image_of_another(root, target):
    (root / "cat" / "link").symlink_to(target)
    assert names(listed(root)[0]) == PLAIN


def test_a_class_without_an_image_is_named(root):
    (root / "eel").mkdir()
    with pytest.raises(UsageError, match="class eel has no image"):
        listed(root)


@pytest.mark.parametrize("make", [in_memory_config, streamed_config])
@pytest.mark.parametrize(
    "words", [("Train", "Val", "Test"), ("training", "validation", "testing"),
              ("TRAIN", "valid", "Testing")],
)  # fmt: skip
def test_parts_are_known_in_any_case_and_by_the_usual_names(tmp_path, make, words):
    for place, word in enumerate(words):
        fill(tmp_path / word / "cat", 60 * place, 3)
        fill(tmp_path / word / "dog", 60 * place + 30, 3)
    source = sets.load(make(tmp_path))
    assert source.num_classes == 2
    for place, name in enumerate(("train", "validation", "test")):
        first = 60 * place
        assert contents(getattr(source, name)) == [
            *((first + n, 0) for n in range(3)), *((first + 30 + n, 1) for n in range(3))
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("train", "val", "validation"), "val and validation, both for validation"),
        (("Train", "train"), "Train and train, both for train"),
        (("Val", "Test"), "no folder train"),
        (("testing",), "no folder train"),
    ],
)
def test_parts_that_cannot_be_told_are_one_line(tmp_path, words, named):
    for word in words:
        fill(tmp_path / word / "cat", 0, 2)
        fill(tmp_path / word / "dog", 9, 2)
    with pytest.raises(UsageError, match=named):
        sets.load(in_memory_config(tmp_path))


def test_a_class_may_be_called_train(tmp_path):
    for place, name in enumerate(("bus", "train", "tram")):
        fill(tmp_path / name, 50 * place, 4)
    assert sets.load(in_memory_config(tmp_path)).num_classes == 3


# damaged files


def cut_jpeg(path: Path) -> None:
    """Write a JPEG that ends in the middle of its pixels."""
    image = Image.effect_noise((64, 64), 80)
    image.save(path, "JPEG", quality=90)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])


def damage(root: Path, kind: str) -> Path:
    """Spoil one training image."""
    path = root / "train" / "cat" / "001.png"
    path.unlink()
    if kind == "dangling":
        path.symlink_to(root / "nowhere")
    elif kind == "empty":
        path.touch()
    else:
        cut_jpeg(path)
    return path


KINDS = {"dangling": "a link to nothing", "empty": "is empty", "cut": "cannot be decoded"}


@pytest.fixture
def parts(tmp_path) -> Path:
    for place, split in enumerate(("train", "val", "test")):
        for label, name in enumerate(("cat", "dog")):
            fill(tmp_path / "pets" / split / name, 60 * place + 10 * label, 4)
    return tmp_path / "pets"


@pytest.mark.parametrize("kind", KINDS)
def test_packing_stops_at_a_damaged_file_in_one_line(parts, tmp_path, kind):
    damage(parts, kind)
    with pytest.raises(UsageError, match=f"001.png.*{KINDS[kind]}.*max_bad_images allows 0"):
        pack(str(parts), tmp_path / "s", PackConfig(per_shard=3, workers=1))
    assert not (tmp_path / "s" / MANIFEST).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_packing_leaves_out_and_counts_as_many_damaged_files_as_allowed(
    parts, tmp_path, kind, capfd
):
    """The same ones every time; an image folder that is read has as many images as before."""
    damage(parts, kind)
    config = PackConfig(per_shard=3, workers=1, max_bad_images=1)
    for folder in ("s", "t"):
        shards = pack(str(parts), tmp_path / folder, config)
        assert sum(shard.count for shard in shards if shard.split == "train") == 7
        said = capfd.readouterr().err
        assert said.count("warning: ") == 1 and "bad image 1 of at most 1" in said
    assert (tmp_path / "s" / MANIFEST).read_bytes() == (tmp_path / "t" / MANIFEST).read_bytes()
    (left,) = read_manifest(tmp_path / "s" / MANIFEST).content["left_out"]
    assert "001.png" in left and KINDS[kind] in left
    source = sets.load(in_memory_config(parts, max_bad_images=1))
    packed = sets.load(DataConfig("shards", str(tmp_path / "s"), image_size=8, workers=0))
    assert (1, 0) not in contents(packed.train) and len(packed.train) == 7
    assert len(source.train) == 8


def test_bad_images_of_all_shards_count_together(parts, tmp_path):
    for number in (0, 1, 2):
        (parts / "train" / "cat" / f"{number:03d}.png").write_bytes(b"")
    for limit in (0, 2):
        with pytest.raises(UsageError, match=rf"max_bad_images allows {limit} bad"):
            pack(str(parts), tmp_path / "s", PackConfig(per_shard=1, max_bad_images=limit))
    shards = pack(str(parts), tmp_path / "s", PackConfig(per_shard=1, max_bad_images=3))
    assert [shard.count for shard in shards if shard.split == "train"] == [1] * 5
    tars = {path.name for path in (tmp_path / "s").glob("*.tar")}
    assert tars == {shard.name for shard in shards}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_replaced_alike_in_memory_and_streamed(parts, kind):
    """In training by the next image; in an evaluation it is left out."""
    damage(parts, kind)
    (parts / "test" / "cat" / "120.png").write_bytes(b"")
    found = []
    left = [(121, 0), (122, 0), (123, 0), (130, 1), (131, 1), (132, 1), (133, 1)]
    for make in (in_memory_config, streamed_config):
        with pytest.raises(UsageError, match="max_bad_images allows 0 bad images"):
            pairs(make(parts))
        source = sets.load(make(parts, max_bad_images=2))
        assert contents(source.test) == left
        batches = source.train.shuffled(3, seed=1, epoch=0)
        found.append([(images[:, 0, 0, 0].tolist(), labels.tolist()) for images, labels in batches])
    assert found[0] == found[1]
    assert not any(1 in images for images, _ in found[0])


def pairs(config) -> None:
    """Read an epoch of training, and the test images."""
    source = sets.load(config)
    list(source.train.shuffled(3, seed=0, epoch=0))
    contents(source.test)


def test_a_limit_leaves_an_image_of_every_class(tmp_path):
    """In memory and streamed alike: it is one of files."""
    for place, (name, count) in enumerate({"a": 30, "b": 6, "c": 6, "d": 6}.items()):
        fill(tmp_path / "own" / name, 30 * place, count)
    found = [
        sets.load(config(tmp_path / "own", train_limit=4))
        for config in (in_memory_config, streamed_config)
    ]
    for source in found:
        assert source.train.labels.unique().tolist() == [0, 1, 2, 3]
    assert len(found[0].train) == len(found[1].train)
