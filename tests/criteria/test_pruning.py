"""`prune`: budgets, cards, what data it takes, errors."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from autosparse import criteria, prune
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.criteria import base, rounds
from autosparse.criteria.config import PruneConfig, ScoringConfig
from autosparse.criteria.pruning import check, choose
from autosparse.criteria.scoring import Selection, score
from autosparse.data.config import DataConfig
from autosparse.data.sets import DataSource
from autosparse.models.zoo import prunable
from autosparse.sparsity import masks, reach
from autosparse.sparsity.counts import keep_count
from autosparse.sparsity.ticket import Ticket
from tests.conftest import SMALL_DIGITS, few, make_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("criterion", ["random", "erk", "magnitude", "snip", "synflow"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.987])
def test_the_budget_is_exact(digits: DataSource, criterion: str, sparsity: float) -> None:
    model = make_model()
    options = {"rounds": 3} if criterion == "synflow" else None
    ticket = prune(model, digits, criterion, sparsity, options=options)
    total = sum(weight.numel() for weight in prunable(model).values())
    assert ticket.kept == keep_count(total, sparsity)


def test_the_model_is_not_changed(digits: DataSource) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, digits, "snip", 0.9)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_batches_a_name_and_a_source_give_the_same_ticket(digits: DataSource) -> None:
    model = make_model()
    from_source = prune(model, digits, "snip", 0.9)
    from_config = prune(model, SMALL_DIGITS, "snip", 0.9)
    from_batches = prune(model, digits.score_batches(10), "snip", 0.9)
    assert from_source.fingerprint == from_config.fingerprint == from_batches.fingerprint


def test_the_card_says_how_it_came_about(digits: DataSource) -> None:
    card = prune(make_model(seed=4), digits, "snip", 0.9, seed=4, scope="layer").card
    assert card["model"]["name"] == "test_byobnet"
    assert card["model"]["seed"] == 4
    assert card["data"]["train_limit"] == 300
    assert card["data_fingerprint"] == digits.fingerprint
    assert (card["criterion"], card["sparsity"]) == ("snip", 0.9)
    assert card["selection"]["scope"] == "layer"
    assert "torch" in card["versions"]


def test_excluded_layers_are_left_out(digits: DataSource) -> None:
    ticket = prune(make_model(), digits, "magnitude", 0.9, exclude=["head"])
    assert not any(name.startswith("head") for name in ticket.masks)
    assert any(name.startswith("head") for name in ticket.rest)


def test_layer_scope_prunes_every_layer_alike(digits: DataSource) -> None:
    ticket = prune(make_model(), digits, "magnitude", 0.75, scope="layer")
    for row in ticket.table():
        assert abs(row["kept"] - 0.25 * row["weights"]) <= 1


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5])
def test_sparsity_out_of_range(digits: DataSource, sparsity: float) -> None:
    with pytest.raises(UsageError, match="sparsity must be"):
        prune(make_model(), digits, "random", sparsity)


def test_names_that_nobody_knows() -> None:
    with pytest.raises(UsageError, match="'snip'"):
        prune(make_model(), "digits", "snipp", 0.9)
    with pytest.raises(UsageError, match="'digits'"):
        prune(make_model(), DataConfig(name="digit"), "snip", 0.9)
    with pytest.raises(UsageError, match="'global'"):
        prune(make_model(), "digits", "random", 0.9, scope="globl")


def test_autos_without_a_file_says_how_to_get_one(tmp_path) -> None:
    with pytest.raises(UsageError, match="autosparse fit"):
        prune(make_model(), "digits", "autos", options={"scorer": str(tmp_path / "none")})


# Selection: whose layer densities


def layer_counts(ticket: Ticket) -> dict[str, int]:
    return {row["layer"]: row["kept"] for row in ticket.table()}


def best_of(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return mask.view(score.shape)


def direct_scores(criterion: str, digits: DataSource, model: nn.Module, **options):
    batches = digits.score_batches(10)
    return criteria.get(criterion)(model, batches, cross_entropy, **options)


def test_erk_allocates_and_snip_chooses(digits: DataSource) -> None:
    """Counts by the published formula, no layer being full; inside layers the best of SNIP."""
    model = make_model("test_resnet")
    ticket = prune(model, digits, "snip", 0.98, selection=Selection(allocation="erk"))
    weights = prunable(model)
    raw = {name: sum(each.shape) / each.shape.numel() for name, each in weights.items()}
    total = keep_count(sum(each.numel() for each in weights.values()), 0.98)
    factor = total / sum(raw[name] * each.numel() for name, each in weights.items())
    free = {name for name in raw if factor * raw[name] < 1}
    full = raw.keys() - free
    left = total - sum(weights[name].numel() for name in full)
    factor = left / sum(raw[name] * weights[name].numel() for name in free)
    assert all(factor * raw[name] < 1 for name in free) and len(free) > 10
    found, scores = layer_counts(ticket), direct_scores("snip", digits, model)
    assert ticket.kept == total
    for name, weight in weights.items():
        expected = factor * raw[name] * weight.numel() if name in free else weight.numel()
        assert abs(found[name] - expected) < 1, name
        assert torch.equal(ticket.masks[name], best_of(scores[name], found[name])), name
    assert found == layer_counts(prune(model, digits, "erk", 0.98))
    assert found != layer_counts(prune(model, digits, "snip", 0.98))


def test_uniform_allocation(digits: DataSource) -> None:
    model = make_model()
    ticket = prune(model, digits, "snip", 0.9, selection=Selection(allocation="uniform"))
    scores, found = direct_scores("snip", digits, model), layer_counts(ticket)
    total = sum(weight.numel() for weight in prunable(model).values())
    assert ticket.kept == keep_count(total, 0.9)
    for name, each in scores.items():
        assert abs(found[name] - 0.1 * each.numel()) < 1 or found[name] == 1
        assert torch.equal(ticket.masks[name], best_of(each, found[name]))


def test_the_other_criterion_takes_its_own_options_and_the_sparsity(digits: DataSource) -> None:
    options = {"rounds": 2}
    selection = Selection(allocation="synflow", allocation_options=options)
    ticket = prune(make_model(), digits, "random", 0.9, selection=selection)
    scores = direct_scores("synflow", digits, make_model(), sparsity=0.9, **options)
    expected = masks.from_scores(scores, 0.9)
    assert layer_counts(ticket) == {name: int(mask.sum()) for name, mask in expected.items()}
    assert ticket.fingerprint != masks.fingerprint(expected)
    assert ticket.card["selection"]["allocation_options"] == options


def test_sparsity_is_not_told_a_second_time_among_the_options(digits: DataSource) -> None:
    said = "give sparsity by itself, not among the options of synflow"
    with pytest.raises(UsageError, match=said):
        prune(make_model(), digits, "synflow", 0.9, options={"sparsity": 0.5})
    selection = Selection(allocation="synflow", allocation_options={"sparsity": 0.5})
    with pytest.raises(UsageError, match=said):
        prune(make_model(), digits, "random", 0.9, selection=selection)


@pytest.mark.parametrize(
    ("criterion", "options", "said"),
    [
        ("synflow", {"rounds": "1e2"}, "rounds of synflow must be a whole number, got '1e2'"),
        ("synflow", {"rounds": 2.5}, "rounds of synflow must be a whole number, got 2.5"),
        ("synflow", {"rounds": True}, "rounds of synflow must be a whole number, got True"),
        ("grasp", {"temperature": "hot"}, "temperature of grasp must be a number, got 'hot'"),
    ],
)
def test_options_of_another_kind(
    digits: DataSource, criterion: str, options: dict, said: str
) -> None:
    with pytest.raises(UsageError, match=f"^option {said}$"):
        prune(make_model(), digits, criterion, 0.9, options=options)


def test_whole_numbers_are_numbers(digits: DataSource) -> None:
    whole = prune(make_model(), digits, "grasp", 0.9, options={"temperature": 2})
    same = prune(make_model(), digits, "grasp", 0.9, options={"temperature": 2.0})
    assert whole.fingerprint == same.fingerprint


# Selection: guards


def test_the_guard_of_channels(digits: DataSource) -> None:
    model = make_model()
    free = prune(model, digits, "snip", 0.95)
    ticket = prune(model, digits, "snip", 0.95, selection=Selection(guard="channel"))
    assert ticket.kept == free.kept
    assert not all(mask.flatten(1).any(1).all() for mask in free.masks.values())
    scores = direct_scores("snip", digits, model)
    for name, mask in ticket.masks.items():
        rows, chosen = scores[name].flatten(1), mask.flatten(1)
        assert chosen.gather(1, rows.argmax(1, keepdim=True)).all(), name


@pytest.mark.parametrize("selection", [Selection(scope="layer", guard="channel"),
                                       Selection(allocation="uniform", guard="channel"),
                                       Selection(allocation="snip", guard="channel")])  # fmt: skip
def test_the_guard_of_channels_with_densities_from_elsewhere(
    digits: DataSource, selection: Selection
) -> None:
    ticket = prune(make_model(), digits, "random", 0.9, selection=selection)
    assert all(mask.flatten(1).any(1).all() for mask in ticket.masks.values())
    assert ticket.kept == keep_count(masks.total(ticket.masks), 0.9)


def test_too_many_channels_for_the_sparsity(digits: DataSource) -> None:
    with pytest.raises(UsageError, match="channel"):
        prune(make_model(), digits, "snip", 0.999, selection=Selection(guard="channel"))


def test_the_guard_of_paths(digits: DataSource) -> None:
    """Nothing but what lies on no path is exchanged, in its own layer."""
    tickets = [
        prune(make_model(), digits, "erk", 0.98, selection=Selection(guard=guard))
        for guard in ("layer", "live", "live")
    ]
    free, guarded, again = tickets
    assert guarded.fingerprint == again.fingerprint != free.fingerprint
    assert layer_counts(guarded) == layer_counts(free)
    assert guarded.card["effective_density"] > 1.2 * free.card["effective_density"]
    shape = (digits.in_chans, digits.image_size, digits.image_size)
    live = reach.live(make_model(), free.masks, shape)
    assert not any((live[name] & ~guarded.masks[name]).any() for name in live)


def test_the_guard_of_paths_needs_an_image() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="guard live needs to know the images' shape"):
        prune(model, [], "magnitude", 0.5, selection=Selection(guard="live"))


def test_without_a_guard_a_layer_may_be_emptied(digits: DataSource) -> None:
    model = make_model()
    free = prune(model, digits, "magnitude", 0.995, selection=Selection(guard="none"))
    guarded = prune(model, digits, "magnitude", 0.995)
    assert masks.first_empty(free.masks) is not None
    assert masks.first_empty(guarded.masks) is None
    assert free.kept == guarded.kept
    flat = torch.cat([weight.detach().abs().flatten() for weight in prunable(model).values()])
    threshold = flat.sort(descending=True).values[free.kept - 1]
    for name, weight in prunable(model).items():
        assert torch.equal(free.masks[name], weight.abs() >= threshold), name


# Selection: patterns


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("3:8", 3, 8)])
def test_patterns(digits: DataSource, pattern: str, n: int, m: int) -> None:
    model = make_model("test_resnet")
    ticket = prune(model, digits, "snip", 0.5, selection=Selection(pattern=pattern))
    scores = direct_scores("snip", digits, model)
    kept = 0
    for name, mask in ticket.masks.items():
        if mask.shape[1] % m:
            assert mask.all(), name
        else:
            groups = mask.movedim(1, -1).unflatten(-1, (-1, m))
            assert (groups.sum(-1) == n).all(), name
            theirs = scores[name].movedim(1, -1).unflatten(-1, (-1, m))
            lowest = theirs.masked_fill(~groups, float("inf")).min(-1).values
            assert (lowest >= theirs.masked_fill(groups, -1).max(-1).values).all(), name
        kept += mask.numel() * n // m if mask.shape[1] % m == 0 else mask.numel()
    assert ticket.kept == kept
    assert any(mask.all() for mask in ticket.masks.values())
    assert ticket.card["sparsity"] == pytest.approx(1 - kept / masks.total(ticket.masks))
    assert ticket.card["selection"]["pattern"] == pattern
    assert ticket.card["kept"] == kept


def test_a_pattern_tells_iterative_criteria_how_sparse(
    digits: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def spy(total: int, sparsity: float, rounds: int):
        asked.append(sparsity)
        return rounds_counts(total, sparsity, rounds)

    rounds_counts = rounds.counts
    monkeypatch.setattr(rounds, "counts", spy)
    prune(make_model(), digits, "iter_snip", 0.95, selection=Selection(pattern="1:4"),
          options={"rounds": 1})  # fmt: skip
    assert asked == [0.75]


@pytest.mark.parametrize(
    "pattern", ["2", "2-4", "0:4", "5:4", "a:4", "2:", ":4", "2:4:8", "-1:4", "", "2.0:4"]
)
def test_bad_patterns(pattern: str) -> None:
    with pytest.raises(UsageError, match=r"n:m"):
        prune(make_model(), "digits", "random", selection=Selection(pattern=pattern))


@pytest.mark.parametrize(
    ("selection", "named"),
    [
        (Selection(scope="layer", allocation="erk"), "allocation erk; give one"),
        (Selection(scope="layer", allocation="uniform"), "allocation uniform; give one"),
        (Selection(scope="layer", pattern="2:4"), "leave out scope"),
        (Selection(allocation="erk", pattern="2:4"), "leave out scope and allocation"),
        (Selection(guard="live", pattern="2:4"), "leave out guard live"),
        (Selection(guard="chanel"), r"guard 'chanel'.*'channel'"),
        (Selection(scope="globl"), r"scope 'globl'.*'global'"),
        (Selection(allocation="ekr"), r"'ekr'.*'erk'"),
        (Selection(allocation="synflow", allocation_options={"round": 3}), r"'round'.*'rounds'"),
    ],
)
def test_selections_that_cannot_be(selection: Selection, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        prune(make_model(), "digits", "random", selection=selection)


def test_a_scope_beside_a_selection_is_not_lost(digits: DataSource) -> None:
    selection = Selection(guard="none")
    both = prune(make_model(), digits, "snip", 0.9, selection=selection, scope="layer")
    expected = prune(make_model(), digits, "snip", 0.9, selection=replace(selection, scope="layer"))
    assert both.fingerprint == expected.fingerprint


# Criteria that choose: how scores become masks does not apply


CHOICES = {
    "autos": {},
    "autos_irp": {"levels": 1, "steps_per_level": 1},
    "cts": {"steps": 1},
    "short_irp": {"levels": 1, "steps_per_level": 1},
}


@pytest.mark.parametrize(
    ("selection", "named"),
    [
        (Selection(scope="layer"), "scope layer"),
        (Selection(allocation="erk"), "allocation erk"),
        (Selection(allocation="uniform"), "allocation uniform"),
        (Selection(guard="channel"), "guard channel"),
        (Selection(guard="none"), "guard none"),
        (Selection(guard="live"), "guard live"),
        (Selection(pattern="2:4"), "pattern 2:4"),
    ],
)
@pytest.mark.parametrize("criterion", CHOICES)
def test_a_choice_is_not_overridden(criterion: str, selection: Selection, named: str) -> None:
    said = rf"^criterion {criterion} chooses the weights itself, so {named} does not apply; .*snip"
    with pytest.raises(UsageError, match=said):
        prune(make_model(), "digits", criterion, 0.9, selection=selection)
    config = PruneConfig(
        criterion=criterion, scope=selection.scope, allocation=selection.allocation,
        guard=selection.guard, pattern=selection.pattern,
    )  # fmt: skip
    with pytest.raises(UsageError, match=said):
        check(config)


def test_scores_of_a_single_head_follow_every_selection(digits: DataSource, tmp_path) -> None:
    torch.manual_seed(0)
    AutoS("paper", [3]).save(tmp_path / "paper.safetensors")
    options = {"scorer": str(tmp_path / "paper.safetensors")}
    ticket = prune(make_model(), digits, "autos", 0.75, scope="layer", options=options)
    assert all(abs(row["kept"] - 0.25 * row["weights"]) <= 1 for row in ticket.table())


@pytest.mark.parametrize("criterion", CHOICES)
def test_the_ticket_has_the_masks_that_were_chosen(digits: DataSource, criterion: str) -> None:
    model, options = make_model(), CHOICES[criterion]
    scored, card = score(model, digits, criterion, 0.9, selection=Selection(), options=options)
    assert scored.masks is not None and not scored.scores
    assert choose(model, scored, card).fingerprint == masks.fingerprint(scored.masks)
    assert masks.kept(scored.masks) == keep_count(masks.total(scored.masks), 0.9)
    assert masks.first_empty(scored.masks) is None


def test_a_choice_allocates_too(digits: DataSource) -> None:
    theirs = prune(make_model(), digits, "autos", 0.9)
    ticket = prune(make_model(), digits, "snip", 0.9, selection=Selection(allocation="autos"))
    assert layer_counts(ticket) == layer_counts(theirs)
    assert ticket.fingerprint != theirs.fingerprint
    for guard in ("channel", "none"):
        said = f"allocation autos chooses .* guard {guard} does not apply"
        with pytest.raises(UsageError, match=said):
            prune(
                make_model(), "digits", "snip", selection=Selection(allocation="autos", guard=guard)
            )


@pytest.mark.parametrize(
    ("selection", "named"),
    [
        (Selection(scope="layer"), "scope layer"),
        (Selection(allocation="snip"), "allocation snip"),
        (Selection(pattern="2:4"), "pattern 2:4"),
    ],
)
def test_layer_counts_of_erk_are_not_overridden(selection: Selection, named: str) -> None:
    said = f"^criterion erk settles how much layers keep, so {named} does not apply; .*random"
    with pytest.raises(UsageError, match=said):
        prune(make_model(), "digits", "erk", 0.9, selection=selection)


# Scoring


def test_an_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"mode 'evl'.*'eval'"):
        prune(make_model(), "digits", "snip", scoring=ScoringConfig(mode="evl"))


GRADIENT = {"snip": {}, "grasp": {}, "fisher": {}, "iter_snip": {"rounds": 3}}


@pytest.mark.parametrize("criterion", few(GRADIENT, ["snip", "grasp"]))
def test_in_eval_mode_the_batch_size_does_not_matter(digits: DataSource, criterion: str) -> None:
    model, found = warm_model(), []
    for size in (7, 100):
        scoring = ScoringConfig(mode="eval", batch_size=size)
        found.append(
            score(
                model, digits, criterion, 0.9, selection=Selection(), scoring=scoring,
                options=GRADIENT[criterion],
            )[0].scores
        )  # fmt: skip
    small, large = found
    first, second = (masks.from_scores(each, 0.9) for each in found)
    differ = sum(int((first[name] ^ second[name]).sum()) for name in first)
    if criterion == "iter_snip":  # rounding may decide what falls a round earlier
        assert differ <= 0.001 * masks.total(first)
        for name in large:
            assert ((small[name] - large[name]).abs() > 0.5).float().mean() < 0.01
    else:
        # In float32, rounding may settle a near tie otherwise: one weight of 10,000.
        assert differ <= 1e-4 * masks.total(first)
        for name in large:
            close_to_rounding(small[name], large[name])


@pytest.mark.parametrize("criterion", few(GRADIENT, ["fisher", "iter_snip"]))
def test_in_eval_mode_only_rounding_depends_on_the_batch_size(
    digits: DataSource, criterion: str
) -> None:
    """In float64 the masks are the same, whatever the parts."""
    model = warm_model().double()
    options = {**GRADIENT[criterion]}
    if criterion == "iter_snip":
        options["sparsity"] = 0.9
    found = []
    for size in (7, 100):
        batches = [(x.double(), y) for x, y in digits.score_batches(10, batch_size=size)]
        scores = criteria.get(criterion)(
            model, batches, cross_entropy, training_mode=False, **options
        )
        found.append(scores)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-7, atol=1e-12)
    assert len({masks.fingerprint(masks.from_scores(each, 0.9)) for each in found}) == 1


def close_to_rounding(found: Tensor, expected: Tensor) -> None:
    """Sums of some thousand float32 numbers of both signs: 1000 * 2^-24 = 6e-5 of the largest."""
    tolerance = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=tolerance)


def warm_model(name: str = "test_byobnet") -> nn.Module:
    """A model whose norms have statistics that are not 0 and 1."""
    model = make_model(name)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator).mul_(0.1)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model


@pytest.mark.parametrize("criterion", few(["snip", "grasp"], ["snip"]))
def test_in_train_mode_the_batch_size_matters(digits: DataSource, criterion: str) -> None:
    """Batch norm takes its statistics from each part: what the test above rests on."""
    found = [
        prune(warm_model(), digits, criterion, 0.9, scoring=ScoringConfig(batch_size=size))
        for size in (7, 100)
    ]
    assert found[0].fingerprint != found[1].fingerprint


def seen_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Let `snip` note what it is given."""
    seen: list[tuple[Tensor, Tensor]] = []
    found = criteria.get("snip")

    def watched(model, parameters, batches, loss_fn):
        seen.extend(batches)
        return found.function(model, parameters, batches, loss_fn)

    monkeypatch.setitem(base._REGISTRY, "snip", replace(found, function=watched))
    return seen


