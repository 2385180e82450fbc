"""AutoS: the network from features to score, and its file.

Two heads. `mean` (the paper's): one number, predicted survival, to be compared over the whole
network. `survival` (ours): see heads.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.autos import features
from autosparse.autos.heads import DENSITIES, Heads, apply_mlp, mlp
from autosparse.core.errors import UsageError, unknown
from autosparse.core.files import read_tensors, require, write_tensors

FORMAT = 1
HEADS = ("mean", "survival")


def check(kind: str, head: str) -> None:
    """Raise UsageError for an unknown kind or head, or a pair that does not go together."""
    features.names_of(kind)
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    if head == "survival" and kind != "context":
        raise UsageError("head survival reads features context")


class AutoS(nn.Module):
    """Features [N, F] -> predicted survival [N], from 0 (pruned first) to 1 (never); or two heads.

    Args:
        kind: which features it reads (see `features.KINDS`).
        hidden: widths of the hidden layers of an MLP.
        head: mean or survival.
        densities: those that the survival head is fitted at, falling; see heads.py.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        kind: str,
        hidden: Sequence[int] = (32, 32),
        *,
        head: str = "mean",
        densities: Sequence[float] = DENSITIES,
    ) -> None:
        super().__init__()
        check(kind, head)
        self.kind, self.hidden, self.head = kind, tuple(hidden), head
        self.densities = tuple(densities) if head == "survival" else ()
        self.card: dict[str, Any] = {}
        if head == "survival":
            self.heads = Heads(self.hidden, self.densities)
            return
        inputs = len(features.names_of(kind))
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.layers = mlp([inputs, *self.hidden, 1])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return predicted survival [N] for features [N, F].

        With the survival head log-odds inside the layers instead, [N, D] at its D densities.
        """
        if self.head == "survival":
            return self.heads.weights_say(inputs)
        return self.layers((inputs - self.mean) / self.std).squeeze(1)

    @torch.no_grad()
    def score(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return predicted survival per weight of a whole model (mean head)."""
        weights = {name: weight.detach() for name, weight in weights.items()}
        contexts = features.contexts(weights, gradients)
        fused = self._fused()
        scores = {}
        for name, weight in weights.items():
            pieces = features.layer_features(self.kind, weight, gradients[name], contexts[name])
            scores[name] = torch.cat([fused(piece) for piece in pieces]).view(weight.shape)
        return scores

    @torch.no_grad()
    def odds(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], density: float
    ) -> dict[str, Tensor]:
        """Return the log-odds of weights inside their layers (survival head)."""
        contexts = features.contexts(weights, gradients)
        return {
            name: self.heads.weight_scores(weight, gradients[name], contexts[name], density)
            for name, weight in weights.items()
        }

    def layer_densities(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        density: float,
        lift: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Return the expected densities of the layers (survival head).

        `lift`: what to add to the log-odds of whole layers.
        """
        contexts = features.contexts(weights, gradients)
        shapes = {name: weight.shape for name, weight in weights.items()}
        return self.heads.layer_densities(shapes, contexts, density, lift)

    def _fused(self) -> Callable[[Tensor], Tensor]:
        """Return the MLP as a function of pieces [F, n], the normalisation in its first layer."""
        first, *others = (layer for layer in self.layers if isinstance(layer, nn.Linear))
        matrix = first.weight / self.std
        biases = [first.bias - matrix @ self.mean, *(layer.bias for layer in others)]
        matrices = [matrix, *(layer.weight for layer in others)]
        return partial(apply_mlp, matrices, [bias[:, None] for bias in biases])

    @property
    def fingerprint(self) -> str:
        """16 hex digits of kind and parameters."""
        digest = hashlib.sha256(f"{self.kind} {self.hidden}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the network and its card as one safetensors file, atomically."""
        header = {
            "kind": "autos",
            "format": FORMAT,
            "features": self.kind,
            "inputs": list(features.names_of(self.kind)),
            "hidden": list(self.hidden),
            "head": self.head,
            "densities": list(self.densities),
            "fingerprint": self.fingerprint,
            "card": self.card,
        }
        write_tensors(path, self.state_dict(), header)

    @classmethod
    def load(cls, path: str | Path) -> AutoS:
        """Read an AutoS file; raise UsageError for another file or other features than ours."""
        tensors, header = read_tensors(path)
        if header.get("kind") != "autos":
            raise UsageError(
                f"{path} is not an AutoS file but {header.get('kind', 'something else')}"
            )
        require(header, ("features", "inputs", "hidden", "fingerprint", "card"), path)
        ours = list(features.KINDS.get(header["features"], ()))
        if header["inputs"] != ours:
            odd = sorted(set(ours) ^ set(header["inputs"])) or ["another order"]
            raise UsageError(
                f"{path} was fitted on other features than this version computes "
                f"({header['features']}: {odd[0]}); fit it again"
            )
        if header.get("tabulated"):
            raise UsageError(
                f"{path} holds a table instead of a network, as earlier versions wrote it; "
                "fit it again"
            )
        shape = {key: header[key] for key in ("head", "densities") if key in header}
        try:
            with torch.random.fork_rng(devices=[]):
                scorer = cls(header["features"], header["hidden"], **shape)
        except UsageError as error:
            raise UsageError(f"{path} does not fit its own card: {error}") from None
        scorer.float()  # As in the file, whatever torch's default dtype is now.
        try:
            scorer.load_state_dict(tensors)
        except RuntimeError as error:
            raise UsageError(f"{path} does not fit its own card: {error}") from None
        if scorer.fingerprint != header["fingerprint"]:
            raise UsageError(f"{path}: the values do not match their fingerprint; it is damaged")
        scorer.card = header["card"]
        return scorer.eval()
