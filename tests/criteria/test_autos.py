"""AutoS with two heads: layer counts from one, the choice inside layers by option."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.criteria.autos import PRETRAINED, counts, lifted, settled
from autosparse.models.gradients import mean_gradients
from autosparse.models.zoo import prunable
from autosparse.sparsity import masks, reach


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


def test_settled_scores_give_the_counts_even_with_ties() -> None:
    scores = {"a": torch.tensor([[1.0, 1.0], [1.0, 0.0]]), "b": torch.tensor([[-5.0, -7.0, -6.0]])}
    found = settled(scores, {"a": 2, "b": 1})
    assert (found["a"] > 0).tolist() == [[True, True], [False, False]]
    assert (found["b"] > 0).tolist() == [[True, False, False]]
    whole = masks.from_scores(found, 4 / 7)
    assert all(torch.equal(whole[name], found[name] > 0) for name in found)


@pytest.mark.parametrize("choice", ["live", "random", "top", "sampled"])
def test_layers_keep_what_is_expected(choice: str, scorer: AutoS, tmp_path: Path) -> None:
    model, options = net(), {"scorer": str(tmp_path / "autos.safetensors"), "sparsity": 0.9}
    autos = criteria.get("autos")
    found = autos(model, data(), cross_entropy, choice=choice, **options)
    weights = prunable(model)
    gradients = mean_gradients(model.train(), weights, data(), cross_entropy)
    scores, densities = scorer.rate(weights, gradients, 0.1)
    kept = counts(densities, weights, 0.9)
    assert sum(kept.values()) == 153
    chosen = masks.from_scores(found, 0.9)
    assert {name: int(mask.sum()) for name, mask in chosen.items()} == kept
    top = masks.keep_counts(scores, kept)
    assert all(torch.equal(chosen[n], top[n]) for n in top) == (choice == "top")
    again = autos(model, data(), cross_entropy, choice=choice, seed=1, **options)
    assert all(torch.equal(found[n], again[n]) for n in found) == (choice == "top")


def test_what_is_chosen_lies_on_paths(scorer: AutoS, tmp_path: Path) -> None:
    """At 95 % of such a net a random choice leaves a third or more of the weights on none."""
    options = {"scorer": str(tmp_path / "autos.safetensors"), "sparsity": 0.95}
    carried = {}
    for choice in ("live", "random"):
        model = net()
        scores = criteria.get("autos")(model, data(), cross_entropy, choice=choice, **options)
        chosen = masks.from_scores(scores, 0.95)
        carried[choice] = masks.kept(reach.live(model, chosen, (6,))) / masks.kept(chosen)
    assert carried["live"] == 1 and carried["random"] < 0.9


@pytest.mark.parametrize("name", ["autos", "autos_irp"])
def test_where_paths_cannot_be_followed_scores_decide(name: str, scorer: AutoS, tmp_path) -> None:
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
    assert sum(int((score >= 0).sum()) for score in found.values()) == 153


def test_sampling_draws_in_proportion(scorer: AutoS, tmp_path: Path) -> None:
    """Cold: nearly the top. Of weights that differ only in odds, the likelier is drawn oftener."""
    options = {"scorer": str(tmp_path / "autos.safetensors"), "sparsity": 0.9}
    autos = criteria.get("autos")
    top = masks.from_scores(autos(net(), data(), cross_entropy, choice="top", **options), 0.9)
    shared = {}
    for temperature in (1e-3, 1.0, 1e3):
        scores = autos(
            net(), data(), cross_entropy, choice="sampled", temperature=temperature, **options
        )
        chosen = masks.from_scores(scores, 0.9)
        shared[temperature] = masks.kept({n: mask & top[n] for n, mask in chosen.items()})
    assert shared[1e-3] >= 150
    assert shared[1e-3] > shared[1.0] > shared[1e3]


def test_refusals(scorer: AutoS, tmp_path: Path) -> None:
    path = str(tmp_path / "autos.safetensors")
    autos = criteria.get("autos")
    with pytest.raises(UsageError, match=r"'tpo'.*'top'"):
        autos(net(), data(), cross_entropy, scorer=path, sparsity=0.9, choice="tpo")
    with pytest.raises(UsageError, match="temperature"):
        autos(net(), data(), cross_entropy, scorer=path, sparsity=0.9, temperature=0.0)
    AutoS("paper", [3]).save(path)
    with pytest.raises(UsageError, match="head survival"):
        criteria.get("autos_irp")(net(), data(), cross_entropy, scorer=path, sparsity=0.9)


def test_the_packages_own_file_is_used_and_small() -> None:
    assert PRETRAINED.stat().st_size < 1_000_000
    assert AutoS.load(PRETRAINED).head == "survival"
    found = criteria.get("autos")(net(), data(), cross_entropy, sparsity=0.9)
    assert sum(int((score > 0).sum()) for score in found.values()) == 153


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
    lift = lifted(model, weights, images, 0.5)
    assert lift is not None
    assert lift["1.weight"] - lift["3.weight"] == pytest.approx(0.5 * math.log(16))
    assert lifted(model, weights, images, 0.0) is None
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


def test_levels_end_at_autos_counts(scorer: AutoS, tmp_path: Path) -> None:
    options = {"scorer": str(tmp_path / "autos.safetensors"), "sparsity": 0.9}
    model = net()
    found = criteria.get("autos_irp")(
        model, data(), cross_entropy, levels=2, steps_per_level=3, start=0.5, **options
    )
    weights = prunable(model)
    gradients = mean_gradients(model.train(), weights, data(), cross_entropy)
    kept = counts(scorer.layer_densities(weights, gradients, 0.1), weights, 0.9)
    assert {name: int((score >= 0).sum()) for name, score in found.items()} == kept
    values = torch.cat([score.flatten() for score in found.values()])
    # 1,530 weights: 765 fall at the start, 342 at the square root of 0.1 / 0.5 of what is left.
    assert int((values == -3).sum()) == 765
    assert int((values == -2).sum()) == 765 - round(765 * 0.2**0.5)
    assert int((values >= 0).sum()) == 153


def test_a_steep_level_begins_with_what_lies_on_paths(scorer: AutoS, tmp_path: Path) -> None:
    """One level to 5 % that may fall by 2: a tenth of the weights, on paths, before any step."""
    path = str(tmp_path / "autos.safetensors")
    options = {"scorer": path, "sparsity": 0.95, "levels": 1, "steps_per_level": 2, "fall": 2.0}
    model = net()
    found = criteria.get("autos_irp")(model, data(), cross_entropy, **options)
    begun = {name: score > -2 for name, score in found.items()}
    assert masks.kept(begun) == 153  # Of 1,530.
    assert masks.kept(reach.live(model, begun, (6,))) == 153
    assert sum(int((score >= 0).sum()) for score in found.values()) == 76
    other = criteria.get("autos_irp")(net(), data(), cross_entropy, seed=1, **options)
    assert any(bool((begun[name] != (other[name] > -2)).any()) for name in begun)
    with pytest.raises(UsageError, match="fall must be above 1"):
        criteria.get("autos_irp")(model, data(), cross_entropy, **options | {"fall": 1.0})


def test_without_movement_the_initial_weights_rank(scorer: AutoS, tmp_path: Path) -> None:
    model, path = net(), str(tmp_path / "autos.safetensors")
    found = criteria.get("autos_irp")(
        model, data(), cross_entropy, scorer=path, sparsity=0.5, levels=1, steps_per_level=2,
        start=1.0, movement=0.0,
    )  # fmt: skip
    assert sum(int((score >= 0).sum()) for score in found.values()) == 765
    for name, weight in prunable(model).items():
        alive = found[name] >= 0
        lowest = weight.abs()[alive].min()
        assert not (weight.abs()[~alive] > lowest).any()
        torch.testing.assert_close(found[name][alive], weight.detach().abs()[alive])
