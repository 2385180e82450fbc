"""How long pruning takes on the device: SNIP, SynFlow and AutoS on resnet50 and ViT-B at 224 px.

The whole of `prune`, 95 %, on a balanced batch of 100 images; the thinning of AutoS by itself too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from autosparse.criteria.autos import TILT, counts
from autosparse.criteria.pruning import prune
from autosparse.models.config import ModelConfig
from autosparse.models.zoo import prunable
from autosparse.sparsity import reach
from benchmarks.gpu.goals import SCORED
from benchmarks.gpu.measure import Recorder, Setting, dense_model, in_turn, random_batch

SPARSITY, RUNS = 0.95, 3
MODELS = {"resnet50": ModelConfig("resnet50"), "vit_base": ModelConfig("vit_base_patch16_224")}
TINY = {
    "resnet50": ModelConfig("test_resnet"),
    "vit_base": ModelConfig("test_vit", {"patch_size": 8}),
}
LONGEST = "synflow"
"""Measured once, without a warm-up, and last."""
CRITERIA = ("snip", "autos", LONGEST)


def run(setting: Setting, recorder: Recorder) -> None:
    side, images = (32, 10) if setting.tiny else (224, 100)
    batch = random_batch(images, side, setting.device)
    for name in SCORED:
        model = model_of(name, side, setting)
        job = thinning(model, side)
        recorder.add(f"thinning_seconds_{name}", seconds(job, setting, RUNS))
    for criterion in CRITERIA:
        for name in SCORED:
            model = model_of(name, side, setting)
            if setting.on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            job = partial(prune, model, [batch], criterion, SPARSITY)
            runs, warm_up = (1, 0) if criterion == LONGEST else (RUNS, 1)
            recorder.add(f"{criterion}_seconds_{name}", seconds(job, setting, runs, warm_up))
            if setting.on_gpu:
                peak = torch.cuda.max_memory_allocated()
                recorder.note(f"peak_bytes_{criterion}_{name}", peak)


def model_of(name: str, side: int, setting: Setting) -> nn.Module:
    """Return a dense model on the device."""
    return dense_model((TINY if setting.tiny else MODELS)[name], side).to(setting.device)


def seconds(job: Callable[[], Any], setting: Setting, runs: int, warm_up: int = 1) -> list[float]:
    """Return the seconds of every run after those to warm up."""
    taken = in_turn({"job": job}, setting, runs=runs, warm_up=warm_up)["job"]
    return [each / 1e3 for each in taken]


def thinning(model: nn.Module, side: int) -> Callable[[], Any]:
    """Return a job: what AutoS does after it has drawn, on noise of the device."""
    weights = prunable(model)
    scores = {name: torch.rand_like(weight) for name, weight in weights.items()}
    kept = counts(dict.fromkeys(weights, 1 - SPARSITY), weights, SPARSITY)
    return lambda: reach.best_on_paths(model, scores, kept, (3, side, side), tilt=TILT)
