"""A step's loss and gradients do not hang on how it is cut up, whatever makes the model's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from launcher.worker.fast import taken_by
from launcher.worker.loss_share import share_loss
from tests.worker.parity import gpt2, llama

IDS = (torch.arange(4 * 16).reshape(4, 16) * 37) % 64
LABELS = IDS.masked_fill(torch.arange(16) >= torch.tensor([16, 9, 16, 1])[:, None], -100)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def mixtral(weight: float) -> PreTrainedModel:
    routed = {"output_router_logits": True, "router_aux_loss_coef": weight, "num_local_experts": 4}
    return built("mixtral", **SMALL, **routed, intermediate_size=64, num_key_value_heads=2)


def built(kind: str, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


class OwnMean(GPT2LMHeadModel):
    """A model of one's own that never heard of other micro-batches."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def own_mean() -> PreTrainedModel:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return OwnMean(GPT2Config(**shape, **dropout, bos_token_id=0, eos_token_id=0))


def step(model: PreTrainedModel, micro_batch: int) -> tuple[float, list[torch.Tensor]]:
    """A step's loss and gradients, so many rows at a time."""
    model.zero_grad()
    items, total = LABELS[:, 1:].ne(-100).sum(), 0.0
    for first in range(0, len(IDS), micro_batch):
        rows = slice(first, first + micro_batch)
        loss = model(input_ids=IDS[rows], labels=LABELS[rows], num_items_in_batch=items).loss
        loss.backward()
        total += float(loss.detach())
    return total, [each.grad.clone() for each in model.parameters() if each.grad is not None]


def of_next(model: PreTrainedModel) -> float:
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    return float(functional.cross_entropy(logits[:, :-1].reshape(-1, 64), LABELS[:, 1:].reshape(-1)))


def test_a_mean_of_its_own_is_the_steps_however_it_is_cut(tmp_path: Any) -> None:
    model = own_mean().train()
    said = share_loss(model, block_size=16)
    assert said is not None
    assert "by its share of the step's labels" in said
    whole, gradients = step(model, 4)
    assert whole == pytest.approx(of_next(model), rel=1e-6)
    for micro_batch in (1, 2):  # one row has no label at all
        cut, same = step(model, micro_batch)
        assert cut == pytest.approx(whole, rel=1e-5)
        assert len(same) == len(gradients)
        for one, other in zip(same, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert Trainer(model, arguments).model_accepts_loss_kwargs, "or it would divide by the micro-batches too"


@pytest.mark.parametrize("weight", [0.5, 1e-4], ids=["large", "as small as rounding"])
def test_a_router_s_loss_is_a_mean_too_and_no_part_of_an_evaluation(weight: float) -> None:
    model = mixtral(weight).train()
    items = LABELS[:, 1:].ne(-100).sum(-1)
    alone = [model(input_ids=ids[None], labels=ids[None]) for ids in IDS]
    routed = [weight * float(each.aux_loss.detach()) for each in alone]
    expected = sum(extra * int(count) for extra, count in zip(routed, items, strict=True)) / int(items.sum())
    before, _ = step(model, 1)
    assert before == pytest.approx(of_next(model) + sum(routed), rel=1e-4), "as many times as there are parts"
    assert share_loss(model, block_size=16) is not None
    cut, _ = step(model, 1)
    assert cut == pytest.approx(of_next(model) + expected, rel=1e-4)
    model.eval()
    with torch.no_grad():
        told = model(input_ids=IDS, labels=LABELS).loss
    assert float(told) == pytest.approx(of_next(model), rel=1e-5)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_stock_loss_is_left_as_it_is(make: Any) -> None:
    model = make()
    before = model.forward
    assert share_loss(model, block_size=16) is None
    assert model.forward == before


def test_it_is_no_fast_path() -> None:
    model = own_mean()
    before = taken_by(model)
    share_loss(model, block_size=16)
    assert taken_by(model) == before
