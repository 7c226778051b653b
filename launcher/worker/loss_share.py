"""A model's own loss as its part of a step: the step's loss is then the same however it is cut up.

A step's loss is the mean over all its labels, on whatever ranks and in however many micro-batches they are.
The stock loss of a causal model is given their number and divides by it. Some models of transformers are
given it and take the mean of their micro-batch all the same, and a router's loss is added as it is: cut into
eight, the step would have eight times as much of it.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.errors import RequestError
from launcher.worker.chunked_loss import replace_forward
from launcher.worker.collate import IGNORED
from launcher.worker.model import in_mode
from launcher.worker.probe import next_token_loss, probe_ids

PROBE: Final = 16
"""Tokens that show how a model's loss is made."""
CLOSE: Final = 1e-4
"""How far two ways to the same loss may be apart, as a part of it."""


def share_loss(model: PreTrainedModel, *, block_size: int) -> str | None:
    """Have `model`, told of the labels in a step, return its part of the step's loss: its mean, weighted by
    its share of them. In an evaluation a router's loss is left out. Returns the line that says so, and None
    where the stock loss does it by itself.

    Raises RequestError for a model that compares each token with itself, as some encoders' decoders do.
    """
    found, doubled = _probe(model, block_size)
    if doubled is not None and _close(2 * doubled, found):
        return None
    stock = model.forward

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        items, labels = inputs.pop("num_items_in_batch", None), inputs.get("labels")
        outputs = stock(*args, **inputs)
        if labels is None:
            return outputs
        if not self.training and getattr(outputs, "aux_loss", None) is not None:
            outputs.loss = next_token_loss(outputs.logits, labels)
        if items is not None:
            counted = labels[..., 1:].ne(IGNORED).sum()
            # The mean over no label is NaN.
            outputs.loss = torch.where(counted > 0, outputs.loss, 0.0) * (counted / items)
        return outputs

    replace_forward(model, forward)
    model.accepts_loss_kwargs = True  # type: ignore[assignment] # what the stock Trainer goes by
    return "the model's loss is a mean of its own: each micro-batch counts by its share of the step's labels"


@torch.no_grad()
def _probe(model: PreTrainedModel, block_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss of some tokens, and where it takes their number that of the same as one half of a step."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = probe_ids(min(PROBE, block_size), vocabulary=vocabulary, device=model.device)
    takes = any(
        each.kind is each.VAR_KEYWORD for each in inspect.signature(model.forward).parameters.values()
    )
    with in_mode(model, training=False):
        found = model(input_ids=ids, labels=ids)
        items = torch.tensor(2 * (ids.shape[1] - 1), device=model.device)
        doubled = model(input_ids=ids, labels=ids, num_items_in_batch=items).loss if takes else None
    itself = functional.cross_entropy(found.logits[0].float(), ids[0])
    if _close(found.loss, itself) and not _close(found.loss, next_token_loss(found.logits, ids)):
        raise RequestError(
            f"model.name: {type(model).__name__} compares each token with itself, not with the next one",
            hint="take a model that is trained on the next token, such as gpt2 or one of Llama's kind",
            key="model.name",
        )
    return found.loss, doubled


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs() <= CLOSE * other.abs())
