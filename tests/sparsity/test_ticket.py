"""Tickets: the file, what it refuses, and what its two hashes stand for."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autosparse.autos.network import AutoS
from autosparse.core.errors import RunFailed, UsageError, UserError
from autosparse.core.files import read_tensors, write_tensors
from autosparse.models.zoo import prunable
from autosparse.sparsity import packs
from autosparse.sparsity.ticket import FORMAT, Ticket, compact


@pytest.fixture(autouse=True)
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are written with their tensors by name, as large ones are (see test_packs)."""
    monkeypatch.setattr(packs, "pays", lambda tensors: False)


def net(*widths: int, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(a, b, bias=bias) for a, b in pairwise(widths)])


def norm_net() -> nn.Module:
    """Names out of alphabetical order, a BatchNorm with a 0-dim integer buffer."""
    torch.manual_seed(0)
    return nn.Sequential(
        *[layer for _ in range(6) for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))]
    )


def ticket_of(model: nn.Module, card: dict | None = None) -> Ticket:
    generator = torch.Generator().manual_seed(1)
    parameters = prunable(model)
    chosen = {
        name: torch.rand(w.shape, generator=generator) > 0.6 for name, w in parameters.items()
    }
    return Ticket.from_model(model, chosen, card or {"sparsity": 0.6, "model": {"name": "net"}})


def example() -> Ticket:
    """Masks 3 of 6 and 1 of 2 weights; the mask of 0.weight is one byte, 0b10100100."""
    model = net(3, 2, 1)
    chosen = {
        "0.weight": torch.tensor([[True, False, True], [False, False, True]]),
        "1.weight": torch.tensor([[False, True]]),
    }
    return Ticket.from_model(model, chosen, {"note": "by hand"})