def test_more_batches_are_other_images(digits: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_by(monkeypatch)
    scoring = ScoringConfig(samples_per_class=3, batches=2)
    ticket = prune(make_model(), digits, "snip", 0.9, scoring=scoring)
    assert [len(labels) for _, labels in seen] == [30, 30]
    assert all(labels.bincount().tolist() == [3] * 10 for _, labels in seen)
    pixels = torch.cat([images for images, _ in seen])
    assert len(pixels.flatten(1).unique(dim=0)) == 60
    assert ticket.card["image_passes"] == 60
    one = prune(make_model(), digits, "snip", 0.9, scoring=replace(scoring, batches=1))
    assert one.fingerprint != ticket.fingerprint
    assert ticket.card["scoring"]["batches"] == 2


def test_the_seed_chooses_the_images(digits: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_by(monkeypatch)
    for seed in (1, 1, 2):
        prune(make_model(), digits, "snip", 0.9, seed=seed)
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][0], seen[2][0])


def normed_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)
    )


def test_warm_up_gives_the_mean_statistics_of_the_batches(digits: DataSource) -> None:
    """Two parts of 12 and 8 images: their means and unbiased variances, weighed by images."""
    model = normed_net().double()
    batches = [(x.double(), labels) for x, labels in digits.score_batches(2, batch_size=12)]
    assert [len(labels) for _, labels in batches] == [12, 8]
    snip = criteria.get("snip")
    warm = snip(model, batches, cross_entropy, training_mode=False, warm_up=True)
    cold = snip(model, batches, cross_entropy, training_mode=False)
    assert not torch.allclose(warm["0.weight"], cold["0.weight"], rtol=0.1)
    assert not model[1].running_mean.any() and model[1].num_batches_tracked == 0
    assert model[1].momentum == 0.1

    by_hand = normed_net().double().eval()
    flat = [by_hand[0](images).transpose(0, 1).flatten(1).detach() for images, _ in batches]
    means, variances = zip(*((each.mean(1), each.var(1)) for each in flat), strict=True)
    by_hand[1].running_mean.copy_(0.6 * means[0] + 0.4 * means[1])
    by_hand[1].running_var.copy_(0.6 * variances[0] + 0.4 * variances[1])
    cross_entropy_sum = sum(
        cross_entropy(by_hand(images), labels, reduction="sum") for images, labels in batches
    )
    (cross_entropy_sum / 20).backward()
    for name, weight in prunable(by_hand).items():
        expected = (weight * weight.grad).abs().detach()
        torch.testing.assert_close(warm[name], expected, rtol=1e-9, atol=1e-14)


