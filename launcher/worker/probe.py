"""A model is tried before it trains: whether it predicts each token from those before it, and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.errors import RequestError
from launcher.worker.collate import IGNORED
from launcher.worker.model import in_mode

TOKENS: Final = 16
"""Tokens that show how a model attends, and what its loss is made of."""
CLOSE: Final = 1e-4
"""How far two ways to the same loss may be apart, as a part of it, and two logits, of the largest."""


def probe_ids(tokens: int, *, vocabulary: int, device: torch.device) -> torch.Tensor:
    """`int64[1, tokens]`: ids from all over the vocabulary, no two alike in a row."""
    return (torch.arange(tokens, device=device)[None] * 31) % vocabulary


def few_ids(model: PreTrainedModel, block_size: int) -> torch.Tensor:
    """The same for `model`, where a few tokens tell: `int64[1, at most TOKENS]`."""
    vocabulary = model.config.get_text_config().vocab_size
    return probe_ids(min(TOKENS, block_size), vocabulary=vocabulary, device=model.device)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over all labels of the cross-entropy of the logits that predict them: of `[rows, tokens,
    vocabulary]` and `int64[rows, tokens]`."""
    following = labels[..., 1:].reshape(-1)
    return functional.cross_entropy(
        logits[..., :-1, :].float().reshape(len(following), -1), following, ignore_index=IGNORED
    )


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two losses are the same but for rounding."""
    return bool((one - other).abs() <= CLOSE * other.abs())


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """While inside, `model` attends by the function of this name."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def on_trial(model: PreTrainedModel, *, training: bool = False) -> Iterator[None]:
    """While inside, `model` trains or evaluates without a cache, and attends as a CPU can: FlashAttention is
    for GPUs."""
    name, config = model.config._attn_implementation, model.config.get_text_config()
    if str(name).startswith("flash"):
        name = "sdpa" if model._supports_sdpa else "eager"
    cached = getattr(config, "use_cache", False)
    config.use_cache = False
    try:
        with in_mode(model, training=training), attention(model, name):
            yield
    finally:
        config.use_cache = cached


@torch.no_grad()
def check_predicts_next(model: PreTrainedModel, block_size: int) -> None:
    """Raise RequestError unless `model`, given ids and labels alone, does not see the tokens that follow,
    and compares what it makes of each token with the next one."""
    name, ids = type(model).__name__, few_ids(model, block_size)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.config.get_text_config().vocab_size
    try:
        with on_trial(model):
            found, logits = model(input_ids=ids, labels=ids), model(input_ids=changed).logits
    except Exception as error:
        raise RequestError(
            f"model.name: {name} does not run with input_ids and labels alone: {error}",
            hint="check model.name and model.overrides",
            key="model.name",
        ) from error
    before, after = found.logits[0, :-1], logits[0, :-1]
    if not torch.allclose(after, before, rtol=CLOSE, atol=CLOSE * float(before.abs().max())):
        may_decode = hasattr(model.config, "is_decoder")
        more = ", or set model.overrides.is_decoder: true" if may_decode else ""
        raise _refused(f"{name} sees the tokens that follow", more)
    itself = functional.cross_entropy(found.logits[0].float(), ids[0])
    if close(found.loss, itself) and not close(found.loss, next_token_loss(found.logits, ids)):
        raise _refused(f"{name} compares each token with itself, not with the next one")


def _refused(what: str, more: str = "") -> RequestError:
    hint = f"take a model that is trained on the next token, such as gpt2 or one of Llama's kind{more}"
    return RequestError(f"model.name: {what}", hint=hint, key="model.name")
