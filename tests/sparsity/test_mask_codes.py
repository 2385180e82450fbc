"""Masks in few bytes: by hand, back again, and near the entropy."""

from __future__ import annotations

import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.core.files import read_tensors, write_tensors
from autosparse.sparsity import masks, packs
from autosparse.sparsity.mask_codes import decoded, encoded, from_gaps, gaps
from autosparse.sparsity.ticket import Ticket


@pytest.fixture(autouse=True)
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are written with their tensors by name, as large ones are (see test_packs)."""
    monkeypatch.setattr(packs, "pays", lambda tensors: False)


def mask_at(places: list[int], size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[places] = True
    return mask


def test_by_hand() -> None:
    # Gaps 5, 0, 11 of 40 weights. k = 2: low bits, the lowest first: 10 00 11; high 1, 0, 2.
    code = gaps(mask_at([5, 6, 18], 40))
    assert code is not None
    assert code.tolist() == [2, 0b10001100, 0b01100100]
    assert from_gaps(code, (40,), 3).nonzero().flatten().tolist() == [5, 6, 18]


def test_a_bit_per_weight_where_gaps_are_no_shorter() -> None:
    assert gaps(mask_at([5, 6, 18], 24)) is None
    assert gaps(mask_at([], 1000)) is None
    assert encoded("w", mask_at([], 16))[0] == "mask/w"
    assert encoded("w", torch.rand(1000) < 0.5)[0] == "mask/w"


def test_a_mask_that_keeps_all_is_no_byte_long() -> None:
    whole = torch.ones(3, 5, dtype=torch.bool)
    key, code = encoded("w", whole)
    assert (key, code.numel()) == ("gaps/w", 0)
    assert decoded({key: code}, "w", (3, 5), 15).equal(whole)
    with pytest.raises(ValueError, match="no code"):
        decoded({key: code}, "w", (3, 5), 14)


@given(st.integers(0, 999), st.floats(0, 1), st.integers(1, 3000))
def test_back_again(seed: int, density: float, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=generator) < density**3
    key, code = encoded("w", mask)
    assert decoded({key: code}, "w", (size,), int(mask.sum())).equal(mask)
    assert code.numel() <= (size + 7) // 8


def test_one_weight_far_away() -> None:
    mask = mask_at([1_000_000], 1_000_001)
    code = gaps(mask)
    assert code is not None and code.numel() < 8
    assert from_gaps(code, (1_000_001,), 1).equal(mask)


def entropy_bytes(mask: Tensor) -> float:
    """Return the bytes that no code is below, of independent weights at the mask's density."""
    size, count = mask.numel(), int(mask.sum())
    parts = [each / size for each in (count, size - count) if each]
    return -size * sum(part * math.log2(part) for part in parts) / 8


@pytest.mark.parametrize("sparsity", [0.9, 0.98, 0.995])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_is_near_values_and_entropy(
    tmp_path: Path, sparsity: float, dtype: torch.dtype
) -> None:
    layers = [nn.Conv2d(128, 256, 3), nn.Conv2d(256, 256, 3), nn.BatchNorm2d(256), nn.Linear(9, 9)]
    model = nn.Sequential(*layers).to(dtype)
    names = ["0.weight", "1.weight"]
    scores = {name: torch.rand(model.get_parameter(name).shape) for name in names}
    chosen = masks.from_scores(scores, sparsity) | {"3.weight": torch.ones(9, 9).bool()}
    ticket = Ticket.from_model(model, chosen, {"sparsity": sparsity})
    path = tmp_path / "t.safetensors"
    ticket.save(path)
    tensors = [*ticket.values.values(), *ticket.rest.values()]
    values = sum(each.numel() * each.element_size() for each in tensors)
    least = values + sum(map(entropy_bytes, chosen.values()))
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size <= 1.05 * least + header
    assert sparsity > 0.98 or path.stat().st_size <= 1.05 * least
    loaded = Ticket.load(path)
    assert (loaded.fingerprint, loaded.content_hash) == (ticket.fingerprint, ticket.content_hash)


def sparse_ticket() -> Ticket:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    generator = torch.Generator().manual_seed(0)
    chosen = {f"{n}.weight": torch.rand(40, 40, generator=generator) < 0.02 for n in range(2)}
    return Ticket.from_model(model, chosen, {})


def test_files_with_a_bit_per_weight_are_read_as_before(tmp_path: Path) -> None:
    ticket, path = sparse_ticket(), tmp_path / "t.safetensors"
    ticket.save(path)
    tensors, header = read_tensors(path)
    assert header["format"] == 2
    old = {key: each for key, each in tensors.items() if not key.startswith("gaps/")}
    old |= {f"mask/{name}": masks.pack(mask) for name, mask in ticket.masks.items()}
    write_tensors(path, old, header | {"format": 1})
    assert Ticket.load(path).content_hash == ticket.content_hash


def test_a_file_without_gaps_has_the_format_of_before(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    Ticket.from_model(model, {"weight": torch.eye(4).bool()}, {}).save(tmp_path / "t.safetensors")
    tensors, header = read_tensors(tmp_path / "t.safetensors")
    assert header["format"] == 1 and "mask/weight" in tensors


@pytest.mark.parametrize("change", [
    lambda code: code[:0], lambda code: code[:-3], lambda code: code.int(),
    lambda code: torch.cat([torch.tensor([200], dtype=torch.uint8), code[1:]]),
    lambda code: torch.cat([code[:1] + 3, code[1:]]),
    lambda code: torch.cat([code, code]),
])  # fmt: skip
def test_damaged_gaps_name_the_parameter(tmp_path: Path, change) -> None:
    path = tmp_path / "t.safetensors"
    sparse_ticket().save(path)
    tensors, header = read_tensors(path)
    tensors["gaps/1.weight"] = change(tensors["gaps/1.weight"])
    write_tensors(path, tensors, header)
    with pytest.raises(UsageError, match=r"t\.safetensors: the mask of 1\.weight does not fit"):
        Ticket.load(path)
