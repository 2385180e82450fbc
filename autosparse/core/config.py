"""Every setting of every job, as frozen dataclasses of plain data.

The docstring under a field is its help text. Nothing here imports torch, so that
`autosparse --help` stays quick.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

from autosparse.core.errors import UsageError, unknown
from autosparse.data import identity as data_identity

FIRST_DEFAULTS: dict[str, Any] = {}
"""Where a default has changed: "TrainingConfig.epochs" -> its first value.

What equals a field's first default is left out of its run's id, what equals today's is not: runs of
earlier versions keep their ids, and none is taken for a run with the new default. For a new field,
the value that stands for how things were before, if that is not its default.
"""


def _local(default: Any) -> Any:
    """Declare a field that says where or how fast, not what: left out of run_id."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"identity": False})
    return field(default=default, metadata={"identity": False})


def _teacher_identity(config: TrainingConfig) -> str | None:
    """A teacher is known by its file's content, wherever it lies."""
    if config.teacher is None or not Path(config.teacher).is_file():
        return config.teacher
    return hashlib.sha256(Path(config.teacher).read_bytes()).hexdigest()


def _root_identity(config: DataConfig) -> str | None:
    """Own data are known by their content, wherever they lie; named sets by their name."""
    return data_identity.content(config)


def _normalisation_identity(config: DataConfig) -> str | list[Any]:
    """Named sets keep the ids from when nothing else could be asked for; own data says what it is.

    (What auto meant for own data once depended on whether it fitted into memory.)
    """
    auto, other = ("imagenet", None) if config.name in data_identity.OWN else ("auto", "measured")
    return auto if config.normalisation in ("auto", other) else config.normalisation


@dataclass(frozen=True)
class ModelConfig:
    """A timm model and which of its weights may be pruned."""

    name: str = "test_resnet"
    """Any name from `timm.list_models()`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `timm.create_model`, e.g. {patch_size: 4, drop_path_rate: 0.1}."""
    exclude: list[str] = field(default_factory=list)
    """Prunable weights to leave dense: `head`, `stem`, or patterns such as `layer4.*`."""
    zero_init: bool = False
    """Keep what timm initialises to zero (gains, last norms, heads), which hides layers."""
    small_stem: bool = False
    """ResNets on 32 px: first a 3x3 convolution of stride 1, and no pooling after it."""


@dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how they are split."""

    name: str = "digits"
    """digits, a torchvision set (cifar10, cifar100, mnist, fashion_mnist), folder or shards."""
    root: str | None = field(default=None, metadata={"identity": _root_identity})
    """Folder of the data: required for folder and shards; torchvision sets download into it.

    For shards also one of the folder's tars, or a pattern such as DIR/train-{0000..0099}.tar.
    """
    image_size: int | None = None
    """Side of the square images in pixels; by default what suits the data set."""
    augment: str = "auto"
    """none, shift, shift+flip, shift+altflip (every other epoch each image is mirrored, in memory
    only), crop+flip (random resized crops, of streamed images), or auto.

    All but none and auto may be followed by timm's RandAugment: crop+flip+rand-m9-mstd0.5-inc1.
    """
    normalisation: list[list[float]] | list[float] | str = field(
        default="auto", metadata={"identity": _normalisation_identity}
    )
    """imagenet, measured (on the training images), or [mean, std], each a number or three, of 0..1.

    auto: imagenet for folder and shards, measured for the named sets.
    """
    validation_fraction: float = 0.15
    """Share of the training images held out for validation, stratified, the same every time."""
    train_limit: int | None = None
    """Use only this many training images, stratified, the same ones every time."""
    workers: int = _local(2)
    """Processes per rank that decode images, for sets that are too large for memory."""
    memory_limit_gb: float = _local(4.0)
    """Sets whose decoded images take less than this are held in memory as uint8 tensors.

    So are the images that streamed sets are scored on. What is computed is the same either way.
    """
    lanes: int = 16
    """Streamed shards are shuffled in so many lanes, best a multiple of the number of ranks."""
    max_bad_images: int = _local(0)
    """Images that may be damaged: a neighbour stands in for each in training; one more: stop."""
    allow_remote: bool = _local(False)
    """Let data.root be a URL (http, https, gs, s3) that shards are fetched from."""
    cache: str = _local("~/.cache/autosparse")
    """Folder for fetched shards, and for indexes of shards that came without one."""


@dataclass(frozen=True)
class PackConfig:
    """How images are packed into shards."""

    resize: int | None = None
    """Make images smaller until their shorter side has so many pixels; none by default."""
    quality: int | None = None
    """Encode all as JPEG of this quality; by default bytes are copied; resized: 90."""
    per_shard: int = 1000
    """Images per shard."""
    seed: int = 0
    """Fixes the order of the images."""
    validation_fraction: float = 0.15
    """Share of the training images that becomes validation, where there is none; stratified."""
    max_bad_images: int = _local(0)
    """Images that may be damaged or missing, and are left out; one more: stop."""
    workers: int = _local(2)
    """Processes that pack."""
    root: str | None = _local(None)
    """Folder of a torchvision set; by default AUTOSPARSE_DATA or data."""


@dataclass(frozen=True)
class IndexConfig:
    """How tars that others wrote are read."""

    label: str = "cls"
    """Extension of a sample's label, such as cls or txt, or json:KEY for an entry of its json."""
    dotted: bool = False
    """Keys hold dots: extensions begin at a name's last dot, not at its first as in WebDataset."""
    split: str | None = None
    """train, validation or test: the split of tars whose names do not say it."""
    classes: str | None = None
    """Number of classes, or a file with a class a line; by default the largest label + 1."""
    validation_fraction: float = 0.15
    """Share of the training tars that becomes validation, where there is none."""


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
    bias_rate: float = 1.0
    """Factor on the learning rate of the norms' biases (64 in airbench, arXiv 2404.00498)."""
    schedule: str = "cosine"
    """cosine, tanh, poly (timm's), or none: a constant rate."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up, counted in the total."""
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
    """fp32, or autocast over fp32 weights: bf16; fp16 (with loss scaling) under DeepSpeed."""
    channels_last: bool = False
    """Lay images and kernels out with channels last, which GPUs like for convolutions."""
    compile: bool = False
    """Put the network through torch.compile: worth it on a GPU and for long trainings."""
    grad_checkpointing: bool = False
    """Compute activations again in backward, to save memory, where timm's model knows how."""
    sparse_products: bool = True
    """Multiply with survivors only where that is quicker: on a CPU, wide layers with few left."""
    rescatter: bool = False
    """Scatter compact weights again in backward: one layer is dense at a time, and steps slower."""
    scatter: str = _local("auto")
    """How weights are made dense: auto (by device), each by itself, all at once (flat, triton)."""
    deterministic: bool = _local(False)
    """On a GPU: take only kernels that give the same bits every time; slower."""
    checkpoint_epochs: int = _local(5)
    """Save a checkpoint to resume from every so many epochs; 0: not by epochs."""
    checkpoint_steps: int = _local(0)
    """Also save one every so many steps within an epoch; 0: not by steps."""


@dataclass(frozen=True)
class IRPConfig:
    """One run of iterative rewind pruning: `levels` + 1 trainings, level 0 dense."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How each level is trained."""
    label: str = "magnitude"
    """Criterion that ranks the trained weights of a level: magnitude, snip or lamp."""
    levels: int = 6
    """N: how often the network is pruned."""
    final_density: float = 0.02
    """Fraction of prunable weights left at the last level."""
    schedule: str = "exponential"
    """Density at level i: exponential final^(i/N), or linear 1 - (1 - final) i/N."""
    scope: str = "global"
    """Over what weights are compared: global or layer."""
    samples_per_class: int = 10
    """Images per class that gradients at init (features) and SNIP labels are taken on."""
    rewind_steps: int = 0
    """k: rewind to the state after step k of the dense training (late rewinding); 0: to init."""
    steps_per_level: int | None = None
    """Short horizon: so many steps per level at a constant rate, instead of training.epochs."""
    live: bool = False
    """At every level, weights that lie on no path from input to output go first in their layer."""
    seed: int = 0
    """Fixes the initial weights and the order of batches."""
    device: str = _local("auto")
    """auto, cpu, cuda, cuda:1 …"""
    out: str = _local("corpus")
    """The corpus folder; the run goes into a folder of its own there, named by its run_id."""
    ticket: str | None = _local(None)
    """Also write the last level's ticket to this file."""
    store_initial: bool = _local(True)
    """Store the initial weights (5 bytes per weight); false: made again from the seed (1 byte)."""


