"""The command line: every mistake is one line that names it, and leaves nothing behind."""

import re
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import autosparse
from autosparse.autos import fit
from autosparse.autos.config import FitConfig
from autosparse.cli import main, quickstart
from autosparse.cli.arguments import parse
from autosparse.core.errors import UsageError
from autosparse.core.files import read_json
from autosparse.corpus import store as corpora
from autosparse.criteria import pruning
from autosparse.criteria.config import PruneConfig
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.irp import run as irp
from autosparse.irp.config import CorpusConfig, IRPConfig
from autosparse.models.config import ModelConfig
from autosparse.report import corpus as corpus_report
from autosparse.study import export, local
from autosparse.study.config import SparseTrainConfig
from tests.conftest import flip, holder, quick_irp, tiny_run

ROOT = Path(autosparse.__file__).parent.parent

DENSE = ("train", "--model.name", "test_resnet", "--data.train_limit", "64")
QUICK = ("--tracking", "false", "--training.epochs", "1", "--training.batch_size", "16")
PRUNE = ("prune", "--criterion", "random")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def run(*arguments: str) -> int:
    return main.guarded(main._main, list(arguments))


def refuse(capsys, arguments, *named: str, code: int = 2) -> str:
    """Run what must fail: one line that holds all of `named`, and the folder as it was."""
    before = contents(Path.cwd())
    assert run(*arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    for word in named:
        assert word in line
    assert contents(Path.cwd()) == before
    return line


def two_classes(root: Path) -> None:
    """Write an image folder of two classes, 16 x 16."""
    for place, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (16, 16), 100 * place + number).save(root / name / f"{number}.png")


