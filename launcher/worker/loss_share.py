"""A model's own loss as its part of a step: the step's loss is then the same however it is cut up.

A step's loss is the mean over all its labels, on whatever ranks and in however many micro-batches they are.
The stock loss of a causal model is given their number and divides by it. Some models of transformers are
given it and take the mean of their micro-batch all the same, and a router's loss is added as it is: cut into
eight, the step would have eight times as much of it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from launcher.worker.chunked_loss import replace_forward
from launcher.worker.collate import IGNORED
from launcher.worker.probe import close, few_ids, next_token_loss, on_trial


def share_loss(model: PreTrainedModel, *, block_size: int) -> str | None:
    """Have `model`, told of the labels in a step, return its part of the step's loss: its mean, weighted by
    its share of them. In an evaluation a router's loss is left out. Returns the line that says so, and None
    where the stock loss does it by itself.
    """
    if _is_a_share(model, block_size):
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
def _is_a_share(model: PreTrainedModel, block_size: int) -> bool:
    """Whether the loss of some tokens is half of it where they are half of a step, with nothing added: what a
    router adds may be less than rounding."""
    ids = few_ids(model, block_size)
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        return False
    items = torch.tensor(2 * (ids.shape[1] - 1), device=model.device)
    with on_trial(model):
        found = model(input_ids=ids, labels=ids)
        half = model(input_ids=ids, labels=ids, num_items_in_batch=items).loss
    return getattr(found, "aux_loss", None) is None and close(2 * half, found.loss)