SCHEDULE_KEYS = (
    "levels", "final_density", "schedule", "scope", "rewind_steps", "steps_per_level",
    "samples_per_class", "live",
)  # fmt: skip
"""What an entry of `schedules` may set: fields of IRPConfig."""


@dataclass(frozen=True)
class CorpusConfig:
    """A corpus to grow: one IRP run for every (model, data, seed, label, schedule)."""

    models: list[ModelConfig] = field(default_factory=lambda: [ModelConfig()])
    """The models."""
    data: list[DataConfig] = field(default_factory=lambda: [DataConfig()])
    """The data sets."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """The seeds."""
    labels: list[str] = field(default_factory=lambda: ["magnitude"])
    """The label criteria."""
    schedules: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    """What differs from the settings below, a run for each, e.g. [{}, {levels: 12}]."""
    exclude: list[dict[str, Any]] = field(default_factory=list)
    """Runs to leave out, e.g. {model: "test_vit*", seed: 1}: those that match all of an entry."""
    sample: int | None = None
    """Only so many of the plan's runs, drawn at random; all by default."""
    sample_seed: int = 0
    """Fixes which are drawn."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How each level is trained."""
    levels: int = 6
    """N: how often each network is pruned."""
    final_density: float = 0.02
    """Fraction of prunable weights left at the last level."""
    schedule: str = "exponential"
    """exponential or linear."""
    scope: str = "global"
    """global or layer."""
    samples_per_class: int = 10
    """Images per class that gradients are taken on."""
    rewind_steps: int = 0
    """k: rewind to the state after step k of the dense training; 0: to init."""
    steps_per_level: int | None = None
    """Short horizon: so many steps per level at a constant rate, instead of training.epochs."""
    live: bool = False
    """At every level, weights that lie on no path from input to output go first in their layer."""
    cpus_per_run: float = 1.0
    """Ray CPUs of one run; also its number of threads."""
    gpus_per_run: float = 0.0
    """Ray GPUs of one run; may be a fraction, so that several small models share one."""
    memory_gb_per_run: float = 0.0
    """Memory of one run that Ray keeps free for it, in GB; 0: not looked at."""
    store_initial: bool = True
    """Store initial weights (5 bytes per weight); false: made again from the seed (1 byte)."""
    tracking: bool = False
    """Log to MLflow: a run for the plan, and one nested in it for every IRP run."""
    dry_run: bool = False
    """Print the plan: what is finished and to do, and about what it costs; then stop."""
    out: str = "corpus"
    """The corpus folder, or a URL that fsspec knows (s3://, gs:// …)."""

    def runs(self) -> list[IRPConfig]:
        """Return the plan: one IRPConfig per run; raise UsageError for what cannot be."""
        for schedule in self.schedules:
            for key in schedule:
                if key not in SCHEDULE_KEYS:
                    raise unknown("key in schedules", key, SCHEDULE_KEYS)
        found = [
            self._run(model, data, seed, label, schedule)
            for model in self.models
            for data in self.data
            for seed in self.seeds
            for label in self.labels
            for schedule in self.schedules
        ]
        found = list({run_id(run): run for run in found}.values())  # What is listed twice: once.
        for entry in self.exclude:
            left = [run for run in found if not _matches(run, entry)]
            if len(left) == len(found):
                raise UsageError(f"exclude {entry} matches no run of the plan")
            found = left
        if self.sample is not None:
            if not 1 <= self.sample <= len(found):
                raise UsageError(f"sample must be 1 to {len(found)}, got {self.sample}")
            places = random.Random(self.sample_seed).sample(range(len(found)), self.sample)
            found = [found[place] for place in sorted(places)]
        if not found:
            raise UsageError("the plan has no run: every list needs an entry that is not excluded")
        return found

    def _run(
        self, model: ModelConfig, data: DataConfig, seed: int, label: str, schedule: dict[str, Any]
    ) -> IRPConfig:
        settings = {key: getattr(self, key) for key in SCHEDULE_KEYS} | schedule
        return IRPConfig(
            model=model, data=data, training=self.training, label=label, seed=seed, out=self.out,
            store_initial=self.store_initial, device="cuda" if self.gpus_per_run else "cpu",
            **settings,
        )  # fmt: skip