# mistakes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["prunee"], ["unknown command of autosparse 'prunee'", "'prune'"]),
        ([*PRUNE, "--model.name", "resnet1888"], ["model 'resnet1888'", "'resnet18'"]),
        ([*PRUNE, "--data.name", "digit"], ["data set 'digit'", "'digits'"]),
        ([*PRUNE, "--data.name", "folder"], ["data.root"]),
        ([*PRUNE, "--data.name", "folder", "--data.root", "nowhere"], ["nowhere"]),
        (["prune", "--criterion", "snipp"], ["criterion 'snipp'", "'snip'"]),
        (["prune", "--criterion", "snip", "--options.trainin_mode", "1"], ["trainin_mode"]),
        (["prune", "--options.scorer", "nowhere.safetensors"], ["nowhere.safetensors"]),
        ([*PRUNE, "--sparsty", "0.5"], ["'sparsty'", "'sparsity'"]),
        ([*PRUNE, "--model.nam", "x"], ["'model.nam'", "'model.name'"]),
        ([*PRUNE, "--batches", "3"], ["'batches'", "'scoring.batches'"]),
        (["irp", "--training.epoch", "3"], ["'training.epoch'", "'training.epochs'"]),
        (["train", "--trackin", "false"], ["'trackin'", "'tracking'"]),
        ([*PRUNE, "--sparsity", "half"], ["sparsity", "half"]),
        ([*PRUNE, "--seed", "1.5"], ["seed", "1.5"]),
        ([*PRUNE, "extra"], ["extra"]),
        ([*PRUNE, "--sparsity", "1.0"], ["sparsity", "1.0"]),
        ([*PRUNE, "--sparsity", "-0.1"], ["sparsity", "-0.1"]),
        ([*PRUNE, "--scope", "globl"], ["scope 'globl'", "'global'"]),
        ([*PRUNE, "--device", "gpu0"], ["'gpu0'"]),
        ([*PRUNE, "--model.exclude", "[nothing.like.it]"], ["nothing.like.it"]),
        ([*PRUNE, "--model.options", "{depth_of_it: 3}"], ["depth_of_it"]),
        ([*PRUNE, "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["fit", "--corpus", "nowhere"], ["nowhere"]),
        (["irp", "--label", "magnitud"], ["'magnitud'", "'magnitude'"]),
        (["irp", "--schedule", "linar"], ["'linar'", "'linear'"]),
        (["irp", "--levels", "0"], ["levels", "0"]),
        (["irp", "--final_density", "1.5"], ["final_density", "1.5"]),
        (["inspect"], ["required: path", "autosparse inspect --help"]),
        (["inspect", "--all"], ["'all'"]),
        (["inspect", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["train", *QUICK], ["tickets", "model"]),
        (["train", "--tickets", "[nowhere.safetensors]", *QUICK], ["nowhere.safetensors"]),
        (["train", "--tickets", "[none*.safetensors]", *QUICK], ["none*.safetensors"]),
        ([*DENSE, *QUICK, "--training.optimizer", "adamww"], ["'adamww'", "'adamw'"]),
        ([*DENSE, *QUICK, "--training.schedule", "cosin"], ["'cosin'", "'cosine'"]),
        ([*DENSE, *QUICK, "--training.precision", "bf61"], ["'bf61'", "'bf16'"]),
        ([*DENSE, *QUICK, "--training.optimizer_options", "{momentu: 1}"], ["momentu"]),
        ([*DENSE, *QUICK, "--training.batch_size", "65"], ["batch_size 65", "64 images"]),
        ([*DENSE, *QUICK, "--training.batch_size", "0"], ["batch_size"]),
        ([*DENSE, *QUICK, "--training.epochs", "0"], ["epochs"]),
        ([*DENSE, *QUICK, "--training.mixup", "-1"], ["training.mixup", "-1"]),
        ([*DENSE, *QUICK, "--training.cutmix", "-1"], ["training.cutmix", "-1"]),
        ([*DENSE, "--training.batch_size", "15", "--training.mixup", "1"], ["mixup", "even", "15"]),
        ([*DENSE, *QUICK, "--training.ema", "1"], ["training.ema", "below 1"]),
        ([*DENSE, *QUICK, "--training.teacher", "nobody.safetensors"], ["nobody.safetensors"]),
        ([*DENSE, *QUICK, "--training.distill_weight", "2"], ["training.distill_weight", "2"]),
        ([*DENSE, *QUICK, "--training.temperature", "0"], ["training.temperature", "0"]),
        ([*DENSE, *QUICK, "--training.precision", "fp16"], ["fp16", "bf16"]),
        ([*DENSE, *QUICK, "--training.checkpoint_steps", "-1"], ["training.checkpoint_steps"]),
        ([*DENSE, *QUICK, "--training.mix_up", "1"], ["'training.mix_up'", "'training.mixup'"]),
        (["train", *QUICK, "--prune.criterion", "snipp"], ["criterion 'snipp'", "'snip'"]),
        (["train", *QUICK, "--prune.sparsty", "0.5"], ["'prune.sparsty'", "'prune.sparsity'"]),
        (["train", *QUICK, "--prune.criterion", "random", "--prune.sparsity", "1"], ["sparsity"]),
        (["quickstart", "--seeds", "0"], ["seeds", "0"]),
    ],
    ids=lambda value: " ".join(value[-2:]),
)
def test_mistake_is_one_line(arguments, named, capsys):
    refuse(capsys, arguments, *named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sparsty: 0.5", ["settings.yaml", "'sparsty'", "'sparsity'"]),
        ("1: 0.5", ["settings.yaml", "'1'"]),
        ("model: {nam: resnet18}", ["settings.yaml", "'model.nam'", "'model.name'"]),
        ("model.nam: resnet18", ["'model.nam'", "'model.name'"]),
        ("sparsity: half", ["sparsity", "half"]),
        ("data: {workers: many}", ["workers", "many"]),
        ("sparsity: 1.0", ["sparsity", "1.0"]),
        ("model: {name: resnet1888}", ["'resnet1888'", "'resnet18'"]),
        ("model: [", ["settings.yaml"]),
        ("just words", ["settings.yaml"]),
    ],
)
def test_mistake_in_a_file_is_one_line(text, named, folder, capsys):
    (folder / "settings.yaml").write_text(text)
    refuse(capsys, [*PRUNE, "--config", "settings.yaml"], *named)


