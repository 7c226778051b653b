"""The live run against the plan, on every rank, before step 1: what was asked for is what runs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from launcher.errors import TrainingError
from launcher.plan.choose import Plan

if TYPE_CHECKING:
    from launcher.worker.trainer import LauncherTrainer

ENGINE: Mapping[tuple[str, bool], DistributedType] = {
    ("cpu", False): DistributedType.NO,
    ("cpu", True): DistributedType.MULTI_CPU,
    ("cuda", False): DistributedType.NO,
    ("cuda", True): DistributedType.MULTI_GPU,
}
MIXED: Mapping[str, str] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def verify(trainer: LauncherTrainer, plan: Plan, start_step: int) -> str:
    """Compare live objects with `plan`. Returns the one line that says all hold.

    Raises TrainingError listing every difference with both values.
    """
    accelerator, arguments, model = trainer.accelerator, trainer.args, trainer.bare_model
    engine = trainer.model_wrapped
    compiled = hasattr(engine, "_orig_mod")
    parallel = isinstance(engine._orig_mod if compiled else engine, DistributedDataParallel)
    pairs: dict[str, tuple[object, object]] = {
        "engine": (ENGINE[plan.device, plan.batch.world_size > 1], accelerator.distributed_type),
        "gradient all-reduce (DDP)": (plan.batch.world_size > 1, parallel),
        "world size": (plan.batch.world_size, accelerator.num_processes),
        "device": (plan.device, accelerator.device.type),
        "precision": (MIXED[plan.precision], accelerator.mixed_precision),
        "weights": ({torch.float32}, {parameter.dtype for parameter in model.parameters()}),
        "micro-batch": (plan.batch.micro_batch, trainer._train_batch_size),
        "accumulation": (plan.batch.accumulation, arguments.gradient_accumulation_steps),
        "steps": (plan.steps, trainer.state.max_steps),
        "gradient checkpointing": (plan.gradient_checkpointing, model.is_activation_checkpointing),
        "compile": (plan.compile, compiled),
        "samples of the first step": (
            trainer.phases.samples_of_step(start_step).tolist(),
            _live_samples(trainer, plan),
        ),
    }
    wrong = [
        f"{name}: planned {planned}, found {live}"
        for name, (planned, live) in pairs.items()
        if planned != live
    ]
    if wrong:
        raise TrainingError(
            f"rank {accelerator.process_index}: not what was planned; " + "; ".join(wrong),
            hint="report this with plan.json and the rank's log; nothing was trained",
        )
    ranks = accelerator.num_processes
    return f"verified: {len(pairs)} settings of the live run are the plan's, on {ranks} ranks"


def _live_samples(trainer: LauncherTrainer, plan: Plan) -> list[int]:
    """The sample ids that all ranks' live loaders are about to give out for one optimizer step."""
    loader = trainer.callback_handler.train_dataloader
    assert loader is not None
    mine = [sample for batch in islice(loader.batch_sampler, plan.batch.accumulation) for sample in batch]
    parts: list[list[int]] = [mine]
    if plan.batch.world_size > 1:
        parts = [[] for _ in range(plan.batch.world_size)]
        dist.all_gather_object(parts, mine)
    return sorted(sample for part in parts for sample in part)
