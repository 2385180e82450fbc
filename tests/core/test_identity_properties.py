"""What names a run: any changed value changes it; order and what only says where or how do not."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from autosparse.core.config import run_id
from autosparse.criteria.config import PruneConfig, ScoringConfig
from autosparse.data.config import DataConfig
from autosparse.irp.config import IRPConfig
from autosparse.models.config import ModelConfig
from autosparse.study.config import SparseTrainConfig
from autosparse.training.config import TrainingConfig

CONFIGS = [
    kind() for kind in (DataConfig, IRPConfig, ModelConfig, ScoringConfig, SparseTrainConfig,
                        TrainingConfig)
] + [PruneConfig(ModelConfig(), DataConfig())]  # fmt: skip


def fields_of(rule: bool) -> list[tuple[Any, str]]:
    """Return (config, field) of fields that always, or never, belong to the identity."""
    return [
        (config, spec.name)
        for config in CONFIGS
        for spec in dataclasses.fields(config)
        if spec.metadata.get("identity", True) is rule
    ]


def changed(draw: st.DrawFn, value: Any) -> Any:
    """Return another value of the same kind."""
    if dataclasses.is_dataclass(value):
        kept = [
            s.name for s in dataclasses.fields(value) if s.metadata.get("identity", True) is True
        ]
        name = draw(st.sampled_from(kept))
        return replace(value, **{name: changed(draw, getattr(value, name))})
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + draw(st.integers(1, 9))
    if isinstance(value, str):
        return value + draw(st.text("abc", min_size=1, max_size=3))
    if isinstance(value, list | tuple):
        return [*value, draw(st.text("abc", min_size=1, max_size=3))]
    if isinstance(value, dict):
        return {**value, "another": draw(st.integers(0, 9))}
    return draw(st.integers(1, 9))


@given(st.sampled_from(fields_of(True)), st.data())
def test_any_other_value_makes_another_id(field, data) -> None:
    config, name = field
    other = replace(config, **{name: data.draw(st.composite(changed)(getattr(config, name)))})
    assert run_id(other) != run_id(config)


@given(st.sampled_from(fields_of(False)), st.data())
def test_where_and_how_fast_change_nothing(field, data) -> None:
    config, name = field
    other = replace(config, **{name: data.draw(st.composite(changed)(getattr(config, name)))})
    assert run_id(other) == run_id(config)


def test_devices_and_folders_are_among_what_is_left_out() -> None:
    left_out = {(type(config), name) for config, name in fields_of(False)}
    assert {(IRPConfig, "device"), (IRPConfig, "out"), (SparseTrainConfig, "out")} <= left_out


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("abc", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)


def reordered(value: Any) -> Any:
    """Return the same, with the keys of all dicts the other way round, and whole numbers as 1.0."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [reordered(each) for each in value]
    return float(value) if type(value) is int else value


@given(st.dictionaries(st.text("xyz", min_size=1), VALUES, min_size=1, max_size=4))
def test_the_order_of_keys_and_the_way_to_write_a_number_change_nothing(options) -> None:
    model = ModelConfig("resnet18", options)
    assert run_id(model) == run_id(ModelConfig("resnet18", reordered(options)))
    assert run_id(model) != run_id(ModelConfig("resnet18", {**options, "another": 1}))


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_what_else_a_run_depends_on_is_told_apart(more) -> None:
    config = TrainingConfig()
    others = [run_id(config, *more, "last"), run_id(config, *more, ""), run_id(config, "", *more)]
    assert run_id(config, *more) not in others
