"""What a step, a GPU's memory and a checkpoint cost, dense or compact, under ZeRO: plain formulas.

Sources:
- ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054: bytes per GPU (figure 1) and volumes (section 7).
- Ring collectives with latency: Thakur, Rabenseifner, Gropp 2005, "Optimization of collective
  communication operations in MPICH".
- What DeepSpeed 0.19 does that the paper doesn't: stages 1 and 2 all-reduce whole buckets
  (`use_multi_rank_bucket_allreduce`), and stage 3 leaves tensors of at most
  `param_persistence_threshold` entries on every rank and parameters gathered between forward and
  backward where fewer than `max_reuse_distance` entries lie in between.

Words: `total` weights of a layer, `kept` ones of them, Ψ = trainable values. Sizes are in bytes,
times in seconds, rates in bytes or operations per second, everything per GPU and per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from autosparse.sparsity.counts import keep_count

INDEX_BYTES = 4
"""An int32 per surviving weight, on every rank; see compaction.CompactWeight."""
PERSISTENT = 100_000
"""DeepSpeed's stage3_param_persistence_threshold, in entries."""
REUSED = 500_000_000
"""The last so many parameters stay gathered for backward: half of stage3_max_reuse_distance, as
each of them lies as far from the end in forward as in backward."""
SECTOR = 32
"""Bytes that a GPU's memory moves at the least (CUDA C++ Best Practices Guide, 10.2.1)."""


@dataclass(frozen=True)
class Shape:
    """A model, as far as costs go."""

    name: str
    layers: tuple[int, ...]
    """Entries of every prunable weight."""
    others: tuple[int, ...]
    """Entries of every other parameter: biases, norms, embeddings."""
    flops: float
    """Of one sample's forward pass."""
    activation_bytes: float
    """Kept for the backward pass of one sample, weights apart."""

    @property
    def prunable(self) -> int:
        return sum(self.layers)

    @property
    def total(self) -> int:
        return self.prunable + sum(self.others)


@dataclass(frozen=True)
class Precision:
    """Bytes per trainable value."""

    parameter: float = 2
    gradient: float = 2
    optimizer: float = 12
    """fp32 copy and both of Adam's moments: K in the ZeRO paper."""
    scratch: float = 2
    """Of an entry of the dense weight that forward and backward use."""


def fp32(stage: int) -> Precision:
    """Return the bytes of training in fp32: ZeRO's partitions hold a second copy of the values."""
    return Precision(4, 4, 12 if stage else 8, 4)


@dataclass(frozen=True)
class GPU:
    """A processor: peak rates, and the shares of them that are reached."""

    flops: float = 312e12
    """Dense bf16: NVIDIA A100 datasheet."""
    efficiency: float = 0.4
    """Share reached by a training step without communication."""
    memory_rate: float = 2039e9
    """A100 80 GB SXM: its datasheet."""
    memory_efficiency: float = 0.8
    kernel_seconds: float = 4e-6
    """The least that a small kernel takes."""
    memory: float = 80e9


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, a ring through all of them, and storage."""

    gpus: int
    network_rate: float
    """Of a node, shared by its GPUs; bytes per second and direction."""
    gpus_per_node: int = 8
    inside_rate: float = 300e9
    """NVLink, third generation, per direction: A100 datasheet (600e9 both ways)."""
    hop_seconds: float = 14e-6
    """Between nodes."""
    inside_hop_seconds: float = 3.4e-6
    storage_rate: float = 2e9
    """Of the storage that all nodes write checkpoints to together."""

    @property
    def one_node(self) -> bool:
        return self.gpus <= self.gpus_per_node

    @property
    def rate(self) -> float:
        """Return the ring's slowest link: each node's traffic crosses its network once."""
        return self.inside_rate if self.one_node else min(self.inside_rate, self.network_rate)

    @property
    def hop(self) -> float:
        """Return the mean latency of the ring's hops."""
        if self.one_node:
            return self.inside_hop_seconds
        between = 1 / self.gpus_per_node
        return between * self.hop_seconds + (1 - between) * self.inside_hop_seconds


@dataclass(frozen=True)
class Plan:
    """How one trains."""

    sparsity: float = 0.0
    stage: int = 1
    batch: int = 64
    """Samples per GPU and step."""
    precision: Precision = Precision()
    kept_scratch: bool = True
    """Scattered weights stay until backward; otherwise they are scattered again there."""
    overlap: float = 0.0
    """Share of the backward pass that communication hides behind."""


# --- sizes ------------------------------------------------------------------------------------


