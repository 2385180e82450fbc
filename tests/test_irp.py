"""IRP: schedule, survival, rewinding, and going on after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from autosparse import corpus, data, irp, masks, training
from autosparse.errors import UsageError
from autosparse.files import read_card
from tests.conftest import QUICK, SMALL_DIGITS, make_model, quick_irp


def test_exponential_schedule_multiplies_by_the_same_factor() -> None:
    found = irp.densities(4, 0.0625, "exponential")
    assert found == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625])


def test_linear_schedule_subtracts_the_same_amount() -> None:
    assert irp.densities(4, 0.2, "linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> corpus.IRPRun:
    folder = irp.run_irp(quick_irp(str(tmp_path_factory.mktemp("corpus"))))
    return corpus.read_run(folder)


def test_survival_holds_every_mask_with_exact_counts(run: corpus.IRPRun) -> None:
    total = sum(tensor.numel() for tensor in run.survival.values())
    expected = [round(total * density) for density in (1, 0.1**0.5, 0.1)]
    assert [masks.kept(run.masks(level)) for level in range(3)] == expected
    assert [level["kept"] for level in run.card["levels"]] == expected


def test_masks_are_nested_and_no_layer_is_empty(run: corpus.IRPRun) -> None:
    for name, survival in run.survival.items():
        assert survival.dtype == torch.uint8
        assert bool((run.masks(2)[name] <= run.masks(1)[name]).all())
        assert int(run.masks(2)[name].sum()) >= 1


def test_a_run_holds_the_seeded_initial_state(run: corpus.IRPRun) -> None:
    state = make_model(seed=0).state_dict()
    for name, tensor in (run.initial | run.rest).items():
        assert torch.equal(tensor, state[name]), name


def test_a_levels_ticket_is_at_its_initial_values(run: corpus.IRPRun) -> None:
    ticket = run.ticket(2)
    model = make_model(seed=0)
    ticket.check(model)
    for name, mask in ticket.masks.items():
        assert torch.equal(ticket.values[name], model.get_parameter(name).detach()[mask])


def test_level_one_keeps_the_largest_trained_weights_of_the_dense_training(
    tmp_path: Path, digits
) -> None:
    """The dense training is done again by hand; its largest weights are level 1's mask.

    Layers that keep a single weight are left out: there the guard may have kept a small one.
    """
    from autosparse.training import PlainStepper, fit, seeded, steps_per_epoch

    found = corpus.read_run(irp.run_irp(quick_irp(str(tmp_path))))
    model = make_model(seed=0)
    stepper = PlainStepper(model, QUICK, steps_per_epoch(digits.train, QUICK))
    with seeded(0):
        fit(stepper, digits, QUICK, seed=0)
    magnitude = {name: model.get_parameter(name).detach().abs() for name in found.survival}
    chosen = found.masks(1)
    kept = torch.cat([magnitude[name][mask] for name, mask in chosen.items() if mask.sum() > 1])
    pruned = torch.cat([magnitude[name][~mask] for name, mask in chosen.items()])
    assert len(kept) > 50_000
    assert float(kept.min()) >= float(pruned.max())


def test_snip_labels_differ_from_magnitude_labels(tmp_path: Path, run: corpus.IRPRun) -> None:
    other = corpus.read_run(irp.run_irp(quick_irp(str(tmp_path), label="snip")))
    assert masks.fingerprint(other.masks(1)) != masks.fingerprint(run.masks(1))


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    config = quick_irp(str(tmp_path))
    folder = irp.run_irp(config)
    before = (folder / corpus.RUN).stat().st_mtime_ns
    assert irp.run_irp(config, on_epoch=lambda *_: pytest.fail("trained again")) == folder
    assert (folder / corpus.RUN).stat().st_mtime_ns == before


def test_finished_levels_are_read_not_redone(tmp_path: Path) -> None:
    config = quick_irp(str(tmp_path / "broken"))
    _stop_after_level(config, 1)
    seen: list[int] = []
    resumed = irp.run_irp(config, on_epoch=lambda level, _: seen.append(level))
    whole = irp.run_irp(quick_irp(str(tmp_path / "whole")))
    assert seen == [2]
    assert _survival_bytes(resumed) == _survival_bytes(whole)


def _stop_after_level(config, last: int) -> None:
    class Stop(Exception):
        pass

    def stop(entry: dict) -> None:
        if entry["level"] == last:
            raise Stop

    with pytest.raises(Stop):
        irp.run_irp(config, on_level=stop)


def _survival_bytes(folder: Path) -> dict[str, bytes]:
    run = corpus.read_run(folder)
    return {name: tensor.numpy().tobytes() for name, tensor in run.survival.items()}


def test_a_folder_begun_on_other_data_is_refused(tmp_path: Path) -> None:
    config = quick_irp(str(tmp_path))
    _stop_after_level(config, 0)
    card = irp.run_folder(config) / "card.json"
    card.write_text(card.read_text().replace('"data_fingerprint": "', '"data_fingerprint": "0'))
    with pytest.raises(UsageError, match="begun with other data"):
        irp.run_irp(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"label": "magnitud"}, "magnitude"),
        ({"schedule": "exponentail"}, "exponential"),
        ({"final_density": 0.0}, "final_density"),
        ({"levels": 0}, "levels"),
        ({"scope": "globl"}, "global"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        irp.run_irp(quick_irp(str(tmp_path), **changes))
    assert not any(tmp_path.iterdir())


def test_killed_in_level_three_of_six_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", "from autosparse.cli import main; main()", "irp",
        "--model.name", "test_byobnet", "--data.train_limit", str(SMALL_DIGITS.train_limit),
        "--training.epochs", "6", "--training.batch_size", "50", "--levels", "6", "--device", "cpu",
    ]  # fmt: skip
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = subprocess.Popen([*command, "--out", str(broken)], stderr=subprocess.DEVNULL)
    folder = _wait_for_level(broken, 2, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    levels = {path.parent.name: read_card(path) for path in folder.glob("levels/*/*.safetensors")}
    assert sorted(levels) == ["00", "01", "02"]
    for out in (broken, whole):
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    resumed = corpus.read_run(folder)
    assert resumed.card["levels"][:3] == [
        {k: v for k, v in levels[name].items() if k != "next"} for name in sorted(levels)
    ]
    assert _survival_bytes(folder) == _survival_bytes(whole / folder.name)


def _wait_for_level(out: Path, level: int, process: subprocess.Popen) -> Path:
    for _ in range(1200):
        found = list(out.glob(f"*/levels/{level:02d}/level.safetensors"))
        if found:
            return found[0].parents[2]
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    raise AssertionError(f"level {level} was not reached in a minute")


# Late rewinding and short horizons


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> corpus.IRPRun:
    config = quick_irp(str(tmp_path_factory.mktemp("late")), rewind_steps=2)
    return corpus.read_run(irp.run_irp(config))


def state_after(steps: int) -> dict[str, torch.Tensor]:
    """Train the dense model for some steps, as level 0 does."""
    source, model = data.load(SMALL_DIGITS), make_model(seed=0)
    stepper = training.PlainStepper(model, QUICK, training.steps_per_epoch(source.train, QUICK))
    with training.seeded(0):
        training.fit(stepper, source, QUICK, seed=0, span=training.Span(last=steps))
    return model.state_dict()


def test_late_rewinding_goes_back_to_the_dense_state_after_step_k(late: corpus.IRPRun) -> None:
    expected = state_after(2)
    assert set(late.rewound) == set(expected)
    for name, tensor in late.rewound.items():
        assert torch.equal(tensor, expected[name]), name
    initial = make_model(seed=0).state_dict()
    assert any(not torch.equal(late.rewound[name], initial[name]) for name in late.initial)
    for name, tensor in late.initial.items():
        assert torch.equal(tensor, initial[name]), name


def test_a_late_ticket_holds_the_values_after_step_k(late: corpus.IRPRun) -> None:
    ticket = late.ticket(2)
    ticket.check(make_model())
    assert ticket.card["rewind_steps"] == 2
    for name, mask in ticket.masks.items():
        assert torch.equal(ticket.values[name], late.rewound[name][mask])
    for name, tensor in ticket.rest.items():
        assert torch.equal(tensor, late.rewound[name])


def test_the_first_level_is_the_same_wherever_it_rewinds_to(
    run: corpus.IRPRun, late: corpus.IRPRun
) -> None:
    for name, mask in run.masks(1).items():
        assert torch.equal(late.masks(1)[name], mask)
    assert masks.fingerprint(run.masks(2)) != masks.fingerprint(late.masks(2))


def test_cost_is_what_was_trained(run: corpus.IRPRun, late: corpus.IRPRun) -> None:
    # An epoch of 300 images in batches of 100; late levels leave out two of the three steps.
    assert [level["image_passes"] for level in run.card["levels"]] == [300, 300, 300]
    assert [level["image_passes"] for level in late.card["levels"]] == [300, 100, 100]
    assert run.ticket(2).card["image_passes"] == 600
    assert late.ticket(2).card["image_passes"] == 400
    assert run.ticket(0).card["image_passes"] == 0


def test_a_short_horizon_makes_so_many_steps_at_a_constant_rate(tmp_path: Path) -> None:
    rates = []
    folder = irp.run_irp(
        quick_irp(str(tmp_path), steps_per_level=4, levels=1),
        on_epoch=lambda level, epoch: rates.append(epoch.learning_rate),
    )
    assert rates == [QUICK.learning_rate] * 2
    assert [level["image_passes"] for level in corpus.read_run(folder).card["levels"]] == [400, 400]


def test_a_late_run_goes_on_from_its_levels(tmp_path: Path) -> None:
    config = quick_irp(str(tmp_path / "cut"), rewind_steps=2)

    def stop(entry: dict) -> None:
        if entry["level"] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        irp.run_irp(config, on_level=stop)
    folder = irp.run_irp(config)
    whole = irp.run_irp(quick_irp(str(tmp_path / "whole"), rewind_steps=2))
    cut, unbroken = corpus.read_run(folder), corpus.read_run(whole)
    for name, survival in unbroken.survival.items():
        assert torch.equal(cut.survival[name], survival)
    for name, tensor in unbroken.rewound.items():
        assert torch.equal(cut.rewound[name], tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewind_steps": 3}, "rewind_steps 3: a level has 3 steps only"),
        ({"rewind_steps": -1}, "rewind_steps must be at least 0"),
        ({"steps_per_level": 0}, "steps_per_level must be at least 1"),
    ],
)
def test_horizons_that_cannot_be(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        irp.run_irp(quick_irp(str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()