def test_config_that_is_no_text_is_named(folder, capsys):
    (folder / "settings.yaml").write_bytes(b"\xd0\xff\x00")
    refuse(capsys, [*PRUNE, "--config", "settings.yaml"], "settings.yaml")


@pytest.mark.parametrize("key", ["optimizer", "schedule"])
def test_irp_that_cannot_train_leaves_no_run_behind(key, capsys):
    refuse(capsys, ["irp", f"--training.{key}", "nonsense"], f"{key} 'nonsense'")


def test_missing_ticket_leaves_no_tracking_database(capsys):
    refuse(capsys, ["train", "--tickets", "[nowhere.safetensors]"], "nowhere.safetensors")


@pytest.mark.parametrize("verb", [["fit", "--corpus"], ["inspect"]])
@pytest.mark.parametrize("unfinished", [False, True])
def test_corpus_without_finished_runs(verb, unfinished, folder, capsys):
    (folder / "runs").mkdir()
    if unfinished:
        (folder / "runs" / "0123456789ab").mkdir()
        (folder / "runs" / "0123456789ab" / "card.json").write_text("{}")
    refuse(capsys, [*verb, "runs"], "runs", "no finished run")


def test_inspect_names_what_is_no_file_of_ours(folder, capsys):
    (folder / "notes.txt").write_text("just some words")
    save_file({"weight": torch.zeros(2)}, folder / "foreign.safetensors")
    for name in ("notes.txt", "foreign.safetensors"):
        refuse(capsys, ["inspect", name], name)


def test_ticket_for_another_data_set(folder, capsys):
    two_classes(folder / "pets")
    assert run(*PRUNE, "--out", "t.safetensors") == 0
    capsys.readouterr()  # What prune said.
    train = ["train", "--tickets", "[t.safetensors]", *QUICK]
    pets = ["--data.name", "folder", "--data.root", "pets", "--data.image_size", "16"]
    refuse(capsys, [*train, *pets], "in_chans 1", "pets 3")
    refuse(capsys, [*train, "--data.image_size", "8"], "image_size 16", "digits 8")


