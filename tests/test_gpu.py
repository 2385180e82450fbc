"""What holds on a CPU holds on a GPU: every test runs on both, so that each is proven on a CPU.

    pytest -m gpu tests/test_gpu.py

Bit-equal is what draws no random number on the device and adds up nothing in another order: masks,
augmentation, resumes with cuDNN's deterministic kernels. Elsewhere CPU and GPU are near.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from autosparse import criteria, prune
from autosparse.core.errors import Stopped
from autosparse.corpus import store
from autosparse.data.sets import DataSource
from autosparse.irp.run import run_irp
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity import masks, reach
from autosparse.sparsity.compact import compact_weights, dense_name, densify
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training.config import TrainingConfig
from autosparse.training.loop import evaluate, fit, seeded, steps_per_epoch
from autosparse.training.recipe import Recipe
from autosparse.training.steppers import History, PlainStepper
from tests.conftest import QUICK, few, make_model, quick_irp
from tests.models.test_standardised import CASES as STANDARDISED
from tests.models.test_standardised import Only, chosen_for
from tests.sparsity.test_compact import CASES, masked, random_ticket

CPU = torch.device("cpu")
PLAIN = replace(QUICK, sparse_products=False, optimizer="sgd", learning_rate=0.01, schedule="none")
RICH = replace(
    QUICK, epochs=2, ema=0.8, mixup=0.4, cutmix=1.0, label_smoothing=0.1, clip_grad=1.0,
    warmup_epochs=0.5, sparse_products=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Full float32 products, deterministic convolutions and attention."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False
    with sdpa_kernel(SDPBackend.MATH):
        yield
    cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Let everything fail that makes the host wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compact_model(name: str, sparsity: float = 0.8, **options) -> nn.Module:
    model = make_model(name, **options)
    return compact(model, random_ticket(model, sparsity))


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two tensors differ by little, as vectors."""
    off = (found.detach().cpu().double() - expected.detach().cpu().double()).norm()
    return bool(off <= tolerance * expected.detach().double().norm().clamp(min=1e-12))


def overlap(one: masks.Masks, other: masks.Masks) -> float:
    """Return which share of what one keeps the other keeps too."""
    both = sum(int((one[name].cpu() & other[name].cpu()).sum()) for name in one)
    return both / masks.kept(one)


# Compact weights


@pytest.mark.parametrize("case", CASES)
def test_compact_weights_are_the_masked_dense_ones(case: str, device: torch.device) -> None:
    build, draw = CASES[case]
    model, inputs = build(), draw()
    ticket = random_ticket(model)
    dense = masked(model, ticket)
    expected = dense(inputs)
    expected.square().sum().backward()
    found = compact(model, ticket).to(device)
    outputs = found(inputs.to(device))
    outputs.square().sum().backward()
    assert near(outputs, expected)
    gradients = {dense_name(name): each.grad for name, each in found.named_parameters()}
    largest = max(float(each.grad.norm()) for each in dense.parameters())
    for name, parameter in dense.named_parameters():
        mask = ticket.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        off = gradients[name].flatten().cpu() - parameter.grad[mask]
        assert off.norm() <= 1e-4 * largest, name  # Some are 0 but for rounding.
    for name, part in compact_weights(found):
        if name in ticket.masks:
            assert torch.equal(part.mask().cpu(), ticket.masks[name])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_densified_on_the_device(layout: torch.memory_format, device: torch.device) -> None:
    model = make_model()
    ticket = random_ticket(model)
    expected = masked(model, ticket).state_dict()
    found = compact(model, ticket).to(device).to(memory_format=layout)
    again = Ticket.from_compact(found, ticket, {})
    assert again.content_hash == ticket.content_hash
    state = densify(found).state_dict()
    assert all(torch.equal(state[name].cpu(), expected[name]) for name in expected)
    assert {tensor.device.type for tensor in state.values()} == {device.type}


