"""AutoS files of earlier versions: the paper's network as a table."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autosparse.autos import features
from autosparse.autos.network import AutoS
from autosparse.autos.table import GRID, Table
from autosparse.core.files import write_tensors


def curved(weight: Tensor, gradient: Tensor) -> Tensor:
    return torch.tanh(weight.abs() / 0.1) + 0.5 * torch.cos(gradient / 1e-4)


def tensors() -> dict[str, Tensor]:
    """What such a file holds of a table of `curved`, written out point by point."""
    scale, reach = torch.tensor([0.07, 7e-5]), torch.tensor([2.5, 2.0])
    axis = torch.linspace(-1, 1, GRID)
    weights, gradients = (torch.sinh(axis * reach[k]) * scale[k] for k in (0, 1))
    return {
        "mean": torch.zeros(2),
        "std": torch.ones(2),
        "table.values": curved(weights[:, None], gradients[None, :]),
        "table.scale": scale,
        "table.reach": reach,
    }


def table() -> Table:
    found = Table()
    found.load_state_dict(
        {name.removeprefix("table."): t for name, t in list(tensors().items())[2:]}
    )
    return found


def test_the_table_holds_the_function_on_its_grid_and_about_between() -> None:
    axis = torch.linspace(-1, 1, GRID)[[0, 7, GRID // 2, GRID - 1]]
    weight, gradient = torch.sinh(axis * 2.5) * 0.07, torch.sinh(axis * 2.0) * 7e-5
    torch.testing.assert_close(
        table()(weight, gradient), curved(weight, gradient), rtol=1e-3, atol=1e-3
    )
    weight, gradient = torch.tensor([[0.05, -0.12]]), torch.tensor([[1e-4, -1.3e-4]])
    torch.testing.assert_close(
        table()(weight, gradient), curved(weight, gradient), rtol=0, atol=0.02
    )


def test_far_outside_the_edge_counts() -> None:
    edge = torch.sinh(table().reach) * table().scale
    far = table()(1e3 * edge[:1], 1e3 * edge[1:])
    torch.testing.assert_close(far, table()(edge[:1], edge[1:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "mlp"])
def test_a_file_with_a_table_is_read_and_written_again(backbone: str, tmp_path: Path) -> None:
    held = tensors()
    if backbone == "mlp":
        held |= {
            name: tensor
            for name, tensor in AutoS("paper", [3]).state_dict().items()
            if name.startswith("layers.")
        }
    digest = hashlib.sha256(b"paper (3,)")
    for name in sorted(held):
        digest.update(name.encode() + held[name].numpy().tobytes())
    header = {
        "kind": "autos", "format": 1, "features": "paper", "hidden": [3], "head": "mean",
        "inputs": list(features.names_of("paper")), "backbone": backbone, "densities": [],
        "tabulated": True, "fingerprint": digest.hexdigest()[:16],
        "card": {"config": {"backbone": backbone}, "table": {"max_error": 0.01}},
    }  # fmt: skip
    write_tensors(tmp_path / "old.safetensors", held, header)
    network = AutoS.load(tmp_path / "old.safetensors")
    weights, gradients = {"a": torch.tensor([[0.05, -0.12]])}, {"a": torch.tensor([[1e-4, 0.0]])}
    expected = curved(weights["a"], gradients["a"])
    torch.testing.assert_close(network.score(weights, gradients)["a"], expected, rtol=0, atol=0.02)
    network.save(tmp_path / "new.safetensors")
    again = AutoS.load(tmp_path / "new.safetensors")
    assert again.fingerprint == network.fingerprint == header["fingerprint"]
    assert torch.equal(again.score(weights, gradients)["a"], network.score(weights, gradients)["a"])
