"""How many elements DeepSpeed handles at a time: chosen from the model, counted in memory, rendered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from launcher.plan.shape import Shape, tensors, weights_per_layer

SMALLEST: Final = 1 << 22
"""Elements: 8 MiB in half precision. A smaller collective is held up by its latency (`plan/speed.py`)."""

LARGEST: Final = 1 << 26
"""Elements: 128 MiB in half precision. A larger one is no faster, and up to three of them are alive."""

GATHERED: Final = 500_000_000
"""Elements that ZeRO-1 and 2 gather at a time after a step: DeepSpeed's own default."""

SUB_GROUP: Final = 1 << 26
"""Elements of a partition that ZeRO-3 steps at a time: it copies their fp32 gradients first, 256 MiB."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """DeepSpeed's sizes, all in elements; each name is the JSON key it is for, without `stage3_`.

    `reduce_bucket_size`: what one reduction takes. `allgather_bucket_size`: what one gather of new weights
    takes, in place, so that it costs no memory. `prefetch_bucket_size`: what
    ZeRO-3 gathers ahead of its use. `param_persistence_threshold`: tensors up to this size stay gathered.
    `max_live_parameters`: prefetching stops there. `max_reuse_distance`: 0, so that a layer is let go after
    each use, which DeepSpeed's own default does not do in a model below 1e9 parameters. `sub_group_size`:
    what is stepped at a time.
    """

    reduce_bucket_size: int
    allgather_bucket_size: int
    prefetch_bucket_size: int
    param_persistence_threshold: int
    max_live_parameters: int
    max_reuse_distance: int
    sub_group_size: int


def buckets(shape: Shape) -> Buckets:
    """One layer at a time, within bounds; every vector (norms and biases) stays gathered, and no matrix."""
    layer = min(max(weights_per_layer(shape), SMALLEST), LARGEST)
    # DeepSpeed refuses an odd bucket: NCCL's send buffers start at a multiple of four bytes.
    layer -= layer % 2
    longest_vector = max(one.elements for one in tensors(shape) if not one.matrix)
    return Buckets(
        reduce_bucket_size=layer,
        allgather_bucket_size=GATHERED,
        prefetch_bucket_size=layer,
        param_persistence_threshold=longest_vector,
        max_live_parameters=shape.vocab * shape.hidden + 2 * layer,
        max_reuse_distance=0,
        sub_group_size=SUB_GROUP,
    )