@pytest.mark.parametrize(
    "changes",
    [{}, {"channels_last": True}, {"rescatter": True}, {"precision": "bf16"}],
    ids=["plain", "channels_last", "rescatter", "bf16"],
)
@pytest.mark.parametrize("name", few(["test_resnet", "test_vit"], ["test_resnet"]))
def test_training_is_that_of_the_cpu(
    name: str, changes: dict, digits: DataSource, device: torch.device
) -> None:
    losses = []
    for place, settings in ((CPU, {}), (device, changes)):
        model = compact_model(name).to(place).train()
        stepper = PlainStepper(model, replace(PLAIN, **settings), 3)
        images, labels = digits.to(place).score_batches(3)[0]
        losses.append([float(stepper.step(images, labels)) for _ in range(5)])
    expected, found = losses
    assert found == pytest.approx(expected, rel=0.05 if "precision" in changes else 5e-3)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("name", ["scaled, groups", "standard", "standard same"])
def test_standardised_kernels_are_masked(name: str, device: torch.device) -> None:
    found = {}
    for place in (CPU, device):
        model = Only(STANDARDISED[name].build()).float()
        ticket = Ticket.from_model(model, {"layer.weight": chosen_for(model.layer)}, {})
        compact(model, ticket).to(place)
        outputs = model(noise(2, 4, 8, 8).to(place))
        outputs.square().sum().backward()
        gradient = model.layer.parametrizations.weight.original.grad  # type: ignore[union-attr]
        found[place.type] = outputs, gradient
    for one, other in zip(found[device.type], found["cpu"], strict=True):
        assert near(one, other)


# Masks


@pytest.mark.parametrize("scope", masks.SCOPES)
@pytest.mark.parametrize("kind", ["many", "few values", "two million"])
def test_masks_are_those_of_the_cpu(kind: str, scope: str, device: torch.device) -> None:
    """With ties too, and where the threshold is guessed first."""
    sides = {"a": (64, 32, 3, 3), "b": (10, 64)}
    if kind == "two million":
        sides["c"] = (1500, 1400)
    scores = {name: noise(*shape, seed=len(name)) for name, shape in sides.items()}
    if kind == "few values":
        scores = {name: each.mul(2).round() for name, each in scores.items()}
    for options in ({}, {"per_channel": True}, {"min_per_layer": 0}):
        expected = masks.from_scores(scores, 0.93, scope=scope, **options)
        there = {name: each.to(device) for name, each in scores.items()}
        found = masks.from_scores(there, 0.93, scope=scope, **options)
        assert masks.fingerprint(found) == masks.fingerprint(expected)
        inside = {name: mask.to(device) for name, mask in expected.items()}
        smaller = masks.from_scores(there, 0.96, scope=scope, within=inside)
        again = masks.from_scores(scores, 0.96, scope=scope, within=expected)
        assert masks.fingerprint(smaller) == masks.fingerprint(again)
    pattern = {name: masks.n_of_m({name: there[name]}, 2, 4)[name] for name in ("a", "b")}
    assert masks.fingerprint(pattern) == masks.fingerprint(
        masks.n_of_m({name: scores[name] for name in pattern}, 2, 4)
    )


# Criteria and rounds

TRAINS = ("autos_irp", "cts", "prospr", "short_irp", "px", "ntk_sap")
"""What trains or draws while it scores: only near in what it chooses."""
OF_ATTENTION = ("snip", "synflow", "autos")
"""Tried on a transformer; the others on convolutions."""
QUICK_CRITERIA = ("magnitude", "snip", "synflow", "iter_snip", "short_irp")
"""On a CPU, and where the whole suite is run, these stand for all; `-m gpu` runs all."""
FEW = {"rounds": 5, "steps_per_level": 2, "levels": 2, "draws": 1, "steps": 2}


