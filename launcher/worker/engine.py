"""The engine a strategy trains on: how its ranks meet, and what the Trainer is told of it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy

from launcher.plan.choose import Plan
from launcher.plan.sharding import zero_stage
from launcher.run.heartbeat import limits

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What each precision is called in a plan."""


def is_sharded(plan: Plan) -> bool:
    """Whether no rank holds the whole model's state: then only the engine can save and load it."""
    return plan.strategy != "ddp"


def meet(plan: Plan, timeout: float | None, environment: MutableMapping[str, str]) -> PartialState:
    """Join the other ranks, before anything else may choose how. `timeout`: seconds a collective may take;
    None: longer than any of the heartbeat's limits.

    transformers and accelerate start neither DeepSpeed nor FSDP on a CPU by themselves: they would train
    with plain DDP and say nothing. So the state is made here, as on a GPU, and TrainingArguments is told to
    keep it.
    """
    options: dict[str, Any] = {"timeout": patience(timeout, plan.checkpoint_bytes)}
    if plan.device != "cpu":
        return PartialState(**options)
    if plan.batch.world_size > 1 or zero_stage(plan.strategy) is not None:
        options["backend"] = "gloo"
    if zero_stage(plan.strategy) is None:
        state = PartialState(cpu=True, **options)
        if plan.strategy == "fsdp":
            # accelerate looks for its FSDP plugin under the accelerators' names only.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return state
    # Before DeepSpeed is imported, which looks for an accelerator as it is.
    environment["DS_ACCELERATOR"] = "cpu"
    environment["CUDA_VISIBLE_DEVICES"] = ""
    _talk_through_gloo()
    return PartialState(cpu=False, **options)


def patience(timeout: float | None, checkpoint: int | None) -> timedelta:
    """How long a collective waits; `checkpoint`: bytes of one. NCCL's own 10 minutes would end
    ranks that wait, with every right, for rank 0 to read a large checkpoint, or to upload the model."""
    return timedelta(seconds=2 * max(limits(checkpoint).values()) if timeout is None else timeout)


def engine_arguments(plan: Plan, deepspeed: Path) -> dict[str, Any]:
    """What TrainingArguments is told. FSDP's settings are in the environment, from `accelerate.yaml`."""
    if not is_sharded(plan):
        return {}
    kept: dict[str, Any] = {"use_configured_state": True}
    if zero_stage(plan.strategy) is not None:
        return {"accelerator_config": kept, "deepspeed": str(deepspeed)}
    # Or FSDP would gather up the whole gradient of every micro-batch but the last, unsharded.
    kept["gradient_accumulation_kwargs"] = {"sync_each_batch": True}
    return {"accelerator_config": kept}


def fsdp_policy(plan: Plan) -> MixedPrecisionPolicy:
    """What FSDP2 computes and reduces in. accelerate's own policy would round loss and gradients to half."""
    if plan.precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=DTYPES[plan.precision], reduce_dtype=torch.float32)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """A rank's own part of a tensor: FSDP's shard, ZeRO-3's partition, or the tensor."""
    sharded: Any = tensor
    if hasattr(sharded, "to_local"):
        return sharded.to_local()  # type: ignore[no-any-return]
    return getattr(sharded, "ds_tensor", tensor)


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """PyTorch's own optimizer inside what accelerate and DeepSpeed have wrapped it in."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def _talk_through_gloo() -> None:
    """Keep DeepSpeed from compiling a collective of its own for CPUs: 40 seconds, and a compiler at hand."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
