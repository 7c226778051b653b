"""What comes and goes within a step, in bytes on one rank: activations, logits, and autocast's copies.

The peak is at one of five moments, and the largest counts: where the loss is computed, with autocast still
holding a copy of every weight matrix; where the backward pass begins, with the logits' gradient being made;
or later, inside the last layer, inside the last that is checkpointed or, with the gradients of all others
there, inside the first. Left out: the allocator's fragmentation, and dense attention masks (padded or
isolated documents).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from launcher.plan.fast import chunk_rows, one_kernel
from launcher.plan.shape import Shape, weights_per_layer

FP32: Final = 4
"""Bytes of a weight, a gradient, a moment, and of everything autocast keeps in fp32."""

HALF: Final = 2
"""Bytes of bf16 and of fp16."""

BYTES_PER_LOGIT: Final = 12
"""Where backward begins: the loss's fp32 log-probabilities, their gradient, and the one it is made into."""

COMPILED_BYTES_PER_LOGIT: Final = 8
COMPILED_BYTES_PER_CHUNKED_LOGIT: Final = 5
KERNEL_BYTES_PER_CHUNKED_LOGIT: Final = 3
"""The same in half precision where torch.compile fuses what the loss is made of: of all logits, of a chunk's,
and of a chunk's where launcher's kernel makes it. Fitted on gpt2's rows in `docs/benchmarks/memory.md`."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a model computes in, in bytes: its matrix products, and its residual stream and weights.

    `compute` below `stream` is autocast, which casts weights and inputs for each product. Both half: the
    model itself is in half precision, as under DeepSpeed and FSDP, and nothing is cast.
    """

    compute: int
    stream: int

    @property
    def cast(self) -> bool:
        return self.compute < self.stream


@dataclass(frozen=True, slots=True)
class Passing:
    """Bytes of what comes and goes within a step, at one moment of it."""

    weight_copies: int
    activations: int
    logits_and_loss: int

    @property
    def total(self) -> int:
        return self.weight_copies + self.activations + self.logits_and_loss


@dataclass(frozen=True, slots=True)
class Moments:
    """The five moments that may be the peak; `first` is the first layer, to which backward comes last.

    `again` is the last layer that is computed again, where backward is over in `above` of all layers.
    """

    loss: Passing
    backward: Passing
    layer: Passing
    again: Passing
    first: Passing
    above: float


def checkpointed_layers(shape: Shape, asked: bool | int) -> int:
    """How many layers recompute what they keep for backward: none, all, or the first `asked` ones.

    Those whose activations backward needs last are the ones worth it: by then the others' are gone.
    """
    return shape.layers if asked is True else min(int(asked), shape.layers)


def moments(
    shape: Shape,
    numbers: Numbers,
    *,
    micro_batch: int,
    block_size: int,
    gradient_checkpointing: bool | int,
    chunked_loss: bool,
    compiled: bool,
    on_cpu: bool,
) -> Moments:
    """The loss, the start of backward, and inside three layers: `micro_batch` x `block_size`.

    `gradient_checkpointing`: of no layer, of all, or of so many, the first ones.

    Autocast casts each weight matrix once a forward pass and holds the copies until the pass is over;
    backward needs them too, except under checkpointing, where each layer casts its own again.
    """
    tokens = micro_batch * block_size
    layer = tokens * _layer(shape, numbers, block_size, on_cpu=on_cpu)
    inside = tokens * _gradients_inside(shape, numbers)
    ends = tokens * _ends(shape, numbers, on_cpu=on_cpu)
    each, head = (
        HALF * size if numbers.cast else 0 for size in (weights_per_layer(shape), shape.vocab * shape.hidden)
    )
    recomputed = checkpointed_layers(shape, gradient_checkpointing)
    whole = shape.layers - recomputed
    casts, cast_for_backward = shape.layers * each, whole * each
    # A checkpointed layer keeps its input alone, and all of it is computed again on the way back.
    inputs = recomputed * tokens * numbers.stream * shape.hidden
    kept = inputs + whole * layer
    loss = _chunked if chunked_loss else _whole
    at_loss, at_backward, at_layer = loss(shape, numbers, tokens, compiled=compiled, on_cpu=on_cpu)
    # By the time the layers' own gradients are made, the logits and what led to them are gone.
    again = Passing(each + (0 if whole else head), inputs + layer + inside, at_layer)
    return Moments(
        loss=Passing(casts + head, kept + ends, at_loss),
        backward=Passing(cast_for_backward + head, kept + ends, at_backward),
        layer=Passing(cast_for_backward + head, kept + inside, at_layer) if whole else again,
        again=again,
        first=Passing(each, layer + inside, at_layer),
        above=whole / shape.layers,
    )


