"""Models, losses and batches that users bring: they work, or one line says what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

import autosparse
from autosparse import criteria
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.criteria.config import ScoringConfig
from autosparse.models import zoo
from autosparse.models.batch_norm import batch_norms, last_statistics
from autosparse.models.restore import untouched
from autosparse.sparsity import masks, paths
from autosparse.sparsity.ticket import Ticket
from tests.conftest import grid

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, SIDE = 4, 8
QUICK = {"rounds": 2, "steps_per_level": 2, "levels": 2, "draws": 1, "steps": 1}


class Small(nn.Module):
    """Two convolutions with a norm between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        hidden = self.deep(self.norm(self.conv(images)).relu()).relu()
        return hidden.mean((2, 3))

    def forward(self, images: Tensor) -> Any:
        return self.head(self.features(images))


class Two(Small):
    """Gives a tuple: logits of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Any:
        found = self.features(images)
        return self.head(found), self.other(found)


class Named(Two):
    """Gives a dict, with something in it that is no float."""

    def forward(self, images: Tensor) -> Any:
        first, second = super().forward(images)
        return {"logits": first, "more": [second], "count": torch.tensor(len(images))}


def small(kind: type[nn.Module] = Small) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator), torch.arange(count) % CLASSES


def pruned(model: nn.Module, criterion: str = "snip", data: Any = None, **options: Any) -> Ticket:
    known = criteria.get(criterion).options
    own = {key: value for key, value in QUICK.items() if key in known}
    data = [batch()] if data is None else data
    return autosparse.prune(model, data, criterion, 0.5, options=own, **options)


def one_line(error: pytest.ExceptionInfo[UsageError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Weights that are computed from other tensors


def weight_norm(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)


def old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(layer)


def spectral_norm(layer: nn.Module) -> None:
    parametrizations.spectral_norm(layer)


def torchs_pruning(layer: nn.Module) -> None:
    torch_prune.random_unstructured(layer, "weight", 0.5)


COMPUTED = {
    weight_norm: ("WeightNorm", parametrize.remove_parametrizations),
    old_weight_norm: ("weight norm", torch.nn.utils.remove_weight_norm),
    spectral_norm: ("SpectralNorm", parametrize.remove_parametrizations),
    torch.nn.utils.spectral_norm: ("spectral norm", torch.nn.utils.remove_spectral_norm),
    torchs_pruning: ("torch.nn.utils.prune", torch_prune.remove),
}


@pytest.mark.parametrize("apply", COMPUTED)
def test_a_weight_that_is_computed_is_named_and_what_undoes_it(apply: Callable) -> None:
    model, (kind, undo) = small(), COMPUTED[apply]
    apply(model.deep)
    with pytest.raises(UsageError, match=r"^deep\.weight is no parameter: ") as error:
        pruned(model)
    said = one_line(error)
    assert kind in said
    assert f"{undo.__name__}(model.get_submodule('deep'), 'weight')" in said
    assert "deep.weight" not in zoo.prunable(model, ["deep"])
    undo(model.get_submodule("deep"), "weight")
    assert "deep.weight" in pruned(model).masks


@pytest.mark.parametrize("apply", COMPUTED)
def test_a_layer_whose_weight_is_computed_can_be_excluded(apply: Callable) -> None:
    model = small()
    apply(model.deep)
    ticket = pruned(model, exclude=["deep"])
    assert ticket.masks.keys() == {"conv.weight", "head.weight"}
    assert Ticket.from_compact(autosparse.compact(model, ticket), ticket, {}).rest.keys() == (
        ticket.rest.keys()
    )


@pytest.mark.parametrize("criterion", ["dense", "snip", "random"])
def test_a_compact_model_is_not_pruned_again(criterion: str) -> None:
    model = small()
    autosparse.compact(model, pruned(model))
    with pytest.raises(UsageError, match=r"^conv\.weight is compact already; densify") as error:
        autosparse.prune(model, [batch()], criterion, 0.5)
    one_line(error)
    assert pruned(autosparse.densify(model)).kept


# Wrapped models


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def parallel(model: nn.Module) -> nn.Module:
    """On the CPU, also where there are GPUs."""
    wrapped = nn.DataParallel(model).cpu()
    wrapped.device_ids = []
    return wrapped


WRAPPERS = {"compiled": compiled, "parallel": parallel}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_ticket_of_a_wrapped_model_fits_the_plain_one(wrap: Callable) -> None:
    plain, wrapped = small(), wrap(small())
    ticket = pruned(wrapped)
    assert list(ticket.masks) == ["conv.weight", "deep.weight", "head.weight"]
    assert ticket.content_hash == pruned(plain).content_hash
    images, _ = batch()
    expected = autosparse.compact(plain, ticket).eval()(images)
    before = wrapped.eval()(images)
    assert autosparse.compact(wrapped, ticket) is wrapped
    torch.testing.assert_close(wrapped.eval()(images), expected)
    assert not torch.equal(before, expected)
    weights, rest = autosparse.parameter_groups(wrapped, 0.1)
    assert sum(each.numel() for each in weights["params"]) == ticket.kept
    assert rest["weight_decay"] == 0
    assert Ticket.from_compact(wrapped, ticket, {}).content_hash == ticket.content_hash
    torch.testing.assert_close(autosparse.densify(wrapped)(images), expected)


def test_a_model_in_ddp_is_pruned_and_made_compact_before(tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store"
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(small())
        ticket = pruned(wrapped)
        assert ticket.content_hash == pruned(small()).content_hash
        with pytest.raises(UsageError, match="compact comes first"):
            autosparse.compact(wrapped, ticket)
        assert isinstance(wrapped.module.conv.weight, nn.Parameter)
    finally:
        torch.distributed.destroy_process_group()


def test_a_part_that_is_compiled_is_named() -> None:
    model = small()
    model.deep = torch.compile(model.deep, backend="eager")
    with pytest.raises(UsageError, match=r"^deep\._orig_mod\.weight: .* compile it afterwards"):
        pruned(model)


# Outputs of any type


def first_of(outputs: Any, labels: Tensor) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return cross_entropy(logits, labels)


@pytest.mark.parametrize(("kind", "criterion"), grid([Two, Named], criteria.names()))
def test_the_loss_is_asked_never_the_outputs_type(kind: type[nn.Module], criterion: str) -> None:
    model = small(kind)
    ticket = pruned(model, criterion, loss_fn=first_of)
    assert ticket.kept == masks.total(ticket.masks) // 2
    if criterion in ("grasp", "snip", "prospr"):
        plain = small()
        plain.load_state_dict(model.state_dict(), strict=False)
        mine, theirs = (
            criteria.get(criterion)(each, [batch()], loss, **shortened(criterion))
            for each, loss in ((model, first_of), (plain, cross_entropy))
        )
        assert all(torch.equal(mine[name], score) for name, score in theirs.items())


def shortened(criterion: str) -> dict[str, Any]:
    options = {"sparsity": 0.5, **QUICK}
    return {key: options[key] for key in criteria.get(criterion).options if key in options}


def test_the_default_loss_says_that_it_knows_logits_only() -> None:
    with pytest.raises(UsageError, match=r"outputs a tuple of 2 .*; pass a loss_fn") as error:
        pruned(small(Two))
    one_line(error)


def test_features_have_no_cross_entropy() -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    data = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    with pytest.raises(UsageError, match=r"num_classes=0.*pass loss_fn") as error:
        pruned(model, data=data)
    one_line(error)
    assert pruned(model, data=data, loss_fn=lambda outputs, _: outputs.square().mean()).kept


@pytest.mark.parametrize(
    ("options", "loss_fn"),
    [
        ({"features_only": True}, lambda outputs, labels: outputs[-1].square().mean()),
        ({"num_classes": CLASSES}, cross_entropy),
    ],
)
@pytest.mark.parametrize("criterion", ["grasp", "synflow", "snip"])
def test_feature_pyramids(criterion: str, options: dict, loss_fn: Callable) -> None:
    model = timm.create_model("test_resnet", zero_init_last=False, **options)
    data = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    assert pruned(model, criterion, data, loss_fn=loss_fn).kept


def test_a_distilled_head_takes_a_loss_of_two() -> None:
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2,
        num_classes=CLASSES,
    )  # fmt: skip
    model.set_distilled_training(True)
    data = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    with pytest.raises(UsageError, match="pass a loss_fn"):
        pruned(model, data=data)
    for criterion in ("snip", "grasp"):
        assert pruned(
            model, criterion, data, loss_fn=lambda two, labels: cross_entropy(sum(two), labels)
        ).kept


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        (lambda outputs, labels: outputs, r"one number, not \[8, 4\]"),
        (lambda outputs, labels: 1.0, "one number, not a float"),
        (lambda outputs, labels: cross_entropy(outputs.detach(), labels), "does not depend on"),
        (lambda outputs, labels: outputs.logits, "the loss .* fails on outputs"),
    ],
)
def test_what_is_no_loss(loss_fn: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        pruned(small(), loss_fn=loss_fn)
    one_line(error)


# Contexts, dtypes and devices


@pytest.mark.parametrize(
    ("criterion", "context"), grid(criteria.names(), [torch.no_grad, torch.inference_mode], each=1)
)
def test_without_gradients_outside(criterion: str, context: Callable) -> None:
    model = small()
    expected = pruned(model, criterion, seed=3)
    compact = small()
    with context():
        ticket = pruned(model, criterion, seed=3)
        autosparse.compact(compact, ticket)
    assert ticket.content_hash == expected.content_hash
    images, labels = batch()
    cross_entropy(compact(images), labels).backward()
    values = compact.get_parameter("conv.parametrizations.weight.original")
    assert values.grad is not None and values.grad.any()


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "short_irp"])
def test_batches_made_in_inference_mode(criterion: str) -> None:
    with torch.inference_mode():
        made = batch()
    assert (
        pruned(small(), criterion, [made]).content_hash == pruned(small(), criterion).content_hash
    )


@pytest.fixture()
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("criterion", criteria.names())
def test_models_in_float64(criterion: str, doubles) -> None:
    model = small()
    nn.init.zeros_(model.norm.weight)  # What is seen of it takes an image of that dtype too.
    assert model.conv.weight.dtype == torch.float64
    images, labels = batch()
    ticket = pruned(model, criterion, [(images.double(), labels)])
    assert ticket.card["revealed"] == ["norm.weight"]
    assert {each.dtype for each in ticket.values.values()} == {torch.float64}


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(CLASSES))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return small()


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return small()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lazy, "^0.weight is lazy .* call the model on a batch first"),
        (on_meta, "^conv.weight is on the meta device"),
        (made_in_inference_mode, "^conv.weight was made .*inference.mode"),
    ],
)
@pytest.mark.parametrize("criterion", ["dense", "random", "snip"])
def test_weights_without_values(make: Callable, said: str, criterion: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        autosparse.prune(make(), [batch()], criterion, 0.5)
    one_line(error)


def test_a_lazy_model_that_was_called_is_like_any_other() -> None:
    model = lazy()
    model(batch()[0])
    assert pruned(model).kept


# Batches


IMAGES, LABELS = batch()
NOT_BATCHES = {
    "a dict": ({"image": IMAGES, "label": LABELS}, "not a dict of image, label"),
    "three": ((IMAGES, LABELS, LABELS), "not a tuple of 3"),
    "a tensor": (IMAGES, r"not \[8, 3, 8, 8\]"),
    "bytes": ((IMAGES.byte(), LABELS), "uint8.*normalise"),
    "lists": ((IMAGES, LABELS.tolist()), "the labels are a list of 8"),
    "sizes": ((IMAGES, LABELS[:3]), r"images \[8, 3, 8, 8\] and labels \[3\]"),
    "nothing": ((IMAGES[:0], LABELS[:0]), r"images \[0, 3, 8, 8\]"),
}


@pytest.mark.parametrize("criterion", ["snip", "synflow", "short_irp"])
@pytest.mark.parametrize("name", NOT_BATCHES)
def test_what_is_no_batch(name: str, criterion: str) -> None:
    given, said = NOT_BATCHES[name]
    with pytest.raises(UsageError, match=f"^a batch is a pair .*{said}") as error:
        pruned(small(), criterion, [given])
    one_line(error)


@pytest.mark.parametrize("data", [batch(), 3, None])
def test_data_that_are_no_batches(data: Any) -> None:
    with pytest.raises(UsageError, match="batch is a pair") as error:
        autosparse.prune(small(), data, "snip", 0.5)
    one_line(error)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_may_be_any_whole_numbers(dtype: torch.dtype) -> None:
    images, labels = batch()
    ticket = pruned(small(), data=[(images, labels.to(dtype))])
    assert ticket.content_hash == pruned(small()).content_hash


@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_a_label_out_of_range(wrong: int) -> None:
    images, labels = batch()
    labels[2] = wrong
    said = f"^label {wrong} is out of range: the model tells 4 classes apart, 0 to 3$"
    with pytest.raises(UsageError, match=said):  # Only its outputs tell how many.
        pruned(small(), data=[(images, labels)])
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    with pytest.raises(UsageError, match=said):
        pruned(model, data=[(torch.randn(8, 3, 32, 32), labels)])
    labels[2] = -100
    assert pruned(small(), data=[(images, labels)]).kept


def test_one_image_has_no_batch_statistics() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 4), nn.BatchNorm1d(4))
    with pytest.raises(UsageError, match=r"larger batches, or scoring in eval mode") as error:
        pruned(model, data=[batch(1)])
    one_line(error)
    assert pruned(model, data=[batch(1)], scoring=ScoringConfig(mode="eval")).kept


class SecondInput(Small):
    def forward(self, images: Tensor, angle: Tensor) -> Any:  # type: ignore[override]
        return super().forward(images) * angle


@pytest.mark.parametrize(
    "criterion", ["snip", "grasp", "iter_snip", "prospr", "ntk_sap", "short_irp"]
)
def test_a_second_input(criterion: str) -> None:
    with pytest.raises(UsageError, match="'angle'; it is called with the images alone") as error:
        pruned(small(SecondInput), criterion)
    one_line(error)


def test_a_second_input_where_paths_are_followed() -> None:
    said = "SecondInput raised TypeError .*'angle'; it is called with the images alone"
    with pytest.raises(UsageError, match=said) as error:
        pruned(small(SecondInput), "synflow")
    one_line(error)


class Picky(Small):
    def forward(self, images: Tensor) -> Any:
        if images.shape[-1] < 32:
            raise NotImplementedError("images must have\n32 px at least.")
        return super().forward(images)


@pytest.mark.parametrize("criterion", ["snip", "fisher", "force", "short_irp"])
def test_the_models_own_words(criterion: str) -> None:
    with pytest.raises(UsageError, match="images must have 32 px at least") as error:
        pruned(small(Picky), criterion)
    one_line(error)
    assert isinstance(error.value.__cause__, NotImplementedError)


@pytest.mark.parametrize("criterion", ["random", "magnitude", "erk", "lamp", "dense"])
def test_a_model_that_fails_on_the_data_given_gets_no_ticket(criterion: str, digits) -> None:
    said = r"Picky raised NotImplementedError .* image \[3, 8, 8\]: images must have 32 px at least"
    with pytest.raises(UsageError, match=said) as error:
        autosparse.prune(small(Picky), [batch()], criterion, 0.5)
    one_line(error)
    with pytest.raises(UsageError, match=r"Small raised .* image \[1, 16, 16\]: .*channels"):
        autosparse.prune(small(), digits, criterion, 0.5)
    assert autosparse.prune(small(Picky), [], criterion, 0.5).kept  # It need not run.


def test_a_model_that_divides_by_zero_says_so() -> None:
    """timm's own forward of a HieraDet of these options does."""
    model = timm.create_model(
        "hieradet_small", num_classes=CLASSES, embed_dim=24, stages=[1, 1, 2, 1],
        global_att_blocks=[2],
    )  # fmt: skip
    with pytest.raises(
        UsageError, match=r"HieraDet raised ZeroDiv.* its own forward.* zero"
    ) as error:
        pruned(model, data=[(torch.randn(2, 3, 64, 64), torch.arange(2))])
    one_line(error)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


