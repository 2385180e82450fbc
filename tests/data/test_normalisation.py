"""How images are normalised: by one rule, whether they are held in memory or streamed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autosparse.core.config import identity, run_id
from autosparse.core.errors import UsageError
from autosparse.criteria.pruning import prune
from autosparse.data import normalisation, sets
from autosparse.data.config import DataConfig
from tests.conftest import make_model
from tests.data.packed import write_shards
from tests.data.test_data import fill, in_memory_config
from tests.data.test_shards import CLASSES, COUNTS, picture

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict[str, DataConfig]:
    """The same greys as a folder and as shards."""
    root = tmp_path_factory.mktemp("own")
    some = []
    for place, split in enumerate(COUNTS):
        for label, name in enumerate(CLASSES):
            first = 60 * place + 20 * label
            fill(root / "f" / split / name, first, 9)
            some += [(split, picture(grey), label) for grey in range(first, first + 9)]
    write_shards(some, root / "s", CLASSES, per_shard=4)
    folder = in_memory_config(root / "f", workers=0, cache=str(root))
    return {"folder": folder, "shards": replace(folder, name="shards", root=str(root / "s"))}


def both(config: DataConfig) -> list[sets.DataSource]:
    """Load in memory and streamed."""
    return [sets.load(config), sets.load(replace(config, memory_limit_gb=0))]


def constants(source: sets.DataSource) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return source.mean, source.std


@pytest.mark.parametrize("name", ["folder", "shards"])
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("auto", IMAGENET),
        ("imagenet", IMAGENET),
        ([0.5, 0.25], ((0.5,) * 3, (0.25,) * 3)),
        ([[0.1, 0.2, 0.3], 1], ((0.1, 0.2, 0.3), (1.0,) * 3)),
    ],
)
def test_own_data_is_normalised_alike_in_memory_and_streamed(own, name, wanted, expected):
    for source in both(replace(own[name], normalisation=wanted)):
        assert constants(source) == expected


@pytest.mark.parametrize("name", ["folder", "shards"])
@pytest.mark.parametrize("most", [4096, 7])
def test_measured_is_the_same_in_memory_and_streamed(own, name, most, monkeypatch):
    """Of greys 0..8, 20..28, 40..48, or of the seven at places n * 27 // 7."""
    monkeypatch.setattr(normalisation, "MEASURED", most)
    every = [*range(9), *range(20, 29), *range(40, 49)]
    places = range(27) if most > 27 else [0, 3, 7, 11, 15, 19, 23]
    pixels = torch.tensor([every[place] for place in places]).double().repeat_interleave(64) / 255
    for source in both(replace(own[name], normalisation="measured")):
        assert source.mean == pytest.approx([pixels.mean().item()] * 3, abs=1e-12)
        assert source.std == pytest.approx([pixels.std().item()] * 3, abs=1e-12)


@pytest.mark.parametrize("name", ["folder", "shards"])
def test_what_training_sees_does_not_depend_on_the_memory(own, name):
    """Pixels, normalised and augmented, labels and order, epoch by epoch, on ranks too."""
    whole, streamed = both(replace(own[name], lanes=4))
    for epoch, (rank, world_size) in enumerate(((0, 1), (0, 1), (1, 2))):
        sides = []
        for source in (whole, streamed):
            generator = source.augmentation(3, epoch, rank)
            sides.append([
                (source.prepare(images, generator), labels)
                for images, labels in source.train.shuffled(
                    4, seed=3, epoch=epoch, rank=rank, world_size=world_size, first=1
                )
            ])  # fmt: skip
        assert len(sides[0]) == 27 // (4 * world_size) - 1
        for ours, theirs in zip(*sides, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_named_sets_keep_what_is_measured_on_them():
    source = sets.load("digits")
    pixels = source.train.images.double() / 255
    assert constants(source) == (
        (pytest.approx(float(pixels.mean()), rel=1e-12),),
        (pytest.approx(float(pixels.std()), rel=1e-12),),
    )
    assert constants(sets.load(DataConfig(normalisation="measured"))) == constants(source)
    grey = sets.load(DataConfig(normalisation="imagenet"))
    assert constants(grey) == ((0.449,), (0.226,))
    assert constants(sets.load(DataConfig(normalisation=[0.5, 0.5]))) == ((0.5,), (0.5,))


def test_ids_of_named_sets_stay_and_own_data_says_what_it_is(own):
    assert identity(DataConfig(normalisation="measured")) == identity(DataConfig()) == {}
    assert identity(DataConfig("cifar10")) == {"name": "cifar10"}
    assert identity(DataConfig(normalisation="imagenet")) == {"normalisation": "imagenet"}
    folder = own["folder"]
    assert identity(folder)["normalisation"] == "imagenet"
    assert run_id(folder) == run_id(replace(folder, normalisation="imagenet"))
    others = [folder, *(replace(folder, normalisation=n) for n in ("measured", [0.5, 0.5]))]
    assert len({run_id(other) for other in others}) == 3


@pytest.mark.parametrize(
    "wanted",
    ["imagenett", "", [], [0.5], [0.5, 0], [0.5, -1], [[0.5], "x"], [0.5, [0.1, 0.0]],
     [0.1, 0.2, 0.3]],
)  # fmt: skip
def test_what_is_no_normalisation_is_refused(wanted):
    with pytest.raises(UsageError, match=r"data\.normalisation must be auto"):
        sets.load(DataConfig(normalisation=wanted))


def test_wrong_number_of_channels_is_refused():
    with pytest.raises(UsageError, match="2 values for images of 1 channel"):
        sets.load(DataConfig(normalisation=[[0.5, 0.5], 0.5]))


def test_the_card_says_how_images_were_normalised(digits):
    card = prune(make_model(), digits, "random", 0.5).card
    assert card["normalisation"] == {"mean": list(digits.mean), "std": list(digits.std)}


def test_the_command_line_takes_names_and_numbers():
    from autosparse.cli.arguments import parse
    from autosparse.criteria.config import PruneConfig

    for wanted in ("imagenet", [0.5, 0.25], [[0.1, 0.2, 0.3], [1, 1, 1]]):
        found = parse(PruneConfig, ["--data.normalisation", str(wanted)], "x", None)
        assert found.data.normalisation == wanted


def test_a_relative_root_is_found(own, monkeypatch):
    monkeypatch.chdir(Path(own["folder"].root).parent)
    assert sets.load(replace(own["folder"], root="f")).name == "f"
