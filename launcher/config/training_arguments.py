"""The fields of transformers' TrainingArguments: those that launcher sets itself, and all the others.

Kept as data because the control half never imports transformers; a test compares it with the
installed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

_BATCH = "set train.batch_size and train.micro_batch: accumulation follows from them"
_EVERY_SAVE = "set checkpoint.every"
_LENGTH = "set one of train.tokens, train.steps and train.epochs"
_EVAL = "set train.eval_every"
_BEST = "set train.early_stopping, which keeps the best model"
_UPLOAD = "set push_to_hub"
_ORDER = "which text is in which step follows from seed and train.batch_size alone"
_SHARDING = "set train.strategy and train.offload"
_RESUME = "a run resumes by itself from its last good checkpoint"
_COMPILE = "set train.compile"
_METRICS = "set train.metrics"
_RECOMPUTE = "set train.gradient_checkpointing"
_MACHINE = "set gpu in the cluster file"
_EVALUATION = "evaluation is launcher's own: it keeps one batch at a time and counts every token once"
_LIGER = "it does nothing to GPT-2, so it would be ignored without a word"
_DATA = "rows are made by launcher: see the keys of data"

SET_BY_LAUNCHER: Mapping[str, str] = {
    "output_dir": "set output_dir and name",
    "run_name": "set name",
    "per_device_train_batch_size": "set train.micro_batch",
    "per_device_eval_batch_size": "set train.micro_batch",
    "gradient_accumulation_steps": _BATCH,
    "auto_find_batch_size": "leave train.micro_batch at auto",
    "average_tokens_across_devices": "the loss is always the mean over the whole batch, whatever the world",
    "max_steps": "set train.steps",
    "num_train_epochs": "set train.epochs",
    "learning_rate": "set train.learning_rate",
    "lr_scheduler_type": "set train.schedule",
    "warmup_steps": "set train.warmup",
    "weight_decay": "set train.weight_decay",
    "adam_beta1": "set train.betas",
    "adam_beta2": "set train.betas",
    "max_grad_norm": "set train.max_grad_norm",
    "bf16": "set train.precision",
    "fp16": "set train.precision",
    "bf16_full_eval": "set train.precision",
    "fp16_full_eval": "set train.precision",
    "gradient_checkpointing": _RECOMPUTE,
    "gradient_checkpointing_kwargs": _RECOMPUTE,
    "activation_checkpointing": _RECOMPUTE,
    "activation_checkpointing_kwargs": _RECOMPUTE,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "eval_strategy": _EVAL,
    "eval_steps": _EVAL,
    "eval_delay": _EVAL,
    "do_train": _LENGTH,
    "do_eval": "set data.validation",
    "do_predict": "set data.validation",
    "prediction_loss_only": _METRICS,
    "batch_eval_metrics": _METRICS,
    "include_for_metrics": _METRICS,
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "tf32": "set train.fast.tf32",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "save_strategy": _EVERY_SAVE,
    "save_steps": _EVERY_SAVE,
    "save_total_limit": "set checkpoint.keep",
    "save_only_model": "a checkpoint always holds all that a resume needs",
    "save_on_each_node": "checkpoints are written once, to the run directory",
    "enable_jit_checkpoint": "all ranks agree on a stop step and save there, without it",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "logging_strategy": "set train.log_every",
    "logging_steps": "set train.log_every",
    "logging_nan_inf_filter": "it makes every micro-batch wait for the GPU, so it is off",
    "disable_tqdm": "progress bars are drawn only on a terminal",
    "report_to": "set report_to",
    "include_num_input_tokens_seen": "metrics.jsonl has the tokens at every line",
    "seed": "set seed",
    "data_seed": "set seed",
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD,
    "deepspeed": _SHARDING,
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "parallelism_config": _SHARDING,
    "accelerator_config": _SHARDING,
    "use_cpu": _MACHINE,
    "ddp_backend": _MACHINE,
    "ddp_static_graph": "micro-batches are summed up before ranks synchronise, which it does not allow",
    "local_rank": "ranks are numbered by the launch itself",
    "resume_from_checkpoint": _RESUME,
    "ignore_data_skip": _RESUME,
    "restore_callback_states_from_checkpoint": _RESUME,
    "dataloader_drop_last": _ORDER,
    "dataloader_in_order": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "dataloader_multiprocessing_context": _DATA,
    "eval_on_start": _EVAL,
    "remove_unused_columns": _DATA,
    "label_names": _DATA,
}

FORMER: Mapping[str, str] = {  # what older guides write; today's TrainingArguments has none of these
    "warmup_ratio": "set train.warmup",
    "evaluation_strategy": _EVAL,
    "no_cuda": _MACHINE,
    "overwrite_output_dir": "a run directory is never overwritten: give another name",
    "group_by_length": _ORDER,
    "logging_dir": "metrics go to the run directory",
    "per_gpu_train_batch_size": "set train.micro_batch",
    "push_to_hub_model_id": _UPLOAD,
}

SECRET: Mapping[str, str] = {
    "hub_token": "log in once with `hf auth login`",
    "push_to_hub_token": "log in once with `hf auth login`",
}

_LEVEL = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]

FREE: Mapping[str, Any] = {
    "lr_scheduler_kwargs": dict[str, Any] | str | None,
    "optim": str,
    "optim_args": str | None,
    "adam_epsilon": float,
    "optim_target_modules": str | list[str] | None,
    "label_smoothing_factor": float,
    "use_cache": bool,
    "neftune_noise_alpha": float | None,
    "torch_empty_cache_steps": int | None,
    "logging_first_step": bool,
    "log_on_each_node": bool,
    "log_level": _LEVEL,
    "log_level_replica": _LEVEL,
    "project": str,
    "trackio_space_id": str | None,
    "trackio_bucket_id": str | None,
    "trackio_static_space_id": str | bool | None,
    "full_determinism": bool,
    "dataloader_num_workers": int,
    "dataloader_pin_memory": bool,
    "dataloader_persistent_workers": bool,
    "dataloader_prefetch_factor": int | None,
    "ddp_find_unused_parameters": bool | None,
    "ddp_bucket_cap_mb": int | None,
    "ddp_broadcast_buffers": bool | None,
    "ddp_timeout": int,
    "debug": str | list[str],
    "skip_memory_metrics": bool,
}
"""Each with the type that transformers gives it."""


def instead_of(name: str) -> str | None:
    """What to write for a TrainingArguments field met among our keys; None when there is no such field."""
    if name in FREE:
        return f"it is a TrainingArguments field: train.extra.{name}"
    return SET_BY_LAUNCHER.get(name) or FORMER.get(name) or SECRET.get(name)
