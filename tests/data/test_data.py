"""Data sets: splits, order, augmentation, folders and torchvision's own formats."""

import hashlib
import io
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from autosparse.core.errors import UsageError
from autosparse.data import sets
from autosparse.data.augment import augmented, parse
from autosparse.data.config import DataConfig, PackConfig
from autosparse.data.decode import BadImage, decode
from autosparse.data.encode import encoded as pack_encoded
from autosparse.data.memory import MemorySplit
from autosparse.data.source import DataSource
from autosparse.data.splitting import limited_places
from autosparse.data.stream import Stream
from autosparse.training import loop, steppers
from autosparse.training.config import TrainingConfig

SPLITS = ("train", "validation", "test")
DIGITS = DataConfig("digits", image_size=8)


def rows(split: MemorySplit) -> list[tuple[bytes, int]]:
    """Return every image's bytes with its label."""
    pairs = zip(split.images, split.labels.tolist(), strict=True)
    return [(image.numpy().tobytes(), label) for image, label in pairs]


def numbered(count: int) -> MemorySplit:
    """Return images whose only pixel, and whose label, is their position."""
    return MemorySplit(
        torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(count)
    )


def source_of(split: MemorySplit, **changes) -> DataSource:
    settings = {"mean": (0.5,), "std": (0.25,), "augment": "none", "num_classes": 10, **changes}
    return DataSource(
        name="made",
        train=split,
        validation=split,
        test=split,
        in_chans=split.images.shape[1],
        image_size=split.images.shape[-1],
        fingerprint="0" * 16,
        **settings,
    )


# digits


def test_digits_splits_share_out_all_images_once():
    source = sets.load(DIGITS)
    together = [row for name in SPLITS for row in rows(getattr(source, name))]
    bunch = load_digits()
    pixels = np.rint(bunch.images.astype(np.float32) * (255 / 16)).astype(np.uint8)
    whole = [
        (image.tobytes(), int(label)) for image, label in zip(pixels, bunch.target, strict=True)
    ]
    assert len(together) == 1797
    assert Counter(together) == Counter(whole)


def test_digits_splits_are_stratified():
    source = sets.load(DIGITS)
    for label, total in Counter(load_digits().target.tolist()).items():
        test, held, train = (
            int((getattr(source, name).labels == label).sum())
            for name in ("test", "validation", "train")
        )
        assert abs(test - 0.2 * total) < 1
        assert abs(held - 0.15 * (total - test)) < 1
        assert train == total - test - held


def test_digits_splits_have_the_exact_share():
    source = sets.load(DIGITS)
    # 20 % of 1,797 is 359.4; 15 % of the other 1,438 is 215.7.
    sizes = (len(source.test), len(source.validation), len(source.train))
    assert sizes == (359, 216, 1222)


def test_digits_splits_do_not_depend_on_any_seed_and_leave_it_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    first = sets.load(DIGITS)
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state()
    second = sets.load(DIGITS)
    assert torch.equal(torch.get_rng_state(), before)
    for name in SPLITS:
        assert rows(getattr(first, name)) == rows(getattr(second, name))


def test_digits_test_split_is_pinned():
    """A test image must never become a training image in a later version."""
    labels = sets.load(DIGITS).test.labels
    digest = hashlib.sha256(bytes(labels.tolist())).hexdigest()
    assert (len(labels), digest[:12]) == (359, "6cc9dc628005")


def test_image_size_changes_the_pixels_and_not_the_splits():
    small, large = sets.load(DIGITS), sets.load(DataConfig("digits", image_size=16))
    assert large.test.images.shape == (len(small.test), 1, 16, 16)
    for name in SPLITS:
        assert torch.equal(getattr(small, name).labels, getattr(large, name).labels)


def test_validation_fraction_leaves_the_test_split_alone():
    usual = sets.load(DIGITS)
    half = sets.load(DataConfig("digits", image_size=8, validation_fraction=0.5))
    assert rows(half.test) == rows(usual.test)
    assert abs(len(half.train) - len(half.validation)) <= 10


@pytest.mark.parametrize("limit", [-3, 0, 5])
def test_train_limit_of_less_than_one_per_class_is_refused(limit):
    with pytest.raises(UsageError, match="train_limit must be at least 10"):
        sets.load(DataConfig("digits", image_size=8, train_limit=limit))


