"""Compact parameters: equal to masked-dense training, and back to dense again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy

from autosparse.core.errors import UsageError
from autosparse.data import sets
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity import compact as compaction
from autosparse.sparsity import masks
from autosparse.sparsity.compact import compact_weights, dense_name, densify, rescattering
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training import steppers
from autosparse.training.config import TrainingConfig
from tests.conftest import few

STEPS, BATCH, RATE, DECAY = 50, 32, 1e-3, 0.5


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=3, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 5),
    )


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(7))


def random_ticket(model: nn.Module, sparsity: float = 0.7) -> Ticket:
    generator = torch.Generator().manual_seed(3)
    parameters = zoo.prunable(model)
    scores = {name: torch.rand(w.shape, generator=generator) for name, w in parameters.items()}
    return Ticket.from_model(model, masks.from_scores(scores, sparsity), {})


def masked(model: nn.Module, ticket: Ticket) -> nn.Module:
    """Return a dense copy of `model` with zeros where the ticket prunes."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            model.get_parameter(name).mul_(mask)
    return model


class Tied(nn.Module):
    """Two Linear layers that share one weight, and one of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (nn.Linear(5, 5) for _ in range(3))
        self.last.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.middle(self.first(inputs).relu()).relu())


class Attention(nn.Module):
    """nn.MultiheadAttention on its own input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs)[0]


CASES = {
    "conv net": (conv_net, images),
    "attention": (Attention, lambda: torch.randn(3, 4, 8)),
    "tied": (Tied, lambda: torch.randn(3, 5)),
}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""For float64: hundreds of operations on numbers around one, which round by 1e-16 each."""


@pytest.mark.parametrize("training_mode", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_forward_is_that_of_the_masked_dense_model(case: str, training_mode: bool) -> None:
    build, draw = CASES[case]
    model, inputs = build().double().train(training_mode), draw().double()
    ticket = random_ticket(model)
    expected = masked(model, ticket)(inputs)
    torch.testing.assert_close(compact(model, ticket)(inputs), expected, **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_dense_gradient_at_the_kept_positions(case: str) -> None:
    build, draw = CASES[case]
    model, inputs = build().double(), draw().double()
    ticket = random_ticket(model)
    dense = masked(model, ticket)
    dense(inputs).square().sum().backward()
    compact(model, ticket)(inputs).square().sum().backward()
    gradients = {dense_name(name): each.grad for name, each in model.named_parameters()}
    assert set(gradients) == {name for name, _ in dense.named_parameters()}
    for name, parameter in dense.named_parameters():
        mask = ticket.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        expected = parameter.grad[mask].view_as(gradients[name])
        torch.testing.assert_close(gradients[name], expected, **EXACT)


# Training


@dataclass(frozen=True)
class Run:
    """One model to train; `clip` lies between its smallest and its largest gradient norm.

    In float64, as clipping adds up the norm in another order. Where the last bit of a sum decides
    on which side of a ReLU or max-pool kink a value falls, equal trainings part.
    """

    name: str
    options: dict[str, Any]
    sparsity: float
    clip: float

    def model(self) -> nn.Module:
        config = ModelConfig(self.name, self.options)
        model = zoo.create(config, num_classes=10, in_chans=1, image_size=16, seed=0)
        return model.double().train()


RUNS = {
    "resnet": Run("test_resnet", {}, 0.9, 5.0),
    "vit": Run("test_vit", {"patch_size": 4}, 0.5, 1.0),
}


def digits_batches() -> list[tuple[Tensor, Tensor]]:
    source = sets.load("digits")
    found = [
        (source.prepare(pixels).double(), labels)
        for epoch in range(2)
        for pixels, labels in source.train.shuffled(BATCH, seed=0, epoch=epoch)
    ]
    return found[:STEPS]


def masked_dense_optimizer(model: nn.Module, chosen: dict[str, Tensor]) -> torch.optim.Optimizer:
    parameters = dict(model.named_parameters())
    decay = [parameters[name] for name in chosen]
    rest = [parameter for name, parameter in parameters.items() if name not in chosen]
    groups = [{"params": decay, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE)


def train_masked_dense(
    model: nn.Module, chosen: dict[str, Tensor], batches: list[tuple[Tensor, Tensor]], clip: float
) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms; pruned weights are held at zero by force."""
    optimizer = masked_dense_optimizer(model, chosen)
    weights = {name: model.get_parameter(name) for name in chosen}
    losses, norms = [], []
    for pixels, labels in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(pixels).float(), labels)
        loss.backward()
        for name, weight in weights.items():
            weight.grad.mul_(chosen[name])
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(chosen[name])
        losses.append(loss.item())
    return losses, norms


