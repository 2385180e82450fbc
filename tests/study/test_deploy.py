"""Files that run where autosparse is not: ONNX Runtime, and plain torch."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from autosparse.cli.verbs import export_ticket
from autosparse.core.errors import UsageError
from autosparse.criteria.pruning import prune
from autosparse.sparsity.ticket import Ticket
from autosparse.study import export as exporting
from autosparse.study.config import ExportConfig
from tests.conftest import few, make_model
from tests.sparsity.slimming import spoilt

PT2 = """
import sys, numpy, torch
model = torch.export.load(sys.argv[1]).module()
for count in (1, 3):
    images = torch.from_numpy(numpy.load(sys.argv[2])[:count])
    numpy.save(f"{sys.argv[3]}{count}.npy", model(images).detach().numpy())
assert not any(name.partition(".")[0] in ("autosparse", "timm") for name in sys.modules)
"""
ONNX = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for count in (1, 3):
    images = numpy.load(sys.argv[2])[:count]
    numpy.save(f"{sys.argv[3]}{count}.npy", session.run(None, {"images": images})[0])
assert not any(name.partition(".")[0] in ("autosparse", "torch") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def ticket(digits) -> Ticket:
    """A ticket of a per cent, with biases and running statistics that are not trivial."""
    start = prune(make_model(), digits, "random", 0.97)
    return Ticket.from_model(spoilt(make_model(), 1.0), start.masks, start.card)


@pytest.mark.parametrize("kind", few(["slim", "onnx"], ["slim"]))
def test_a_slim_file_says_the_same_elsewhere(kind: str, ticket, tmp_path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"x.{kind}"
    found = exporting.write(ticket, kind, path, slimmed=True)
    before, after = found["parameters"]
    assert after < before
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "images.npy", images.numpy())
    script = {"slim": PT2, "onnx": ONNX}[kind]
    subprocess.run(
        [sys.executable, "-c", script, path, tmp_path / "images.npy", tmp_path / "logits"],
        check=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    with torch.no_grad():
        expected = exporting.dense_model(ticket)(images).numpy()
    for count in (1, 3):
        logits = np.load(tmp_path / f"logits{count}.npy")
        assert np.abs(logits - expected[:count]).max() <= 1e-5 * max(1, np.abs(expected).max())
    if kind == "slim":
        names = {each.filename: each.file_size for each in zipfile.ZipFile(path).infolist()}
        assert not any(name.endswith(".pkl") for name in names)
        assert not any(size for name, size in names.items() if "sample_inputs" in name)


def test_the_verb_says_how_much_is_left(ticket, tmp_path, capsys) -> None:
    ticket.save(tmp_path / "t.safetensors")
    export_ticket(ExportConfig(ticket=str(tmp_path / "t.safetensors"), format="slim"))
    assert (tmp_path / "t.slim.pt2").is_file()
    assert "parameters are left" in capsys.readouterr().out


def test_slim_goes_with_what_can_be_slim(ticket, tmp_path) -> None:
    with pytest.raises(UsageError, match="--slim goes with --format onnx or slim, not with dense"):
        exporting.write(ticket, "dense", tmp_path / "x", slimmed=True)
