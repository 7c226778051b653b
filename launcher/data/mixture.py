"""The sources of a run's text, and the order their blocks are trained in."""

from __future__ import annotations

from launcher.config.schema import DataSection, Source
from launcher.data.blocks import Blocks
from launcher.data.order import Order

ONLY = "text"
"""What the one source of a run without a mixture is called."""


def training_sources(data: DataSection) -> list[tuple[str, list[str]]]:
    """Each source's name and its patterns."""
    patterns = [each for each in data.train if isinstance(each, str)]
    return [(ONLY, patterns)] if patterns else [(each.name, each.files) for each in _named(data)]


def training_order(blocks: Blocks, data: DataSection, seed: int) -> Order:
    """The order of samples over the sources in `blocks`, by the weights that `data` gives them."""
    weights = source_weights(data)
    return Order([(len(blocks[number]), weights[name]) for number, name in enumerate(blocks.sources)], seed)


def source_weights(data: DataSection) -> dict[str, float]:
    """Each source's share of the samples, relative to the others'."""
    return {each.name: each.weight for each in _named(data)} or {ONLY: 1.0}


def _named(data: DataSection) -> list[Source]:
    return [each for each in data.train if isinstance(each, Source)]
