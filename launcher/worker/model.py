"""The model and its tokenizer: from scratch, or with published weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from launcher.errors import RequestError
from launcher.plan.orders import Orders
from launcher.worker.vocabulary import pad_vocabulary


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the store was made with, as transformers sees it.

    It has an end-of-text token; its pad token is its own, or else the end-of-text token reused, so
    that padding needs no new row in the embedding. Labels are masked by attention, never by the pad
    id, so the model still learns to stop.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def trained_model(orders: Orders, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The model as its checkpoints have it: `build_model`'s, its vocabulary padded where the plan pads it.

    The real rows are those that the seed gives without padding. Raises what `build_model` does.
    """
    model = build_model(orders.model, orders.weights, tokenizer, seed)
    if orders.plan.fast.padded_vocabulary:
        pad_vocabulary(model)
    return model


def build_model(
    fields: Mapping[str, Any], weights: str | None, tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """The model in fp32 on the CPU, with a row in its embedding for every id of `tokenizer`.

    `fields` is the transformers config; `weights` a folder or Hub id, or None for weights drawn with
    `seed`. The same seed gives the same weights on every rank. Raises RequestError where
    transformers cannot build it.
    """
    set_seed(seed)
    rows = max(tokenizer.get_vocab().values()) + 1  # more than entries where ids are left out
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id
        if tokenizer.bos_token_id is not None
        else tokenizer.eos_token_id,
    }
    try:
        if weights is None:
            rest = {key: value for key, value in fields.items() if key != "model_type"}
            config = AutoConfig.for_model(fields["model_type"], **{**rest, "vocab_size": rows, **special})
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                weights, dtype=torch.float32, trust_remote_code=False
            )
    except (
        ImportError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        StrictDataclassError,
    ) as error:
        source = weights or fields.get("model_type")
        raise RequestError(
            f"model.name: {source} cannot be built: {error}", hint="check model.name and model.overrides"
        ) from error
    if model.config.get_text_config().vocab_size < rows:
        model.resize_token_embeddings(rows)
    for settings in (model.config, model.generation_config):
        for key, value in special.items():
            said = getattr(settings, key, None)
            # A published model may have several end-of-text ids; the tokenizer's is then one of them.
            if not (isinstance(said, list) and value in said):
                setattr(settings, key, value)
    # transformers does not recognise some heads (GPT2LMHeadModel) and would warn at every step.
    model.loss_type = "ForCausalLM"
    return model


@contextmanager
def in_mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """While inside, `model` trains or evaluates; then it does what it did before."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