def train_compact(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], clip: float
) -> list[float]:
    config = TrainingConfig(
        learning_rate=RATE, weight_decay=DECAY, clip_grad=clip, schedule="none", optimizer="adamw"
    )
    stepper = steppers.PlainStepper(model, config, steps_per_epoch=STEPS)
    return [stepper.step(pixels, labels).item() for pixels, labels in batches]


@pytest.mark.parametrize("name", few(RUNS, ["resnet"]))
def test_compact_training_is_masked_dense_training(name: str) -> None:
    run, batches = RUNS[name], digits_batches()
    model = run.model()
    ticket = random_ticket(model, run.sparsity)
    reference = masked(model, ticket)
    expected, norms = train_masked_dense(reference, ticket.masks, batches, run.clip)
    losses = train_compact(compact(model, ticket), batches, run.clip)
    assert len(expected) == STEPS
    assert min(norms) < run.clip < max(norms)
    assert expected[-1] < expected[0] - 0.05
    # Losses are float32: one below 4 lies within 2.4e-7 of its neighbours.
    assert losses == pytest.approx(expected, rel=0, abs=2e-6)


# What a compact model is made of


def test_parameter_count_is_the_survivors_and_the_rest() -> None:
    model = conv_net()
    ticket = random_ticket(model, 0.75)
    weights = 6 * 2 * 9 + 6 * 2 * 9 + 96 * 5
    biases_and_norms = 6 + 6 + 6 + 5
    assert ticket.kept == weights / 4
    compact(model, ticket)
    assert sum(each.numel() for each in model.parameters()) == weights / 4 + biases_and_norms


def test_a_weight_that_is_kept_whole_stays_an_ordinary_parameter() -> None:
    model = conv_net()
    ticket = random_ticket(model)
    ticket.masks["0.weight"][:] = True
    ticket = Ticket.from_model(model, ticket.masks, {})
    compact(model, ticket)
    assert isinstance(model[0].weight, nn.Parameter)
    assert [name for name, _ in compact_weights(model)] == ["3.weight", "5.weight"]


def test_compact_weights_give_names_and_masks_back() -> None:
    model = Attention()
    ticket = random_ticket(model)
    found = {name: weight.mask() for name, weight in compact_weights(compact(model, ticket))}
    assert found.keys() == {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert all(torch.equal(found[name], mask) for name, mask in ticket.masks.items())


def test_state_dict_holds_values_and_eight_bytes_for_each_mask() -> None:
    model = conv_net()
    dense = {name: tensor.shape for name, tensor in model.state_dict().items()}
    ticket = random_ticket(model)
    state = compact(model, ticket).state_dict()
    marks = {name: state.pop(name) for name in list(state) if name.endswith(".fingerprint")}
    assert [(mark.dtype, mark.shape) for mark in marks.values()] == [(torch.uint8, (8,))] * 3
    assert {dense_name(name) for name in state} == set(dense)
    for name, tensor in state.items():
        plain = dense_name(name)
        kept = ticket.masks[plain].sum() if plain in ticket.masks else None
        assert tensor.shape == (dense[plain] if kept is None else (kept,))


def test_state_dict_goes_into_another_compact_model() -> None:
    model, other = conv_net(), conv_net()
    ticket = random_ticket(model)
    compact(model, ticket)
    compact(other, ticket)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images()), model.eval()(images()))


def test_a_state_dict_of_another_ticket_is_refused() -> None:
    """The masks keep as many weights of every layer, so that all shapes fit."""
    model, other = conv_net(), conv_net()
    ticket = random_ticket(model)
    turned = {name: mask.flip(0) for name, mask in ticket.masks.items()}
    assert any(not torch.equal(mask, turned[name]) for name, mask in ticket.masks.items())
    compact(model, ticket)
    compact(other, Ticket.from_model(other, turned, {}))
    state = model.state_dict()
    with pytest.raises(UsageError, match=r"of another ticket: it keeps other weights of 0\.weight"):
        other.load_state_dict(state)
    with pytest.raises(UsageError, match="of another ticket"):
        other.load_state_dict(state, strict=False)


