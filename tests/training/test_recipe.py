"""Mixing, soft targets, distillation and the moving average, against formulas worked out here."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autosparse import compact, prune
from autosparse.core.config import run_id
from autosparse.core.errors import UsageError
from autosparse.data.sets import DataSource
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.models.zoo import prunable
from autosparse.sparsity.compact import compact_weights
from autosparse.sparsity.ticket import Ticket
from autosparse.training import config as training_config
from autosparse.training.checks import check
from autosparse.training.config import TrainingConfig
from autosparse.training.recipe import Recipe, load_teacher, make_ema, step_seed
from autosparse.training.steppers import PlainStepper
from tests.conftest import QUICK, make_model

MIXES = [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]


@pytest.fixture()
def batch(digits: DataSource) -> tuple[Tensor, Tensor]:
    images, labels = digits.score_batches(2)[0]
    assert len(labels) == 20
    return images, labels


def _cross_entropy(outputs: Tensor, targets: Tensor) -> float:
    """Mean over images of -sum target log probability, in double precision."""
    powers = outputs.double().exp()
    return float(-(targets * (powers / powers.sum(1, keepdim=True)).log()).sum(1).mean())


@pytest.mark.parametrize("mix", MIXES, ids=" and ".join)
def test_mixing_is_a_function_of_the_seed(batch, mix: dict) -> None:
    recipe = Recipe(replace(QUICK, **mix), make_model())
    found = [recipe.mix(*batch, seed) for seed in (3, 4, 3)]
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][1], found[2][1])
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("mix", MIXES, ids=" and ".join)
def test_mixing_leaves_images_and_random_numbers_as_they_were(batch, mix: dict) -> None:
    images, labels = batch
    before = images.clone(), labels.clone()
    np.random.seed(11)
    expected = np.random.random(5)
    np.random.seed(11)
    Recipe(replace(QUICK, **mix), make_model()).mix(images, labels, 3)
    assert np.array_equal(np.random.random(5), expected)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])


def test_mixup_is_a_weighted_mean_of_an_image_and_its_partner(batch) -> None:
    images, labels = batch
    mixed, targets = Recipe(replace(QUICK, mixup=0.8), make_model()).mix(images, labels, 3)
    place = next(i for i in range(20) if labels[i] != labels[19 - i])
    share = float(targets[place, labels[place]])
    assert 0 < share < 1
    assert torch.allclose(mixed, share * images + (1 - share) * images.flip(0), atol=1e-6)
    one_hot = torch.eye(10)[labels]
    assert torch.allclose(targets, share * one_hot + (1 - share) * one_hot.flip(0))


def test_cutmix_pastes_a_box_and_the_targets_count_its_pixels(batch) -> None:
    images, labels = batch
    mixed, targets = Recipe(replace(QUICK, cutmix=1.0), make_model()).mix(images, labels, 3)
    own, others = mixed == images, mixed == images.flip(0)
    assert bool((own | others).all())
    pasted = (~own).any(dim=0).any(dim=0)
    rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
    area = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert 0 < area < 16 * 16
    place = next(i for i in range(20) if labels[i] != labels[19 - i])
    assert float(targets[place, labels[19 - place]]) == pytest.approx(float(area) / 256, abs=1e-6)


def test_without_mixing_labels_stay_labels(batch) -> None:
    images, targets = Recipe(QUICK, make_model()).mix(*batch, 3)
    assert images is batch[0]
    assert targets is batch[1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing(batch, smoothing: float) -> None:
    images, labels = batch
    outputs = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    loss = Recipe(replace(QUICK, label_smoothing=smoothing), make_model()).loss(
        outputs, images, labels
    )
    targets = torch.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    assert float(loss) == pytest.approx(_cross_entropy(outputs, targets), rel=1e-5)


def test_soft_targets_are_smoothed_once(batch) -> None:
    images, labels = batch
    recipe = Recipe(replace(QUICK, mixup=0.8, label_smoothing=0.1), make_model())
    mixed, targets = recipe.mix(images, labels, 3)
    plain = Recipe(replace(QUICK, mixup=0.8), make_model()).mix(images, labels, 3)[1]
    assert torch.allclose(targets, plain * 0.9 + 0.01)
    outputs = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    expected = _cross_entropy(outputs, targets)
    assert float(recipe.loss(outputs, mixed, targets)) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, digits: DataSource) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    prune(make_model(seed=5), digits, "dense", 0.0).save(path)
    return path


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation(batch, teacher: Path, weight: float, temperature: float) -> None:
    images, labels = batch
    config = replace(
        QUICK, teacher=str(teacher), distill_weight=weight, temperature=temperature
    )  # fmt: skip
    outputs = torch.randn(20, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = Recipe(config, make_model()).loss(outputs, images, labels)
    with torch.no_grad():
        taught = make_model(seed=5).eval()(images).double()
    p, q = ((x / temperature).softmax(1) for x in (taught, outputs.detach().double()))
    divergence = float((p * (p / q).log()).sum(1).mean())
    hard = _cross_entropy(outputs.detach(), torch.eye(10)[labels])
    expected = (1 - weight) * hard + weight * temperature**2 * divergence
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, outputs)
    of_hard = (outputs.detach().double().softmax(1) - torch.eye(10)[labels]) / 20
    wanted = (1 - weight) * of_hard + weight * temperature * (q - p) / 20
    assert torch.allclose(gradient.double(), wanted, atol=1e-6)


def test_a_teacher_is_frozen_and_learns_nothing(batch, teacher: Path) -> None:
    stepper = PlainStepper(make_model(), replace(QUICK, teacher=str(teacher)), 3)
    assert stepper.recipe.teacher is not None
    before = copy.deepcopy(stepper.recipe.teacher.state_dict())
    stepper.step(*batch)
    assert not any(p.requires_grad for p in stepper.recipe.teacher.parameters())
    for name, tensor in stepper.recipe.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_teacher_is_known_by_its_content(teacher: Path, tmp_path: Path, monkeypatch) -> None:
    elsewhere, other = tmp_path / "elsewhere.safetensors", tmp_path / "other.safetensors"
    elsewhere.write_bytes(teacher.read_bytes())
    other.write_bytes(teacher.read_bytes() + b" ")
    ids = [run_id(TrainingConfig(teacher=str(path))) for path in (teacher, elsewhere, other)]
    assert ids[0] == ids[1] != ids[2]
    monkeypatch.setattr(training_config, "sha256_of_file", lambda _: pytest.fail("read again"))
    assert run_id(TrainingConfig(teacher=str(teacher))) == ids[0]


def test_a_teacher_of_other_classes_or_none_is_named(tmp_path: Path, teacher: Path) -> None:
    student = nn.Linear(1, 7)
    student.num_classes = 7  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"teacher\.safetensors has 10 classes, the model 7"):
        load_teacher(str(teacher), student)
    with pytest.raises(UsageError, match=r"no such file: .*nobody"):
        load_teacher(str(tmp_path / "nobody.safetensors"), student)


def test_a_teacher_of_other_images_is_named(teacher: Path, tmp_path: Path) -> None:
    small = {"patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 2}
    config = ModelConfig("vit_tiny_patch16_224", small)
    vit = zoo.create(config, num_classes=10, in_chans=1, image_size=24, seed=0)
    masks = {name: torch.ones_like(each, dtype=torch.bool) for name, each in prunable(vit).items()}
    recipe: Any = vit.autosparse_recipe
    Ticket.from_model(vit, masks, {"model": recipe}).save(tmp_path / "vit.safetensors")
    with pytest.raises(UsageError, match=r"no images of 1 channels and 16 pixels.* has 1 and 24"):
        load_teacher(str(tmp_path / "vit.safetensors"), make_model())
    config = ModelConfig("test_byobnet")
    coloured = zoo.create(config, num_classes=10, in_chans=3, image_size=16, seed=0)
    with pytest.raises(UsageError, match="no images of 3 channels and 16 pixels"):
        load_teacher(str(teacher), coloured)
    larger = zoo.create(config, num_classes=10, in_chans=1, image_size=32, seed=0)
    load_teacher(str(teacher), larger)


def test_a_teacher_with_standardised_kernels_says_what_it_learned(
    batch, digits: DataSource, tmp_path: Path
) -> None:
    """Its kernels are masked once more after they are standardised."""
    ticket = prune(make_model("test_nfnet"), digits, "magnitude", 0.9)
    ticket.save(tmp_path / "ticket.safetensors")
    trained = compact(make_model("test_nfnet"), ticket).eval()
    found = load_teacher(str(tmp_path / "ticket.safetensors"), make_model())
    with torch.no_grad():
        torch.testing.assert_close(found(batch[0]), trained(batch[0]))


def _decay(step: int, most: float) -> float:
    """timm's warm-up: 0 at the first step, then 1 - step^(-2/3), up to the decay asked for."""
    return min(1 - step ** (-2 / 3), most)


