"""`accelerate.yaml`: how `accelerate launch` starts the ranks of one node, and with which engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from launcher.plan.choose import Plan
from launcher.plan.sharding import zero_stage

MIXED_PRECISION: Mapping[str, str] = {"fp32": "'no'", "bf16": "bf16", "fp16": "fp16"}


_COMPILED_LAYERS: Sequence[str] = (
    "dynamo_config:",
    "  dynamo_backend: INDUCTOR",
    "  # Layer by layer: compiled as a whole, it would not gather a layer's weights where they are needed.",
    "  dynamo_use_regional_compilation: true",
)


def render_accelerate(plan: Plan, deepspeed: str) -> str:
    """The YAML that `accelerate launch --config_file` reads, with every value written as itself.

    `deepspeed`: the path of `deepspeed.json`, named where the strategy is DeepSpeed's.
    """
    lines = [
        "compute_environment: LOCAL_MACHINE",
        *_engine(plan, deepspeed),
        f"num_machines: {plan.nodes}",
        f"num_processes: {plan.batch.world_size}",
        "machine_rank: 0",
        *_meeting(plan),
        "main_training_function: main",
        "debug: false",
    ]
    return "\n".join(lines) + "\n"


def _meeting(plan: Plan) -> list[str]:
    if plan.nodes > 1:
        # The nodes' launchers are told where to meet: see `launch.sh`.
        return ["rdzv_backend: static", "same_network: true"]
    return [
        "# 0: a free port is taken, so two runs on one machine never meet.",
        "main_process_port: 0",
        "rdzv_backend: static",
    ]


def _engine(plan: Plan, deepspeed: str) -> list[str]:
    mixed_precision = f"mixed_precision: {MIXED_PRECISION[plan.precision]}"
    on_cpu = f"use_cpu: {'true' if plan.device == 'cpu' else 'false'}"
    if zero_stage(plan.strategy) is not None:
        return [
            "distributed_type: DEEPSPEED",
            "deepspeed_config:",
            "  # Precision, batch and clipping are in it: accelerate takes them from one place or the other.",
            f"  deepspeed_config_file: {json.dumps(deepspeed, ensure_ascii=False)}",
            "  deepspeed_multinode_launcher: standard",
            "  zero3_init_flag: false",
            "# On a CPU too: with true, accelerate would start plain ranks, without DeepSpeed.",
            "use_cpu: false",
        ]
    if plan.strategy == "fsdp":
        engine = ["distributed_type: FSDP", "fsdp_config:", *_fsdp(plan), "use_cpu: false", mixed_precision]
        return [*engine, *_COMPILED_LAYERS] if plan.compile else engine
    if plan.batch.world_size == 1:
        return ["distributed_type: 'NO'", on_cpu, mixed_precision]
    if plan.device != "cpu":
        return ["distributed_type: MULTI_GPU", on_cpu, mixed_precision]
    return [
        "# accelerate starts one process per rank on a machine only under this name;",
        "# use_cpu keeps the ranks on the CPU, and they talk through gloo.",
        "distributed_type: MULTI_GPU",
        on_cpu,
        mixed_precision,
    ]


def _fsdp(plan: Plan) -> list[str]:
    return [
        "  fsdp_version: 2",
        "  # The model's own layers: transformers names them in its class.",
        "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
        "  fsdp_reshard_after_forward: true",
        f"  fsdp_offload_params: {'true' if plan.offload == 'parameters' else 'false'}",
        "  # Layers are recomputed by transformers: accelerate's own way draws other dropout masks again.",
        "  fsdp_activation_checkpointing: false",
        "  fsdp_state_dict_type: SHARDED_STATE_DICT",
        "  fsdp_cpu_ram_efficient_loading: false",
    ]