def test_where_a_state_dict_is_refused_nothing_is_loaded() -> None:
    """Only the last layer has another mask; the first ones come before it."""
    model, other = conv_net(), conv_net()
    ticket = random_ticket(model)
    compact(model, ticket)
    turned = {**ticket.masks, "5.weight": ticket.masks["5.weight"].flip(0)}
    compact(other, Ticket.from_model(other, turned, {}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    holder = nn.ModuleDict({"net": other})
    with pytest.raises(UsageError, match=r"it keeps other weights of net\.5\.weight"):
        holder.load_state_dict({f"net.{key}": each for key, each in model.state_dict().items()})
    assert all(torch.equal(each, before[key]) for key, each in other.state_dict().items())
    assert nn.ModuleDict({"net": densify(other)}).load_state_dict(
        {f"net.{key}": each for key, each in conv_net().state_dict().items()}
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_state_dict_survives_casts_and_files(tmp_path: Path, dtype: torch.dtype) -> None:
    """Some libraries cast whatever a state dict holds; a mask's eight bytes are exact in all."""
    model, other = conv_net(), conv_net()
    ticket = random_ticket(model)
    state = compact(model, ticket).to(dtype).state_dict()
    assert state["0.parametrizations.weight.0.fingerprint"].dtype == torch.uint8
    save_file(state, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    compact(other, ticket)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})


def test_a_state_dict_from_before_there_were_fingerprints_is_taken() -> None:
    model, other = conv_net(), conv_net()
    ticket = random_ticket(model)
    state = compact(model, ticket).state_dict()
    compact(other, ticket)
    old = {name: tensor for name, tensor in state.items() if not name.endswith(".fingerprint")}
    assert not any(other.load_state_dict(old, strict=True))


def test_positions_are_int32() -> None:
    model = compact(conv_net(), random_ticket(conv_net()))
    assert {weight.index.dtype for _, weight in compact_weights(model)} == {torch.int32}


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("layer1.0.parametrizations.weight.original", "layer1.0.weight"),
        ("parametrizations.weight.original", "weight"),
        ("attn.parametrizations.in_proj_weight.original", "attn.in_proj_weight"),
        ("layer1.0.weight", "layer1.0.weight"),
        ("norm.original", "norm.original"),
    ],
)
def test_dense_name(name: str, dense: str) -> None:
    assert dense_name(name) == dense


def test_deepcopy_is_equal_and_independent() -> None:
    model = compact(conv_net(), random_ticket(conv_net())).eval()
    before = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(images()), before)
    assert not twin(images()).any()
    assert isinstance(densify(twin)[0].weight, nn.Parameter)


def test_a_compact_model_is_not_compacted_again() -> None:
    model, ticket = conv_net(), random_ticket(conv_net())
    compact(model, ticket)
    with pytest.raises(UsageError, match="compact already"):
        compact(model, ticket)


def test_a_ticket_for_another_model_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    before = copy.deepcopy(model.state_dict())
    ticket = random_ticket(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    with pytest.raises(UsageError, match=r"1\.weight"):
        compact(model, ticket)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_weights_stay_frozen() -> None:
    model = conv_net()
    ticket = random_ticket(model)
    model[0].weight.requires_grad_(False)
    compact(model, ticket)
    assert not model[0].parametrizations.weight.original.requires_grad
    assert model[3].parametrizations.weight.original.requires_grad
    densify(model)
    assert [model[place].weight.requires_grad for place in (0, 3, 5)] == [False, True, True]


# Densify


def test_densify_puts_zeros_and_plain_names() -> None:
    model = conv_net()
    ticket = random_ticket(model)
    expected = masked(model, ticket).state_dict()
    densify(compact(model, ticket))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert type(model[0]) is nn.Conv2d
    assert all(isinstance(model[place].weight, nn.Parameter) for place in (0, 3, 5))
    assert not list(compact_weights(model))


def test_a_dense_model_stays_as_it_is() -> None:
    model = conv_net()
    weights = [id(parameter) for parameter in model.parameters()]
    assert [id(parameter) for parameter in densify(model).parameters()] == weights


# Tied weights


def test_tied_weights_stay_tied_when_compact() -> None:
    model = Tied()
    ticket = random_ticket(model, 0.5)
    compact(model, ticket)
    first, last = (each.parametrizations.weight for each in (model.first, model.last))
    assert first.original is last.original
    assert sum(each.numel() for each in model.parameters()) == 25 + 15
    with torch.no_grad():
        first.original.add_(1)
    assert torch.equal(model.first.weight, model.last.weight)


def test_tied_weights_stay_tied_when_densified() -> None:
    model = Tied()
    ticket = random_ticket(model, 0.5)
    expected = masked(model, ticket)
    densify(compact(model, ticket))
    assert model.first.weight is model.last.weight
    assert torch.equal(model.first.weight, expected.first.weight)
    assert torch.equal(model.middle.weight, expected.middle.weight)


# Layer collapse


def empty_first_layer() -> tuple[nn.Module, Ticket]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    chosen = {"0.weight": torch.zeros(4, 3).bool(), "1.weight": torch.ones(2, 4).bool()}
    return model, Ticket.from_model(model, chosen, {})


def test_an_empty_layer_gives_its_bias() -> None:
    model, ticket = empty_first_layer()
    expected = model[1](model[0].bias).detach().expand(5, 2)
    outputs = compact(model, ticket)(torch.randn(5, 3))
    torch.testing.assert_close(outputs, expected)


def test_an_empty_layer_is_trained_and_densified() -> None:
    model, ticket = empty_first_layer()
    bias = model[0].bias.detach().clone()
    compact(model, ticket)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert model[0].parametrizations.weight.original.grad.shape == (0,)
    assert not torch.equal(model[0].bias, bias)
    assert not densify(model)[0].weight.any()


def _gradients(
    model: nn.Module, inputs: Tensor, *, rescatter: bool, bf16: bool
) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)  # Dropout.
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), rescattering(rescatter):
        outputs = model(inputs).double()
    outputs.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _some_model(name: str) -> tuple[nn.Module, Tensor]:
    if name == "tied":
        model, inputs = Tied(), torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    else:
        options = {"patch_size": 4} if "vit" in name else {}
        config = ModelConfig(name, {"drop_path_rate": 0.2, **options})
        model = zoo.create(config, num_classes=10, in_chans=1, image_size=16, seed=0)
        inputs = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(7))
    return compact(model, random_ticket(model)), inputs


