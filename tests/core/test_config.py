"""Configs: names of runs, exact counts, and a help text for every setting."""

import ast
import dataclasses
import inspect
import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from autosparse import criteria
from autosparse.cli import main
from autosparse.cli.arguments import parse
from autosparse.core import config
from autosparse.core.config import from_plain, identity, plain, run_id
from autosparse.core.errors import UsageError
from autosparse.criteria import base
from autosparse.criteria.config import PruneConfig
from autosparse.data.config import DataConfig
from autosparse.irp.config import SCHEDULE_KEYS, CorpusConfig, IRPConfig
from autosparse.models.config import ModelConfig
from autosparse.sparsity.counts import check_sparsity, keep_count, keep_density
from autosparse.study.config import SparseTrainConfig
from autosparse.training.config import TrainingConfig

EMPTY = inspect.Parameter.empty
PACKAGE = Path(config.__file__).parent.parent
CONFIGS = [
    kind
    for path in sorted(PACKAGE.glob("*/config.py"))
    for module in [import_module(f"autosparse.{path.parent.name}.config")]
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]
"""Every class of settings of every package."""
CHANGED = IRPConfig(
    model=ModelConfig("resnet18", exclude=["head"]),
    data=DataConfig("mnist", root="/data/pets", image_size=32),
    training=TrainingConfig(epochs=3, optimizer="sgd", optimizer_options={"momentum": 0.9}),
    label="snip",
    seed=7,
)


# run_id


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (IRPConfig(), "18e5bea255e4"),
        (CHANGED, "54857d538c60"),
        (SparseTrainConfig(), "1b42c57545d4"),
        (SparseTrainConfig(data=DataConfig("cifar10"), seed=3), "f8118e67d2c6"),
    ],
    ids=["IRP", "changed IRP", "training", "changed training"],
)
def test_run_id_is_pinned(given, name):
    """Finished work is found by this name: it must not change from version to version."""
    assert run_id(given) == name


def test_identity_is_what_differs_from_the_defaults():
    assert identity(IRPConfig()) == {}
    assert identity(CHANGED) == {
        "model": {"name": "resnet18", "exclude": ["head"]},
        "data": {"name": "mnist", "image_size": 32},
        "training": {"epochs": 3, "optimizer": "sgd", "optimizer_options": {"momentum": 0.9}},
        "label": "snip",
        "seed": 7,
    }


def test_defaults_given_explicitly_are_defaults():
    explicit = IRPConfig(
        model=ModelConfig(name="test_resnet", options={}, exclude=[]),
        data=DataConfig(name="digits", root=None, validation_fraction=0.15),
        training=TrainingConfig(epochs=20, learning_rate=0.003),
        levels=6,
        final_density=0.02,
    )
    assert run_id(explicit) == run_id(IRPConfig())


@pytest.mark.parametrize(
    "changed",
    [
        IRPConfig(out="/elsewhere"),
        IRPConfig(device="cuda:1"),
        IRPConfig(store_initial=False),
        IRPConfig(ticket="t.safetensors"),
        IRPConfig(data=DataConfig(workers=7)),
        IRPConfig(data=DataConfig(memory_limit_gb=0.5)),
        IRPConfig(data=DataConfig(root="/data/digits")),
        IRPConfig(data=DataConfig(root="/nowhere", cache="/elsewhere")),
        IRPConfig(training=TrainingConfig(checkpoint_epochs=1, checkpoint_steps=7)),
    ],
)
def test_local_fields_do_not_change_the_run(changed):
    assert run_id(changed) == run_id(IRPConfig())


def test_every_other_field_changes_the_run():
    changed = [
        replace(IRPConfig(), **{name: value})
        for name, value in {
            "model": ModelConfig("resnet18"),
            "data": DataConfig("cifar10"),
            "training": TrainingConfig(epochs=1),
            "label": "snip",
            "levels": 5,
            "final_density": 0.1,
            "schedule": "linear",
            "scope": "layer",
            "samples_per_class": 3,
            "rewind_steps": 2,
            "steps_per_level": 50,
            "live": True,
            "seed": 1,
        }.items()
    ]
    local = {"out", "device", "ticket", "store_initial"}
    assert len(changed) == len({spec.name for spec in dataclasses.fields(IRPConfig)} - local)
    assert len({run_id(each) for each in [IRPConfig(), *changed]}) == len(changed) + 1


