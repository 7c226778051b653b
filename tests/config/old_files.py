"""Files as people have them, of DeepSpeed and of accelerate, and what they convert to."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from launcher.config.convert import Conversion, convert
from launcher.config.document import Document, Value, parse
from launcher.errors import ConfigError

TRAINER_ZERO3: Final = """\
{
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000,
        "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": true},
        "offload_param": {"device": "cpu", "pin_memory": true},
        "overlap_comm": true,
        "contiguous_gradients": true,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": true
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": false
}
"""

ZERO2_WITH_OFFLOAD: Final = """\
{
  "train_batch_size": 256,
  "train_micro_batch_size_per_gpu": 4,
  "gradient_accumulation_steps": 4,
  "gradient_clipping": 0.5,
  "steps_per_print": 100,
  "bf16": {"enabled": true},
  "optimizer": {
    "type": "AdamW",
    "params": {"lr": 3e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.05}
  },
  "scheduler": {
    "type": "WarmupDecayLR",
    "params": {
      "warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 200,
      "total_num_steps": 5000, "warmup_type": "linear"
    }
  },
  "zero_optimization": {
    "stage": 2,
    "offload_optimizer": {"device": "cpu", "pin_memory": true},
    "allgather_partitions": true,
    "allgather_bucket_size": 2e8,
    "overlap_comm": true,
    "reduce_scatter": true,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": true
  },
  "zero_allow_untested_optimizer": true,
  "wall_clock_breakdown": false
}
"""

_COMMON: Final = """\
compute_environment: LOCAL_MACHINE
debug: false
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""

FSDP2_ON_FOUR_NODES: Final = (
    _COMMON
    + """\
distributed_type: FSDP
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: true
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_transformer_layer_cls_to_wrap: GPT2Block
  fsdp_version: 2
main_process_ip: 10.0.0.1
main_process_port: 29500
mixed_precision: bf16
num_machines: 4
num_processes: 32
"""
)

MULTI_GPU: Final = (
    _COMMON
    + """\
distributed_type: MULTI_GPU
dynamo_config:
  dynamo_backend: INDUCTOR
  dynamo_mode: default
  dynamo_use_dynamic: false
  dynamo_use_fullgraph: false
gpu_ids: all
mixed_precision: fp16
num_machines: 1
num_processes: 8
"""
)

DEEPSPEED_WITHOUT_A_JSON: Final = (
    _COMMON
    + """\
deepspeed_config:
  gradient_accumulation_steps: 2
  gradient_clipping: 1.0
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
mixed_precision: bf16
num_machines: 1
num_processes: 8
"""
)

DEEPSPEED_WITH_A_JSON: Final = (
    _COMMON
    + """\
deepspeed_config:
  deepspeed_config_file: zero2.json
  deepspeed_multinode_launcher: standard
  zero3_init_flag: false
distributed_type: DEEPSPEED
fsdp_config: {}
num_machines: 2
num_processes: 16
"""
)


JSON, YAML = "ds.json", "accelerate.yaml"


def said(conversion: Conversion) -> dict[str, Value]:
    return {key: setting.value for key, setting in conversion.settings.items()}


def of(
    deepspeed: str | dict[str, Any] | None = None, accelerate: str | dict[str, Any] | None = None
) -> Conversion:
    return convert(documents(deepspeed, accelerate))


def documents(*contents: str | dict[str, Any] | None) -> list[Document]:
    texts = [
        each if isinstance(each, str) or each is None else json.dumps(each, indent=1) for each in contents
    ]
    return [
        parse(text, label=label) for text, label in zip(texts, (JSON, YAML), strict=False) if text is not None
    ]


def conflicts(
    deepspeed: str | dict[str, Any] | None = None, accelerate: str | dict[str, Any] | None = None
) -> dict[str, str]:
    """Dotted key to message of every conflict, each with its place."""
    with pytest.raises(ConfigError) as raised:
        of(deepspeed, accelerate).run("gpt2", "run")
    assert all(fault.place and fault.place.split(":")[0] in (JSON, YAML) for fault in raised.value.faults)
    assert all(fault.hint for fault in raised.value.faults)
    return {fault.path: f"{fault.message} ({fault.place})" for fault in raised.value.faults}


SAMPLES: dict[str, tuple[str | None, str | None]] = {
    "trainer": (TRAINER_ZERO3, None),
    "zero2": (ZERO2_WITH_OFFLOAD, None),
    "fsdp": (None, FSDP2_ON_FOUR_NODES),
    "multi_gpu": (None, MULTI_GPU),
    "deepspeed": (None, DEEPSPEED_WITHOUT_A_JSON),
    "both": (ZERO2_WITH_OFFLOAD, DEEPSPEED_WITH_A_JSON),
}