BF16 = 2.0**-8
"""Half the relative distance between neighbours in bfloat16."""


@pytest.mark.parametrize(
    ("name", "bf16"),
    [("test_byobnet", False), ("test_nfnet", False), ("test_vit", False), ("test_vit", True),
     ("tied", False), ("tied", True)],
)  # fmt: skip
def test_scattered_again_gradients_are_the_same(name: str, bf16: bool) -> None:
    """To the rounding of float64, or to four roundings of bf16 at the size of the largest value.

    Not bf16 convolutions: on a CPU those of 2 x 2 pixels differ from one call to the next.
    """
    model, inputs = _some_model(name)
    if not bf16:
        model, inputs = model.double(), inputs.double()
    expected = _gradients(model, inputs, rescatter=False, bf16=bf16)
    found = _gradients(model, inputs, rescatter=True, bf16=bf16)
    assert found.keys() == expected.keys()
    assert any(bool(gradient.any()) for gradient in found.values())
    for name_of, gradient in expected.items():
        close = 4 * BF16 * float(gradient.abs().max()) if bf16 else 1e-12
        torch.testing.assert_close(found[name_of], gradient, rtol=close, atol=close, msg=name_of)


@pytest.mark.parametrize("name", ["test_byobnet", "test_vit"])
def test_scattered_again_at_most_one_layer_is_dense(name: str, monkeypatch) -> None:
    model, inputs = _some_model(name)
    scattered: list[StorageWeakRef] = []
    most = {"forward": 0, "backward": 0}

    def note(dense: Tensor, where: str) -> None:
        scattered.append(StorageWeakRef(dense.untyped_storage()))
        most[where] = max(most[where], alive())

    def alive() -> int:
        return sum(not each.expired() for each in scattered)

    for _, weight in compact_weights(model):
        weight.register_forward_hook(lambda module, given, dense: note(dense, "forward"))
    again = compaction._Rescatter.__call__

    def noted(kept: Any) -> Tensor:
        dense = again(kept)
        note(dense, "backward")
        return dense

    monkeypatch.setattr(compaction._Rescatter, "__call__", noted)
    layers = len(list(compact_weights(model)))
    outputs = model(inputs)
    assert (alive(), most["forward"]) == (layers, layers), "autograd keeps all of them"
    del outputs
    assert alive() == 0
    scattered.clear()
    most["forward"] = 0
    with rescattering():
        outputs = model(inputs)
    assert (alive(), most["forward"]) == (0, 1)
    outputs.square().mean().backward()
    assert (alive(), most["backward"]) == (0, 1)
    assert len(scattered) >= 2 * layers - 1, "the first layer needs none in backward"


def test_scattering_again_ends_with_its_block() -> None:
    model, inputs = _some_model("test_byobnet")
    with pytest.raises(ZeroDivisionError), rescattering():
        raise ZeroDivisionError
    assert compaction._SCATTERED is None
    with rescattering(), rescattering(enabled=False):
        model(inputs).sum().backward()
    assert compaction._SCATTERED is None


def test_values_that_change_before_they_are_scattered_again_are_refused() -> None:
    model, inputs = _some_model("test_byobnet")
    with rescattering():
        outputs = model(inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        outputs.sum().backward()