def test_every_setting_of_training_changes_the_run():
    changed = {
        "epochs": 1, "batch_size": 7, "optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 1.0,
        "optimizer_options": {"eps": 1.0}, "schedule": "none", "warmup_epochs": 2.0,
        "clip_grad": 1.0, "label_smoothing": 0.1, "mixup": 0.1, "cutmix": 0.1, "ema": 0.9,
        "teacher": "t.safetensors", "distill_weight": 0.1, "temperature": 2.0,
        "precision": "bf16", "channels_last": True, "compile": True, "grad_checkpointing": True,
        "rescatter": True, "sparse_products": False, "bias_rate": 64.0, "slim": True,
        "topology": "rigl", "topology_every": 7, "topology_fraction": 0.1, "topology_until": 0.5,
        "topology_grow_from": "random", "topology_on_paths": True, "topology_gradient_weight": 0.5,
        "topology_sparsity": 0.5, "optimizer_wrapper": "ham",
        "optimizer_wrapper_options": {"alpha": 1.0},
    }  # fmt: skip
    local = {"checkpoint_epochs", "checkpoint_steps", "deterministic", "scatter"}
    assert set(changed) == {spec.name for spec in dataclasses.fields(TrainingConfig)} - local
    ids = {run_id(replace(TrainingConfig(), **{key: value})) for key, value in changed.items()}
    assert len(ids | {run_id(TrainingConfig())}) == len(changed) + 1


def test_what_is_pruned_at_the_start_changes_the_run():
    prunings = [None, PruneConfig(), PruneConfig(criterion="snip"), PruneConfig(sparsity=0.5)]
    assert len({run_id(SparseTrainConfig(prune=each)) for each in prunings}) == len(prunings)


def test_where_pruning_runs_and_writes_changes_nothing():
    changed = PruneConfig(device="cpu", out="elsewhere.safetensors")
    assert run_id(changed) == run_id(PruneConfig())
    assert run_id(SparseTrainConfig(prune=changed)) == run_id(
        SparseTrainConfig(prune=PruneConfig())
    )


# Defaults that change

SNAPSHOT = Path(__file__).parent / "first_defaults.json"
WHAT_TO_DO = """
The default of {name} was {before} and is {now}. Runs are named by what differs from the FIRST
default of every field, so that results of earlier versions are neither lost nor taken for new ones.
Where a default changes, enter the first one: FIRST_DEFAULTS["{name}"] of config.py, or FIRST of
criteria/__init__.py for a criterion's option and for the AutoS file of the package. For a new
field, add to tests/first_defaults.json the value that stands for how things were before it."""


def first_values() -> dict[str, object]:
    """Return every field's first default, every criterion's options, and the first AutoS file."""
    found = {
        f"{kind.__name__}.{spec.name}": config._canonical(config.first_default(kind, spec))
        for kind in CONFIGS
        for spec in dataclasses.fields(kind)
        if spec.metadata.get("identity", True) is not False
    }
    for name in criteria.names():
        first = criteria.get(name).options | base.FIRST.get(name, {})
        found |= {f"{name}.{key}": str(first[key]) for key in first if first[key] is not EMPTY}
    return json.loads(json.dumps(found))


def test_first_defaults_are_for_ever():
    known, now = json.loads(SNAPSHOT.read_text()), first_values()
    for name, value in now.items():
        assert name in known and known[name] == value, WHAT_TO_DO.format(
            name=name, before=known.get(name, "not there"), now=value
        )
    gone = set(known) - set(now)
    assert not gone, f"{gone} went: what ran with other than the default cannot be found again"


def test_a_default_that_changes_makes_new_ids_and_keeps_the_old(monkeypatch):
    old, explicit = run_id(IRPConfig()), run_id(IRPConfig(levels=12))
    spec = next(each for each in dataclasses.fields(IRPConfig) if each.name == "levels")
    monkeypatch.setattr(spec, "default", 12)
    changed = IRPConfig(levels=12)  # What IRPConfig() would be.
    assert run_id(changed) == old, "without an entry, an old run is taken for it"
    monkeypatch.setitem(config.FIRST_DEFAULTS, "IRPConfig.levels", 6)
    assert run_id(changed) == explicit
    assert run_id(IRPConfig(levels=6)) == old