@pytest.mark.parametrize("name", few(criteria.names(), QUICK_CRITERIA))
def test_criteria_choose_what_they_choose_on_the_cpu(
    name: str, digits: DataSource, device: torch.device
) -> None:
    """`prune` as a whole: scores on the device, rounds, choice, and a ticket in ordinary memory."""
    options = {k: v for k, v in FEW.items() if k in criteria.get(name).options}
    tickets = []
    for place in (CPU, device):
        model = make_model("test_vit" if name in OF_ATTENTION else "test_byobnet").to(place)
        tickets.append(prune(model, digits.to(place), name, 0.8, options=options, seed=1))
        assert zoo.device_of(model) == next(model.parameters()).device
    expected, found = tickets
    assert found.kept == expected.kept
    assert {mask.device.type for mask in found.masks.values()} == {"cpu"}
    least = 0.6 if name in TRAINS or name.startswith("autos") else 0.99
    if name in ("cts", "ntk_sap") and device.type != "cpu":
        # Weights and gates are drawn by the device's own generator: another sample. Chance would
        # be 0.2.
        assert overlap(expected.masks, found.masks) >= 0.3
        return
    assert overlap(expected.masks, found.masks) >= least
    for layer, mask in expected.masks.items():
        kept = int(mask.sum())
        assert abs(int(found.masks[layer].sum()) - kept) <= max(2, 0.05 * mask.numel())


@pytest.mark.parametrize("name", ["snip", "grasp", "fisher", "magnitude", "erk"])
def test_scores_are_near_those_of_the_cpu(
    name: str, digits: DataSource, device: torch.device
) -> None:
    found = []
    for place in (CPU, device):
        model = make_model("test_byobnet").to(place)
        batches = digits.to(place).score_batches(5)
        options = {"sparsity": 0.8} if "sparsity" in criteria.get(name).options else {}
        found.append(criteria.get(name)(model, batches, cross_entropy, **options))
    for layer, expected in found[0].items():
        assert near(found[1][layer], expected, 1e-3), layer


# Thinning