def test_warm_up_changes_what_prune_chooses_in_eval_mode_only(digits: DataSource) -> None:
    tickets = {
        (mode, warm): prune(
            make_model(), digits, "snip", 0.9, scoring=ScoringConfig(mode=mode, warm_up=warm)
        )
        for mode in ("train", "eval")
        for warm in (False, True)
    }
    assert tickets["train", True].fingerprint == tickets["train", False].fingerprint
    assert tickets["eval", True].fingerprint != tickets["eval", False].fingerprint
    assert tickets["eval", True].card["scoring"]["warm_up"] is True


# Cards: what it cost, and what is live

IMAGES = 20  # two of each digit
PASSES = {
    "random": ({}, 0),
    "magnitude": ({}, 0),
    "lamp": ({}, 0),
    "erk": ({}, 0),
    "snip": ({}, IMAGES),
    "grasp": ({}, IMAGES + 2 * IMAGES),
    "fisher": ({}, IMAGES),
    "iter_snip": ({"rounds": 5}, 5 * IMAGES),
    "force": ({"rounds": 4}, 4 * IMAGES),
    "synflow": ({"rounds": 7}, 7),
    # Per draw a forward for the statistics, and two forward-backward passes.
    "ntk_sap": ({"rounds": 3, "draws": 2}, 3 * 2 * IMAGES * (2 + 1 / 3)),
    # Per round two forwards of every image, and a pass of one.
    "px": ({"rounds": 3}, 3 * (IMAGES * 2 / 3 + 1)),
    # θ_2 takes two steps, the loss there a third pass; then back: θ_1 again (one step) and its
    # gradient with the Hessian's (two); θ_0 and its (two).
    "prospr": ({"steps": 2}, (2 + 1 + 1 + 2 + 2) * IMAGES),
    "short_irp": ({"levels": 2, "steps_per_level": 3, "batch_size": 25}, 2 * 3 * 25),
    # The sparse network forward and back, the dense one forward.
    "cts": ({"steps": 6, "batch_size": 25}, 6 * 25 * (1 + 1 / 3)),
}