def test_ema_is_the_average_of_all_steps(digits: DataSource) -> None:
    config = replace(QUICK, ema=0.5, learning_rate=0.01, schedule="none")
    model = compact(make_model(), prune(make_model(), digits, "erk", 0.9))
    stepper = PlainStepper(model, config, 3)
    expected = {name: t.double().clone() for name, t in model.state_dict().items()}
    batches = digits.train.shuffled(50, seed=0, epoch=0)
    for step, (images, labels) in enumerate(batches, start=1):
        stepper.step(digits.prepare(images), labels)
        for name, tensor in model.state_dict().items():
            share = _decay(step, 0.5) if tensor.is_floating_point() else 0.0
            expected[name] = share * expected[name] + (1 - share) * tensor.double()
    assert step == 6
    found = stepper.evaluated().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), expected[name], atol=1e-6), name
    last = model.state_dict()
    assert any(not torch.allclose(found[name], last[name], atol=1e-4) for name in found)


def test_ema_keeps_compact_values_only(digits: DataSource) -> None:
    model = compact(make_model(), prune(make_model(), digits, "erk", 0.9))
    ema = make_ema(model, replace(QUICK, ema=0.9))
    assert ema is not None
    sizes = [sum(p.numel() for p in each.parameters()) for each in (model, ema.module)]
    assert sizes[0] == sizes[1]
    assert len(list(compact_weights(ema.module))) == len(list(compact_weights(model)))
    assert make_ema(model, QUICK) is None


