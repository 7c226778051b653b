"""As many layers as were asked for are computed again, and the gradients are the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from launcher.errors import RequestError
from launcher.worker.recomputing import as_compared, layers_of, recompute, recomputed
from tests.worker.parity import ALL, NOTHING, batches, gpt2, llama, made, phi, run

each_model = pytest.mark.parametrize("build", [gpt2, llama])


def passes_through(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[list[int], Any]:
    """How often each layer's attention runs in one forward and backward pass, and what the pass gives."""
    attentions = [
        module for name, module in model.named_modules() if name.rpartition(".")[2] in ("attn", "self_attn")
    ]
    counts = [0] * len(attentions)

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    handles = [each.register_forward_hook(count(index)) for index, each in enumerate(attentions)]
    torch.manual_seed(5)
    found = run(model.train(), batch)
    for handle in handles:
        handle.remove()
    return counts, found


@each_model
@pytest.mark.parametrize(
    ("layers", "expected", "said"),
    [
        (False, [1, 1], False),
        (1, [2, 1], "of the first 1"),
        (2, [2, 2], True),
        (True, [2, 2], True),
    ],
)
def test_the_first_layers_compute_again_and_gradients_are_the_same(
    build: Callable[[], PreTrainedModel], layers: bool | int, expected: list[int], said: bool | str
) -> None:
    batch = batches()["concat"]
    for fast in (NOTHING, ALL):
        model, plain = made(build, fast)[0], made(build, fast)[0]
        recompute(model, layers)
        assert recomputed(model.train()) == said
        assert recomputed(model.eval()) is False
        counts, found = passes_through(model, batch)
        assert counts == expected
        _, stock = passes_through(plain, batch)
        assert found.loss == stock.loss
        assert found.apart(stock) == 0.0


def test_a_layer_that_is_not_among_the_first_is_seen() -> None:
    model = gpt2().train()
    recompute(model, 1)
    first, second = model.transformer.h
    first.gradient_checkpointing, second.gradient_checkpointing = False, True
    assert recomputed(model) == "in some layers"
    assert as_compared(True, of=2) != as_compared(1, of=2), "all of the layers are not one of them"


@pytest.mark.parametrize(("build", "layers"), [(phi, 1), (gpt2, 1), (gpt2, 2)])
def test_so_many_as_were_asked_for_is_what_verification_finds(
    build: Callable[[], PreTrainedModel], layers: int
) -> None:
    """In a model whose architecture the plan does not know, as many as there are may be asked for."""
    model = build().train()
    recompute(model, layers)
    assert recomputed(model) == as_compared(layers, of=len(layers_of(model)))


def test_what_a_model_cannot_do_is_refused_by_the_key_s_name() -> None:
    with pytest.raises(RequestError, match=r"train.gradient_checkpointing=3: the model has 2 layers"):
        recompute(gpt2(), 3)
    model = gpt2()
    model.supports_gradient_checkpointing = False
    with pytest.raises(RequestError, match=r"train.gradient_checkpointing: GPT2LMHeadModel does not support"):
        recompute(model, True)
