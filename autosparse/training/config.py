"""Settings of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from autosparse.core.config import local
from autosparse.core.files import sha256_of_file


def _teacher_identity(config: TrainingConfig) -> str | None:
    """A teacher is known by its file's content, wherever it lies."""
    if config.teacher is None or not Path(config.teacher).is_file():
        return config.teacher
    found = Path(config.teacher).stat()
    return _content(Path(config.teacher).absolute(), found.st_size, found.st_mtime_ns)


@cache
def _content(path: Path, size: int, changed: int) -> str:
    """Return a file's hash; read once, as names of cells ask for it again and again."""
    return sha256_of_file(path)


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step, over all ranks together."""
    optimizer: str = "adamw"
    """Any optimizer of timm's factory."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Weight decay; biases and norms are exempt, compact weights are not."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments for the optimizer, e.g. {momentum: 0.9}."""
    optimizer_wrapper: str = "none"
    """What sparse training adds to the optimizer: none, ham, sign_in or sparseopt."""
    optimizer_wrapper_options: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments, e.g. {alpha: 100, beta: 0.001} for ham."""
    bias_rate: float = 1.0
    """Factor on the learning rate of the norms' biases (64 in airbench, arXiv 2404.00498)."""
    schedule: str = "cosine"
    """cosine, tanh, poly (timm's), or none: a constant rate."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up, counted in the total."""
    topology: str = "static"
    """Which weights survive: static keeps the ticket's; set, rigl and mest exchange some during
    training, keeping every layer's count; gmp and ac_dc prune a dense model while it trains."""
    topology_every: int = 100
    """Steps from one exchange to the next; gmp: from mask to mask; ac_dc: of a phase."""
    topology_fraction: float = 0.3
    """Share of each layer's survivors that an exchange replaces at first; falls with a cosine."""
    topology_until: float = 0.75
    """Share of the training's steps after which masks stay as they are."""
    topology_sparsity: float = 0.9
    """gmp and ac_dc: sparsity at the end."""
    topology_grow_from: str = "auto"
    """Which pruned weights come in: gradient (largest gradient), random, or auto (gradient for
    rigl, random for set and mest)."""
    topology_on_paths: bool = False
    """Bring in only weights that lie on a path from input to output; keeps a dense copy of the
    model on the CPU."""
    topology_gradient_weight: float = 1.0
    """mest removes the weights with the smallest |weight| + this x |gradient|."""
    clip_grad: float | None = None
    """Largest norm of the gradient; none by default."""
    label_smoothing: float = 0.0
    """Label smoothing, 0 to 1."""
    mixup: float = 0.0
    """Alpha of mixup; 0: off. Needs an even number of images per rank and step."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0: off. With mixup too, each batch gets one of the two."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then evaluated and kept; 0: off."""
    teacher: str | None = field(default=None, metadata={"identity": _teacher_identity})
    """File of a trained (dense) model to distil from."""
    distill_weight: float = 0.5
    """Share of the loss that comes from the teacher, 0 to 1."""
    temperature: float = 1.0
    """Of the softmax of teacher and student when distilling."""
    precision: str = "fp32"
    """fp32, or autocast over fp32 weights: bf16; fp16 (with loss scaling) under DeepSpeed
    without ZeRO."""
    channels_last: bool = False
    """Lay images and kernels out with channels last, which GPUs like for convolutions."""
    compile: bool = False
    """Put the network through torch.compile: worth it on a GPU and for long trainings."""
    grad_checkpointing: bool = False
    """Compute activations again in backward, to save memory, where timm's model knows how."""
    sparse_products: bool = True
    """Multiply with survivors only where that is quicker: on a CPU, wide layers with few left."""
    slim: bool = False
    """Train without the units that no weight of the ticket reads: smaller layers, the same training
    but for rounding. The trained ticket is for the whole network."""
    rescatter: bool = False
    """Scatter compact weights again in backward: one layer is dense at a time, and steps slower."""
    scatter: str = local("auto")
    """How weights are made dense: auto (by device), each by itself, all at once (flat, triton)."""
    deterministic: bool = local(False)
    """On a GPU: take only kernels that give the same bits every time; slower."""
    checkpoint_epochs: int = local(5)
    """Save a checkpoint to resume from every so many epochs; 0: not by epochs."""
    checkpoint_steps: int = local(0)
    """Also save one every so many steps within an epoch; 0: not by steps."""