def test_a_criterions_default_and_file_count_once_they_are_not_the_first(monkeypatch):
    for name in ("autos_irp", "iter_snip"):
        assert criteria.get(name).beyond({}) == {}
    changed = {"choice": "auto", "densities": "auto"}
    assert criteria.get("autos").beyond({}) == changed
    assert criteria.get("autos").beyond({"choice": "live", "densities": "learned"}) == {}
    monkeypatch.setitem(base.FIRST, "iter_snip", {"rounds": 1})
    rounds = criteria.get("iter_snip").options["rounds"]
    assert criteria.get("iter_snip").beyond({}) == {"rounds": rounds}
    assert criteria.get("iter_snip").beyond({"rounds": 1}) == {}
    file = base.FIRST["autos"]["autos"]
    monkeypatch.setitem(base.FIRST, "autos", {**base.FIRST["autos"], "autos": "earlier"})
    assert criteria.get("autos").beyond({}) == {"autos": file, **changed}


def test_run_id_tells_kinds_of_config_and_further_keys_apart():
    names = {run_id(DataConfig()), run_id(ModelConfig()), run_id(DataConfig(), "a")}
    names |= {run_id(DataConfig(), "b"), run_id(DataConfig(), "a", "b")}
    assert len(names) == 5


def test_order_of_options_does_not_matter():
    first, second = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert run_id(ModelConfig(options=first)) == run_id(ModelConfig(options=second))


def test_equal_configs_have_the_same_run_id():
    whole, broken = TrainingConfig(clip_grad=1), TrainingConfig(clip_grad=1.0)
    assert whole == broken
    assert run_id(whole) == run_id(broken)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_config_has_a_run_id(kind):
    assert re.fullmatch("[0-9a-f]{12}", run_id(kind()))
    assert identity(kind()) == {}


def test_configs_in_lists_are_part_of_the_identity():
    corpus = CorpusConfig(models=[ModelConfig("resnet18")])
    assert re.fullmatch("[0-9a-f]{12}", run_id(corpus))
    assert run_id(corpus) != run_id(CorpusConfig())


# corpus plans


def test_corpus_plan_is_the_product_of_its_lists():
    corpus = CorpusConfig(
        models=[ModelConfig("a"), ModelConfig("b")],
        data=[DataConfig("digits"), DataConfig("mnist")],
        seeds=[0, 1, 2],
        labels=["magnitude", "snip"],
        levels=4,
        out="there",
    )
    runs = corpus.runs()
    assert len({run_id(run) for run in runs}) == len(runs) == 24
    assert {(run.levels, run.out, run.device) for run in runs} == {(4, "there", "cpu")}
    assert {run.device for run in replace(corpus, gpus_per_run=0.5).runs()} == {"cuda"}


def test_corpus_run_is_the_run_of_the_irp_verb():
    assert CorpusConfig(out="elsewhere").runs()[0] == IRPConfig(out="elsewhere", device="cpu")


PLAN = CorpusConfig(
    models=[ModelConfig("test_vit"), ModelConfig("test_vit2"), ModelConfig("test_resnet")],
    data=[DataConfig("digits"), DataConfig("mnist")],
    seeds=[0, 1],
)


def shown(runs: list[IRPConfig]) -> list[tuple[str, str, int]]:
    return [(run.model.name, run.data.name, run.seed) for run in runs]


def test_every_schedule_gives_a_run_with_what_it_says():
    plan = CorpusConfig(
        schedules=[{}, {"levels": 12}, {"final_density": 0.5, "schedule": "linear"}],
        seeds=[0, 1], levels=4, store_initial=False, rewind_steps=3,
    )  # fmt: skip
    common = IRPConfig(device="cpu", store_initial=False, rewind_steps=3, levels=4)
    first = [
        common, replace(common, levels=12),
        replace(common, final_density=0.5, schedule="linear"),
    ]  # fmt: skip
    assert plan.runs() == [*first, *(replace(run, seed=1) for run in first)]


