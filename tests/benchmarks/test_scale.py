"""The cost model of docs/scale.md, against cases worked out by hand and the ZeRO paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from autosparse.models.zoo import prunable
from autosparse.sparsity.counts import keep_count
from autosparse.sparsity.ticket import Ticket, compact
from benchmarks import cost_model, scale, scale_predictions, shapes
from benchmarks.cost_model import GPU, Cluster, Collective, Plan, Precision, Shape

ROOT = Path(scale_predictions.__file__).parents[1]
TINY = Shape("tiny", layers=(1000, 3000), others=(50, 50), flops=1e6, activation_bytes=200.0)
PAPER = Precision(2, 2, 12)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_state_bytes_are_those_of_the_zero_papers_first_figure(stage, gigabytes):
    """7.5 B parameters on 64 GPUs, K = 12."""
    found = cost_model.state_bytes(7.5e9, 64, stage, PAPER) / 1e9
    assert found == pytest.approx(gigabytes, abs=0.05)


def test_a_ring_moves_two_parts_in_n_minus_one_of_n_for_an_all_reduce():
    assert cost_model.ring_bytes("all_reduce", 800, ranks=4) == 2 * 3 / 4 * 800
    assert cost_model.ring_bytes("reduce_scatter", 800, ranks=4) == 3 / 4 * 800
    assert cost_model.ring_bytes("all_gather", 800, ranks=4) == 3 / 4 * 800


def test_a_ring_waits_for_every_hop():
    """600 bytes at 100 a second, and in each of two calls 6 hops of half a second."""
    each = Collective("all_reduce", 400, calls=2)
    assert cost_model.ring_seconds(each, ranks=4, rate=100, hop=0.5) == 6 + 2 * 6 * 0.5


def test_ranks_send_what_an_all_reduce_by_reduce_scatter_and_all_gather_sends():
    """Count the messages of the textbook algorithm: every rank passes one chunk on per round."""
    ranks, size = 5, 1000
    sent = sum(size // ranks for phase in range(2) for _ in range(ranks - 1))
    assert cost_model.ring_bytes("all_reduce", size, ranks) == sent


def test_compact_counts_and_bytes():
    """At 90 %: 100 + 300 survivors and 100 others; 4 bytes per index; a bit per weight on disk."""
    plan = Plan(sparsity=0.9, stage=1, batch=3, precision=PAPER)
    assert cost_model.kept(TINY, 0.9) == 400
    assert cost_model.trainable(TINY, 0.9) == 500
    assert cost_model.trainable(TINY, 0.0) == TINY.total == 4100
    memory = cost_model.memory_bytes(TINY, plan, ranks=4)
    assert memory == {
        "states": 500 * (2 + 2 + 12 / 4),
        "indices": 1600,
        "scratch": 2 * (4000 + 3000),
        "activations": 600,
    }
    assert cost_model.checkpoint_bytes(TINY, plan) == 500 * 14 + 4000 / 8


def test_scattering_again_holds_one_dense_weight_and_its_gradient():
    plan = Plan(sparsity=0.9, kept_scratch=False, precision=PAPER)
    assert cost_model.memory_bytes(TINY, plan, ranks=1)["scratch"] == 2 * (3000 + 3000)


def test_a_dense_model_has_neither_indices_nor_scratch_nor_mask():
    plan = Plan(precision=PAPER)
    memory = cost_model.memory_bytes(TINY, plan, ranks=1)
    assert (memory["indices"], memory["scratch"]) == (0, 0)
    assert cost_model.checkpoint_bytes(TINY, plan) == 4100 * 14
    assert cost_model.scatter_seconds(TINY, plan, GPU()) == 0


@pytest.mark.parametrize(
    ("stage", "values"), [(0, 2 * 4100), (1, 3 * 4100), (2, 3 * 4100), (3, 2 * 4100)]
)
def test_volumes_by_stage(stage, values):
    """Ψ = 4100, two bytes each, (n - 1)/n of it; stage 3's small tensors are gathered once."""
    sent = cost_model.network_bytes(TINY, Plan(stage=stage, precision=PAPER), ranks=2)
    assert sent == values * 2 / 2


