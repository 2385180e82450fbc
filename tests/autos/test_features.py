"""Features: against a loop over single weights, in any chunks, and free of scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from autosparse.autos import features
from autosparse.core.errors import UsageError
from autosparse.models import zoo
from autosparse.models.config import ModelConfig

Tensors = dict[str, Tensor]
SHAPES = {
    "conv": (4, 3, 2, 2),
    "depthwise": (5, 1, 3, 3),
    "conv1d": (3, 2, 4),
    "linear": (6, 5),
}


def example(seed: int = 0) -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(seed)
    draw = [
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(2)
    ]
    draw[0]["conv"][1] *= 40
    draw[0]["linear"][:, 2] *= 1e-4
    return draw[0], draw[1]


def whole(
    kind: str, layer: str, weights: dict[str, Tensor], gradients: dict[str, Tensor]
) -> Tensor:
    """Return the features [F, N] of one layer."""
    context = features.contexts(weights, gradients)[layer]
    pieces = features.layer_features(kind, weights[layer], gradients[layer], context)
    return torch.cat(list(pieces), dim=1)


def rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def clipped_log(value: float) -> float:
    return min(max(math.log(value), -3.0), 3.0)


def one_by_one(weights: Tensors, gradients: Tensors, layer: str) -> Tensor:
    """Return the `context` features of one layer, worked out weight by weight in plain floats."""
    mass = {
        name: sum((weights[name] * gradients[name]).abs().flatten().tolist()) for name in weights
    }
    total = sum(weight.numel() for weight in weights.values())
    weight, gradient = weights[layer], gradients[layer]
    fan_out, fan_in = weight.shape[:2]
    kernel = math.prod(weight.shape[2:])
    w = weight.reshape(fan_out, fan_in, kernel).tolist()
    g = gradient.reshape(fan_out, fan_in, kernel).tolist()
    places = [
        (out, in_, at) for out in range(fan_out) for in_ in range(fan_in) for at in range(kernel)
    ]

    def strength(values: list, out: int | None = None, in_: int | None = None) -> float:
        """Return the rms over the weights of an output or an input channel, or all of them."""
        return rms([values[o][i][k] for o, i, k in places if out in (None, o) and in_ in (None, i)])

    product_rms = rms([w[o][i][k] * g[o][i][k] for o, i, k in places])
    count = weight.numel()
    constants = [
        math.log10(count) - 4,
        math.log10(count / total) + 1,
        math.log10(fan_in * kernel) - 2,
        math.log10(fan_out) - 1.5,
        math.log10(kernel),
        list(weights).index(layer) / (len(weights) - 1),
        math.log10((mass[layer] / count) / (sum(mass.values()) / total)),
    ]
    rows = [
        [
            abs(w[o][i][k]) / strength(w),
            math.asinh(abs(g[o][i][k]) / strength(g)),
            math.asinh(w[o][i][k] * g[o][i][k] / product_rms),
            clipped_log(strength(w, out=o) / strength(w)),
            clipped_log(strength(g, out=o) / strength(g)),
            clipped_log(strength(w, in_=i) / strength(w)),
            clipped_log(strength(g, in_=i) / strength(g)),
            *constants,
        ]
        for o, i, k in places
    ]
    return torch.tensor(rows).t()


@pytest.mark.parametrize("layer", SHAPES)
def test_context_features_weight_by_weight(layer: str) -> None:
    weights, gradients = example()
    found = whole("context", layer, weights, gradients)
    assert found.shape == (len(features.KINDS["context"]), weights[layer].numel())
    torch.testing.assert_close(found, one_by_one(weights, gradients, layer), rtol=1e-4, atol=1e-5)


def test_the_example_reaches_the_clipping() -> None:
    weights, gradients = example()
    inputs = features.KINDS["context"]
    found = whole("context", "linear", weights, gradients)
    assert found[inputs.index("in_channel_weight")].min() == -3


@pytest.mark.parametrize("layer", SHAPES)
def test_paper_features_are_weight_and_gradient(layer: str) -> None:
    weights, gradients = example()
    found = whole("paper", layer, weights, gradients)
    assert torch.equal(found[0], weights[layer].flatten())
    assert torch.equal(found[1], gradients[layer].flatten())


@pytest.mark.parametrize("chunk", [1, 5, 12, 13, 40])
@pytest.mark.parametrize("kind", features.KINDS)
@pytest.mark.parametrize("layer", SHAPES)
def test_chunks_make_no_difference(
    layer: str, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, gradients = example()
    expected = whole(kind, layer, weights, gradients)
    monkeypatch.setattr(features, "CHUNK", chunk)
    context = features.contexts(weights, gradients)[layer]
    pieces = list(features.layer_features(kind, weights[layer], gradients[layer], context))
    row = weights[layer][0].numel()
    assert max(piece.shape[1] for piece in pieces) <= max(chunk, row)
    assert len(pieces) > 1 or chunk + row > weights[layer].numel()
    # Some five float32 operations an entry; the end of a chunk may take another kernel.
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-6, atol=1e-6)


# Scale


def changed_inputs(before: Tensor, after: Tensor) -> set[str]:
    """Return which inputs differ by more than rounding."""
    same = torch.isclose(before, after, rtol=1e-4, atol=1e-5).all(dim=1).tolist()
    return {name for name, equal in zip(features.KINDS["context"], same, strict=True) if not equal}


@pytest.mark.parametrize("factor", [10.0, 1e-3])
@pytest.mark.parametrize("scaled", ["weights", "gradients"])
def test_the_scale_of_a_whole_model_does_not_matter(scaled: str, factor: float) -> None:
    weights, gradients = example()
    larger = {"weights": weights, "gradients": gradients}
    larger[scaled] = {name: tensor * factor for name, tensor in larger[scaled].items()}
    for layer in SHAPES:
        before = whole("context", layer, weights, gradients)
        assert not changed_inputs(before, whole("context", layer, **larger))


@pytest.mark.parametrize("scaled", ["weights", "gradients"])
@pytest.mark.parametrize("layer", SHAPES)
def test_the_scale_of_one_layer_only_moves_its_share_of_the_gradient_mass(
    layer: str, scaled: str
) -> None:
    weights, gradients = example()
    larger = {"weights": dict(weights), "gradients": dict(gradients)}
    larger[scaled][layer] = larger[scaled][layer] * 10
    before = whole("context", layer, weights, gradients)
    after = whole("context", layer, **larger)
    assert changed_inputs(before, after) == {"layer_sensitivity"}


def test_layer_sensitivity_by_hand() -> None:
    weights = {"a": torch.ones(2, 2), "b": torch.ones(1, 2)}
    gradients = {"a": torch.full((2, 2), 1.0), "b": torch.full((1, 2), -10.0)}
    mean = (4 * 1 + 2 * 10) / 6
    found = features.contexts(weights, gradients)
    assert found["a"][-1] == pytest.approx(math.log10(1 / mean))
    assert found["b"][-1] == pytest.approx(math.log10(10 / mean))


def test_layer_sensitivity_is_held_within_three_decades() -> None:
    weights = {"a": torch.ones(3, 3), "b": torch.ones(3, 3)}
    gradients = {"a": torch.ones(3, 3), "b": torch.full((3, 3), 1e-9)}
    assert features.contexts(weights, gradients)["b"][-1] == -3


# Odd cases


def test_constants_by_hand() -> None:
    weights = {"a": torch.ones(10, 20, 5, 1), "b": torch.ones(10, 900)}
    found = features.contexts(weights, {name: each.clone() for name, each in weights.items()})
    fan_in, fan_out, kernel = math.log10(100) - 2, math.log10(10) - 1.5, math.log10(5)
    assert found["a"] == pytest.approx(
        (math.log10(1000) - 4, math.log10(0.1) + 1, fan_in, fan_out, kernel, 0, 0)
    )
    assert found["b"][5] == 1


@pytest.mark.parametrize("kind", features.KINDS)
@pytest.mark.parametrize("zero", ["weights", "gradients", "both"])
def test_zeros_give_finite_features(kind: str, zero: str) -> None:
    weights, gradients = example()
    if zero != "gradients":
        weights["conv"].zero_()
    if zero != "weights":
        gradients["conv"].zero_()
    assert whole(kind, "conv", weights, gradients).isfinite().all()


def test_a_model_of_one_layer() -> None:
    weights, gradients = {"only": torch.randn(3, 2)}, {"only": torch.randn(3, 2)}
    found = whole("context", "only", weights, gradients)
    assert found.isfinite().all()
    assert not found[features.KINDS["context"].index("depth")].any()


def test_weights_and_gradients_are_not_changed() -> None:
    weights, gradients = example()
    whole("context", "conv", weights, gradients)
    again = example()
    assert all(torch.equal(weights[name], again[0][name]) for name in SHAPES)
    assert all(torch.equal(gradients[name], again[1][name]) for name in SHAPES)


class Shared(nn.Module):
    """A convolution called twice, one with a hole, a linear layer, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 5)
        self.idle = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return [N, 5]."""
        found = self.norm(self.twice(self.twice(self.first(images))))
        return self.last(found.mean((2, 3)))


def test_uses_by_hand() -> None:
    model = Shared()
    names = [f"{name}.weight" for name in ("first", "twice", "last", "idle")]
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = features.uses(model, names, torch.randn(1, 3, 8, 8))
    # Stride 2 makes 4 x 4 of 8 x 8; that is seen twice; the last once; the mean of 16, 32, 1 is 8.
    assert found == pytest.approx(dict(zip(names, (16, 32, 1, 8), strict=True)))
    assert model.training and not model.norm.training
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_uses_in_a_transformer_are_tokens() -> None:
    config = ModelConfig("test_vit", {"patch_size": 8})
    model = zoo.create(config, num_classes=10, in_chans=3, image_size=32, seed=0)
    found = features.uses(model, zoo.prunable(model), torch.zeros(1, 3, 32, 32))
    # 4 x 4 patches and a class token, whose value alone the classifier sees.
    assert found.pop("patch_embed.proj.weight") == 16
    assert found.pop("head.weight") == 1
    assert set(found.values()) == {17}


def test_uses_in_torchs_attention() -> None:
    """Five tokens see all four layers, though attention does not call its projection."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = features.uses(layer, zoo.prunable(layer), torch.zeros(1, 5, 8))
    assert len(found) == 4
    assert set(found.values()) == {5}


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown kind of features 'contxt'.*'context'"):
        features.names_of("contxt")


def test_what_half_precision_cannot_hold_is_weighed_in_float32() -> None:
    """A weight of 1e-3 with a gradient of 1e-5: their product is below float16's least."""
    weights = {name: torch.full((2, 3), size).half() for name, size in (("a", 1e-3), ("b", 1.0))}
    gradients = {"a": torch.full((2, 3), 1e-5).half(), "b": torch.full((2, 3), 1e-7).half()}
    in_float32 = [{n: t.float() for n, t in each.items()} for each in (weights, gradients)]
    assert features.contexts(weights, gradients) == features.contexts(*in_float32)


def test_a_weight_is_used_wherever_it_is_held() -> None:
    """3 x 3 pixels in the first convolution, 1 in the second, which shares its weight."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    found = features.uses(model, zoo.prunable(model), torch.ones(1, 2, 5, 5))
    assert found == {"0.weight": 10, "3.weight": 1}


def test_a_module_of_two_names_is_used_as_often_as_it_is_called() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Conv2d(2, 2, 3)
            self.last = nn.Linear(2, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(self.one(images).flatten(1))

    model = Twice()
    found = features.uses(model, zoo.prunable(model), torch.ones(1, 2, 3, 3))
    assert found == {"one.weight": 1, "last.weight": 1}
