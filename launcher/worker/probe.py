"""A model is tried before it trains: with these ids, and by the loss that its logits are worth."""

from __future__ import annotations

import torch
from torch.nn import functional

from launcher.worker.collate import IGNORED


def probe_ids(tokens: int, *, vocabulary: int, device: torch.device) -> torch.Tensor:
    """`int64[1, tokens]`: ids from all over the vocabulary, no two alike in a row."""
    return (torch.arange(tokens, device=device)[None] * 31) % vocabulary


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over all labels of the cross-entropy of the logits that predict them: of `[rows, tokens,
    vocabulary]` and `int64[rows, tokens]`."""
    following = labels[..., 1:].reshape(-1)
    return functional.cross_entropy(
        logits[..., :-1, :].float().reshape(len(following), -1), following, ignore_index=IGNORED
    )
