"""Writes a trained ticket as a state dict (2:4, too), ONNX, a smaller network, or a ticket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from autosparse.core.errors import UsageError, unknown
from autosparse.core.files import write_tensors
from autosparse.core.locks import claimed
from autosparse.models import zoo
from autosparse.models.standardised import differs_from_plain
from autosparse.sparsity.compact import densify
from autosparse.sparsity.slim import slim
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.sparsity.two_four import two_four
from autosparse.study.deploy import write_onnx, write_program
from autosparse.study.trainings import TRAINED

FORMATS = ("dense", "ticket", "onnx", "slim", "2:4")
ROWS, COLUMNS = 32, 64
"""Multiples that `torch.sparse.to_sparse_semi_structured` asks of [out, in] in half precision."""
ENDINGS = {
    "dense": ".dense.safetensors",
    "ticket": ".ticket.safetensors",
    "onnx": ".onnx",
    "slim": ".slim.pt2",
    "2:4": ".2to4.safetensors",
}


def trained_ticket(path: str | Path) -> Ticket:
    """Return the ticket of a file, or of a folder that a training has finished."""
    path = Path(path)
    if path.is_dir():
        if not (path / TRAINED).is_file():
            raise UsageError(f"{path} holds no {TRAINED}: the training is not finished")
        path = path / TRAINED
    return Ticket.load(path)


def dense_model(ticket: Ticket) -> nn.Module:
    """Return the ticket's model with ordinary weights, zero where pruned, in eval mode."""
    return densify(compact(zoo.from_recipe(ticket.card["model"]), ticket)).eval()


def write(ticket: Ticket, kind: str, path: Path, *, slimmed: bool = False) -> dict[str, Any]:
    """Write a ticket in a format of `FORMATS`; return its size, and what it holds.

    dense: safetensors that `timm.create_model(…).load_state_dict` takes, and with which it gives
        the trained logits (UsageError where that cannot be); the card in its header.
    onnx: the network from normalised images [batch, C, H, W] to logits, the batch free;
        `slimmed`: without the units that have no effect.
    slim: the same smaller network as a program of plain PyTorch, for `torch.export.load`.
    2:4: as dense, but the pruned weights of linear layers that sparse tensor cores take (a multiple
        of 32 outputs and of 64 inputs) have two of every four inputs at most, in the order of
        `columns/LAYER`; see docs/howto/export.md. Here logits may change.
    ticket: the ticket itself, e.g. to train on from trained values.

    Raises UsageError if another process is writing the same file.
    """
    if kind not in FORMATS:
        raise unknown("format", kind, FORMATS)
    if slimmed and kind not in ("onnx", "slim"):
        raise UsageError(f"--slim goes with --format onnx or slim, not with {kind}")
    with claimed(path.parent, name=f"{path.name}.claim"):
        told = _write(ticket, kind, path, slimmed or kind == "slim")
    return {"file": str(path), "bytes": path.stat().st_size, "kept": ticket.kept, **told}


def _write(ticket: Ticket, kind: str, path: Path, slimmed: bool) -> dict[str, Any]:
    """Write the file; return `parameters` (before, after) where the network was slimmed."""
    told: dict[str, Any] = {}
    if kind == "ticket":
        ticket.save(path)
    elif kind in ("dense", "2:4"):
        model = dense_model(ticket)
        _check_plain(model, str(ticket.card["model"]["name"]))
        state = model.state_dict()
        if kind == "2:4":
            state, told["kept_score"] = _semi_structured(model, ticket)
        write_tensors(path, {name: t.contiguous() for name, t in _once(state).items()}, ticket.card)
    else:
        recipe = ticket.card["model"]
        images = torch.zeros(2, recipe["in_chans"], recipe["image_size"], recipe["image_size"])
        model = dense_model(ticket)
        if slimmed:
            model = slim(model, images)
            told["parameters"] = model.slimmed["parameters"]  # type: ignore[index]
        (write_onnx if kind == "onnx" else write_program)(model, images, path)
    return told


def _semi_structured(
    model: nn.Module, ticket: Ticket
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the state dict with 2:4 weights, and per layer the share of sum |weight| that stays.

    `columns/LAYER` is the order of the inputs, int64 [in], or [0] for the order as it was.
    """
    state, shares = dict(model.state_dict()), {}
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if type(module) is not nn.Linear or key not in ticket.masks:
            continue
        weight = state[key]
        if weight.shape[0] % ROWS or weight.shape[1] % COLUMNS:
            continue
        state[key], order = two_four(weight)
        same = bool((order == torch.arange(len(order), device=order.device)).all())
        state[f"columns/{name}"] = order[:0] if same else order
        whole = float(weight.abs().sum(dtype=torch.float64))
        left = float(state[key].abs().sum(dtype=torch.float64))
        shares[name] = left / whole if whole else 1.0
    if not shares:
        raise UsageError(
            f"{ticket.card['model']['name']} has no pruned linear layer of a multiple of {ROWS} "
            f"outputs and {COLUMNS} inputs, as sparse tensor cores want them; use another format"
        )
    return state, shares


def _check_plain(model: nn.Module, name: str) -> None:
    """Raise UsageError where timm's own model would not give this one's logits.

    Networks that standardise their kernels (NFNet, BiT) take every filter's mean away, which turns
    pruned zeros into other numbers; here the kernel is masked again (see standardised.py). No
    weights make a plain one do that.
    """
    layer = differs_from_plain(model)
    if layer is not None:
        raise UsageError(
            f"{name} standardises its kernels: no weights give timm's own model the trained "
            f"logits (first at {layer}); use --format onnx or ticket"
        )


def _once(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give tied weights memory of their own: safetensors refuses tensors that share it."""
    seen: set[int] = set()
    untied = {}
    for name, tensor in state.items():
        address = tensor.data_ptr()
        untied[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return untied
