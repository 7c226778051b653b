"""Two copies of a small model, one of them made fast, and how far their losses and gradients are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from launcher.plan.fast import Fast
from launcher.worker.collate import IGNORED, Isolate, PadToLongest, stack
from launcher.worker.fast import make_fast

VOCABULARY, LENGTH, ROWS, END = 97, 32, 4, 96
STILL: Mapping[str, float] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NOTHING = Fast()
ALL = Fast(tanh_gelu=True, causal_attention=True, chunked_loss=True, padded_vocabulary=True, fused_adamw=True)


def gpt2(**fields: Any) -> GPT2LMHeadModel:
    """Tied, with dropout unless `fields` say otherwise."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=40, n_layer=2, n_head=2,
            pad_token_id=END, eos_token_id=END, bos_token_id=END, **fields,
        )
    )  # fmt: skip


def llama(**fields: Any) -> LlamaForCausalLM:
    """Its head is its own, two query heads share a key head; with dropout unless `fields` say otherwise."""
    fields = {"attention_dropout": 0.2, **fields}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
            pad_token_id=END, eos_token_id=END, bos_token_id=END, **fields,
        )
    )  # fmt: skip


def mistral() -> MistralForCausalLM:
    """It attends to the last eight tokens."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, sliding_window=8,
        )
    )  # fmt: skip


def phi() -> PhiForCausalLM:
    """Its head has a bias."""
    config = PhiConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=LENGTH,
        pad_token_id=END, eos_token_id=END, bos_token_id=END,
        resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def opt() -> OPTForCausalLM:
    """Its head is given the output of a decoder within its body. Without biases: the keys' moves nothing."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=LENGTH, word_embed_proj_dim=32, dropout=0.0, enable_bias=False,
            pad_token_id=END, eos_token_id=END, bos_token_id=END,
        )
    )  # fmt: skip


class Head(torch.nn.Sequential):
    """Linear, but not only."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__(inner, torch.nn.Tanh())
        self.weight = inner.weight


def another_head(model: PreTrainedModel) -> PreTrainedModel:
    model.lm_head = Head(model.lm_head)
    return model


def made(build: Callable[[], PreTrainedModel], fast: Fast) -> tuple[PreTrainedModel, dict[str, str]]:
    """The same weights each time, in training mode; and what fell back."""
    torch.manual_seed(0)
    model = build()
    model.loss_type = "ForCausalLM"
    model.config.use_cache = False  # as the Trainer does
    fell_back = make_fast(model, fast, block_size=LENGTH)
    return model.train(), fell_back


def batches() -> Mapping[str, dict[str, Any]]:
    """The same text packed as launcher packs it: whole blocks, padded rows, isolated documents."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, END, (LENGTH,), generator=draw).numpy() for _ in range(ROWS)]
    for row, place in zip(rows, (5, 11, 17, 23), strict=True):
        row[place] = END
    return {
        "concat": stack(rows),
        "pad": PadToLongest(END)([row[: len(row) - 3 * n] for n, row in enumerate(rows)]),
        "isolated": Isolate(END, END)(rows),
    }


@dataclass(frozen=True)
class Pass:
    """A loss, and every gradient of it by the parameter's name, without what pads a vocabulary."""

    loss: float
    gradients: dict[str, torch.Tensor]

    def apart(self, other: Pass) -> float:
        """The largest distance of a gradient from the other's, as a part of the other's size."""
        assert self.gradients.keys() == other.gradients.keys()
        return max(
            float((self.gradients[name] - theirs).norm() / theirs.norm().clamp_min(1e-12))
            for name, theirs in other.gradients.items()
        )


def backward(model: PreTrainedModel, loss: torch.Tensor) -> Pass:
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if parameter.shape[0] == 128:  # of which rows from VOCABULARY on are padding
            assert not parameter.grad[VOCABULARY:].any()
            gradients[name] = parameter.grad[:VOCABULARY]
        else:
            gradients[name] = parameter.grad
    return Pass(float(loss.detach()), gradients)


def run(model: PreTrainedModel, batch: Mapping[str, Any], *, bf16: bool = False, items: Any = None) -> Pass:
    """The model's own loss, with the random numbers that dropout draws always the same."""
    torch.manual_seed(5)
    more = {} if items is None else {"num_items_in_batch": items}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = model(**batch, **more).loss
    return backward(model, loss)


def reference(
    model: PreTrainedModel, batch: Mapping[str, Any], *, bf16: bool = False, items: Any = None
) -> Pass:
    """The same by hand: all logits in fp32, each compared with the token after it."""
    torch.manual_seed(5)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(**inputs, use_cache=False).logits.float()[:, :-1].flatten(0, 1)
    following = batch["labels"][:, 1:].flatten()
    total = functional.cross_entropy(logits, following, ignore_index=IGNORED, reduction="sum")
    count = following.ne(IGNORED).sum() if items is None else items
    return backward(model, total / count)
