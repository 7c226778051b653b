"""What a training step allocates and moves, traced on tensors without data and with a GPU's operators.

The closed forms of `plan/memory.py` and `plan/traffic.py` are held against this. A fake CUDA device needs a
CUDA build of PyTorch, so the tensors are fake CPU ones and the operators that a CPU runs otherwise are
swapped: attention is the flash kernel, dropout one kernel with a boolean mask.

    python -m tests.plan.trace      the table in docs/concepts/memory.md
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from launcher.config.presets import PRESETS
from launcher.plan.activations import FP32, HALF, Numbers, moments
from launcher.plan.fast import chunk_rows, padded
from launcher.plan.shape import shape_of
from launcher.worker.chunked_loss import give_chunked_loss
from launcher.worker.fast import use_tanh_gelu_kernel
from launcher.worker.recomputing import recompute

PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm"})
ATTENTION = frozenset({"_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"})
READS_FEW = frozenset(
    {"embedding", "embedding_dense_backward", "nll_loss_forward", "nll_loss_backward", "gather"}
)
"""Operators that are given a table and read a row of it for each token, or none: only writes count."""
WRITES_ONLY = frozenset({"exp"})
"""Operators that are given, here, what they write to."""

LLAMA_1B: Mapping[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""The shape of Llama 3.2 1B, with shorter positions."""

MODELS: Mapping[str, Mapping[str, Any]] = {
    **{name: preset.config() for name, preset in PRESETS.items()},
    "llama": LLAMA_1B,
}
TRACED = (*((name, "chunked") for name in MODELS), ("gpt2", "stock"), ("llama", "stock"))
"""Models, each with how its loss is computed."""

HALF_OF: Mapping[tuple[str, str], tuple[int, ...]] = {("gpt2", "chunked"): (6,), ("llama", "chunked"): (8,)}
"""Those that are traced with half of their layers checkpointed too."""

