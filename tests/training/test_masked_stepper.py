"""Dense weights under masks are trained as compact weights are, and one network serves all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.corpus import store
from autosparse.data.sets import DataSource
from autosparse.irp import levels as irp_levels
from autosparse.irp import run as irp
from autosparse.irp.levels import COMPACT, MASKED, way_for
from autosparse.irp.replay import replay
from autosparse.models import zoo
from autosparse.sparsity import masks
from autosparse.sparsity.compact import densify
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.study.cells import Cell
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import train_cell
from autosparse.training.config import TrainingConfig
from autosparse.training.masked_stepper import MaskedStepper, can_train
from autosparse.training.steppers import PlainStepper, Stepper
from tests.conftest import QUICK, SMALL_DIGITS, few, grid, make_model, quick_irp

pytestmark = pytest.mark.usefixtures("one_thread")

ADAM = TrainingConfig(batch_size=8, sparse_products=False, warmup_epochs=0.0)
SGD = replace(ADAM, optimizer="momentum", learning_rate=0.05, weight_decay=0.01)
STEPS = 4
RULE = replace(QUICK, optimizer="momentum", learning_rate=0.05)
CONFIGS = {
    "adamw": ADAM,
    "sgd": SGD,
    "clipped": replace(SGD, clip_grad=0.05),
    "averaged": replace(ADAM, ema=0.9),
    "lion": replace(ADAM, optimizer="lion", learning_rate=1e-3),
}


def same(found: Tensor, expected: Tensor, name: str) -> None:
    """Equal but for rounding: sums over survivors and over all weights differ in their last bits.

    That is 2^-53 (in float32 2^-24) of each of some hundred terms, which a few steps make larger:
    Adam divides by the size of the gradient, so that of a small one by a million times at most.
    """
    rtol, atol = (1e-6, 1e-8) if found.dtype == torch.float64 else (1e-4, 2e-5)
    torch.testing.assert_close(found, expected, msg=name, rtol=rtol, atol=atol)


def ticket_of(model: nn.Module, seed: int = 0, density: float = 0.2) -> Ticket:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(weight.shape, generator=generator)
        for name, weight in zoo.prunable(model).items()
    }
    return Ticket.from_model(model, masks.from_scores(scores, 1 - density), {})


def steps(stepper: Stepper, count: int = STEPS) -> list[float]:
    generator = torch.Generator().manual_seed(5)
    dtype = next(stepper.model.parameters()).dtype
    stepper.model.train()
    losses = []
    for _ in range(count):
        images = torch.randn(8, 1, 16, 16, generator=generator)
        labels = torch.randint(0, 10, (8,), generator=generator)
        losses.append(float(stepper.step(images.to(dtype), labels)))
    return losses


def masked(
    name: str, config: TrainingConfig, ticket: Ticket, dtype: torch.dtype = torch.float32
) -> MaskedStepper:
    model = make_model(name).to(dtype)
    return MaskedStepper(model, config, 10, list(ticket.masks)).begin(ticket)


@pytest.mark.parametrize(
    ("name", "kind"), grid(["test_byobnet", "test_vit", "test_nfnet"], CONFIGS)
)
def test_survivors_are_trained_as_compact_ones_are(name: str, kind: str) -> None:
    model, config = make_model(name).double(), CONFIGS[kind]
    ticket = ticket_of(model)
    ours = masked(name, config, ticket, torch.float64)
    theirs = PlainStepper(compact(model, ticket), config, 10)
    assert steps(ours) == pytest.approx(steps(theirs), rel=1e-6)
    found, expected = ours.model.state_dict(), densify(model).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        same(found[key], tensor, key)
    if ours.ema and theirs.ema:
        averaged = densify(theirs.ema.module).state_dict()
        for key, tensor in ours.ema.module.state_dict().items():
            same(tensor, averaged[key], key)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_pruned_stays_zero_and_has_no_momentum(kind: str) -> None:
    ticket = ticket_of(make_model())
    stepper = masked("test_byobnet", CONFIGS[kind], ticket)
    steps(stepper)
    for name, mask in ticket.masks.items():
        weight = stepper.model.get_parameter(name)
        held = [weight.detach(), *stepper.optimizer.state[weight].values()]
        for tensor in (each for each in held if isinstance(each, Tensor) and each.ndim):
            assert not tensor[~mask].any(), name
        assert weight[mask].all()


def test_a_training_begun_anew_is_as_the_first_of_a_fresh_stepper() -> None:
    """Bit for bit: nothing of the training before is left, not even in the average."""
    model, config = make_model(), CONFIGS["averaged"]
    first, second = ticket_of(model, 1), ticket_of(model, 2, density=0.05)
    fresh = masked("test_byobnet", config, second)
    used = masked("test_byobnet", config, first)
    steps(used, 2)
    assert steps(used.begin(second)) == steps(fresh)
    for key, tensor in fresh.evaluated().state_dict().items():
        assert torch.equal(tensor, used.evaluated().state_dict()[key]), key
    assert used.learning_rate() == fresh.learning_rate()


def test_what_was_compiled_serves_all_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    real = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(1)
        return graph

    modes: list[str | None] = []

    def compile_(model: torch.nn.Module, mode: str | None = None) -> Any:
        modes.append(mode)
        return real(model, backend=backend)

    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    model = make_model("test_vit")
    stepper = masked("test_vit", replace(ADAM, compile=True), ticket_of(model))
    steps(stepper, 2)
    once = len(compiled)
    for seed in range(1, 12):
        steps(stepper.begin(ticket_of(model, seed)), 1)
    assert len(compiled) == once > 0
    assert modes == ["reduce-overhead"]  # Launched as a whole on a GPU.


def test_optimizers_that_look_at_whole_layers_are_refused() -> None:
    for config in (
        replace(ADAM, optimizer="lamb"),
        replace(ADAM, optimizer="adafactor"),
        replace(ADAM, optimizer="lion", optimizer_options={"caution": True}),
    ):
        assert not can_train(config)
        with pytest.raises(UsageError, match="does not treat every weight by itself"):
            MaskedStepper(make_model(), config, 10, [])


def test_a_gpu_has_masks_where_that_comes_to_the_same() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert way_for(gpu, ADAM) == MASKED
    assert way_for(cpu, ADAM) == COMPACT
    assert way_for(gpu, replace(ADAM, optimizer="lamb")) == COMPACT


# IRP


@pytest.mark.parametrize(
    "changes", few([{}, {"rewind_steps": 1}, {"live": True}], [{"rewind_steps": 1}])
)
def test_irp_with_masks_finds_the_masks_of_irp_with_compact_weights(
    tmp_path: Path, changes: dict
) -> None:
    found = {}
    # Adam would divide by the size of gradients that are nothing but rounding.
    changes = {**changes, "training": RULE}
    for way in (MASKED, COMPACT):
        config = quick_irp(str(tmp_path / way), **changes)
        assert irp.run_folder(config).name == irp.run_folder(quick_irp("", **changes)).name
        found[way] = store.read_run(irp.run_irp(config, way=way))
        assert {level["way"] for level in found[way].card["levels"]} == {way}
        assert {level["device"] for level in found[way].card["levels"]} == {"cpu"}
    ours, theirs = found[MASKED], found[COMPACT]
    for name, survival in theirs.survival.items():
        differ = int((ours.survival[name] != survival).sum())
        # Of two weights at the threshold that differ by less than rounding, the other may go.
        assert differ <= 2, name
    for one, other in zip(ours.card["levels"], theirs.card["levels"], strict=True):
        assert one["kept"] == other["kept"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)  # See below.
    for key, tensor in theirs.rewound.items():
        same(ours.rewound[key], tensor, key)


def test_a_run_with_masks_goes_on_from_its_levels_and_ends_the_same(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(entry: dict) -> None:
        if entry["level"] == 1:
            raise Stop

    broken, whole = quick_irp(str(tmp_path / "broken")), quick_irp(str(tmp_path / "whole"))
    with pytest.raises(Stop):
        irp.run_irp(broken, on_level=stop, way=MASKED)
    seen: list[int] = []
    again = irp.run_irp(broken, on_epoch=lambda level, _: seen.append(level), way=MASKED)
    found, expected = store.read_run(again), store.read_run(irp.run_irp(whole, way=MASKED))
    assert seen == [2]
    for name, survival in expected.survival.items():
        assert torch.equal(found.survival[name], survival), name


def test_a_level_with_masks_is_replayed_with_masks(tmp_path: Path, digits: DataSource) -> None:
    run = store.read_run(irp.run_irp(quick_irp(str(tmp_path)), way=MASKED))
    last = run.card["levels"][1]["image_passes"] // QUICK.batch_size
    state = replay(run, 1, last, digits)
    alive = {name: state[name].abs() for name in run.survival}
    kept = {n: int(m.sum()) for n, m in run.masks(2).items()}
    best = masks.keep(alive, sum(kept.values()), within=run.masks(1))
    for name, mask in run.masks(2).items():
        assert torch.equal(best[name], mask), name


def test_levels_of_two_kinds_of_device_are_told(tmp_path: Path, monkeypatch) -> None:
    class Stop(Exception):
        pass

    def stop(entry: dict) -> None:
        if entry["level"] == 1:
            raise Stop

    config = quick_irp(str(tmp_path))
    with pytest.raises(Stop):
        irp.run_irp(config, on_level=stop)
    monkeypatch.setattr(irp_levels, "device_name", lambda device: "another device")
    with pytest.warns(UserWarning, match="level 2 of .* on another device, the level before"):
        irp.run_irp(config)


# Tickets


def test_a_ticket_trained_with_masks_is_the_one_trained_compact(
    tmp_path: Path, digits: DataSource
) -> None:
    run = store.read_run(irp.run_irp(quick_irp(str(tmp_path / "corpus"))))
    ticket = run.ticket(2)
    config = SparseTrainConfig(training=replace(RULE, epochs=2))
    shared = MaskedStepper(make_model(), config.training, 3, list(ticket.masks))
    makers = {
        "masked": lambda model, steps: shared.begin(ticket),
        "compact": lambda model, steps: PlainStepper(model, config.training, steps),
    }
    found, trained = {}, {}
    for way, make in makers.items():
        cell = Cell(way, ticket, SMALL_DIGITS, 0, tmp_path / way)
        found[way] = train_cell(cell, config, digits, make, device="cpu")
        trained[way] = Ticket.load(cell.folder / "trained.safetensors")
    assert found["masked"]["kept"] == found["compact"]["kept"]
    assert found["masked"]["parameters"] == found["compact"]["parameters"]
    # Six steps in float32: 6 * 0.05 * sqrt(1000 terms) * 2^-24 = 6e-7 of gradients below ten, times
    # what batch norm and later steps make of it.
    assert found["masked"]["test_loss"] == pytest.approx(found["compact"]["test_loss"], rel=1e-3)
    for name, values in trained["compact"].values.items():
        assert torch.equal(trained["masked"].masks[name], trained["compact"].masks[name])
        torch.testing.assert_close(trained["masked"].values[name], values, rtol=1e-3, atol=1e-4)


def test_masks_of_a_topology_that_moves_are_refused() -> None:
    config = replace(ADAM, topology="rigl")
    assert not can_train(config)
    with pytest.raises(UsageError, match="topology rigl exchanges compact weights"):
        MaskedStepper(make_model(), config, 10, [])
