"""The training loop: order, groups, schedule, resume, NaN, evaluation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autosparse.core.errors import RunFailed, Stopped, UsageError
from autosparse.data.sets import DataSource
from autosparse.training.config import TrainingConfig
from autosparse.training.loop import (
    Span,
    Watch,
    evaluate,
    evaluation_batch,
    fit,
    seeded,
    steps_per_epoch,
)
from autosparse.training.steppers import History, PlainStepper
from tests.conftest import QUICK, make_model


def _trained(model: nn.Module, source: DataSource, config: TrainingConfig, **options) -> list[dict]:
    stepper = PlainStepper(model, config, steps_per_epoch(source.train, config))
    with seeded(5):
        return fit(stepper, source, config, seed=5, **options).plain()


def test_a_seed_fixes_everything(digits: DataSource) -> None:
    states = []
    for _ in range(2):
        model = make_model(drop_path_rate=0.2)
        _trained(model, digits, QUICK)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_kernels_with_the_same_bits_every_time(digits: DataSource) -> None:
    def states() -> tuple[bool, ...]:
        fill = torch.utils.deterministic.fill_uninitialized_memory
        cudnn, told = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
        return told, cudnn.deterministic, cudnn.benchmark, bool(fill)

    before, seen = states(), []
    for asked in (True, False):
        config = replace(QUICK, deterministic=asked)
        _trained(make_model(), digits, config, on_step=lambda step: seen.append(states()))
        assert states() == before
    assert set(seen[: len(seen) // 2]) == {(True, True, False, False)}
    assert set(seen[len(seen) // 2 :]) == {before} != {(True, True, False, False)}


def test_a_resumed_training_ends_as_the_unbroken_one(digits: DataSource, tmp_path: Path) -> None:
    config = replace(QUICK, epochs=4, checkpoint_epochs=2)
    whole, broken, resumed = (make_model(drop_path_rate=0.2) for _ in range(3))
    expected = _trained(whole, digits, config)
    with pytest.raises(KeyboardInterrupt):
        _trained(broken, digits, config, folder=tmp_path, on_epoch=_interrupt_after(3))
    seen: list[int] = []
    history = _trained(
        resumed, digits, config, folder=tmp_path, on_epoch=lambda epoch: seen.append(epoch.epoch)
    )
    assert seen == [3, 4]
    assert [e["train_loss"] for e in history] == [e["train_loss"] for e in expected]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


RICH = replace(
    QUICK, epochs=2, ema=0.8, mixup=0.4, label_smoothing=0.1, clip_grad=1.0, warmup_epochs=0.5
)
"""Six steps, three an epoch, with all that a resume could forget."""


@pytest.fixture(scope="module")
def unbroken(digits: DataSource) -> tuple[PlainStepper, History]:
    assert digits.augment == "shift"
    stepper = _rich_stepper(digits)
    return stepper, _fitted(stepper, digits)


def _rich_stepper(source: DataSource) -> PlainStepper:
    model = make_model("test_resnet", drop_rate=0.2, drop_path_rate=0.2)
    return PlainStepper(model, RICH, steps_per_epoch(source.train, RICH))


def _fitted(stepper: PlainStepper, source: DataSource, config=RICH, **options) -> History:
    with seeded(5):
        return fit(stepper, source, config, seed=5, **options)


def _assert_same(found: tuple[PlainStepper, History], expected: tuple[PlainStepper, History]):
    timed = ("seconds", "images_per_second", "data_wait_share")
    for epoch, wanted in zip(found[1].plain(), expected[1].plain(), strict=True):
        assert {k: v for k, v in epoch.items() if k not in timed} == {
            k: v for k, v in wanted.items() if k not in timed
        }
    for mine, theirs in (
        (found[0].model, expected[0].model),
        (found[0].evaluated(), expected[0].evaluated()),
    ):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, mine.state_dict()[name]), name
    assert found[0].evaluated() is not found[0].model


@pytest.mark.parametrize("last", [1, 3, 5, 6])
def test_told_to_stop_it_goes_on_where_it_was(
    digits: DataSource, unbroken, tmp_path: Path, last: int
) -> None:
    """After a step within an epoch, an epoch's last one, and the training's last one."""
    first, second = _rich_stepper(digits), _rich_stepper(digits)
    said = f"stopped after step {last}; the same command goes on from there"
    with pytest.raises(Stopped, match=said) as stopped:
        _fitted(first, digits, folder=tmp_path, stop=lambda: first.updates == last)
    assert stopped.value.exit_code == 75
    made: list[int] = []
    history = _fitted(second, digits, folder=tmp_path, on_step=made.append)
    assert made == list(range(last + 1, 7))
    _assert_same((second, history), unbroken)


def test_stopped_after_every_step(digits: DataSource, unbroken, tmp_path: Path) -> None:
    for last in range(1, 7):
        stepper = _rich_stepper(digits)
        with pytest.raises(Stopped, match=f"after step {last};"):
            _fitted(stepper, digits, folder=tmp_path, stop=lambda: True)
    stepper = _rich_stepper(digits)
    _assert_same((stepper, _fitted(stepper, digits, folder=tmp_path)), unbroken)


@pytest.mark.parametrize(("every", "cut", "first"), [(2, 4, 3), (2, 6, 5), (3, 4, 1), (1, 3, 3)])
def test_killed_it_goes_on_from_the_last_checkpoint(
    digits: DataSource, unbroken, tmp_path: Path, every: int, cut: int, first: int
) -> None:
    """Checkpoints fall within epochs only: not after an epoch's last step, evaluated or not."""
    config = replace(RICH, checkpoint_steps=every)

    def interrupt(step: int) -> None:
        if step == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _fitted(_rich_stepper(digits), digits, config, folder=tmp_path, on_step=interrupt)
    stepper = _rich_stepper(digits)
    made: list[int] = []
    history = _fitted(stepper, digits, config, folder=tmp_path, on_step=made.append)
    assert made[0] == first
    _assert_same((stepper, history), unbroken)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named_and_set_aside(
    digits: DataSource, unbroken, tmp_path: Path, part: float
) -> None:
    first, path = _rich_stepper(digits), tmp_path / "checkpoint.pt"
    with pytest.raises(Stopped):
        _fitted(first, digits, folder=tmp_path, stop=lambda: first.updates == 2)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(UsageError, match=r"checkpoint\.pt is damaged .* start again to train anew"):
        _fitted(_rich_stepper(digits), digits, folder=tmp_path)
    stepper = _rich_stepper(digits)
    _assert_same((stepper, _fitted(stepper, digits, folder=tmp_path)), unbroken)


