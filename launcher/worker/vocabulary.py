"""The vocabulary padded to a multiple of 64 while a model trains: rows that nothing else sees.

Tensor cores multiply by whole tiles, and 50,257 columns begin each row of logits at another offset in one.
The rows are zero and stay it: no id looks them up, no loss and no caller has their logits, so their gradient
and their decay are zero. The model's config goes on naming the vocabulary it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.plan.fast import MULTIPLE, padded


class RealColumns:
    """A forward hook of the head that leaves out the logits of what pads its vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, _module: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., : self.vocabulary]


def plain_head(model: PreTrainedModel) -> torch.nn.Linear | None:
    """The output layer, where it is a linear one and nothing else."""
    head = model.get_output_embeddings()
    is_plain = isinstance(head, torch.nn.Linear) and type(head).forward is torch.nn.Linear.forward
    return head if is_plain else None


def pad_vocabulary(model: PreTrainedModel) -> str | None:
    """Give the head, and the embedding if tied to it, rows up to a multiple of 64. Returns why it did not."""
    head = plain_head(model)
    if head is None:
        return "the model has no plain linear head"
    vocabulary = head.out_features
    if vocabulary % MULTIPLE == 0:
        return f"{vocabulary:,} is a multiple of {MULTIPLE}"
    _give_rows(model, head, padded(vocabulary))
    head.register_forward_hook(RealColumns(vocabulary))
    return None


def take_out_padding(model: PreTrainedModel) -> None:
    """Make the model the stock one again. Without padding nothing happens."""
    head = plain_head(model)
    if head is None or not is_padded(model):
        return
    vocabulary = real_columns(head)
    for number, hook in list(head._forward_hooks.items()):
        if isinstance(hook, RealColumns):
            del head._forward_hooks[number]
    _give_rows(model, head, vocabulary)


def is_padded(model: PreTrainedModel) -> bool:
    head = plain_head(model)
    return head is not None and real_columns(head) < head.out_features


def real_columns(head: torch.nn.Linear) -> int:
    """Rows of the head that are not padding."""
    return next(
        (hook.vocabulary for hook in head._forward_hooks.values() if isinstance(hook, RealColumns)),
        head.out_features,
    )


@torch.no_grad()
def _give_rows(model: PreTrainedModel, head: torch.nn.Linear, rows: int) -> None:
    """Cut the head to `rows`, or fill it up with zeros; and wherever else its parameters are used."""
    for old in list(head.parameters()):
        more = max(0, rows - old.shape[0])
        values = functional.pad(old, (0, 0, 0, more) if old.dim() == 2 else (0, more))[:rows].clone()
        new = torch.nn.Parameter(values, requires_grad=old.requires_grad)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is old:
                    module._parameters[name] = new
                    if isinstance(module, torch.nn.Embedding):
                        module.num_embeddings = rows
    head.out_features = rows
