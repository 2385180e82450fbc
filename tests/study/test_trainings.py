"""Cells: found when finished, keyed by all that made them, results and trained tickets."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autosparse import prune
from autosparse.autos.network import AutoS
from autosparse.cli.arguments import guarded
from autosparse.cli.main import _main
from autosparse.core import locks
from autosparse.core.errors import RunFailed, Stopped, UsageError
from autosparse.core.files import write_json
from autosparse.core.locks import CLAIM
from autosparse.criteria import base
from autosparse.criteria import pruning as pruning_module
from autosparse.criteria.config import PruneConfig
from autosparse.data.config import DataConfig
from autosparse.data.memory import MemorySplit
from autosparse.data.sets import DataSource
from autosparse.models.config import ModelConfig
from autosparse.sparsity.ticket import Ticket, load_state
from autosparse.study import cells as study_cells
from autosparse.study import trainings
from autosparse.study.cells import Cell, cells, check_config
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import RESULT, SETTINGS, TRAINED, train_cell
from autosparse.training import loop
from autosparse.training.loop import evaluate
from autosparse.training.steppers import PlainStepper
from tests.conftest import QUICK, SMALL_DIGITS, holder, make_model
from tests.data.test_data import write_mnist


@pytest.fixture()
def config(tmp_path: Path, digits: DataSource) -> SparseTrainConfig:
    ticket = prune(make_model(), digits, "erk", 0.9)
    ticket.save(tmp_path / "tickets" / "erk.safetensors")
    return SparseTrainConfig(
        tickets=[str(tmp_path / "tickets" / "*.safetensors")],
        training=QUICK,
        out=str(tmp_path / "trained"),
    )


def _train(cell: Cell, config: SparseTrainConfig, digits: DataSource, **options) -> dict:
    return train_cell(
        cell,
        config,
        digits,
        lambda model, steps: PlainStepper(model, config.training, steps),
        device="cpu",
        **options,
    )


def _as_accurate_as_recorded(cell, result, digits: DataSource) -> Ticket:
    """Return a cell's trained ticket; in another model it has the accuracy of the result."""
    ticket = Ticket.load(cell.folder / TRAINED)
    model = make_model(seed=7)
    load_state(model, ticket)
    assert evaluate(model, digits, digits.test).accuracy == result["test_accuracy"]
    return ticket


