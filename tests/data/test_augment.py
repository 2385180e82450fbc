"""Random crops at decoding, RandAugment, and skipping what they would draw."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from autosparse.core.errors import UsageError
from autosparse.data import decode as decoding
from autosparse.data import sets
from autosparse.data.augment import parse, python_rng, rand_augment, random_crop
from autosparse.data.config import DataConfig
from autosparse.data.decode import decode
from autosparse.data.folder import FolderSamples
from autosparse.data.memory import MemorySplit
from autosparse.data.stream import Stream
from tests.data.packed import write_shards

RAND = "rand-m9-mstd0.5-inc1"


def photo(seed: int = 0, size: tuple[int, int] = (60, 40), kind: str = "JPEG", **options) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("augment") / "s"
    samples = [("train", photo(seed), seed % 3) for seed in range(24)]
    samples += [(split, photo(99), 0) for split in ("validation", "test")]
    write_shards(samples, folder, ["a", "b", "c"], per_shard=8)
    return folder


def load(root, augment: str, workers: int = 0, **changes) -> sets.DataSource:
    return sets.load(DataConfig(
        "shards", str(root), image_size=16, augment=augment, workers=workers,
        **{"memory_limit_gb": 0, **changes},
    ))  # fmt: skip


def images(split, epoch: int = 0, **options) -> torch.Tensor:
    return torch.cat([x for x, _ in split.shuffled(6, seed=1, epoch=epoch, **options)])


@pytest.mark.parametrize("augment", ["crop+flip", f"crop+flip+{RAND}"])
def test_crops_come_from_seed_epoch_and_sample_alone(root, augment):
    split = load(root, augment).train
    random.seed(1)
    np.random.seed(1)
    first = images(split)
    random.seed(2)
    np.random.seed(2)
    assert torch.equal(images(split), first)
    assert torch.equal(images(load(root, augment, workers=2).train), first)
    assert torch.equal(images(split, first=2), first[12:])
    halves = [
        [x for x, _ in split.shuffled(3, seed=1, epoch=0, rank=r, world_size=2)] for r in (0, 1)
    ]
    together = [torch.cat(parts) for parts in zip(*halves, strict=True)]
    assert torch.equal(torch.cat(together), first)
    plain = images(split.plain())
    assert not torch.equal(first, plain)
    assert torch.equal(plain, images(load(root, "none").train))


def test_crops_differ_between_epochs_and_leave_the_rng_alone(root):
    split = load(root, "crop+flip").train
    state, numbers = random.getstate(), np.random.get_state()[1].tolist()
    epochs = []
    for epoch in (0, 1):
        order = split.samples.order(1, epoch)[0]
        lanes = split.samples.order(1, epoch)[1]
        places = torch.cat([
            part[lane.argsort(stable=True)]
            for part, lane in zip(order.split(6), lanes.split(6), strict=True)
        ])  # fmt: skip
        epochs.append(images(split, epoch)[places.argsort()])
    same = (epochs[0] == epochs[1]).flatten(1).all(1)
    assert not same.any()
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numbers


def test_evaluation_and_scoring_see_whole_images(root):
    cropped, plain = load(root, "crop+flip"), load(root, "none")
    for split in ("validation", "test", "train"):
        ours, theirs = (next(getattr(s, split).once(24))[0] for s in (cropped, plain))
        assert torch.equal(ours, theirs)
    ours, theirs = (source.score_batches(2)[0][0] for source in (cropped, plain))
    assert torch.equal(ours, theirs)


def test_random_crops_have_the_sizes_of_the_recipe():
    """8 to 100 % of the area, sides 3:4 to 4:3, wherever they fit; a pixel of rounding."""
    with python_rng() as seed:
        seed(0)
        boxes = [random_crop(300, 400) for _ in range(500)]
    for top, left, tall, wide in boxes:
        assert 0 <= top <= top + tall <= 300
        assert 0 <= left <= left + wide <= 400
        assert 0.079 < tall * wide / (300 * 400) <= 1
        assert 0.74 < wide / tall < 1.35
    assert len(set(boxes)) > 490


def test_images_are_mirrored_half_of_the_time(tmp_path):
    """Images that grow brighter to the right grow brighter to the left when mirrored."""
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    samples = FolderSamples([(tmp_path / "ramp.png", 0)] * 200)
    batch = images(Stream(samples, 16, augment="crop+flip")).float()
    mirrored = int((batch[:, 0, :, 0] > batch[:, 0, :, -1]).all(1).sum())
    # Five standard deviations of a fair coin thrown 198 times.
    assert abs(mirrored - 99) < 36


def test_crop_is_for_streams(root):
    small = DataConfig("shards", str(root), image_size=16, augment="crop+flip")
    for config in (DataConfig(augment="crop+flip"), small):
        with pytest.raises(UsageError, match="streamed"):
            sets.load(config)


@pytest.mark.parametrize(
    "text", ["rotate", "shift+flip+rnd", "none+rand-m9", "crop", "shift+flip+rand-q3", "flip", ""]
)
def test_unknown_augmentation_is_refused(text):
    with pytest.raises(UsageError, match=r"data\.augment"):
        parse(text)


# RandAugment of sets in memory


@pytest.fixture(scope="module")
def digits():
    return sets.load(DataConfig("digits", train_limit=60, augment=f"shift+flip+{RAND}"))


def test_rand_augment_comes_from_the_generator(digits):
    batch = digits.train.images[:20]
    made = [digits.prepare(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert made[0].shape == batch.shape


def test_rand_augment_follows_the_usual_shifts(digits):
    """Some images it leaves alone; those are what shift+flip alone makes of them."""
    batch = digits.train.images[:60]
    plain = replace(digits, augment="shift+flip")
    ours, theirs = (s.prepare(batch, torch.Generator().manual_seed(5)) for s in (digits, plain))
    same = (ours == theirs).flatten(1).all(1)
    assert 0 < int(same.sum()) < 60


@pytest.mark.parametrize("augment", ["none", "shift", "shift+flip", f"shift+flip+{RAND}"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_skip_draws_what_prepare_would(digits, augment, steps):
    source = replace(digits, augment=augment)
    skipped, used = (torch.Generator().manual_seed(4) for _ in range(2))
    source.skip(skipped, 7, steps)
    for _ in range(steps):
        source.prepare(source.train.images[:7], used)
    assert torch.equal(skipped.get_state(), used.get_state())


def test_crops_are_drawn_without_the_generator(root):
    source = load(root, "crop+flip")
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    source.skip(generator, 4, 3)
    batch = next(source.train.once(4))[0]
    assert torch.equal(source.prepare(batch, generator), source.prepare(batch))
    assert torch.equal(generator.get_state(), before)


def test_rand_augment_of_two_channels_is_refused():
    with pytest.raises(UsageError, match="channels"):
        from autosparse.data.augment import rand_augmented

        rand_augmented(torch.zeros(2, 8, 8, dtype=torch.uint8), RAND)


def test_rand_augment_is_timms():
    from timm.data.auto_augment import RandAugment

    assert isinstance(rand_augment(RAND, 32), RandAugment)


# decoders


@pytest.mark.skipif(decoding.simplejpeg is None, reason="simplejpeg is not installed")
@pytest.mark.parametrize("size", [(60, 40), (301, 203), (450, 801)])
@pytest.mark.parametrize("options", [
    {"quality": 90}, {"quality": 60, "progressive": True}, {"quality": 95, "subsampling": 0},
])  # fmt: skip
def test_both_decoders_give_the_same_pixels(monkeypatch, size, options):
    content = photo(1, size, **options)
    box = (size[1] // 5, size[0] // 7, size[1] // 2, size[0] // 2)
    for side in (8, 32, 100):
        for crop in (decoding.centred, lambda height, width: box):
            fast = decode(content, side, crop)
            with monkeypatch.context() as patch:
                patch.setattr(decoding, "simplejpeg", None)
                assert torch.equal(decode(content, side, crop), fast)


def test_only_plain_jpegs_skip_pillow():
    turned = Image.Exif()
    turned[0x0112] = 6
    upright = Image.Exif()
    upright[0x0112] = 1
    stream = io.BytesIO()
    Image.new("CMYK", (60, 40)).save(stream, "JPEG")
    assert decoding.plain_jpeg(photo()) == (40, 60)
    assert decoding.plain_jpeg(photo(progressive=True)) == (40, 60)
    assert decoding.plain_jpeg(photo(exif=upright)) == (40, 60)
    for other in (photo(exif=turned), photo(kind="PNG"), stream.getvalue(), photo()[:100], b""):
        assert decoding.plain_jpeg(other) is None


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
def test_cut_jpeg_is_an_error_whatever_decodes_it(monkeypatch, kept):
    content = photo(1, (301, 203))
    content = content[: int(len(content) * kept)]
    for decoder in {decoding.simplejpeg, None}:
        monkeypatch.setattr(decoding, "simplejpeg", decoder)
        with pytest.raises(UsageError, match="cannot be decoded"):
            decode(content, 32)


# Alternating flips


def test_alternating_flips_by_hand():
    """Which side an image shows depends on seed, epoch and image, not on its batch."""
    count, side = 40, torch.arange(3, dtype=torch.uint8)
    images = side.view(1, 1, 1, 3).expand(count, 1, 3, 3).contiguous()
    split = MemorySplit(images, torch.arange(count), alternating=True)

    def shown(epoch, batch=10, seed=3, **ranks):
        """Image -> whether it was mirrored; what an image looks like is checked, too."""
        found = {}
        for batch_of, numbers in split.shuffled(batch, seed=seed, epoch=epoch, **ranks):
            for image, number in zip(batch_of, numbers.tolist(), strict=True):
                row = image[0, 0].tolist()
                assert row in ([0, 1, 2], [2, 1, 0])
                found[number] = row == [2, 1, 0]
        return found

    first = shown(0)
    assert 8 < sum(first.values()) < 32
    assert shown(1) == {number: not flag for number, flag in first.items()}
    assert shown(2) == first == shown(0, batch=4)
    halves = [shown(0, batch=5, rank=rank, world_size=2) for rank in (0, 1)]
    assert halves[0] | halves[1] == first
    assert shown(0, seed=4) != first
    plain = split.plain().shuffled(1, seed=3, epoch=0)
    assert all(torch.equal(image, images[:1]) for image, _ in plain)
    assert all(torch.equal(batch, images[:40]) for batch, _ in split.once(40))


def test_alternating_flips_are_asked_for_by_name(root):
    source = sets.load(DataConfig("digits", train_limit=60, augment="shift+altflip"))
    assert source.train.alternating and source.to(torch.device("cpu")).train.alternating
    assert not source.validation.alternating and not source.test.alternating
    drawn = source.prepare(source.train.images[:9], torch.Generator().manual_seed(0))
    shifted = replace(source, augment="shift")
    expected = shifted.prepare(source.train.images[:9], torch.Generator().manual_seed(0))
    assert torch.equal(drawn, expected)  # The other half of the augmentation flips nothing.
    with pytest.raises(UsageError, match="held in memory"):
        load(root, "shift+altflip")
