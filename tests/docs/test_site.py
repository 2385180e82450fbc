"""Pages that are made from the code say what the code says, and formulas and lists are drawn."""

from __future__ import annotations

import dataclasses

import pytest

import autosparse
from autosparse.criteria.config import PruneConfig
from autosparse.training.config import TrainingConfig
from docs.generate import configuration, python


def test_every_key_of_every_settings_class_is_explained() -> None:
    page = configuration.page()
    found = {kind: package for package, kind in configuration.classes()}
    assert found[PruneConfig] == "criteria" and found[TrainingConfig] == "training"
    for kind in found:
        known = configuration.meanings(kind)
        section = page.split(f"\n## {kind.__name__}\n")[1].split("\n## ")[0]
        for spec in dataclasses.fields(kind):
            assert known.get(spec.name), f"{kind.__name__}.{spec.name} has no docstring"
            assert f"| `{spec.name}`" in section


def test_keys_that_say_only_where_are_marked() -> None:
    page = configuration.page().split("\n## PruneConfig\n")[1]
    assert "| `out` *where* |" in page and "| `seed` |" in page


def test_every_public_name_and_package_has_its_place() -> None:
    pages = python.pages()
    for name in autosparse._HOMES:
        assert f"`autosparse.{name}`" in pages["reference/python.md"]
    assert "::: autosparse.criteria.snip" in pages["reference/python/criteria.md"]


def test_lists_after_prose_and_formulas() -> None:
    pytest.importorskip("mkdocs")
    site = pytest.importorskip("docs.generate.site")
    assert site._apart("Words:\n- a\n  more\n- b\n\nText\n| c |\n|---|") == (
        "Words:\n\n- a\n  more\n- b\n\nText\n\n| c |\n|---|"
    )
    pytest.importorskip("latex2mathml")
    said = site.on_page_markdown("so\n\n$$\\frac{a}{b}$$\n\n```\n$$c$$\n```\n")
    assert "<mfrac>" in said and "$$c$$" in said
    assert said.startswith('so\n\n<div class="formula"><math')
    inside = site.on_page_markdown("Words.\n\n$$a_l$$ is of the layer,\n$$b$$ of the weight.\n")
    assert "div" not in inside and inside.count("<span><math") == 2  # No paragraph begins there.


def test_names_in_tables_break_at_underscores_and_figures_lead_to_their_files() -> None:
    pytest.importorskip("mkdocs")
    site = pytest.importorskip("docs.generate.site")
    said = site.on_page_content(
        '<p><code>a_b</code><img alt="" src="x.png" /></p><td><code>step_ms</code> a_b</td>'
    )
    assert said == (
        '<p><code>a_b</code><a href="x.png"><img alt="" src="x.png" /></a></p>'
        "<td><code>step_<wbr>ms</code> a_b</td>"
    )
