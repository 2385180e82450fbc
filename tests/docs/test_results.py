"""What is made from results/ is what the repository holds, and claims are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from docs.generate import figures, prose, results

FACTS = (
    "question", "command", "seeds", "data_fingerprint", "commit", "machine", "limits", "choices",
)  # fmt: skip


@pytest.mark.parametrize("path", list(results.pages()), ids=lambda path: path.name)
def test_pages_and_tables_are_those_of_the_json(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == results.pages()[path], (
        f"{path.name} differs from results/*.json: python -m docs.generate.results"
    )


def test_every_block_of_results_is_in_use() -> None:
    said = "".join((results.ROOT / name).read_text(encoding="utf-8") for name in results.FILLED)
    for name in results.blocks():
        assert f"<!-- results: {name} -->" in said


def test_claims_are_whole() -> None:
    found = results.claims()
    assert 0 < len(found) <= results.MOST_CLAIMS
    assert len({claim["id"] for claim in found}) == len(found)
    for claim in found:
        assert claim["evidence"] and claim["limits"] and claim["experiments"]
        assert set(claim["interval"]) == {"low", "high", "unit", "kind"}
        if claim["interval"]["low"] != "not recorded":
            assert claim["interval"]["low"] <= claim["interval"]["high"]


@pytest.mark.parametrize("experiment", results.experiments(), ids=lambda each: each["id"])
def test_experiments_say_how_they_were_run(experiment: dict) -> None:
    for fact in FACTS:
        assert experiment[fact], fact
    assert re.search(r"\b[0-9a-f]{7}\b", experiment["first_recorded_in"])
    for net in experiment.get("nets", {}).values():
        assert net["seen"] in ("development net", "held out")


def test_means_are_those_of_their_cells() -> None:
    """A mean over sparsities is that of the cells, as far as one decimal tells."""
    for net in results.read("long_trainings")["nets"].values():
        for row in net["rows"]:
            if "mean" in row:
                cells = [cell["mean"] for cell in row["cells"].values()]
                assert row["mean"] == pytest.approx(sum(cells) / len(cells), abs=0.1)


def test_more_than_six_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="7 columns"):
        results.table(list("abcdefg"), [])


def test_a_claim_without_a_known_verdict_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "read", lambda name: [{"id": "a", "verdict": "perhaps"}])
    with pytest.raises(ValueError, match="perhaps"):
        results.claims()


def test_the_first_figure_shows_what_the_json_holds(tmp_path: Path) -> None:
    path = figures.accuracy_over_sparsity(tmp_path / "a.png")
    kept = results.ROOT / "docs" / "accuracy_over_sparsity.csv"
    assert path.with_suffix(".csv").read_bytes() == kept.read_bytes()


def test_the_figure_of_latency_shows_what_the_json_holds(tmp_path: Path) -> None:
    path = figures.accuracy_over_latency(tmp_path / "a.png")
    kept = results.ROOT / "docs" / "accuracy_over_latency.csv"
    assert path.with_suffix(".csv").read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("claim", results.claims(), ids=lambda each: each["id"])
def test_a_claims_figure_shows_what_its_evidence_says(claim: dict, tmp_path: Path) -> None:
    """Every value stands in the claim's own words, or in a table that it rests on."""
    said = [claim["evidence"], str(claim["interval"]), claim["statement"]]
    said += [json.dumps(results.read(name)) for name in claim["experiments"]]
    numbers = {float(each) for each in re.findall(r"\d+(?:\.\d+)?", " ".join(said))}
    for row in claim["figure"]["rows"]:
        for point in row["points"]:
            known = numbers | {50.0, 1.0}  # Half of a gap, and the dense step itself.
            assert point["value"] in known, (row["place"], point)
    path = figures.claim(claim, tmp_path / "a.png")
    kept = results.ROOT / "docs" / "results" / f"claim_{claim['id']}.csv"
    assert path.with_suffix(".csv").read_bytes() == kept.read_bytes()


def test_readme_is_short() -> None:
    assert len((results.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("path", prose.files(), ids=lambda path: path.name)
def test_no_line_of_prose_is_too_long(path: Path) -> None:
    assert prose.too_long(path) == []


@pytest.mark.parametrize(
    "path", [p for p in prose.files() if p != prose.AS_IT_WAS], ids=lambda path: path.name
)
def test_no_table_has_over_six_columns(path: Path) -> None:
    assert prose.too_wide(path) == []


@pytest.mark.parametrize(("columns", "found"), [(6, []), (7, ["a.md:4"])])
def test_a_wide_table_is_found(
    columns: int, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text(f"a - b\n\n|{'a|' * columns}\n|{' :-- |' * columns}\n|{'1|' * columns}\n")
    assert prose.too_wide(page) == found


@pytest.mark.parametrize("line", ["word " * 21, "- " + "word " * 21, "[a](b) " + "word " * 20])
def test_a_long_line_is_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text(f"# Head\n\n{line}\n\n| {line} |\n\n```\n{line}\n```\n")
    assert prose.too_long(page) == ["a.md:3"]


def test_json_is_written_one_way() -> None:
    """So that changes of figures are small in a diff."""
    for path in sorted((results.ROOT / "results").glob("*.json")):
        text = path.read_text(encoding="utf-8")
        assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n", path.name