class HardGate(Small):
    def forward(self, images: Tensor) -> Any:
        return nn.functional.hardsigmoid(super().forward(images))


@pytest.mark.parametrize("criterion", ["grasp", "prospr"])
def test_what_cannot_be_differentiated_twice(criterion: str) -> None:
    with pytest.raises(UsageError, match=r"hardsigmoid_backward has no second.* as snip") as error:
        pruned(small(HardGate), criterion)
    one_line(error)


@pytest.mark.parametrize("criterion", ["px", "synflow"])
def test_the_models_own_words_where_paths_are_followed(criterion: str) -> None:
    with pytest.raises(UsageError, match="images must have") as error:
        pruned(small(Picky), criterion)
    one_line(error)


def test_auxiliary_heads_at_few_pixels() -> None:
    model = timm.create_model("inception_v3", num_classes=CLASSES, aux_logits=True)
    with pytest.raises(UsageError, match=r"the model fails on images \[2, 3, 96, 96\]: ") as error:
        pruned(model, data=[(torch.randn(2, 3, 96, 96), torch.arange(2))])
    one_line(error)


# Criteria without data


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("test_resnet", {"in_chans": 1}, (1, 160, 160)),
        ("test_vit", {"img_size": 32, "patch_size": 8}, (3, 32, 32)),
        ("vit_tiny_patch16_224", {"img_size": (32, 64), "depth": 1, "in_chans": 2}, (2, 32, 64)),
    ],
)
@pytest.mark.parametrize("criterion", ["synflow", "random"])
def test_the_model_says_what_images_it_takes(name, options, shape, criterion: str) -> None:
    model = timm.create_model(name, num_classes=CLASSES, **options)
    assert paths.image_shape(model) == shape
    ticket = pruned(model, criterion, [])
    assert ticket.card["effective_density"] > 0