def _whole(
    shape: Shape, numbers: Numbers, tokens: int, *, compiled: bool, on_cpu: bool
) -> tuple[int, int, int]:
    """Logits and loss of all tokens at once, at the loss, as backward begins, and in the layers."""
    logits = tokens * shape.vocab
    if compiled:
        return COMPILED_BYTES_PER_LOGIT * logits, COMPILED_BYTES_PER_LOGIT * logits, 0
    return _forward_bytes(numbers) * logits, BYTES_PER_LOGIT * logits, 0


def _chunked(
    shape: Shape, numbers: Numbers, tokens: int, *, compiled: bool, on_cpu: bool
) -> tuple[int, int, int]:
    """One chunk's logits, in half precision with their log-probabilities, beside the fp32 gradient of the
    head's weight.

    The head's input is there until its gradient is whole, which then stands where the stock loss keeps that
    input, as wide as the residual stream. Backward multiplies both gradients by the loss's own, into new
    tensors; and a tied weight's waits for the embedding's, which is last.
    """
    rows = min(tokens, chunk_rows(shape.vocab, on_cpu=on_cpu))
    head = shape.vocab * shape.hidden
    chunk = _chunk_bytes(shape, numbers, compiled=compiled, on_cpu=on_cpu) * rows * shape.vocab
    scaled = numbers.stream * head
    wide = numbers.stream * tokens * shape.hidden
    wider = wide - numbers.compute * tokens * shape.hidden
    return FP32 * head + chunk + wide + wider, 2 * scaled + wide + wider, scaled if shape.tied else 0


def _chunk_bytes(shape: Shape, numbers: Numbers, *, compiled: bool, on_cpu: bool) -> int:
    """Of a chunk's logit, where its loss is computed: in eager fp32 in its own place."""
    if numbers.compute == FP32:
        return 2 * FP32 if compiled else FP32
    if not compiled:
        return _forward_bytes(numbers)
    by_kernel = one_kernel(shape.vocab) and not on_cpu
    return KERNEL_BYTES_PER_CHUNKED_LOGIT if by_kernel else COMPILED_BYTES_PER_CHUNKED_LOGIT


def _forward_bytes(numbers: Numbers) -> int:
    """Of a logit where the loss is computed: as the product gives it, in fp32, and its log-probability."""
    return 2 * FP32 + (numbers.compute if numbers.compute == HALF else 0)


def _layer(shape: Shape, numbers: Numbers, block_size: int, *, on_cpu: bool) -> int:
    """Bytes that one layer keeps for backward, for each token.

    After Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
    section 4.1, with three changes. The residual stream stays fp32 under autocast. Attention does not
    keep its T x T weights but, for each head and token, their log-sum-exp (Dao et al. 2022,
    "FlashAttention"). What a kernel can derive from its output is not kept, as with a fused tanh GELU.
    """
    compute = numbers.compute
    attention = _attention(shape, numbers, block_size, on_cpu=on_cpu)
    if shape.gated:
        return attention + _rms_norms(shape, numbers) + _gated_projections(shape, numbers)
    masks = 2 * _mask(numbers, on_cpu=on_cpu) * shape.hidden if shape.dropout else 0
    layer_norms = 2 * (numbers.stream * shape.hidden + 2 * FP32)  # the input; mean and deviation
    inputs = 2 * compute * shape.hidden  # of the attention's and the MLP's first projection
    return attention + layer_norms + inputs + 2 * compute * shape.intermediate + masks


def _attention(shape: Shape, numbers: Numbers, block_size: int, *, on_cpu: bool) -> int:
    """Query, key, value and output; and what stands in for the attention weights."""
    compute = numbers.compute
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


def _rms_norms(shape: Shape, numbers: Numbers) -> int:
    """Two of them, as transformers computes them: the fp32 input, its scale, the normalised input."""
    return 2 * ((FP32 + numbers.stream) * shape.hidden + FP32)


def _gated_projections(shape: Shape, numbers: Numbers) -> int:
    """The projections' inputs, and the gate, its activation, the up projection and their product.

    Query, key and value share an input, and so do gate and up; but autocast casts it for each of them.
    """
    inputs = 5 if numbers.cast else 2
    return numbers.compute * (inputs * shape.hidden + 4 * shape.intermediate)


def _gradients_inside(shape: Shape, numbers: Numbers) -> int:
    """Bytes for each token at most alive inside one layer's backward: the MLP's and the residual stream's."""
    mlp = (2 if shape.gated else 1) * numbers.compute * shape.intermediate
    return mlp + numbers.stream * shape.hidden


def _ends(shape: Shape, numbers: Numbers, *, on_cpu: bool) -> int:
    """Bytes for each token outside the layers: the embedding's dropout, the last norm, the head's input."""
    mask = _mask(numbers, on_cpu=on_cpu) * shape.hidden if shape.dropout else 0
    norm = (FP32 if shape.gated else 0) + numbers.stream
    return mask + (norm + numbers.compute) * shape.hidden


def _mask(numbers: Numbers, *, on_cpu: bool) -> int:
    """Bytes of one element of a dropout mask: a bool on a GPU, a number on a CPU."""
    return numbers.compute if on_cpu else 1