def _matches(run: IRPConfig, entry: dict[str, Any]) -> bool:
    """Whether a run has all that an entry of `exclude` says; names may be shell patterns."""
    values = {
        "model": run.model.name, "data": run.data.name, "seed": run.seed, "label": run.label,
        **{key: getattr(run, key) for key in SCHEDULE_KEYS},
    }  # fmt: skip
    for key in entry:
        if key not in values:
            raise unknown("key in exclude", key, values)
    return bool(entry) and all(fnmatchcase(str(values[k]), str(v)) for k, v in entry.items())


@dataclass(frozen=True)
class FitConfig:
    """Fit AutoS on a corpus."""

    corpus: str = _local("corpus")
    """The corpus folder."""
    features: str = "context"
    """paper (initial weight and gradient) or context (scale-free inputs and layer context)."""
    hidden: list[int] = field(default_factory=lambda: [32, 32])
    """Widths of the hidden layers."""
    head: str = "mean"
    """mean (one number, squared error) or survival (layers and weights apart)."""
    backbone: str = "mlp"
    """mlp, or resnet18 (features paper, head mean: the paper's larger network, slow to fit)."""
    exclude: list[dict[str, Any]] = field(default_factory=list)
    """Runs of the corpus to leave out, e.g. [{model: test_nfnet, label: magnitude}]."""
    holdout: float = 0.25
    """Share of the runs held out whole for validation (at least one); 0: none, for good."""
    rows_per_run: int = 200_000
    """Weights sampled from each run."""
    epochs: int = 20
    """Passes over the sampled weights."""
    batch_size: int = 4096
    """Weights per step."""
    learning_rate: float = 3e-3
    """Peak learning rate of Adam, cosine schedule."""
    seed: int = 0
    """Fixes the sample, the held-out runs, the initial weights and the order."""
    out: str = _local("autos.safetensors")
    """The AutoS file to write."""


@dataclass(frozen=True)
class ScoringConfig:
    """What scores are computed on."""

    samples_per_class: int = 10
    """Images of every class in a balanced batch."""
    batches: int = 1
    """Balanced batches; scores are the mean over all of their images."""
    batch_size: int = 128
    """A balanced batch of more images goes through the network in parts of so many."""
    mode: str = "train"
    """train: batch norm uses each part's own statistics, as most papers do; or eval."""
    warm_up: bool = False
    """Set batch norm's running statistics from the batches first (for eval)."""


@dataclass(frozen=True)
class PruneConfig:
    """Prune a model at initialization and save the ticket."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data that scores are computed on."""
    criterion: str = "autos"
    """What scores the weights; `dense` keeps them all."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the criterion, e.g. {scorer: autos.safetensors} or {rounds: 100}."""
    sparsity: float = 0.95
    """Fraction of prunable weights to remove, 0 <= sparsity < 1."""
    scope: str = "global"
    """Over what scores are compared: global or layer."""
    allocation: str | None = None
    """Whose layer densities to use: uniform, or another criterion's name; by default its own."""
    allocation_options: dict[str, Any] = field(default_factory=dict)
    """Options of that other criterion."""
    guard: str = "layer"
    """Keep at least one weight in every layer, in every output channel (channel), or none; or one
    in every layer and as few as can be off all paths from input to output (live)."""
    pattern: str | None = None
    """n:m, such as 2:4: keep n of every m neighbouring inputs; the sparsity follows from it."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """What scores are computed on."""
    seed: int = 0
    """Fixes the initial weights, the scored images and random criteria."""
    device: str = _local("auto")
    """auto, cpu, cuda …"""
    dead: str = _local("warn")
    """What becomes of a ticket whose output does not depend on the image: warn, or error."""
    out: str = _local("ticket.safetensors")
    """The ticket file to write."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What only training under DeepSpeed uses."""

    zero_stage: int = 1
    """ZeRO stage, 0 to 3."""
    gradient_accumulation: int = 1
    """Micro-batches per step."""
    overlap_comm: bool = _local(True)
    """On several GPUs: send the first gradients while the others are computed (ZeRO 1 to 3)."""