def test_a_model_that_does_not_say_it_asks_for_a_batch() -> None:
    with pytest.raises(UsageError, match=r"^Small does not say what images it takes: give a batch"):
        pruned(small(), "synflow", [])
    assert pruned(small(), "random", []).kept
    with pytest.raises(UsageError, match=r"guard live needs .*: give a batch"):
        autosparse.prune(
            small(),
            [],
            "random",
            0.5,
            selection=autosparse.criteria.pruning.Selection(guard="live"),
        )


# No trace


def test_a_model_can_be_copied_after_scoring_in_eval_mode() -> None:
    """LeViT's attention keeps tensors while it is in eval mode, and drops them in train mode."""
    model = timm.create_model("levit_128s", num_classes=CLASSES)
    with untouched(model):
        model.eval()
        model(torch.randn(1, 3, 224, 224)).sum().backward()
    copy.deepcopy(model)


@pytest.mark.parametrize(("criterion", "warm_up"), [("snip", True), ("ntk_sap", False)])
def test_batch_norm_has_its_momentum_back_after_an_error(criterion: str, warm_up: bool) -> None:
    model = small(Picky)
    model.norm.momentum = 0.3
    with pytest.raises(UsageError, match="32 px"):
        pruned(model, criterion, scoring=ScoringConfig(warm_up=warm_up))
    assert model.norm.momentum == 0.3


