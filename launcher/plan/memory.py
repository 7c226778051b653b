"""Bytes on one GPU at the peak of a training step, by category, in closed form.

The peak is at one of three moments, and the largest counts: where the loss is computed, with autocast still
holding a copy of every weight matrix; where the backward pass begins, with the logits' gradient being made;
or later, inside a layer. Left out: the allocator's fragmentation, and dense attention masks (padded or
isolated documents).

Checked on a CPU against the bytes PyTorch's profiler sees allocated, and for a GPU against a trace of its
operators (`tests/plan/trace.py`); not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from launcher.plan.shape import Shape, parameters, weights_per_layer

FP32 = 4
"""Bytes of a weight, a gradient, a moment, and of everything autocast keeps in fp32."""

HALF = 2
"""Bytes of bf16 and of fp16."""

BYTES_PER_LOGIT = 12
"""Where backward begins: the loss's fp32 log-probabilities, their gradient, and the one it is made into."""

GPU_FRAMEWORK = 1 << 30
"""An allowance, not measured: the CUDA context with its kernels, and cuBLAS workspaces."""

GPU_COMMUNICATION = 1 << 29
"""An allowance, not measured: NCCL's channels and buffers, where there is more than one rank."""

CPU_FRAMEWORK = 1 << 29
"""A Python process with torch and transformers loaded: 421 MiB resident with torch 2.13."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank, by category."""

    parameters: int
    autocast_copies: int
    gradients: int
    optimizer: int
    activations: int
    logits_and_loss: int
    ddp_buckets: int
    framework: int

    @property
    def total(self) -> int:
        return sum(size for _, size in self.items())

    def items(self) -> Iterator[tuple[str, int]]:
        """Each category in words, with its bytes."""
        return ((field.name.replace("_", " "), getattr(self, field.name)) for field in fields(self))


def estimate(
    shape: Shape,
    *,
    micro_batch: int,
    block_size: int,
    precision: str,
    gradient_checkpointing: bool,
    world_size: int,
    on_cpu: bool = False,
) -> Memory:
    """The peak of one rank under DDP with AdamW, for `micro_batch` sequences of `block_size` tokens.

    Weights, gradients and the optimizer's two moments are fp32 under every `precision` (bf16, fp16 or
    fp32), as autocast keeps them: 4 + 4 + 8 bytes a parameter (Rajbhandari et al. 2020, "ZeRO", section
    3.1, without its separate half-precision weights). Gradients count although the first micro-batch of
    a step has none yet. DDP keeps a second copy of them in its buckets (PyTorch's documentation of
    `gradient_as_bucket_view`). Raises ValueError for another precision.
    """
    if precision not in {"bf16", "fp16", "fp32"}:
        raise ValueError(f"unknown precision {precision!r}: expected bf16, fp16 or fp32")
    compute = FP32 if precision == "fp32" else HALF
    count, tokens = parameters(shape), micro_batch * block_size
    moment = max(
        _moments(
            shape,
            compute,
            tokens,
            block_size=block_size,
            gradient_checkpointing=gradient_checkpointing,
            on_cpu=on_cpu,
        ),
        key=lambda moment: moment.total,
    )
    return Memory(
        parameters=FP32 * count,
        autocast_copies=moment.autocast_copies,
        gradients=FP32 * count,
        optimizer=2 * FP32 * count,
        activations=moment.activations,
        logits_and_loss=moment.logits_and_loss,
        ddp_buckets=FP32 * count if world_size > 1 else 0,
        framework=_framework(world_size, on_cpu=on_cpu),
    )


@dataclass(frozen=True, slots=True)
class _Moment:
    """Bytes of what comes and goes within a step, at one moment of it."""

    autocast_copies: int
    activations: int
    logits_and_loss: int

    @property
    def total(self) -> int:
        return self.autocast_copies + self.activations + self.logits_and_loss


