"""Gradient checkpointing: which layers compute again, in the backward pass, what they did not keep for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from launcher.errors import RequestError

KEY = "train.gradient_checkpointing"


def recompute(model: PreTrainedModel, layers: bool | int) -> None:
    """Have every layer of `model` compute again, none, or the first `layers` of them.

    Raises RequestError where the model cannot, or its layers cannot be told apart.
    """
    if layers is False:
        return
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise RequestError(f"{KEY}: {error}", hint=f"set {KEY}: false", key=KEY) from error
    if layers is True:
        return
    each = layers_of(model)
    if len(each) < layers:
        raise RequestError(
            f"{KEY}={layers}: the model has {len(each)} layers that can be checkpointed one by one",
            hint=f"set {KEY}: true for all of them",
            key=KEY,
        )
    for layer in each[layers:]:
        layer.gradient_checkpointing = False


def recomputed(model: torch.nn.Module) -> bool | str:
    """Which layers really do: each goes by its own flag, and only in training. See `as_compared`."""
    flagged = layers_of(model) or [
        each for each in model.modules() if hasattr(each, "gradient_checkpointing")
    ]
    again = [bool(layer.gradient_checkpointing and layer.training) for layer in flagged]
    count = sum(again)
    if count in (0, len(again)):
        return count > 0
    return as_compared(count, of=len(again)) if all(again[:count]) else "in some layers"


def as_compared(layers: bool | int, *, of: int) -> bool | str:
    """Which `of` so many layers, so that two answers differ where they should: 1 is equal to True, and one
    layer is not all unless there is no other."""
    return layers if isinstance(layers, bool) else layers == of or f"of the first {layers}"


def layers_of(model: torch.nn.Module) -> list[Any]:
    """Those that can be checkpointed one by one, the first ones first."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