PRECISIONS = ("bf16", "pure bf16")
SIZES = (1, 4, 16)
"""Micro-batches that the memory of each model is traced with."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward and backward pass: bytes at most allocated beside weights and gradients, bytes that the
    matrix products and the element-wise operators read and write, and operators that run a kernel."""

    peak: int
    products: int
    elementwise: int
    kernels: int


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.products = self.elementwise = self.kernels = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given, results = _tensors((args, kwargs)), _tensors(made)
        owned = {_key(tensor) for tensor in given}
        new = [tensor for tensor in results if _key(tensor) not in owned]
        for tensor in new:
            self._allocate(tensor)
        if new or function._schema.is_mutable:
            self._count(function._schema.name.removeprefix("aten::"), given, results)
        return made

    def _count(self, name: str, given: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        moved = sum(tensor.nbytes for tensor in results)
        if name not in READS_FEW:
            written = {_key(tensor) for tensor in results} if name in WRITES_ONLY else set()
            read = {id(tensor): tensor for tensor in given if _key(tensor) not in written}
            moved += sum(tensor.nbytes for tensor in read.values())  # once, if it is also what is written to
        self.kernels += 1
        if name == "scatter_":
            return  # one element in a row
        if name in PRODUCTS:
            self.products += moved
        elif name not in ATTENTION:
            self.elementwise += moved

    def _allocate(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._alive.pop(key)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _flash(query: Any, key: Any, value: Any, *, dropout_p: float, is_causal: bool, **how: Any) -> Any:
    """Causal attention as a GPU runs it; autocast would cast its inputs, and does not see this function."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, dropout_p, is_causal, scale=how["scale"])[0]


def _dropout(
    input: Any,  # noqa: A002 - torch's name
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Any:
    return torch.ops.aten.native_dropout(input, p, training)[0] if training and p > 0 else input


def build(
    fields: Mapping[str, Any],
    checkpointing: bool | int,
    dtype: torch.dtype = torch.float32,
    *,
    chunked_loss: bool = False,
) -> PreTrainedModel:
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields["model_type"], **rest), dtype=dtype
    )
    model.loss_type = "ForCausalLM"
    model.train()
    use_tanh_gelu_kernel(model)
    if chunked_loss:
        give_chunked_loss(model)
    recompute(model, checkpointing)
    return model


def trace(
    fields: Mapping[str, Any],
    micro_batches: Sequence[int],
    *,
    block_size: int,
    checkpointing: bool | int,
    precision: str = "bf16",
    chunked_loss: bool = False,
) -> Iterator[Trace]:
    """A pass with each of `micro_batches` through the model of these config `fields`.

    `precision` is fp32, bf16 (autocast), or pure bf16, where the model itself is in half precision.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for name, instead in (
            ("torch.nn.functional.scaled_dot_product_attention", _flash),
            ("torch.nn.functional.dropout", _dropout),
            # Under a tracer transformers always makes a mask; without data it cannot look for packed rows.
            ("transformers.masking_utils.is_tracing", lambda *_: False),
            (
                "launcher.worker.chunked_loss.chunk_rows",
                lambda vocabulary, **_: chunk_rows(vocabulary, on_cpu=False),
            ),
            ("transformers.masking_utils.find_packed_sequence_indices", lambda _: None),
        ):
            stack.enter_context(patch(name, instead))
        dtype = torch.bfloat16 if precision == "pure bf16" else torch.float32
        model = build(fields, checkpointing, dtype, chunked_loss=chunked_loss)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for micro_batch in micro_batches:
            ids = torch.zeros(micro_batch, block_size, dtype=torch.long)
            with _Watch() as watch:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
            del loss
            yield Trace(watch.peak, watch.products, watch.elementwise, watch.kernels)


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes at most allocated beside weights and gradients: traced, and as the memory model has it."""

    model: str
    loss: str
    precision: str
    checkpointing: bool | int
    micro_batch: int
    traced: int
    planned: int

    @property
    def line(self) -> str:
        """Its row in docs/concepts/memory.md."""
        checkpointing = f"first {self.checkpointing}"
        if isinstance(self.checkpointing, bool):
            checkpointing = "on" if self.checkpointing else "off"
        return (
            f"| {self.model} | {self.loss} | {self.precision} | {checkpointing}"
            f" | {self.micro_batch} | {self.traced / 2**30:.2f} | {self.planned / 2**30:.2f}"
            f" | {self.planned / self.traced - 1:+.1%} |"
        )


def peaks(model: str, loss: str, precision: str, checkpointing: bool | int) -> Iterator[Peak]:
    """For each of SIZES, in blocks of 1024 tokens, under autocast (bf16) or with a model in pure bf16.

    `loss` is chunked, with the vocabulary padded, or stock, with the vocabulary as it is.
    """
    chunked = loss == "chunked"
    fields = {**MODELS[model]}
    if chunked:
        fields["vocab_size"] = padded(fields["vocab_size"])
    shape = shape_of(fields)
    assert shape is not None
    traces = trace(
        fields,
        SIZES,
        block_size=1024,
        checkpointing=checkpointing,
        precision=precision,
        chunked_loss=chunked,
    )
    numbers = Numbers(HALF, FP32 if precision == "bf16" else HALF)
    for micro_batch, traced in zip(SIZES, traces, strict=True):
        found = moments(
            shape,
            numbers,
            micro_batch=micro_batch,
            block_size=1024,
            gradient_checkpointing=checkpointing,
            chunked_loss=chunked,
            compiled=False,
            on_cpu=False,
        )
        passing = max(moment.total for moment in (found.loss, found.backward, found.layer, found.again))
        yield Peak(model, loss, precision, checkpointing, micro_batch, traced.peak, passing)


if __name__ == "__main__":
    for name, loss in TRACED:
        for precision in PRECISIONS:
            for on in (False, *HALF_OF.get((name, loss), ()), True):
                sys.stdout.writelines(f"{peak.line}\n" for peak in peaks(name, loss, precision, on))
