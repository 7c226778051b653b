"""Rows as the tensors that a model is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from launcher.config.schema import DataSection

IGNORED = -100
"""The label that cross-entropy leaves out."""

Row = npt.NDArray[np.int64]
Tensors = dict[str, Any]
"""What the model is called with: tensors by name, and numbers where FlashAttention asks for them."""


class Collate(Protocol):
    def __call__(self, rows: Sequence[Row]) -> Tensors: ...


def collate_of(data: DataSection, end_of_text_id: int, pad_token_id: int, *, flash: bool) -> Collate:
    """How this text's rows become tensors. Under `pad` a row holds one document: there is none to see."""
    if data.isolate_documents and data.packing != "pad":
        return Isolate(end_of_text_id, pad_token_id, flash=flash)
    return stack if data.packing == "concat" else PadToLongest(pad_token_id)


def stack(rows: Sequence[Row]) -> Tensors:
    """Blocks of one length as `input_ids` and `labels`, int64[rows, block_size]; no mask, so that
    attention keeps its causal fast path."""
    ids = torch.from_numpy(np.stack(rows))
    return {"input_ids": ids, "labels": ids}


class PadToLongest:
    """Rows of unequal length, padded on the right to the longest of them: `input_ids`,
    `attention_mask` and `labels`, int64[rows, longest]."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, rows: Sequence[Row]) -> Tensors:
        ids, real = padded(rows, self._pad)
        return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, IGNORED)}


def padded(rows: Sequence[Row], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right, int64[rows, longest], and where they hold tokens of their own, bool of the
    same shape."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_token_id, dtype=torch.int64)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = torch.from_numpy(row)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


class Isolate:
    """Rows as `input_ids`, `position_ids` and `labels`, int64[rows, longest], without an attention mask.

    A document begins with the row and after every end-of-text token, and there positions start from 0. Its
    first token is no label: it would be predicted from another document. What pads a shorter row on the right
    is a document apart, without labels. `flash`: FlashAttention is told of the documents too.
    """

    def __init__(self, end_of_text_id: int, pad_token_id: int, *, flash: bool = False) -> None:
        self.end_of_text_id = end_of_text_id
        self._pad = pad_token_id
        self._flash = flash

    def __call__(self, rows: Sequence[Row]) -> Tensors:
        ids, real = padded(rows, self._pad)
        begins = torch.ones_like(real)
        begins[:, 1:] = (ids[:, :-1] == self.end_of_text_id) | (real[:, :-1] & ~real[:, 1:])
        place = torch.arange(ids.shape[1]).expand_as(ids)
        positions = place - torch.where(begins, place, 0).cummax(dim=1).values
        labels = ids.masked_fill(begins | ~real, IGNORED)
        batch = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {**batch, **_end_to_end(begins)} if self._flash else batch


def _end_to_end(begins: torch.Tensor) -> Tensors:
    """Where documents begin and end with all rows laid end to end, and a length that none exceeds."""
    starts = begins.flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(starts, (0, 1), value=begins.numel()).int()
    longest = begins.shape[1]
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def to_device(batch: Tensors, device: torch.device) -> Tensors:
    """The batch with its tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