def test_last_statistics_end_with_the_error() -> None:
    norms = batch_norms(small())
    norms[0].momentum = 0.3
    with pytest.raises(KeyError), last_statistics(norms):
        assert norms[0].momentum == 1.0
        raise KeyError
    assert norms[0].momentum == 0.3


# What there is nothing to prune in


class Bare(nn.Module):
    """Without parameters."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.mark.parametrize("criterion", ["dense", "snip", "random"])
def test_a_model_without_parameters(criterion: str) -> None:
    with pytest.raises(UsageError, match="Bare has no prunable weight") as error:
        autosparse.prune(Bare(), [batch()], criterion, 0.5)
    one_line(error)


@pytest.mark.parametrize("criterion", ["dense", "random", "magnitude"])
@pytest.mark.filterwarnings("ignore")
def test_a_layer_without_elements_is_left_out(criterion: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 4), nn.Linear(4, 0))
    ticket = autosparse.prune(model, [batch()], criterion, 0.5)
    assert list(ticket.masks) == ["1.weight"]
    assert "2.weight" in ticket.rest
    autosparse.compact(model, ticket)


# Settings of other kinds


def test_paths_and_numbers_of_numpy_can_be_saved(tmp_path: Path) -> None:
    scorer = tmp_path / "autos.safetensors"
    autos = AutoS("context")
    autos.card = {"corpus": "0123456789abcdef"}
    autos.save(scorer)
    ticket = autosparse.prune(
        small(), [batch()], "autos", np.float32(0.5), seed=np.int64(3), options={"scorer": scorer}
    )
    ticket.save(tmp_path / "ticket.safetensors")
    card = Ticket.load(tmp_path / "ticket.safetensors").card
    assert (card["options"], card["sparsity"], card["seed"]) == ({"scorer": str(scorer)}, 0.5, 3)