@cache
def kept_per_layer(shape: Shape, sparsity: float) -> tuple[int, ...]:
    """Return the surviving weights of every layer, the same density in each."""
    return tuple(keep_count(total, sparsity) for total in shape.layers)


def kept(shape: Shape, sparsity: float) -> int:
    """Return the surviving weights of the model."""
    return sum(kept_per_layer(shape, sparsity))


def trainable(shape: Shape, sparsity: float) -> int:
    """Return Ψ: surviving weights, and all that is not prunable."""
    return kept(shape, sparsity) + sum(shape.others)


def state_bytes(values: float, ranks: int, stage: int, precision: Precision) -> float:
    """Return parameters + gradients + optimizer per GPU (ZeRO paper, figure 1).

    Stage 0: (p + g + K)Ψ; 1: (p + g)Ψ + KΨ/n; 2: pΨ + (g + K)Ψ/n; 3: (p + g + K)Ψ/n.
    """
    optimizer = precision.optimizer / (ranks if stage >= 1 else 1)
    gradient = precision.gradient / (ranks if stage >= 2 else 1)
    parameter = precision.parameter / (ranks if stage >= 3 else 1)
    return values * (parameter + gradient + optimizer)


def persistent(shape: Shape, sparsity: float) -> int:
    """Return the values that stage 3 leaves on every rank: those of small tensors."""
    sizes = (*kept_per_layer(shape, sparsity), *shape.others)
    return sum(size for size in sizes if size <= PERSISTENT)


def memory_bytes(shape: Shape, plan: Plan, ranks: int) -> dict[str, float]:
    """Return a GPU's memory by what it holds; fragmentation and buffers are left out.

    Indices are on every rank whatever the stage. Under stage 3 parameters are gathered while they
    are used, and some stay (see REUSED, PERSISTENT). The scratch holds every scattered weight and
    a gradient, or the largest weight and its gradient.
    """
    precision, sparse = plan.precision, plan.sparsity > 0
    states = state_bytes(trainable(shape, plan.sparsity), ranks, plan.stage, precision)
    if plan.stage == 3:
        values = trainable(shape, plan.sparsity)
        largest = max(*kept_per_layer(shape, plan.sparsity), *shape.others)
        staying = max(min(values, REUSED), persistent(shape, plan.sparsity))
        states += precision.parameter * min(values, staying + largest) * (1 - 1 / ranks)
    scratch = 0.0
    if sparse:
        biggest = max(shape.layers)
        whole = shape.prunable + biggest if plan.kept_scratch else 2 * biggest
        scratch = precision.scratch * whole
    return {
        "states": states,
        "indices": INDEX_BYTES * kept(shape, plan.sparsity) if sparse else 0.0,
        "scratch": scratch,
        "activations": plan.batch * shape.activation_bytes,
    }


def checkpoint_bytes(shape: Shape, plan: Plan) -> float:
    """Return a checkpoint: parameters (not in stage 3's, which has its fp32 copies) and optimizer
    state once, and a bitmask of the prunable weights."""
    parameter = 0 if plan.stage == 3 else plan.precision.parameter
    mask = shape.prunable / 8 if plan.sparsity else 0.0
    return trainable(shape, plan.sparsity) * (parameter + plan.precision.optimizer) + mask


# --- the network ------------------------------------------------------------------------------

FACTOR = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
"""Times that a ring moves (n - 1)/n of the whole tensor, in as many times n - 1 hops."""


@dataclass(frozen=True)
class Collective:
    """So many calls of one kind, over `size` bytes of whole tensors in all."""

    kind: str
    size: float
    calls: int


def ring_bytes(kind: str, size: float, ranks: int) -> float:
    """Return the bytes that a rank sends: (n - 1)/n of the whole, twice for an all-reduce."""
    return FACTOR[kind] * (ranks - 1) / ranks * size


def ring_seconds(each: Collective, ranks: int, rate: float, hop: float) -> float:
    """Return the time: bytes over the slowest link, and a hop's latency for every ring step."""
    hops = each.calls * FACTOR[each.kind] * (ranks - 1)
    return ring_bytes(each.kind, each.size, ranks) / rate + hops * hop


