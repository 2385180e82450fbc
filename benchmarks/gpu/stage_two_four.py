"""What 2:4 weights save: linear layers of ViT-B and the whole network, in half precision.

Weights have two of every four neighbouring inputs, as `export --format 2:4` writes them, and are
multiplied by sparse tensor cores (`torch.sparse.to_sparse_semi_structured`); the peer is the same
weights with their zeros, multiplied as dense ones. `gathered` puts inputs into another order before
every product, as a permuted export asks for. All are launched as a whole (CUDA graphs), as one who
deploys would: call by call (`eager`) the host's work for a sparse product outlasts the product. On
a CPU, which has no such products, all are dense.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse.sparsity.masks import n_of_m
from benchmarks.gpu.goals import LAYERS
from benchmarks.gpu.measure import Recorder, Setting, dense_model, in_turn, random_batch, ratios
from benchmarks.gpu.stage_scoring import MODELS, TINY

BATCH, TOKENS, STEPS = 128, 197, 10
HALF = torch.float16


@torch.inference_mode()
def run(setting: Setting, recorder: Recorder) -> None:
    side, batch, tokens = (32, 2, 5) if setting.tiny else (224, BATCH, TOKENS)
    dtype = HALF if setting.on_gpu else torch.float32
    config = (TINY if setting.tiny else MODELS)["vit_base"]
    model = dense_model(config, side).to(setting.device, dtype).eval()
    layers = linear_layers(model)
    first = next(iter(layers)).rsplit(".", 2)[0]
    for name in LAYERS:
        weight = layers[f"{first}.{name}"].weight
        jobs = of_layer(weight, batch * tokens, setting)
        taken = in_turn(recorded(jobs, setting), setting, steps=STEPS)
        recorder.add(f"sparse_vs_dense_{name}", ratios(taken, "sparse", "dense"))
        recorder.add(f"gathered_vs_dense_{name}", ratios(taken, "gathered", "dense"))
    images = random_batch(batch, side, setting.device)[0].to(dtype)
    zeros = copy.deepcopy(model)
    for layer in linear_layers(zeros).values():
        layer.weight.copy_(layer.weight * two_of_four(layer.weight))
    sparse = copy.deepcopy(zeros)
    for layer in linear_layers(sparse).values():
        layer.weight = nn.Parameter(as_sparse(layer.weight, setting), requires_grad=False)
    expected = zeros(images)
    off = (sparse(images) - expected).abs().max() / expected.abs().max()
    recorder.add("largest_difference", [float(off)])
    jobs = {"sparse": lambda: sparse(images), "dense": lambda: zeros(images)}
    taken = in_turn(jobs, setting)
    recorder.add("eager_vs_dense_vit_base", ratios(taken, "sparse", "dense"))
    taken = in_turn(recorded(jobs, setting), setting)
    recorder.add("sparse_vs_dense_vit_base", ratios(taken, "sparse", "dense"))
    recorder.note("dense_ms_vit_base", [round(each, 3) for each in taken["dense"]])


def recorded(jobs: dict[str, Callable[[], Any]], setting: Setting) -> dict[str, Callable[[], Any]]:
    """Return the jobs recorded, each to be launched as a whole; on a CPU as they are."""
    if not setting.on_gpu:
        return jobs
    found: dict[str, Callable[[], Any]] = {}
    for name, job in jobs.items():
        job()
        setting.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            job()
        found[name] = graph.replay
    return found


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a transformer's blocks, by name."""
    found = model.named_modules()
    return {n: each for n, each in found if isinstance(each, nn.Linear) and "blocks" in n}


def two_of_four(weight: Tensor) -> Tensor:
    """Return bool, like the weight: the two largest of every four neighbours."""
    return n_of_m({"": weight.abs()}, 2, 4)[""]


def as_sparse(weight: Tensor, setting: Setting) -> Tensor:
    """Return a weight with 2:4 zeros as sparse tensor cores take it."""
    if not setting.on_gpu:
        return weight
    from torch.sparse import to_sparse_semi_structured

    return to_sparse_semi_structured(weight.contiguous())


def of_layer(weight: Tensor, rows: int, setting: Setting) -> dict[str, Callable[[], Any]]:
    """Return the jobs of one layer: its product with `rows` random inputs, three ways."""
    inputs = torch.randn(rows, weight.shape[1]).to(weight.device, weight.dtype)
    dense = weight * two_of_four(weight)
    sparse = as_sparse(dense, setting)
    order = torch.randperm(weight.shape[1]).to(weight.device)
    return {
        "dense": lambda: F.linear(inputs, dense),
        "sparse": lambda: F.linear(inputs, sparse),
        "gathered": lambda: F.linear(inputs[:, order], sparse),
    }
