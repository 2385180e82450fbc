"""All weights scattered at once: what scattering each by itself gives, bit for bit."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from autosparse.core.errors import UsageError
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity.compact import GIVEN, compact_weights, densify, rescattering
from autosparse.sparsity.ticket import compact
from autosparse.training import flat_scatter
from autosparse.training.config import TrainingConfig
from autosparse.training.flat_scatter import FlatScatter, chosen
from autosparse.training.steppers import PlainStepper, lay_out
from tests.conftest import grid
from tests.sparsity.test_compact import Attention, Tied, random_ticket

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTINGS = TrainingConfig(
    schedule="none", learning_rate=1e-3, clip_grad=1.0, sparse_products=False, scatter="flat"
)


@pytest.fixture()
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Triton's kernels, run by its interpreter."""
    name = "autosparse.training.flat_kernels"
    before = sys.modules.pop(name, None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield import_module(name)
    sys.modules.pop(name)
    if before is not None:
        sys.modules[name] = before


def net(name: str, sparsity: float = 0.8, **options) -> nn.Module:
    if "vit" in name:
        options.setdefault("patch_size", 4)
    config = ModelConfig(name, options)
    model = zoo.create(config, num_classes=10, in_chans=1, image_size=16, seed=0)
    return compact(model, random_ticket(model, sparsity))


def batch(step: int = 0, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(count, 1, 16, 16, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def trained(name: str, steps: int = 3, **changes) -> tuple[list[float], dict[str, Tensor]]:
    stepper = PlainStepper(net(name), replace(SETTINGS, **changes), steps)
    stepper.model.train()
    losses = [float(stepper.step(*batch(step))) for step in range(steps)]
    return losses, stepper.state_dict()


def assert_equal(found: tuple[list[float], dict], expected: tuple[list[float], dict]) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert torch.equal(found[1][name], tensor), name


TRAININGS = [
    ("test_resnet", {}),
    ("test_byobnet", {"channels_last": True}),
    ("test_vit", {"precision": "bf16"}),
    ("test_nfnet", {}),
    ("test_vit", {"grad_checkpointing": True}),
]


@pytest.mark.parametrize(("training", "largest"), grid(TRAININGS, [1, 1 << 12, 1 << 24], each=1))
def test_trainings_are_equal(
    training: tuple[str, dict], largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes = training
    monkeypatch.setattr(flat_scatter, "LARGEST", largest)
    expected = trained(name, **{**changes, "scatter": "each"})
    assert_equal(trained(name, **changes), expected)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("test_resnet", {"channels_last": True}),
        ("test_vit", {"precision": "fp32"}),
        ("test_nfnet", {}),
    ],
)
def test_triton_kernels_train_the_same(
    kernels: ModuleType, name: str, changes: dict, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(name, steps=2, **changes)
    found = trained(name, steps=2, **{**changes, "scatter": "triton"})
    assert not caplog.messages
    assert_equal(found, expected)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_triton_kernels_against_plain_operations(
    kernels: ModuleType, low: torch.dtype, index: torch.dtype
) -> None:
    """Weights of more than a block, of none, of one survivor; one value is not a number.

    Triton's interpreter cuts bits off where a GPU rounds to bf16, so here nothing has to be
    rounded; `try_out` looks at the rounding on a GPU.
    """
    counts, sizes = [kernels.BLOCK + 5, 0, 1, 3 * kernels.BLOCK], [5000, 64, 64, 4096]
    generator = torch.Generator().manual_seed(1)
    starts = [0, 5056, 5120, 5184, 9280]
    places = [
        torch.randperm(size, generator=generator)[:n] for n, size in zip(counts, sizes, strict=True)
    ]
    values = [torch.randn(n, generator=generator).to(low).float() for n in counts]
    values[3][7] = math.nan
    whole = torch.cat([each + at for each, at in zip(places, starts, strict=False)]).to(index)
    both = kernels.Kernels(counts, starts, whole, values[0])
    memory = torch.zeros(starts[-1], dtype=low)
    both.scatter(values, memory)
    expected = torch.zeros_like(memory).scatter_(0, whole.long(), torch.cat(values).to(low))
    assert torch.equal(memory.nan_to_num(7.5), expected.nan_to_num(7.5))
    gradients = [torch.randn(size, generator=generator).to(low) for size in sizes]
    for found, gradient, place in zip(both.gather(gradients), gradients, places, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, gradient[place].float())


def test_addresses_are_sent_when_they_change(kernels: ModuleType) -> None:
    table = kernels.Addresses(CPU)
    first, second = torch.zeros(3), torch.zeros(3)
    sent = table.of([first, second])
    assert sent.tolist() == [first.data_ptr(), second.data_ptr()]
    assert table.of([first, second]) is sent
    assert table.of([second, first]).tolist() == [second.data_ptr(), first.data_ptr()]


def test_where_triton_does_not_run_one_line_says_so(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*arguments, **options) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    expected = trained("test_vit", steps=1)
    monkeypatch.setattr(kernels.Kernels, "_run", no_compiler)
    found = trained("test_vit", steps=1, scatter="triton")
    assert caplog.messages == [
        "Triton's kernels do not run here (RuntimeError: Failed to find C compiler.); "
        "compact weights are gathered one by one"
    ]
    assert_equal(found, expected)


@pytest.mark.parametrize("case", ["attention", "tied"])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_of_attention_and_tied_weights(case: str, bf16: bool) -> None:
    model, inputs = (
        (Attention(), torch.randn(3, 4, 8)) if case == "attention" else (Tied(), torch.randn(3, 5))
    )
    compact(model, random_ticket(model))
    flat = FlatScatter(model, torch.bfloat16 if bf16 else None)
    expected = gradients(model, inputs, bf16=bf16)
    for _ in range(2):
        assert_same(gradients(model, inputs, flat, bf16=bf16), expected)


def gradients(
    model: nn.Module, inputs: Tensor, flat: FlatScatter | None = None, *, bf16: bool = False
) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), flat or rescattering(False):
        outputs = model(inputs).float()
    outputs.square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_compiled_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once: that weights come from elsewhere at every step makes nothing new of it."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        made.append(1)
        return compiled(graph, inputs)

    compiled = lookup_backend("aot_eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: compile_(model, backend=backend))
    expected = trained("test_vit")
    assert_equal(trained("test_vit", compile=True), expected)
    assert len(made) == 1


def test_two_forward_passes_before_backward() -> None:
    model, inputs = net("test_resnet").double().eval(), batch()[0].double()
    flat = FlatScatter(model)
    expected = gradients(model, inputs)
    model.zero_grad(set_to_none=True)
    with flat:
        first = model(inputs)
    with flat:
        second = model(inputs)
    with torch.no_grad(), flat:
        model(inputs)
    (first.square().mean() / 2 + second.square().mean() / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_values_that_change_between_forward_and_backward_are_refused() -> None:
    model, (inputs, _) = net("test_resnet").eval(), batch()
    flat = FlatScatter(model)
    expected = gradients(model, inputs)
    model.zero_grad(set_to_none=True)
    with flat:
        first, second = model(inputs), model(inputs)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "original" in name).add_(1.0)
    first.square().mean().backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected)
    with flat:
        model(inputs)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        second.square().mean().backward()


def test_the_second_derivative() -> None:
    model, inputs = Attention().double(), torch.randn(3, 4, 8, dtype=torch.float64)
    compact(model, random_ticket(model))
    found = []
    for context in (FlatScatter(model), rescattering(False)):
        with context:
            loss = model(inputs).square().mean()
        parameters = list(model.parameters())
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        norm = sum(each.square().sum() for each in first)
        found.append(torch.autograd.grad(norm, parameters))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert any(bool(each.any()) for each in found[0])


def test_some_gradients_only(kernels: ModuleType) -> None:
    """A frozen weight, and one that the loss does not depend on, have none."""
    for with_kernels in (None, kernels):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        compact(model, random_ticket(model, 0.5))
        values = [layer.parametrizations.weight.original for layer in model]
        values[0].requires_grad_(False)
        with FlatScatter(model, kernels=with_kernels):
            model[1](model[0](torch.randn(2, 4))).sum().backward()
        assert [each.grad is not None for each in values] == [False, True, False]


def test_one_dense_copy_in_the_dtype_of_training_that_stays() -> None:
    model = net("test_vit")
    dense = sum(math.prod(weight.shape) for _, weight in compact_weights(model))
    flat = FlatScatter(model, torch.bfloat16)
    size = sum(each.memory.numel() * each.memory.element_size() for each in flat.groups)
    count = len(list(compact_weights(model)))
    assert 2 * dense <= size <= 2 * (dense + count * flat_scatter.ALIGNED)
    where = [group.memory.data_ptr() for group in flat.groups]
    for _ in range(2):
        with flat, torch.autocast("cpu", torch.bfloat16):
            model(batch()[0]).sum().backward()
    assert [group.memory.data_ptr() for group in flat.groups] == where
    assert not [key for module in model.modules() for key in vars(module) if GIVEN in key]


def test_weights_that_more_is_done_to_than_a_cast_stay_in_their_dtype() -> None:
    kinds = {g.memory.dtype for g in FlatScatter(net("test_nfnet"), torch.bfloat16).groups}
    assert kinds == {torch.float32, torch.bfloat16}, "standardised kernels, and the classifier"
    kinds = {g.memory.dtype for g in FlatScatter(net("test_resnet"), torch.bfloat16).groups}
    assert kinds == {torch.bfloat16}


def test_outside_of_it_weights_are_those_of_now() -> None:
    """After a step: evaluation, copies and densified models see the new values."""
    stepper = PlainStepper(net("test_vit"), replace(SETTINGS, grad_checkpointing=True), 1)
    stepper.model.train()
    stepper.step(*batch())
    model = stepper.model.eval()
    plain = densify(copy.deepcopy(model))
    assert torch.equal(model(batch()[0]), plain(batch()[0]))


def test_channels_last_reaches_compact_weights() -> None:
    model, dense = net("test_byobnet"), densify(net("test_byobnet"))
    order = [weight.index.clone() for _, weight in compact_weights(model)]
    masks = [weight.mask() for _, weight in compact_weights(model)]
    lay_out(model, channels_last=True)
    lay_out(dense, channels_last=True)
    inputs = batch()[0].contiguous(memory_format=torch.channels_last)
    kernels = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert any(module.weight.shape[2] > 1 for _, module in kernels)
    for context in (rescattering(False), FlatScatter(model)):
        with context:
            for name, module in kernels:
                own = dense.get_submodule(name).weight
                assert module.weight.is_contiguous(memory_format=torch.channels_last), name
                assert torch.equal(module.weight, own), name
            assert torch.equal(model.eval()(inputs), dense.eval()(inputs))
    assert all(
        torch.equal(weight.index, before) and torch.equal(weight.mask(), mask)
        for (_, weight), before, mask in zip(compact_weights(model), order, masks, strict=True)
    )
    # Other kernels add up in another order; the loss is taken of float32 outputs.
    expected = gradients(net("test_byobnet").double().eval(), inputs.double())
    found = gradients(model.double(), inputs.double())
    for name, tensor in expected.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=16 * 2**-24 * largest)


@pytest.mark.parametrize(
    ("changes", "device", "sharded", "expected"),
    [
        ({}, CPU, False, "each"),
        ({}, CUDA, False, "triton"),
        ({}, CUDA, True, "each"),
        ({"rescatter": True}, CUDA, False, "each"),
        ({"scatter": "flat"}, CUDA, False, "flat"),
        ({"scatter": "each"}, CUDA, False, "each"),
    ],
)
def test_how_weights_are_scattered(changes: dict, device, sharded: bool, expected: str) -> None:
    assert chosen(TrainingConfig(**changes), device, sharded=sharded) == expected


@pytest.mark.parametrize(
    ("changes", "sharded", "said"),
    [
        ({"scatter": "flad"}, False, "flat"),
        ({"scatter": "flat", "rescatter": True}, False, "leave out training.rescatter"),
        ({"scatter": "triton"}, True, "with deepspeed.zero_stage 3 leave it out"),
    ],
)
def test_settings_that_cannot_be(changes: dict, sharded: bool, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        chosen(TrainingConfig(**changes), CPU, sharded=sharded)
    assert "\n" not in str(error.value)