def test_ema_of_tied_weights_moves_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    ema = make_ema(model, replace(QUICK, ema=0.5))
    assert ema is not None
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    ema.update(model, 10)
    moved = ema.module.state_dict()
    assert torch.allclose(moved["0.weight"], before + 0.5)
    assert torch.allclose(moved["1.weight"], before + 0.5)


def test_step_seeds_differ_by_seed_step_and_rank() -> None:
    seeds = [
        step_seed(seed, step, rank) for seed in range(3) for step in range(9) for rank in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds) == 54
    assert all(0 <= step_seed(-1, step) < 2**63 for step in range(3))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mixup": -0.1}, "training.mixup must be at least 0, got -0.1"),
        ({"cutmix": -1.0}, "training.cutmix must be at least 0, got -1.0"),
        ({"label_smoothing": 1.0}, "training.label_smoothing must be at least 0 and below 1"),
        ({"ema": 1.0}, "training.ema must be at least 0 and below 1, got 1.0"),
        ({"ema": -0.5}, "training.ema must be at least 0"),
        (
            {"distill_weight": 1.5},
            "distill_weight must be at least 0 and at most 1, got 1.5",
        ),
        ({"temperature": 0.0}, "training.temperature must be above 0, got 0.0"),
    ],
)
def test_settings_that_cannot_be(changes: dict, said: str) -> None:
    with pytest.raises(UsageError) as error:
        check(replace(QUICK, **changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_mixing_needs_to_know_the_classes() -> None:
    with pytest.raises(UsageError, match="num_classes"):
        Recipe(replace(QUICK, mixup=0.2), nn.Linear(3, 3))


@pytest.mark.parametrize(("precision", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_teacher_has_the_precision_of_training(
    batch, teacher: Path, precision: str, kind: torch.dtype
) -> None:
    config = replace(QUICK, teacher=str(teacher), precision=precision, channels_last=True)
    recipe = Recipe(config, make_model())
    assert recipe.teacher is not None
    seen: list[Tensor] = []
    recipe.teacher.register_forward_hook(lambda module, given, outputs: seen.append(outputs))
    images, labels = batch
    recipe.loss(torch.zeros(len(labels), 10, requires_grad=True), images, labels).backward()
    assert [outputs.dtype for outputs in seen] == [kind]
    kernels = [weight for weight in recipe.teacher.parameters() if weight.ndim == 4]
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in kernels)
