"""Seconds in one optimizer step on a GPU, by what they are spent on, in closed form.

A roofline: matrix products and attention take their FLOP at an attainable share of the GPU's peak, and
everything takes the bytes it moves at an attainable share of the memory's bandwidth. Where the host starts
kernels more slowly than the GPU ends them, the host's time counts. What ranks say to each other is in
`collectives`.

Left out: loading data, evaluation, checkpoints, stragglers, a throttled GPU, and dense attention masks. The
fitted shares, the rows they were fitted on and the error on the others are in `docs/benchmarks/speed.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Final

from launcher.plan.activations import checkpointed_layers
from launcher.plan.batch import Batch
from launcher.plan.collectives import LINK_SHARE, Pass, Wires, exposed
from launcher.plan.hardware import GPU
from launcher.plan.shape import Shape, flops_per_token, parameters, weights_per_layer
from launcher.plan.states import Sharding
from launcher.plan.traffic import Stack

AMPERE, HOPPER = 8, 9

MATRIX_SHARE: Final[Mapping[int, float]] = {AMPERE: 0.867, HOPPER: 0.702}
"""Share of the peak that a matrix product reaches besides moving its operands, by compute capability's major
number. Fitted. Other generations are taken for Ampere, which no measurement supports."""

ATTENTION_SHARE: Final[Mapping[int, float]] = {AMPERE: 0.312, HOPPER: 0.174}
"""The same for attention with half of its FLOP masked. Fitted on FlashAttention 1; later ones are faster."""

OWN_PACE: Final[Mapping[int, float]] = {HOPPER: 0.75}
"""Of the time so modelled, what launcher's own plans take on the GPU: libraries are faster than those of the
published rows that the shares are fitted on. Fitted on rows in `docs/benchmarks/gpu.md` with all fast paths,
without compile or without the chunked loss, by compute capability's major number; not measured: 1."""

HOST_SECONDS: Final = 31e-6
HOST_OVERHEAD: Final = 5e-3
"""The host's time for one kernel, with Python, autocast and autograd, and for what the Trainer does around a
micro-batch. Fitted on three rows of gpt2 at micro-batch 8 in `docs/benchmarks/gpu.md`, which wait for the
host while other rows start on its processors."""

HOST_SHARDING: Final[Mapping[str, float]] = {
    "ddp": 0.0,
    "zero1": 1e-3,
    "zero2": 4e-3,
    "zero3": 12e-3,
    "fsdp": 3.3e-3,
}
"""The host's time for a layer and micro-batch in the hooks of DeepSpeed and FSDP2. Fitted on one row each of
gpt2-medium with one micro-batch of 8 a step in `docs/benchmarks/gpu.md`, as noisy as those above: what of it
is needed once a step was not told apart."""

OPTIMIZER_BYTES: Final = 40
"""Bytes a parameter: fused AdamW reads weight, gradient and two moments and writes all but the gradient (28);
clipping reads the gradient for its norm, then scales it (12). All fp32."""

BACKWARD: Final = 2 / 3
"""The backward pass's share of a micro-batch's time: twice the forward's FLOP."""

HOST_LINK: Final[Mapping[int, float]] = {7: 16e9, 8: 32e9}
NEWEST_HOST_LINK: Final = 64e9
"""Bytes/s between a GPU and its host, by compute capability's major number: 16 lanes of PCI Express 3, 4 and,
from Hopper on, 5 (PCI-SIG). An allowance: boards differ."""

