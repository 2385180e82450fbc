"""Packed files: by hand, back again, damage, and when they are written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from autosparse.core.config import plain
from autosparse.core.errors import UserError
from autosparse.core.files import read_tensors, write_tensors
from autosparse.models.zoo import prunable
from autosparse.sparsity import masks, packs
from autosparse.sparsity.ticket import Ticket
from autosparse.training.config import TrainingConfig


def example() -> dict[str, Tensor]:
    return {
        "b": torch.tensor([[1.0, 2], [3, 4]]),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "half": torch.tensor([0.5], dtype=torch.bfloat16),
        "a": torch.tensor([5.0]),
    }


def test_by_hand() -> None:
    found = packs.packed(example(), {"more": [1]})
    assert {name: each.tolist() for name, each in found.items() if name != "listing"} == {
        "packed/float32": [1, 2, 3, 4, 5], "packed/int64": [7], "packed/bfloat16": [0.5],
    }  # fmt: skip
    back, more = packs.unpacked(found)
    assert more["more"] == [1]
    assert list(back) == list(example())
    for name, tensor in example().items():
        assert back[name].dtype == tensor.dtype
        assert back[name].equal(tensor)


@pytest.mark.parametrize("change", [
    lambda code: code[:0], lambda code: code[:-9], lambda code: code.float(), lambda code: code + 1,
])  # fmt: skip
def test_a_garbled_listing(change) -> None:
    found = packs.packed(example(), {})
    found["listing"] = change(found["listing"])
    with pytest.raises(ValueError, match="its listing is garbled"):
        packs.unpacked(found)


@pytest.mark.parametrize("name", ["packed/float32", "packed/int64", "listing"])
def test_what_is_too_short_or_missing(name: str) -> None:
    found = packs.packed(example(), {})
    with pytest.raises(ValueError, match="garbled"):
        packs.unpacked({**found, name: found[name][:-1]})
    del found[name]
    with pytest.raises(ValueError, match="garbled"):
        packs.unpacked(found)


def small_ticket() -> Ticket:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return Ticket.from_model(model, {"0.weight": torch.eye(2, 3).bool()}, {"note": "by hand"})


def test_a_flipped_bit_anywhere_is_no_crash(tmp_path: Path) -> None:
    path, ticket = tmp_path / "t.safetensors", small_ticket()
    ticket.save(path)
    whole = path.read_bytes()
    assert read_tensors(path)[1]["format"] == 3
    for place in range(0, len(whole), 4):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = Ticket.load(path)
        except UserError as error:
            assert "t.safetensors" in str(error)
        else:
            assert found.content_hash == ticket.content_hash


def test_a_large_file_tells_its_layers_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    model = nn.Linear(300, 300)
    dense = Ticket.from_model(model, {"weight": torch.ones(300, 300).bool()}, {})
    dense.save(path)
    tensors, header = read_tensors(path)
    assert (set(tensors), header["format"]) == ({"kept/weight", "gaps/weight", "rest/bias"}, 2)


def test_a_packed_file_without_shapes(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    small_ticket().save(path)
    tensors, header = read_tensors(path)
    inside, _ = packs.unpacked(tensors)
    write_tensors(path, packs.packed(inside, {}), header)
    with pytest.raises(UserError, match=r"t\.safetensors: its card has no 'shapes'"):
        Ticket.load(path)


def entropy_bytes(mask: Tensor) -> float:
    size, share = mask.numel(), float(mask.double().mean())
    return -size * sum(p * math.log2(p) for p in (share, 1 - share) if p) / 8


def test_a_trained_ticket_in_bf16_is_near_values_and_entropy(tmp_path: Path) -> None:
    """MobileNetV2: many layers, and few weights in most of them."""
    model = timm.create_model("mobilenetv2_100", num_classes=10).bfloat16()
    weights = prunable(model)
    chosen = masks.from_scores({name: torch.rand(w.shape) for name, w in weights.items()}, 0.995)
    live = {name: int(mask.sum()) for name, mask in chosen.items()}
    card = {"training": plain(TrainingConfig()), "live": live, "trained": {"test_accuracy": 0.5}}
    ticket = Ticket.from_model(model, chosen, card)
    ticket.save(tmp_path / "t.safetensors")
    tensors = [*ticket.values.values(), *ticket.rest.values()]
    least = sum(each.numel() * each.element_size() for each in tensors)
    least += sum(map(entropy_bytes, chosen.values()))
    assert (tmp_path / "t.safetensors").stat().st_size <= 1.05 * least
    assert Ticket.load(tmp_path / "t.safetensors").content_hash == ticket.content_hash
