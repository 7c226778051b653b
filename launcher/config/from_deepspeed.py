"""A DeepSpeed JSON in launcher's words.

Keys, defaults and meanings are those of deepspeed 0.19: `runtime/config.py`, `runtime/zero/config.py`,
`runtime/precision_config.py` and `runtime/lr_schedules.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from launcher.config.document import Document, Value
from launcher.config.faults import shown
from launcher.config.old_file import AUTO, Known, NotDone, OldFile

_TRAINER_SAID = "the training arguments said it: set"
_FOLLOWS = "launcher works it out"
_SIZES = "launcher chooses bucket sizes from the model"
_TUNING = "launcher sets how the engine moves and keeps the state"
_SCALE = "launcher sets fp16's loss scale: dynamic, from 2^16"
_WATCHING = "it changes what DeepSpeed prints: launcher has metrics.jsonl, train.log_every and report_to"
_OFF = "it tunes what is off"
_TAKE_OUT = "take it out, and see that the run does without it"

ZERO_STAGES: Mapping[int, str] = {1: "zero1", 2: "zero2", 3: "zero3"}
SCHEDULES: Mapping[str, str] = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}

KNOWN: Final[Known] = {
    "zero_optimization": _TUNING,
    **{
        f"zero_optimization.{name}": _SIZES
        for name in (
            *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "prefetch_bucket_size"),
            *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
            *("stage3_max_live_parameters", "stage3_max_reuse_distance", "param_persistence_threshold"),
            *("max_live_parameters", "max_reuse_distance", "model_persistence_threshold"),
        )
    },
    "zero_optimization.zero_hpz_partition_size": NotDone("ZeRO++", _TAKE_OUT, (0, 1)),
    "zero_optimization.zero_quantized_weights": NotDone("ZeRO++", _TAKE_OUT),
    "zero_optimization.zero_quantized_gradients": NotDone("ZeRO++", _TAKE_OUT),
    "zero_optimization.zero_quantized_nontrainable_weights": NotDone("ZeRO++", _TAKE_OUT),
    "zero_optimization.zeropp_loco_param": NotDone("ZeRO++", _TAKE_OUT),
    "zero_optimization.mics_shard_size": NotDone("MiCS", _TAKE_OUT, (-1, 0)),
    "zero_optimization.mics_hierarchical_params_gather": NotDone("MiCS", _TAKE_OUT),
    "zero_optimization.zenflow": NotDone("ZenFlow", _TAKE_OUT),
    "zero_optimization.leaf_module": NotDone("mixture-of-experts training", _TAKE_OUT),
    "zero_optimization.offload_optimizer.ratio": NotDone("partial offload", "set it to 1", (1,)),
    "zero_optimization.offload_optimizer.super_offload": NotDone("SuperOffload", _TAKE_OUT),
    "fp16": _SCALE,
    "fp16.loss_scale": NotDone("fixed loss scale", "set it to 0: dynamic", (0, AUTO)),
    "fp16.fp16_master_weights_and_grads": NotDone("training without fp32 master weights", _TAKE_OUT),
    "bf16": "launcher sets what bf16 needs",
    "bf16.bf16_master_weights_and_grads": NotDone("training without fp32 master weights", _TAKE_OUT),
    "bf16.bf16_optimizer_states": NotDone("bf16 optimizer state", _TAKE_OUT),
    "optimizer.params": "launcher's AdamW has no such setting",
    "optimizer.params.torch_adam": "launcher chooses AdamW's implementation",
    "optimizer.params.fused": "launcher chooses AdamW's implementation",
    "optimizer.params.bias_correction": NotDone("AdamW without bias correction", _TAKE_OUT, (True,)),
    "optimizer.params.amsgrad": NotDone("AMSGrad", _TAKE_OUT),
    "optimizer.legacy_fusion": "launcher chooses AdamW's implementation",
    "scheduler": "launcher's schedules have no such setting",
    "scheduler.params.warmup_min_lr": NotDone("warmup from above zero", "set it to 0", (0, AUTO)),
    "scheduler.params.warmup_min_ratio": NotDone("warmup from above zero", "set it to 0", (0, AUTO)),
    "scheduler.params.cos_min_ratio": NotDone(
        "cosine that ends above zero", "set it to 0: train.schedule falls to zero", (0, 0.0001, AUTO)
    ),
    "scheduler.params.warmup_type": NotDone("logarithmic warmup", "set it to linear", ("linear", AUTO)),
    "data_types": "launcher sets the number formats from train.precision",
    "data_types.grad_accum_dtype": NotDone(
        "gradients accumulated below fp32", "set it to fp32", ("fp32", None)
    ),
    "torch_autocast": _OFF,
    "torch_autocast.enabled": NotDone("torch_autocast under DeepSpeed", "set bf16 or fp16 instead"),
    "amp": _OFF,
    "amp.enabled": NotDone("apex amp", "set bf16 or fp16 instead"),
    "communication_data_type": "gradients are reduced in the format that train.precision gives",
    "prescale_gradients": NotDone("prescaled gradients", _TAKE_OUT),
    "gradient_predivide_factor": NotDone("predivided gradients", _TAKE_OUT, (1,)),
    "gradient_allreduce_op": NotDone("sum of gradients over the ranks", "leave it at mean", ("mean",)),
    "sparse_gradients": NotDone("sparse gradients", _TAKE_OUT),
    "sequence_parallel_size": NotDone("sequence parallelism", "set it to 1", (0, 1)),
    "tensor_parallel": _OFF,
    "tensor_parallel.autotp_size": NotDone("tensor parallelism", "set it to 0", (0, 1)),
    "tensor_parallel.tp_size": NotDone("tensor parallelism", "set it to 1", (0, 1)),
    "tensor_parallel.tp.tp_size": NotDone("tensor parallelism", "set it to 1", (0, 1)),
    "pipeline": NotDone("pipeline parallelism", _TAKE_OUT),
    "pipeline.stages": NotDone("pipeline parallelism", _TAKE_OUT, (AUTO, 0, 1, None)),
    "expert_parallel": NotDone("expert parallelism", _TAKE_OUT),
    "moe": NotDone("mixture-of-experts training", _TAKE_OUT),
    "use_data_before_expert_parallelism": NotDone("expert parallelism", _TAKE_OUT),
    "sparse_attention": NotDone("sparse attention", _TAKE_OUT),
    "compression_training": NotDone("compression while training", _TAKE_OUT),
    **{
        key: why
        for name, what in (
            ("curriculum_learning", "curriculum learning"),
            ("data_efficiency", "data-efficiency library"),
            ("progressive_layer_drop", "progressive layer drop"),
            ("quantize_training", "quantised training"),
            ("elasticity", "elastic batch size (train.batch_size never changes with the ranks)"),
            ("hybrid_engine", "hybrid engine"),
            ("eigenvalue", "eigenvalue computation"),
            ("autotuning", "autotuning (it plans with train.micro_batch auto)"),
        )
        for key, why in ((name, _OFF), (f"{name}.enabled", NotDone(what, "set it to false")))
    },
    "activation_checkpointing": "it tunes deepspeed.checkpointing, which Hugging Face models do not call; "
    "train.gradient_checkpointing recomputes activations",
    **dict.fromkeys(
        (
            *("steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "log_level"),
            *("flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "timers"),
            "monitor_config",
        ),
        _WATCHING,
    ),
    **dict.fromkeys(
        ("checkpoint", "nebula", "use_node_local_storage"), "launcher saves: see checkpoint.every"
    ),
    **dict.fromkeys(
        ("aio", "disable_allgather", "disable_python_gc", "check_overflow", "compile", "comms_config"),
        _TUNING,
    ),
    "zero_allow_untested_optimizer": "launcher sets it",
    "zero_force_ds_cpu_optimizer": "launcher sets it",
    "dataloader_drop_last": "which text is in which step follows from seed and train.batch_size alone",
}


def read_deepspeed(document: Document) -> OldFile:
    """What a DeepSpeed JSON says."""
    old = OldFile(document)
    old.sections("zero_optimization", "bf16", "fp16", "optimizer", "optimizer.params")
    old.sections("scheduler", "scheduler.params")
    _batch(old)
    _zero(old)
    _precision(old)
    if not old.has("gradient_clipping"):
        old.default("train.max_grad_norm", 1.0, "gradient_clipping")
    clip = old.number("gradient_clipping", f"{_TRAINER_SAID} train.max_grad_norm")
    if clip is not None:
        old.say("train.max_grad_norm", clip, "gradient_clipping")
    _optimizer(old)
    _scheduler(old)
    old.rest(KNOWN)
    return old


def _batch(old: OldFile) -> None:
    for key, target in (
        ("train_batch_size", "train.batch_size"),
        ("train_micro_batch_size_per_gpu", "train.micro_batch"),
        ("gradient_accumulation_steps", "accumulation"),
    ):
        asked = old.has(key)
        auto = "set train.batch_size, over all ranks" if key == "train_batch_size" else _FOLLOWS
        value = old.count(key, auto)
        if value is not None:
            old.say(target, value, key)
        elif asked:
            old.say(f"unknown.{target}", True, key)


def _zero(old: OldFile) -> None:
    if not old.has("zero_optimization"):
        old.default("train.strategy", "ddp", "zero_optimization")  # stage 0, which shares nothing
        return
    key = "zero_optimization.stage"
    stage = old.take(key)
    if isinstance(stage, int) and not isinstance(stage, bool) and stage in ZERO_STAGES:
        old.say("train.strategy", ZERO_STAGES[stage], key)
    elif stage in (None, 0) and not isinstance(stage, bool):
        said = "is DeepSpeed's default" if stage is None else "shares nothing among the ranks"
        hint = (
            "set stage 1, 2 or 3; or take zero_optimization out, and set train.strategy: ddp in the run file"
        )
        old.refuse(key, f"stage 0 {said}, and launcher has no DeepSpeed without sharding", hint)
    else:
        old.refuse(key, f"expected 1, 2 or 3, got {shown(stage)}", "DeepSpeed has ZeRO stages 0 to 3")
    optimizer = _device(old, "offload_optimizer", "cpu_offload")
    parameters = _device(old, "offload_param", "cpu_offload_param", "cpu_offload_params")
    say_offload(old, optimizer, parameters)


def _device(old: OldFile, section: str, *flags: str) -> tuple[str, bool] | None:
    """The key that says whether a part of the state is kept in CPU memory, and whether it is."""
    for flag in flags:  # how DeepSpeed before 0.4 wrote it
        key = f"zero_optimization.{flag}"
        if old.has(key) and (on := old.flag(key)) is not None:
            return key, on
    key = f"zero_optimization.{section}.device"
    return read_device(old, key) if old.has(key) else None


def read_device(old: OldFile, key: str) -> tuple[str, bool] | None:
    """Whether the offload device at `key` is the CPU; None, and refused, for what launcher does not do."""
    device = old.take(key)
    if device in ("cpu", "none", None):
        return key, device == "cpu"
    hint = "set cpu, or none"
    if device == "nvme":
        old.refuse(key, "launcher does not offload to NVMe", hint)
    else:
        old.refuse(key, f"expected cpu or none, got {shown(device)}", hint)
    return None


def say_offload(
    old: OldFile, optimizer: tuple[str, bool] | None, parameters: tuple[str, bool] | None
) -> None:
    """train.offload, of which `parameters` moves the optimizer too."""
    if parameters is not None and parameters[1]:
        old.say("train.offload", "parameters", parameters[0])
        if optimizer is None or not optimizer[1]:
            old.leave(parameters[0], "train.offload: parameters moves the optimizer's state as well")
        else:
            old.leave(optimizer[0], "train.offload: parameters says it too")
    elif optimizer is not None:
        old.say("train.offload", "optimizer" if optimizer[1] else "none", optimizer[0])
        if parameters is not None:
            old.leave(parameters[0], "it is off")
    elif parameters is not None:
        old.say("train.offload", "none", parameters[0])


def _precision(old: OldFile) -> None:
    on: list[str] = []
    for name, key in (("bf16", "bf16.enabled"), ("bf16", "bfloat16.enabled"), ("fp16", "fp16.enabled")):
        if not old.has(key):
            continue
        value = old.take(key)
        if value == AUTO:
            old.leave(key, f"auto: {_TRAINER_SAID} train.precision")
            old.say("unknown.train.precision", True, key)
        elif value is True:
            on.append(key)
            old.say("train.precision", name, key)
        elif value is False:
            old.say(f"off.{name}", True, key)
        else:
            old.refuse(key, f"expected true, false or auto, got {shown(value)}", "write true or false")


def _optimizer(old: OldFile) -> None:
    kind = old.take("optimizer.type")
    if str(kind).lower() in {"adamw", "adam"}:
        _defaults_of_adamw(old)
    if kind is not None and str(kind).lower() not in {"adamw", "adam", AUTO}:
        hint = "set AdamW, and see that the learning rate suits it"
        old.refuse("optimizer.type", f"launcher trains with AdamW, not {shown(kind)}", hint)
    elif kind is not None:
        old.leave("optimizer.type", "launcher always trains with AdamW, as DeepSpeed does under either name")
    if old.flag("optimizer.params.adam_w_mode") is False:
        hint = "take it out: weight decay is then decoupled"
        old.refuse("optimizer.params.adam_w_mode", "launcher has no Adam with L2 regularisation", hint)
    for name, target in (
        ("lr", "train.learning_rate"),
        ("weight_decay", "train.weight_decay"),
        ("eps", "train.extra.adam_epsilon"),
    ):
        key = f"optimizer.params.{name}"
        value = old.number(key, f"{_TRAINER_SAID} {target}")
        if value is not None:
            old.say(target, float(value), key)
            if name == "weight_decay" and value:
                old.leave(
                    key, "launcher leaves biases and norms out of it, which DeepSpeed's optimizer does not"
                )
    _betas(old, "optimizer.params.betas")


def _defaults_of_adamw(old: OldFile) -> None:
    """What DeepSpeed's own AdamW takes where it is told nothing (`ops/adam`), or PyTorch's."""
    key = "optimizer.params.torch_adam"
    torchs = old.flag(key)
    if torchs is not None:
        old.leave(key, "launcher chooses AdamW's implementation")
    taken: tuple[tuple[str, str, Value], ...] = (
        ("lr", "train.learning_rate", 0.001),
        ("weight_decay", "train.weight_decay", 0.01 if torchs else 0.0),
        ("betas", "train.betas", [0.9, 0.999]),
    )
    for name, target, value in taken:
        if not old.has(f"optimizer.params.{name}"):
            old.default(target, value, f"optimizer.params.{name}")


def _betas(old: OldFile, key: str) -> None:
    betas = old.take(key)
    if betas == AUTO or (isinstance(betas, list) and betas and all(each == AUTO for each in betas)):
        old.leave(key, f"auto: {_TRAINER_SAID} train.betas")
    elif isinstance(betas, list) and len(betas) == 2 and all(_is_number(each) for each in betas):
        old.say("train.betas", betas, key)
    elif betas is not None:
        old.refuse(key, f"expected two numbers, got {shown(betas)}", "write them like [0.9, 0.95]")


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scheduler(old: OldFile) -> None:
    kind = old.take("scheduler.type")
    if kind is None:
        return
    key = "scheduler.type"
    if kind == AUTO:
        old.leave(key, f"auto: {_TRAINER_SAID} train.schedule")
    elif isinstance(kind, str) and kind in SCHEDULES:
        old.say("train.schedule", SCHEDULES[kind], key)
        _warmup(old, kind)
    else:
        hint = f"set one of {', '.join(SCHEDULES)}"
        old.refuse(key, f"launcher has no schedule like {shown(kind)}", hint)


def _warmup(old: OldFile, kind: str) -> None:
    params = "scheduler.params"
    peak_said = old.has(f"{params}.warmup_max_lr")
    peak = old.number(f"{params}.warmup_max_lr", f"{_TRAINER_SAID} train.learning_rate")
    if peak is not None:
        old.say("train.learning_rate", float(peak), f"{params}.warmup_max_lr")
    elif kind == "WarmupDecayLR" and not peak_said:
        old.say("train.learning_rate", 0.001, "scheduler.type")  # DeepSpeed's default: optimizer.lr is unused
    if old.has(f"{params}.warmup_num_steps"):
        steps = old.count(f"{params}.warmup_num_steps", f"{_TRAINER_SAID} train.warmup")
        if steps is not None:
            old.say("train.warmup", steps, f"{params}.warmup_num_steps")
    else:
        old.say("train.warmup", 1000, "scheduler.type")  # DeepSpeed's default
    total = old.count(
        f"{params}.total_num_steps", f"{_TRAINER_SAID} train.tokens, train.steps or train.epochs"
    )
    if total is not None:
        old.say("train.steps", total, f"{params}.total_num_steps")
    if not old.has(f"{params}.warmup_type"):
        old.leave("scheduler.type", "its warmup is logarithmic unless told otherwise; launcher's is linear")
