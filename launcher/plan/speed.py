"""Seconds in one optimizer step on a GPU, by what they are spent on, in closed form.

A roofline: matrix products and attention take their FLOP at an attainable share of the GPU's peak, and
everything takes the bytes it moves at an attainable share of the memory's bandwidth. Where the host starts
kernels more slowly than the GPU ends them, the host's time counts. DDP's all-reduce follows an alpha-beta
model and hides behind the last micro-batch's backward pass.

Left out: loading data, evaluation, checkpoints, stragglers, a throttled GPU, and dense attention masks. The
fitted shares, the rows they were fitted on and the error on the others are in `docs/benchmarks/speed.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Final

from launcher.plan.batch import Batch
from launcher.plan.hardware import GPU
from launcher.plan.shape import Shape, flops_per_token, parameters, weights_per_layer
from launcher.plan.traffic import Stack

AMPERE, HOPPER = 8, 9

MATRIX_SHARE: Final[Mapping[int, float]] = {AMPERE: 0.89, HOPPER: 0.76}
"""Share of the peak that a matrix product reaches besides moving its operands, by compute capability's major
number. Fitted. Other generations are taken for Ampere, which no measurement supports."""

ATTENTION_SHARE: Final[Mapping[int, float]] = {AMPERE: 0.31, HOPPER: 0.166}
"""The same for attention with half of its FLOP masked. Fitted on FlashAttention 1; later ones are faster."""

HOST_SECONDS: Final = 10e-6
"""An allowance, not measured: the host's time for one kernel, with Python, autocast and autograd."""

LINK_SHARE: Final = 0.8
"""NVLink's protocol takes about 20 % of its rate (a maintainer of NCCL, NVIDIA/nccl-tests issue 212)."""

BASE_LATENCY: Final = 8.4e-6
LINK_LATENCY: Final = 3.4e-6
NETWORK_LATENCY: Final = 14e-6
"""Seconds to begin a collective, and for a hop within a node and between nodes: NCCL's own tuning model
(`src/graph/tuning.cc`: ring and, between nodes, tree, Simple protocol)."""

BUCKET: Final = 25 * 2**20
"""Bytes of gradients all-reduced together: `bucket_cap_mb` in PyTorch's documentation of DDP."""

OPTIMIZER_BYTES: Final = 40
"""Bytes a parameter: fused AdamW reads weight, gradient and two moments and writes all but the gradient (28);
clipping reads the gradient for its norm, then scales it (12). All fp32."""