@pytest.mark.parametrize("limit", [10, 100, 150, 777])
def test_train_limit_is_exact_and_stratified(limit):
    whole = sets.load(DIGITS)
    limited = sets.load(DataConfig("digits", image_size=8, train_limit=limit))
    assert len(limited.train) == limit
    counts = Counter(limited.train.labels.tolist())
    for label, total in Counter(whole.train.labels.tolist()).items():
        assert abs(counts[label] - limit * total / len(whole.train)) <= 1


def test_train_limit_is_exact_where_most_classes_are_small():
    """The small classes keep one image each, the large one gives way."""
    labels = torch.cat([torch.zeros(10_000), torch.arange(1, 100).repeat(2)]).long()
    for limit, large in ((100, 1), (150, 51)):
        counts = torch.bincount(labels[limited_places(labels, limit)])
        assert counts.tolist() == [large, *[1] * 99]


@pytest.mark.parametrize("seed", [1 << 32, 10**20])
def test_a_seed_that_is_too_large_is_said(seed):
    source = sets.load(DIGITS)
    for use in (source.score_batches, partial(source.augmentation, epoch=0)):
        arguments = (1,) if use == source.score_batches else ()
        with pytest.raises(UsageError, match=f"seed must be at most 4294967295, got {seed}"):
            use(*arguments, seed=seed)
    source.augmentation((1 << 32) - 1, 1000, 64)


def test_train_limit_takes_the_same_training_images_and_no_others():
    config = DataConfig("digits", image_size=8, train_limit=100)
    whole, first, second = sets.load(DIGITS), sets.load(config), sets.load(config)
    assert rows(first.train) == rows(second.train)
    assert not Counter(rows(first.train)) - Counter(rows(whole.train))
    assert rows(first.test) == rows(whole.test)
    assert rows(first.validation) == rows(whole.validation)


def test_train_limit_beyond_the_set_keeps_all():
    limited = sets.load(DataConfig("digits", image_size=8, train_limit=5000))
    assert rows(limited.train) == rows(sets.load(DIGITS).train)


@pytest.mark.parametrize("limit", [0, -3])
def test_train_limit_below_one_is_refused(limit):
    with pytest.raises(UsageError, match="train_limit"):
        sets.load(DataConfig("digits", train_limit=limit))


# order


def order(split, *arguments, **options) -> list[list[int]]:
    return [labels.tolist() for _, labels in split.shuffled(*arguments, **options)]


def test_order_depends_on_seed_and_epoch_only():
    split = numbered(23)
    torch.manual_seed(0)
    first = order(split, 5, seed=3, epoch=1)
    torch.manual_seed(99)
    assert order(split, 5, seed=3, epoch=1) == first
    assert order(split, 5, seed=3, epoch=2) != first
    assert order(split, 5, seed=4, epoch=1) != first


