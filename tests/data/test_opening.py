"""A store of a billion blocks: what a rank that starts in the middle of it looks at."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.store import (
    FORMAT_VERSION,
    Content,
    Listed,
    Listing,
    Manifest,
    Origin,
    Shard,
    TokenizerRecord,
    write_manifest,
)
from launcher.durable import Mark

SHARDS, TOKENS, BLOCK = 4096, 250_000_000, 1024
FIRST_BATCH = """
import json, sys, time
from pathlib import Path
import numpy, pydantic

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

from launcher.data.blocks import Blocks
from launcher.data.order import Order
from launcher.data.store import open_store

imported, began = resident(), time.perf_counter()
blocks = Blocks(open_store(Path(sys.argv[1])), "train", 1024, "concat")
order = Order([(len(blocks[0]), 1.0)], 1337)
rows = [blocks.read(*order[sample][::2]) for sample in map(int, sys.argv[2:])]
took = time.perf_counter() - began
found = {"blocks": len(blocks[0]), "rows": [len(row) for row in rows]}
print(json.dumps({**found, "seconds": took, "imported": imported, "resident": resident()}))
"""


def write_large_store(folder: Path) -> None:
    """The manifest of 4,096 shards of 250 M tokens, and no shard."""
    files = [f"s3://bucket/corpus/part-{number:05d}.jsonl.zst" for number in range(SHARDS)]
    sha = "0123456789abcdef" * 4
    marks = {
        "bin": Mark(size=2 * TOKENS, sha256=sha),
        "idx": Mark(size=20_000_000, sha256=sha),
        "doc": Mark(size=16_000_000, sha256=sha),
    }
    manifest = Manifest(
        content=Content(
            format_version=FORMAT_VERSION,
            format="auto",
            sample_by="line",
            text_field="text",
            validation_fraction=0.0,
            unit_bytes=1 << 30,
            tokenizer=TokenizerRecord(
                fingerprint=sha,
                size=50_257,
                end_of_text="<|endoftext|>",
                end_of_text_id=50_256,
                end_of_text_policy="after every document",
                pad_id=50_256,
                probe_ids=[[1, 2, 3]],
            ),
            listing=[
                Listing(
                    source="text",
                    held_out=False,
                    files=[Listed(file=file, size=1 << 30, etag=sha[:32], ranges=True) for file in files],
                )
            ],
        ),
        ledger=[],
        shards=[
            Shard(
                name=f"train-{number:05d}",
                split="train",
                source="text",
                tokens=TOKENS,
                documents=1_000_000,
                origins=[Origin(file=file, start=0, end=None, first_document=0)],
                files=marks,
            )
            for number, file in enumerate(files)
        ],
        bad=[],
        tokenizer_files={},
    )
    write_manifest(folder, manifest)


def sparse_shards(folder: Path, samples: range) -> None:
    """The shards that these samples are read from. They take no room: each has a hole for a content."""
    from launcher.data.order import Order

    order = Order([(SHARDS * TOKENS // BLOCK, 1.0)], 1337)
    for shard in {order[sample].block * BLOCK // TOKENS for sample in samples}:
        with (folder / f"train-{shard:05d}.bin").open("wb") as stream:
            stream.truncate(2 * TOKENS)


def flags_of_mapping(path: Path) -> list[str]:
    """What the kernel has been told of the memory that this process maps the file to."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begun = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
    return next(line for line in lines[begun:] if line.startswith("VmFlags:")).split()[1:]


def test_only_what_outgrows_memory_is_read_without_the_pages_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.data.store import open_store

    write_large_store(tmp_path)
    sparse_shards(tmp_path, range(1))
    (file,) = tmp_path.glob("*.bin")
    number = int(file.stem.partition("-")[2])
    for pages, told in ((1 << 20, True), (1 << 40, False)):
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}.__getitem__)
        store = open_store(tmp_path)
        ids = store.tokens(store.shards("train", "text")[number])
        assert len(ids) == TOKENS
        assert ("rr" in flags_of_mapping(file)) is told
        del ids, store
        gc.collect()


def first_batch(folder: Path, samples: range) -> dict[str, Any]:
    """What a fresh process finds, and what it took."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_BATCH, str(folder), *map(str, samples)],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nothing_is_collected_while_a_store_is_opened(tmp_path: Path) -> None:
    """Looking through the objects of a large manifest for cycles takes as long as making them."""
    from launcher.data.store import open_store

    write_large_store(tmp_path)
    seen: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        seen.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        store = open_store(tmp_path)
        # The first object after an opening is what would set it off.
        kept: list[list[int]] = [[]]
    finally:
        gc.callbacks.remove(note)
    assert not seen
    assert len(store.shards("train", "text")) == SHARDS
    assert kept == [[]]


def test_only_the_shards_of_the_first_batch_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.data.blocks import Blocks
    from launcher.data.order import Order
    from launcher.data.store import open_store
    from launcher.errors import StoreError

    write_large_store(tmp_path)
    blocks = Blocks(open_store(tmp_path), "train", BLOCK, "concat")
    assert len(blocks[0]) == SHARDS * TOKENS // BLOCK == 1_000_000_000
    order = Order([(len(blocks[0]), 1.0)], 1337)
    samples = range(123_456_789, 123_456_797)
    with pytest.raises(StoreError, match=r"train-\d{5}\.bin: missing"):
        blocks.read(0, order[samples[0]].block)
    sparse_shards(tmp_path, samples)
    place = order[samples[0]].block * BLOCK
    with (tmp_path / f"train-{place // TOKENS:05d}.bin").open("r+b") as stream:
        stream.seek(2 * (place % TOKENS))
        stream.write(np.arange(BLOCK, dtype="<u2").tobytes())
    assert blocks.read(0, order[samples[0]].block).tolist() == list(range(BLOCK))

    found = first_batch(tmp_path, samples)
    assert found["blocks"] == 1_000_000_000
    assert found["rows"] == [BLOCK] * len(samples)
    assert found["resident"] < 100e6