def collectives(shape: Shape, plan: Plan, paper: bool = False) -> list[Collective]:
    """Return what a step communicates.

    Stage 0 all-reduces gradients. Stages 1 and 2 reduce-scatter them and gather parameters in the
    paper (2Ψ); DeepSpeed 0.19 all-reduces and gathers (3Ψ). Stage 3 reduce-scatters gradients and
    gathers parameters for forward, and those again for backward that have not stayed (2Ψ to 3Ψ).
    Buckets hold all of a step: one call each, except that stage 3 gathers tensor by tensor.
    """
    values = trainable(shape, plan.sparsity)
    gradients = values * plan.precision.gradient
    parameters = values * plan.precision.parameter
    if plan.stage == 0:
        return [Collective("all_reduce", gradients, 1)]
    if plan.stage in (1, 2):
        kind = "reduce_scatter" if paper else "all_reduce"
        return [Collective(kind, gradients, 1), Collective("all_gather", parameters, 1)]
    sizes = (*kept_per_layer(shape, plan.sparsity), *shape.others)
    moving = 1 + sum(size > PERSISTENT for size in sizes)
    found = [Collective("reduce_scatter", gradients, 1)]
    found.append(Collective("all_gather", parameters, moving))
    if values > REUSED:
        again = (values - REUSED) / values
        found.append(Collective("all_gather", again * parameters, round(again * moving)))
    return found


def network_bytes(shape: Shape, plan: Plan, ranks: int) -> float:
    """Return the bytes that a GPU sends in a step."""
    return sum(ring_bytes(each.kind, each.size, ranks) for each in collectives(shape, plan))


def network_seconds(shape: Shape, plan: Plan, cluster: Cluster) -> float:
    """Return the time that a step's communication takes if nothing hides it."""
    if cluster.gpus == 1:
        return 0.0
    found = collectives(shape, plan)
    return sum(ring_seconds(each, cluster.gpus, cluster.rate, cluster.hop) for each in found)


# --- the step ---------------------------------------------------------------------------------


def compute_seconds(shape: Shape, plan: Plan, gpu: GPU) -> float:
    """Return forward and backward: three forward passes' operations, dense at every sparsity."""
    return 3 * shape.flops * plan.batch / (gpu.flops * gpu.efficiency)


def scatter_bytes(total: int, survivors: int, entry: float) -> float:
    """Return the memory traffic of scattering one weight and gathering its gradient.

    The dense tensor is zeroed; every sector with a survivor is read and written; values and
    indices (also widened to int64) are read. Backward reads the touched sectors of the gradient
    and writes values. A sector of m entries is touched with probability 1 - (1 - density)^m.
    """
    density = survivors / total
    touched = 1 - (1 - density) ** (SECTOR / entry)
    forward = total * entry * (1 + 2 * touched) + survivors * (entry + INDEX_BYTES + 2 * 8)
    backward = total * entry * touched + survivors * (entry + INDEX_BYTES)
    return forward + backward


KERNELS = {"forward": 3, "backward": 1}
"""Per compact weight: zero, widen the index, scatter; gather."""


def scatter_seconds(shape: Shape, plan: Plan, gpu: GPU) -> float:
    """Return what being compact adds to a step; no kernel is quicker than `kernel_seconds`."""
    if not plan.sparsity:
        return 0.0
    rate = gpu.memory_rate * gpu.memory_efficiency
    again = 1 if plan.kept_scratch else 2
    kernels = KERNELS["forward"] * again + KERNELS["backward"]
    seconds = 0.0
    for total, survivors in zip(shape.layers, kept_per_layer(shape, plan.sparsity), strict=True):
        moved = again * scatter_bytes(total, survivors, plan.precision.scratch) / rate
        seconds += max(moved, kernels * gpu.kernel_seconds)
    return seconds


def update_seconds(shape: Shape, plan: Plan, gpu: GPU, ranks: int) -> float:
    """Return the optimizer's time: its state is read and written once, gradients are read."""
    values = trainable(shape, plan.sparsity) / (ranks if plan.stage else 1)
    moved = 2 * plan.precision.optimizer + plan.precision.gradient + plan.precision.parameter
    return values * moved / (gpu.memory_rate * gpu.memory_efficiency)


def step_seconds(shape: Shape, plan: Plan, gpu: GPU, cluster: Cluster) -> dict[str, float]:
    """Return a step's time by what takes it; `network` is what overlap leaves of it."""
    compute = compute_seconds(shape, plan, gpu)
    hidden = plan.overlap * 2 / 3 * compute
    parts = {
        "compute": compute,
        "scatter": scatter_seconds(shape, plan, gpu),
        "update": update_seconds(shape, plan, gpu, cluster.gpus),
        "network": max(0.0, network_seconds(shape, plan, cluster) - hidden),
    }
    return {**parts, "step": sum(parts.values())}


def checkpoint_seconds(shape: Shape, plan: Plan, cluster: Cluster) -> float:
    """Return the time to write a checkpoint, training standing still."""
    return checkpoint_bytes(shape, plan) / cluster.storage_rate
