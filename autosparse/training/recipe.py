"""What a training recipe adds to a step: mixing, soft targets, distillation, EMA (timm's parts).

Mixup: H. Zhang et al. (ICLR 2018), arXiv 1710.09412. CutMix: S. Yun et al. (ICCV 2019),
arXiv 1905.04899. Distillation: G. Hinton et al., arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from autosparse.core.errors import UsageError
from autosparse.models import zoo
from autosparse.models.zoo import device_of
from autosparse.sparsity.compact import densify, lay_out
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training.config import TrainingConfig


class Recipe:
    """Labels and loss of a step.

    Args:
        config: mixup, cutmix, label_smoothing, teacher, distill_weight and temperature count.
        model: that is trained; its number of classes and its device count.
    """

    def __init__(self, config: TrainingConfig, model: nn.Module) -> None:
        self.config = config
        self.hard = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.soft = SoftTargetCrossEntropy()
        self.mixup = None
        if config.mixup or config.cutmix:
            classes = getattr(model, "num_classes", None)
            if not classes:
                raise UsageError("training.mixup and cutmix need a model that has num_classes")
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=classes,
            )
        self.teacher = load_teacher(config.teacher, model) if config.teacher else None
        if self.teacher is not None and config.channels_last:
            lay_out(self.teacher, channels_last=True)

    def mix(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return images and targets of a step: labels [B], or probabilities [B, classes].

        Args:
            images: [B, C, H, W], normalised; B even if images are mixed.
            labels: [B].
            seed: of what is drawn.
        """
        if self.mixup is None:
            return images, labels
        with _numpy_seeded(seed):
            return self.mixup(images.clone(), labels)

    def loss(self, outputs: Any, images: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of outputs (as the loss takes them) for what `mix` gave.

        With a teacher: (1 - w) * loss + w * T^2 * KL(teacher / T || outputs / T).
        """
        criterion = self.hard if targets.ndim == 1 else self.soft
        loss = criterion(outputs, targets)
        if self.teacher is None:
            return loss
        with torch.no_grad(), autocast(self.config, images.device):
            taught = self.teacher(images).float()
        weight, temperature = self.config.distill_weight, self.config.temperature
        divergence = functional.kl_div(
            functional.log_softmax(outputs / temperature, dim=1),
            functional.log_softmax(taught / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - weight) * loss + weight * temperature**2 * divergence


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context that `precision` asks for: training, evaluation, a teacher."""
    kind = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, kind, enabled=config.precision != "fp32")


def load_teacher(path: str, student: nn.Module) -> nn.Module:
    """Return the dense, frozen model of a trained ticket's file, in eval mode, by the student."""
    ticket = Ticket.load(Path(path))
    model = zoo.from_recipe(ticket.card.get("model", {}))
    wanted, taught = (getattr(each, "num_classes", None) for each in (student, model))
    if wanted is not None and wanted != taught:
        raise UsageError(f"training.teacher {path} has {taught} classes, the model {wanted}")
    model = densify(compact(model, ticket)).eval().requires_grad_(False)
    recipe: Any = getattr(student, "autosparse_recipe", None)
    if recipe is not None:
        channels, side = recipe["in_chans"], recipe["image_size"]
        own: Any = model.autosparse_recipe
        try:
            model(torch.zeros(1, channels, side, side, device="cpu"))
        except (RuntimeError, AssertionError):
            raise UsageError(
                f"training.teacher {path} takes no images of {channels} channels and {side} "
                f"pixels, as the model does; it has {own['in_chans']} and {own['image_size']}"
            ) from None
    return model.to(device_of(student))


class Average(ModelEmaV3):
    """timm's moving average, for models in which a tensor has several names (tied weights)."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move every tensor once: parameters, and buffers that count for evaluation."""
        theirs = model.state_dict()
        pairs = {t.data_ptr(): (t, theirs[name]) for name, t in self.module.state_dict().items()}
        floats = [pair for pair in pairs.values() if pair[0].is_floating_point()]
        averages, values = [pair[0] for pair in floats], [pair[1] for pair in floats]
        torch._foreach_lerp_(averages, values, 1 - decay)
        for mine, new in pairs.values():
            if not mine.is_floating_point():
                mine.copy_(new)


def make_ema(model: nn.Module, config: TrainingConfig) -> Average | None:
    """Return timm's moving average of a model's values (compact ones stay compact), if asked for.

    Its decay is warmed up, so that short trainings are not held back by the initial weights.
    """
    if not config.ema:
        return None
    return Average(model, decay=config.ema, use_warmup=True)


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Run with NumPy's global RNG, which timm's Mixup draws from, seeded by `seed`."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


def step_seed(seed: int, updates: int, rank: int = 0) -> int:
    """Return the seed of a step's dropout and mixing: the same after a resume."""
    return ((seed * 1_000_003 + updates) * 4099 + rank) % 2**63


def seed_step(seed: int, device: torch.device) -> None:
    """Seed the RNGs that a step draws dropout from.

    Not by `torch.manual_seed`: before CUDA is first used that records every call with a traceback,
    which takes 0.8 ms (as measured on a CPU) and more memory at every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
