"""Trained tickets as plain state dicts, ONNX and tickets: the same network every time."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from autosparse import compact, prune
from autosparse.cli.verbs import export_ticket
from autosparse.core.errors import UsageError
from autosparse.sparsity.ticket import Ticket
from autosparse.study import export as exporting
from autosparse.study.config import ExportConfig
from tests.conftest import holder, make_model


@pytest.fixture(scope="module")
def ticket(digits) -> Ticket:
    """A ticket whose values are not those of its initialization."""
    model = make_model()
    start = prune(model, digits, "erk", 0.9)
    compact(model, start)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return Ticket.from_compact(model, start, start.card)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(ticket, images) -> np.ndarray:
    model = compact(make_model(seed=5), ticket).double().eval()
    with torch.no_grad():
        return model(images.double()).numpy()


def test_dense_loads_into_timm(ticket, images, expected, tmp_path):
    exporting.write(ticket, "dense", tmp_path / "x.safetensors")
    model = timm.create_model("test_byobnet", num_classes=10, in_chans=1)
    model.load_state_dict(load_file(tmp_path / "x.safetensors"))
    with torch.no_grad():
        found = model.double().eval()(images.double()).numpy()
    assert np.allclose(found, expected, rtol=0, atol=1e-12)
    zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if n in ticket.masks)
    assert zeros >= sum(int((~mask).sum()) for mask in ticket.masks.values())


def test_onnx_gives_the_same_for_any_batch(ticket, images, expected, tmp_path):
    reference = pytest.importorskip("onnx.reference")
    exporting.write(ticket, "onnx", tmp_path / "x.onnx")
    found = reference.ReferenceEvaluator(str(tmp_path / "x.onnx"))
    for count in (1, 3):
        (logits,) = found.run(None, {"images": images[:count].numpy()})
        # Float32 through some twenty layers: logits of about 1 to 20 * 2^-24 * sqrt(600 summands).
        assert np.allclose(logits, expected[:count], rtol=0, atol=1e-4)


def test_a_ticket_stays_the_same(ticket, tmp_path):
    exporting.write(ticket, "ticket", tmp_path / "x.safetensors")
    assert Ticket.load(tmp_path / "x.safetensors").content_hash == ticket.content_hash


def test_the_verb_writes_beside_the_ticket(ticket, tmp_path, capsys):
    ticket.save(tmp_path / "trained.safetensors")
    export_ticket(ExportConfig(ticket=str(tmp_path)))
    assert (tmp_path / "trained.dense.safetensors").is_file()
    assert "trained.dense.safetensors" in capsys.readouterr().out


def test_two_do_not_write_one_file(ticket, tmp_path):
    with holder(tmp_path, "x.safetensors.claim") as process:
        with pytest.raises(UsageError, match=rf"x\.safetensors is being .* process {process.pid} "):
            exporting.write(ticket, "dense", tmp_path / "x.safetensors")
        assert not (tmp_path / "x.safetensors").exists()
    exporting.write(ticket, "dense", tmp_path / "x.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]


def test_mistakes_are_one_line(ticket, tmp_path):
    with pytest.raises(UsageError, match="not finished"):
        export_ticket(ExportConfig(ticket=str(tmp_path)))
    ticket.save(tmp_path / "t.safetensors")
    with pytest.raises(UsageError, match=r"unknown format 'onx'.*onnx"):
        export_ticket(ExportConfig(ticket=str(tmp_path / "t.safetensors"), format="onx"))
    assert [each.name for each in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.fixture(scope="module")
def standardised(digits) -> Ticket:
    """A ticket of a network whose kernels are standardised."""
    return prune(make_model("test_nfnet"), digits, "erk", 0.9)


def test_what_timms_own_model_cannot_say_is_refused(standardised, tmp_path):
    with pytest.raises(UsageError, match=r"test_nfnet standardises .* \(first at \S+\); use --fo"):
        exporting.write(standardised, "dense", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_where_whole_filters_are_kept_timms_own_model_says_it(standardised, images, tmp_path):
    masks = {name: torch.ones_like(mask) for name, mask in standardised.masks.items()}
    ticket = Ticket.from_model(make_model("test_nfnet"), masks, standardised.card)
    exporting.write(ticket, "dense", tmp_path / "x.safetensors")
    plain = make_model("test_nfnet", seed=3)
    plain.load_state_dict(load_file(tmp_path / "x.safetensors"))
    with torch.no_grad():
        expected = compact(make_model("test_nfnet"), ticket).eval()(images)
        torch.testing.assert_close(plain.eval()(images), expected)


def test_a_standardised_network_is_exported_as_it_was_trained(standardised, images):
    """Kernels are masked once more after they are standardised; timm's own are not."""
    with torch.no_grad():
        expected = compact(make_model("test_nfnet", seed=5), standardised).eval()(images)
        torch.testing.assert_close(exporting.dense_model(standardised)(images), expected)


def test_2_4_as_the_guide_loads_it(digits, tmp_path, capsys):
    """The guide's lines in plain torch, but for the GPU's packing; 90 % is kept nearly whole."""
    model = make_model("test_vit")
    start = prune(model, digits, "magnitude", 0.9)
    start.save(tmp_path / "trained.safetensors")
    export_ticket(ExportConfig(ticket=str(tmp_path), format="2:4"))
    assert "2:4 in 24 layers" in capsys.readouterr().out
    state = load_file(tmp_path / "trained.2to4.safetensors")
    columns = {key[8:]: state.pop(key) for key in list(state) if key.startswith("columns/")}
    plain = make_model("test_vit", seed=5)
    plain.load_state_dict(state)
    assert len(columns) == 24 and any(len(order) for order in columns.values())
    for name, order in columns.items():
        layer = plain.get_submodule(name)
        assert ((layer.weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all(), name
        if len(order):
            layer.register_forward_pre_hook(lambda _, x, order=order: (x[0][..., order],))
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        expected = exporting.dense_model(start)(images)
        found = plain.eval()(images)
    off = (found - expected).abs().max() / expected.abs().max()
    assert off < 0.02


def test_2_4_needs_a_layer_that_tensor_cores_take(ticket, tmp_path):
    with pytest.raises(UsageError, match="test_byobnet has no pruned linear layer"):
        exporting.write(ticket, "2:4", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