def test_damaged_ticket_is_named(folder, capsys):
    assert run(*PRUNE, "--out", "t.safetensors") == 0
    capsys.readouterr()  # What prune said.
    whole = (folder / "t.safetensors").read_bytes()
    (folder / "t.safetensors").write_bytes(whole[: len(whole) // 2])
    refuse(capsys, ["train", "--tickets", "[t.safetensors]", *QUICK], "t.safetensors")
    refuse(capsys, ["inspect", "t.safetensors"], "t.safetensors")


def test_loss_that_is_not_finite_names_the_step(capsys):
    arguments = [*DENSE, *QUICK, "--training.learning_rate", "1e30"]
    before = contents(Path.cwd())
    assert run(*arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]  # After that of the progress.
    assert line.startswith("error: the loss is")
    assert "learning_rate" in line
    assert contents(Path.cwd()) == before
    # 64 images make 4 steps of 16. The first loss, before any update, is finite.
    assert re.search(r"at step [234] \(epoch 1\)", line)


@pytest.mark.parametrize(
    "arguments",
    [
        [*PRUNE, "--out", "folder"],
        ["fit", "--corpus", "folder", "--out", "folder"],
        ["irp", "--ticket", "folder"],
        ["irp", "--out", "file"],
        ["compare", "--tracking", "false", "--out", "file"],
        ["quickstart", "--out", "file"],
    ],
    ids=" ".join,
)
def test_a_place_that_cannot_be_written_is_told_before_work_begins(
    arguments, folder, capsys, monkeypatch
):
    for module, name in ((pruning, "prune_as"), (fit, "fit"), (irp, "run_irp"), (local, "run"),
                         (quickstart, "_run")):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work has begun"))
    (folder / "folder").mkdir()
    (folder / "file").write_text("")
    refuse(capsys, arguments, arguments[-1], code=1)


def test_a_ticket_is_exported_to_local_places_only(capsys, monkeypatch):
    monkeypatch.setattr(export, "trained_ticket", lambda _: pytest.fail("work has begun"))
    given = ["export", "--ticket", "here", "--out", "memory://x/model.onnx"]
    refuse(capsys, given, "memory://x/model.onnx is a URL; a local folder is needed")


@pytest.mark.parametrize("key", ["--model.name test_resnett", "--model.exclude [nothing]",
                                 "--model.options {colour:3}", "--device gpu"])  # fmt: skip
@pytest.mark.parametrize(
    "verb", [["prune"], ["irp"], ["compare", "--tracking", "false"]], ids=" ".join
)
def test_mistakes_are_told_before_data_are_loaded(verb, key, capsys, monkeypatch):
    monkeypatch.setattr(sets, "load", lambda *_: pytest.fail("work has begun"))
    given = [*verb, "--model.name", "test_resnet", *key.split()]
    refuse(capsys, given, key.split()[1].strip("[{}]").partition(":")[0])


def test_a_second_quickstart_in_the_folder_is_told_of_the_first(folder, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "_run", lambda *_: pytest.fail("work has begun"))
    with holder(folder / "out") as process:
        refuse(capsys, ["quickstart", "--out", "out"], f"worked on by process {process.pid}")


# settings


@pytest.mark.parametrize("verb", [name for name, verb in main.VERBS.items() if verb.settings])
def test_printed_config_can_be_given_back(verb, folder, capsys):
    kind = main.settings_class(str(main.VERBS[verb].settings))
    given = {
        "quickstart": ["--seeds", "1"],
        "irp": ["--model.name", "resnet18", "--data.root", "x", "--training.clip_grad", "1"],
        "fit": ["--hidden", "[8, 4]", "--learning_rate", "1e-5"],
        "prune": ["--options.rounds", "3", "--model.exclude", "[head, stem]"],
        "compare": ["--criteria", "snip,erk", "--sparsities", "[0.9]", "--seeds", "3"],
        "export": ["--ticket", "x", "--format", "onnx"],
        "measure": ["--batches", "[2]", "--runs", "3"],
        "train": ["--tickets", "[a, b*]", "--data.name", "mnist", "--tracking", "false"],
    }[verb]
    with pytest.raises(SystemExit) as caught:
        run(verb, *main.VERBS[verb].paths, *given, "--print_config")
    assert caught.value.code == 0
    (folder / "printed.yaml").write_text(capsys.readouterr().out)
    again = parse(kind, ["--config", "printed.yaml"], verb, None)
    assert again == parse(kind, given, verb, None)
    assert again != kind()


def parsed(kind: type, *arguments: str):
    return parse(kind, list(arguments), "autosparse", None)


def test_nothing_given_is_the_default():
    for verb in main.VERBS.values():
        if verb.settings:
            kind = main.settings_class(verb.settings)
            assert parsed(kind) == kind()


def test_later_config_wins_key_by_key(folder):
    (folder / "a.yaml").write_text("sparsity: 0.5\nseed: 1\nmodel: {name: resnet18, exclude: [a]}")
    (folder / "b.yaml").write_text("sparsity: 0.8\nmodel: {name: resnet34}")
    expected = PruneConfig(model=ModelConfig("resnet34", exclude=["a"]), sparsity=0.8, seed=1)
    assert parsed(PruneConfig, "--config", "a.yaml", "--config", "b.yaml") == expected
    backwards = parsed(PruneConfig, "--config", "b.yaml", "--config", "a.yaml")
    assert (backwards.sparsity, backwards.model.name) == (0.5, "resnet18")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--dry-run"], (True, 1)),
        (["--dry_run"], (True, 1)),
        (["--dry-run", "--cpus-per-run", "2"], (True, 2)),
        (["--dry-run=false", "--cpus-per-run=0.5"], (False, 0.5)),
        (["--cpus_per_run", "3", "--dry-run", "false"], (False, 3)),
    ],
)
def test_options_as_people_write_them(given, expected):
    found = parsed(CorpusConfig, *given)
    assert (found.dry_run, found.cpus_per_run) == expected


def test_bare_options_of_inner_settings():
    found = parsed(SparseTrainConfig, "--training.channels-last", "--training.ema", "0.9")
    assert (found.training.channels_last, found.training.ema) == (True, 0.9)


