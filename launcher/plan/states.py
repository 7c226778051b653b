"""Bytes of the model's state on one rank under each strategy: weights, gradients, the optimizer's moments.

Read in DeepSpeed 0.19.8 (`runtime/bf16_optimizer.py`, `runtime/zero/stage_1_and_2.py`, `stage3.py`) and in
PyTorch's and accelerate's FSDP2, and held against both engines, to the byte, in `tests/plan/test_states.py`.
With fp32 accumulation of gradients, `overlap_comm` and `contiguous_gradients`, and AdamW's two fp32 moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from launcher.plan.activations import FP32, HALF, Numbers
from launcher.plan.buckets import buckets
from launcher.plan.shape import Shape, layer_tensors, parameters, tables, tensors

SINGLE_REDUCTION: Final = 500_000_000
"""Elements that DeepSpeed's BF16_Optimizer copies together to sum them (`MEMORY_OPT_ALLREDUCE_SIZE`)."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How `world_size` ranks share the model's state, and what of it goes to the host's memory.

    `offload` is none, optimizer, or parameters, which takes the optimizer too.
    """

    strategy: str
    world_size: int
    offload: str = "none"

    def numbers(self, precision: str) -> Numbers:
        """What the model computes in: DDP casts for each product, the others hold the model in half."""
        if precision == "fp32":
            return Numbers(FP32, FP32)
        return Numbers(HALF, FP32 if self.strategy == "ddp" else HALF)

    @property
    def compiled_by_layer(self) -> bool:
        """Whether torch.compile, where it is asked for, has layers alone: what makes the loss is in none."""
        return self.strategy == "fsdp"


@dataclass(frozen=True, slots=True)
class States:
    """Bytes on the GPU for as long as the run lasts, and what comes on top of them at some moments.

    `kept` are those of the `gradients` that stay from one step to the next: the others are made anew.
    `gathered`: weights brought together, where the loss is computed and inside a layer; `transient`:
    gradients on their way, and `buffers`: the collectives', both while layers go backward; `reduction`: what
    is needed once backward is over. `host` is what this rank keeps in its node's memory instead.
    """

    parameters: int
    master_weights: int
    gradients: int
    optimizer: int
    kept: int = 0
    gathered: int = 0
    transient: int = 0
    buffers: int = 0
    reduction: int = 0
    host: int = 0


def checkpoint_bytes(parameters: int, strategy: str, precision: str) -> int:
    """Bytes of a checkpoint on disk: each weight and AdamW's two moments of it in fp32, and what ZeRO-1 and 2
    compute with beside them (stage 3 writes all but so)."""
    computed = FP32 if precision == "fp32" else HALF
    return parameters * (3 * FP32 + (computed if strategy in ("zero1", "zero2") else 0))


def states(shape: Shape, sharding: Sharding, precision: str) -> States:
    """The state of one rank, the first where they differ. Raises ValueError for an unknown strategy."""
    half = precision != "fp32"
    if sharding.strategy == "ddp":
        return _ddp(shape, sharding.world_size)
    if sharding.strategy == "zero1" and precision == "bf16" and sharding.offload == "none":
        return _bf16_optimizer(shape, sharding.world_size)
    if sharding.strategy in ("zero1", "zero2"):
        found = _stage_1_and_2(shape, sharding, half=half)
        return _offloaded_1_and_2(shape, sharding, found, half=half)
    if sharding.strategy == "zero3":
        return _stage_3(shape, sharding, half=half)
    if sharding.strategy == "fsdp":
        return _fsdp(shape, sharding, half=half)
    raise ValueError(f"unknown strategy {sharding.strategy!r}")


def _ddp(shape: Shape, world_size: int) -> States:
    """4 + 4 + 8 bytes a parameter (Rajbhandari et al. 2020, "ZeRO", section 3.1, without half weights).

    DDP keeps a second copy of the gradients in its buckets (PyTorch's documentation of
    `gradient_as_bucket_view`).
    """
    count = parameters(shape)
    return States(
        parameters=FP32 * count,
        master_weights=0,
        gradients=FP32 * count,
        optimizer=2 * FP32 * count,
        buffers=FP32 * count if world_size > 1 else 0,
    )


def groups(shape: Shape) -> tuple[int, int]:
    """Elements of the optimizer's two groups: those with weight decay (matrices), and those without."""
    matrices = sum(one.elements * one.count for one in tensors(shape) if one.matrix)
    return matrices, parameters(shape) - matrices


