"""An accelerate YAML in launcher's words.

Keys, defaults and meanings are those of accelerate 1.15: `commands/config/config_args.py`,
`commands/launch.py` and `utils/dataclasses.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from launcher.config.document import Document
from launcher.config.faults import shown
from launcher.config.from_deepspeed import ZERO_STAGES, read_device, say_offload
from launcher.config.old_file import Known, NotDone, OldFile

_STARTS = "launcher starts the ranks itself, and tells them where to meet"
_WRAPS = "launcher wraps the model's own layers, and sets how they are loaded, saved and fetched"
_COMPILES = "launcher sets how torch.compile is called"
_TAKE_OUT = "take it out, and see that the run does without it"
_TPU = NotDone("TPU support", _TAKE_OUT)
_FP8 = NotDone("fp8 training", "set mixed_precision: bf16")

PRECISIONS: Mapping[str, str] = {
    "no": "fp32",
    "false": "fp32",
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
}
SHARDS_ALL = ("full_shard", "1", "true")

KNOWN: Final[Known] = {
    "compute_environment": NotDone("SageMaker support", "set LOCAL_MACHINE", ("LOCAL_MACHINE",)),
    **dict.fromkeys(
        (
            *("machine_rank", "main_process_ip", "main_process_port", "rdzv_backend", "same_network"),
            *("main_training_function", "mpirun_config", "enable_cpu_affinity", "debug"),
        ),
        _STARTS,
    ),
    "gpu_ids": "launcher takes the GPUs it sees: set CUDA_VISIBLE_DEVICES to see fewer",
    "deepspeed_config": "launcher writes DeepSpeed's file and sets this",
    "deepspeed_config.deepspeed_moe_layer_cls_names": NotDone("mixture-of-experts training", _TAKE_OUT),
    "fsdp_config": _WRAPS,
    "fsdp_config.fsdp_activation_checkpointing_offload": NotDone("offload of activations", "set it to false"),
    "fsdp_config.fsdp_ignored_modules": NotDone("modules left out of sharding", _TAKE_OUT),
    "dynamo_config": _COMPILES,
    "fp8_config": _FP8,
    "megatron_lm_config": NotDone("Megatron-LM engine", "set distributed_type to one that launcher has"),
    "parallelism_config": "launcher shares the model's state over all ranks",
    **{
        f"parallelism_config.parallelism_config_{name}_size": NotDone(what, "set it to 1", (0, 1))
        for name, what in (
            ("tp", "tensor parallelism"),
            ("cp", "context parallelism"),
            ("sp", "sequence parallelism"),
            ("pp", "pipeline parallelism"),
            ("ep", "expert parallelism"),
            ("dp_replicate", "sharding within groups of ranks"),
        )
    },
    **dict.fromkeys(
        (
            *(
                "downcast_bf16",
                "tpu_name",
                "tpu_zone",
                "tpu_use_cluster",
                "tpu_use_sudo",
                "tpu_vm",
                "tpu_env",
            ),
            *("command_file", "commands"),
        ),
        _TPU,
    ),
    "ipex_config": NotDone("Intel extension", _TAKE_OUT),
}

_PREFIXED: Mapping[str, str] = {
    "fsdp_config": "fsdp_",
    "dynamo_config": "dynamo_",
    "parallelism_config": "parallelism_config_",
}


def read_accelerate(document: Document) -> OldFile:
    """What an accelerate YAML says."""
    old = OldFile(document, _canonical)
    old.sections("deepspeed_config", "fsdp_config", "dynamo_config", "parallelism_config")
    _ranks(old)
    _engine(old)
    _precision(old)
    _compile(old)
    old.rest(KNOWN)
    return old


def _canonical(key: str) -> str:
    """accelerate takes the keys of some sections with and without the section's prefix."""
    section, dot, name = key.partition(".")
    prefix = _PREFIXED.get(section, "")
    return key if name.startswith(prefix) or not dot else f"{section}.{prefix}{name}"