def _moments(
    shape: Shape, compute: int, tokens: int, *, block_size: int, gradient_checkpointing: bool, on_cpu: bool
) -> Iterator[_Moment]:
    """The three moments that may be the peak: the loss, the start of backward, and inside the last layer.

    Autocast casts each weight matrix once a forward pass and holds the copies until the pass is over;
    backward needs them too, except under checkpointing, where each layer casts its own again.
    """
    layer = tokens * _layer(shape, compute, block_size, on_cpu=on_cpu)
    inside = tokens * _gradients_inside(shape, compute)
    ends = tokens * _ends(shape, compute, on_cpu=on_cpu)
    each, head = (HALF * size if compute == HALF else 0 for size in _cast(shape))
    casts = shape.layers * each
    # A checkpointed layer keeps its input alone, and all of it is computed again on the way back.
    kept = shape.layers * (tokens * FP32 * shape.hidden if gradient_checkpointing else layer)
    logits = tokens * shape.vocab
    yield _Moment(casts + head, kept + ends, (2 * FP32 + (compute if compute == HALF else 0)) * logits)
    yield _Moment((0 if gradient_checkpointing else casts) + head, kept + ends, BYTES_PER_LOGIT * logits)
    # By the time the layers' own gradients are made, the logits and what led to them are gone.
    again = layer if gradient_checkpointing else 0
    yield _Moment((each if gradient_checkpointing else casts) + head, kept + again + inside, 0)


def _cast(shape: Shape) -> tuple[int, int]:
    """Elements that autocast casts: one layer's weight matrices, and the output layer's."""
    return weights_per_layer(shape), shape.vocab * shape.hidden


def _layer(shape: Shape, compute: int, block_size: int, *, on_cpu: bool) -> int:
    """Bytes that one layer keeps for backward, for each token.

    After Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
    section 4.1, with three changes. The residual stream stays fp32 under autocast. Attention does not
    keep its T x T weights but, for each head and token, their log-sum-exp (Dao et al. 2022,
    "FlashAttention"). What a kernel can derive from its output is not kept, as with a fused tanh GELU.
    """
    attention = _attention(shape, compute, block_size, on_cpu=on_cpu)
    if shape.gated:
        return attention + _rms_norms(shape) + _gated_projections(shape, compute)
    masks = 2 * _mask(compute, on_cpu=on_cpu) * shape.hidden if shape.dropout else 0
    layer_norms = 2 * (FP32 * shape.hidden + 2 * FP32)  # the input; mean and deviation
    inputs = 2 * compute * shape.hidden  # of the attention's and the MLP's first projection
    return attention + layer_norms + inputs + 2 * compute * shape.intermediate + masks


def _attention(shape: Shape, compute: int, block_size: int, *, on_cpu: bool) -> int:
    """Query, key, value and output; and what stands in for the attention weights."""
    output = compute * shape.queries + _head_norms(shape, compute)
    inputs = shape.queries + 2 * shape.keys
    if on_cpu and shape.attention_dropout:
        # PyTorch has no fused kernel for this: fp32 weights, their mask and the product are kept.
        return output + FP32 * inputs + 3 * FP32 * shape.heads * block_size
    return output + compute * inputs + FP32 * shape.heads


def _head_norms(shape: Shape, compute: int) -> int:
    """Qwen3 normalises each query and key head: the input in fp32, the normalised input, and the scale."""
    if shape.model_type != "qwen3":
        return 0
    return (FP32 + compute) * (shape.queries + shape.keys) + FP32 * (shape.heads + shape.kv_heads)


def _rms_norms(shape: Shape) -> int:
    """Two of them, in steps as transformers computes them: the input, its scale and the normalised input."""
    return 2 * (2 * FP32 * shape.hidden + FP32)


def _gated_projections(shape: Shape, compute: int) -> int:
    """The projections' inputs, and the gate, its activation, the up projection and their product.

    Query, key and value share an input, and so do gate and up; but autocast casts it for each of them.
    """
    inputs = 2 if compute == FP32 else 5
    return compute * (inputs * shape.hidden + 4 * shape.intermediate)


def _gradients_inside(shape: Shape, compute: int) -> int:
    """Bytes for each token at most alive inside one layer's backward: the MLP's and the residual stream's."""
    return (2 if shape.gated else 1) * compute * shape.intermediate + FP32 * shape.hidden


def _ends(shape: Shape, compute: int, *, on_cpu: bool) -> int:
    """Bytes for each token outside the layers: the embedding's dropout, the last norm, the head's input."""
    mask = _mask(compute, on_cpu=on_cpu) * shape.hidden if shape.dropout else 0
    norm = 2 * FP32 * shape.hidden if shape.gated else FP32 * shape.hidden
    return mask + norm + compute * shape.hidden


def _mask(compute: int, *, on_cpu: bool) -> int:
    """Bytes of one element of a dropout mask: a bool on a GPU, a number on a CPU."""
    return compute if on_cpu else 1


def _framework(world_size: int, *, on_cpu: bool) -> int:
    if on_cpu:
        return CPU_FRAMEWORK
    return GPU_FRAMEWORK + (GPU_COMMUNICATION if world_size > 1 else 0)
