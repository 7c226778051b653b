"""What is banned, against looking at every sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config.schema import DataSection, Source
from launcher.data.blocks import Blocks
from launcher.data.mixture import training_order
from launcher.data.phases import Phases, Skip
from launcher.data.skipping import bans
from launcher.errors import RequestError


@pytest.mark.parametrize("packing", ["concat", "pad", "best_fit"])
def test_every_sample_that_holds_a_banned_document_is_banned(
    prepared: Any, corpus: Path, packing: Any
) -> None:
    mixture = [
        Source(name="a", files=[str(corpus / "a.txt")], weight=1.0),
        Source(name="b", files=[str(corpus / "b.txt")], weight=3.0),
    ]
    blocks = Blocks(prepared(mixture, validation=0.1), "train", 64, packing)
    order = training_order(blocks, DataSection(train=mixture), 5)
    documents = [blocks.describe(0, 3)[0].name, blocks.describe(1, 0)[0].name, blocks.describe(1, 40)[0].name]
    skip = Skip({7: ((48, 56),), 9: ((300, 302), (310, 311))}, tuple(documents))
    of_steps = {*range(48, 56), 300, 301, 310}
    banned = bans(order, blocks)
    for before in (0, 50, 305, 2000):
        expected = [
            sample
            for sample in range(before)
            if sample in of_steps
            or any(passage.name in documents for passage in blocks.describe(*order[sample][::2]))
        ]
        assert banned(skip, before).tolist() == expected
    assert not set(documents) & {
        passage.name
        for sample in Phases([], banned)
        .going_on(0, batch_size=400, steps=(), documents=documents)
        .samples_of_step(3)
        .tolist()
        for passage in blocks.describe(*order[sample][::2])
    }


def test_nothing_left_to_train_on_is_refused(prepared: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("seven wizards brew strong tea " * 40 + "\n")
    (tmp_path / "b.txt").write_text("the quick brown fox " * 40 + "\n")
    mixture = [Source(name=name, files=[str(tmp_path / f"{name}.txt")], weight=1.0) for name in "ab"]
    blocks = Blocks(prepared(mixture, validation=0.0), "train", 32, "concat")
    order = training_order(blocks, DataSection(train=mixture), 5)
    one, other = (blocks.describe(source, 0)[0].name for source in (0, 1))
    left = bans(order, blocks)(Skip({}, (one,)), 100)
    assert left.tolist() == np.flatnonzero(order.map(np.arange(100))[:, 0] == 0).tolist()
    with pytest.raises(RequestError, match="bans every block of the text"):
        bans(order, blocks)(Skip({}, (one, other)), 100)