@pytest.mark.parametrize("tilt", [0.0, 1.0])
@pytest.mark.parametrize("name", few(["test_resnet", "test_vit"], ["test_resnet"]))
def test_thinning_chooses_what_it_chooses_on_the_cpu(
    name: str, tilt: float, device: torch.device
) -> None:
    """Bit for bit by scores alone; with sums over paths the last bit of a sum may decide.

    Whether TF32 is allowed makes no difference.
    """
    model = make_model(name)
    scores = {
        layer: noise(*weight.shape, seed=place)
        for place, (layer, weight) in enumerate(zoo.prunable(model).items())
    }
    kept = {layer: max(1, each.numel() // 10) for layer, each in scores.items()}

    def thinned(place: torch.device) -> masks.Masks:
        there = {layer: each.to(place) for layer, each in scores.items()}
        chosen = reach.thinned(copy.deepcopy(model).to(place), there, kept, (1, 16, 16), tilt=tilt)
        assert {layer: int(mask.sum()) for layer, mask in chosen.items()} == kept
        return {layer: mask.cpu() for layer, mask in chosen.items()}

    expected, found = thinned(CPU), thinned(device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert masks.fingerprint(thinned(device)) == masks.fingerprint(found)
    assert overlap(expected, found) > 0.9
    if tilt == 0:
        assert masks.fingerprint(expected) == masks.fingerprint(found)


class Waiting(nn.Module):
    """A convolution that asks for a value in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images)
        return self.head(hidden.mean((2, 3)) if float(hidden.sum()) == 0 else hidden.amax((2, 3)))


def test_a_network_that_waits_for_the_device_is_thinned_too(device: torch.device) -> None:
    """Its passes cannot be recorded; streams and memory are afterwards as before."""
    model = Waiting()
    scores = {n: noise(*w.shape, seed=i) for i, (n, w) in enumerate(zoo.prunable(model).items())}
    kept = {name: each.numel() // 3 for name, each in scores.items()}
    expected = reach.thinned(model, scores, kept, (1, 8, 8))
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    found = reach.thinned(copy.deepcopy(model).to(device), scores, kept, (1, 8, 8))
    assert masks.fingerprint({n: m.cpu() for n, m in found.items()}) == masks.fingerprint(expected)
    if device.type == "cuda":
        assert torch.cuda.current_stream(device) == stream
        torch.cuda.empty_cache()
        assert torch.rand(3, device=device).isfinite().all()


# Data


@pytest.mark.parametrize("augment", ["none", "shift", "shift+flip"])
def test_augmentation_is_bit_equal(augment: str, device: torch.device, digits: DataSource) -> None:
    source = replace(digits, augment=augment)
    here = source.train.shuffled(50, seed=3, epoch=1)
    there = source.to(device).train.shuffled(50, seed=3, epoch=1)
    one, other = source.augmentation(3, 1), source.augmentation(3, 1)
    for (images, labels), (moved, their_labels) in zip(here, there, strict=True):
        assert moved.device.type == their_labels.device.type == device.type
        expected, found = source.prepare(images, one), source.to(device).prepare(moved, other)
        assert torch.equal(found.cpu(), expected)
        assert torch.equal(their_labels.cpu(), labels)


@pytest.mark.parametrize("changes", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1}])
def test_mixing_is_that_of_the_cpu(changes: dict, device: torch.device, digits: DataSource) -> None:
    recipe = Recipe(replace(QUICK, label_smoothing=0.1, **changes), make_model())
    images, labels = digits.score_batches(4)[0]
    for seed in range(3):
        expected = recipe.mix(images, labels, seed)
        found = recipe.mix(images.to(device), labels.to(device), seed)
        assert all(near(a, b, 1e-6) for a, b in zip(found, expected, strict=True))
        assert found[0].device.type == found[1].device.type == device.type


def test_evaluation_is_that_of_the_cpu(device: torch.device, digits: DataSource) -> None:
    model = make_model()
    expected = evaluate(model, digits, digits.test)
    found = evaluate(model.to(device), digits.to(device), digits.to(device).test)
    assert found.images == expected.images
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.accuracy == pytest.approx(expected.accuracy, abs=1.5 / expected.images)


# Training


def rich_stepper(source: DataSource, device: torch.device, config=RICH) -> PlainStepper:
    model = compact_model("test_vit", drop_rate=0.2, drop_path_rate=0.2).to(device)
    return PlainStepper(model, config, steps_per_epoch(source.train, config))


def fitted(stepper: PlainStepper, source: DataSource, **options) -> History:
    with seeded(5):
        return fit(stepper, source, stepper.config, seed=5, **options)


def test_a_resumed_training_is_bit_equal(
    device: torch.device, digits: DataSource, tmp_path: Path
) -> None:
    """With dropout, stochastic depth, mixing and an average, cut within an epoch."""
    source = digits.to(device)
    whole, first, second = (rich_stepper(source, device) for _ in range(3))
    expected = fitted(whole, source)
    with pytest.raises(Stopped):
        fitted(first, source, folder=tmp_path, stop=lambda: first.updates == 4)
    history = fitted(second, source, folder=tmp_path)
    assert [e.train_loss for e in history.epochs] == [e.train_loss for e in expected.epochs]
    assert history.epochs[-1].validation_loss == expected.epochs[-1].validation_loss
    for one, other in ((whole.model, second.model), (whole.evaluated(), second.evaluated())):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_an_average_is_that_of_the_cpu(device: torch.device, digits: DataSource) -> None:
    averages = []
    for place in (CPU, device):
        config = replace(PLAIN, ema=0.5)
        stepper = PlainStepper(compact_model("test_byobnet").to(place).train(), config, 3)
        images, labels = digits.to(place).score_batches(3)[0]
        for _ in range(3):
            stepper.step(images, labels)
        averages.append(stepper.state_dict())
    for name, tensor in averages[0].items():
        if tensor.is_floating_point():
            assert near(averages[1][name], tensor, 1e-3), name


@pytest.mark.parametrize(
    "config",
    [
        replace(PLAIN, optimizer="adamw"),
        replace(PLAIN, precision="bf16", channels_last=True),
        replace(PLAIN, optimizer="momentum", rescatter=True),
        RICH,
    ],
    ids=["adamw", "bf16 channels_last", "rescatter", "rich"],
)
def test_five_steps_never_wait_for_the_device(
    config: TrainingConfig, device: torch.device, digits: DataSource
) -> None:
    """Order, augmentation, mixing, forward, backward, clipping, optimizer, schedule, average."""
    source = replace(digits.to(device), augment="shift+flip")
    stepper = PlainStepper(compact_model("test_resnet").to(device).train(), config, 10)
    batches = iter(source.training_batches(30, seed=0))
    losses = [stepper.step(*next(batches))]
    with no_waiting(device):
        losses += [stepper.step(*next(batches)) for _ in range(5)]
    assert torch.stack(losses).isfinite().all()
    assert stepper.updates == 6


def interpreted() -> bool:
    """Whether a test before has left Triton's kernels interpreted: they run without a GPU then."""
    from autosparse.training import flat_kernels

    try:
        flat_kernels.try_out(CPU)
    except Exception:  # Whatever a compiler without a GPU raises.
        return False
    return True


@pytest.mark.parametrize("kind", ["flat", "triton"])
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "channels_last": True}])
def test_however_weights_are_scattered_the_training_is_bit_equal(
    kind: str, changes: dict, device: torch.device, digits: DataSource
) -> None:
    """Without a GPU, `triton` falls back on torch's operations."""
    if device.type == "cpu" and kind == "triton" and "precision" in changes and interpreted():
        pytest.skip("Triton's interpreter cuts bits where a GPU rounds to bf16")
    if device.type == "cuda" and kind == "triton":
        from autosparse.training import flat_kernels

        flat_kernels.try_out(device)
    images, labels = digits.to(device).score_batches(3)[0]
    # Twice as large: PyTorch 2.14 on a CPU with avx512_bf16 leaves the weight gradient of a
    # convolution with stride 2 over images of one pixel undefined.
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    trained = []
    for scatter in ("each", kind):
        config = replace(PLAIN, scatter=scatter, clip_grad=1.0, **changes)
        stepper = PlainStepper(compact_model("test_byobnet").to(device).train(), config, 3)
        losses = [float(stepper.step(images, labels)) for _ in range(5)]
        trained.append((losses, stepper.state_dict()))
    assert trained[0][0] == trained[1][0]
    for name, tensor in trained[0][1].items():
        assert torch.equal(tensor, trained[1][1][name]), name


