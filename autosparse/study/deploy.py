"""Files that run without autosparse: ONNX, and programs of plain PyTorch (pt2)."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.core.files import replacing


def program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Return `model` as a program for batches of any size, of images like `images` [2, C, H, W]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: _batch()},))
    exported.example_inputs = None  # They would be pickled into the file.
    return exported


def write_program(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write a program that `torch.export.load(path).module()` runs; nothing in it is pickled."""
    content = io.BytesIO()
    torch.export.save(program(model, images), content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write ONNX from `images` [batch, C, H, W] to `logits`; the batch is free."""
    try:
        exported = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: _batch()},),
            dynamo=True,
            verbose=False,
        )
    except ImportError as error:
        raise UsageError(
            f"ONNX needs more packages: pip install onnx onnxscript ({error})"
        ) from None
    with replacing(path) as temporary:
        if exported is not None:
            exported.save(str(temporary))


def _batch() -> torch.export.Dim:
    return torch.export.Dim("batch")
