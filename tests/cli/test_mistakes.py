"""The commonest mistakes, forty and more: one line each, with what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosparse.cli import main
from autosparse.cli.arguments import parse, spelt_out
from autosparse.criteria.config import PruneConfig
from autosparse.irp.config import CorpusConfig
from autosparse.study.config import ExportConfig

TRAIN = "train --model.name test_resnet --tracking false"
MISTAKES = [
    # names
    ("prunee", "'prunee'", "'prune'"),
    ("prune --sparsty 0.9", "sparsty", "'sparsity'"),
    ("prune --model.nam resnet18", "model.nam", "'model.name'"),
    ("prune --model.name resnet5", "'resnet5'", "'resnet50'"),
    ("prune --data.name cifar", "'cifar'", "'cifar10'"),
    ("prune --criterion snipp", "'snipp'", "'snip'"),
    ("prune --criterion SNIP", "'SNIP'", "'snip'"),
    ("prune --scope globally", "'globally'", "'global'"),
    ("prune --criterion random --guard channels", "'channels'", "'channel'"),
    ("prune --criterion snip --allocation er", "'er'", "'erk'"),
    ("prune --device gpu", "'gpu'", "cuda"),
    (f"{TRAIN} --training.optimizer adamv", "'adamv'", "'adam'"),
    (f"{TRAIN} --training.precision fp8", "'fp8'", "bf16"),
    (f"{TRAIN} --training.schedule cosin", "'cosin'", "'cosine'"),
    ("fit --head survial", "'survial'", "'survival'"),
    ("fit --features contxt", "'contxt'", "'context'"),
    ("irp --label magnitud", "'magnitud'", "'magnitude'"),
    ("irp --schedule linar", "'linar'", "'linear'"),
    ("compare --criteria snip,erkk --tracking false", "'erkk'", "'erk'"),
    ("compare --twins [shuffle] --tracking false", "'shuffle'", "'shuffled'"),
    ("corpus lst empty", "'lst'", "ls"),
    ("registry promot x", "'promot'", "'promote'"),
    (f"{TRAIN} --epochs 3", "'epochs'", "'training.epochs'"),
    (f"{TRAIN} --training.lr 0.1", "'training.lr'", "'training.learning_rate'"),
    (f"{TRAIN} --lr 0.1", "'lr'", "'training.learning_rate'"),
    (f"{TRAIN} --training.wd 0.1", "'training.wd'", "'training.weight_decay'"),
    ("irp --batch-size 12", "'batch_size'", "'training.batch_size'"),
    ("prune --output here", "'output'", "'out'"),
    ("prune -o here", "'o'", "'out'"),
    ("prune --arch resnet18", "'arch'", "'model.name'"),
    ("prune --dataset cifar10", "'dataset'", "'data.name'"),
    ("prune resnet18", "'resnet18'", "prune --model.name resnet18"),
    ("fit corpus", "'corpus'", "fit --corpus corpus"),
    ("train first.safetensors", "'first.safetensors'", "train --tickets first.safetensors"),
    ("export trained/one", "'trained/one'", "export --ticket trained/one"),
    # groups of settings
    ("prune --model resnet18", "--model is a group", "--model.name resnet18"),
    (f"{TRAIN} --model resnet18", "--model is a group", "--model.name resnet18"),
    ("prune --data=cifar10", "--data is a group", "--data.name cifar10"),
    (f"{TRAIN} --training 3", "--training is a group", "--training.KEY 3"),
    ("compare --models test_resnet --tracking false", "models", "[{name: test_resnet}]"),
    # values
    ("prune --sparsity 90", "got 90", "90 % is 0.9"),
    ("prune --sparsity 1.0", "sparsity", "below 1"),
    ("prune --sparsity -0.1", "sparsity", "at least 0"),
    ("prune --sparsity 95%", "got '95%'", "95 % is 0.95"),
    ("prune --sparsity high", "got 'high'", "a number"),
    ("compare --sparsities 95% --tracking false", "95%:", "such as 0.9,0.95"),
    (f"{TRAIN} --training.epochs three", "got 'three'", "a whole number"),
    (f"{TRAIN} --training.epochs 3.5", "got '3.5'", "a whole number"),
    (f"{TRAIN} --training.compile maybe", "got 'maybe'", "true or false"),
    ("prune --criterion snip --options.round 3", "'round'", "none"),
    ("prune --criterion iter_snip --options.round 3", "'round'", "'rounds'"),
    ("prune --criterion random --pattern 2to4", "2to4", "2:4"),
    (f"{TRAIN} --training.epochs 0", "training.epochs", "at least 1"),
    (f"{TRAIN} --training.batch_size 0", "training.batch_size", "at least 1"),
    ("irp --levels 0", "levels", "at most 255"),
    ("irp --final_density 2", "final_density", "below 1"),
    ("fit --epochs 0", "epochs", "at least 1"),
    ("fit --holdout 1", "holdout", "below 1"),
    ("fit --hidden [8,0]", "hidden", "at least 1"),
    ("quickstart --seeds 0", "seeds", "at least 1"),
    # files and folders
    ("prune --data.name folder", "data.root", "folder to read"),
    ("prune --data.name folder --data.root nowhere", "data.root nowhere", "folder"),
    ("prune --data.name shards --data.root empty", "manifest", "autosparse shards"),
    ("prune --options.scorer nowhere.safetensors", "nowhere.safetensors", "autosparse fit"),
    ("prune --config nowhere.yaml", "nowhere.yaml", "No such file"),
    ("prune --config notes.yaml", "notes.yaml", "key: value"),
    ("train --tracking false", "tickets", "--model.name"),
    (f"{TRAIN} --out memory://x", "memory://x is a URL", "a local folder is needed"),
    ("shards pack empty memory://x", "memory://x is a URL", "a local folder is needed"),
    ("quickstart --out memory://x", "memory://x is a URL", "a local folder is needed"),
    ("export --ticket empty", "empty", "not finished"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.yaml").write_text("hello")
    return tmp_path


def test_there_are_forty() -> None:
    assert len({command for command, *_ in MISTAKES}) >= 40


@pytest.mark.parametrize(("command", "wrong", "right"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_with_the_remedy(
    command: str, wrong: str, right: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    before = sorted(folder.rglob("*"))
    assert main.guarded(main._main, command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert wrong in line
    assert right in line.replace(wrong, "", 1) or right == wrong
    assert sorted(folder.rglob("*")) == before


def test_a_file_named_like_a_setting_is_no_setting() -> None:
    """Cut after two letters, e.slim reads slim, which is true or false."""
    found = spelt_out(ExportConfig, ["--slim", "--out", "e.slim"])
    assert found == ["--slim", "true", "--out", "e.slim"]


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (["--seeds", "0"], ["--seeds", "[0]"]),
        (["--seeds=0,1"], ["--seeds=[0,1]"]),
        (["--seeds", "[2]"], ["--seeds", "[2]"]),
        (["--labels", "lamp, snip"], ["--labels", '["lamp", "snip"]']),
        (["--tracking", "--levels", "3"], ["--tracking", "true", "--levels", "3"]),
    ],
)
def test_a_list_may_be_written_without_brackets(given: list[str], understood: list[str]) -> None:
    assert spelt_out(CorpusConfig, given) == understood


def test_patterns_are_no_yaml() -> None:
    config = parse(PruneConfig, ["--model.exclude", "*.conv,head"], "prune", None)
    assert config.model.exclude == ["*.conv", "head"]


def test_a_group_may_be_a_file_or_a_mapping(folder: Path) -> None:
    (folder / "model.yaml").write_text("name: resnet18")
    for value in ("model.yaml", "{name: resnet18}"):
        assert spelt_out(PruneConfig, ["--model", value]) == ["--model", value]
