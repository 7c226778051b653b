"""The live run against the plan, on every rank, before step 1: what was asked for is what runs.

Each value is read from the object that acts on it: the engine, its optimizer, the model's own modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.nn.parallel import DistributedDataParallel

from launcher.config.schema import TrainSection
from launcher.data.store import MANIFEST
from launcher.errors import TrainingError
from launcher.plan.choose import Plan
from launcher.plan.orders import Orders
from launcher.plan.sharding import LOSS_SCALE_POWER, zero_stage
from launcher.run.directory import RunDirectory
from launcher.run.environment import versions
from launcher.worker.engine import DTYPES, fsdp_policy, innermost
from launcher.worker.fast import CAUSAL, taken_by
from launcher.worker.recomputing import as_compared, layers_of, recomputed
from launcher.worker.together import of_all_ranks, world_size

if TYPE_CHECKING:
    from launcher.worker.trainer import LauncherTrainer

MIXED: Mapping[str, str] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}

Facts = dict[str, object]


def verify(
    trainer: LauncherTrainer,
    directory: RunDirectory,
    orders: Orders,
    train: TrainSection,
    start_step: int,
    attention: str,
) -> str:
    """Compare live objects with the plan, and ranks with each other. Returns the one line that says all hold.

    `attention`: what transformers chose for the model when it was built. Raises TrainingError listing every
    difference with both values.
    """
    plan = orders.plan
    layers = len(layers_of(trainer.bare_model))
    asked = planned(orders, train, trainer.fell_back, layers, attention) | {
        "samples of the first step": trainer.phases.samples_of_step(start_step).tolist()
    }
    live = found(trainer) | {"samples of the first step": _live_samples(trainer, plan)}
    if start_step:
        asked, live = with_any_scale(asked), with_any_scale(live)
    rank = trainer.accelerator.process_index
    wrong = [
        f"{name}: planned {asked.get(name, 'nothing')}, found {live.get(name, 'nothing')}"
        for name in dict.fromkeys([*asked, *live])
        if asked.get(name) != live.get(name)
    ]
    if wrong:
        raise TrainingError(
            f"rank {rank}: not what was planned; " + "; ".join(wrong),
            hint="report this with plan.json and the rank's log; nothing was trained",
        )
    compare_ranks(identity(directory, orders))
    ranks = "1 rank" if plan.batch.world_size == 1 else f"{plan.batch.world_size} ranks"
    return "\n".join(
        [
            f"verified: {len(asked)} settings of the live run are the plan's, on {ranks}",
            *(f"not on a fast path: train.fast.{name}: {why}" for name, why in trainer.fell_back.items()),
        ]
    )


def planned(
    orders: Orders, train: TrainSection, fell_back: Mapping[str, str], layers: int, attention: str
) -> Facts:
    """What the plan says of everything that `found` reads, but for the fast paths that `fell_back`.

    `layers`: how many the live model has that can be checkpointed one by one. `attention`: the model's own,
    for a config that asks for none.
    """
    plan = orders.plan
    fast = sorted(set(plan.fast.taken) - fell_back.keys())
    stage = zero_stage(plan.strategy)
    # DeepSpeed holds the weights as it computes with them, and fp32 copies; the others cast on the way.
    weights = torch.float32 if stage is None else DTYPES[plan.precision]
    facts: Facts = {
        "engine": _planned_engine(plan),
        "world size": plan.batch.world_size,
        "device": plan.device,
        "weights": {weights},
        "optimizer's weights": {torch.float32},
        "micro-batch": plan.batch.micro_batch,
        "accumulation": plan.batch.accumulation,
        "gradient clipping": train.max_grad_norm,
        "weight decay": [train.weight_decay, 0.0],
        "steps": plan.steps,
        "gradient checkpointing": as_compared(plan.gradient_checkpointing, of=layers),
        "compile": plan.compile,
        "attention": CAUSAL
        if "causal_attention" in fast
        else orders.model.get("attn_implementation") or attention,
        "fast paths": fast,
        "loss scale": f"dynamic, from {2**LOSS_SCALE_POWER}" if plan.precision == "fp16" else None,
    }
    if plan.strategy == "fsdp":
        facts |= {"mixed precision": {fsdp_policy(plan)}, "offloaded": plan.offload}
    if stage is None:
        return facts | {"precision": MIXED[plan.precision]}
    return facts | {
        "ZeRO stage": stage,
        "offloaded": plan.offload,
        "batch": plan.batch.batch_size,
        "gradients": torch.float32,
    }


def _planned_engine(plan: Plan) -> str:
    if zero_stage(plan.strategy) is not None:
        return "DeepSpeed"
    if plan.strategy == "fsdp":
        return "FSDP2"
    return "DDP" if plan.batch.world_size > 1 else "one process"


def found(trainer: LauncherTrainer) -> Facts:
    """The same of the live run."""
    accelerator, arguments, model = trainer.accelerator, trainer.args, trainer.bare_model
    wrapped = trainer.model_wrapped
    engine: Any = wrapped._orig_mod if hasattr(wrapped, "_orig_mod") else wrapped
    facts: Facts = {
        "engine": _engine(engine),
        "world size": world_size(),
        "device": accelerator.device.type,
        "weights": {parameter.dtype for parameter in model.parameters()},
        "optimizer's weights": {parameter.dtype for parameter in _optimized(trainer)},
        "micro-batch": trainer._train_batch_size,
        "accumulation": arguments.gradient_accumulation_steps,
        "gradient clipping": arguments.max_grad_norm,
        "weight decay": [group["weight_decay"] for group in innermost(trainer.optimizer).param_groups],
        "steps": trainer.state.max_steps,
        "gradient checkpointing": recomputed(model),
        "compile": _is_compiled(wrapped),
        "attention": model.config._attn_implementation,
        "fast paths": sorted(_fast_paths(trainer)),
        "loss scale": _loss_scale(trainer),
    }
    if facts["engine"] == "FSDP2":
        facts |= _fsdp(engine)
    if facts["engine"] != "DeepSpeed":
        return facts | {"precision": accelerator.mixed_precision}
    return facts | _deepspeed(engine)


def _fast_paths(trainer: LauncherTrainer) -> set[str]:
    """Those of the model itself, of the optimizer that steps it, and of the GPU's matrix products."""
    taken = taken_by(trainer.bare_model)
    if innermost(trainer.optimizer).param_groups[0].get("fused"):
        taken.add("fused_adamw")
    if trainer.args.device.type == "cuda" and torch.get_float32_matmul_precision() == "high":
        taken.add("tf32")
    return taken


