"""What a network costs, against counts by hand."""

import json

import pytest
import torch
from torch import nn

from autosparse import prune
from autosparse.cli.main import _main
from autosparse.core.errors import UsageError
from autosparse.study import measure
from autosparse.study.deploy import program
from tests.conftest import make_model


def small() -> nn.Module:
    """A convolution to [2, 4, 4] of 3x3 kernels, and a linear layer 32 -> 3."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].weight[:, :8] = 0
    return model


def test_costs_by_hand() -> None:
    found = measure.costs(small(), torch.randn(1, 1, 4, 4))
    conv, linear = 2 * 32 * 9, 2 * 3 * 32
    assert found["parameters"] == 18 + 2 + 96 + 3
    assert found["nonzero"] == 9 + 2 + 72 + 3
    assert found["flops"] == conv + linear
    assert found["flops_sparse"] == conv // 2 + linear * 3 // 4
    # The image (16), what the convolution gives (32), which Flatten only looks at, and logits (3).
    assert found["activation_bytes"] == 4 * (16 + 32 + 3)


def test_layers_of_modules_and_of_graphs_are_the_same() -> None:
    model, images = small(), torch.randn(2, 1, 4, 4)
    rows = measure.layers(model, images)
    assert [row["layer"] for row in rows] == ["0.weight", "2.weight"]
    assert rows[0] == {
        "layer": "0.weight", "weights": 18, "nonzero": 9, "flops": 576, "flops_sparse": 288
    }  # fmt: skip
    assert measure.layers(program(model, images).module(), images) == rows


def test_bytes_are_those_of_the_values_and_a_header() -> None:
    found = measure.file_bytes(small())
    assert 4 * 119 < found["safetensors_bytes"] < 4 * 119 + 600


def test_a_spread_is_a_plain_number() -> None:
    latency = {"torch 1": {"ms": 140.2, "quartiles": [130.0, 155.0], "of_first": 0.5}}
    (row,) = measure.table({"rows": {"dense": {"latency": latency}}})
    assert row == {"figure": "torch, batch 1: ms", "dense": "140±10 (x0.50)"}


@pytest.mark.slow
def test_the_verb_prints_a_table_and_writes_json(digits, tmp_path, capsys) -> None:
    pytest.importorskip("onnxruntime")
    ticket = prune(make_model(), digits, "erk", 0.95)
    ticket.save(tmp_path / "t.safetensors")
    file = tmp_path / "costs.json"
    _main(["measure", str(tmp_path / "t.safetensors"), "--runs", "2", "--batches", "[1, 2]",
           "--json", str(file)])  # fmt: skip
    assert "onnxruntime, batch 2: ms" in capsys.readouterr().out
    found = json.loads(file.read_text())
    rows = found["rows"]
    assert list(rows) == ["dense", "pruned", "slimmed"]
    assert rows["dense"]["nonzero"] > rows["pruned"]["nonzero"] >= ticket.kept
    assert rows["pruned"]["parameters"] == rows["dense"]["parameters"]
    assert rows["slimmed"]["parameters"] <= rows["dense"]["parameters"]
    assert rows["pruned"]["flops"] == rows["dense"]["flops"] > rows["pruned"]["flops_sparse"]
    assert {"torch 1", "torch 2", "onnxruntime 1", "onnxruntime 2"} == set(rows["dense"]["latency"])
    assert sum(row["nonzero"] for row in found["layers"]["pruned"]) == ticket.kept


def test_mistakes_are_one_line(tmp_path) -> None:
    with pytest.raises(UsageError, match="unrecognized arguments: b"):
        _main(["measure", "a", "b"])
    with pytest.raises(UsageError, match=r"nothing\.safetensors is no file"):
        _main(["measure", str(tmp_path / "nothing.safetensors")])
    with pytest.raises(UsageError, match="unknown model 'resnet81'"):
        _main(["measure", "resnet81"])