def test_checkpoints_change_nothing(digits: DataSource, unbroken, tmp_path: Path) -> None:
    stepper = _rich_stepper(digits)
    config = replace(RICH, checkpoint_steps=1, checkpoint_epochs=1)
    _assert_same((stepper, _fitted(stepper, digits, config, folder=tmp_path)), unbroken)


def test_dropout_is_a_function_of_the_step(digits: DataSource) -> None:
    """Whatever else has drawn random numbers, such as the workers that decode images."""
    images, labels = digits.score_batches(2)[0]
    losses = []
    for before in (1, 2):
        stepper = _rich_stepper(digits)
        torch.manual_seed(before)
        losses.append(float(stepper.step(images, labels)))
    assert losses[0] == losses[1]


def test_a_watch_sees_every_step(digits: DataSource, tmp_path: Path) -> None:
    class Seen(Watch):
        def begin(self, made: int, total: int, images: int) -> None:
            self.begun = (made, total, images)

        def stepped(self, loss, stepper, wait_share: float) -> None:
            assert loss.ndim == 0
            assert not loss.requires_grad
            assert 0 <= wait_share <= 1
            steps.append(stepper.updates)

    steps: list[int] = []
    first, watch = _rich_stepper(digits), Seen()
    with pytest.raises(Stopped):
        _fitted(first, digits, folder=tmp_path, watch=watch, stop=lambda: first.updates == 2)
    assert watch.begun == (0, 6, 100)
    _fitted(_rich_stepper(digits), digits, folder=tmp_path, watch=watch)
    assert watch.begun == (2, 6, 100)
    assert steps == [1, 2, 3, 4, 5, 6]


def _interrupt_after(last: int):
    def watch(epoch) -> None:
        if epoch.epoch == last:
            raise KeyboardInterrupt

    return watch


def test_a_nan_loss_stops_and_names_the_step(digits: DataSource) -> None:
    model = make_model()
    first = next(model.parameters())
    with torch.no_grad():
        first.fill_(float("nan"))
    with pytest.raises(RunFailed, match=r"loss is nan at step 1 \(epoch 1\)"):
        _trained(model, digits, QUICK)


