"""What DeepSpeed itself makes of `deepspeed.json`, as one rank of any world, without a GPU.

python -m scripts.deepspeed_reads: a JSON list of [text, world] in, a JSON list of what was read out.
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


def deepspeed_reads(files: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Each text as `DeepSpeedConfig` has it on a rank of its world; all in one process of their own.

    Of one that DeepSpeed refuses there is only `refused`: what it said. Raises RuntimeError where it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "scripts.deepspeed_reads"],
        input=json.dumps(list(files)),
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


def read(text: str, world: int) -> dict[str, Any]:
    """One of them in this process, which has no process group and is one for DeepSpeed on a CPU."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.runtime.config import DeepSpeedConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled here
    deepspeed.init_distributed("fake")
    try:
        return _fields(DeepSpeedConfig(json.loads(text)))
    except (AssertionError, ValueError) as error:
        return {"refused": str(error)}
    finally:
        dist.destroy_process_group()


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
    os.environ["DS_ACCELERATOR"] = "cpu"
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to standard output
        found = [read(text, world) for text, world in json.load(sys.stdin)]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