BACKWARD: Final = 2 / 3
"""The backward pass's share of a micro-batch's time: twice the forward's FLOP."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds in one optimizer step, by what they are spent on; `host` and `communication` if not hidden."""

    matrices: float
    attention: float
    elementwise: float
    host: float
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.items())

    def items(self) -> Iterator[tuple[str, float]]:
        """Each part in words, with its seconds."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Wires:
    """How ranks reach each other: `ranks_per_node`, and bytes/s each GPU sends within and between nodes.

    `network` is None where it is not known, which one node does not mind.
    """

    ranks_per_node: int
    link: float
    network: float | None


def step_speed(
    shape: Shape,
    gpu: GPU,
    batch: Batch,
    wires: Wires,
    stack: Stack,
    *,
    block_size: int,
    precision: str,
    gradient_checkpointing: bool,
) -> Speed | None:
    """One optimizer step of `batch` under DDP with AdamW, in blocks of `block_size` tokens.

    None where the GPU's peak under `precision` (bf16, fp16 or fp32), or the network between nodes, is not
    known. Attention's FLOP are 7 H Q T for each token and layer: half of the scores are masked, and
    backward takes 2.5 times forward's (Dao 2023, "FlashAttention-2", section 4.1).
    """
    peak = gpu.peak_flops(precision)
    if peak is None or gpu.bandwidth is None or gpu.capability is None:
        return None
    exchange = all_reduce(4 * parameters(shape), batch.world_size, wires)
    if exchange is None:
        return None
    generation = HOPPER if gpu.capability[0] == HOPPER else AMPERE
    bandwidth = stack.bandwidth_share * gpu.bandwidth
    tokens, passes = batch.micro_batch * block_size, 4 if gradient_checkpointing else 3
    products, operands = _products(shape, tokens, passes, 4 if precision == "fp32" else 2)
    matrices = products / (MATRIX_SHARE[generation] * peak) + operands / bandwidth
    scores = (9 if gradient_checkpointing else 7) * tokens * shape.layers * shape.queries * block_size
    attention = scores / (ATTENTION_SHARE[generation] * peak)
    layers = [stack.layer, stack.again] if gradient_checkpointing else [stack.layer]
    moved = shape.layers * tokens * sum(layer.bytes_per_token(shape) for layer in layers)
    moved += stack.logit * tokens * shape.vocab + stack.weight * parameters(shape)
    busy = matrices + attention + moved / bandwidth
    kernels = shape.layers * sum(layer.kernels for layer in layers)
    host = max(0.0, HOST_SECONDS * kernels - busy)
    # The last bucket is full only when backward is over; the others were on their way before.
    last = exchange * min(1.0, BUCKET / (4 * parameters(shape)))
    return Speed(
        matrices=batch.accumulation * matrices,
        attention=batch.accumulation * attention,
        elementwise=batch.accumulation * moved / bandwidth,
        host=batch.accumulation * host,
        communication=max(last, exchange - BACKWARD * (busy + host)),
        optimizer=OPTIMIZER_BYTES * parameters(shape) / bandwidth,
    )


def _products(shape: Shape, tokens: int, passes: int, element: int) -> tuple[float, float]:
    """FLOP of the matrix products of one micro-batch, and the bytes of their operands and results.

    Each is multiplied three times: forward, and for the gradients of its input and of its weight; the
    layers' a fourth time when they are checkpointed. `element` is the size of a number in bytes.
    """
    layers, head = shape.layers * weights_per_layer(shape), shape.vocab * shape.hidden
    width = (7 if shape.gated else 4) * shape.hidden + 2 * (shape.queries + shape.keys)
    width += (3 if shape.gated else 2) * shape.intermediate
    numbers = passes * (layers + tokens * shape.layers * width) + 3 * (
        head + tokens * (shape.hidden + shape.vocab)
    )
    return 2.0 * tokens * (passes * layers + 3 * head), float(element * numbers)


def all_reduce(size: int, world_size: int, wires: Wires) -> float | None:
    """Seconds to sum `size` bytes over all ranks, in DDP's buckets; None without the network's rate.

    Each byte crosses a ring's slowest wire 2 (n - 1) / n times (Thakur et al. 2005, "Optimization of
    Collective Communication Operations in MPICH"); between nodes the ring has as many wires as a node has
    ranks. A bucket waits for the hops of a ring inside the nodes and of a tree between them.
    """
    if world_size == 1:
        return 0.0
    nodes = world_size // wires.ranks_per_node
    rates = [wires.link] if wires.ranks_per_node > 1 else []
    if nodes > 1:
        if wires.network is None:
            return None
        rates.append(wires.ranks_per_node * wires.network)
    hops = 2 * (wires.ranks_per_node - 1) * LINK_LATENCY + 2 * math.ceil(math.log2(nodes)) * NETWORK_LATENCY
    crossing = 2 * (world_size - 1) / world_size * size / (LINK_SHARE * min(rates))
    return math.ceil(size / BUCKET) * (BASE_LATENCY + hops) + crossing


def utilisation(
    shape: Shape, gpu: GPU, block_size: int, precision: str, tokens_per_second: float
) -> float | None:
    """MFU of one GPU: the PaLM count of FLOP (see `flops_per_token`) over the datasheet's peak."""
    peak = gpu.peak_flops(precision)
    return None if peak is None else tokens_per_second * flops_per_token(shape, block_size) / peak