@pytest.mark.parametrize("name", ["test_byobnet", "test_vit"])
def test_compiled_is_near_eager(name: str, device: torch.device, digits: DataSource) -> None:
    if device.type == "cpu":
        pytest.skip("compiling for a CPU takes a compiler and a minute")
    losses = []
    images, labels = digits.to(device).score_batches(3)[0]
    for compiled in (False, True):
        config = replace(PLAIN, compile=compiled)
        stepper = PlainStepper(compact_model(name).to(device).train(), config, 3)
        losses.append([float(stepper.step(images, labels)) for _ in range(5)])
    # Convolutions round to TF32 (2^-11) in other places; kinks of ReLU make more of it every step.
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


# Whole runs


def test_an_irp_run_on_the_device(device: torch.device, tmp_path: Path) -> None:
    """Masks lie inside each other, count for count; the run is found again."""
    entries: list[dict] = []
    config = quick_irp(str(tmp_path), device=str(device))
    folder = run_irp(config, on_level=entries.append)
    run = store.read_run(folder)
    total = run.card["prunable_weights"]
    counts = [masks.kept(run.masks(level)) for level in range(3)]
    assert counts == [total, round(total * 0.1**0.5), round(total * 0.1)]
    assert [entry["kept"] for entry in entries] == counts
    assert run_irp(config) == folder


def test_a_ticket_goes_from_device_to_device(
    device: torch.device, digits: DataSource, tmp_path: Path
) -> None:
    """Pruned and trained on the device, saved, and evaluated the same on a CPU."""
    source = digits.to(device)
    ticket = prune(make_model().to(device), source, "snip", 0.9)
    model = zoo.create(
        ModelConfig("test_byobnet"), num_classes=10, in_chans=1, image_size=16, seed=0
    )
    stepper = PlainStepper(compact(model, ticket).to(device), PLAIN, 3)
    fitted(stepper, source)
    on_device = evaluate(stepper.evaluated(), source, source.test)
    Ticket.from_compact(stepper.model, ticket, ticket.card).save(tmp_path / "t.safetensors")
    trained = Ticket.load(tmp_path / "t.safetensors")
    here = evaluate(compact(make_model(), trained), digits, digits.test)
    assert trained.kept == ticket.kept
    assert here.loss == pytest.approx(on_device.loss, rel=1e-3)
