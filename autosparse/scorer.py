"""AutoS: the network from features to score, and its file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse import features
from autosparse.errors import UsageError
from autosparse.files import read_tensors, require, write_tensors

FORMAT = 1


class AutoS(nn.Module):
    """A small MLP: features [N, F] -> predicted survival [N], 0 (first to go) to 1 (never).

    Args:
        kind: which features it reads (see `features.KINDS`).
        hidden: widths of the hidden layers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, kind: str, hidden: Sequence[int] = (32, 32)) -> None:
        super().__init__()
        inputs = len(features.names_of(kind))
        self.kind, self.hidden = kind, tuple(hidden)
        self.card: dict[str, Any] = {}
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        layers: list[nn.Module] = []
        for width in self.hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return predicted survival [N] for features [N, F]."""
        return self.layers((inputs - self.mean) / self.std).squeeze(1)

    @torch.no_grad()
    def score(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return a score per weight of a whole model, from initial weights and gradients."""
        weights = {name: weight.detach() for name, weight in weights.items()}
        found = features.contexts(weights, gradients)
        fused = self._fused()
        scores = {}
        for name, weight in weights.items():
            pieces = features.layer_features(self.kind, weight, gradients[name], found[name])
            scores[name] = torch.cat([fused(piece) for piece in pieces]).view(weight.shape)
        return scores

    def _fused(self) -> Callable[[Tensor], Tensor]:
        """Fold the normalisation into the first layer and work on pieces [F, n] as they come."""
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        first = linears[0].weight / self.std
        biases = [linears[0].bias - first @ self.mean, *(layer.bias for layer in linears[1:])]
        matrices = [first, *(layer.weight for layer in linears[1:])]

        def run(piece: Tensor) -> Tensor:
            for matrix, bias in zip(matrices[:-1], biases[:-1], strict=True):
                piece = torch.addmm(bias[:, None], matrix, piece).relu_()
            return torch.addmm(biases[-1][:, None], matrices[-1], piece)[0]

        return run

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
            "fingerprint": self.fingerprint,
            "card": self.card,
        }
        write_tensors(path, self.state_dict(), header)

    @classmethod
    def load(cls, path: str | Path) -> AutoS:
        """Read an AutoS file; raise UsageError when it is none or its features are not ours."""
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
        with torch.random.fork_rng(devices=[]):
            scorer = cls(header["features"], header["hidden"])
        try:
            scorer.load_state_dict(tensors)
        except RuntimeError as error:
            raise UsageError(f"{path} does not fit its own card: {error}") from None
        if scorer.fingerprint != header["fingerprint"]:
            raise UsageError(f"{path}: the values do not match their fingerprint; it is damaged")
        scorer.card = header["card"]
        return scorer.eval()
