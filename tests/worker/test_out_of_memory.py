"""What is proposed when memory runs out is something that the run does not do yet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.plan.batch import Batch
from launcher.plan.orders import Orders
from launcher.worker.out_of_memory import explain
from tests.conftest import small_plan


@pytest.mark.parametrize(
    ("micro_batch", "checkpointing", "said"),
    [
        (2, False, "train.micro_batch=1, or train.gradient_checkpointing=true"),
        (1, 1, "first: train.gradient_checkpointing=true"),
        (2, True, "first: train.micro_batch=1"),
        (1, True, "nothing is left to change on this GPU: use more of them, or a smaller model"),
    ],
)
def test_of_an_unknown_architecture_only_what_is_left_is_proposed(
    micro_batch: int, checkpointing: bool | int, said: str
) -> None:
    batch = Batch(8, micro_batch, 4 // micro_batch, 2)
    plan = replace(small_plan(), batch=batch, gradient_checkpointing=checkpointing)
    orders = Orders("0.1.0", "f" * 64, plan, {"model_type": "phi"}, None, None, None)
    assert orders.shape is None
    _, hint = explain(MemoryError("no more"), orders, {"everything": 1 << 30}, step=3, begun=False)
    assert hint.endswith(said)
