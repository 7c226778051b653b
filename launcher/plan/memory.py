"""Bytes on one GPU at the peak of a training step, by category, in closed form.

What lasts is in `states`, what comes and goes in `activations`. The peak is at one of six moments, and the
largest counts: where the loss is computed, where the backward pass begins, inside the last layer on the way
back, inside the last that is checkpointed and inside the first, and when backward is over and gradients are
summed. `docs/concepts/memory.md` says what it was held against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from launcher.plan.activations import Moments, Passing, moments
from launcher.plan.shape import Shape
from launcher.plan.states import Sharding, States, states

GPU_FRAMEWORK = 1 << 30
"""An allowance, not measured: the CUDA context with its kernels, and cuBLAS workspaces."""

GPU_COMMUNICATION = 1 << 29
"""An allowance, not measured: NCCL's channels and buffers, where there is more than one rank."""

CPU_FRAMEWORK = 1 << 29
"""A Python process with torch and transformers loaded: 421 MiB resident with torch 2.13."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank, by category; 0 for one that the strategy does not have.

    `weight_copies`: weights as the matrix products take them, cast by autocast or gathered from all ranks.
    """

    parameters: int
    weight_copies: int
    master_weights: int
    gradients: int
    optimizer: int
    activations: int
    logits_and_loss: int
    communication_buffers: int
    framework: int

    @property
    def total(self) -> int:
        return sum(size for _, size in self.items())

    def items(self) -> Iterator[tuple[str, int]]:
        """Each category in words, with its bytes."""
        return ((field.name.replace("_", " "), getattr(self, field.name)) for field in fields(self))


def estimate(
    shape: Shape,
    sharding: Sharding,
    *,
    micro_batch: int,
    accumulation: int,
    block_size: int,
    precision: str,
    gradient_checkpointing: bool | int,
    chunked_loss: bool,
    compiled: bool,
    on_cpu: bool,
) -> Memory:
    """The peak of one rank with AdamW, for `micro_batch` sequences of `block_size` tokens.

    With `accumulation` 1 most engines have no gradients before backward makes them: the step before let them
    go. `gradient_checkpointing`: of every layer, of none, or of so many, the first ones. Raises ValueError
    for another `precision` than bf16, fp16 and fp32, or an unknown strategy.
    """
    if precision not in {"bf16", "fp16", "fp32"}:
        raise ValueError(f"unknown precision {precision!r}: expected bf16, fp16 or fp32")
    lasting = states(shape, sharding, precision)
    if on_cpu:
        # What is offloaded lies in the same memory: moments, master weights and their gradients.
        lasting = replace(lasting, optimizer=lasting.optimizer + lasting.host)
    passing = moments(
        shape,
        sharding.numbers(precision),
        micro_batch=micro_batch,
        block_size=block_size,
        gradient_checkpointing=gradient_checkpointing,
        chunked_loss=chunked_loss,
        compiled=compiled and not sharding.compiled_by_layer,
        on_cpu=on_cpu,
    )
    framework = _framework(sharding.world_size, on_cpu=on_cpu)
    before = lasting.gradients if accumulation > 1 else lasting.kept
    peaks = [
        _at(lasting, *moment, framework) for moment in _with_collectives(sharding, lasting, passing, before)
    ]
    return max(peaks, key=lambda memory: memory.total)


def _with_collectives(
    sharding: Sharding, lasting: States, passing: Moments, before: int
) -> Iterator[tuple[Passing, int, int, int]]:
    """Each moment, with the weights gathered, the gradients there, and the collectives' buffers then.

    `before` are the gradients that are there before the layers' own are made.
    """
    always = lasting.buffers if sharding.strategy in ("ddp", "zero3") else 0
    if sharding.strategy == "zero1":
        # Its two buckets are there from one micro-batch to the next, and only the third copy is not.
        always = 2 * lasting.buffers // 3
    yield passing.loss, lasting.gathered, before, always
    yield passing.backward, lasting.gathered, before, always
    yield passing.layer, lasting.gathered, before + lasting.transient, lasting.buffers
    made = before + int(passing.above * (lasting.gradients - before))
    yield passing.again, lasting.gathered, made + lasting.transient, lasting.buffers
    yield passing.first, lasting.gathered, lasting.gradients + lasting.transient, lasting.buffers
    yield Passing(0, 0, 0), 0, lasting.gradients, always + lasting.reduction


def _at(
    lasting: States, passing: Passing, gathered: int, gradients: int, buffers: int, framework: int
) -> Memory:
    return Memory(
        parameters=lasting.parameters,
        weight_copies=passing.weight_copies + gathered,
        master_weights=lasting.master_weights,
        gradients=gradients,
        optimizer=lasting.optimizer,
        activations=passing.activations,
        logits_and_loss=passing.logits_and_loss,
        communication_buffers=buffers,
        framework=framework,
    )


def _framework(world_size: int, *, on_cpu: bool) -> int:
    if on_cpu:
        return CPU_FRAMEWORK
    return GPU_FRAMEWORK + (GPU_COMMUNICATION if world_size > 1 else 0)