def test_shuffled_gives_whole_batches_without_repeats_and_labels_stay_with_images():
    split = numbered(23)
    batches = list(split.shuffled(5, seed=0, epoch=0))
    assert len(batches) == split.steps(5) == 4
    assert all(len(labels) == 5 for _, labels in batches)
    seen = torch.cat([labels for _, labels in batches])
    assert len(seen.unique()) == 20
    assert torch.equal(torch.cat([images for images, _ in batches]).flatten().long(), seen)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_batches_together_are_the_global_batches(world_size):
    split = numbered(23)
    whole = order(split, 6, seed=1, epoch=0)
    each = [
        order(split, 6 // world_size, seed=1, epoch=0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = [list(chain(*parts)) for parts in zip(*each, strict=True)]
    assert together == whole
    assert len(whole) == split.steps(6 // world_size, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_once_gives_every_image_exactly_once(world_size):
    split = numbered(23)
    batches = [
        batch
        for rank in range(world_size)
        for batch in split.once(4, rank=rank, world_size=world_size)
    ]
    labels = torch.cat([labels for _, labels in batches])
    assert sorted(labels.tolist()) == list(range(23))
    assert torch.equal(torch.cat([images for images, _ in batches]).flatten().long(), labels)
    assert max(len(labels) for _, labels in batches) == 4


# augmentation


def shifted(image: list, down: int, right: int, mirror: bool) -> list:
    """Reference: move a square image [C][H][W], repeat its edges, then mirror it."""
    side = len(image[0])

    def within(place: int) -> int:
        return min(max(place, 0), side - 1)

    moved = [
        [[channel[within(y + down)][within(x + right)] for x in range(side)] for y in range(side)]
        for channel in image
    ]
    return [[row[::-1] for row in channel] for channel in moved] if mirror else moved


def all_shifts(image: torch.Tensor, reach: int) -> dict[bytes, tuple[int, int, bool]]:
    steps = range(-reach, reach + 1)
    return {
        bytes(np.array(shifted(image.tolist(), down, right, mirror), np.uint8)): (
            down,
            right,
            mirror,
        )
        for down in steps
        for right in steps
        for mirror in (False, True)
    }


@pytest.mark.parametrize(("side", "reach"), [(8, 1), (16, 2), (20, 2)])
def test_augmented_shifts_by_an_eighth_and_mirrors_half(side, reach):
    place = torch.arange(side, dtype=torch.uint8)
    image = torch.stack([place.expand(side, side), place.expand(side, side).t()])
    known = all_shifts(image, reach)
    generator = torch.Generator().manual_seed(0)
    batch = augmented(image.expand(800, -1, -1, -1), parse("shift+flip"), generator)
    drawn = [known[one.numpy().tobytes()] for one in batch]
    assert len({(down, right) for down, right, _ in drawn}) == (2 * reach + 1) ** 2
    # Five standard deviations of a fair coin thrown 800 times.
    assert abs(sum(mirror for *_, mirror in drawn) - 400) < 71


def test_augmented_treats_each_image_by_itself():
    images = sets.load(DataConfig("digits", image_size=16)).train.images[:6]
    batch = augmented(images, parse("shift+flip"), torch.Generator().manual_seed(4))
    drawn = [
        all_shifts(image, 2)[one.numpy().tobytes()]
        for image, one in zip(images, batch, strict=True)
    ]
    assert len(set(drawn)) > 1


def test_augmented_without_flip_never_mirrors():
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    known = all_shifts(image, 1)
    batch = augmented(
        image.expand(200, -1, -1, -1), parse("shift"), torch.Generator().manual_seed(0)
    )
    assert not any(known[one.numpy().tobytes()][2] for one in batch)


def test_augmented_comes_from_its_generator_alone():
    images = torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8).repeat(20, 1, 1, 1)
    made = []
    for global_seed, own_seed in ((0, 5), (1, 5), (0, 6)):
        torch.manual_seed(global_seed)
        made.append(augmented(images, parse("shift+flip"), torch.Generator().manual_seed(own_seed)))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


# prepare


def test_prepare_normalises_each_channel():
    images = torch.tensor([[[[255, 0]], [[51, 102]]]], dtype=torch.uint8)
    floats = sets.prepare(images, (0.5, 0.2), (0.25, 0.1))
    expected = torch.tensor([[[[2.0, -2.0]], [[0.0, 2.0]]]])
    torch.testing.assert_close(floats, expected)


def test_training_images_are_prepared_to_mean_zero_and_deviation_one():
    source = sets.load(DIGITS)
    floats = source.prepare(source.train.images)
    assert floats.mean().abs() < 1e-4
    assert abs(floats.std() - 1) < 1e-4


@pytest.mark.parametrize(("augment", "same"), [("none", True), ("shift", False)])
def test_prepare_augments_only_if_asked(augment, same):
    split = MemorySplit(torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8), torch.zeros(1))
    source = source_of(split, augment=augment)
    plain = source.prepare(split.images.expand(50, -1, -1, -1))
    drawn = source.prepare(split.images.expand(50, -1, -1, -1), torch.Generator().manual_seed(0))
    assert torch.equal(plain, drawn) is same


# score_batches


def scored(source: DataSource, *arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
    batches = source.score_batches(*arguments, **options)
    return torch.cat([images for images, _ in batches]), torch.cat(
        [labels for _, labels in batches]
    )


def test_score_batches_are_the_first_of_each_class_in_epoch_zero():
    source = sets.load(DIGITS)
    images, labels = scored(source, 5, seed=7, batch_size=16)
    left, expected = Counter(dict.fromkeys(range(10), 5)), []
    for image, label in source.train.shuffled(1, seed=7, epoch=0):
        if left[int(label)]:
            left[int(label)] -= 1
            expected.append((image, int(label)))
    assert labels.tolist() == [label for _, label in expected]
    torch.testing.assert_close(images, source.prepare(torch.cat([image for image, _ in expected])))


def test_score_batches_have_the_size_asked_for():
    sizes = [len(labels) for _, labels in sets.load(DIGITS).score_batches(5, batch_size=16)]
    assert sizes == [16, 16, 16, 2]


def test_score_batches_are_fixed_by_the_seed():
    source = sets.load(DIGITS)
    torch.manual_seed(0)
    first = scored(source, 4, seed=1)[0]
    torch.manual_seed(1)
    assert torch.equal(scored(source, 4, seed=1)[0], first)
    assert not torch.equal(scored(source, 4, seed=2)[0], first)


def test_score_batches_are_balanced_where_the_images_suffice():
    """20 images of each of 7 classes: the last, partial batch of an epoch counts too."""
    split = MemorySplit(torch.zeros(140, 1, 1, 1, dtype=torch.uint8), torch.arange(140) % 7)
    for wanted in (12, 20):
        _, labels = scored(source_of(split, num_classes=7), wanted)
        assert torch.bincount(labels).tolist() == [wanted] * 7


def test_score_batches_of_no_image_are_refused():
    with pytest.raises(UsageError, match="samples_per_class"):
        sets.load(DIGITS).score_batches(0)


def test_score_batches_that_are_several_hold_other_images():
    """Each is balanced; the first is what a single one would be; all follow epoch 0's order."""
    source = sets.load(DIGITS)
    first, second, third = source.score_batches(4, seed=3, batches=3)
    alone = source.score_batches(4, seed=3)
    assert len(alone) == 1
    assert torch.equal(first[0], alone[0][0]) and torch.equal(first[1], alone[0][1])
    for _, labels in (first, second, third):
        assert torch.bincount(labels).tolist() == [4] * 10
    found, expected = Counter(), [[], [], []]
    for image, label in source.train.shuffled(1, seed=3, epoch=0):
        place = found[int(label)] // 4
        found[int(label)] += 1
        if place < 3:
            expected[place].append(source.prepare(image))
    for (images, _), wanted in zip((first, second, third), expected, strict=True):
        torch.testing.assert_close(images, torch.cat(wanted))


def test_score_batches_that_are_several_share_no_image():
    source = source_of(numbered(60), num_classes=1)
    source = replace(source, train=replace(source.train, labels=torch.zeros(60).long()))
    parts = source.score_batches(10, batches=3, batch_size=4)
    assert [len(labels) for _, labels in parts] == [4, 4, 2] * 3
    values = torch.cat([images for images, _ in parts]).flatten()
    assert len(values.unique()) == 30


def test_score_batches_beyond_the_images_use_each_once():
    """Seven images of each of two classes fill a batch of five and part of a second."""
    split = replace(numbered(14), labels=torch.arange(14) % 2)
    parts = source_of(split, num_classes=2).score_batches(5, batches=3)
    assert [torch.bincount(labels).tolist() for _, labels in parts] == [[5, 5], [2, 2]]
    assert len(torch.cat([images for images, _ in parts]).unique()) == 14


@pytest.mark.parametrize("name", ["samples_per_class", "batches", "batch_size"])
def test_score_batches_of_nothing_are_refused(name):
    options = {"samples_per_class": 2, "batches": 1, "batch_size": 8, name: 0}
    with pytest.raises(UsageError, match=f"{name} must be at least 1"):
        sets.load(DIGITS).score_batches(**options)


# training_batches


def fitted(source: DataSource, size: int, *, seed: int, epochs: int):
    """Let `fit` train, and return the batches that it gave to its stepper."""
    seen = []
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    config = TrainingConfig(epochs=epochs, batch_size=size, checkpoint_epochs=0)
    stepper = steppers.PlainStepper(model, config, source.train.steps(size))
    step = stepper.step

    def recorded(images, labels):
        seen.append((images.clone(), labels.clone()))
        return step(images, labels)

    stepper.step = recorded
    loop.fit(stepper, source, config, seed=seed)
    return seen


@pytest.mark.parametrize("augment", ["none", "shift+flip"])
def test_training_batches_are_those_of_training_epoch_after_epoch(augment):
    source = sets.load(DataConfig("digits", image_size=8, train_limit=100, augment=augment))
    seen = fitted(source, 30, seed=5, epochs=3)
    assert len(seen) == 9
    found = list(islice(source.training_batches(30, seed=5), 9))
    for (images, labels), (wanted, targets) in zip(found, seen, strict=True):
        assert torch.equal(images, wanted) and torch.equal(labels, targets)
    epochs = [torch.cat([labels for _, labels in found[n : n + 3]]) for n in (0, 3)]
    assert not torch.equal(*epochs)


def test_training_batches_start_the_same_each_time_and_never_end():
    source = sets.load(DataConfig("digits", image_size=8, train_limit=100, augment="shift"))
    batches = source.training_batches(40, seed=1)
    first, again = ([images for images, _ in islice(batches, 7)] for _ in range(2))
    assert len(first) == 7 > 3 * source.train.steps(40)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = next(iter(source.training_batches(40, seed=2)))[0]
    assert not torch.equal(other, first[0])


def test_training_batches_leave_the_global_rng_alone():
    source = sets.load(DataConfig("digits", image_size=8, train_limit=100, augment="shift"))
    state = torch.get_rng_state()
    next(iter(source.training_batches(40, seed=1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_batches_larger_than_the_set_are_refused():
    with pytest.raises(UsageError, match="batch_size 141 is more than the 140 images"):
        source_of(numbered(140)).training_batches(141, seed=0)


# decoding


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def flat(mode: str, colour, side: int = 16) -> Image.Image:
    return Image.new(mode, (side, side), colour)


def with_palette() -> Image.Image:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 12, 200, 90])
    return image


DECODED = {
    "RGB": (encoded(flat("RGB", (10, 200, 30)), "PNG"), (10, 200, 30)),
    "grey": (encoded(flat("L", 77), "PNG"), (77, 77, 77)),
    "CMYK": (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "palette": (encoded(with_palette(), "PNG"), (12, 200, 90)),
    "alpha": (encoded(flat("RGBA", (9, 8, 7, 255)), "PNG"), (9, 8, 7)),
    "16 bits": (encoded(flat("I;16", 128 * 257), "PNG"), (128, 128, 128)),
    "JPEG": (encoded(flat("RGB", (128, 64, 32)), "JPEG", quality=100), (128, 64, 32)),
}


@pytest.mark.parametrize("mode", DECODED)
@pytest.mark.parametrize("size", [8, 16, 20])
def test_decode_takes_any_mode(mode, size):
    content, colour = DECODED[mode]
    image = decode(content, size)
    assert (image.dtype, image.shape) == (torch.uint8, (3, size, size))
    assert (image.int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 3


def test_decode_honours_the_exif_rotation():
    top_white = Image.new("L", (16, 16), 0)
    top_white.paste(255, (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # Stored so that it must be turned by 90 degrees clockwise.
    image = decode(encoded(top_white, "JPEG", exif=exif, quality=100), 16)
    assert image[:, :, :7].max() < 50
    assert image[:, :, 9:].min() > 200


@pytest.mark.parametrize("size", [(32, 16), (16, 32)])
def test_decode_cuts_out_the_centre(size):
    image = Image.new("RGB", size, (255, 0, 0))
    left, top = (size[0] - 16) // 2, (size[1] - 16) // 2
    image.paste((0, 255, 0), (left, top, left + 16, top + 16))
    assert torch.equal(
        decode(encoded(image, "PNG"), 16), torch.tensor([0, 255, 0]).view(3, 1, 1).expand(3, 16, 16)
    )


def huge_bitmap() -> bytes:
    """Return a BMP whose damaged header claims 100,000 pixels a side."""
    content = bytearray(encoded(flat("RGB", (1, 2, 3)), "BMP"))
    content[18:26] = struct.pack("<ii", 100_000, 100_000)
    return bytes(content)


DAMAGED = {
    "empty": b"",
    "text": b"no image",
    "cut": DECODED["JPEG"][0][:200],
    "cut PNG": DECODED["RGB"][0][:40],
    "huge": huge_bitmap(),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_decode_names_a_damaged_file(tmp_path, damage):
    path = tmp_path / "picture.jpg"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(UsageError, match=r"picture\.jpg"):
        decode(path, 8)


def test_decode_takes_a_jpeg_whose_metadata_are_cut():
    whole = DECODED["JPEG"][0]
    segment = b"Exif\0\0II*\0\x08\0"  # Of the offset of its first entry two bytes are missing.
    cut = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]
    assert torch.equal(decode(cut, 16), decode(whole, 16))


@pytest.mark.parametrize("error", [struct.error, EOFError, IndexError, KeyError, TypeError])
def test_whatever_pil_raises_the_image_is_bad(monkeypatch, error):
    def fails(*_):
        raise error("damaged")

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(BadImage, match=r"cannot be decoded .*damaged"):
        decode(DAMAGED["cut PNG"], 8)
    with pytest.raises(BadImage, match=r"cannot be packed .*damaged"):
        pack_encoded(DAMAGED["cut PNG"], PackConfig(resize=8))


# image folders


def fill(folder: Path, start: int, count: int) -> None:
    """Write 8 x 8 images of one grey each, from `start` on, so that a pixel names its image."""
    folder.mkdir(parents=True)
    for grey in range(start, start + count):
        flat("L", grey, 8).save(folder / f"{grey:03d}.png")


def in_memory_config(root: Path, **changes) -> DataConfig:
    return DataConfig("folder", str(root), image_size=8, **changes)


def streamed_config(root: Path, workers: int = 0, **changes) -> DataConfig:
    return in_memory_config(root, memory_limit_gb=0, workers=workers, **changes)


def contents(split, world_size: int = 1) -> list[tuple[int, int]]:
    """Return (grey, label) of all that `once` gives."""
    return [
        pair
        for rank in range(world_size)
        for images, labels in split.once(4, rank=rank, world_size=world_size)
        for pair in zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)
    ]


@pytest.fixture
def flat_folder(tmp_path):
    """CLASS/*.png: 20 images of each of two classes."""
    fill(tmp_path / "pets" / "cat", 0, 20)
    fill(tmp_path / "pets" / "dog", 100, 20)
    return tmp_path / "pets"


def test_folder_without_parts_is_split_by_class(flat_folder):
    source = sets.load(in_memory_config(flat_folder))
    assert (source.num_classes, source.in_chans, source.image_size) == (2, 3, 8)
    # 15 % of 40 is 6, of the other 34 it is 5.1.
    sizes = {name: torch.bincount(getattr(source, name).labels).tolist() for name in SPLITS}
    assert sizes["test"] == [3, 3]
    assert (sorted(sizes["validation"]), sorted(sizes["train"])) == ([2, 3], [14, 15])
    everything = sorted(pair for name in SPLITS for pair in contents(getattr(source, name)))
    assert everything == [(n, 0) for n in range(20)] + [(n, 1) for n in range(100, 120)]


def test_streamed_folder_gives_the_same_images(flat_folder):
    whole = sets.load(in_memory_config(flat_folder))
    stream = sets.load(streamed_config(flat_folder, workers=1))
    assert isinstance(stream.train, Stream)
    for name in SPLITS:
        assert contents(getattr(stream, name)) == contents(getattr(whole, name))


@pytest.mark.parametrize("world_size", [2, 3])
def test_streamed_folder_shares_out_every_image_once(flat_folder, world_size):
    stream = sets.load(streamed_config(flat_folder)).train
    assert sorted(contents(stream, world_size)) == sorted(contents(stream))


def test_streamed_folder_shuffles_as_memory_does(flat_folder):
    stream = sets.load(streamed_config(flat_folder)).train
    whole = order(stream, 6, seed=0, epoch=0)
    pixels = [images[:, 0, 0, 0].tolist() for images, _ in stream.shuffled(6, seed=0, epoch=0)]
    halves = [
        [images[:, 0, 0, 0].tolist() for images, _ in ranks_batches]
        for ranks_batches in (
            stream.shuffled(3, seed=0, epoch=0, rank=rank, world_size=2) for rank in (0, 1)
        )
    ]
    assert [left + right for left, right in zip(*halves, strict=True)] == pixels
    assert len(whole) == stream.steps(6) == 29 // 6
    assert order(stream, 6, seed=0, epoch=1) != whole


@pytest.mark.parametrize("streamed", [False, True])
def test_folder_limit_is_exact(flat_folder, streamed):
    config = (streamed_config if streamed else in_memory_config)(flat_folder, train_limit=9)
    assert len(contents(sets.load(config).train)) == 9


@pytest.mark.parametrize("make", [in_memory_config, streamed_config])
@pytest.mark.parametrize("validation", ["val", "validation"])
def test_folder_with_parts_uses_them(tmp_path, make, validation):
    for place, part in enumerate(("train", validation, "test")):
        fill(tmp_path / part / "cat", 60 * place, 4 + place)
        fill(tmp_path / part / "dog", 60 * place + 30, 4 + place)
    source = sets.load(make(tmp_path))
    for place, name in enumerate(SPLITS):
        expected = [(60 * place + n, 0) for n in range(4 + place)]
        expected += [(60 * place + 30 + n, 1) for n in range(4 + place)]
        assert contents(getattr(source, name)) == expected


def test_folder_whose_only_held_out_part_is_val_tests_on_it(tmp_path):
    fill(tmp_path / "train" / "cat", 0, 20)
    fill(tmp_path / "train" / "dog", 50, 20)
    fill(tmp_path / "val" / "cat", 100, 2)
    fill(tmp_path / "val" / "dog", 200, 2)
    source = sets.load(in_memory_config(tmp_path))
    assert contents(source.test) == [(100, 0), (101, 0), (200, 1), (201, 1)]
    assert (len(source.train), len(source.validation)) == (34, 6)


def test_folder_takes_all_modes_in_memory_and_streamed(tmp_path):
    for part in ("train", "val", "test"):
        for name in ("odd", "even"):
            (tmp_path / part / name).mkdir(parents=True)
            for mode, (content, _) in DECODED.items():
                # A PNG named .jpg among them: files are known by their content.
                (tmp_path / part / name / f"{mode}.jpg").write_bytes(content)
    splits = [sets.load(make(tmp_path)).train for make in (in_memory_config, streamed_config)]
    images = [torch.cat([batch for batch, _ in split.once(5)]) for split in splits]
    assert images[0].shape == (2 * len(DECODED), 3, 8, 8)
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize("streamed", [False, True])
def test_folder_names_a_damaged_image(flat_folder, streamed):
    for number in range(20):
        (flat_folder / "cat" / f"{number:03d}.png").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"cat/0\d\d\.png"):
        contents(sets.load((streamed_config if streamed else in_memory_config)(flat_folder)).train)


def test_worker_names_a_damaged_image_in_one_line(flat_folder):
    for number in range(20):
        (flat_folder / "cat" / f"{number:03d}.png").write_bytes(b"damaged")
    stream = sets.load(streamed_config(flat_folder, workers=1)).train
    with pytest.raises(UsageError, match=r"cat/0\d\d\.png") as caught:
        contents(stream)
    assert "Traceback" not in str(caught.value)


def test_folder_whose_parts_differ_in_classes_names_the_class(tmp_path):
    fill(tmp_path / "train" / "cat", 0, 3)
    fill(tmp_path / "train" / "dog", 9, 3)
    fill(tmp_path / "test" / "cat", 20, 3)
    with pytest.raises(UsageError, match="dog"):
        sets.load(in_memory_config(tmp_path))


def test_folder_that_is_missing_or_empty_is_named(tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("nowhere", "bare"):
        with pytest.raises(UsageError, match=name):
            sets.load(in_memory_config(tmp_path / name))


# torchvision


def idx(values: np.ndarray) -> bytes:
    """Encode uint8 values in the format of MNIST's files."""
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    return struct.pack(">HBB", 0, 8, values.ndim) + shape + values.astype(np.uint8).tobytes()


def write_mnist(root: Path, folder: str = "MNIST", grey: int = 0) -> None:
    """Write 40 training and 20 test images; the first pixel of each is its place, others grey."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = np.full((count, 28, 28), grey)
        images[:, 0, 0] = np.arange(count)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_mnist_files_are_read(tmp_path, name, folder):
    write_mnist(tmp_path, folder)
    source = sets.load(DataConfig(name, str(tmp_path)))
    assert (source.num_classes, source.in_chans, source.image_size) == (10, 1, 28)
    assert contents(source.test) == [(place, place % 10) for place in range(20)]
    both = sorted(contents(source.train) + contents(source.validation))
    assert both == [(place, place % 10) for place in range(40)]


def test_mnist_is_resized_and_found_through_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("AUTOSPARSE_DATA", str(tmp_path))
    assert sets.load(DataConfig("mnist", image_size=14)).test.images.shape == (20, 1, 14, 14)


def write_cifar(root: Path, monkeypatch) -> None:
    """Write CIFAR-10's files with ten images each, and tell torchvision their checksums."""
    import pickle

    folder = root / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict) -> list[str]:
        path = folder / name
        path.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    pixels = np.zeros((20, 3, 32, 32), np.uint8)
    pixels[:, 0], pixels[:, 1], pixels[:, 2, 0, 5] = np.arange(20)[:, None, None], 100, 200
    batch = {"data": pixels.reshape(20, -1), "labels": [place % 10 for place in range(20)]}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write("data_batch_1", batch)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch)])
    name, digest = write("batches.meta", {"label_names": [str(n) for n in range(10)]})
    meta = {"filename": name, "key": "label_names", "md5": digest}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)


def test_cifar_files_are_read(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    source = sets.load(DataConfig("cifar10", str(tmp_path)))
    assert source.test.images.shape == (20, 3, 32, 32)
    assert contents(source.test) == [(place, place % 10) for place in range(20)]
    assert source.test.images[:, 1].unique().tolist() == [100]
    assert (source.test.images[:, 2] == 200).nonzero()[:, 1:].unique(dim=0).tolist() == [[0, 5]]


@pytest.mark.parametrize("error", [RuntimeError("no checksum"), URLError("no network")])
@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_no_data_and_no_network_names_the_folder(tmp_path, monkeypatch, name, kind, error):
    def download(self):
        raise error

    monkeypatch.setattr(getattr(datasets, kind), "download", download)
    with pytest.raises(UsageError, match="elsewhere") as caught:
        sets.load(DataConfig(name, str(tmp_path / "elsewhere")))
    assert kind in str(caught.value)


def test_a_set_is_not_downloaded_twice_at_a_time(tmp_path, monkeypatch):
    """What one process downloads, another waits for."""
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: pytest.fail("downloaded twice"))
    other = FileLock(tmp_path / ".download.lock")
    config = DataConfig("mnist", str(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        with other:
            waiting = pool.submit(sets.load, config)
            time.sleep(0.3)
            assert not waiting.done()
            write_mnist(tmp_path)
        assert len(waiting.result(20).test) == 20
    with other.acquire(timeout=0):
        pass


@pytest.mark.parametrize("kept", [0, 10, 500])
def test_cut_mnist_file_names_the_folder(tmp_path, kept):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match=str(tmp_path)):
        sets.load(DataConfig("mnist", str(tmp_path)))


# load


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (DataConfig("digit"), "'digits'"),
        (DataConfig("folder"), "data.root"),
        (DataConfig("shards"), "data.root"),
        (DataConfig(validation_fraction=0.0), "validation_fraction"),
        (DataConfig(validation_fraction=1.0), "validation_fraction"),
        (DataConfig(image_size=0), "data.image_size must be whole and at least 1, got 0"),
        (DataConfig(image_size=-8), "data.image_size must be"),
        (DataConfig(workers=-1), "data.workers must be"),
        (DataConfig(memory_limit_gb=-1), "data.memory_limit_gb must be"),
        (DataConfig(max_bad_images=-1), "data.max_bad_images must be"),
        (DataConfig(augment="rotate"), "rotate"),
    ],
)
def test_load_refuses_what_cannot_be(config, named):
    with pytest.raises(UsageError, match=named):
        sets.load(config)


def test_load_takes_a_name_and_keeps_the_config():
    assert sets.load("digits").config == DataConfig("digits")


def test_a_set_that_is_remembered_is_loaded_once():
    configs = [DIGITS, replace(DIGITS, normalisation=[[0.5], [0.25]])]
    with sets.remembered():
        first = [sets.load(config) for config in configs]
        assert all(sets.load(c) is each for c, each in zip(configs, first, strict=True))
        assert first[0] is not first[1]
    assert sets.load(DIGITS) is not first[0]
    assert sets.load(DIGITS).fingerprint == first[0].fingerprint


def test_images_have_the_default_dtype_of_the_time() -> None:
    images = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float32):  # What is kept of the first is not used again.
            torch.set_default_dtype(dtype)
            assert sets.prepare(images, (0.125, 0.25, 0.5), (0.5, 0.25, 0.125)).dtype == dtype
    finally:
        torch.set_default_dtype(before)