def test_volumes_of_the_paper():
    """Stages 1 and 2: a reduce-scatter and an all-gather, 2Ψ."""
    found = cost_model.collectives(TINY, Plan(stage=2, precision=PAPER), paper=True)
    assert sum(cost_model.ring_bytes(each.kind, each.size, 2) for each in found) == 2 * 4100


def test_stage_three_gathers_again_what_did_not_stay():
    """Twice the 500 M values that stay: one gather of all, one more of half."""
    big = Shape("big", (cost_model.REUSED,) * 2, (), 0.0, 0.0)
    first, whole, again = cost_model.collectives(big, Plan(stage=3, precision=PAPER))
    assert (first.kind, whole.kind, again.kind) == ("reduce_scatter", "all_gather", "all_gather")
    assert (whole.size, again.size) == (2e9, 1e9)
    assert (whole.calls, again.calls) == (3, 2)


def test_scatter_moves_all_sectors_at_half_density_and_few_at_low():
    """Sixteen bf16 entries in a sector: practically all touched at 50 %, 15 % at 1 %."""
    half = cost_model.scatter_bytes(16000, 8000, 2)
    assert half == pytest.approx(16000 * 2 * (1 + 2 + 1) + 8000 * (2 + 4 + 16 + 2 + 4), rel=1e-3)
    touched = 1 - 0.99**16
    few = cost_model.scatter_bytes(16000, 160, 2)
    assert few == pytest.approx(16000 * 2 * (1 + 3 * touched) + 160 * 28)


def test_small_weights_cost_what_kernels_cost():
    plan = Plan(sparsity=0.9)
    slow = GPU(kernel_seconds=1.0)
    assert cost_model.scatter_seconds(TINY, plan, slow) == 2 * 4
    again = Plan(sparsity=0.9, kept_scratch=False)
    assert cost_model.scatter_seconds(TINY, again, slow) == 2 * 7


def test_a_step_adds_up_and_overlap_hides_the_network_behind_backward():
    """Compute: 3 x 1e6 x 2 operations at half of 12e6 a second: one second, 2/3 of it backward."""
    gpu = GPU(flops=12e6, efficiency=0.5)
    machines = Cluster(
        gpus=16, network_rate=2 * 15 / 16 * 8200, hop_seconds=0, inside_hop_seconds=0
    )
    alone = cost_model.step_seconds(TINY, Plan(stage=0, batch=2, precision=PAPER), gpu, machines)
    assert alone["compute"] == 1
    assert alone["network"] == pytest.approx(1)
    assert alone["step"] == pytest.approx(2, rel=1e-4)
    plan = Plan(stage=0, batch=2, precision=PAPER, overlap=1)
    hidden = cost_model.step_seconds(TINY, plan, gpu, machines)
    assert hidden["network"] == pytest.approx(1 / 3)


def test_one_node_knows_no_network_and_a_ring_is_as_slow_as_its_slowest_link():
    assert Cluster(8, network_rate=1.0).rate == Cluster(8, 1.0).inside_rate
    assert Cluster(16, network_rate=1.0).rate == 1.0
    assert Cluster(16, 1.0, hop_seconds=8.0, inside_hop_seconds=0.0).hop == 1.0
    assert cost_model.network_seconds(TINY, Plan(), Cluster(1, 1.0)) == 0


def test_timm_shapes_count_the_real_model():
    shape = shapes.timm_shape("test_resnet", 32, num_classes=10)
    model = timm.create_model("test_resnet", num_classes=10)
    assert shape.total == sum(p.numel() for p in model.parameters())
    biases = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert sum(shape.others) == biases
    assert shape.activation_bytes > 0