def test_a_trained_ticket_has_the_accuracy_it_records(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    result = _train(cell, config, digits)
    ticket = _as_accurate_as_recorded(cell, result, digits)
    assert ticket.fingerprint == cell.ticket.fingerprint
    assert ticket.content_hash != cell.ticket.content_hash
    assert result["checkpoint_bytes"] == (cell.folder / TRAINED).stat().st_size


def test_parameters_are_survivors_and_the_rest(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    dense = make_model()
    others = sum(p.numel() for p in dense.parameters()) - sum(
        mask.numel() for mask in cell.ticket.masks.values()
    )
    assert _train(cell, config, digits)["parameters"] == cell.ticket.kept + others


def test_a_slimmed_training_gives_a_ticket_for_the_whole_network(
    tmp_path: Path, digits: DataSource
) -> None:
    path = tmp_path / "magnitude.safetensors"
    prune(make_model(), digits, "magnitude", 0.95).save(path)
    training = replace(QUICK, optimizer="sgd", learning_rate=0.05)
    found = []
    for slim in (True, False):
        config = SparseTrainConfig(
            tickets=str(path), training=replace(training, slim=slim), out=str(tmp_path / "out")
        )
        (cell,) = cells(config)
        result = _train(cell, config, digits)
        ticket = _as_accurate_as_recorded(cell, result, digits)
        assert ticket.card["training"]["slim"] is slim
        found.append((ticket, result))
    (slimmed, small), (whole, large) = found
    assert small["parameters"] < 0.8 * large["parameters"]
    assert small["training_flops"] == large["training_flops"]
    assert small["test_loss"] == pytest.approx(large["test_loss"], rel=1e-4)
    assert slimmed.fingerprint == whole.fingerprint
    head = "head.fc.weight"
    assert slimmed.values[head].ne(Ticket.load(path).values[head]).any()
    torch.testing.assert_close(slimmed.values[head], whole.values[head], rtol=1e-4, atol=1e-5)


def test_a_finished_cell_is_not_trained_again(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    result = _train(cell, config, digits)
    (again,) = cells(config)
    assert again.done
    assert _train(again, config, digits, on_epoch=lambda _: pytest.fail("trained again")) == result


def test_other_settings_make_another_cell(config) -> None:
    (cell,) = cells(config)
    (other,) = cells(replace(config, training=replace(QUICK, epochs=2)))
    (seeded,) = cells(replace(config, seed=3))
    (elsewhere,) = cells(replace(config, device="cpu", tracking=False))
    assert len({cell.folder, other.folder, seeded.folder}) == 3
    assert elsewhere.folder == cell.folder


def test_without_a_ticket_the_model_is_trained_dense(config, digits: DataSource) -> None:
    dense = replace(config, tickets=[], model=ModelConfig("test_byobnet"), data=SMALL_DIGITS)
    (cell,) = cells(dense)
    result = _train(cell, dense, digits)
    assert result["sparsity"] == 0.0
    assert result["parameters"] == sum(p.numel() for p in make_model().parameters())


def test_a_failure_after_the_last_epoch_is_told_to_the_observer(
    config, digits: DataSource, monkeypatch
) -> None:
    class Told:
        def __getattr__(self, name: str):
            return lambda *_: heard.append(name)

    def full(*_) -> None:
        raise RunFailed("the disk is full")

    heard: list[str] = []
    monkeypatch.setattr(trainings, "_finish", full)
    (cell,) = cells(config)
    with pytest.raises(RunFailed, match="disk is full"):
        _train(cell, config, digits, observer=Told())
    assert heard == ["begin", "epoch", "failed"]


def test_nothing_to_train_is_an_error(config) -> None:
    with pytest.raises(UsageError, match=r"give tickets, or what to prune .*, or a model"):
        list(cells(replace(config, tickets=[])))
    with pytest.raises(UsageError, match=r"no ticket matches .*nothing"):
        list(cells(replace(config, tickets=["nothing*.safetensors"])))


def test_the_home_folder_may_be_named_in_a_pattern(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells(config)
    home = tmp_path / "home"
    cell.ticket.save(home / "mine.safetensors")
    monkeypatch.setenv("HOME", str(home))
    (found,) = cells(replace(config, tickets=["~/*.safetensors"]))
    assert found.ticket.fingerprint == cell.ticket.fingerprint


def test_the_dense_model_has_no_ticket_that_a_topology_could_move() -> None:
    training = replace(QUICK, topology="rigl")
    asked = SparseTrainConfig(model=ModelConfig("test_byobnet"), data=SMALL_DIGITS,
                              training=training)  # fmt: skip
    with pytest.raises(UsageError, match="topology rigl moves the weights of a ticket"):
        check_config(asked)
    check_config(replace(asked, training=replace(training, topology="gmp")))


def test_tickets_and_a_topology_that_begins_dense_do_not_go_together(config) -> None:
    with pytest.raises(UsageError, match="topology ac_dc begins with the dense model"):
        check_config(replace(config, training=replace(QUICK, topology="ac_dc")))


def test_a_static_training_does_not_keep_what_an_earlier_one_moved(
    config, digits: DataSource
) -> None:
    (cell,) = cells(config)
    moved = replace(cell, ticket=cell.ticket.with_card(topology={"method": "rigl"}))
    result = _train(moved, config, digits)
    assert "topology" not in Ticket.load(cell.folder / TRAINED).card
    assert "topology" not in result and "trained_fingerprint" not in result


def test_a_ticket_that_empties_a_layer_is_named(config, tmp_path: Path) -> None:
    (cell,) = cells(config)
    name = next(iter(cell.ticket.masks))
    masks = {**cell.ticket.masks, name: torch.zeros_like(cell.ticket.masks[name])}
    values = {**cell.ticket.values, name: torch.empty(0)}
    Ticket(masks, values, cell.ticket.rest, cell.ticket.card).save(tmp_path / "empty.safetensors")
    with pytest.raises(UsageError, match=f"empties a layer: {name}"):
        list(cells(replace(config, tickets=str(tmp_path / "empty.safetensors"))))


def test_one_pattern_or_a_list_of_them(config) -> None:
    (listed,) = cells(config)
    (single,) = cells(replace(config, tickets=config.tickets[0]))
    assert single.folder == listed.folder


def test_data_that_do_not_fit_the_model_are_named(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    with pytest.raises(UsageError, match="num_classes 10, the data digits 7"):
        _train(cell, config, replace(digits, num_classes=7))


def test_training_changes_survivors_only(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    _train(cell, config, digits)
    state = Ticket.load(cell.folder / TRAINED).dense_state()
    for name, mask in cell.ticket.masks.items():
        assert bool((state[name][~mask] == 0).all())
        assert not torch.equal(state[name][mask], cell.ticket.values[name])


@pytest.fixture()
def pruning(tmp_path: Path) -> SparseTrainConfig:
    """Nothing but what to prune, and how to train it."""
    asked = PruneConfig(
        ModelConfig("test_byobnet"), SMALL_DIGITS, criterion="random", sparsity=0.875, seed=4
    )
    return SparseTrainConfig(prune=asked, training=QUICK, out=str(tmp_path / "trained"))


def test_pruned_at_the_start_and_only_once(pruning, digits: DataSource) -> None:
    (cell,) = cells(pruning)
    by_hand = prune(make_model(seed=4), digits, "random", 0.875, seed=4)
    assert cell.ticket.content_hash == by_hand.content_hash
    assert cell.seed == 4
    assert cell.name.startswith("test_byobnet-random-0.875-")
    (path,) = (Path(pruning.out) / "tickets").iterdir()
    assert path.stem == cell.name
    written = path.stat().st_mtime_ns
    (again,) = cells(pruning)
    assert (again.folder, again.seed, again.data) == (cell.folder, cell.seed, cell.data)
    assert again.ticket.content_hash == cell.ticket.content_hash
    assert path.stat().st_mtime_ns == written


def test_what_is_pruned_is_trained_on_the_same_data_by_default(pruning) -> None:
    (cell,) = cells(pruning)
    assert cell.data == SMALL_DIGITS
    (other,) = cells(replace(pruning, data=DataConfig(train_limit=200)))
    assert other.data == DataConfig(train_limit=200)
    assert other.ticket.content_hash == cell.ticket.content_hash
    assert other.folder != cell.folder


def test_what_is_pruned_makes_another_cell(pruning) -> None:
    (cell,) = cells(pruning)
    (sparser,) = cells(replace(pruning, prune=replace(pruning.prune, sparsity=0.9)))
    assert sparser.folder != cell.folder
    assert len(list((Path(pruning.out) / "tickets").iterdir())) == 2


def test_a_cell_told_to_stop_goes_on(config, digits: DataSource, tmp_path: Path) -> None:
    rich = replace(config, training=replace(QUICK, epochs=2, ema=0.9, mixup=0.2))
    (whole,) = cells(replace(rich, out=str(tmp_path / "whole")))
    expected = _train(whole, rich, digits)
    (cell,) = cells(rich)
    told = Told()
    asked = iter([False] * 3 + [True])
    with pytest.raises(Stopped, match="after step 4"):
        _train(cell, rich, digits, observer=told, stop=lambda: next(asked))
    assert told.seen == ["begin", "epoch 1", "stopped"]
    assert [path.name for path in cell.folder.iterdir()] == ["checkpoint.pt"]
    (cell.folder / ".result.json.123.tmp").write_text("cut")
    result = _train(cell, rich, digits, observer=told)
    assert told.seen[3:] == ["begin", "epoch 2", "end"]
    assert sorted(path.name for path in cell.folder.iterdir()) == [RESULT, SETTINGS, TRAINED]
    found, wanted = (Ticket.load(each.folder / TRAINED) for each in (cell, whole))
    assert found.content_hash == wanted.content_hash
    assert result["test_accuracy"] == expected["test_accuracy"]


class Told:
    """An observer that takes notes."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def begin(self, cell, config, settings) -> None:
        assert settings["config"]["training"]["epochs"] == config.training.epochs
        self.seen.append("begin")

    def epoch(self, cell, epoch) -> None:
        self.seen.append(f"epoch {epoch.epoch}")

    def stopped(self, cell) -> None:
        self.seen.append("stopped")

    def failed(self, cell, reason: str) -> None:
        self.seen.append(reason)

    def end(self, cell, result) -> None:
        self.seen.append("end")


def test_a_training_that_fails_is_told_of(config, digits: DataSource) -> None:
    broken = replace(config, training=replace(QUICK, learning_rate=1e38))
    (cell,) = cells(broken)
    told = Told()
    with pytest.raises(RunFailed, match="loss is"):
        _train(cell, broken, digits, observer=told)
    assert told.seen[0] == "begin"
    assert "loss is" in told.seen[-1]


def test_the_average_is_what_is_kept_and_evaluated(config, digits: DataSource) -> None:
    averaged = replace(config, training=replace(QUICK, ema=0.9))
    (cell,) = cells(averaged)
    steppers: list[PlainStepper] = []

    def make(model, steps: int) -> PlainStepper:
        steppers.append(PlainStepper(model, averaged.training, steps))
        return steppers[0]

    result = train_cell(cell, averaged, digits, make, device="cpu")
    kept = Ticket.load(cell.folder / TRAINED)
    model = make_model(seed=7)
    load_state(model, kept)
    assert evaluate(model, digits, digits.test).accuracy == result["test_accuracy"]
    assert steppers[0].ema is not None
    average = dict(steppers[0].ema.module.named_parameters())
    last = dict(steppers[0].model.named_parameters())
    name = next(each for each in average if each.startswith("stem"))
    assert name.endswith("original")
    key = next(each for each in kept.values if each.startswith("stem"))
    assert torch.equal(kept.values[key], average[name])
    assert not torch.equal(kept.values[key], last[name])


# One process at a time


def test_a_cell_that_another_process_trains_is_left_alone(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    with holder(cell.folder) as process:
        (cell.folder / "checkpoint.pt").write_text("theirs")
        (cell.folder / ".checkpoint.pt.0123.tmp").write_text("theirs")
        with pytest.raises(UsageError, match=f"being worked on by process {process.pid} "):
            _train(cell, config, digits, on_epoch=lambda _: pytest.fail("trained"))
        assert (cell.folder / "checkpoint.pt").read_text() == "theirs"
        assert (cell.folder / ".checkpoint.pt.0123.tmp").read_text() == "theirs"


def test_one_that_waits_finds_the_result_of_the_other(
    config, digits: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "POLL", 0.02)
    (cell,) = cells(config)
    with holder(cell.folder), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            _train, cell, config, digits, wait=True, on_epoch=lambda _: pytest.fail("trained")
        )
        time.sleep(0.3)
        assert not waiting.done()
        write_json(cell.folder / RESULT, {"name": "theirs"})
        assert waiting.result(20) == {"name": "theirs"}


def test_two_that_prune_the_same_do_it_once(pruning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "POLL", 0.02)
    made, real = [], study_cells.prune_as

    def slowly(*given, **more):
        made.append(1)
        time.sleep(0.3)
        return real(*given, **more)

    monkeypatch.setattr(study_cells, "prune_as", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: next(cells(pruning)), range(2))
    assert len(made) == 1
    assert first.ticket.content_hash == second.ticket.content_hash


def test_a_training_whose_folder_was_taken_over_writes_no_result(
    config, digits: DataSource
) -> None:
    (cell,) = cells(config)

    def stolen(_: object) -> None:
        write_json(cell.folder / CLAIM, {"token": "0" * 16, "host": "another"})

    real, locks.BEAT = locks.BEAT, 0.02
    try:
        with pytest.raises(RunFailed, match="taken over by another process"):
            _train(
                cell,
                replace(config, training=replace(QUICK, epochs=200)),
                digits,
                on_epoch=lambda epoch: stolen(epoch) or time.sleep(0.1),
            )
    finally:
        locks.BEAT = real
    assert not cell.done


def test_only_what_is_left_of_its_own_files_is_removed(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    cell.folder.mkdir(parents=True)
    for name in (".result.json.12.tmp", ".mlflow.json.12.tmp", ".claim.json.12.tmp"):
        (cell.folder / name).write_text("")
    _train(cell, config, digits)
    left = sorted(path.name for path in cell.folder.iterdir())
    assert left == [".claim.json.12.tmp", ".mlflow.json.12.tmp", RESULT, SETTINGS, TRAINED]


# Other data, other defaults


def test_a_result_of_other_images_is_not_taken(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    result = _train(cell, config, digits)
    assert result["data_fingerprint"] == digits.fingerprint
    assert isinstance(digits.test, MemorySplit)
    assert result["test_fingerprint"] == digits.test.fingerprint() != digits.fingerprint
    with pytest.raises(UsageError, match=f"{cell.folder} was made from different images"):
        _train(cell, config, replace(digits, fingerprint="another"))


def test_a_ticket_that_was_scored_on_other_images_is_not_taken(
    pruning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for grey in (0, 9):
        write_mnist(tmp_path / str(grey), grey=grey)
    data = DataConfig("mnist", image_size=16)
    by_name = replace(pruning, prune=replace(pruning.prune, data=data))
    monkeypatch.setenv("AUTOSPARSE_DATA", str(tmp_path / "0"))
    (cell,), (again,) = cells(by_name), cells(by_name)
    assert cell.ticket.content_hash == again.ticket.content_hash
    monkeypatch.setenv("AUTOSPARSE_DATA", str(tmp_path / "9"))
    with pytest.raises(UsageError, match=r"tickets/test_byobnet\S+ was made from different images"):
        list(cells(by_name))


def test_what_a_criterion_hangs_on_makes_another_ticket(
    pruning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_autos = replace(pruning, prune=replace(pruning.prune, criterion="autos"))
    paths = [next(cells(by_autos)).folder]
    for seed in (0, 1):  # The same path, another AutoS.
        torch.manual_seed(seed)
        AutoS("context").save(tmp_path / "autos.safetensors")
        asked = replace(by_autos.prune, options={"scorer": str(tmp_path / "autos.safetensors")})
        paths.append(next(cells(replace(by_autos, prune=asked))).folder)
    assert len(set(paths)) == 3
    assert len(list((Path(pruning.out) / "tickets").iterdir())) == 3
    (before,) = cells(pruning)
    monkeypatch.setitem(base.FIRST, "random", {"seed": 99})
    (now,) = cells(pruning)
    assert now.name != before.name


# Said once, checked first


def test_what_is_pruned_is_the_trainings_model_and_data(pruning) -> None:
    assert isinstance(pruning.prune, PruneConfig)
    once = replace(
        pruning, model=pruning.prune.model, data=SMALL_DIGITS,
        prune=PruneConfig(criterion="random", sparsity=0.875, seed=4),
    )  # fmt: skip
    (cell,), (twice,) = cells(once), cells(pruning)
    assert cell.ticket.content_hash == twice.ticket.content_hash
    assert cell.data == SMALL_DIGITS
    assert len(list((Path(pruning.out) / "tickets").iterdir())) == 1


def test_two_models_cannot_be_meant(pruning) -> None:
    with pytest.raises(UsageError, match=r"prune\.model is test_byobnet and model test_vit"):
        list(cells(replace(pruning, model=ModelConfig("test_vit"))))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prune.data.image_size", "32"], "image_size 32, the data digits 16"),
        (["--prune.data.name", "cifar10"], "num_classes|in_chans 3"),
        (["--prune.criterion", "snyp"], "unknown criterion 'snyp'"),
        (["--prune.options", "{rounds: 3}"], "unknown option of snip 'rounds'"),
        (["--prune.sparsity", "1.5"], "sparsity must be"),
        (["--prune.guard", "layers"], "unknown guard"),
        (["--prune.scoring.batches", "0"], "batches must be at least 1"),
        (
            ["--prune.criterion", "autos", "--prune.options", "{scorer: nothing}"],
            "no AutoS file at nothing",
        ),
        (["--training.optimizer", "adamv"], "unknown optimizer"),
        (["--training.optimizer_options", "{momentun: 0.9}"], "optimizer adamw: "),
        (["--training.schedule", "cosin"], "unknown schedule"),
        (["--training.topology", "gmp"], "topology gmp begins with the dense model; leave out"),
        (["--training.precision", "fp16"], "under DeepSpeed only"),
        (["--training.mixup", "0.1", "--training.batch_size", "25"], "even number"),
        (["--training.teacher", "nobody"], "no such file: nobody"),
        (["--model.name", "test_byobnett"], "unknown model 'test_byobnett'"),
        (["--model.exclude", "[nothing]"], "unknown layer to exclude 'nothing'"),
        (["--model.options", "{colour: red}"], "timm cannot build test_byobnet"),
        (["--data.name", "folder", "--data.root", "nowhere"], "nowhere is not a folder"),
        (["--out", "taken"], "taken: it is a file"),
        (["--out", "taken/below"], "taken is not a folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_scored(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    for module, name in ((pruning_module, "score"), (pruning_module.sets, "load"),
                         (loop, "fit")):  # fmt: skip
        monkeypatch.setattr(module, name, never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    command = ["train", "--model.name", "test_byobnet", "--prune.criterion", "snip", "--data.name",
               "digits", "--device", "cpu", "--tracking", "false"]  # fmt: skip
    assert guarded(_main, [*command, *arguments]) == (1 if "--out" in arguments else 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_tickets_that_do_not_fit_the_data_are_told_of_before_the_first_is_trained(config) -> None:
    with pytest.raises(UsageError, match="the model of erk has image_size 16, the data digits"):
        list(cells(replace(config, data=DataConfig(image_size=32))))
