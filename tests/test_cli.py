"""The command line: every mistake is one line that names it, and leaves nothing behind."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from autosparse import cli, config
from autosparse.config import DataConfig, IRPConfig, ModelConfig, PruneConfig, SparseTrainConfig

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
    return cli.guarded(cli._main, list(arguments))


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
        (["prunee"], ["verb 'prunee'", "'prune'"]),
        ([*PRUNE, "--model.name", "resnet1888"], ["model 'resnet1888'", "'resnet18'"]),
        ([*PRUNE, "--data.name", "digit"], ["data set 'digit'", "'digits'"]),
        ([*PRUNE, "--data.name", "folder"], ["data.root"]),
        ([*PRUNE, "--data.name", "folder", "--data.root", "nowhere"], ["nowhere"]),
        (["prune", "--criterion", "snipp"], ["criterion 'snipp'", "'snip'"]),
        (["prune", "--criterion", "snip", "--options.trainin_mode", "1"], ["trainin_mode"]),
        (["prune", "--options.scorer", "nowhere.safetensors"], ["nowhere.safetensors"]),
        ([*PRUNE, "--sparsty", "0.5"], ["'sparsty'", "'sparsity'"]),
        ([*PRUNE, "--model.nam", "x"], ["'model.nam'", "'model.name'"]),
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
        (["inspect"], ["path"]),
        (["inspect", "--all"], ["--all"]),
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
        (["quickstart", "--seeds", "0"], ["seeds", "0"]),
    ],
    ids=lambda value: " ".join(value[-2:]),
)
def test_mistake_is_one_line(arguments, named, capsys):
    refuse(capsys, arguments, *named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sparsty: 0.5", ["sparsty", "'sparsity'"]),
        ("model: {nam: resnet18}", ["nam", "'name'"]),
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
    train = ["train", "--tickets", "[t.safetensors]", *QUICK]
    pets = ["--data.name", "folder", "--data.root", "pets", "--data.image_size", "16"]
    refuse(capsys, [*train, *pets], "num_classes 10", "pets 2")
    refuse(capsys, [*train, "--data.image_size", "8"], "image_size 16", "digits 8")


def test_damaged_ticket_is_named(folder, capsys):
    assert run(*PRUNE, "--out", "t.safetensors") == 0
    whole = (folder / "t.safetensors").read_bytes()
    (folder / "t.safetensors").write_bytes(whole[: len(whole) // 2])
    refuse(capsys, ["train", "--tickets", "[t.safetensors]", *QUICK], "t.safetensors")
    refuse(capsys, ["inspect", "t.safetensors"], "t.safetensors")


def test_loss_that_is_not_finite_names_the_step(capsys):
    arguments = [*DENSE, *QUICK, "--training.learning_rate", "1e30"]
    line = refuse(capsys, arguments, "loss", "learning_rate", code=1)
    # 64 images make 4 steps of 16. The first loss, before any update, is finite.
    assert re.search(r"at step [234] \(epoch 1\)", line)


def test_place_that_cannot_be_written_is_a_failure(folder, capsys):
    (folder / "taken").mkdir()
    refuse(capsys, [*PRUNE, "--out", "taken"], "taken", code=1)


# settings


@pytest.mark.parametrize("verb", [verb for verb, (kind, _) in cli.VERBS.items() if kind])
def test_printed_config_can_be_given_back(verb, folder, capsys):
    kind = getattr(config, cli.VERBS[verb][0])
    given = {
        "quickstart": ["--seeds", "1"],
        "irp": ["--model.name", "resnet18", "--data.root", "x", "--training.clip_grad", "1"],
        "fit": ["--hidden", "[8, 4]", "--learning_rate", "1e-5"],
        "prune": ["--options.rounds", "3", "--model.exclude", "[head, stem]"],
        "compare": ["--criteria", "snip,erk", "--sparsities", "[0.9]", "--seeds", "3"],
        "train": ["--tickets", "[a, b*]", "--data.name", "mnist", "--tracking", "false"],
    }[verb]
    with pytest.raises(SystemExit) as caught:
        run(verb, *given, "--print_config")
    assert caught.value.code == 0
    (folder / "printed.yaml").write_text(capsys.readouterr().out)
    again = cli.parse(kind, ["--config", "printed.yaml"], verb, None)
    assert again == cli.parse(kind, given, verb, None)
    assert again != kind()


def parsed(kind: type, *arguments: str):
    return cli.parse(kind, list(arguments), "autosparse", None)


def test_nothing_given_is_the_default():
    for kind, _ in filter(lambda entry: entry[0], cli.VERBS.values()):
        assert parsed(getattr(config, kind)) == getattr(config, kind)()


def test_later_config_wins_key_by_key(folder):
    (folder / "a.yaml").write_text("sparsity: 0.5\nseed: 1\nmodel: {name: resnet18, exclude: [a]}")
    (folder / "b.yaml").write_text("sparsity: 0.8\nmodel: {name: resnet34}")
    expected = PruneConfig(model=ModelConfig("resnet34", exclude=["a"]), sparsity=0.8, seed=1)
    assert parsed(PruneConfig, "--config", "a.yaml", "--config", "b.yaml") == expected
    backwards = parsed(PruneConfig, "--config", "b.yaml", "--config", "a.yaml")
    assert (backwards.sparsity, backwards.model.name) == (0.5, "resnet18")


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


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*/*.yaml"))
)
def test_configs_of_the_source_tree_parse(path):
    kinds = {"corpus": "CorpusConfig", "scorer": "FitConfig", "train": "SparseTrainConfig"}
    if path.parent.name in kinds:
        kind = getattr(config, kinds[path.parent.name])
        assert parsed(kind, "--config", str(path)) != kind()


# what works


def test_prune_then_inspect(folder, capsys):
    assert run(*PRUNE, "--sparsity", "0.9", "--out", "deep/t.safetensors") == 0
    said = capsys.readouterr()
    assert "deep/t.safetensors" in said.out
    assert "90.00% sparsity" in said.out
    assert said.err == ""
    assert run("inspect", "deep/t.safetensors") == 0
    said = capsys.readouterr().out
    assert "ticket deep/t.safetensors" in said
    assert "criterion: random" in said
    assert sorted(contents(folder)) == ["deep", "deep/t.safetensors"]


@pytest.mark.parametrize("flag", ["-h", "--help", None])
def test_help_lists_the_verbs(flag, capsys):
    assert run(*([flag] if flag else [])) == 0
    said = capsys.readouterr().out
    for verb, (_, description) in cli.VERBS.items():
        assert re.search(rf"^ +{verb} +{re.escape(description)}$", said, flags=re.MULTILINE)


# processes


def call(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from autosparse.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_takes_less_than_a_second():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = call("--help")
        seconds.append(time.perf_counter() - started)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: autosparse VERB" in done.stdout
    assert min(seconds) < 1.0


def test_mistake_ends_the_process_with_code_two():
    done = call("prune", "--sparsty", "0.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("heavy", ["torch", "numpy", "timm", "jsonargparse"])
def test_importing_the_command_line_is_light(heavy):
    program = f"import sys, autosparse.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
