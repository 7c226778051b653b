"""What a model must be to be trained on the next token, whatever its attention runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from launcher.errors import RequestError
from launcher.plan.fast import Fast
from launcher.worker.fast import make_fast
from launcher.worker.probe import check_predicts_next, on_trial
from tests.worker.parity import LENGTH, gpt2, llama, mistral

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def built(kind: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


def bert(**fields: Any) -> PreTrainedModel:
    return built("bert", **SMALL, intermediate_size=64, **fields)


def bart(encoder_layers: int) -> PreTrainedModel:
    shape = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    fields = {"vocab_size": 64, "max_position_embeddings": 64, "is_encoder_decoder": False, **shape}
    return built("bart", encoder_layers=encoder_layers, **fields)


@pytest.mark.parametrize("make", [gpt2, llama, mistral, lambda: bert(is_decoder=True)])
def test_a_causal_model_passes_and_is_left_as_it_was(make: Callable[[], PreTrainedModel]) -> None:
    model = make().train()
    before = model.config.to_dict()
    check_predicts_next(model, LENGTH)
    assert model.training
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("make", "why", "hint"),
    [
        (bert, "BertLMHeadModel sees the tokens that follow", "set model.overrides.is_decoder: true"),
        (lambda: bart(2), "BartForCausalLM compares each token with itself", "such as gpt2"),
        # With a cache it would not run at all: that looks for as many layers as the encoder has.
        (lambda: bart(1), "BartForCausalLM compares each token with itself", "such as gpt2"),
        (
            lambda: built("gptj", **SMALL, rotary_dim=64),
            "GPTJForCausalLM does not run with input_ids and labels alone: ",
            "check model.name and model.overrides",
        ),
    ],
    ids=["both ways", "itself", "itself, with a cache", "broken"],
)
def test_another_model_is_refused(make: Callable[[], PreTrainedModel], why: str, hint: str) -> None:
    with pytest.raises(RequestError, match=why) as refused:
        check_predicts_next(make(), LENGTH)
    assert hint in (refused.value.hint or "")


def test_a_model_with_flash_attention_is_tried_on_the_cpu_with_another(one_thread: None) -> None:
    """Not installed here, it runs nowhere: that the model runs shows that it was not asked."""
    model = gpt2()
    model.loss_type = "ForCausalLM"
    model.config._attn_implementation = "flash_attention_2"
    check_predicts_next(model, LENGTH)
    assert make_fast(model, Fast(chunked_loss=True), block_size=LENGTH) == {}
    assert model.config._attn_implementation == "flash_attention_2"
    with on_trial(model):
        assert model.config._attn_implementation == "sdpa"
