"""When memory runs out: how that is told, what held it, and that what is proposed is not done yet."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.config.presets import PRESETS
from launcher.plan.batch import Batch
from launcher.plan.orders import Orders
from launcher.worker.out_of_memory import ALLOCATOR, explain, held_memory, is_out_of_memory
from tests.conftest import small_plan
from tests.worker.parity import VOCABULARY, gpt2


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


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (
            RuntimeError(f"[enforce fail at alloc_cpu.cpp:121] {ALLOCATOR}: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_each_way_in_which_memory_runs_out_is_told_from_other_errors(error: Exception, ran_out: bool) -> None:
    assert is_out_of_memory(error) is ran_out


def test_pytorch_still_says_it_on_a_cpu_as_it_is_looked_for() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("copies", [False, True])
def test_what_is_held_is_counted_to_the_byte(copies: bool) -> None:
    """AdamW has two moments in fp32 and a counter for each tensor; DeepSpeed steps copies of the weights."""
    model = gpt2()
    weights = list(model.parameters())
    stepped = [torch.nn.Parameter(each.detach().clone()) for each in weights] if copies else weights
    optimizer = torch.optim.AdamW(stepped)
    for each in (*weights, *stepped):
        each.grad = torch.zeros_like(each)
    optimizer.step()
    trainer: Any = SimpleNamespace(bare_model=model, optimizer=SimpleNamespace(optimizer=optimizer))
    size = 4 * sum(each.numel() for each in weights)
    held = held_memory(trainer, "cpu")
    rest = held.pop("activations, Python and all else")
    assert rest > 0
    assert held == {
        "parameters": size,
        "gradients": size,
        "optimizer": 2 * size + 4 * len(weights) + (size if copies else 0),
    }
    trainer.bare_model.get_parameter("transformer.wte.weight").grad = None
    assert held_memory(trainer, "cpu")["gradients"] == size - 4 * VOCABULARY * model.config.n_embd
    on_gpu = held_memory(trainer, "cuda")
    assert [on_gpu[name] for name in held] == [0, 0, 0], (
        "what lies in the host's memory takes none of a GPU's"
    )


def test_before_there_is_a_trainer_everything_is_one_number() -> None:
    assert list(held_memory(None, "cpu")) == ["everything"]


@pytest.mark.parametrize(
    ("begun", "proposed"),
    [
        (True, ["gradient_checkpointing=true", "micro_batch=1"]),
        (False, ["strategy=zero3", "strategy=zero2", "strategy=zero1", "gradient_checkpointing=true"]),
    ],
)
def test_of_a_known_architecture_it_says_what_helps_and_how_much(begun: bool, proposed: list[str]) -> None:
    """A run that has checkpoints keeps its strategy."""
    plan = replace(small_plan(), memory={"parameters": 1 << 30, "optimizer": 3 << 30})
    orders = Orders("0.1.0", "f" * 64, plan, PRESETS["gpt2"].config(), None, None, None)
    held = {"parameters": 1 << 30, "gradients": 2 << 30}
    message, hint = explain(MemoryError("no more\nof it"), orders, held, step=3, begun=begun)
    assert re.fullmatch(
        r"out of memory in step 4: this rank held parameters 1\.0+ GiB, gradients 2\.0+ GiB; "
        r"4\.0+ GiB were planned \(no more\)",
        message,
    )
    answers = hint.removeprefix("run the same command with one of these, the most effective first: ")
    found = [re.fullmatch(r"train\.(\S+) \(about \S+ [GM]iB less\)", one) for one in answers.split(", or ")]
    assert [one and one[1] for one in found] == proposed