@pytest.mark.parametrize("key", SCHEDULE_KEYS)
def test_every_key_of_a_schedule_is_a_setting_of_both(key):
    for kind in (IRPConfig, CorpusConfig):
        assert key in {spec.name for spec in dataclasses.fields(kind)}
    value = "linear" if key == "schedule" else "layer" if key == "scope" else 2
    (run,) = CorpusConfig(schedules=[{key: value}]).runs()
    assert getattr(run, key) == value
    assert identity(run) == {key: value}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schedules": [{"level": 3}]}, "'level'.*'levels'"),
        ({"schedules": [{}, {"seed": 3}]}, "key in schedules 'seed'"),
        ({"schedules": []}, "no run"),
        ({"models": []}, "no run"),
        ({"exclude": [{"modell": "x"}]}, "key in exclude 'modell'.*'model'"),
        ({"exclude": [{"model": "test_vit3"}]}, "{'model': 'test_vit3'} matches no run"),
        ({"exclude": [{"seed": 0, "model": "nothing"}]}, "matches no run"),
        ({"exclude": [{"seed": 1}, {"seed": 1}]}, "matches no run"),
        ({"exclude": [{}]}, "matches no run"),
        ({"exclude": [{"data": "*"}]}, "no run"),
        ({"sample": 0}, "sample must be 1 to 12, got 0"),
        ({"sample": 13}, "sample must be 1 to 12, got 13"),
        ({"sample": 7, "exclude": [{"seed": 1}]}, "sample must be 1 to 6, got 7"),
    ],
)
def test_corpus_plans_that_cannot_be(changes, named):
    with pytest.raises(UsageError, match=named):
        replace(PLAN, **changes).runs()


@pytest.mark.parametrize(
    ("exclude", "left_out"),
    [
        ([{"model": "test_vit"}], lambda model, data, seed: model == "test_vit"),
        ([{"model": "test_vit*"}], lambda model, data, seed: model != "test_resnet"),
        ([{"model": "test_v?t", "seed": 1}], lambda m, d, s: m == "test_vit" and s == 1),
        ([{"seed": 1, "data": "m*"}], lambda model, data, seed: seed == 1 and data == "mnist"),
        ([{"seed": 1}, {"data": "mnist"}], lambda m, data, seed: seed == 1 or data == "mnist"),
        ([{"levels": 6, "seed": 0}], lambda model, data, seed: seed == 0),
    ],
)
def test_excluded_runs_match_all_of_an_entry(exclude, left_out):
    expected = [run for run in shown(PLAN.runs()) if not left_out(*run)]
    assert 0 < len(expected) < 12
    assert shown(replace(PLAN, exclude=exclude).runs()) == expected


def test_a_schedule_can_be_excluded_for_some():
    plan = CorpusConfig(
        models=[ModelConfig("a"), ModelConfig("b")],
        schedules=[{}, {"rewind_steps": 5}],
        exclude=[{"model": "b", "rewind_steps": 5}],
    )
    found = [(run.model.name, run.rewind_steps) for run in plan.runs()]
    assert found == [("a", 0), ("a", 5), ("b", 0)]


def test_a_sample_is_part_of_the_plan_in_its_order_without_repeats():
    every = PLAN.runs()
    drawn = set()
    for seed in range(20):
        plan = replace(PLAN, sample=5, sample_seed=seed)
        found = plan.runs()
        assert found == plan.runs()
        places = [every.index(run) for run in found]
        assert len(places) == 5
        assert places == sorted(set(places))
        drawn.add(tuple(places))
    assert len(drawn) > 10
    assert {place for places in drawn for place in places} == set(range(12))
    assert replace(PLAN, sample=12).runs() == every


def test_a_sample_is_the_same_in_every_version():
    """A plan that is started again after an update must not become another one."""
    runs = replace(PLAN, sample=3, sample_seed=1).runs()
    # random.Random(1).sample(range(12), 3) is [2, 9, 1]; 4 runs per model, 2 per data set.
    assert shown(runs) == [
        ("test_vit", "digits", 1), ("test_vit", "mnist", 0), ("test_resnet", "digits", 1),
    ]  # fmt: skip


def test_what_is_excluded_is_never_drawn():
    for seed in range(10):
        plan = replace(PLAN, exclude=[{"seed": 1}], sample=6, sample_seed=seed)
        assert {run.seed for run in plan.runs()} == {0}


# plain data


def test_plain_and_back():
    given = DataConfig("folder", root="/data/pets", train_limit=5)
    assert from_plain(DataConfig, plain(given)) == given


def test_unknown_key_is_named_with_the_nearest():
    with pytest.raises(UsageError, match=r"'roott'.*'root'"):
        from_plain(DataConfig, {"name": "folder", "roott": "/data"})


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_configs_are_frozen(kind):
    field = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), field, None)


# counts


@pytest.mark.parametrize(
    ("total", "sparsity", "kept"),
    [
        (1000, 0.95, 50),
        (371_280, 0.95, 18_564),
        (100, 0.29, 71),  # 100 * 0.29 is 28.999999999999996 in binary.
        (10, 0.9, 1),  # 1 - 0.9 is 0.09999999999999998.
        (10, 0.95, 0),  # 9.5 removed, rounded up; 0.95 is a little less in binary.
        (1000, 0.9999, 0),  # 999.9 removed, rounded.
        (1000, 0.9994, 1),
        (7, 0.0, 7),
        (7, 0, 7),
        (3, 0.3, 2),
        (0, 0.5, 0),
        (10**12 + 1, 0.98, 2 * 10**10),
        (10**15, 1e-5, 10**15 - 10**10),
    ],
)
def test_keep_count_is_exact(total, sparsity, kept):
    assert keep_count(total, sparsity) == kept


