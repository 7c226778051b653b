"""`deepspeed.json`: the engine that shards a model's state, with every value a number.

DeepSpeed reads it through accelerate and through transformers, which compare what they were told with it and
stop where it differs. The optimizer and the schedule are the Trainer's own, as under DDP: written here,
transformers would give DeepSpeed every parameter in one group, and weight decay would reach norms and biases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from launcher.plan.buckets import Buckets, buckets
from launcher.plan.choose import Plan
from launcher.plan.shape import Shape
from launcher.plan.sharding import LOSS_SCALE_POWER, zero_stage

LOSS_SCALE: Mapping[str, int] = {
    "loss_scale": 0,
    "initial_scale_power": LOSS_SCALE_POWER,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
"""fp16's loss scale: dynamic (`loss_scale` 0), lowered by overflows and doubled after a thousand steps
without one, as in Micikevicius et al. 2018, "Mixed Precision Training", section 3.2."""


def render_deepspeed(plan: Plan, *, max_grad_norm: float, shape: Shape | None) -> str:
    """The JSON that `deepspeed.initialize` takes. `shape`: the model's, None for one that is not known.

    Raises ValueError for a strategy that is not DeepSpeed's.
    """
    stage = zero_stage(plan.strategy)
    if stage is None:
        raise ValueError(f"{plan.strategy} does not run on DeepSpeed")
    batch = plan.batch
    fields: dict[str, Any] = {
        "train_batch_size": batch.batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": plan.precision == "bf16"},
        "fp16": {"enabled": plan.precision == "fp16", **(LOSS_SCALE if plan.precision == "fp16" else {})},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": _zero(plan, stage, buckets(shape)),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": False},
        "wall_clock_breakdown": False,
    }
    return json.dumps(fields, indent=2) + "\n"


def _zero(plan: Plan, stage: int, sizes: Buckets) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": sizes.reduce_bucket_size,
        # A CPU has no second stream to overlap on.
        "overlap_comm": plan.device == "cuda",
    }
    if plan.offload != "none":
        fields["offload_optimizer"] = _offload(plan)
    if stage < 3:
        return {**fields, "allgather_partitions": True, "allgather_bucket_size": sizes.allgather_bucket_size}
    if plan.offload == "parameters":
        fields["offload_param"] = _offload(plan)
    return {
        **fields,
        "sub_group_size": sizes.sub_group_size,
        "stage3_prefetch_bucket_size": sizes.prefetch_bucket_size,
        "stage3_param_persistence_threshold": sizes.param_persistence_threshold,
        "stage3_max_live_parameters": sizes.max_live_parameters,
        "stage3_max_reuse_distance": sizes.max_reuse_distance,
        "stage3_gather_16bit_weights_on_model_save": False,
    }


def _offload(plan: Plan) -> dict[str, Any]:
    return {"device": "cpu", "pin_memory": plan.device == "cuda"}
