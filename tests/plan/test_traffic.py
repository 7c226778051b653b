"""The counted bytes and kernels against those of the operators that a traced step runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest

from launcher.plan.activations import Numbers
from launcher.plan.fast import chunk_rows
from launcher.plan.shape import shape_of
from launcher.plan.traffic import stack_of
from tests.plan.trace import Trace, trace

BLOCK_SIZE = 512
GPT2: Mapping[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 512,
    "n_head": 8,
    "n_inner": 1024,
    "vocab_size": 50257,
    "n_positions": 512,
}
STILL: Mapping[str, Any] = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1408,
    "vocab_size": 50257,
    "tie_word_embeddings": True,
}
each_model = pytest.mark.parametrize(
    "fields",
    [GPT2, {**GPT2, **STILL}, LLAMA, {**LLAMA, "model_type": "qwen2"}, {**LLAMA, "model_type": "qwen3"}],
    ids=["gpt2", "gpt2-no-dropout", "llama", "qwen2", "qwen3"],
)
NUMBERS: Mapping[str, Numbers] = {
    "bf16": Numbers(2, 4),
    "pure bf16": Numbers(2, 2),
    "fp32": Numbers(4, 4),
}
each_precision = pytest.mark.parametrize("precision", NUMBERS)


def traces(fields: Mapping[str, Any], layers: int, precision: str, checkpointing: bool) -> list[Trace]:
    """Passes with 2 and with 6 blocks."""
    name = "n_layer" if fields["model_type"] == "gpt2" else "num_hidden_layers"
    return _traces(tuple({**fields, name: layers}.items()), precision, checkpointing)


@cache
def _traces(fields: tuple[tuple[str, Any], ...], precision: str, checkpointing: bool) -> list[Trace]:
    return list(
        trace(dict(fields), (2, 6), block_size=BLOCK_SIZE, precision=precision, checkpointing=checkpointing)
    )


def test_the_chunked_loss_moves_what_is_counted_for_logits_and_for_each_chunk() -> None:
    for precision in NUMBERS:
        fields = [{**GPT2, "n_layer": 1, "vocab_size": vocabulary} for vocabulary in (50257, 1000)]
        whole, smaller = (chunked(each, precision, 3072) for each in fields)
        three = chunked(fields[0], precision, 1024)
        rows = chunk_rows(50257, on_cpu=False)
        shape = shape_of(fields[0])
        assert shape is not None
        stack = stack_of(shape, NUMBERS[precision], compiled=False, chunked_loss=True)
        for_each_logit = (per_token(*whole) - per_token(*smaller)) / (50257 - 1000)
        for_each_chunk = (three[1].elementwise - whole[1].elementwise) / (2 * 50257 * 512)
        assert stack.logit == pytest.approx(for_each_logit + for_each_chunk * 512 / rows, rel=0.01)


def chunked(fields: Mapping[str, Any], precision: str, rows: int) -> list[Trace]:
    """Passes with 2 and with 6 blocks, the loss of so many tokens at a time."""
    with patch("tests.plan.trace.chunk_rows", lambda *_, **__: rows):
        return list(
            trace(
                fields,
                (2, 6),
                block_size=BLOCK_SIZE,
                precision=precision,
                checkpointing=False,
                chunked_loss=True,
            )
        )


def per_token(few: Trace, many: Trace) -> float:
    return (many.elementwise - few.elementwise) / (4 * BLOCK_SIZE)


@each_precision
@each_model
def test_a_layer_moves_what_is_counted(fields: Mapping[str, Any], precision: str) -> None:
    shape = shape_of(fields)
    assert shape is not None
    stack = stack_of(shape, NUMBERS[precision], compiled=False)
    once = stack.layer.bytes_per_token(shape)
    for checkpointing, counted, kernels in (
        (False, once, stack.layer.kernels),
        (True, once + stack.again.bytes_per_token(shape), stack.layer.kernels + stack.again.kernels),
    ):
        two, four = (traces(fields, layers, precision, checkpointing) for layers in (2, 4))
        assert counted == pytest.approx((per_token(*four) - per_token(*two)) / 2, rel=0.01)
        # Without dropout there are four kernels less, and a checkpointed layer stops before its last product.
        assert kernels == pytest.approx((four[1].kernels - two[1].kernels) / 2, abs=7)


@each_precision
@pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_logits_and_weights_move_what_is_counted(fields: Mapping[str, Any], precision: str) -> None:
    shape = shape_of(fields)
    assert shape is not None
    stack = stack_of(shape, NUMBERS[precision], compiled=False)
    few, many = traces(fields, 2, precision, False)
    smaller = traces({**fields, "vocab_size": 1000}, 2, precision, False)
    vocabulary = shape.vocab - 1000
    copied_by_accelerate = 6 if precision == "bf16" else 0
    traced = (per_token(few, many) - per_token(*smaller)) / vocabulary + copied_by_accelerate
    assert stack.logit == pytest.approx(traced, rel=0.01)
    deeper = traces(fields, 4, precision, False)
    fixed = [one[0].elementwise - per_token(*one) * 2 * BLOCK_SIZE for one in ([few, many], deeper)]
    weights = 2 * (shape.hidden * (2 * shape.queries + 2 * shape.keys))
    weights += 2 * (3 if shape.gated else 2) * shape.hidden * shape.intermediate
    if precision == "pure bf16":
        return  # A gradient goes into DeepSpeed's buckets then, which no trace of the model alone has.
    # The biases, norms and rotary tables are not counted.
    assert stack.weight == pytest.approx((fixed[1] - fixed[0]) / weights, rel=0.03)


def test_compiling_moves_less() -> None:
    for fields in (GPT2, LLAMA):
        shape = shape_of(fields)
        assert shape is not None
        for numbers in (NUMBERS["bf16"], NUMBERS["fp32"]):
            eager, compiled = (stack_of(shape, numbers, compiled=on) for on in (False, True))
            assert compiled.layer.bytes_per_token(shape) < eager.layer.bytes_per_token(shape)
            assert compiled.again.bytes_per_token(shape) < eager.again.bytes_per_token(shape)
            assert compiled.logit < eager.logit
            layers = stack_of(shape, numbers, compiled=True, by_layer=True)
            assert (layers.layer, layers.logit) == (compiled.layer, eager.logit)
