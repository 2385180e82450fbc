"""LAMP: by hand, and against the paper's definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.models.gradients import counting
from autosparse.sparsity import masks
from tests.criteria.plain import chain

lamp = criteria.get("lamp")


def test_by_hand() -> None:
    # Squares 9, 16, 0, 1: 16/16, 9/(16 + 9), 1/(16 + 9 + 1), 0. A layer's scale does not count.
    model = chain([[3.0, -4.0], [0.0, 1.0]], [[3000.0, -4000.0], [0.0, 1000.0]])
    scores = lamp(model, [], cross_entropy)
    expected = torch.tensor([[9 / 25, 1.0], [0.0, 1 / 26]]).double()
    torch.testing.assert_close(scores["0.weight"], expected)
    torch.testing.assert_close(scores["1.weight"], expected)


def test_of_equal_weights_the_first_counts_as_the_larger() -> None:
    # 4/4, 4/(4 + 4), 4/(4 + 4 + 4), and 1/13.
    scores = lamp(chain([[2.0, -2.0, 1.0, 2.0]]), [], cross_entropy)
    torch.testing.assert_close(
        scores["0.weight"], torch.tensor([[1.0, 1 / 2, 1 / 13, 1 / 3]]).double()
    )


def test_a_whole_layer_of_equal_weights() -> None:
    # The n-th has n - 1 others that count as larger: 1/n.
    scores = lamp(chain([[3.0, -3.0] * 500]), [], cross_entropy)
    torch.testing.assert_close(scores["0.weight"][0], 1 / torch.arange(1, 1001).double())


def definition(weight: Tensor) -> Tensor:
    """Equation 5: the square over the sum of squares of all that are not smaller."""
    values = weight.detach().flatten().tolist()
    found = [u * u / sum(v * v for v in values if abs(v) >= abs(u)) for u in values]
    return torch.tensor(found, dtype=torch.float64).view(weight.shape)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_against_the_definition(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, (1, 3)), nn.Flatten())
    model.append(nn.Linear(17, 6)).double().to(memory_format=memory_format)
    scores = lamp(model, [], cross_entropy)
    for name in ("0.weight", "1.weight", "3.weight"):
        torch.testing.assert_close(scores[name], definition(model.get_parameter(name)))


def test_it_ranks_inside_a_layer_as_magnitude_does() -> None:
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    score = lamp(model, [], cross_entropy)["weight"].flatten()
    assert torch.equal(score.argsort(), model.weight.detach().abs().flatten().argsort())


def test_no_layer_is_emptied_before_all_are_down_to_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 2)).double()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[2].weight.mul_(1e4)
    alone = masks.keep(lamp(model, [], cross_entropy), 3, min_per_layer=0)
    assert [int(mask.sum()) for mask in alone.values()] == [1, 1, 1]
    largest = masks.keep(criteria.get("magnitude")(model, [], cross_entropy), 3, min_per_layer=0)
    assert [int(mask.sum()) for mask in largest.values()] == [0, 0, 3]


def test_a_layer_of_zeros_scores_zero() -> None:
    scores = lamp(chain([[0.0, 0.0]], [[1.0], [2.0]]), [], cross_entropy)
    assert scores["0.weight"].tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(scores["1.weight"], torch.tensor([[0.2], [1.0]]).double())


def test_it_costs_no_pass() -> None:
    with counting() as cost:
        lamp(chain([[1.0, 2.0]]), [], cross_entropy)
    assert cost.image_passes == 0
