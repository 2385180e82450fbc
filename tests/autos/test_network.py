"""AutoS: its scores, its file, and the files that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autosparse.autos import features
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.core.files import read_tensors, write_tensors
from autosparse.sparsity.ticket import Ticket

SHAPES = {"conv": (4, 3, 2, 2), "depthwise": (5, 1, 3, 3), "linear": (6, 5)}


def network(kind: str = "context", hidden: tuple[int, ...] = (7, 5), seed: int = 0) -> AutoS:
    """An AutoS of random weights that has seen features of some mean and spread."""
    torch.manual_seed(seed)
    made = AutoS(kind, hidden)
    made.mean.normal_()
    made.std.uniform_(0.5, 2.0)
    made.card = {"corpus": "0123456789abcdef", "runs": [1, 2]}
    return made


def example() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights, gradients = (
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    return weights, gradients


# Scores


@pytest.mark.parametrize("chunk", [8, 1 << 16])
@pytest.mark.parametrize("hidden", [(), (4,), (7, 5)])
@pytest.mark.parametrize("kind", features.KINDS)
def test_score_is_forward_on_the_features(
    kind: str, hidden: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", chunk)
    autos, (weights, gradients) = network(kind, hidden), example()
    contexts = features.contexts(weights, gradients)
    scores = autos.score(weights, gradients)
    assert list(scores) == list(weights)
    for name, weight in weights.items():
        pieces = features.layer_features(kind, weight, gradients[name], contexts[name])
        expected = autos(torch.cat(list(pieces), dim=1).t())
        assert scores[name].shape == weight.shape
        torch.testing.assert_close(scores[name].flatten(), expected, rtol=1e-4, atol=1e-5)


def test_forward_by_hand() -> None:
    autos = AutoS("paper", [1])
    values = {
        "mean": [1.0, 0.0],
        "std": [2.0, 1.0],
        "layers.0.weight": [[3.0, -1.0]],
        "layers.0.bias": [0.5],
        "layers.2.weight": [[2.0]],
        "layers.2.bias": [-1.0],
    }
    autos.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    inputs = torch.tensor([[5.0, 4.0], [1.0, 9.0]])
    # First (5 - 1) / 2 * 3 - 4 + 0.5 = 2.5, doubled, less 1; then 0.5 - 9 < 0: only the bias.
    assert autos(inputs).tolist() == [4.0, -1.0]


def test_scores_carry_no_gradient() -> None:
    autos, (weights, gradients) = network(), example()
    parameters = {name: nn.Parameter(weight) for name, weight in weights.items()}
    scores = autos.score(parameters, gradients)
    assert not any(score.requires_grad for score in scores.values())
    assert all(parameter.grad is None for parameter in parameters.values())


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'contxt'.*'context'"):
        AutoS("contxt")


# The file


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "autos.safetensors"
    network().save(path)
    return path


def rewrite(path: Path, **entries: Any) -> None:
    """Change entries of the file's header."""
    tensors, header = read_tensors(path)
    write_tensors(path, tensors, {**header, **entries})


@pytest.mark.parametrize("hidden", [(), (7, 5)])
@pytest.mark.parametrize("kind", features.KINDS)
def test_save_and_load(kind: str, hidden: tuple[int, ...], tmp_path: Path) -> None:
    autos = network(kind, hidden)
    autos.save(tmp_path / "autos.safetensors")
    loaded = AutoS.load(tmp_path / "autos.safetensors")
    assert (loaded.kind, loaded.hidden, loaded.card) == (autos.kind, autos.hidden, autos.card)
    assert loaded.fingerprint == autos.fingerprint
    assert not loaded.training
    inputs = torch.randn(9, len(features.KINDS[kind]))
    assert torch.equal(loaded(inputs), autos(inputs))


def test_the_same_network_gives_the_same_bytes(saved: Path) -> None:
    other = saved.with_name("other.safetensors")
    AutoS.load(saved).save(other)
    assert other.read_bytes() == saved.read_bytes()


def test_loading_leaves_the_global_rng_alone(saved: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    AutoS.load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprint_sees_values_kind_and_normalisation() -> None:
    autos = network()
    same, other_values, other_mean = network(), network(seed=1), network()
    other_mean.mean[0] += 1
    assert same.fingerprint == autos.fingerprint
    found = {each.fingerprint for each in (autos, other_values, other_mean, network("paper"))}
    assert len(found) == 4


# Refusals


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (features.KINDS["context"][:-1], "layer_sensitivity"),
        ((*features.KINDS["context"], "temperature"), "temperature"),
        (features.KINDS["context"][::-1], "another order"),
    ],
    ids=["missing", "more", "another order"],
)
def test_a_file_for_other_features_is_refused(
    saved: Path, inputs: tuple[str, ...], named: str
) -> None:
    rewrite(saved, inputs=list(inputs))
    with pytest.raises(UsageError, match=f"autos.safetensors was fitted on other.*{named}"):
        AutoS.load(saved)


def test_a_kind_that_this_version_does_not_know(saved: Path) -> None:
    rewrite(saved, features="spectral", inputs=["spectrum"])
    with pytest.raises(UsageError, match=r"fitted on other features.*spectral"):
        AutoS.load(saved)


def test_a_file_with_a_table_instead_of_a_network_is_to_be_fitted_again(saved: Path) -> None:
    rewrite(saved, tabulated=True)
    with pytest.raises(UsageError, match=r"holds a table instead of a network.*; fit it again"):
        AutoS.load(saved)


def test_a_truncated_file(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"autos\.safetensors is damaged"):
        AutoS.load(saved)


def test_a_flipped_bit_in_the_values(saved: Path) -> None:
    raw = bytearray(saved.read_bytes())
    raw[-1] ^= 1
    saved.write_bytes(raw)
    with pytest.raises(UsageError, match="damaged"):
        AutoS.load(saved)


def test_a_flipped_bit_anywhere_in_the_header_is_no_crash(saved: Path) -> None:
    whole = saved.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        raw = bytearray(whole)
        raw[place] ^= 1
        saved.write_bytes(raw)
        try:
            AutoS.load(saved)
        except UsageError as error:
            assert "autos.safetensors" in str(error)


def test_values_that_do_not_fit_the_card(saved: Path) -> None:
    rewrite(saved, hidden=[9, 5])
    with pytest.raises(UsageError, match="does not fit its own card"):
        AutoS.load(saved)


def test_another_kind_of_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    ticket = Ticket.from_model(model, {"0.weight": torch.ones(2, 2).bool()}, {})
    ticket.save(tmp_path / "t.safetensors")
    with pytest.raises(UsageError, match="is not an AutoS file but ticket"):
        AutoS.load(tmp_path / "t.safetensors")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        AutoS.load(tmp_path / "nothing.safetensors")
