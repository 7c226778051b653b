"""Rows that pad a vocabulary: nothing but the matrix product sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from launcher.worker import saving
from launcher.worker.vocabulary import is_padded, pad_vocabulary, plain_head, real_columns, take_out_padding
from tests.worker.parity import VOCABULARY, another_head, batches, gpt2, llama, phi

MODELS = pytest.mark.parametrize("build", [gpt2, llama, phi], ids=["tied", "untied", "with a bias"])


def seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build()
    model.loss_type = "ForCausalLM"
    return model


@MODELS
def test_the_real_rows_are_those_of_the_seed_and_the_rest_is_zero(
    build: Callable[[], PreTrainedModel],
) -> None:
    model, stock = seeded(build), seeded(build)
    assert pad_vocabulary(model) is None
    head, table = plain_head(model), model.get_input_embeddings()
    assert head is not None
    assert (head.out_features, head.weight.shape[0], real_columns(head)) == (128, 128, VOCABULARY)
    tied = build is gpt2
    assert (head.weight is table.weight) == tied
    assert table.num_embeddings == (128 if tied else VOCABULARY), "an input table alone gains nothing"
    for name, parameter in model.named_parameters():
        theirs = stock.get_parameter(name)
        assert torch.equal(parameter[: theirs.shape[0]], theirs), name
        assert not parameter[theirs.shape[0] :].any(), name
    assert model.config.vocab_size == VOCABULARY


@MODELS
def test_the_padding_stays_zero_as_it_is_trained(build: Callable[[], PreTrainedModel]) -> None:
    model = seeded(build)
    pad_vocabulary(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(**batches()["concat"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    head = plain_head(model)
    assert head is not None
    assert head.weight[:VOCABULARY].any()
    assert not any(parameter[VOCABULARY:].any() for parameter in head.parameters())


@MODELS
def test_a_checkpoint_of_it_becomes_the_stock_model(
    build: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = seeded(build)
    pad_vocabulary(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "checkpoint")
    again = seeded(build)
    pad_vocabulary(again)
    saving.load_weights(again, tmp_path / "checkpoint")
    take_out_padding(again)
    again.save_pretrained(tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert saved.get_output_embeddings().weight.shape[0] == VOCABULARY
    ids = batches()["concat"]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_what_cannot_or_need_not_be_padded_is_left_alone() -> None:
    even = gpt2()
    even.resize_token_embeddings(128)
    assert pad_vocabulary(even) == "128 is a multiple of 64"
    odd = another_head(gpt2())
    assert pad_vocabulary(odd) == "the model has no plain linear head"
    for model in (even, odd):
        assert not is_padded(model)
        take_out_padding(model)