@pytest.mark.parametrize(("stop", "step", "epoch"), [(1, 3, 1), (4, 6, 2)])
def test_a_nan_loss_after_a_resume(
    digits: DataSource, tmp_path: Path, stop: int, step: int, epoch: int
) -> None:
    """The weights are spoilt by the step before; the epoch had begun in the start before."""
    first, second = _rich_stepper(digits), _rich_stepper(digits)
    with pytest.raises(Stopped):
        _fitted(first, digits, folder=tmp_path, stop=lambda: first.updates == stop)
    content = (tmp_path / "checkpoint.pt").read_bytes()

    def spoil(made: int) -> None:
        if made == step - 1:
            with torch.no_grad():
                next(second.model.parameters()).fill_(float("nan"))

    with pytest.raises(RunFailed, match=rf"loss is nan at step {step} \(epoch {epoch}\)"):
        _fitted(second, digits, folder=tmp_path, on_step=spoil, stop=lambda: second.updates == step)
    assert (tmp_path / "checkpoint.pt").read_bytes() == content, "NaN was saved"


def test_a_loss_that_overflows_in_evaluation_only_is_told(digits: DataSource) -> None:
    """Running statistics, which training does not look at, may be the first to overflow."""
    model = make_model()
    norm = next(each for each in model.modules() if isinstance(each, nn.BatchNorm2d))
    assert norm.running_mean is not None
    norm.running_mean.fill_(float("nan"))
    with pytest.raises(RunFailed, match=r"loss over \d+ held-out images is nan; lower training"):
        _trained(model, digits, QUICK)


