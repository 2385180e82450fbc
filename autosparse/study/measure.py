"""What a network costs: weights, operations, memory, bytes on disk, and milliseconds here."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from autosparse.study.deploy import write_onnx

WEIGHTED = ("conv1d", "conv2d", "conv3d", "linear")
"""Functions whose second argument is a weight that sparsity saves products with."""
WARM_UPS = 2
"""Calls before latencies count: the first ones allocate memory and choose kernels."""


def costs(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return what one image costs: parameters, non-zeros, FLOPs (2 per product), activations.

    `flops` counts convolutions, linear layers and attention as `torch.utils.flop_counter` does;
    in `flops_sparse` each layer counts by the share of its weights that are not zero.
    `activation_bytes` is the most that tensors other than parameters take at one time.

    Args:
        model: in eval mode.
        images: one image or more; the first is used.
    """
    image = images[:1]
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(image)
        rows = layers(model, image)
        with _Live() as live:
            live.watch(image)
            model(image)
    parameters = list(model.parameters())
    total = counter.get_total_flops()
    saved = sum(row["flops"] - row["flops_sparse"] for row in rows)
    return {
        "parameters": sum(each.numel() for each in parameters),
        "nonzero": sum(int(each.count_nonzero()) for each in parameters),
        "flops": total,
        "flops_sparse": total - saved,
        "activation_bytes": live.most,
    }


def layers(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Return a row per weight of a convolution or linear layer, in the order they are called.

    layer, weights, nonzero, flops of one image, and flops_sparse: times the share of non-zeros.
    """
    with torch.no_grad(), _Layers(model) as seen:
        model(images[:1])
    return list(seen.rows.values())


class _Layers(TorchFunctionMode):
    """Counts the FLOPs of each weight, whoever calls its layer: a module, a function, a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(each): name for name, each in model.named_parameters()}
        self.names |= {id(each): name for name, each in model.named_buffers()}
        self.rows: dict[str, dict[str, Any]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        name = getattr(function, "_schema", None)
        name = name.name.rpartition("::")[2] if name else getattr(function, "__name__", "")
        if name in WEIGHTED and len(args) > 1 and isinstance(output, Tensor):
            self._note(args[1], output)
        return output

    def _note(self, weight: Tensor, output: Tensor) -> None:
        key = self.names.get(id(weight), f"computed weight {len(self.rows)}")
        flops = 2 * output.numel() * weight[0].numel()
        kept = int(weight.count_nonzero())
        row = {"layer": key, "weights": weight.numel(), "nonzero": kept, "flops": 0}
        row = self.rows.setdefault(key, {**row, "flops_sparse": 0})
        row["flops"] += flops
        row["flops_sparse"] += round(flops * kept / max(weight.numel(), 1))


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, parameters left out."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self.seen:
            return
        self.seen.add(address)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        places = {
            each.untyped_storage()._cdata
            for each in tree_leaves((args, kwargs or {}))
            if isinstance(each, Tensor)
        }
        outputs = function(*args, **(kwargs or {}))
        for each in tree_leaves(outputs):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in places:
                self.watch(each)
        return outputs


def file_bytes(model: nn.Module) -> dict[str, int]:
    """Return the size of the state dict as safetensors, and compressed (zstd, else zlib)."""
    state = {name: each.detach().clone() for name, each in model.state_dict().items()}
    content = save({name: each.contiguous() for name, each in state.items()})
    if importlib.util.find_spec("zstandard"):
        import zstandard  # type: ignore[import-not-found]

        return {
            "safetensors_bytes": len(content),
            "zstd_bytes": len(zstandard.ZstdCompressor(level=10).compress(content)),
        }
    return {"safetensors_bytes": len(content), "zlib_bytes": len(zlib.compress(content, 6))}


def onnx_runner(model: nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Any], int] | None:
    """Return a function that runs `model` in ONNX Runtime, and its file's bytes; None without it.

    One thread, as torch has here: OMP_NUM_THREADS.
    """
    if any(importlib.util.find_spec(n) is None for n in ("onnxruntime", "onnx", "onnxscript")):
        return None
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, images, path)
        content = path.read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Any:
        return session.run(None, {"images": images.numpy()})[0]

    return run, len(content)


def latencies(
    runners: dict[str, Callable[[Tensor], Any]], images: Tensor, runs: int
) -> dict[str, list[float]]:
    """Return milliseconds per call, by name; measured in turn (A B A B …) after two warm-ups.

    Processor time of all threads together is taken, which other work on the machine changes
    little; with one thread it is the latency of an idle machine.
    """
    taken: dict[str, list[float]] = {name: [] for name in runners}
    with torch.inference_mode():
        for number in range(runs + WARM_UPS):
            for name, run in runners.items():
                started = time.process_time()
                run(images)
                if number >= WARM_UPS:
                    taken[name].append(1000 * (time.process_time() - started))
    return taken


def measured(
    models: dict[str, nn.Module], shape: tuple[int, ...], batches: list[int], runs: int
) -> dict[str, Any]:
    """Measure networks of the same images against the first of them.

    Args:
        models: by name, in eval mode on the CPU.
        shape: [C, H, W] of an image.
        batches: how many images at once, for latency.
        runs: calls of each, in turn.

    Returns `rows` (one per model: costs, bytes, and `latency`: engine and batch -> median and
    quartiles in milliseconds, and the ratio to the first model) and `layers` per model.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(max(2, *batches), *shape, generator=generator)
    rows = {name: {**costs(model, images), **file_bytes(model)} for name, model in models.items()}
    engines = {"torch": dict(models)}
    for name, model in models.items():
        onnx = onnx_runner(model, images[:2])
        if onnx is not None:
            engines.setdefault("onnxruntime", {})[name], rows[name]["onnx_bytes"] = onnx  # type: ignore
    for engine, runners in engines.items():
        for batch in batches:
            taken = latencies(runners, images[:batch], runs)
            for name, times in taken.items():
                rows[name].setdefault("latency", {})[f"{engine} {batch}"] = _spread(
                    times, next(iter(taken.values()))
                )
    return {
        "rows": rows,
        "layers": {name: layers(model, images) for name, model in models.items()},
    }


def _spread(times: list[float], first: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    ratio = statistics.median(a / b for a, b in zip(times, first, strict=True))
    return {"ms": middle, "quartiles": [low, high], "of_first": ratio}


def table(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what `measured` found as a table: a row per figure, a column per network."""
    rows = figures["rows"]
    keys = [key for key in next(iter(rows.values())) if key != "latency"]
    shown = [{"figure": key, **{n: row.get(key, "") for n, row in rows.items()}} for key in keys]
    for key in next(iter(rows.values()))["latency"]:
        engine, batch = key.rsplit(" ", 1)
        row: dict[str, Any] = {"figure": f"{engine}, batch {batch}: ms"}
        for name, each in rows.items():
            one = each["latency"][key]
            half = (one["quartiles"][1] - one["quartiles"][0]) / 2
            spread = float(f"{half:.1g}")  # One digit, as a plain number.
            row[name] = f"{one['ms']:.3g}±{spread:g} (x{one['of_first']:.2f})"
        shown.append(row)
    return shown
