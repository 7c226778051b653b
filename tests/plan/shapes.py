"""Shapes of known models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.config.presets import PRESETS
from launcher.plan.shape import Shape, shape_of


def shape(model: str | Mapping[str, Any] = "gpt2") -> Shape:
    """Of a preset, or of a transformers config."""
    found = shape_of(PRESETS[model].config() if isinstance(model, str) else model)
    assert found is not None
    return found