@dataclass(frozen=True)
class SparseTrainConfig:
    """Train tickets, or the dense model where no ticket is given."""

    tickets: list[str] | str = _local([])
    """A ticket file, pattern or registered models:/NAME@ALIAS, or a list; one folder for each."""
    prune: PruneConfig | None = None
    """Prune at the start, if no ticket is given: what `autosparse prune` takes. Its model and data
    are those below, unless it names others."""
    model: ModelConfig | None = None
    """The model that is pruned; if there is neither ticket nor pruning, it is trained dense."""
    data: DataConfig | None = None
    """The data; by default what the ticket was made on."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """Used by launch/train_sparse.py only."""
    seed: int | None = None
    """Fixes the order of batches; by default the ticket's own seed."""
    device: str = _local("auto")
    """auto, cpu, cuda …"""
    tracking: bool = _local(True)
    """Log to MLflow."""
    dead: str = _local("warn")
    """What becomes of a ticket whose output does not depend on the image: warn, or error."""
    out: str = _local("trained")
    """Folder for the trained tickets."""


@dataclass(frozen=True)
class ExportConfig:
    """Take a trained ticket out of autosparse."""

    ticket: str = "trained.safetensors"
    """A trained ticket's file, the folder of its training, or a registered models:/NAME@ALIAS."""
    format: str = "dense"
    """dense (a timm state dict), onnx, or ticket."""
    out: str | None = None
    """The file to write; by default beside the ticket, named by the format."""


@dataclass(frozen=True)
class CompareConfig:
    """Train the tickets of several criteria and their twins, and say what makes the difference."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    criteria: list[str] | str = "snip,synflow,magnitude"
    """Criteria, `irp`, or labels that `options` explains; a list, or with commas."""
    options: dict[str, Any] = field(default_factory=dict)
    """Label -> options; {fast: {criterion: synflow, rounds: 10}} makes a label of your own."""
    sparsities: list[float] | float | str = "0.9,0.95"
    """Sparsities; a list, or with commas."""
    seeds: list[int] | int | str = "0,1,2"
    """Seeds; a list, or with commas. Verdicts need two, and are sharper with more."""
    twins: list[str] = field(
        default_factory=lambda: ["shuffled", "reinitialised", "inverted", "erk", "uniform"]
    )
    """Controls to train: shuffled, reinitialised, inverted; erk and uniform at the same budget."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How everything is trained."""
    scope: str = "global"
    """Over what scores are compared: global or layer."""
    allocation: str | None = None
    """Whose layer densities to use: uniform, or another criterion's name; by default its own."""
    allocation_options: dict[str, Any] = field(default_factory=dict)
    """Options of that other criterion."""
    guard: str = "layer"
    """Keep at least one weight in every layer, in every output channel (channel), or none; or one
    in every layer and as few as can be off all paths from input to output (live)."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """What scores are computed on."""
    device: str = _local("auto")
    """auto, cpu, cuda …"""
    tracking: bool = _local(True)
    """Log to MLflow."""
    out: str = _local("comparison")
    """Folder for tickets, results, table and figure."""


@dataclass(frozen=True)
class SweepConfig:
    """Train tickets of many models, criteria, sparsities, seeds and options with Ray Tune."""

    models: list[ModelConfig] = field(default_factory=lambda: [ModelConfig()])
    """The models."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    criteria: list[str] | str = "snip,synflow,magnitude"
    """Criteria, `irp`, or labels that `options` explains; a list, or with commas."""
    options: dict[str, Any] = field(default_factory=dict)
    """Label -> options; {fast: {criterion: synflow, rounds: 10}} makes a label of your own."""
    sparsities: list[float] | float | str = "0.8,0.9,0.95"
    """Sparsities; a list, or with commas."""
    seeds: list[int] | int | str = "0,1"
    """Seeds; a list, or with commas."""
    twins: list[str] = field(default_factory=list)
    """Controls to train too: shuffled, reinitialised, inverted, erk, uniform (see compare)."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How everything is trained."""
    variations: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    """Grid: what differs from `training`, each tried, e.g. [{}, {learning_rate: 0.01}]."""
    search: str = "grid"
    """grid: every cell; or optuna: `samples` cells of each model and sparsity, chosen by TPE."""
    samples: int = 20
    """Optuna: how many cells of each model and sparsity."""
    space: dict[str, Any] = field(default_factory=dict)
    """Optuna: training option -> list of choices, or {low: 0.001, high: 0.03, log: true}."""
    asha: bool = False
    """Stop the worst early; only cells of one model, sparsity and seed are held against another."""
    asha_epochs: int = 1
    """ASHA: no cell is stopped before so many epochs."""
    asha_factor: int = 3
    """ASHA: one in so many goes on from rung to rung."""
    scope: str = "global"
    """Over what scores are compared: global or layer."""
    allocation: str | None = None
    """Whose layer densities to use: uniform, or another criterion's name; by default its own."""
    allocation_options: dict[str, Any] = field(default_factory=dict)
    """Options of that other criterion."""
    guard: str = "layer"
    """Keep at least one weight in every layer, in every output channel (channel), or none; or one
    in every layer and as few as can be off all paths from input to output (live)."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """What scores are computed on."""
    cpus_per_trial: float = 1.0
    """Ray CPUs of one cell; also its number of threads."""
    gpus_per_trial: float = 0.0
    """Ray GPUs of one cell; may be a fraction, so that several small models share one."""
    memory_gb_per_trial: float = 0.0
    """Memory of one cell that Ray keeps free for it, in GB; 0: not looked at."""
    tracking: bool = True
    """Log to MLflow: a run for the sweep, and one nested in it for every cell."""
    dry_run: bool = False
    """Print the cells, which are finished, and about what the rest costs; then stop."""
    out: str = "sweep"
    """Folder for tickets, results, table, figures and report; shared by the nodes of a cluster."""


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole path on scikit-learn's digits."""

    out: str = "quickstart"
    """Folder for everything: corpus, AutoS, tickets, results, figure, MLflow's database."""
    seeds: int = 3
    """How many seeds every ticket is made and trained with."""


