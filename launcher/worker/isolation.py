"""Documents that share a row and do not see each other: how rows say so, and the proof on the live model.

Where `position_ids` start again, transformers keeps documents apart under sdpa and eager attention only if it
is given neither an attention mask nor a cache (5.23: `masking_utils._preprocess_mask_arguments`), and under
FlashAttention, in a batch of several rows, only if it is told where each begins
(`modeling_flash_attention_utils._flash_attention_forward`). An all-ones mask, a cache or a model that ignores
positions leaks without a word, so nothing is believed: see `prove_isolation`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from launcher.errors import TrainingError
from launcher.worker.collate import Isolate, to_device
from launcher.worker.model import in_mode

SHORT = 8  # tokens of the probe's two documents: attention is spread over few, so a leak is large
FEWEST = 4  # tokens in a row that holds two documents
NOISE: Mapping[str, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}
"""How far rounding may move a logit, as a part of the largest: a few hundred times the precision's step."""


@torch.no_grad()
def prove_isolation(
    model: torch.nn.Module,
    collate: Isolate,
    *,
    rows: int,
    block_size: int,
    vocabulary: int,
    device: torch.device,
    precision: str,
) -> str:
    """Compare the live model's logits of one document beside two others and at the start of a row.

    `model`, wrapped as it will train, is given what `collate` makes of `rows` rows of `block_size`: the shape
    of a micro-batch, so that a compiled model meets no other. Its mode and the random generators are left as
    they were. Returns the one line that says documents are apart; raises TrainingError, with the largest
    difference, where they are not.
    """
    width = max(block_size, FEWEST)
    length = min(SHORT, width // 2 - 1)
    end = collate.end_of_text_id
    numbers = np.arange(width) * 31 + np.arange(rows)[:, None] * 17

    def document(first: int, after: int, other: int = 0) -> npt.NDArray[np.int64]:
        """`int64[rows, after - first + 1]`: tokens and the end; for another `other` each token is another."""
        ids = (numbers[:, first:after] + other) % (vocabulary - 1)
        return np.pad(ids + (ids >= end), ((0, 0), (0, 1)), constant_values=end)

    def logits(*documents: npt.NDArray[np.int64]) -> torch.Tensor:
        batch = collate(list(np.concatenate(documents, axis=1)[:, :width]))
        inputs = to_device({name: batch[name] for name in batch if name != "labels"}, device)
        found: torch.Tensor = model(**inputs).logits
        return found

    first, second = document(0, length), document(length, 2 * length)
    rest = document(2 * length, width - 2)
    seeds = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with in_mode(model, training=False), seeds:
        try:
            beside = logits(first, second, rest)
            changed = _apart(beside, logits(document(0, length, other=1), second, rest), length + 1, width)
            alone = logits(second, first, rest)[:, : length + 1]
        except TypeError as error:
            raise TrainingError(f"data.isolate_documents: this model cannot: {error}", hint=_HINT) from error
    moved = _apart(beside[:, length + 1 :], alone, 0, length + 1)
    largest = float(beside.abs().max())
    told = f"by {max(changed, moved):.3g}, where logits reach {largest:.3g}"
    if not max(changed, moved) <= NOISE[precision] * largest:
        raise TrainingError(
            f"data.isolate_documents: documents of a row see each other: one changes another's logits {told}",
            hint=_HINT,
        )
    return f"isolated: documents of a row move each other's logits {told}"


_HINT = "set data.isolate_documents: false, or data.packing: pad, where a row holds one document"


def _apart(one: torch.Tensor, other: torch.Tensor, start: int, stop: int) -> float:
    """The largest difference over positions `[start, stop)`; NaN where there is one."""
    return float((one[:, start:stop] - other[:, start:stop]).abs().max())
