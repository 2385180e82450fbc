"""Products with surviving weights only: the numbers of dense ones, and no dense weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn
from torch.nn import functional

from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity import compact as compaction
from autosparse.sparsity import cpu_products, masks
from autosparse.sparsity.compact import compact_weights, densify, multiply_sparse
from autosparse.sparsity.cpu_products import Pattern, SparseWeight, pays, sparse_weight
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import PlainStepper
from tests.conftest import few

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="sparse products need MKL"
)


def never() -> Tensor:
    raise AssertionError("a dense weight was made")


def some_weight(
    shape: tuple[int, ...], density: float = 0.2, dense: Callable[[], Tensor] = never
) -> tuple[Tensor, Tensor, Tensor, SparseWeight]:
    """Return the dense weight (zero where pruned), its positions, its values, and it as sparse."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < density
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) * mask
    index = mask.flatten().nonzero().squeeze(1).int()
    values = weight.flatten()[index].requires_grad_()
    pattern = Pattern(index, shape)
    return (
        weight.requires_grad_(),
        index,
        values,
        sparse_weight(values, pattern, dense),
    )


def assert_same(
    dense: Callable[..., Tensor], shape: tuple[int, ...], inputs: Tensor, **options: Any
) -> None:
    """Outputs, and gradients by values, inputs and bias, are those of the dense weight."""
    weight, index, values, sparse = some_weight(shape)
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    inputs = inputs.double().requires_grad_()
    expected = dense(inputs, weight, bias, **options)
    found = dense(inputs, sparse, bias, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    back = torch.randn(expected.shape, dtype=torch.float64)
    by_weight, *wanted = torch.autograd.grad(expected, [weight, inputs, bias], back)
    gradients = torch.autograd.grad(found, [values, inputs, bias], back)
    wanted = [by_weight.flatten()[index], *wanted]
    torch.testing.assert_close(list(gradients), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 4, 5)])
def test_linear(shape: tuple[int, ...]) -> None:
    assert_same(functional.linear, (7, 5), torch.randn(shape))


@pytest.mark.parametrize("block", [1, 200, cpu_products.BLOCK])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((1, 1), {}),
        ((1, 1), {"stride": 2}),
        ((3, 3), {"padding": 1}),
        ((3, 3), {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 1)}),
        ((2, 4), {"stride": 2, "padding": 1, "dilation": 2}),
        ((7, 7), {"stride": 2, "padding": 3}),
    ],
)
def test_convolution(
    kernel: tuple[int, int], options: dict[str, Any], block: int, monkeypatch
) -> None:
    monkeypatch.setattr(cpu_products, "BLOCK", block)
    assert_same(functional.conv2d, (6, 3, *kernel), torch.randn(5, 3, 9, 8), **options)


def test_what_has_no_sparse_product_is_done_dense() -> None:
    made = []
    weight, _, _, sparse = some_weight((6, 1, 3, 3), dense=lambda: made.append(1) or weight)
    images = torch.randn(2, 6, 5, 5).double()
    wanted = functional.conv2d(images, weight, groups=6)
    assert torch.equal(functional.conv2d(images, sparse, groups=6), wanted)
    assert torch.equal(sparse.reshape(6, -1), weight.reshape(6, -1))
    assert torch.equal(2 * sparse, 2 * weight)
    assert made == [1, 1, 1]
    assert (sparse.shape, sparse.ndim, sparse.dtype) == (weight.shape, 4, torch.float64)
    assert made == [1, 1, 1], "its shape needs no dense weight"