@pytest.mark.parametrize("criterion", PASSES)
def test_the_card_says_what_scoring_cost(digits: DataSource, criterion: str) -> None:
    options, expected = PASSES[criterion]
    scoring = ScoringConfig(samples_per_class=2)
    card = prune(make_model(), digits, criterion, 0.9, options=options, scoring=scoring).card
    assert card["image_passes"] == pytest.approx(expected, abs=1e-3)
    assert card["scoring"]["samples_per_class"] == 2


def test_every_criterion_but_those_of_autos_is_in_the_table_above() -> None:
    assert {*PASSES, "autos", "autos_irp"} == set(criteria.names())


def test_allocation_and_warm_up_cost_too(digits: DataSource) -> None:
    scoring = ScoringConfig(samples_per_class=2, warm_up=True, mode="eval")
    selection = Selection(allocation="iter_snip", allocation_options={"rounds": 3})
    card = prune(make_model(), digits, "snip", 0.9, selection=selection, scoring=scoring).card
    warm = IMAGES / 3
    assert card["image_passes"] == pytest.approx(warm + IMAGES + warm + 3 * IMAGES, abs=1e-3)


def test_the_card_counts_live_weights(digits: DataSource) -> None:
    model = make_model("test_resnet")
    ticket = prune(model, digits, "magnitude", 0.98)
    live = reach.live(model, ticket.masks, (1, 16, 16))
    assert ticket.card["live"] == {name: int(mask.sum()) for name, mask in live.items()}
    total, alive = masks.total(ticket.masks), sum(ticket.card["live"].values())
    assert ticket.card["effective_density"] == pytest.approx(alive / total)
    assert 0 < alive < ticket.kept == ticket.card["kept"]