def test_activation_checkpointing_gives_the_same_gradients(digits: DataSource) -> None:
    images, labels = digits.score_batches(2)[0]
    stepped = []
    for enabled in (False, True):
        config = replace(QUICK, grad_checkpointing=enabled, optimizer="sgd", schedule="none")
        stepper = PlainStepper(make_model("test_vit", drop_path_rate=0.3).double(), config, 3)
        assert stepper.model.grad_checkpointing is enabled
        stepper.step(images.double(), labels)
        stepped.append(stepper.state_dict())
    for name, tensor in stepped[0].items():
        assert torch.allclose(tensor, stepped[1][name], rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("name", ["dla46x_c", None])
def test_a_model_without_activation_checkpointing_is_named(name: str | None) -> None:
    model = make_model(name) if name else nn.Linear(2, 2)
    with pytest.raises(UsageError, match=f"timm's {type(model).__name__} has no activation") as e:
        PlainStepper(model, replace(QUICK, grad_checkpointing=True), 3)
    assert "\n" not in str(e.value)


def test_clipping_bounds_the_step(digits: DataSource) -> None:
    config = replace(
        QUICK, optimizer="sgd", learning_rate=1.0, schedule="none", weight_decay=0.0,
        clip_grad=0.01, optimizer_options={"momentum": 0.0, "nesterov": False},
    )  # fmt: skip
    model = make_model()
    before = copy.deepcopy(list(model.parameters()))
    stepper = PlainStepper(model, config, 1)
    images, labels = digits.score_batches(2)[0]
    stepper.step(images, labels)
    moved = sum((a - b).square().sum() for a, b in zip(before, model.parameters(), strict=True))
    assert float(moved.detach().sqrt()) == pytest.approx(0.01, rel=1e-3)


def test_evaluation_counts_every_image_once(digits: DataSource) -> None:
    model = make_model()
    found = evaluate(model, digits, digits.test)
    images, labels = digits.test.images, digits.test.labels
    with torch.no_grad():
        outputs = model.eval()(digits.prepare(images))
    assert found.images == len(labels)
    assert found.accuracy == pytest.approx(float((outputs.argmax(1) == labels).float().mean()))
    assert found.loss == pytest.approx(
        float(nn.functional.cross_entropy(outputs, labels)), rel=1e-5
    )


def test_a_gpu_evaluates_more_small_images_at_a_time() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [evaluation_batch(cpu, side) for side in (32, 224)] == [256, 256]
    assert [evaluation_batch(gpu, side) for side in (32, 224)] == [2048, 256]


def test_evaluation_is_as_precise_as_training(digits: DataSource) -> None:
    config = replace(QUICK, precision="bf16")
    model = make_model("test_vit")
    (epoch,) = _trained(model, digits, config)
    split = digits.validation
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model.eval()(digits.prepare(split.images))
    assert outputs.dtype == torch.bfloat16
    expected = float(nn.functional.cross_entropy(outputs.float(), split.labels))
    whole = evaluate(model, digits, split)
    assert epoch["validation_loss"] == pytest.approx(expected, rel=1e-6)
    assert whole.loss != pytest.approx(expected, rel=2e-6)
    assert evaluate(model, digits, split, config=config).loss == epoch["validation_loss"]


@pytest.mark.parametrize("schedule", ["cosine", "none"])
def test_the_learning_rate_is_that_of_the_last_step(
    digits: DataSource, tmp_path: Path, schedule: str
) -> None:
    """As the optimizer had it when it made the step; a resumed training tells the same."""
    config = replace(QUICK, epochs=2, schedule=schedule, warmup_epochs=0.5, checkpoint_steps=1)
    images, labels = digits.score_batches(2)[0]
    stepper, used = PlainStepper(make_model(), config, 3), []
    stepper.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    assert stepper.learning_rate() == stepper.optimizer.param_groups[0]["lr"]
    for made in range(1, 6):
        stepper.step(images, labels)
        following = stepper.optimizer.param_groups[0]["lr"]
        assert stepper.learning_rate() == used[-1], made
        assert stepper.optimizer.param_groups[0]["lr"] == following
    assert (len(set(used)) > 3) == (schedule == "cosine")
    stepper.save(tmp_path, History())
    again = PlainStepper(make_model(), config, 3)
    assert again.load(tmp_path) is not None
    assert again.learning_rate() == used[-1]


def test_outputs_in_float64_stay_so(digits: DataSource) -> None:
    seen: list[torch.dtype] = []
    stepper = PlainStepper(make_model("test_vit").double(), QUICK, 3)

    def loss(outputs, labels):
        seen.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, labels)

    stepper.recipe.hard = loss  # type: ignore[assignment]
    images, labels = digits.score_batches(2)[0]
    stepper.step(images.double(), labels)
    assert seen == [torch.float64]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": "adamww"}, "adamw"),
        ({"schedule": "cosin"}, "cosine"),
        ({"optimizer_options": {"bets": 1}}, "bets"),
        ({"batch_size": 10_000}, "batch_size"),
        ({"precision": "fp8"}, "precision"),
        ({"rescatter": True, "compile": True}, "rescatter breaks what training.compile"),
        ({"slim": True, "topology": "rigl"}, "topology rigl may bring weights back"),
        ({"slim": True, "optimizer": "lamb"}, "optimizer lamb does not treat every weight by"),
        ({"slim": True, "optimizer_options": {"caution": True}}, "caution scales by a mean"),
        ({"slim": True, "optimizer_wrapper": "sparseopt"}, "wrapper sparseopt scales by the mean"),
        ({"precision": "fp16"}, "fp16 works under DeepSpeed only; use bf16"),
        ({"batch_size": 0}, "training.batch_size must be at least 1, got 0"),
        ({"batch_size": 75, "mixup": 0.2}, "need an even number .* training.batch_size gives 75"),
        ({"batch_size": 75, "cutmix": 1.0}, "need an even number"),
        ({"checkpoint_steps": -1}, "training.checkpoint_steps must be at least 0, got -1"),
        ({"checkpoint_epochs": -1}, "training.checkpoint_epochs must be at least 0, got -1"),
        ({"clip_grad": -1.0}, "training.clip_grad must be above 0, got -1.0"),
        ({"clip_grad": 0.0}, "training.clip_grad must be above 0, got 0.0"),
        ({"weight_decay": -0.05}, "training.weight_decay must be at least 0, got -0.05"),
        ({"warmup_epochs": -1.0}, "training.warmup_epochs must be at least 0, got -1.0"),
    ],
)
def test_bad_settings_are_named(digits: DataSource, changes: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named) as error:
        _trained(make_model(), digits, replace(QUICK, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [1, 3, 4, 5])
def test_two_spans_are_one_training(digits: DataSource, cut: int) -> None:
    """Plain SGD has no state of its own, so a span from the state after `cut` is the rest."""
    config = replace(
        QUICK,
        epochs=2,
        optimizer="momentum",
        optimizer_options={"momentum": 0.0},
        learning_rate=0.05,
    )
    steps = steps_per_epoch(digits.train, config)
    assert steps == 3
    whole, parts = make_model(), make_model()
    fit(PlainStepper(whole, config, steps), digits, config, seed=3)
    made: list[int] = []
    for span in (Span(last=cut), Span(first=cut)):
        stepper = PlainStepper(parts, config, steps)
        fit(stepper, digits, config, seed=3, span=span, on_step=made.append)
    assert made == [1, 2, 3, 4, 5, 6]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_a_span_that_is_over_before_it_begins(digits: DataSource) -> None:
    stepper = PlainStepper(make_model(), QUICK, steps_per_epoch(digits.train, QUICK))
    with pytest.raises(UsageError, match="starts after step 3 and has 3 steps"):
        fit(stepper, digits, QUICK, seed=0, span=Span(first=3))