def assert_same(ours: Ticket, theirs: Ticket) -> None:
    assert ours.card == theirs.card
    for part in ("masks", "values", "rest"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
        assert all(mine[name].dtype == other[name].dtype for name in mine)


# What a ticket holds


def test_a_ticket_holds_what_it_keeps() -> None:
    model, ticket = net(3, 2, 1), example()
    weight = model[0].weight.detach()
    assert ticket.values["0.weight"].tolist() == [weight[0, 0], weight[0, 2], weight[1, 2]]
    assert ticket.rest.keys() == {"0.bias", "1.bias"}
    assert ticket.kept == 4
    assert ticket.sparsity == 0.5


def test_the_model_is_not_changed_nor_shared() -> None:
    model = net(3, 2, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ticket = ticket_of(model)
    kept = {name: values.clone() for name, values in ticket.values.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(values, kept[name]) for name, values in ticket.values.items())
    assert torch.equal(ticket.rest["0.bias"], before["0.bias"])


def test_dense_state_is_zero_where_pruned() -> None:
    model, ticket = net(3, 2, 1), example()
    state = ticket.dense_state()
    assert state.keys() == model.state_dict().keys()
    for name, mask in ticket.masks.items():
        assert torch.equal(state[name], model.get_parameter(name) * mask)


def test_table_by_hand() -> None:
    assert example().table() == [
        {"layer": "0.weight", "shape": [2, 3], "weights": 6, "kept": 3, "density": 0.5},
        {"layer": "1.weight", "shape": [1, 2], "weights": 2, "kept": 1, "density": 0.5},
    ]


def test_with_card_adds_entries_and_leaves_the_first_ticket() -> None:
    ticket = example()
    assert ticket.with_card(seed=3).card == {"note": "by hand", "seed": 3}
    assert ticket.card == {"note": "by hand"}


def test_a_ticket_is_equal_to_itself_only() -> None:
    ticket = example()
    assert ticket == ticket and ticket != example()
    assert len({ticket, ticket, example()}) == 2


def test_from_compact_takes_the_trained_values() -> None:
    model = norm_net()
    start = ticket_of(model)
    compact(model, start)
    assert_same(Ticket.from_compact(model, start, start.card), start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    trained = Ticket.from_compact(model, start, {})
    assert trained.fingerprint == start.fingerprint
    for name, values in start.values.items():
        assert torch.equal(trained.values[name], 2 * values)
    assert torch.equal(trained.rest["1.weight"], 2 * start.rest["1.weight"])


def test_tied_weights_are_held_once(tmp_path: Path) -> None:
    model = net(3, 3, 3)
    model[1].weight = model[0].weight
    ticket = ticket_of(model)
    assert list(ticket.masks) == ["0.weight"]
    assert ticket.rest.keys() == {"0.bias", "1.bias"}
    ticket.save(tmp_path / "t.safetensors")
    Ticket.load(tmp_path / "t.safetensors").check(model)


# Save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    ticket = ticket_of(norm_net().to(dtype))
    ticket.save(tmp_path / "t.safetensors")
    loaded = Ticket.load(tmp_path / "t.safetensors")
    assert_same(loaded, ticket)
    assert {values.dtype for values in loaded.values.values()} == {dtype}
    assert loaded.fingerprint == ticket.fingerprint
    assert loaded.content_hash == ticket.content_hash


def test_an_empty_layer_is_saved(tmp_path: Path) -> None:
    model = net(3, 2)
    ticket = Ticket.from_model(model, {"0.weight": torch.zeros(2, 3).bool()}, {})
    ticket.save(tmp_path / "t.safetensors")
    assert_same(Ticket.load(tmp_path / "t.safetensors"), ticket)


def test_the_same_ticket_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    ticket_of(norm_net(), {"b": 1, "a": [2, {"d": 0.1, "c": None}]}).save(first)
    ticket_of(norm_net(), {"a": [2, {"c": None, "d": 0.1}], "b": 1}).save(second)
    assert first.read_bytes() == second.read_bytes()
    Ticket.load(first).save(second)
    assert first.read_bytes() == second.read_bytes()


def test_the_order_of_masks_is_kept(tmp_path: Path) -> None:
    ticket = ticket_of(norm_net())
    assert list(ticket.masks) == [f"{place}.weight" for place in (0, 2, 4, 6, 8, 10)]
    ticket.save(tmp_path / "t.safetensors")
    assert list(Ticket.load(tmp_path / "t.safetensors").masks) == list(ticket.masks)


def test_a_mask_takes_a_bit_per_weight(tmp_path: Path) -> None:
    example().save(tmp_path / "t.safetensors")
    tensors, _ = read_tensors(tmp_path / "t.safetensors")
    assert tensors["mask/0.weight"].tolist() == [0b10100100]
    assert tensors["mask/1.weight"].tolist() == [0b01000000]


# Check


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(lambda: net(3, 4, 4, 3), r"2\.weight is \[3, 4\].*\[2, 4\]", id="shape"),
        pytest.param(lambda: net(3, 5, 4, 2), r"0\.weight is \[5, 3\].*\[4, 3\]", id="shapes"),
        pytest.param(lambda: net(3, 4, 4, 2, 2), r"only the model has 3\.weight", id="extra"),
        pytest.param(lambda: net(3, 4, 4), r"only the ticket has 2\.weight", id="missing"),
        pytest.param(
            lambda: net(3, 4, 4, 2, bias=False), r"only the ticket has 0\.bias", id="no biases"
        ),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(1, 1, 3)), r"0\.weight is \[1, 1, 3, 3\]", id="conv"
        ),
        pytest.param(
            lambda: nn.ModuleDict({"head": net(3, 4, 4, 2)}),
            r"only the ticket has 0\.weight",
            id="other names",
        ),
    ],
)
def test_check_names_the_first_parameter_that_differs(
    build: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(UsageError, match=f"another model: {message}"):
        ticket_of(net(3, 4, 4, 2)).check(build())


def test_check_takes_the_right_model() -> None:
    ticket_of(norm_net()).check(norm_net())


# Damaged files


def data_start(path: Path, key: str) -> int:
    """Return where a tensor's bytes begin in a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return 8 + length + json.loads(raw[8 : 8 + length])[key]["data_offsets"][0]


def flip(path: Path, place: int, bits: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= bits
    path.write_bytes(raw)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict], None]) -> None:
    tensors, header = read_tensors(path)
    change(tensors, header)
    write_tensors(path, tensors, header)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "t.safetensors"
    example().save(path)
    return path


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(UsageError, match=r"t\.safetensors is damaged"):
        Ticket.load(saved)


def test_a_flipped_bit_in_a_mask_names_the_parameter(saved: Path) -> None:
    flip(saved, data_start(saved, "mask/0.weight"), 0b01000000)
    with pytest.raises(UsageError, match=r"0\.weight keeps 4 weights but holds 3.*damaged"):
        Ticket.load(saved)


def test_a_mask_with_another_weight_of_the_same_count(saved: Path) -> None:
    flip(saved, data_start(saved, "mask/0.weight"), 0b11000000)
    with pytest.raises(UsageError, match=r"fingerprint.*damaged"):
        Ticket.load(saved)


def test_a_flipped_bit_anywhere_in_the_header_is_no_crash(saved: Path) -> None:
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header):
        saved.write_bytes(whole)
        flip(saved, place, 1)
        try:
            Ticket.load(saved)
        except UserError as error:
            assert "t.safetensors" in str(error)


def drop_a_value(tensors: dict[str, Tensor], header: dict) -> None:
    tensors["kept/1.weight"] = tensors["kept/1.weight"][:0]


def drop_the_values(tensors: dict[str, Tensor], header: dict) -> None:
    del tensors["kept/1.weight"]


def drop_the_mask(tensors: dict[str, Tensor], header: dict) -> None:
    del tensors["mask/1.weight"]


def enlarge(tensors: dict[str, Tensor], header: dict) -> None:
    header["shapes"][1][1] = [5, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_value, "keeps 1 weights but holds 0"),
        (drop_the_values, "is missing"),
        (drop_the_mask, "is missing"),
        (enlarge, "does not fit its shape"),
    ],
)
def test_parts_that_do_not_fit_name_file_and_parameter(
    saved: Path, change: Callable[[dict[str, Tensor], dict], None], message: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(UsageError, match=message) as caught:
        Ticket.load(saved)
    assert "1.weight" in str(caught.value)
    assert "t.safetensors" in str(caught.value)


def test_a_newer_format(saved: Path) -> None:
    rewrite(saved, lambda tensors, header: header.update(format=FORMAT + 1))
    with pytest.raises(UsageError, match=rf"newer autosparse \(format {FORMAT + 1}\)"):
        Ticket.load(saved)


def test_not_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_text("This is a text file that says nothing about tensors.\n" * 9)
    with pytest.raises(UsageError, match="damaged or no safetensors file"):
        Ticket.load(path)


def test_safetensors_without_a_card(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "t.safetensors")
    with pytest.raises(UsageError, match="no card"):
        Ticket.load(tmp_path / "t.safetensors")


def test_another_kind_of_file(tmp_path: Path) -> None:
    AutoS("paper", [2]).save(tmp_path / "autos.safetensors")
    with pytest.raises(UsageError, match="not a ticket but autos"):
        Ticket.load(tmp_path / "autos.safetensors")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file: .*nothing\.safetensors"):
        Ticket.load(tmp_path / "nothing.safetensors")


# Hashes


def changed(group: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**group, name: group[name] + 1}


def test_values_change_the_content_and_not_the_fingerprint() -> None:
    ticket = example()
    for other in (
        replace(ticket, values=changed(ticket.values, "1.weight")),
        replace(ticket, rest=changed(ticket.rest, "0.bias")),
    ):
        assert other.fingerprint == ticket.fingerprint
        assert other.content_hash != ticket.content_hash


def test_masks_change_both_hashes() -> None:
    ticket = example()
    other = replace(ticket, masks={**ticket.masks, "1.weight": torch.tensor([[True, False]])})
    assert other.fingerprint != ticket.fingerprint
    assert other.content_hash != ticket.content_hash


def test_the_card_changes_no_hash() -> None:
    ticket, other = example(), example().with_card(note="another")
    assert (other.fingerprint, other.content_hash) == (ticket.fingerprint, ticket.content_hash)


# Atomicity


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write files of more than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failing_write_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    larger = ticket_of(net(50, 50))
    with largest_file(1000), pytest.raises(RunFailed, match=r"cannot write .*t\.safetensors"):
        larger.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failing_write_of_a_new_file_leaves_nothing(tmp_path: Path) -> None:
    ticket = ticket_of(net(50, 50))
    with largest_file(1000), pytest.raises(RunFailed):
        ticket.save(tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_card_that_is_not_json_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        example().with_card(loss=float("nan")).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_replaces_the_old_file(saved: Path) -> None:
    ticket = ticket_of(net(5, 4))
    ticket.save(saved)
    assert_same(Ticket.load(saved), ticket)
    assert list(saved.parent.iterdir()) == [saved]
