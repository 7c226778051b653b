"""Evaluation: every whole validation block once, its tokens weighted alike, whatever the world size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import EvalPrediction

from launcher.worker.collate import IGNORED, Collate, to_device
from launcher.worker.dataset import ValidationRows
from launcher.worker.model import in_mode
from launcher.worker.together import as_rank_0_has_it, of_all_ranks

Metric = Callable[[EvalPrediction], Mapping[str, float]]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    rows: ValidationRows,
    collate: Collate,
    *,
    rank: int,
    world_size: int,
    micro_batch: int,
    block_size: int,
    device: torch.device,
    metrics: Sequence[Metric],
    goes_on: Callable[[], bool],
) -> dict[str, float] | None:
    """`eval_loss` (nats per predicted token of all validation blocks), `eval_perplexity`, `eval_tokens`, and
    what the user's `metrics` return.

    Every rank runs the same number of forward passes, as sharded engines need; a pass without rows
    of its own counts nothing. `goes_on` is asked before each one, and must answer alike on every rank; where
    it says no, evaluation is given up and there is nothing to return.
    """
    passes = math.ceil(len(rows) / (micro_batch * world_size))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    predicted: list[np.ndarray[Any, Any]] = []
    expected: list[np.ndarray[Any, Any]] = []
    with in_mode(model, training=False):
        for turn in range(passes):
            if not goes_on():
                return None
            first = (turn * world_size + rank) * micro_batch
            mine = range(first, min(first + micro_batch, len(rows)))
            inputs = to_device(collate([rows[index] for index in mine] or [rows[0]]), device)
            outputs = model(**inputs)
            if not mine:
                continue
            tokens = inputs["labels"][:, 1:].ne(IGNORED).sum()
            # A row of one token has no label, and the model's mean over nothing is NaN.
            total = torch.where(tokens > 0, outputs.loss.double() * tokens, 0.0)
            sums += torch.stack([total, tokens.double()])
            if metrics:
                logits = outputs.logits
                if logits is None:  # of a model that makes its loss without them
                    without_labels = {name: value for name, value in inputs.items() if name != "labels"}
                    logits = model(**without_labels).logits
                expected.append(_widen(inputs["labels"][:, 1:], block_size - 1))
                predicted.append(_widen(logits[:, :-1].argmax(-1), block_size - 1))
    if world_size > 1:
        dist.all_reduce(sums)
    loss = float(sums[0] / sums[1])
    found = {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, 700.0)),
        "eval_tokens": int(sums[1]),
    }
    if metrics:
        found |= _custom(metrics, predicted, expected, rank)
    return found


def _widen(ids: torch.Tensor, width: int) -> np.ndarray[Any, Any]:
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=IGNORED).cpu().numpy()


def _custom(
    metrics: Sequence[Metric],
    predicted: list[np.ndarray[Any, Any]],
    expected: list[np.ndarray[Any, Any]],
    rank: int,
) -> dict[str, float]:
    """Gather on rank 0, ask each metric there, and let every rank know: all must log and decide alike."""
    parts = of_all_ranks((predicted, expected))
    answer: dict[str, float] = {}
    if rank == 0:
        prediction = EvalPrediction(
            predictions=np.concatenate([array for ids, _ in parts for array in ids]),
            label_ids=np.concatenate([array for _, ids in parts for array in ids]),
        )
        for metric in metrics:
            answer |= {f"eval_{name}": float(value) for name, value in metric(prediction).items()}
    return as_rank_0_has_it(answer)