def test_a_setting_that_is_no_yes_or_no_needs_a_value():
    with pytest.raises(UsageError):
        parsed(PruneConfig, "--sparsity", "--seed", "1")


@pytest.mark.parametrize("word", ["no", "Yes", "on", "OFF", "y"])
@pytest.mark.parametrize("equals", [True, False])
def test_settings_of_any_type_take_a_word_for_a_word(word, equals):
    """A scorer's folder may be called no; YAML 1.1 takes that for false."""
    given = ["--options.scorer", word]
    found = parsed(PruneConfig, *(["=".join(given)] if equals else given), "--options.gate", "true")
    assert found.options == {"scorer": word, "gate": True}
    assert parsed(PruneConfig, "--model.options.name", word).model.options == {"name": word}


def test_flags_and_configs_are_taken_in_their_order(folder):
    (folder / "a.yaml").write_text("sparsity: 0.5")
    after = parsed(PruneConfig, "--config", "a.yaml", "--sparsity", "0.9")
    before = parsed(PruneConfig, "--sparsity", "0.9", "--config", "a.yaml")
    assert (after.sparsity, before.sparsity) == (0.9, 0.5)


def test_nested_settings_are_dataclasses():
    found = parsed(IRPConfig, "--data.name", "mnist", "--training.optimizer_options", "{a: 1}")
    assert found.data == DataConfig("mnist")
    assert found.training.optimizer_options == {"a": 1}
    given = parsed(SparseTrainConfig, "--model.name", "resnet18", "--seed", "3")
    assert (given.model, given.data, given.seed) == (ModelConfig("resnet18"), None, 3)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.yaml")))
def test_configs_of_the_source_tree_parse(path):
    kinds = {"corpus": CorpusConfig, "scorer": FitConfig, "train": SparseTrainConfig}
    if path.parent.name in kinds:
        kind = kinds[path.parent.name]
        assert parsed(kind, "--config", str(path)) != kind()


# what works


def test_prune_then_inspect(folder, capsys):
    assert run(*PRUNE, "--sparsity", "0.9", "--out", "deep/t.safetensors") == 0
    said = capsys.readouterr()
    assert "deep/t.safetensors" in said.out
    assert "90.00% sparsity" in said.out
    assert said.err == "next: autosparse train --tickets deep/t.safetensors\n"
    assert run("inspect", "deep/t.safetensors") == 0
    said = capsys.readouterr().out
    assert "ticket deep/t.safetensors" in said
    assert "criterion: random" in said
    assert sorted(contents(folder)) == ["deep", "deep/t.safetensors"]


