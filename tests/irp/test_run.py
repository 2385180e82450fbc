"""IRP: schedule, survival, rewinding, and going on after a kill."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autosparse.core import locks
from autosparse.core.errors import UsageError
from autosparse.core.files import read_card, read_json, read_tensors, write_tensors, write_text
from autosparse.core.locks import CLAIM
from autosparse.corpus import store, upkeep
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.data.sets import DataSource
from autosparse.irp import run as irp
from autosparse.irp.levels import _read_level, densities
from autosparse.irp.replay import replay
from autosparse.sparsity import masks, reach
from autosparse.sparsity.counts import keep_count, keep_density
from autosparse.training import loop, steppers
from tests.conftest import QUICK, SMALL_DIGITS, flip, holder, make_model, quick_irp


def test_exponential_schedule_multiplies_by_the_same_factor() -> None:
    found = densities(4, 0.0625, "exponential")
    assert found == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625])


def test_linear_schedule_subtracts_the_same_amount() -> None:
    assert densities(4, 0.2, "linear") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.IRPRun:
    folder = irp.run_irp(quick_irp(str(tmp_path_factory.mktemp("corpus"))))
    return store.read_run(folder)


def test_survival_holds_every_mask_with_exact_counts(run: store.IRPRun) -> None:
    total = sum(tensor.numel() for tensor in run.survival.values())
    expected = [keep_density(total, density) for density in (1, 0.1**0.5, 0.1)]
    assert [masks.kept(run.masks(level)) for level in range(3)] == expected
    assert [level["kept"] for level in run.card["levels"]] == expected


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_half_a_weight_is_removed_as_everywhere(tmp_path: Path, schedule: str) -> None:
    """A sixteenth of the model's 199,256 weights is 12,453.5."""
    settings = quick_irp(str(tmp_path), levels=1, final_density=0.0625, schedule=schedule)
    found = store.read_run(irp.run_irp(settings))
    assert masks.total(found.masks(0)) == 199_256
    assert masks.kept(found.masks(1)) == 12_453 == keep_count(199_256, 0.9375)


def test_the_last_density_is_the_one_that_was_asked_for() -> None:
    for schedule in irp.SCHEDULES:
        for final in (0.05, 0.02, 0.3):
            found = densities(7, final, schedule)
            assert (found[0], found[-1]) == (1, final)


def test_masks_are_nested_and_no_layer_is_empty(run: store.IRPRun) -> None:
    for name, survival in run.survival.items():
        assert survival.dtype == torch.uint8
        assert bool((run.masks(2)[name] <= run.masks(1)[name]).all())
        assert int(run.masks(2)[name].sum()) >= 1


def test_a_run_holds_the_seeded_initial_state(run: store.IRPRun) -> None:
    state = make_model(seed=0).state_dict()
    for name, tensor in (run.initial | run.rest).items():
        assert torch.equal(tensor, state[name]), name


def test_a_levels_ticket_is_at_its_initial_values(run: store.IRPRun, digits) -> None:
    ticket = run.ticket(2)
    assert ticket.card["data_fingerprint"] == digits.fingerprint
    assert ticket.card["normalisation"] == digits.normalisation()
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
    from autosparse.training.loop import fit, seeded, steps_per_epoch
    from autosparse.training.steppers import PlainStepper

    found = store.read_run(irp.run_irp(quick_irp(str(tmp_path))))
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


def test_snip_labels_differ_from_magnitude_labels(tmp_path: Path, run: store.IRPRun) -> None:
    other = store.read_run(irp.run_irp(quick_irp(str(tmp_path), label="snip")))
    assert masks.fingerprint(other.masks(1)) != masks.fingerprint(run.masks(1))


