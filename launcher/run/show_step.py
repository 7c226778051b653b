"""Which text is in one step of a run: every row, down to the bytes it came from. Read, nothing run."""

from __future__ import annotations

from typing import Any

from launcher.data.blocks import Passage
from launcher.data.store import Store
from launcher.data.tokenizers import Tokenizer
from launcher.errors import RequestError
from launcher.run.samples import Samples
from launcher.run.show import EXCERPT, Shown, place, place_text


def show_step(samples: Samples, steps: int | None, step: int) -> Shown:
    """For every row of optimizer step `step` (from 1) of `steps`: its source, and of each document in it the
    file, the bytes there, and which of its tokens the row has. A row begins with the text shown."""
    if steps is not None and step > steps:
        raise RequestError(f"--step {step}: the run has {steps} steps", hint=f"give 1 to {steps}")
    own = samples.phases.samples_of_step(step - 1)
    certificate = samples.order.certificate([own])
    tokenizer = samples.blocks.store.tokenizer()
    rows = [_row(samples, tokenizer, sample) for sample in own.tolist()]
    head = f"step {step}: {len(rows)} rows, certificate {certificate}"
    return Shown(
        "\n".join([head, *map(_row_text, rows)]), {"step": step, "certificate": certificate, "rows": rows}
    )


def _row(samples: Samples, tokenizer: Tokenizer, sample: int) -> dict[str, Any]:
    blocks = samples.blocks
    source, epoch, block = samples.order[sample]
    ids = blocks.read(source, block)
    return {
        "sample": sample,
        "source": blocks.sources[source],
        "epoch": epoch,
        "block": block,
        "passages": [_passage(blocks.store, each) for each in blocks.describe(source, block)],
        "text": tokenizer.decode(ids[:EXCERPT])[:EXCERPT],
    }


def _passage(store: Store, passage: Passage) -> dict[str, Any]:
    return {
        **place(store, passage.name, passage.file, passage.offset, passage.length),
        "first_token": passage.document_token,
        "tokens": passage.stop - passage.start,
        "document_tokens": passage.document_tokens,
    }


def _row_text(row: dict[str, Any]) -> str:
    lines = [f"sample {row['sample']}: source {row['source']}, epoch {row['epoch']}, block {row['block']}"]
    for passage in row["passages"]:
        first, last = passage["first_token"] + 1, passage["first_token"] + passage["tokens"]
        lines.append(f"  {place_text(passage)}, tokens {first} to {last} of {passage['document_tokens']}")
    return "\n".join([*lines, f"  | {row['text']!r}"])