@pytest.mark.parametrize("flag", ["-h", "--help", None])
def test_help_lists_the_verbs(flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(*([flag] if flag else [])) == 0
    said = capsys.readouterr().out
    for name, verb in main.VERBS.items():
        assert re.search(rf"^ +{name}\s+{re.escape(verb.does)}$", said, flags=re.MULTILINE)


# autosparse corpus


@pytest.fixture()
def grown(folder) -> Path:
    """A corpus of two finished runs, made by hand."""
    for name in ("run1", "run2"):
        corpora.write_run(folder / "grown" / name, tiny_run(name))
    return folder / "grown"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["lss", "grown"], ["unknown command of autosparse corpus 'lss'", "'ls'"]),
        (["grown"], ["command of autosparse corpus 'grown'", "verify"]),
        (["ls"], ["required: path", "`autosparse corpus ls --help`"]),
        (["ls", "grown", "grown"], ["unrecognized arguments: grown"]),
        (["merge", "grown"], ["required: into"]),
        (["ls", "nowhere"], ["no corpus at nowhere"]),
        (["verify", "nowhere"], ["no corpus at nowhere"]),
        (["index", "nowhere"], ["no corpus at nowhere"]),
        (["report", "nowhere"], ["no corpus at nowhere"]),
        (["merge", "grown", "nowhere", "all"], ["no corpus at nowhere"]),
        (["ls", "s4://bucket/corpus"], ["cannot open s4://bucket/corpus"]),
        (["ls", "--all", "grown"], ["'all'"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_mistake_with_a_corpus_is_one_line(arguments, named, grown, capsys):
    refuse(capsys, ["corpus", *arguments], *named)


def test_group_without_a_command(grown, capsys):
    refuse(capsys, ["corpus"], "autosparse corpus needs one of ls, verify")


@pytest.mark.parametrize("group", [name for name, verb in main.VERBS.items() if verb.actions])
def test_help_of_a_group_and_of_its_commands(group, capsys):
    """What a command takes, it also says."""
    assert run(group, "--help") == 0
    said = capsys.readouterr().out
    for name, action in main.VERBS[group].actions.items():
        assert re.search(rf"^ +{name}\s+{action.does.split()[0]}", said, flags=re.MULTILINE)
        with pytest.raises(SystemExit) as caught:
            run(group, name, "--help")
        assert caught.value.code == 0
        usage, _, rest = capsys.readouterr().out.partition("\n\n")
        assert usage.startswith(f"usage: autosparse {group} {name}")
        assert all(path.upper() in usage for path in action.paths) and action.does in rest


def test_every_command_has_its_function():
    for verb in main.VERBS.values():
        for each in verb.actions.values() or (verb,):
            module, _, function = each.function.rpartition(".")
            assert callable(getattr(import_module(f"autosparse.cli.{module}"), function))


def test_corpus_ls_lists_finished_runs(grown, capsys):
    (grown / "run3").mkdir()
    before = contents(grown)
    assert run("corpus", "ls", "grown") == 0
    said = capsys.readouterr()
    assert said.err == "next: autosparse inspect grown/RUN\n"
    assert "2 finished runs in grown" in said.out
    assert "run1" in said.out and "run2" in said.out and "run3" not in said.out
    assert "70.0% at 50.0%" in said.out
    assert contents(grown) == before


def test_corpus_index_is_made_anew(grown, capsys):
    (grown / "index.parquet").write_bytes(b"")
    assert run("corpus", "ls", "grown") == 0
    said = capsys.readouterr()
    assert "2 finished runs in grown" in said.out
    assert len(said.err.splitlines()) == 2
    assert run("corpus", "index", "grown") == 0
    assert "index of 2 runs: grown/index.parquet" in capsys.readouterr().out
    assert run("corpus", "ls", "grown") == 0
    assert capsys.readouterr().err == "next: autosparse inspect grown/RUN\n"


def test_corpus_verify_says_that_all_is_well(grown, capsys):
    (grown / "run2" / "finished.json").unlink()
    before = contents(grown)
    assert run("corpus", "verify", "grown") == 0
    said = capsys.readouterr()
    assert said.err == "next: autosparse fit --corpus grown\n"
    assert said.out == "1 finished runs in grown: every byte is what was written; 1 unfinished\n"
    assert contents(grown) == before


def flipped_tensor(path: Path) -> None:
    flip(path, -1)  # safetensors puts the uint8 tensors last, by name.


def flipped_header(path: Path) -> None:
    flip(path, path.read_bytes().index(b"magnitude"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flipped_tensor, "run run2: run.safetensors: parameter b.weight (survival) is not"),
        (flipped_header, "run run2: run.safetensors: its header"),
        (cut, "run run2: run.safetensors: grown/run2/run.safetensors is damaged"),
        (Path.unlink, "run run2: run.safetensors: no such file"),
    ],
)
def test_corpus_verify_names_what_is_damaged(damage, named, grown, capsys):
    damage(grown / "run2" / "run.safetensors")
    before = contents(grown)
    assert run("corpus", "verify", "grown") == 1
    said = capsys.readouterr()
    (line,) = said.out.splitlines()
    assert line.startswith(named)
    (line,) = said.err.splitlines()
    assert line.startswith("error: 1 of 2 runs in grown are damaged: ")
    assert contents(grown) == before


def test_corpus_merge(grown, folder, capsys):
    assert run("corpus", "merge", "grown", "all") == 0
    assert capsys.readouterr().out.splitlines()[0] == "2 runs copied to all, 0 were there already"
    assert run("corpus", "merge", "grown", "all", "all") == 0
    assert capsys.readouterr().out.splitlines()[0] == "0 runs copied to all, 4 were there already"
    flip(grown / "run1" / "run.safetensors", -1)
    assert run("corpus", "merge", "grown", "more") == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: 1 runs copied; run run1: run.safetensors: parameter b.weight")
    assert sorted(path.name for path in (folder / "more").iterdir()) == ["index.parquet", "run2"]


def test_a_corpus_report_reads_runs_of_one_kind_once_beside_the_map(folder, monkeypatch):
    for seed in (0, 1):
        irp.run_irp(quick_irp("grown", levels=1, seed=seed))
    read, asked = corpora.Corpus.read, []
    monkeypatch.setattr(corpora.Corpus, "read", lambda *a: (asked.append(a[1]), read(*a))[1])

    def no_data(_: object) -> None:
        raise UsageError("no data")

    monkeypatch.setattr(corpus_report, "initial_gradients", no_data)
    figures = corpus_report.write_report("grown")
    assert len([path for path in figures if path.name.startswith("layers-")]) == 1
    assert len(asked) == 2, "once for the densities; the map stops at its first run"


def test_data_of_tickets_that_are_trained_one_by_one_are_loaded_once(folder, monkeypatch):
    data, given = DataConfig(train_limit=300), []
    planned = [SimpleNamespace(data=data, done=False, name=name) for name in "ab"]
    monkeypatch.setattr("autosparse.study.cells.cells", lambda *_, **__: planned)
    monkeypatch.setattr("autosparse.study.cells.check_config", lambda *_: None)
    monkeypatch.setattr("autosparse.study.table.show_trainings", lambda _: None)
    monkeypatch.setattr("autosparse.study.trainings.train_cell",
                        lambda cell, config, source, *_, **__: given.append(source))  # fmt: skip
    assert run("train", "--tracking", "false", "--tickets", "x", "--device", "cpu") == 0
    first, second = given
    assert first.train.images is second.train.images


def test_corpus_report_draws_figures(folder, capsys):
    irp.run_irp(quick_irp("grown", levels=1))
    assert run("corpus", "report", "grown") == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "next: autosparse fit --corpus grown"
    figures = [Path(line) for line in said.out.splitlines()]
    assert {path.name for path in figures} >= {"levels.png", "survival.png"}
    for path in figures:
        assert path.parent == Path("grown/report")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert run("corpus", "verify", "grown") == 0


def test_irp_writes_to_a_url_and_inspect_reads_it(remote, folder, monkeypatch, capsys):
    monkeypatch.setattr("autosparse.core.locks.SETTLE", 0.01)
    given = ["--model.name", "test_byobnet", "--data.train_limit", "300", "--levels", "1",
             "--training.epochs", "1", "--training.batch_size", "100",
             "--store_initial", "false", "--ticket", "t.safetensors"]  # fmt: skip
    assert run("irp", *given, "--out", str(remote)) == 0
    assert contents(folder).keys() == {"t.safetensors"}
    (name,) = [path.name for path in remote.iterdir()]
    assert read_json(remote / name / "finished.json")["row"]["run_id"] == name
    capsys.readouterr()
    for arguments in (["corpus", "ls", str(remote)], ["inspect", str(remote)]):
        assert run(*arguments) == 0
        assert name in capsys.readouterr().out
    assert run("corpus", "verify", str(remote)) == 0
    assert run("inspect", str(remote / name)) == 0
    assert f"run_id {name}" in capsys.readouterr().out


# processes


def call(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from autosparse.cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_takes_less_than_a_third_of_a_second():
    """Of a processor: on a busy machine the clock says something else."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = call("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: autosparse" in done.stdout
    assert min(seconds) < 0.3


def test_mistake_ends_the_process_with_code_two():
    done = call("prune", "--sparsty", "0.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("heavy", ["torch", "numpy", "timm", "jsonargparse"])
def test_importing_the_command_line_is_light(heavy):
    program = f"import sys, autosparse.cli.main; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