def test_live_runs_keep_their_weights_on_paths(tmp_path: Path) -> None:
    """At 1 % the layers keep what the label gives them, and far fewer weights are off all paths."""
    found = {}
    for live in (False, True):
        config = quick_irp(str(tmp_path), final_density=0.01, label="lamp", live=live)
        found[live] = store.read_run(irp.run_irp(config))
    model, first = make_model(seed=0), {live: run.masks(1) for live, run in found.items()}
    for name in first[True]:
        assert int(first[True][name].sum()) == int(first[False][name].sum()), name
    share = {}
    for live, run in found.items():
        last = run.masks(2)
        assert all(bool((last[n] <= first[live][n]).all()) for n in last)
        share[live] = masks.kept(reach.live(model, last, (1, 16, 16))) / masks.kept(last)
    assert share[True] > 0.95 > 0.5 > share[False], share


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    config = quick_irp(str(tmp_path))
    folder = irp.run_irp(config)
    before = (folder / store.RUN).stat().st_mtime_ns
    assert irp.run_irp(config, on_epoch=lambda *_: pytest.fail("trained again")) == folder
    assert (folder / store.RUN).stat().st_mtime_ns == before


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
    run = store.read_run(folder)
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
        ({"training": replace(QUICK, topology="set")}, "topology set moves the masks"),
        ({"training": replace(QUICK, slim=True)}, "slim is for trainings of a ticket"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        irp.run_irp(quick_irp(str(tmp_path), **changes))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_in_level_three_of_six_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", "from autosparse.cli.main import main; main()", "irp",
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
    resumed = store.read_run(folder)
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
def late(tmp_path_factory: pytest.TempPathFactory) -> store.IRPRun:
    config = quick_irp(str(tmp_path_factory.mktemp("late")), rewind_steps=2)
    return store.read_run(irp.run_irp(config))


def state_after(steps: int) -> dict[str, torch.Tensor]:
    """Train the dense model for some steps, as level 0 does."""
    source, model = sets.load(SMALL_DIGITS), make_model(seed=0)
    stepper = steppers.PlainStepper(model, QUICK, loop.steps_per_epoch(source.train, QUICK))
    with loop.seeded(0):
        loop.fit(stepper, source, QUICK, seed=0, span=loop.Span(last=steps))
    return model.state_dict()


def test_late_rewinding_goes_back_to_the_dense_state_after_step_k(late: store.IRPRun) -> None:
    expected = state_after(2)
    assert set(late.rewound) == set(expected)
    for name, tensor in late.rewound.items():
        assert torch.equal(tensor, expected[name]), name
    initial = make_model(seed=0).state_dict()
    assert any(not torch.equal(late.rewound[name], initial[name]) for name in late.initial)
    for name, tensor in late.initial.items():
        assert torch.equal(tensor, initial[name]), name


def test_a_late_ticket_holds_the_values_after_step_k(late: store.IRPRun) -> None:
    ticket = late.ticket(2)
    ticket.check(make_model())
    assert ticket.card["rewind_steps"] == 2
    for name, mask in ticket.masks.items():
        assert torch.equal(ticket.values[name], late.rewound[name][mask])
    for name, tensor in ticket.rest.items():
        assert torch.equal(tensor, late.rewound[name])


def test_the_first_level_is_the_same_wherever_it_rewinds_to(
    run: store.IRPRun, late: store.IRPRun
) -> None:
    for name, mask in run.masks(1).items():
        assert torch.equal(late.masks(1)[name], mask)
    assert masks.fingerprint(run.masks(2)) != masks.fingerprint(late.masks(2))


def test_cost_is_what_was_trained(run: store.IRPRun, late: store.IRPRun) -> None:
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
    assert [level["image_passes"] for level in store.read_run(folder).card["levels"]] == [400, 400]


def test_a_late_run_goes_on_from_its_levels(tmp_path: Path) -> None:
    config = quick_irp(str(tmp_path / "cut"), rewind_steps=2)

    def stop(entry: dict) -> None:
        if entry["level"] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        irp.run_irp(config, on_level=stop)
    folder = irp.run_irp(config)
    whole = irp.run_irp(quick_irp(str(tmp_path / "whole"), rewind_steps=2))
    cut, unbroken = store.read_run(folder), store.read_run(whole)
    for name, survival in unbroken.survival.items():
        assert torch.equal(cut.survival[name], survival)
    for name, tensor in unbroken.rewound.items():
        assert torch.equal(cut.rewound[name], tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewind_steps": 3}, "rewind_steps 3: a level has 3 steps only"),
        ({"rewind_steps": -1}, "rewind_steps must be whole and at least 0"),
        ({"steps_per_level": 0}, "steps_per_level must be whole and at least 1"),
        ({"samples_per_class": 0}, "samples_per_class must be whole and at least 1"),
        ({"levels": 2.0}, "levels must be whole and at least 1"),
    ],
)
def test_horizons_that_cannot_be(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        irp.run_irp(quick_irp(str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


# Damage


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two of its three levels."""
    config = quick_irp(str(tmp_path_factory.mktemp("begun")))
    _stop_after_level(config, 1)
    return irp.run_folder(config)


@pytest.fixture()
def half(begun: Path, tmp_path: Path) -> Path:
    """A copy of that, to damage."""
    return Path(shutil.copytree(begun, tmp_path / begun.name))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def other_masks(path: Path) -> None:
    """Prune other weights than the fingerprint in the header says: a bit of a mask is flipped."""
    flip(path, -1)


def other_fingerprint(path: Path) -> None:
    tensors, card = read_tensors(path)
    write_tensors(path, tensors, {**card, "next": "0" * 16})


def no_masks(path: Path) -> None:
    _, card = read_tensors(path)
    write_tensors(path, {}, card)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("damage", [cut, other_masks, other_fingerprint, no_masks])
def test_a_damaged_level_is_set_aside_and_done_again_the_same(
    half: Path, run: store.IRPRun, damage, level: int
) -> None:
    path = half / "levels" / f"{level:02d}" / "level.safetensors"
    damage(path)
    damaged = path.read_bytes()
    config = quick_irp(str(half.parent))
    with pytest.raises(UsageError) as caught:
        irp.run_irp(config, on_epoch=lambda *_: pytest.fail("trained on damaged masks"))
    assert str(path) in str(caught.value)
    assert "set aside as level.safetensors.damaged, start again to do" in str(caught.value)
    assert path.with_name("level.safetensors.damaged").read_bytes() == damaged
    assert not path.exists()
    assert not (half / CLAIM).exists()
    trained: list[int] = []
    irp.run_irp(config, on_epoch=lambda level, _: trained.append(level))
    assert trained == [level, 2]
    again = store.read_run(half)
    for name, survival in run.survival.items():
        assert torch.equal(again.survival[name], survival)


def test_the_bytes_of_a_levels_header_are_looked_at(half: Path, run: store.IRPRun) -> None:
    """Whatever is flipped, the masks that are read are right, or the file is set aside."""
    path = half / "levels" / "00" / "level.safetensors"
    whole, expected = path.read_bytes(), run.masks(1)
    refused = 0
    size = 8 + int.from_bytes(whole[:8], "little")
    for position in range(0, size, 3):
        flip(path, position)
        try:
            found, _ = _read_level(path, run.masks(0))
        except UsageError:
            refused += 1
        else:
            assert found is not None
            assert all(torch.equal(found[name], mask) for name, mask in expected.items())
        path.write_bytes(whole)
    assert refused > size / 6


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"7"])
def test_a_garbled_card_is_set_aside_and_written_anew(half: Path, content: bytes) -> None:
    config = quick_irp(str(half.parent))
    whole = read_json(half / "card.json")
    (half / "card.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"card\.json.*set aside as card\.json\.damaged"):
        irp.run_irp(config, on_epoch=lambda *_: pytest.fail("trained"))
    assert (half / "card.json.damaged").read_bytes() == content
    trained: list[int] = []
    irp.run_irp(config, on_epoch=lambda level, _: trained.append(level))
    assert trained == [2]
    assert read_json(half / "card.json") == whole


# One writer


def test_a_run_that_another_process_is_at_is_refused_until_that_dies(half: Path) -> None:
    config = quick_irp(str(half.parent))
    with holder(half) as process:
        with pytest.raises(UsageError) as caught:
            irp.run_irp(config, on_epoch=lambda *_: pytest.fail("trained"))
        assert f"{half} is being worked on by process {process.pid}" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not store.is_finished(half)
    assert f"pid={process.pid}" in (half / CLAIM).read_text()
    assert irp.run_irp(config) == half
    assert store.is_finished(half)
    assert not (half / CLAIM).exists()


def test_who_waits_for_a_run_finds_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "POLL", 0.02)
    config, at_work, go_on = quick_irp(str(tmp_path)), threading.Event(), threading.Event()
    found: list[Path] = []

    def hold(entry: dict) -> None:
        at_work.set()
        assert go_on.wait(60)

    def wait() -> None:
        no_training = lambda *_: pytest.fail("trained twice")  # noqa: E731
        found.append(irp.run_irp(config, on_epoch=no_training, wait=True))

    first = threading.Thread(target=lambda: irp.run_irp(config, on_level=hold))
    second = threading.Thread(target=wait)
    first.start()
    assert at_work.wait(60)
    with pytest.raises(UsageError, match="is being worked on by process"):
        irp.run_irp(config)
    second.start()
    time.sleep(0.3)
    assert second.is_alive()
    assert not found
    go_on.set()
    first.join(60)
    second.join(60)
    assert found == [irp.run_folder(config)]
    assert store.is_finished(found[0])
    assert not (found[0] / CLAIM).exists()


def test_who_was_taken_over_stops_and_leaves_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autosparse.core.errors import RunFailed

    monkeypatch.setattr(locks, "BEAT", 0.01)
    config = quick_irp(str(tmp_path))
    folder = irp.run_folder(config)
    other = "filelock/2\npid=1\nhost=another\nmode=lease\ntoken=0\nduration=60.0\n"

    def stall(entry: dict) -> None:
        """Let another have the claim, and wait until the next heartbeat has seen it."""
        write_text(folder / CLAIM, other)
        while any("filelock-lease" in thread.name for thread in threading.enumerate()):
            time.sleep(0.01)

    with pytest.raises(RunFailed, match="was taken over by another process"):
        irp.run_irp(config, on_level=stall)
    assert (folder / CLAIM).read_text() == other
    assert [path.parent.name for path in folder.glob("levels/*/*")] == ["00"]


# Replay


def next_masks_by_hand(
    weights: dict[str, torch.Tensor], within: dict[str, torch.Tensor], count: int
) -> dict[str, torch.Tensor]:
    """Of the weights that are left, every layer's largest, and then the largest of all."""
    scores = {name: weights[name].abs().where(mask, -1) for name, mask in within.items()}
    for tensor in scores.values():
        tensor.view(-1)[tensor.argmax()] = float("inf")
    flat = torch.cat([tensor.flatten() for tensor in scores.values()])
    threshold = flat.sort(descending=True).values[count - 1]
    return {name: tensor >= threshold for name, tensor in scores.items()}


def check_replay(run: store.IRPRun, level: int, steps: int, source: DataSource) -> None:
    """A level's trained weights, by magnitude, must give the next level's masks."""
    weights = replay(run, level, steps, source)
    expected = run.masks(level + 1)
    found = next_masks_by_hand(weights, run.masks(level), masks.kept(expected))
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name
        assert not weights[name][~run.masks(level)[name]].count_nonzero()


def test_a_replayed_level_gives_the_next_levels_masks(
    run: store.IRPRun, late: store.IRPRun, digits: DataSource
) -> None:
    check_replay(run, 0, 3, digits)
    check_replay(run, 1, 3, digits)
    check_replay(late, 0, 3, digits)
    check_replay(late, 1, 1, digits)


def test_a_replayed_short_level_gives_the_next_levels_masks(
    tmp_path: Path, digits: DataSource
) -> None:
    config = quick_irp(str(tmp_path), steps_per_level=4, store_initial=False)
    check_replay(store.read_run(irp.run_irp(config)), 1, 4, digits)


def test_some_steps_of_the_dense_level_are_those_of_the_training(
    run: store.IRPRun, late: store.IRPRun, digits: DataSource
) -> None:
    expected = state_after(2)
    for each in (run, late):
        found = replay(each, 0, 2, digits)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for name, tensor in late.rewound.items():
        assert torch.equal(tensor, expected[name])


def test_a_level_is_replayed_on_the_device_that_is_asked_for(
    run: store.IRPRun, digits: DataSource, device: torch.device
) -> None:
    found, expected = replay(run, 1, 1, digits, str(device)), replay(run, 1, 1, digits)
    for name, tensor in expected.items():
        assert found[name].device.type == device.type
        assert torch.allclose(found[name].cpu(), tensor, atol=1e-4)


def test_replay_on_other_data_is_refused(run: store.IRPRun) -> None:
    other = sets.load(DataConfig(train_limit=310))
    with pytest.raises(UsageError, match=f"run {run.card['run_id']} was made on other data"):
        replay(run, 0, 1, other)


@pytest.mark.parametrize(
    ("level", "steps", "message"),
    [
        (0, 0, "level 0 has steps 1 to 3, not 0"),
        (1, 4, "level 1 has steps 1 to 3, not 4"),
        (3, 1, "levels 0 to 2, not 3"),
        (-1, 1, "levels 0 to 2, not -1"),
    ],
)
def test_replay_of_what_was_not(
    run: store.IRPRun, digits: DataSource, level: int, steps: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        replay(run, level, steps, digits)


def test_replay_of_a_late_level_that_is_too_long(late: store.IRPRun, digits: DataSource) -> None:
    with pytest.raises(UsageError, match="level 1 has steps 1 to 1, not 2"):
        replay(late, 1, 2, digits)


# Places that are not local


def test_a_remote_run_goes_on_level_by_level_and_ends_the_same(
    remote: Path, run: store.IRPRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(locks, "SETTLE", 0.01)
    config = quick_irp(str(remote))
    folder = irp.run_folder(config)
    for level in range(2):
        _stop_after_level(config, level)
        assert len(list(folder.glob("levels/*/level.safetensors"))) == level + 1
        assert not (folder / CLAIM).exists()
    trained: list[int] = []
    irp.run_irp(config, on_epoch=lambda level, _: trained.append(level))
    assert trained == [2]
    assert sorted(path.name for path in folder.iterdir()) == [
        "card.json", "finished.json", "run.safetensors",
    ]  # fmt: skip
    found = store.Corpus(str(remote)).read(folder.name)
    for name, survival in run.survival.items():
        assert torch.equal(found.survival[name], survival)
        assert torch.equal(found.initial[name], run.initial[name])
    assert [row["run_id"] for row in store.Corpus(remote).table()] == [folder.name]
    store.Corpus(remote).write_index()
    assert [row["run_id"] for row in store.Corpus(remote).table()] == [folder.name]
    assert list(upkeep.verify(remote)) == [(folder.name, [])]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_remote_level_is_set_aside(
    remote: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SETTLE", 0.01)
    config = quick_irp(str(remote))
    folder = irp.run_folder(config)
    for path in half.rglob("*"):
        if path.is_file():
            goal = folder / path.relative_to(half).as_posix()
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_bytes(path.read_bytes())
    level = folder / "levels" / "01" / "level.safetensors"
    cut(level)
    with pytest.raises(UsageError, match=r"level\.safetensors.*set aside"):
        irp.run_irp(config, on_epoch=lambda *_: pytest.fail("trained"))
    assert not level.exists()
    trained: list[int] = []
    irp.run_irp(config, on_epoch=lambda level, _: trained.append(level))
    assert trained == [1, 2]
