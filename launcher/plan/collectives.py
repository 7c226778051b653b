"""Seconds that ranks spend talking, by an alpha-beta model, for one rank to thousands.

A collective takes a start, the hops of its ring or tree, and its bytes over the slowest wire. What a strategy
sends while layers compute is hidden behind them, as far as it fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from launcher.plan.activations import FP32
from launcher.plan.buckets import buckets
from launcher.plan.shape import Shape, layer_tensors, parameters
from launcher.plan.states import Sharding

LINK_SHARE: Final = 0.8
"""NVLink's protocol takes about 20 % of its rate (a maintainer of NCCL, NVIDIA/nccl-tests issue 212)."""

BASE_LATENCY: Final = 8.4e-6
LINK_LATENCY: Final = 3.4e-6
NETWORK_LATENCY: Final = 14e-6
"""Seconds to begin a collective, and for a hop within a node and between nodes: NCCL's own tuning model
(`src/graph/tuning.cc`: ring and, between nodes, tree, Simple protocol)."""

DDP_BUCKET: Final = 25 * 2**20
"""Bytes of gradients all-reduced together: `bucket_cap_mb` in PyTorch's documentation of DDP."""


@dataclass(frozen=True, slots=True)
class Wires:
    """How ranks reach each other: `ranks_per_node`, and bytes/s each GPU sends within and between nodes.

    `network` is None where it is not known, which one node does not mind.
    """

    ranks_per_node: int
    link: float
    network: float | None


@dataclass(frozen=True, slots=True)
class Pass:
    """Seconds of one micro-batch's forward and backward pass on the GPU, behind which ranks may talk."""

    forward: float
    backward: float


def all_reduce(size: float, world_size: int, wires: Wires, bucket: float) -> float | None:
    """Seconds to sum `size` bytes over all ranks, `bucket` bytes at a time; None without the network's rate.

    Each byte crosses a ring's slowest wire 2 (n - 1) / n times (Thakur et al. 2005, "Optimization of
    Collective Communication Operations in MPICH"). A bucket waits for the hops of a ring inside the nodes and
    of a tree between them.
    """
    rate = _slowest(world_size, wires)
    if world_size == 1 or rate is None:
        return None if rate is None else 0.0
    nodes = world_size // wires.ranks_per_node
    hops = 2 * (wires.ranks_per_node - 1) * LINK_LATENCY + 2 * math.ceil(math.log2(nodes)) * NETWORK_LATENCY
    return math.ceil(size / bucket) * (BASE_LATENCY + hops) + 2 * (world_size - 1) / world_size * size / rate


def gather(size: float, world_size: int, wires: Wires, bucket: float) -> float | None:
    """Seconds to all-gather, or to reduce-scatter, `size` bytes: half of an all-reduce's, on a ring alone.

    NCCL has no tree for these, so each of them waits for a hop to every rank and every node.
    """
    rate = _slowest(world_size, wires)
    if world_size == 1 or rate is None:
        return None if rate is None else 0.0
    nodes = world_size // wires.ranks_per_node
    hops = (world_size - nodes) * LINK_LATENCY + (nodes - 1) * NETWORK_LATENCY
    return math.ceil(size / bucket) * (BASE_LATENCY + hops) + (world_size - 1) / world_size * size / rate


def _slowest(world_size: int, wires: Wires) -> float | None:
    """Bytes/s of a ring's slowest wire; between nodes the ring has as many wires as a node has ranks."""
    nodes = world_size // wires.ranks_per_node
    rates = [wires.link] if wires.ranks_per_node > 1 else []
    if nodes > 1:
        if wires.network is None:
            return None
        rates.append(wires.ranks_per_node * wires.network)
    return LINK_SHARE * min(rates, default=wires.link)


def exposed(
    shape: Shape,
    sharding: Sharding,
    wires: Wires,
    one: Pass,
    *,
    element: int,
    precision: str,
    accumulation: int,
    again: float,
) -> float | None:
    """Seconds of one step that ranks talk and do not compute; None without the network's rate.

    `again`: the share of the layers that is computed again in the backward pass.

    Weights and gradients travel in the model's own `element` bytes, DDP's and FSDP's gradients in fp32.
    """
    world = sharding.world_size
    if _slowest(world, wires) is None:
        return None
    if sharding.strategy == "ddp":
        return _behind(FP32 * parameters(shape), world, wires, DDP_BUCKET, one.backward)
    if sharding.strategy in ("zero3", "fsdp"):
        gathered = again if sharding.strategy == "zero3" else 0.0
        reduced = FP32 if sharding.strategy == "fsdp" else element
        return accumulation * _sharded_weights(shape, world, wires, one, element, reduced, again=gathered)
    size, sizes = element * parameters(shape), buckets(shape)
    bucket = element * sizes.reduce_bucket_size
    weights = _certain(gather(size, world, wires, element * sizes.allgather_bucket_size))
    if sharding.strategy == "zero1" and precision == "bf16" and sharding.offload == "none":
        # DeepSpeed's BF16_Optimizer sums the gradients when the last backward pass is over.
        return weights + _certain(all_reduce(size, world, wires, size))
    # ZeRO-2 sums each micro-batch's gradients, ZeRO-1 the last one's; both by an all-reduce, as DeepSpeed's
    # `use_multi_rank_bucket_allreduce` has it.
    times = accumulation if sharding.strategy == "zero2" else 1
    return weights + times * _behind(size, world, wires, bucket, one.backward)


def _behind(size: float, world_size: int, wires: Wires, bucket: float, backward: float) -> float:
    """An all-reduce that starts with the first full bucket: the last is full only when backward is over."""
    whole = _certain(all_reduce(size, world_size, wires, bucket))
    return max(whole * min(1.0, bucket / size), whole - backward)


def _sharded_weights(
    shape: Shape, world_size: int, wires: Wires, one: Pass, element: int, reduced: int, *, again: float
) -> float:
    """One micro-batch of ZeRO-3 or FSDP: weights gathered for each pass, and gradients scattered.

    ZeRO-3 gathers a checkpointed layer once more to compute it `again`, a share of all. Gradients travel in
    `reduced` bytes an element. The first layer's weights and the last one's gradients are waited for.
    """
    size = element * parameters(shape)
    layer = element * sum(tensors.elements * tensors.count for tensors in layer_tensors(shape))
    whole = _certain(gather(size, world_size, wires, layer))
    ends = whole * min(1.0, layer / size)
    back = (1 + again) * whole + reduced / element * whole
    return max(ends, whole - one.forward) + max(ends, back - one.backward)


def _certain(seconds: float | None) -> float:
    assert seconds is not None, "the network's rate was looked at before"
    return seconds