def _engine(engine: torch.nn.Module) -> str:
    if isinstance(engine, DistributedDataParallel):
        return "DDP"
    if isinstance(engine, FSDPModule):
        return "FSDP2"
    return "DeepSpeed" if _is_deepspeed(engine) else "one process"


def _is_compiled(wrapped: torch.nn.Module) -> bool | str:
    """Whether torch.compile is around the engine, as under DDP, in DeepSpeed's, or around FSDP2's layers."""
    if hasattr(wrapped, "_orig_mod") or getattr(wrapped, "is_compiled", False):
        return True
    layers = [each for each in wrapped.modules() if isinstance(each, FSDPModule) and each is not wrapped]
    compiled = sum(layer._compiled_call_impl is not None for layer in layers)
    return "in some layers" if 0 < compiled < len(layers) else compiled > 0


def _is_deepspeed(engine: torch.nn.Module) -> bool:
    """By name: importing DeepSpeed takes seconds, and an engine of its can only come of having done so."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(engine).__mro__)


def _deepspeed(engine: Any) -> Facts:
    """What DeepSpeed's engine itself goes by, whatever the Trainer believes."""
    zero = engine._config.zero_config
    return {
        "micro-batch": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(),
        "batch": engine.train_batch_size(),
        "gradient clipping": getattr(engine.optimizer, "clip_grad", None),
        "ZeRO stage": engine.zero_optimization_stage(),
        "gradients": engine.get_data_types()[1],
        "offloaded": "parameters"
        if zero.offload_param is not None and zero.offload_param.device != "none"
        else "optimizer"
        if zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
        else "none",
    }


