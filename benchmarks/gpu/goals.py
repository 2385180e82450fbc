"""Every figure that the stages measure: its unit, its goal, and what it is held against.

The standard library only, so that the table is there wherever Python is.
"""

from __future__ import annotations

Expected = tuple[str, str, str]
"""Unit, goal (empty: none), peer (empty: none)."""

MODELS = ("resnet50", "vit_base", "resnet18_32px")
"""Of the stage `resnet50`: timm's at 224 px, batch 256; the last at 32 px, batch 1024."""
SCORED = ("resnet50", "vit_base")
WORKERS = (1, 2, 4, 8, 15)
STEP_GOALS = {"resnet50": "<= 1.01", "vit_base": "<= 1.01", "resnet18_32px": "<= 1.05"}
THINNING_GOALS = {"resnet50": "<= 1.5", "vit_base": "<= 2"}
SPARSITIES = (90, 95, 98)
SCATTERS = {
    "each": "every weight by itself",
    "flat": "by torch's operations, a group at once",
    "triton": "by Triton's kernels, as training does",
    "triton_int64": "the same with int64 places",
    "triton_one_group": "the same, all weights in one group",
    "floor": "one scatter, one gather, no autograd",
}
"""Ways from survivors to dense weights and back."""
ZERO = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Of ViT-B's first block."""


def _probe() -> dict[str, Expected]:
    return {
        "copy_gb_per_s": ("GB/s", "", "bytes read and written, device to device"),
        "bf16_tflop_per_s": ("TFLOP/s", "", "8192 cubed, random numbers"),
        "pinned_to_device_gb_per_s": ("GB/s", "", "pinned memory to the device"),
        "pageable_to_device_gb_per_s": ("GB/s", "", "ordinary memory to the device"),
    }


def _tests() -> dict[str, Expected]:
    return {
        "tests_passed": ("tests", "", ""),
        "tests_failed": ("tests", "0", ""),
        "tests_seconds": ("s", "<= 90", ""),
    }


def _step_figures(model: str) -> dict[str, Expected]:
    found: dict[str, Expected] = {
        f"step_ms_{model}_dense": ("ms", "", "our step, dense"),
        f"dense_vs_bare_{model}": ("times", "<= 1.03", "a plain PyTorch loop"),
        f"fit_vs_step_{model}": ("times", "<= 1.02", "steps on batches that are ready"),
        f"syncs_{model}": ("places", "0", "where five steps wait for the device"),
    }
    for sparsity in SPARSITIES:
        found[f"step_vs_dense_{sparsity}_{model}"] = (
            "times",
            STEP_GOALS[model],
            "our dense step",
        )
    found[f"each_vs_ours_95_{model}"] = ("times", "", "weights scattered each by itself; ours")
    for sparsity in SPARSITIES:
        found[f"peak_vs_dense_{sparsity}_{model}"] = ("times", "<= 1.05", "our dense step's memory")
        found[f"checkpoint_vs_dense_{sparsity}_{model}"] = ("times", "", "the dense checkpoint")
    return found


def _resnet50() -> dict[str, Expected]:
    return {name: each for model in MODELS for name, each in _step_figures(model).items()}


def _irp() -> dict[str, Expected]:
    return {
        "level_images_per_s": ("images/s", "", ""),
        "bare_images_per_s": ("images/s", "", ""),
        "level_vs_bare": (
            "times as fast",
            ">= 0.9",
            "a bare loop, compiled by default, same model dense",
        ),
        "level_seconds": ("s", "<= 16", "16 epochs of CIFAR-10, choice of the next mask included"),
        "first_level_seconds": ("s", "", "the dense one, with what is compiled"),
        "graphs_after_first_level": ("graphs", "0", "compiled for the second level"),
    }


def _scoring() -> dict[str, Expected]:
    found: dict[str, Expected] = {}
    for model in SCORED:
        for criterion in ("snip", "synflow", "autos"):
            found[f"{criterion}_seconds_{model}"] = ("s", "", "scores, choice and card; 100 images")
        found[f"thinning_seconds_{model}"] = ("s", THINNING_GOALS[model], "of autos")
    return found


def _deepspeed() -> dict[str, Expected]:
    found: dict[str, Expected] = {}
    for precision in PRECISIONS:
        tolerance = "<= 1e-5" if precision == "fp32" else "<= 0.02"
        for stage in ZERO:
            found[f"loss_difference_zero{stage}_{precision}"] = (
                "largest difference", tolerance, "the plain stepper, five steps at 90 %",
            )  # fmt: skip
    for stage in ZERO:
        found[f"step_ms_zero{stage}_bf16"] = ("ms", "", "")
    found["sent_in_bf16"] = ("share of bytes", ">= 0.95", "values that go over the wire under bf16")
    return found


def _flat() -> dict[str, Expected]:
    found: dict[str, Expected] = {}
    for model in SCORED:
        for way, what in SCATTERS.items():
            found[f"round_ms_{model}_{way}"] = ("ms", "", what)
        for way, what in SCATTERS.items():
            goal = "<= 1" if way == "triton" else ""
            found[f"device_ms_{model}_{way}"] = ("ms", goal, f"{what}; the device alone")
    return found


def _shards() -> dict[str, Expected]:
    found: dict[str, Expected] = {
        f"images_per_s_{workers}w": ("images/s", "", "to the device, 224 px, batch 256")
        for workers in WORKERS
    }
    found["nvjpeg_images_per_s"] = ("images/s", "", "torchvision's decode_jpeg on the device")
    return found


def _two_four() -> dict[str, Expected]:
    found: dict[str, Expected] = {}
    for layer in LAYERS:
        found[f"sparse_vs_dense_{layer}"] = ("times", "< 1", "the same product, zeros included")
        found[f"gathered_vs_dense_{layer}"] = ("times", "", "the same product, zeros included")
    found["eager_vs_dense_vit_base"] = ("times", "", "the same network, call by call")
    found["sparse_vs_dense_vit_base"] = ("times", "< 1", "the same network, zeros included")
    found["largest_difference"] = ("of the largest logit", "<= 0.01", "zeros included")
    return found


STAGES: dict[str, dict[str, Expected]] = {
    "probe": _probe(),
    "tests": _tests(),
    "flat": _flat(),
    "irp": _irp(),
    "scoring": _scoring(),
    "resnet50": _resnet50(),
    "deepspeed": _deepspeed(),
    "shards": _shards(),
    "two_four": _two_four(),
}
"""In the order of the drill."""