@pytest.mark.parametrize(
    ("total", "density", "kept"),
    [
        (1010, 0.05, 50),  # 50.5, as round() has it.
        (1030, 0.05, 51),  # 51.5, which round() makes 52.
        (1000, 0.7, 700),
        (199_256, 0.0625, 12_453),
        (10, 1.0, 10),
        (10, 1, 10),
        (10, 0.0, 0),
        (1000, 0.1**0.5, 316),
    ],
)
def test_a_density_is_counted_by_the_rule_of_sparsities(total, density, kept):
    assert keep_density(total, density) == kept


def test_densities_and_sparsities_that_are_the_same_keep_the_same():
    for total in (1, 2, 10, 50, 1_010, 4_096, 11_166_912):
        for hundredths in range(1, 101):
            sparsity = float(f"0.{100 - hundredths:02}")
            assert keep_density(total, hundredths / 100) == keep_count(total, sparsity)


def test_keep_count_rounds_halves_of_what_is_removed_up():
    for total in (1, 2, 10, 50, 1_010, 4_096, 11_166_912):
        for hundredths in range(100):
            removed = (total * hundredths * 2 + 100) // 200
            assert keep_count(total, hundredths / 100) == total - removed


@pytest.mark.parametrize("sparsity", [1.0, 1, 1.5, -0.1, float("nan"), float("inf")])
def test_sparsity_out_of_range_is_refused(sparsity):
    for check in (check_sparsity, lambda value: keep_count(10, value)):
        with pytest.raises(UsageError, match="sparsity"):
            check(sparsity)


# help


def documented_fields() -> dict[str, set[str]]:
    """Return, per class of settings, the fields with a docstring under them."""
    trees = [ast.parse(path.read_text()) for path in PACKAGE.glob("*/config.py")]
    found = {}
    for kind in (node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)):
        pairs = zip(kind.body, kind.body[1:], strict=False)
        found[kind.name] = {
            field.target.id
            for field, after in pairs
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and len(str(after.value.value)) > 5
        }
    return found


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_docstring(kind):
    own = documented_fields()
    found = {name for each in kind.__mro__ for name in own.get(each.__name__, ())}
    assert found == {spec.name for spec in dataclasses.fields(kind)}


def help_of(kind: type, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(kind, list(arguments), "autosparse", "what it does")
    assert caught.value.code == 0
    return capsys.readouterr().out


def options_without_help(text: str) -> list[str]:
    """Return the options that have nothing but their type and default to say."""
    entries = re.findall(r"^  (-\S.*(?:\n {8,}\S.*)*)", text, flags=re.MULTILINE)
    assert len(entries) >= 3
    lacking = []
    for entry in entries:
        option, _, description = re.sub(r"\n {8,}", "  ", entry).partition("  ")
        description = re.sub(r"\((required, )?type: .*\)", "", description).strip()
        if not re.search("[A-Za-z]{2}", description):
            lacking.append(option)
    return lacking


@pytest.mark.parametrize("verb", [name for name, verb in main.VERBS.items() if verb.settings])
def test_every_option_of_a_verb_has_help(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    kind = main.settings_class(str(main.VERBS[verb].settings))
    assert not options_without_help(help_of(kind, capsys, "--help"))


def test_every_option_of_a_corpus_has_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    assert not options_without_help(help_of(CorpusConfig, capsys, "--help"))


@pytest.mark.parametrize("key", ["model", "data"])
def test_every_option_of_an_optional_part_has_help(key, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    assert not options_without_help(help_of(SparseTrainConfig, capsys, f"--{key}.help"))


def test_help_shows_the_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    text = help_of(PruneConfig, capsys, "--help")
    assert "Fraction of prunable weights to remove, 0 <= sparsity < 1." in text
    assert "Share of the training images held out" in text


def test_verbs_config_classes_exist():
    every = [each for verb in main.VERBS.values() for each in (verb, *verb.actions.values())]
    found = {main.settings_class(each.settings) for each in every if each.settings}
    assert found <= set(CONFIGS)