def test_counted_operations_are_those_of_a_layer_by_hand(monkeypatch):
    """A 1 x 1 convolution on 4 x 4 pixels, then a classifier: 2 operations per weight and use."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 1), torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(5, 7)
    )
    monkeypatch.setattr(timm, "create_model", lambda name, **options: model)
    shape = shapes.timm_shape("any", 4)
    assert shape.flops == 2 * (15 * 16 + 35)
    assert (shape.layers, shape.others) == ((15, 35), (5, 7))
    inputs, convolved, pooled = 3 * 16, 5 * 16, 5
    assert shape.activation_bytes == 2 * (inputs + convolved + pooled)


def test_the_big_transformer_has_2_7_billion_weights():
    shape = shapes.gpt_2_7b()
    assert shape.prunable == 12 * 2560**2 * 32
    assert shape.total == pytest.approx(2.65e9, rel=0.01)
    by_weights = 2 * 2048 * (shape.prunable + 50257 * 2560)
    queries_keys_and_values = 2 * 2 * 2048 * 2048 * 2560 * 32
    assert shape.flops == by_weights + queries_keys_and_values


def test_kept_weights_are_those_of_a_compact_model():
    """The model's trainable values and the formula's, at 95 % in every layer."""
    shape = shapes.timm_shape("test_resnet", 32, num_classes=10)
    model = timm.create_model("test_resnet", num_classes=10)
    found = {}
    for name, weight in prunable(model).items():
        flat = torch.arange(weight.numel()) < keep_count(weight.numel(), 0.95)
        found[name] = flat.view(weight.shape)
    compact(model, Ticket.from_model(model, found, {}))
    values = sum(parameter.numel() for parameter in model.parameters())
    assert values == cost_model.trainable(shape, 0.95)


def synthetic(fixed: float, per_value: float) -> dict:
    """Return measurements of a machine that is exactly as the model has it."""
    shape = TINY
    scatter = {s: 1.0 + 0.01 * cost_model.kept(shape, s) for s in (0.5, 0.9, 0.95, 0.98)}
    steps = {
        str(s): [fixed + per_value * cost_model.trainable(shape, s) + scatter.get(s, 0.0)]
        for s in (0.0, 0.9, 0.95, 0.98)
    }
    return {"steps": steps, "scatter": {str(s): [scatter[s]] for s in (0.5, 0.9)}}


def test_held_out_steps_are_found_where_the_model_holds():
    network = {
        kind: {"0": [0.5], "1000": [0.5 + 1000 * rate]}
        for kind, rate in (("all_reduce", 0.002), ("all_gather", 0.001))
    }
    moved = 4 * (0.002 + 0.001)
    found = {1: synthetic(3.0, 0.1), 2: {**synthetic(4.0, 0.1 + moved), "network": network}}
    figures = scale.step_figures(TINY, found)
    assert len(figures) == 7
    for name, each in figures.items():
        assert each["value"] == pytest.approx(0, abs=1e-9), name


def test_the_faster_half_is_kept_wherever_seconds_are():
    found = {"steps": {"0.0": [3.0, 1.0, 2.0]}, "bytes": 7}
    assert scale.faster_half(found) == {"steps": {"0.0": [1.0, 2.0]}, "bytes": 7}


def test_predictions_say_where_compact_training_pays_and_where_not():
    """The claims of docs/scale.md, on the transformer (its shape is by formula, so it is quick)."""
    case = scale_predictions.Case(shapes.gpt_2_7b(), GPU(efficiency=0.44), batch=4)

    def row(sparsity, stage, gpus, gigabits, **more):
        machines = scale_predictions.cluster(gpus, gigabits)
        return scale_predictions.predict(case, case.plan(sparsity, stage, **more), machines)

    slow = [row(sparsity, 1, 64, 10)["step_ms"] for sparsity in (0.0, 0.98)]
    assert slow[0] / slow[1] > 5
    inside = [row(sparsity, 1, 8, 10)["step_ms"] for sparsity in (0.0, 0.98)]
    assert 0.95 < inside[0] / inside[1] < 1.1
    dense, sparse = (row(sparsity, 3, 64, 100) for sparsity in (0.0, 0.9))
    assert sparse["memory_gb"] > dense["memory_gb"], "kept scratch costs more than ZeRO 3 saves"
    dense, sparse = (row(sparsity, 3, 64, 100) for sparsity in (0.0, 0.98))
    assert sparse["memory_one_layer_gb"] < dense["memory_one_layer_gb"]


@pytest.mark.slow
def test_the_pages_tables_are_those_that_are_predicted():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert scale_predictions.filled(page) == page
    for name in scale_predictions.TABLES:
        assert f"<!-- predicted: {name} -->\n\n**resnet50**" in page