def identity(config: Any) -> dict[str, Any]:
    """Return what differs from the first defaults, as nested plain data, local fields left out."""
    different = {}
    for spec in dataclasses.fields(config):
        rule = spec.metadata.get("identity", True)
        if rule is False:
            continue
        value = rule(config) if callable(rule) else getattr(config, spec.name)
        default = first_default(type(config), spec)
        if dataclasses.is_dataclass(value):
            inner = identity(value)
            if inner or default is None:
                different[spec.name] = inner
        elif value != default:
            different[spec.name] = _canonical(value)
    return different


def _canonical(value: Any) -> Any:
    """Make equal values look the same in JSON: 1.0 as 1, dataclasses in lists as their identity."""
    if dataclasses.is_dataclass(value):
        return identity(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    if isinstance(value, dict):
        return {key: _canonical(each) for key, each in value.items()}
    return value


def first_default(kind: type, spec: dataclasses.Field) -> Any:
    """Return the default that a field had in its first version."""
    name = f"{kind.__name__}.{spec.name}"
    if name in FIRST_DEFAULTS:
        return FIRST_DEFAULTS[name]
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


def run_id(config: Any, *more: str) -> str:
    """Return 12 hex digits that name a run: the hash of what differs from the first defaults.

    `more` holds other things that the run depends on, such as a ticket's content hash.
    """
    text = json.dumps([type(config).__name__, identity(config), *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain(config: Any) -> dict[str, Any]:
    """Return the whole config as nested plain data (for cards and MLflow)."""
    return dataclasses.asdict(config)


def from_plain(kind: type, values: dict[str, Any]) -> Any:
    """Build a flat config dataclass of `kind` from plain data; refuses unknown keys."""
    names = {spec.name for spec in dataclasses.fields(kind)}
    for key in values:
        if key not in names:
            raise unknown(f"{kind.__name__} key", key, names)
    return kind(**values)


def check_sparsity(sparsity: float) -> float:
    """Return `sparsity` if 0 <= sparsity < 1; raise UsageError otherwise."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    return sparsity


def keep_count(total: int, sparsity: float) -> int:
    """Return how many of `total` weights survive at `sparsity`: exact; half a weight is removed.

    The decimal that was written is meant: 0.95 of 1000 removes 950, whatever binary says.
    """
    return keep_density(total, 1 - Fraction(str(check_sparsity(sparsity))))


def keep_density(total: int, density: float | Fraction) -> int:
    """Return how many of `total` weights a density, 0 to 1, keeps: by the rule of `keep_count`."""
    exact = density if isinstance(density, Fraction) else Fraction(str(density))
    return math.ceil(total * exact - Fraction(1, 2))