def test_live_is_worked_out_by_hand_where_a_path_is_cut() -> None:
    """Magnitude keeps four of six: unit 0 is fed and not heard, unit 1 fed and heard."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[9.0, 8], [7, 1]]))
        model[2].weight.copy_(torch.tensor([[2.0, 6]]))
    batches = [(torch.randn(4, 2, 1, 1), torch.zeros(4).long())]
    card = prune(model, batches, "magnitude", 1 / 3).card
    assert card["kept"] == 4
    assert card["live"] == {"1.weight": 1, "2.weight": 1}
    assert card["effective_density"] == pytest.approx(2 / 6)


def test_where_the_shape_is_not_known_live_is_left_out() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    card = prune(model, [], "magnitude", 0.5).card
    assert "live" not in card and "effective_density" not in card
    assert card["kept"] == 4


# Own data


def few_batches(count: int = 3, size: int = 8, side: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 1, side, side, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        ("snip", {}),
        ("grasp", {}),
        ("iter_snip", {"rounds": 3}),
        ("px", {"rounds": 2}),
        ("prospr", {"steps": 2}),
        ("magnitude", {}),
        ("synflow", {"rounds": 3}),
    ],
)
@pytest.mark.parametrize("allocation", [None, "snip"])
def test_an_iterator_that_can_be_read_once(
    criterion: str, options: dict, allocation: str | None
) -> None:
    selection = Selection(allocation=allocation)
    expected, found = (
        prune(make_model(), data, criterion, 0.9, options=options, selection=selection)
        for data in (few_batches(), iter(few_batches()))
    )
    assert found.fingerprint == expected.fingerprint
    assert found.card["image_passes"] == expected.card["image_passes"]


def test_a_loader_that_draws_is_begun_as_often_as_training_begins() -> None:
    """Looking for the images' shape would move a shuffled loader on to its next order."""

    class Begun:
        times = 0

        def __iter__(self):
            self.times += 1
            return iter(few_batches())

    data = Begun()
    prune(make_model(), data, "short_irp", 0.9, options={"levels": 1, "steps_per_level": 2})
    assert data.times == 3, "twice for the shape of its images, once to train"
    prune(make_model(), data, "short_irp", 0.9, options={"levels": 1, "steps_per_level": 2})
    assert data.times == 6


