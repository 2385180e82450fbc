"""The ticket: mask, the values it keeps, and a card; the unit that is saved, shared, trained.

The file is one safetensors. Per prunable parameter it has `mask/NAME` (packed bits) or, where that
is shorter, `gaps/NAME` (see mask_codes.py), and `kept/NAME` (values). The rest of the state dict is
`rest/NAME`, and the card is in the header. Small files hold the same, packed (see packs.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.core.files import read_tensors, require, write_tensors
from autosparse.models.zoo import unwrapped
from autosparse.sparsity import masks as masks_module
from autosparse.sparsity import packs
from autosparse.sparsity.compact import compact_weights, hold_compact, stored_name
from autosparse.sparsity.mask_codes import decoded, encoded

FORMAT = 3
"""Of packed files. Others have format 2 if there are gaps in them, else 1, which earlier versions
read too."""
TOPOLOGY = "autosparse_topology"
"""Attribute of a model: how its masks have changed in training, for the card."""
MASKS = "autosparse_masks"
"""Attribute of a model: the masks of ordinary weights that were pruned in training, by name."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """A mask per prunable parameter, the values that it keeps, and how it came about."""

    masks: dict[str, Tensor]
    """Per prunable parameter a bool tensor of its shape; True = kept."""
    values: dict[str, Tensor]
    """Per prunable parameter its surviving values, 1-D, in row-major order."""
    rest: dict[str, Tensor]
    """Everything else in the state dict: biases, norms, embeddings, buffers."""
    card: dict[str, Any] = field(default_factory=dict)
    """Model, sparsity, criterion and options, seed, data, fingerprints, library versions."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the masks (not the values)."""
        return masks_module.fingerprint(self.masks)

    @property
    def content_hash(self) -> str:
        """16 hex digits of masks, values and the rest: what training starts from."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for group in (self.values, self.rest):
            for name in sorted(group):
                digest.update(name.encode())
                flat = group[name].detach().cpu().contiguous().view(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def sparsity(self) -> float:
        """Fraction of prunable weights that is removed."""
        return masks_module.sparsity(self.masks)

    @property
    def kept(self) -> int:
        """Number of prunable weights that survive."""
        return masks_module.kept(self.masks)

    @classmethod
    def from_model(cls, model: nn.Module, masks: dict[str, Tensor], card: dict[str, Any]) -> Ticket:
        """Take the values under `masks` from a dense model; the model is not changed."""
        model = unwrapped(model)
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        masks = {name: mask.detach().cpu() for name, mask in masks.items()}
        values = {name: state[name][mask] for name, mask in masks.items()}
        shared = _tied_names(model, masks)
        rest = {
            name: tensor.clone()
            for name, tensor in state.items()
            if name not in masks and name not in shared
        }
        return cls(masks, values, rest, card)

    @classmethod
    def from_compact(
        cls,
        model: nn.Module,
        start: Ticket,
        card: dict[str, Any],
        state: dict[str, Tensor] | None = None,
    ) -> Ticket:
        """Take masks and values of a (trained) compact model that was made from `start`.

        `state` is the model's whole state dict, where the model itself holds only a part of it
        (ZeRO) or another precision. If the masks have changed in training, the card gets what the
        model remembers of that (see training/topology).
        """
        state = state or unwrapped(model).state_dict()
        made_compact = {name: weight.mask().cpu() for name, weight in compact_weights(model)}
        plain = {stored_name(name): name for name in made_compact}
        state = {plain.get(name, name): each.detach().cpu() for name, each in state.items()}
        pruned = {name: m.bool().cpu() for name, m in getattr(unwrapped(model), MASKS, {}).items()}
        masks = start.masks | {n: m for n, m in (pruned | made_compact).items() if n in start.masks}
        values = {
            name: state[name].clone() if name in made_compact else state[name][mask]
            for name, mask in masks.items()
        }
        rest = {name: state[name].clone() for name in start.rest}
        changes = getattr(unwrapped(model), TOPOLOGY, None)
        return cls(masks, values, rest, {**card, "topology": changes} if changes else card)

    def with_card(self, **entries: Any) -> Ticket:
        """Return the same ticket with more entries on its card."""
        return replace(self, card={**self.card, **entries})

    def dense_state(self) -> dict[str, Tensor]:
        """Return the whole state dict, zero where pruned (tied weights once)."""
        state = dict(self.rest)
        for name, mask in self.masks.items():
            state[name] = torch.zeros(mask.shape, dtype=self.values[name].dtype)
            state[name][mask] = self.values[name]
        return state

    def table(self) -> list[dict[str, Any]]:
        """Return a row per layer: name, shape, weights, kept, density."""
        return [
            {
                "layer": name,
                "shape": list(mask.shape),
                "weights": mask.numel(),
                "kept": int(mask.sum()),
                "density": float(mask.float().mean()),
            }
            for name, mask in self.masks.items()
        ]

    def check(self, model: nn.Module) -> None:
        """Raise UsageError that names the first parameter in which `model` is another one."""
        model = unwrapped(model)
        made_compact = next(compact_weights(model), None)
        if made_compact is not None:
            raise UsageError(
                f"the model is compact already (at {made_compact[0]}); densify it first"
            )
        state = model.state_dict()
        shapes = {name: mask.shape for name, mask in self.masks.items()}
        shapes |= {name: tensor.shape for name, tensor in self.rest.items()}
        for name, tensor in state.items():
            if name in shapes and tensor.shape != shapes[name]:
                raise UsageError(
                    f"this ticket is for another model: {name} is {list(tensor.shape)} in the "
                    f"model and {list(shapes[name])} in the ticket"
                )
        missing = next((name for name in shapes if name not in state), None)
        if missing is not None:
            raise UsageError(f"this ticket is for another model: only the ticket has {missing}")
        tied = _tied_names(model, self.masks)
        extra = next((name for name in state if name not in shapes and name not in tied), None)
        if extra is not None:
            raise UsageError(f"this ticket is for another model: only the model has {extra}")

    def save(self, path: str | Path) -> None:
        """Write the ticket as one safetensors file, atomically; the same ticket, the same bytes."""
        tensors = {f"rest/{name}": tensor for name, tensor in self.rest.items()}
        for name, mask in self.masks.items():
            key, code = encoded(name, mask)
            tensors |= {key: code, f"kept/{name}": self.values[name]}
        shapes = {"shapes": [[name, list(mask.shape)] for name, mask in self.masks.items()]}
        header = {
            "kind": "ticket",
            "format": 2 if any(key.startswith("gaps/") for key in tensors) else 1,
            "fingerprint": self.fingerprint,
            "content_hash": self.content_hash,
            "card": self.card,
        }
        if packs.pays(tensors):
            # Earlier versions look for shapes first, then at the format.
            listed = {**header, "format": FORMAT, "shapes": []}
            write_tensors(path, packs.packed(tensors, shapes), listed)
        else:
            write_tensors(path, tensors, {**header, **shapes})

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Read a ticket; raise UsageError that names the file, and the parameter that is wrong."""
        tensors, header = read_tensors(path)
        if header.get("kind") != "ticket":
            raise UsageError(f"{path} is not a ticket but {header.get('kind', 'something else')}")
        require(header, ("format", "fingerprint", "content_hash", "card"), path)
        if header["format"] > FORMAT:
            raise UsageError(
                f"{path} was written by a newer autosparse (format {header['format']})"
            )
        if header["format"] == FORMAT:
            try:
                tensors, more = packs.unpacked(tensors)
            except ValueError as error:
                raise UsageError(f"{path}: {error}; the file is damaged") from None
            header = {**header, **more}
            if "shapes" not in more:
                del header["shapes"]
        require(header, ("shapes",), path)
        masks, values = {}, {}
        for name, shape in header["shapes"]:
            try:
                values[name] = tensors[f"kept/{name}"]
                masks[name] = decoded(tensors, name, tuple(shape), values[name].numel())
            except KeyError:
                raise UsageError(f"{path}: {name} is missing; the file is damaged") from None
            except ValueError as error:
                raise UsageError(
                    f"{path}: the mask of {name} does not fit its shape {shape} ({error})"
                ) from None
            if int(masks[name].sum()) != values[name].numel():
                raise UsageError(
                    f"{path}: {name} keeps {int(masks[name].sum())} weights but holds "
                    f"{values[name].numel()} values; the file is damaged"
                )
        rest = {key[5:]: tensor for key, tensor in tensors.items() if key.startswith("rest/")}
        ticket = cls(masks, values, rest, header["card"])
        if ticket.fingerprint != header["fingerprint"]:
            raise UsageError(
                f"{path}: the masks do not match their fingerprint; the file is damaged"
            )
        if ticket.content_hash != header["content_hash"]:
            raise UsageError(f"{path}: the values do not match their hash; the file is damaged")
        return ticket


def compact(model: nn.Module, ticket: Ticket) -> nn.Module:
    """Put `model` into the ticket's state, its pruned weights compact; in place.

    Weights that the ticket keeps whole stay ordinary parameters. A weight that several modules
    share stays shared. An optimizer is made afterwards, of `autosparse.parameter_groups`, so that
    compact weights, which are 1-D, decay. Raises UsageError that names the first parameter that
    differs if the ticket is for another model.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError(
            "compact comes first, then DistributedDataParallel, which holds on to its parameters"
        )
    plain = unwrapped(model)
    ticket.check(plain)
    load_state(plain, ticket)
    hold_compact(plain, ticket.masks)
    return model


def load_state(model: nn.Module, ticket: Ticket) -> None:
    """Copy the ticket's values and the rest of its state into a dense model (pruned = 0)."""
    with torch.no_grad():
        state = model.state_dict()
        for name, tensor in ticket.dense_state().items():
            state[name].copy_(tensor)


def _tied_names(model: nn.Module, masks: dict[str, Tensor]) -> set[str]:
    """Return the other names under which the state dict repeats a masked, tied weight."""
    masked = {id(model.get_parameter(name)) for name in masks}
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in masked and name not in masks
    }
