"""Settings of trainings of tickets, and of studies: comparisons and sweeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from autosparse.core.config import local
from autosparse.criteria.config import PruneConfig, ScoringConfig
from autosparse.data.config import DataConfig
from autosparse.models.config import ModelConfig
from autosparse.training.config import TrainingConfig


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What only training under DeepSpeed uses."""

    zero_stage: int = 1
    """ZeRO stage, 0 to 3."""
    gradient_accumulation: int = 1
    """Micro-batches per step."""
    overlap_comm: bool = local(True)
    """On several GPUs: send the first gradients while the others are computed (ZeRO 1 to 3)."""


@dataclass(frozen=True)
class SparseTrainConfig:
    """Train tickets, or the dense model where no ticket is given."""

    tickets: list[str] | str = local([])
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
    device: str = local("auto")
    """auto, cpu, cuda …"""
    tracking: bool = local(True)
    """Log to MLflow."""
    dead: str = local("warn")
    """What becomes of a ticket whose output does not depend on the image: warn, or error."""
    out: str = local("trained")
    """Folder for the trained tickets."""


@dataclass(frozen=True)
class ExportConfig:
    """Take a trained ticket out of autosparse."""

    ticket: str = "trained.safetensors"
    """A trained ticket's file, the folder of its training, or a registered models:/NAME@ALIAS."""
    format: str = "dense"
    """dense (a timm state dict), onnx, slim (a smaller network, pt2), 2:4 (a state dict whose
    linear layers sparse tensor cores take), or ticket."""
    slim: bool = False
    """onnx: without the units that have no effect; the logits stay."""
    out: str | None = None
    """The file to write; by default beside the ticket, named by the format."""


@dataclass(frozen=True)
class MeasureConfig:
    """What a network costs: weights, operations, memory, bytes and milliseconds."""

    batches: list[int] = field(default_factory=lambda: [1, 32])
    """How many images at once, for the latency."""
    runs: int = 20
    """Calls of each network, in turn."""
    image_size: int | None = None
    """Side of the images for a timm model; by default what timm names for it."""
    num_classes: int = 1000
    """Classes of a timm model; a ticket knows its own."""
    json: str | None = None
    """File to write all figures to, layers among them."""
    tracking: bool = local(False)
    """Log the figures to MLflow: to the training's run, where the ticket is a tracked training's
    folder, else to a new one."""


@dataclass(frozen=True)
class StudyConfig:
    """Train the tickets of several criteria and their twins, and say what makes the difference."""

    # The file of settings, table and results; no setting.
    report: ClassVar[str] = "comparison.json"

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    models: list[ModelConfig] = local([])
    """Several models, in place of that one."""
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
    axes: dict[str, Any] = local({})
    """More axes: dotted setting -> list of values, each tried with each, e.g.
    {training.learning_rate: [0.003, 0.01], data.augment: [none, flip]}."""
    variations: list[dict[str, Any]] = local([{}])
    """Settings tried together, e.g. [{}, {optimizer: sgd, learning_rate: 0.1}]; a key without a
    dot is one of `training`."""
    search: str = local("grid")
    """grid: every cell; or optuna: `samples` cells of each model and sparsity, chosen by TPE."""
    samples: int = local(20)
    """Optuna: how many cells of each model and sparsity; no more than there are choices."""
    space: dict[str, Any] = local({})
    """Optuna: setting -> list of choices, or {low: 0.001, high: 0.03, log: true}."""
    asha: bool = local(False)
    """Stop the worst early; cells are compared only with those of the same model, data, sparsity
    and seed."""
    asha_epochs: int = local(1)
    """ASHA: no cell is stopped before so many epochs."""
    asha_factor: int = local(3)
    """ASHA: one in so many goes on from rung to rung."""
    scope: str = "global"
    """Over what scores are compared: global or layer."""
    allocation: str | None = None
    """Whose layer densities to use: uniform, or another criterion's name; by default its own."""
    allocation_options: dict[str, Any] = field(default_factory=dict)
    """Options of that other criterion."""
    guard: str = "layer"
    """What every ticket must keep: `layer`, one weight per layer; `channel`, one per output
    channel; `none`, nothing; `live`, one per layer, with weights on no input-to-output path
    exchanged for weights that are on one."""
    units: float = 0.0
    """0 prunes single weights; 1 removes whole channels, heads and hidden units until those left
    just hold the weights that are kept; in between, fewer units go. The number of weights kept is
    always the same."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """What scores are computed on."""
    executor: str = local("local")
    """local: one cell after another, in this process; ray: several at a time, by Ray Tune; or
    deepspeed: one after another, each on all GPUs of this machine."""
    device: str = local("auto")
    """auto, cpu, cuda … Under Ray a cell has a GPU if gpus_per_trial says so."""
    cpus_per_trial: float = local(1.0)
    """Ray CPUs of one cell; also its number of threads."""
    gpus_per_trial: float = local(0.0)
    """Ray GPUs of one cell; may be a fraction, so that several small models share one."""
    memory_gb_per_trial: float = local(0.0)
    """Memory of one cell that Ray keeps free for it, in GB; 0: not looked at."""
    tracking: bool = local(True)
    """Log to MLflow: a run for the study, and one nested in it for every cell."""
    dry_run: bool = local(False)
    """Print the cells, which are finished, and about what the rest costs; then stop."""
    out: str = local("comparison")
    """Folder for tickets, results, table, figures and page; shared by the nodes of a cluster."""


@dataclass(frozen=True)
class SweepConfig(StudyConfig):
    """Train tickets of many models, criteria, sparsities, seeds and options with Ray Tune."""

    report: ClassVar[str] = "sweep.json"

    sparsities: list[float] | float | str = "0.8,0.9,0.95"
    """Sparsities; a list, or with commas."""
    seeds: list[int] | int | str = "0,1"
    """Seeds; a list, or with commas."""
    twins: list[str] = field(default_factory=list)
    """Controls to train too: shuffled, reinitialised, inverted, erk, uniform (see compare)."""
    executor: str = local("ray")
    """ray: several cells at a time, by Ray Tune; or local, or deepspeed (see compare)."""
    out: str = local("sweep")
    """Folder for tickets, results, table, figures and page; shared by the nodes of a cluster."""