def test_short_irp_rewinds_an_iterator_that_can_be_read_once() -> None:
    options = {"levels": 2, "steps_per_level": 2}
    expected, found = (
        prune(make_model(), data, "short_irp", 0.9, options=options)
        for data in (few_batches(), iter(few_batches()))
    )
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    "wrapped",
    [
        list,
        iter,
        lambda data: DataLoader(data, batch_size=None),
    ],
    ids=["list", "iterator", "DataLoader"],
)
def test_live_is_that_of_the_images_that_were_given(wrapped) -> None:
    """A timm model that is registered for 160 px, and images of 32."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    images = torch.randn(8, 3, 32, 32)
    card = prune(model, wrapped([(images, torch.arange(8))]), "snip", 0.5).card
    dense = prune(model, [(images, torch.arange(8))], "snip", 0.0).card
    # At 32 px the last convolution's 3x3 kernels lie on one pixel.
    assert dense["live"]["layer4.0.conv2.weight"] * 9 == model.layer4[0].conv2.weight.numel()
    expected = prune(model, [(images, torch.arange(8))], "snip", 0.5).card
    assert card["live"] == expected["live"]


def test_short_irp_through_prune(digits: DataSource) -> None:
    """Two levels on what training sees: by hand, with ordinary masked training."""
    options = {
        "levels": 2, "steps_per_level": 3, "batch_size": 20, "optimizer": "sgd",
        "learning_rate": 0.05, "weight_decay": 0.0,
    }  # fmt: skip
    model = make_model("test_resnet")
    ticket = prune(model, digits, "short_irp", 0.75, options=options, seed=3)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total = sum(weight.numel() for weight in prunable(model).values())
    alive = {name: torch.ones(w.shape).bool() for name, w in prunable(model).items()}
    for density in (0.5, 0.25):
        model.load_state_dict(start)
        sgd_under_masks(model, alive, digits, options, seed=3)
        scores = {
            name: weight.detach().abs().masked_fill(~alive[name], -1)
            for name, weight in prunable(model).items()
        }
        alive = masks.keep(scores, keep_count(total, 1 - density))
    same = sum(int((alive[name] & mask).sum()) for name, mask in ticket.masks.items())
    assert ticket.kept == keep_count(total, 0.75)
    assert same >= 0.999 * ticket.kept
    assert ticket.card["criterion"] == "short_irp"
    first = prune(make_model("test_resnet"), digits, "magnitude", 0.75)
    assert sum(int((alive[n] & mask).sum()) for n, mask in first.masks.items()) < 0.999 * same


def sgd_under_masks(
    model: nn.Module, alive: dict[str, Tensor], digits: DataSource, options: dict, seed: int
) -> None:
    """Nesterov momentum 0.9, as timm's sgd; what is pruned is held at zero."""
    rate, size = options["learning_rate"], options["batch_size"]
    with torch.no_grad():
        for name, mask in alive.items():
            model.get_parameter(name).mul_(mask)
    model.train()
    generator, velocity = digits.augmentation(seed, 0), {}
    batches = digits.train.shuffled(size, seed=seed, epoch=0)
    for pixels, labels in islice(batches, options["steps_per_level"]):
        model.zero_grad()
        cross_entropy(model(digits.prepare(pixels, generator)), labels).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = parameter.grad * alive.get(name, torch.ones(()))
                velocity[name] = 0.9 * velocity.get(name, 0) + gradient
                parameter.sub_(rate * (gradient + 0.9 * velocity[name]))