def _ranks(old: OldFile) -> None:
    nodes = old.count("num_machines", "set nodes in the cluster file")
    if nodes is not None:
        old.say("cluster.nodes", nodes, "num_machines")
    key = "num_processes"
    ranks = old.take(key)
    if ranks == -1:
        old.leave(key, "-1: accelerate takes it for unset")
    elif isinstance(ranks, bool) or (ranks is not None and not isinstance(ranks, int)):
        old.refuse(key, f"expected a whole number, got {shown(ranks)}", "write how many ranks there are")
    elif ranks is not None and (ranks < 1 or ranks % (nodes or 1)):
        hint = "write the ranks of all machines together, as many on each"
        message = f"{ranks} ranks cannot be shared evenly by {nodes or 1} machines"
        old.refuse(key, f"{message}: accelerate would start {ranks // (nodes or 1)} on each", hint)
    elif ranks is not None:
        old.say("world", ranks, key)
        old.say("cluster.gpus_per_node", ranks // (nodes or 1), key)
    if old.has("use_cpu"):
        if old.flag("use_cpu"):
            old.say("cluster.gpu", "cpu", "use_cpu")
        else:
            old.leave(
                "use_cpu", "it is so without it: launcher takes the GPUs it finds, or the cluster file's gpu"
            )


def _engine(old: OldFile) -> None:
    key = "distributed_type"
    written = old.take(key)
    kind = "NO" if written is False else str(written).upper()
    if written is None:
        hint = "set DEEPSPEED, FSDP, MULTI_GPU, MULTI_CPU or NO"
        old.refuse(key, "it is not set, and accelerate takes no file without it", hint)
    elif kind == "DEEPSPEED":
        _deepspeed(old, key)
    elif kind == "FSDP":
        _fsdp(old, key)
    elif kind in {"MULTI_GPU", "MULTI_CPU"}:
        old.say("train.strategy", "ddp", key)
        if kind == "MULTI_CPU":
            old.say("cluster.gpu", "cpu", key)
    elif kind == "NO":
        old.say("world", 1, key)
    else:
        hint = "set DEEPSPEED, FSDP, MULTI_GPU, MULTI_CPU or NO"
        old.refuse(key, f"launcher has no engine for {kind}", hint)
    for section, name in (("deepspeed_config", "DEEPSPEED"), ("fsdp_config", "FSDP")):
        if kind != name and old.asks(section):
            hint = f"set distributed_type: {name}, or take {section} out"
            old.refuse(section, f"under distributed_type {kind} accelerate does not use it", hint)


def _deepspeed(old: OldFile, distributed_type: str) -> None:
    section = "deepspeed_config"
    file = old.take(f"{section}.deepspeed_config_file")
    if file is not None:
        old.say("deepspeed_file", file, f"{section}.deepspeed_config_file")
    key = f"{section}.zero_stage"
    stage = old.take(key)
    if stage is None and file is None:
        old.say("train.strategy", "zero2", distributed_type)  # accelerate's default
    else:
        old.leave(distributed_type, "train.strategy follows from the ZeRO stage")
    if isinstance(stage, int) and not isinstance(stage, bool) and stage in ZERO_STAGES:
        old.say("train.strategy", ZERO_STAGES[stage], key)
    elif stage is not None:
        hint = "set 1, 2 or 3; or distributed_type: MULTI_GPU, which is launcher's ddp"
        old.refuse(key, f"launcher has no ZeRO stage {shown(stage)}", hint)
    devices = [
        read_device(old, f"{section}.{name}") if old.has(f"{section}.{name}") else None
        for name in ("offload_optimizer_device", "offload_param_device")
    ]
    say_offload(old, *devices)
    key = f"{section}.gradient_accumulation_steps"
    asked = old.has(key)
    steps = old.count(key, "launcher works it out")
    if steps is not None:
        old.say("accumulation", steps, key)
    elif asked:
        old.say("unknown.accumulation", True, key)
    clip = old.number(f"{section}.gradient_clipping", "set train.max_grad_norm")
    if clip is not None:
        old.say("train.max_grad_norm", clip, f"{section}.gradient_clipping")


def _fsdp(old: OldFile, distributed_type: str) -> None:
    section = "fsdp_config"
    old.say("train.strategy", "fsdp", distributed_type)
    version = old.take(f"{section}.fsdp_version")
    if version in (None, 1):
        where = distributed_type if version is None else f"{section}.fsdp_version"
        old.leave(where, "it is FSDP1, which launcher trains as FSDP2")
    elif version == 2:
        old.leave(f"{section}.fsdp_version", "launcher's fsdp is FSDP2")
    else:
        old.refuse(f"{section}.fsdp_version", f"expected 1 or 2, got {shown(version)}", "set 2")
    for name in ("fsdp_sharding_strategy", "fsdp_reshard_after_forward"):
        key = f"{section}.{name}"
        if not old.has(key):
            continue
        shards = old.take(key)
        if str(shards).lower() in SHARDS_ALL:
            old.leave(key, "launcher's fsdp always shares parameters, gradients and optimizer state")
        else:
            hint = "set FULL_SHARD (FSDP2: true); zero2 is the strategy that keeps whole parameters"
            old.refuse(key, f"launcher's fsdp shares everything over all ranks, not {shown(shards)}", hint)
    key = f"{section}.fsdp_offload_params"
    if old.has(key) and (offloads := old.flag(key)) is not None:
        old.say("train.offload", "parameters" if offloads else "none", key)
    key = f"{section}.fsdp_activation_checkpointing"
    if old.has(key) and (recomputes := old.flag(key)) is not None:
        old.say("train.gradient_checkpointing", recomputes, key)


def _precision(old: OldFile) -> None:
    key = "mixed_precision"
    if (half := old.flag("fp16")) is not None:  # how accelerate before 0.8 wrote it
        old.say("train.precision", "fp16" if half else "fp32", "fp16")
    value = old.take(key)
    if value is None:
        return
    precision = PRECISIONS.get(str(value).lower())
    if precision is None:
        old.refuse(key, f"launcher does not train in {shown(value)}", "set bf16, fp16 or 'no'")
    else:
        old.say("train.precision", precision, key)


def _compile(old: OldFile) -> None:
    for key in ("dynamo_backend", "dynamo_config.dynamo_backend"):
        backend = old.take(key)
        if backend is None:
            continue
        name = str(backend).lower()
        if name in {"no", "false", "inductor"}:
            old.say("train.compile", name == "inductor", key)
        else:
            old.refuse(key, f"launcher compiles with inductor, not {shown(backend)}", "set INDUCTOR or 'NO'")