def flat(shape: Shape, world_size: int) -> int:
    """Elements that ZeRO-1 and 2 flatten: each group padded to twice the world, so that partitions are equal
    and start at four bytes in half precision."""
    return sum(-(-group // (2 * world_size)) * 2 * world_size for group in groups(shape))


def partitions(shape: Shape, world_size: int, *, only_vectors: bool = False) -> int:
    """Elements on one rank under ZeRO-3, which pads each tensor to the world."""
    wanted = [one for one in tensors(shape) if not (only_vectors and one.matrix)]
    return sum(-(-one.elements // world_size) * one.count for one in wanted)


def _bf16_optimizer(shape: Shape, world_size: int) -> States:
    """ZeRO-1 under bf16 with fp32 accumulation is another optimizer, which shards only the state.

    Gradients are whole twice: as backward makes them, and accumulated in fp32. All of them are summed when
    the last backward is over: a flat copy (of groups that fit in one reduction) and its cast to bf16.
    """
    whole = flat(shape, world_size)
    partition = whole // world_size
    largest = max(groups(shape))
    copied = HALF * largest if whole > SINGLE_REDUCTION else (FP32 + HALF) * whole
    return States(
        parameters=HALF * whole,
        master_weights=FP32 * partition,
        gradients=FP32 * whole + HALF * parameters(shape),
        optimizer=2 * FP32 * partition,
        kept=FP32 * whole,
        transient=FP32 * shape.vocab * shape.hidden,  # an embedding's gradient, cast to be added up
        reduction=copied,
    )


def _stage_1_and_2(shape: Shape, sharding: Sharding, *, half: bool) -> States:
    """DeepSpeedZeroOptimizer: stage 1 accumulates whole gradients in fp32, stage 2 its partition of them.

    In fp32, stage 2 holds on to the whole of every gradient that its partition has a part of. Two buckets
    take turns, and a third copy of one is summed.
    """
    whole = flat(shape, sharding.world_size)
    partition = whole // sharding.world_size
    element = HALF if half else FP32
    bucket = buckets(shape).reduce_bucket_size
    stage_1 = sharding.strategy == "zero1"
    staged = FP32 if stage_1 else element
    if stage_1:
        gradients = FP32 * parameters(shape)
    else:
        gradients = FP32 * (partition if half else _touched(shape, sharding.world_size))
    return States(
        parameters=element * whole,
        master_weights=FP32 * partition,
        gradients=gradients,
        optimizer=2 * FP32 * partition,
        # A tied table's gradient waits for the embedding's, which comes last.
        transient=element * shape.vocab * shape.hidden,
        buffers=3 * staged * bucket,
        reduction=FP32 * partition if stage_1 else 0,
    )


def _touched(shape: Shape, world_size: int) -> int:
    """Elements of all tensors that the first rank's partition has a part of."""
    padded = 2 * world_size
    found = 0
    for matrix, group in zip((True, False), groups(shape), strict=True):
        partition, reached = -(-group // padded) * 2, 0
        for elements in _in_order(shape, matrix=matrix):
            if reached >= partition:
                break
            reached += elements
        found += reached
    return found


def _in_order(shape: Shape, *, matrix: bool) -> list[int]:
    """Elements of the group's tensors as the model has them: the tables, then each layer's."""
    first = [one.elements for one in tables(shape)] if matrix else []
    layer = [one.elements for one in layer_tensors(shape) if one.matrix == matrix for _ in range(one.count)]
    return [*first, *(layer * shape.layers)]


def _offloaded_1_and_2(shape: Shape, sharding: Sharding, found: States, *, half: bool) -> States:
    """The master weights, their gradients and the moments go to the host, with a copy of new weights on its
    way back, and a gradient's buffer on either side."""
    if sharding.offload == "none":
        return found
    element = HALF if half else FP32
    partition = flat(shape, sharding.world_size) // sharding.world_size
    largest = max(one.elements for one in tensors(shape))
    accumulated = FP32 * partition
    return replace(
        found,
        master_weights=0,
        optimizer=0,
        gradients=found.gradients if sharding.strategy == "zero1" else 0,
        buffers=found.buffers + element * largest,
        host=(4 * FP32 + element) * partition + accumulated + element * largest,
    )


def _stage_3(shape: Shape, sharding: Sharding, *, half: bool) -> States:
    """Everything in partitions, but for vectors, which stay gathered beside theirs.

    The master copy is there in fp32 too. Gathered at most: what is in use (at most the
    table of the output layer) and what is prefetched. The bucket of gradients is there all the time.
    """
    element = HALF if half else FP32
    own = partitions(shape, sharding.world_size)
    sizes = buckets(shape)
    # One rank's partition is the whole, and nothing is gathered.
    shared = sharding.world_size > 1
    vectors = partitions(shape, sharding.world_size, only_vectors=True) * sharding.world_size if shared else 0
    table = shape.vocab * shape.hidden
    on_gpu = sharding.offload == "none"
    return States(
        parameters=element * ((0 if sharding.offload == "parameters" else own) + vectors),
        master_weights=FP32 * own if on_gpu else 0,
        gradients=FP32 * own if on_gpu else 0,
        optimizer=2 * FP32 * own if on_gpu else 0,
        kept=FP32 * own if on_gpu else 0,
        gathered=element * (table + sizes.prefetch_bucket_size) if shared or not on_gpu else 0,
        # The table's gradient as elsewhere, and a matrix's before it is in the bucket.
        transient=element * (table + shape.hidden * shape.intermediate),
        buffers=2 * element * sizes.reduce_bucket_size,
        reduction=FP32 * min(own, sizes.sub_group_size) if on_gpu else 0,
        host=0
        if on_gpu
        else (4 * FP32 * own + FP32 * own + (element * own if sharding.offload == "parameters" else 0)),
    )


def _fsdp(shape: Shape, sharding: Sharding, *, half: bool) -> States:
    """FSDP2 as accelerate wraps it: a group a layer, one of the tied table and the last norm, and the rest.

    Weights are fp32 shards of whole rows, of which the first rank has the most. Gathered in half are the
    layer in use and the next one, and the output layer's group from its forward to its backward pass.
    """
    own = sum(-(-one.rows // sharding.world_size) * one.columns * one.count for one in tensors(shape))
    element = HALF if half else FP32
    layer = sum(one.elements * one.count for one in layer_tensors(shape))
    table = shape.vocab * shape.hidden
    on_gpu = sharding.offload == "none"
    return States(
        parameters=FP32 * own if on_gpu else 0,
        master_weights=0,
        gradients=FP32 * own if on_gpu else 0,
        optimizer=2 * FP32 * own if on_gpu else 0,
        gathered=element * (table + 2 * layer),
        transient=element * table,
        buffers=(element + FP32) * layer,
        host=0 if on_gpu else 4 * FP32 * own,
    )
