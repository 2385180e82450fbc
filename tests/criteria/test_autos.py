"""AutoS with two heads: layer counts from one, the choice inside layers by option."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.autos.heads import erk_log_odds
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.criteria import short_irp as levels
from autosparse.criteria.autos import PRETRAINED, counts, load_scorer, of_tokens, use_lift
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.models.gradients import mean_gradients
from autosparse.models.zoo import prunable
from autosparse.sparsity import masks, reach
from autosparse.sparsity.counts import keep_count


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)
    )


def data(batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(batches)
    ]


@pytest.fixture
def scorer(tmp_path: Path) -> AutoS:
    torch.manual_seed(3)
    network = AutoS("context", [4], head="survival")
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    network.save(tmp_path / "autos.safetensors")
    return network


@pytest.mark.parametrize("choice", ["live", "random"])
def test_layers_keep_what_is_expected(choice: str, scorer: AutoS, tmp_path: Path) -> None:
    model, options = net(), {"scorer": str(tmp_path / "autos.safetensors"), "sparsity": 0.9}
    autos = criteria.get("autos")
    chosen = autos(model, data(), cross_entropy, choice=choice, **options)
    weights = prunable(model)
    gradients = mean_gradients(model.train(), weights, data(), cross_entropy)
    lift = use_lift(model, weights, data(), autos.options["reuse"])
    kept = counts(scorer.layer_densities(weights, gradients, 0.1, lift), weights, 0.9)
    assert sum(kept.values()) == 153
    assert {name: int(mask.sum()) for name, mask in chosen.items()} == kept
    again = autos(model, data(), cross_entropy, choice=choice, seed=1, **options)
    assert not any(torch.equal(chosen[n], again[n]) for n in chosen)


def of_timm(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a model and a batch of random images."""
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8) % 4
    return zoo.create(ModelConfig(name), num_classes=4, in_chans=3, image_size=32, seed=0), [batch]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_transformers_get_the_densities_of_erk(scorer: AutoS, tmp_path: Path) -> None:
    """With the AutoS of the package; any other one has its own. Weights are drawn from all."""
    model, batches = of_timm("test_vit")
    autos, path = criteria.get("autos"), str(tmp_path / "autos.safetensors")
    weights = prunable(model)
    found = autos(model, batches, cross_entropy, sparsity=0.9)
    kept = {
        n: int((s > 0).sum()) for n, s in criteria.get("erk")(model, [], None, sparsity=0.9).items()
    }
    assert {name: int(mask.sum()) for name, mask in found.items()} == kept
    options = {"choice": "random", "densities": "erk"}
    assert equal(found, autos(model, batches, cross_entropy, sparsity=0.9, **options))
    copied = shutil.copy(PRETRAINED, tmp_path / "copied.safetensors")
    assert equal(found, autos(model, batches, cross_entropy, sparsity=0.9, scorer=str(copied)))
    own = autos(model, batches, cross_entropy, sparsity=0.9, scorer=path)
    gradients = mean_gradients(model.train(), weights, batches, cross_entropy)
    lift = use_lift(model, weights, batches, autos.options["reuse"])
    expected = counts(scorer.layer_densities(weights, gradients, 0.1, lift), weights, 0.9)
    assert {name: int(mask.sum()) for name, mask in own.items()} == expected != kept
    options = {"choice": "random", "densities": "learned", "scorer": path}
    assert equal(own, autos(model, batches, cross_entropy, sparsity=0.9, **options))


def test_what_transformers_get_can_be_refused() -> None:
    model, batches = of_timm("test_vit")
    autos = criteria.get("autos")
    asked = {"choice": "live", "densities": "learned"}
    found = autos(model, batches, cross_entropy, sparsity=0.9, **asked)
    alive = reach.live(model, found, (3, 32, 32))
    assert masks.kept(alive) == masks.kept(found)
    assert not equal(found, autos(model, batches, cross_entropy, sparsity=0.9))
    assert equal(found, autos(model, batches, cross_entropy, sparsity=0.9, choice="live"))
    with pytest.raises(UsageError, match="densities 'dense'"):
        autos(model, batches, cross_entropy, sparsity=0.9, densities="dense")


@pytest.mark.parametrize(
    ("name", "tokens"), [("test_vit", True), ("test_convnext", False), ("test_byobnet", False)]
)
def test_what_counts_as_a_transformer(name: str, tokens: bool) -> None:
    model, batches = of_timm(name)
    assert of_tokens(model, prunable(model), batches) is tokens
    if not tokens:
        autos, asked = criteria.get("autos"), {"choice": "live", "densities": "learned"}
        found = autos(model, batches, cross_entropy, sparsity=0.9)
        assert equal(found, autos(model, batches, cross_entropy, sparsity=0.9, **asked))