class _Own(torch.autograd.Function):
    """A product of somebody's own, as DeepSpeed has one for linear layers under ZeRO 3."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.t() @ ctx.saved_tensors[0]


def test_the_gradient_of_a_function_of_ones_own_arrives() -> None:
    weight, index, values, sparse = some_weight((7, 5), dense=lambda: weight)
    inputs = torch.randn(3, 5).double()
    outputs = _Own.apply(inputs, sparse)
    outputs.square().sum().backward()
    (wanted,) = torch.autograd.grad((inputs @ weight.t()).square().sum(), weight)
    torch.testing.assert_close(values.grad, wanted.flatten()[index])


def test_channels_last_stays_channels_last() -> None:
    _, _, _, sparse = some_weight((6, 3, 3, 3))
    images = torch.randn(2, 3, 5, 5).double().contiguous(memory_format=torch.channels_last)
    outputs = functional.conv2d(images, sparse)
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    assert functional.conv2d(images.contiguous(), sparse).is_contiguous()


def test_when_they_pay() -> None:
    """512 of 512 x 512 weights laid out by row: 8 x (kept + 6 x 512) below 512 x 512."""
    assert pays(29_000, (512, 512))
    assert not pays(29_696, (512, 512))
    assert not pays(0, (512, 512))
    assert not pays(10, (16, 144)), "narrow layers never"


def _wide(sparsity: float = 0.98) -> tuple[nn.Module, Ticket]:
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=10)
    weights = zoo.prunable(model).items()
    scores = {name: torch.rand(weight.shape) for name, weight in weights}
    ticket = Ticket.from_model(model, masks.from_scores(scores, sparsity), {})
    return compact(model, ticket), ticket


def test_wide_layers_of_a_model_never_become_dense(monkeypatch) -> None:
    model, _ = _wide()
    multiply_sparse(model)
    sparse = {name for name, weight in compact_weights(model) if weight.pattern is not None}
    assert "layer4.0.conv2.weight" in sparse
    assert len(sparse) > 8
    made = set()
    scatter = compaction.CompactWeight.dense

    def noted(weight: compaction.CompactWeight, values: Tensor) -> Tensor:
        made.add(id(weight))
        return scatter(weight, values)

    monkeypatch.setattr(compaction.CompactWeight, "dense", noted)
    twin = copy.deepcopy(model)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    twin(torch.randn(2, 3, 32, 32))
    rest = {id(w) for each in (model, twin) for name, w in compact_weights(each)
            if name not in sparse}  # fmt: skip
    assert made == rest
    assert all(
        weight.pattern is None for _, weight in compact_weights(multiply_sparse(model, False))
    )


@pytest.mark.parametrize(
    "name",
    few(["test_byobnet", "test_vit", "test_nfnet", "test_convnext"], ["test_byobnet", "test_vit"]),
)
def test_training_is_that_of_scattered_weights(name: str, monkeypatch) -> None:
    """Ten steps, every layer that can by sparse products, in float64."""
    monkeypatch.setattr(compaction, "pays", lambda kept, shape: kept > 0)
    images, labels = torch.randn(8, 1, 32, 32).double(), torch.arange(8)
    losses, weights = {}, {}
    for sparse in (False, True):
        model = zoo.create(ModelConfig(name), num_classes=10, in_chans=1, image_size=32, seed=0)
        scores = {n: torch.rand(w.shape, generator=torch.Generator().manual_seed(1))
                  for n, w in zoo.prunable(model).items()}  # fmt: skip
        compact(model, Ticket.from_model(model, masks.from_scores(scores, 0.7), {})).double()
        config = TrainingConfig(schedule="none", sparse_products=sparse, ema=0.9)
        stepper = PlainStepper(model, config, 10)
        assert sparse == any(weight.pattern for _, weight in compact_weights(model))
        model.train()
        torch.manual_seed(0)
        losses[sparse] = [float(stepper.step(images, labels)) for _ in range(10)]
        weights[sparse] = densify(stepper.evaluated()).state_dict()
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-4, atol=1e-6)


def test_evaluation_and_autocast(monkeypatch) -> None:
    """Without a gradient too; what runs in bfloat16 runs dense."""
    model, _ = _wide()
    model.double().eval()
    images = torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        expected = model(images)
        multiply_sparse(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
        model.float()
        monkeypatch.setattr(Pattern, "matrix", lambda *_: pytest.fail("a sparse product was made"))
        with pytest.raises(pytest.fail.Exception):
            model(images.float())
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images.float())
    # Twelve layers, each of which rounds by up to 2^-8 of its values.
    assert (rough - expected).norm() < 12 * 2**-8 * expected.norm()
