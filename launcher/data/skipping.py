"""What `data.skip` bans, as samples: those its steps held, and all that hold a token of its documents."""

from __future__ import annotations

import numpy as np

from launcher.data.blocks import Blocks
from launcher.data.order import Order
from launcher.data.phases import Banned, Samples, Skip
from launcher.errors import RequestError


def bans(order: Order, blocks: Blocks) -> Banned:
    """What a Skip means for the samples of `order` over `blocks`.

    The returned function raises RequestError for a document that is not in the training text, and where
    nothing would be left to train on.
    """

    def banned(skip: Skip, before: int) -> Samples:
        held = [np.arange(start, stop) for ranges in skip.steps.values() for start, stop in ranges]
        of_steps = np.concatenate([np.empty(0, dtype=np.int64), *held])
        of_documents = [
            order.samples_of(source, own, before)
            for source, own in enumerate(_blocks_of(skip, blocks, order.blocks))
            if own.size
        ]
        return np.unique(np.concatenate([of_steps[of_steps < before], *of_documents]))

    return banned


def _blocks_of(skip: Skip, blocks: Blocks, sizes: list[int]) -> list[Samples]:
    """For each source, its blocks that hold any token of the banned documents."""
    found: list[list[Samples]] = [[] for _ in sizes]
    for name in skip.documents:
        source, own = blocks.holding(name)
        found[source].append(own)
    distinct = [np.unique(np.concatenate([np.empty(0, dtype=np.int64), *own])) for own in found]
    if [len(own) for own in distinct] == sizes:
        raise RequestError(
            "data.skip.documents bans every block of the text",
            hint="leave something to train on",
            key="data.skip.documents",
        )
    return distinct
