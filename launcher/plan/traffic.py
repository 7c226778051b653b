"""Bytes that the kernels of a training step move besides the matrix products, for each way to run a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from launcher.plan.activations import FP32, Numbers
from launcher.plan.fast import chunk_rows
from launcher.plan.shape import Shape


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer's element-wise kernels read and write for a token: bytes for each element of a width.

    `heads` goes with the query and key heads together, `dropout` with the hidden width where there is
    dropout. `kernels` counts every kernel of the layer, the matrix products too.
    """

    hidden: int
    heads: int
    intermediate: int
    dropout: int
    kernels: int

    def bytes_per_token(self, shape: Shape) -> int:
        hidden = self.hidden + (self.dropout if shape.dropout else 0)
        heads = self.heads * (shape.queries + shape.keys)
        return hidden * shape.hidden + heads + self.intermediate * shape.intermediate


@dataclass(frozen=True, slots=True)
class Stack:
    """A way to run a model: a layer's forward and backward pass, and what checkpointing runs `again`.

    `logit` is in bytes for each logit, between the output layer's product and its gradient; `weight` in
    bytes for each parameter and micro-batch: to cast it, to cast its gradient back and to add that up.
    `bandwidth_share` is the share of the memory's bandwidth that its kernels reach.
    """

    layer: Layer
    again: Layer
    logit: float
    weight: int
    bandwidth_share: float


BANDWIDTH_SHARE: Final = 0.5
"""PyTorch's element-wise kernels, launches included. Fitted: `docs/benchmarks/speed.md`."""

_EAGER_HALF: Final[Mapping[str, Stack]] = {
    "gpt2": Stack(Layer(142, 0, 12, 20, 67), Layer(38, 0, 4, 10, 21), 42, 24, BANDWIDTH_SHARE),
    "llama": Stack(Layer(400, 94, 28, 0, 144), Layer(96, 36, 10, 0, 46), 42, 24, BANDWIDTH_SHARE),
    "qwen2": Stack(Layer(400, 97, 28, 0, 156), Layer(96, 36, 10, 0, 49), 42, 24, BANDWIDTH_SHARE),
    "qwen3": Stack(Layer(400, 263, 28, 0, 192), Layer(96, 84, 10, 0, 62), 42, 24, BANDWIDTH_SHARE),
}
_EAGER_PURE_HALF: Final[Mapping[str, Stack]] = {
    "gpt2": Stack(Layer(66, 0, 12, 20, 45), Layer(14, 0, 4, 10, 11), 36, 14, BANDWIDTH_SHARE),
    "llama": Stack(Layer(306, 52, 28, 0, 118), Layer(78, 20, 10, 0, 36), 36, 14, BANDWIDTH_SHARE),
    "qwen2": Stack(Layer(306, 54, 28, 0, 124), Layer(78, 20, 10, 0, 36), 36, 14, BANDWIDTH_SHARE),
    "qwen3": Stack(Layer(306, 184, 28, 0, 168), Layer(78, 56, 10, 0, 52), 36, 14, BANDWIDTH_SHARE),
}
"""The model itself in half precision, as under DeepSpeed and FSDP. A weight's 14 bytes: its gradient copied
to a bucket (2 + 2), and the sum added to what is accumulated in fp32 (2 + 4 + 4)."""

_EAGER_FP32: Final[Mapping[str, Stack]] = {
    "gpt2": Stack(Layer(132, 0, 24, 36, 45), Layer(28, 0, 8, 18, 11), 24, 12, BANDWIDTH_SHARE),
    "llama": Stack(Layer(332, 104, 56, 0, 110), Layer(68, 40, 20, 0, 32), 24, 12, BANDWIDTH_SHARE),
    "qwen2": Stack(Layer(332, 110, 56, 0, 116), Layer(68, 40, 20, 0, 32), 24, 12, BANDWIDTH_SHARE),
    "qwen3": Stack(Layer(332, 229, 56, 0, 152), Layer(68, 68, 20, 0, 44), 24, 12, BANDWIDTH_SHARE),
}
"""Eager PyTorch, as launcher runs it: the reads and writes of the operators that `tests/plan/trace.py` sees,
which a test counts again. Under autocast, 6 bytes of each logit are accelerate's own copy to fp32."""

_COMPILED_HALF: Final[Mapping[str, Stack]] = {
    "gpt2": Stack(Layer(78, 0, 12, 4, 56), Layer(24, 0, 4, 2, 8), 14, 24, BANDWIDTH_SHARE),
    "llama": Stack(Layer(62, 8, 16, 0, 36), Layer(24, 4, 6, 0, 10), 14, 24, BANDWIDTH_SHARE),
}
_COMPILED_FP32: Final[Mapping[str, Stack]] = {
    "gpt2": Stack(Layer(108, 0, 24, 4, 30), Layer(32, 0, 8, 2, 8), 16, 12, BANDWIDTH_SHARE),
    "llama": Stack(Layer(84, 16, 32, 0, 36), Layer(32, 8, 12, 0, 10), 16, 12, BANDWIDTH_SHARE),
}
"""torch.compile: counted by hand, as if every chain of element-wise operators became one kernel that reads
its inputs and writes its outputs once. The biases' gradients stay kernels of their own. The 56 kernels of
gpt2 in half precision are those of a profile on an H200, where 30 were counted by hand: the others' are more
than is said here too, most likely."""


_CHUNKED: Final[Mapping[tuple[bool, bool], tuple[int, int]]] = {
    (False, False): (20, 10),
    (False, True): (16, 0),
    (True, False): (6, 10),
    (True, True): (12, 0),
}
"""The chunked loss, compiled or not, in fp32 or not: bytes for each logit, and for each weight of the head
and each chunk, whose part of the gradient is added up in fp32 (in fp32 by the product itself). Eager, a test
counts them again. Compiled, by hand: the logits are read for their sum, and again for the gradient."""


def stack_of(
    shape: Shape, numbers: Numbers, *, compiled: bool, by_layer: bool = False, chunked_loss: bool = False
) -> Stack:
    """How launcher runs `shape` in `numbers`, eagerly or compiled, with the stock loss or the chunked one.

    `by_layer`: compiled, but for the loss. Compiled and in half precision throughout, it is taken for
    autocast, which moves a little more.
    """
    whole = numbers.compute == FP32
    eager = _EAGER_FP32 if whole else _EAGER_HALF if numbers.cast else _EAGER_PURE_HALF
    stack = eager["llama" if shape.model_type == "mistral" else shape.model_type]
    if compiled:
        layers = (_COMPILED_FP32 if whole else _COMPILED_HALF)["llama" if shape.gated else "gpt2"]
        stack = replace(layers, logit=stack.logit) if by_layer else layers
    if not chunked_loss:
        return stack
    logit, added = _CHUNKED[compiled, whole]
    return replace(stack, logit=logit + added * shape.hidden / chunk_rows(shape.vocab, on_cpu=False))
