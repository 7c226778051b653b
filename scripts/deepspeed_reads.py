"""What DeepSpeed itself makes of `deepspeed.json`, as one rank of any world, without a GPU.

python -m scripts.deepspeed_reads WORLD: a JSON list of the files' texts in, a JSON list of what was read out.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 120  # seconds


def deepspeed_reads(texts: Sequence[str], world: int) -> list[dict[str, Any]]:
    """Each text as `DeepSpeedConfig` has it on a rank of `world`, in a process of its own.

    Raises RuntimeError with what DeepSpeed said where it refuses one.
    """
    done = subprocess.run(
        [sys.executable, "-m", "scripts.deepspeed_reads", str(world)],
        input=json.dumps(list(texts)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=LONGEST,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def read(texts: Sequence[str], world: int) -> list[dict[str, Any]]:
    """The same, in this process, whose process group becomes a fake one."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled here
    deepspeed.init_distributed("fake")
    return [_fields(DeepSpeedConfig(json.loads(text))) for text in texts]


def _fields(config: Any) -> dict[str, Any]:
    zero = config.zero_config
    offloads = (zero.offload_optimizer, zero.offload_param)
    return {
        "world": config.world_size,
        "stage": zero.stage,
        "offload": [None if part is None else str(part.device) for part in offloads],
        "batch": config.train_batch_size,
        "micro": config.train_micro_batch_size_per_gpu,
        "accumulation": config.gradient_accumulation_steps,
        "clipping": config.gradient_clipping,
        "bf16": config.bfloat16_config.enabled,
        "fp16": config.float16_config.enabled,
        "power": config.float16_config.initial_scale_power,
        "scale": config.float16_config.loss_scale,
        "gradients": config.grad_accum_dtype,
    }


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to standard output
        found = read(json.load(sys.stdin), int(sys.argv[1]))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
