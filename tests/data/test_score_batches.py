"""Scoring batches: the first of each class in an epoch's order, and nothing else is decoded."""

from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from autosparse import criteria
from autosparse.data import decoder, sets
from autosparse.data.config import DataConfig
from autosparse.data.score_batches import choose
from autosparse.data.source import DataSource
from tests.data.packed import write_shards
from tests.data.test_data import fill, in_memory_config, numbered, source_of, streamed_config
from tests.data.test_shards import CLASSES, config, picture

CLASSES_OF_FOLDER = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """12 images of each of three classes to train on, told apart by their grey."""
    folder = tmp_path_factory.mktemp("insects")
    for place, (split, count) in enumerate((("train", 12), ("val", 2), ("test", 2))):
        for label, name in enumerate(CLASSES_OF_FOLDER):
            fill(folder / split / name, 60 * place + 20 * label, count)
    return folder


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Count what is decoded in this process."""
    sizes: list[int] = []
    decode = decoder.decode

    def counted(content, *arguments, **options):
        sizes.append(len(content))
        return decode(content, *arguments, **options)

    monkeypatch.setattr(decoder, "decode", counted)
    return sizes


def one_by_one(source: DataSource, each: int, seed: int, batches: int) -> list[list]:
    """Choose as it was always done: by a walk through epoch 0, an image at a time."""
    found: Counter[int] = Counter()
    chosen: list[list] = [[] for _ in range(batches)]
    for images, labels in source.train.plain().shuffled(1, seed=seed, epoch=0):
        place = found[int(labels)] // each
        if place < batches:
            found[int(labels)] += 1
            chosen[place].append((source.prepare(images), int(labels)))
    return [batch for batch in chosen if batch]


def same(batches, expected: list[list]) -> None:
    for (images, labels), pairs in zip(batches, expected, strict=True):
        assert torch.equal(images, torch.cat([image for image, _ in pairs]))
        assert labels.tolist() == [label for _, label in pairs]


@pytest.mark.parametrize("make", [in_memory_config, streamed_config])
@pytest.mark.parametrize(("each", "batches"), [(1, 1), (4, 2), (5, 3), (12, 1), (99, 2)])
def test_the_images_are_those_of_a_walk_through_epoch_zero(root, make, each, batches):
    source = sets.load(make(root))
    for seed in (0, 3):
        found = source.score_batches(each, seed=seed, batches=batches, batch_size=1000)
        same(found, one_by_one(source, each, seed, batches))


@pytest.mark.parametrize("streamed", [True, False])
def test_shards_are_scored_on_those_of_a_walk_through_epoch_zero(tmp_path, streamed):
    some = [("train", picture(grey), grey % 3) for grey in range(50)]
    others = [(split, picture(grey), grey) for split in ("validation", "test") for grey in range(3)]
    write_shards([*some, *others], tmp_path / "s", CLASSES, per_shard=7)
    source = sets.load(config(tmp_path / "s", streamed, lanes=4))
    found = source.score_batches(5, seed=2, batches=2, batch_size=1000)
    same(found, one_by_one(source, 5, 2, 2))
    whole, parted = (sets.load(config(tmp_path / "s", held, lanes=4)) for held in (True, False))
    for ours, theirs in zip(whole.score_batches(5), parted.score_batches(5), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_choose_is_the_first_of_each_class_by_hand():
    labels = torch.tensor([0, 0, 2, 0, 2, 0])
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    assert choose(labels, order, 4, each=1, batches=2) == [[5, 4], [3, 2]]
    assert choose(labels, order, 4, each=2, batches=2) == [[5, 4, 3, 2], [1, 0]]


@pytest.mark.parametrize("number", [0, 1])
def test_only_the_chosen_are_decoded_even_where_a_class_is_without_images(root, decoded, number):
    source = sets.load(streamed_config(root))
    source = replace(source, num_classes=3 + number)
    if number:
        with pytest.warns(UserWarning, match="training images: 1 of 4 classes have no image: 3$"):
            found = source.score_batches(2)
    else:
        found = source.score_batches(2)
    assert decoded == []
    assert [len(labels) for _, labels in found] == [6]
    assert len(decoded) == 6


def test_a_batch_is_decoded_when_it_is_looked_at(root, decoded):
    """`memory_limit_gb` 0: nothing is kept."""
    found = sets.load(streamed_config(root)).score_batches(4, batch_size=5)
    assert len(found) == 3
    looked = iter(found)
    next(looked)
    assert len(decoded) == 5
    looked.close()
    assert len(found[2][1]) == 2 and len(decoded) == 7
    assert [len(part) for part in found[1:].parts] == [5, 2]
    first, again = ([images for images, _ in found] for _ in range(2))
    assert len(decoded) == 7 + 24
    assert all(map(torch.equal, first, again))


def test_images_that_fit_are_decoded_once(root, decoded):
    source = sets.load(streamed_config(root))
    bytes_needed = 12 * 3 * 8 * 8
    for limit, times in ((bytes_needed, 1), (bytes_needed - 1, 3)):
        decoded.clear()
        kept = replace(source, config=replace(source.config, memory_limit_gb=limit / 1e9))
        batches = kept.score_batches(4, batch_size=5)
        for _ in range(3):
            assert sum(len(labels) for _, labels in batches) == 12
        assert len(decoded) == 12 * times


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_each_rank_decodes_its_share(root, decoded, world_size):
    source = sets.load(streamed_config(root))
    whole = list(source.score_batches(4, seed=1, batches=2, batch_size=5))
    shares, counts = [], []
    for rank in range(world_size):
        decoded.clear()
        share = source.score_batches(
            4, seed=1, batches=2, batch_size=5, rank=rank, world_size=world_size
        )
        shares.append(list(share))
        counts.append(len(decoded))
    assert counts == [sum(len(labels) for _, labels in share) for share in shares]
    for number, (images, _) in enumerate(whole):
        part = shares[number % world_size][number // world_size]
        assert torch.equal(part[0], images)
    assert sum(map(len, shares)) == len(whole) == 6


def test_worker_processes_give_the_same(root):
    alone, helped = (sets.load(streamed_config(root, workers=n)) for n in (0, 2))
    for ours, theirs in zip(
        alone.score_batches(4, batch_size=5), helped.score_batches(4, batch_size=5), strict=True
    ):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_bad_images_among_the_chosen_are_left_out_and_counted(tmp_path, root, capfd):
    import shutil

    folder = Path(shutil.copytree(root, tmp_path / "insects"))
    source = sets.load(streamed_config(folder, max_bad_images=1))
    chosen = list(chain(*source.score_batches(3).parts))
    source.train.samples.samples[chosen[4]][0].write_bytes(b"")
    assert [len(labels) for _, labels in source.score_batches(3)] == [8]
    assert "bad image 1 of at most 1" in capfd.readouterr().err


def test_labels_are_known_without_reading_a_shard(tmp_path):
    some = [("train", picture(grey), grey % 3) for grey in range(20)]
    write_shards([*some, ("validation", picture(0), 0), ("test", picture(0), 0)],
                 tmp_path / "s", CLASSES, per_shard=4)  # fmt: skip
    split = sets.load(config(tmp_path / "s")).train
    for path in (tmp_path / "s").glob("train-*.tar"):
        path.unlink()
    assert split.labels.tolist() == [grey % 3 for grey in range(20)]


def test_criteria_look_at_batches_without_holding_all_of_them(digits):
    """A criterion takes them as they are: the second look makes new ones."""
    from tests.conftest import make_model

    looks: list[int] = []

    class Counted(type(digits.score_batches(1))):
        def __iter__(self):
            looks.append(1)
            return super().__iter__()

    found = digits.score_batches(2, batch_size=8)
    counted = Counted(found.source, found.parts)
    model = make_model()
    loss = torch.nn.functional.cross_entropy
    ours = criteria.get("iter_snip")(model, counted, loss, sparsity=0.5, rounds=3)
    theirs = criteria.get("iter_snip")(model, list(found), loss, sparsity=0.5, rounds=3)
    assert len(looks) >= 3
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_class_beyond_the_images_is_no_error_in_memory():
    source = source_of(numbered(4), num_classes=6)
    with pytest.warns(UserWarning, match="2 of 6 classes have no image: 4, 5"):
        assert [labels.tolist() for _, labels in source.score_batches(1)] == [
            source.train.order(0, 0).tolist()
        ]


def test_named_sets_say_nothing_of_empty_classes(recwarn):
    sets.load(DataConfig("digits")).score_batches(1)
    assert not recwarn.list