def test_a_linear_layer_for_whole_images_reads_no_tokens() -> None:
    assert not of_tokens(net(), prunable(net()), data())


def test_any_weights_of_a_layer_are_drawn_alike(scorer: AutoS, tmp_path: Path) -> None:
    """Over many seeds each weight of a layer is chosen as often as its density says."""
    path = str(tmp_path / "autos.safetensors")
    found = [
        criteria.get("autos")(
            net(), data(1), cross_entropy, scorer=path, sparsity=0.5, choice="random", seed=seed
        )["2.weight"]
        for seed in range(200)
    ]
    often = torch.stack(found).double().mean(0)
    density = float(found[0].double().mean())
    spread = (density * (1 - density) / 200) ** 0.5
    assert (often - density).abs().max() < 5 * spread  # Of 1,200 weights.


def test_what_is_chosen_lies_on_paths(scorer: AutoS, tmp_path: Path) -> None:
    """At 95 % of such a net a random choice leaves a third or more of the weights on none."""
    options = {"scorer": str(tmp_path / "autos.safetensors"), "sparsity": 0.95}
    carried = {}
    for choice in ("live", "random"):
        model = net()
        chosen = criteria.get("autos")(model, data(), cross_entropy, choice=choice, **options)
        carried[choice] = masks.kept(reach.live(model, chosen, (6,))) / masks.kept(chosen)
    assert carried["live"] == 1 and carried["random"] < 0.9


@pytest.mark.parametrize("name", ["autos", "autos_irp"])
def test_where_paths_cannot_be_followed_any_weights_are_drawn(
    name: str, scorer: AutoS, tmp_path
) -> None:
    class Rounding(nn.Module):
        def forward(self, signal: Tensor) -> Tensor:
            if signal.dtype == torch.float32 and signal.amin() < 0:
                return signal
            raise RuntimeError("no such signal")

    model = nn.Sequential(Rounding(), net())
    steps = {"levels": 1, "steps_per_level": 1} if name == "autos_irp" else {}
    path = str(tmp_path / "autos.safetensors")
    with pytest.warns(UserWarning, match="paths through Sequential cannot be followed"):
        found = criteria.get(name)(model, data(), cross_entropy, scorer=path, sparsity=0.9, **steps)
    assert masks.kept(found) == 153


def test_refusals(scorer: AutoS, tmp_path: Path) -> None:
    path = str(tmp_path / "autos.safetensors")
    autos = criteria.get("autos")
    with pytest.raises(UsageError, match=r"'lvie'.*'live'"):
        autos(net(), data(), cross_entropy, scorer=path, sparsity=0.9, choice="lvie")
    with pytest.raises(UsageError, match="unknown option of autos 'temperature'"):
        autos(net(), data(), cross_entropy, scorer=path, sparsity=0.9, temperature=1.0)
    AutoS("paper", [3]).save(path)
    with pytest.raises(UsageError, match="head survival"):
        criteria.get("autos_irp")(net(), data(), cross_entropy, scorer=path, sparsity=0.9)


def test_the_packages_own_file_is_used_and_small() -> None:
    assert PRETRAINED.stat().st_size < 1_000_000
    assert AutoS.load(PRETRAINED).head == "survival"
    found = criteria.get("autos")(net(), data(), cross_entropy, sparsity=0.9)
    assert masks.kept(found) == 153