HOST_BANDWIDTH: Final = 100e9
"""Bytes/s at which a node's CPUs read and write AdamW's state. An allowance, not measured: half of what eight
channels of DDR4-3200 have (JEDEC: 25.6 GB/s each)."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds in one optimizer step, by what they are spent on; `host` and `communication` if not hidden.

    `offload`: to and from the host's memory, and its CPUs' optimizer.
    """

    matrices: float
    attention: float
    elementwise: float
    host: float
    communication: float
    optimizer: float
    offload: float

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.items())

    def items(self) -> Iterator[tuple[str, float]]:
        """Each part in words, with its seconds."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))


def step_speed(
    shape: Shape,
    gpu: GPU,
    batch: Batch,
    wires: Wires,
    stack: Stack,
    sharding: Sharding,
    *,
    block_size: int,
    precision: str,
    gradient_checkpointing: bool | int,
    pace: float = 1.0,
) -> Speed | None:
    """One optimizer step of `batch` with AdamW, in blocks of `block_size` tokens.

    `gradient_checkpointing`: of every layer, of none, or of so many. `pace`: what its kernels take of the
    time that the shares above give them. None where the GPU's peak under `precision` (bf16, fp16 or fp32), or
    the network between nodes, is not known. Attention's FLOP are 7 H Q T for each token and layer: half of
    the scores are masked, and backward takes 2.5 times forward's (Dao 2023, "FlashAttention-2", section 4.1).
    """
    peak = gpu.peak_flops(precision)
    if peak is None or gpu.bandwidth is None or gpu.capability is None:
        return None
    generation = HOPPER if gpu.capability[0] == HOPPER else AMPERE
    bandwidth = stack.bandwidth_share * gpu.bandwidth
    again = checkpointed_layers(shape, gradient_checkpointing)
    tokens, passes = batch.micro_batch * block_size, 3 + again / shape.layers
    element = 4 if precision == "fp32" else 2
    products, operands = _products(shape, tokens, passes, element)
    matrices = pace * (products / (MATRIX_SHARE[generation] * peak) + operands / bandwidth)
    scores = (7 * shape.layers + 2 * again) * tokens * shape.queries * block_size
    attention = pace * scores / (ATTENTION_SHARE[generation] * peak)
    layers = ((shape.layers, stack.layer), (again, stack.again))
    moved: float = tokens * sum(times * layer.bytes_per_token(shape) for times, layer in layers)
    moved += stack.logit * tokens * shape.vocab + stack.weight * parameters(shape)
    elementwise = pace * moved / bandwidth
    busy = matrices + attention + elementwise
    kernels = sum(times * layer.kernels for times, layer in layers)
    started = HOST_OVERHEAD + HOST_SECONDS * kernels + HOST_SHARDING[sharding.strategy] * shape.layers
    host = max(0.0, started - busy)
    communication = exposed(
        shape,
        sharding,
        wires,
        Pass((1 - BACKWARD) * (busy + host), BACKWARD * (busy + host)),
        element=element,
        precision=precision,
        accumulation=batch.accumulation,
        again=again / shape.layers,
    )
    if communication is None:
        return None
    own = parameters(shape) / (1 if sharding.strategy == "ddp" else batch.world_size)
    on_gpu = sharding.offload == "none"
    return Speed(
        matrices=batch.accumulation * matrices,
        attention=batch.accumulation * attention,
        elementwise=batch.accumulation * elementwise,
        host=batch.accumulation * host,
        communication=communication,
        optimizer=OPTIMIZER_BYTES * own / bandwidth if on_gpu else 0.0,
        offload=0.0 if on_gpu else _offload(sharding, gpu, batch, wires, own, element, passes),
    )


def own_pace(gpu: GPU) -> float:
    """`pace` of launcher's own runs on `gpu`."""
    return 1.0 if gpu.capability is None else OWN_PACE.get(gpu.capability[0], 1.0)


def _offload(
    sharding: Sharding, gpu: GPU, batch: Batch, wires: Wires, own: float, element: int, passes: float
) -> float:
    """Seconds of one step, none of it hidden: gradients down after each micro-batch, weights up after the
    step or, where they live on the host, for each pass, and AdamW by CPUs that a node's ranks share."""
    assert gpu.capability is not None
    link = LINK_SHARE * HOST_LINK.get(gpu.capability[0], NEWEST_HOST_LINK)
    times_up: float = batch.accumulation * (passes - 1) if sharding.offload == "parameters" else 1
    moved = element * own * (times_up + batch.accumulation)
    return moved / link + OPTIMIZER_BYTES * own * wires.ranks_per_node / HOST_BANDWIDTH


def _products(shape: Shape, tokens: int, passes: float, element: int) -> tuple[float, float]:
    """FLOP of the matrix products of one micro-batch, and the bytes of their operands and results.

    Each is multiplied three times: forward, and for the gradients of its input and of its weight; the
    layers' a fourth time when they are checkpointed: `passes` is their mean. `element` is the size of a
    number in bytes.
    """
    layers, head = shape.layers * weights_per_layer(shape), shape.vocab * shape.hidden
    width = (7 if shape.gated else 4) * shape.hidden + 2 * (shape.queries + shape.keys)
    width += (3 if shape.gated else 2) * shape.intermediate
    numbers = passes * (layers + tokens * shape.layers * width) + 3 * (
        head + tokens * (shape.hidden + shape.vocab)
    )
    return 2.0 * tokens * (passes * layers + 3 * head), float(element * numbers)


def utilisation(
    shape: Shape, gpu: GPU, block_size: int, precision: str, tokens_per_second: float
) -> float | None:
    """MFU of one GPU: the PaLM count of FLOP (see `flops_per_token`) over the datasheet's peak."""
    peak = gpu.peak_flops(precision)
    return None if peak is None else tokens_per_second * flops_per_token(shape, block_size) / peak
