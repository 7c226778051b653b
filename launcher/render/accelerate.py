"""`accelerate.yaml`: how `accelerate launch` starts the ranks of one node."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.plan.choose import Plan

MIXED_PRECISION: Mapping[str, str] = {"fp32": "'no'", "bf16": "bf16", "fp16": "fp16"}


def render_accelerate(plan: Plan) -> str:
    """The YAML that `accelerate launch --config_file` reads, with every value written as itself."""
    lines = [
        "compute_environment: LOCAL_MACHINE",
        *_processes(plan),
        f"num_machines: {plan.nodes}",
        f"num_processes: {plan.batch.world_size}",
        "machine_rank: 0",
        "# 0: a free port is taken, so two runs on one machine never meet.",
        "main_process_port: 0",
        f"mixed_precision: {MIXED_PRECISION[plan.precision]}",
        "rdzv_backend: static",
        "main_training_function: main",
        "debug: false",
    ]
    return "\n".join(lines) + "\n"


def _processes(plan: Plan) -> list[str]:
    on_cpu = f"use_cpu: {'true' if plan.device == 'cpu' else 'false'}"
    if plan.batch.world_size == 1:
        return ["distributed_type: 'NO'", on_cpu]
    if plan.device == "cuda":
        return ["distributed_type: MULTI_GPU", on_cpu]
    return [
        "# accelerate starts one process per rank on a machine only under this name;",
        "# use_cpu keeps the ranks on the CPU, and they talk through gloo.",
        "distributed_type: MULTI_GPU",
        on_cpu,
    ]