def test_reuse_favours_layers_that_see_many_places(scorer: AutoS, tmp_path: Path) -> None:
    """Of two convolutions of one shape, the one of 16 places gains odds on the one of a single."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1), nn.AvgPool2d(4),
        nn.Conv2d(12, 12, 3, padding=1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    weights = prunable(model)
    gradients = {name: torch.ones_like(weight) for name, weight in weights.items()}
    images = [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))]
    lift = use_lift(model, weights, images, 0.5)
    assert lift is not None
    assert lift["1.weight"] - lift["3.weight"] == pytest.approx(0.5 * math.log(16))
    assert use_lift(model, weights, images, 0.0) is None
    odds = {}
    for key, more in {"without": None, "with": lift}.items():
        found = scorer.layer_densities(weights, gradients, 0.1, more)
        assert sum(found[n] * w.numel() for n, w in weights.items()) == pytest.approx(
            0.1 * masks.total(weights), rel=1e-4
        )
        ratio = [math.log(found[n] / (1 - found[n])) for n in ("1.weight", "3.weight")]
        odds[key] = ratio[0] - ratio[1]
    assert odds["with"] - odds["without"] == pytest.approx(0.5 * math.log(16), rel=1e-4)


# AutoS with short levels


def alive_at_levels(monkeypatch: pytest.MonkeyPatch) -> list[masks.Masks]:
    """Return a list that gets the masks that every level trains."""
    seen: list[masks.Masks] = []
    train = levels._trained

    def spy(model, alive, *others):
        seen.append(alive)
        return train(model, alive, *others)

    monkeypatch.setattr(levels, "_trained", spy)
    return seen


def test_levels_end_at_autos_counts(
    scorer: AutoS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = alive_at_levels(monkeypatch)
    options = {"scorer": str(tmp_path / "autos.safetensors"), "sparsity": 0.9}
    model = net()
    found = criteria.get("autos_irp")(
        model, data(), cross_entropy, levels=2, steps_per_level=3, start=0.5, **options
    )
    weights = prunable(model)
    gradients = mean_gradients(model.train(), weights, data(), cross_entropy)
    kept = counts(scorer.layer_densities(weights, gradients, 0.1), weights, 0.9)
    assert {name: int(mask.sum()) for name, mask in found.items()} == kept
    # 1,530 weights: 765 are left at the start, the square root of 0.1 / 0.5 of them after a level.
    assert [masks.kept(each) for each in trained] == [765, round(765 * 0.2**0.5)]


def test_a_steep_level_begins_with_what_lies_on_paths(
    scorer: AutoS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One level to 5 % that may fall by 2: a tenth of the weights, on paths, before any step."""
    path = str(tmp_path / "autos.safetensors")
    options = {"scorer": path, "sparsity": 0.95, "levels": 1, "steps_per_level": 2, "fall": 2.0}
    trained = alive_at_levels(monkeypatch)
    model = net()
    found = criteria.get("autos_irp")(model, data(), cross_entropy, **options)
    (begun,) = trained
    assert masks.kept(begun) == 153  # Of 1,530.
    assert masks.kept(reach.live(model, begun, (6,))) == 153
    assert masks.kept(found) == 76
    criteria.get("autos_irp")(net(), data(), cross_entropy, seed=1, **options)
    assert any(not torch.equal(begun[name], trained[1][name]) for name in begun)
    with pytest.raises(UsageError, match="fall must be above 1"):
        criteria.get("autos_irp")(model, data(), cross_entropy, **options | {"fall": 1.0})


def test_without_movement_the_initial_weights_rank(scorer: AutoS, tmp_path: Path) -> None:
    model, path = net(), str(tmp_path / "autos.safetensors")
    found = criteria.get("autos_irp")(
        model, data(), cross_entropy, scorer=path, sparsity=0.5, levels=1, steps_per_level=2,
        start=1.0, movement=0.0,
    )  # fmt: skip
    assert masks.kept(found) == 765
    for name, weight in prunable(model).items():
        alive = found[name]
        lowest = weight.abs()[alive].min()
        assert not (weight.abs()[~alive] > lowest).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet50", {}), ("vit_base_patch16_224", {"img_size": 64}), ("convnext_base", {})],
)
def test_densities_of_large_networks_are_near_erk(name: str, options: dict) -> None:
    """Its corpus has none as large: no layer is starved, and none grows as the whole shrinks,
    but for those that ERK fills, by less than 0.06.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).train()
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(4, 3, 64, 64, generator=generator), torch.arange(4)
    weights = prunable(model)
    gradients = mean_gradients(model, weights, [batch], cross_entropy)
    lift = use_lift(model, weights, [batch], criteria.get("autos").options["reuse"])
    shapes = {layer: weight.shape for layer, weight in weights.items()}
    before = dict.fromkeys(weights, 1.0)
    for sparsity in (0.8, 0.9, 0.95, 0.98, 0.99):
        found = load_scorer(None).layer_densities(weights, gradients, 1 - sparsity, lift)
        erk = {
            layer: 1 / (1 + math.exp(-each))
            for layer, each in erk_log_odds(shapes, 1 - sparsity).items()
        }
        for layer, density in found.items():
            assert 0.4 * erk[layer] < density < 32 * erk[layer], (layer, sparsity)
            # Of a layer that ERK fills IRP leaves a little less at first.
            assert density <= before[layer] or (
                erk[layer] > 0.99 and density - before[layer] < 0.06
            ), (layer, sparsity)
        kept = counts(found, weights, sparsity)
        assert sum(kept.values()) == keep_count(sum(map(math.prod, shapes.values())), sparsity)
        assert min(kept.values()) > 1000
        before = found