def _fsdp(engine: torch.nn.Module) -> Facts:
    """What each group of weights that FSDP2 shards by itself goes by."""
    states = [module._get_fsdp_state() for module in engine.modules() if isinstance(module, FSDPModule)]
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    offloaded = [group for group in groups if isinstance(group.offload_policy, CPUOffloadPolicy)]
    return {
        "mixed precision": {group.mp_policy for group in groups},
        "offloaded": "none"
        if not offloaded
        else "parameters"
        if len(offloaded) == len(groups)
        else "some parameters",
    }


def _optimized(trainer: LauncherTrainer) -> Iterator[torch.Tensor]:
    """The tensors that the innermost optimizer steps: the model's own, or DeepSpeed's copies of a shard."""
    optimizer: Any = getattr(trainer.model_wrapped, "optimizer", trainer.optimizer)
    for shards in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):  # ZeRO-1 and 2, ZeRO-3
        if hasattr(optimizer, shards):
            yield from getattr(optimizer, shards)
            return
    for group in innermost(optimizer).param_groups:
        yield from group["params"]


def _loss_scale(trainer: LauncherTrainer) -> str | None:
    """How small gradients are kept from vanishing in fp16; None where the loss is not scaled."""
    scaler: Any = trainer.accelerator.scaler
    optimizer: Any = getattr(trainer.model_wrapped, "optimizer", None)
    if scaler is not None and scaler.is_enabled():
        return f"dynamic, from {scaler.get_scale():.0f}"
    if not getattr(optimizer, "dynamic_loss_scale", False):
        return None
    return f"dynamic, from {optimizer.cur_scale:.0f}"


def with_any_scale(facts: Facts) -> Facts:
    """Where a run goes on, its checkpoint says what the loss scale has become: only that it moves is left."""
    scale = facts["loss scale"]
    return facts | {"loss scale": None if scale is None else "dynamic"}


def _live_samples(trainer: LauncherTrainer, plan: Plan) -> list[int]:
    """The sample ids that all ranks' live loaders are about to give out for one optimizer step."""
    loader = trainer.callback_handler.train_dataloader
    assert loader is not None
    mine = [sample for batch in islice(loader.batch_sampler, plan.batch.accumulation) for sample in batch]
    return sorted(sample for part in of_all_ranks(mine) for sample in part)


def identity(directory: RunDirectory, orders: Orders) -> dict[str, str | None]:
    """What must be the same on every rank: versions, and the files that say what to do, with which text."""
    files = [directory.config, directory.orders]
    files += [directory.deepspeed] if zero_stage(orders.plan.strategy) else []
    files += [directory.stream if orders.store is None else Path(orders.store) / MANIFEST]
    return {
        **{f"version of {name}": version for name, version in versions().items()},
        **{f"sha256 of {file.name}": sha256(file.read_bytes()).hexdigest() for file in files},
    }


def compare_ranks(mine: Mapping[str, str | None]) -> None:
    """Raise TrainingError, on every rank, naming each rank that differs from rank 0 and in what."""
    first, *others = of_all_ranks(dict(mine))
    wrong = [
        f"{name}: rank 0 has {first.get(name)}, rank {rank} has {theirs.get(name)}"
        for rank, theirs in enumerate(others, 1)
        for name in dict.fromkeys([*first, *theirs])
        if theirs.get(name) != first.get(name)
    ]
    if wrong:
        raise TrainingError(
            "ranks differ; " + "; ".join(wrong),
            hint="install the same versions on every node, and give all of them one run directory",
        )
