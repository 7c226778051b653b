"""When memory runs out: what held it, by the live allocator and the plan, and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import psutil
import torch

from launcher.plan.orders import Orders
from launcher.plan.relief import reliefs
from launcher.sizes import size_in_words
from launcher.worker.engine import innermost, own_part

if TYPE_CHECKING:
    from launcher.worker.trainer import LauncherTrainer

ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""What PyTorch says on a CPU, in a plain RuntimeError."""

MOST_ANSWERS = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a GPU's or the machine's memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or ALLOCATOR in str(error)


def held_memory(trainer: LauncherTrainer | None, device: str) -> dict[str, int]:
    """Bytes that this rank holds now: the model's state as it lies there, and all the rest together."""
    total = torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss
    if trainer is None:
        return {"everything": total}
    weights = [own_part(parameter) for parameter in trainer.bare_model.parameters()]
    gradients = [parameter.grad for parameter in trainer.bare_model.parameters()]
    held = {
        "parameters": _bytes(weights, device),
        "gradients": _bytes((grad for grad in gradients if grad is not None), device),
        "optimizer": _bytes(_optimizer_tensors(trainer), device),
    }
    rest = "activations and all else" if device == "cuda" else "activations, Python and all else"
    return held | {rest: max(0, total - sum(held.values()))}


def explain(
    error: BaseException, orders: Orders, held: Mapping[str, int], *, step: int, begun: bool
) -> tuple[str, str]:
    """What ran out with what in it, and the overrides that help, the most effective first.

    `held` is from `held_memory`, taken before anything was let go; `begun`: the run has checkpoints.
    """
    plan, shape = orders.plan, orders.shape
    there = ", ".join(f"{name} {size_in_words(size)}" for name, size in held.items())
    planned = "" if plan.memory is None else f"; {size_in_words(sum(plan.memory.values()))} were planned"
    message = f"out of memory in step {step + 1}: this rank held {there}{planned} ({_first_line(error)})"
    if shape is None:
        answers = ["train.micro_batch=1"] if plan.batch.micro_batch > 1 else []
        answers += ["train.gradient_checkpointing=true"] if plan.gradient_checkpointing is not True else []
    else:
        found = reliefs(plan, shape, begun=begun)[:MOST_ANSWERS]
        answers = [f"{each.overrides} (about {size_in_words(each.spared)} less)" for each in found]
    if not answers:
        return message, "nothing is left to change on this GPU: use more of them, or a smaller model"
    said = ", or ".join(answers)
    return message, f"run the same command with one of these, the most effective first: {said}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


def _optimizer_tensors(trainer: LauncherTrainer) -> Iterable[torch.Tensor]:
    """Moments, and DeepSpeed's fp32 copies of the weights, which are the parameters that it steps."""
    if trainer.optimizer is None:
        return
    weights = {id(parameter) for parameter in trainer.bare_model.parameters()}
    for parameter, state in innermost(trainer.optimizer).state.items():
        if id(parameter) not in weights:
            yield parameter
        yield from (own_part(value) for value in state.values() if isinstance(value, torch.Tensor))


def _bytes(tensors: Iterable[torch.Tensor], device: str) -> int:
    return sum(
        one.numel() * one.element_size() for one in map(own_part, tensors) if one.device.type == device
    )
