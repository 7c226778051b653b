"""DeepSpeed's and PyTorch's own engines over a world that is not there: what they allocate on one rank.

torch's `fake` process group answers every collective at once, so one process stands for a rank of any world.
The tensors are real, on the CPU, and PyTorch's profiler counts their bytes. In a process of its own:

    DS_ACCELERATOR=cpu python -m tests.plan.engines WORLD:STRATEGY:PRECISION[:wide] ...

writes one line of JSON for each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from launcher.plan.buckets import buckets
from launcher.plan.shape import shape_of
from tests.plan.trace import build

FIELDS: Final[Mapping[str, Any]] = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 60,
    "n_head": 4,
    "vocab_size": 1003,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
"""Sizes that few worlds divide, so that every padding shows."""

WIDE: Final[Mapping[str, Any]] = {
    **FIELDS,
    "n_layer": 3,
    "n_embd": 640,
    "vocab_size": 2500,
    "n_positions": 256,
}
"""A layer of 4.9 million weights, so that buckets and gathered layers are most of what comes and goes."""

MARK: Final = "reached "


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with two groups, as the launcher's trainer has it."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3
    )


def deepspeed_json(fields: Mapping[str, Any], stage: int, precision: str, world_size: int) -> dict[str, Any]:
    """What render/deepspeed.py writes, as far as memory goes."""
    shape = shape_of(fields)
    assert shape is not None
    sizes = asdict(buckets(shape))
    plain = ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size")
    zero = {name if name in plain else f"stage3_{name}": size for name, size in sizes.items()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 2 * world_size,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            **zero,
        },
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }


def deepspeed_step(fields: Mapping[str, Any], stage: int, precision: str, world_size: int) -> dict[str, int]:
    """Bytes alive in the second step: between its two backward passes, after them, and at its end."""
    import deepspeed

    ids = torch.zeros(1, fields["n_positions"], dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build(fields, False)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer_of(model),
            config=deepspeed_json(fields, stage, precision, world_size),
            dist_init_required=False,
        )
        for _ in range(2):
            for mark in ("accumulating", "backward"):
                engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
                _mark(mark)
                engine.step()
            _mark("stepped")
    return dict(_reached(profiler))


def fsdp_step(fields: Mapping[str, Any], precision: str) -> dict[str, int]:
    """The same for FSDP2, wrapped as accelerate 1.15 does it, with launcher's policy."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    ids = torch.zeros(1, fields["n_positions"], dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model: Any = build(fields, False)
        for layer in model.transformer.h:
            fully_shard(layer, mp_policy=policy, reshard_after_forward=True)
        tail = [model.transformer.ln_f, model.transformer.wte, model.lm_head]
        fully_shard(tail, mp_policy=policy, reshard_after_forward=False)
        fully_shard(model, mp_policy=policy)
        optimizer = optimizer_of(model)
        for _ in range(2):
            for mark in ("accumulating", "backward"):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                _mark(mark)
            optimizer.step()
            optimizer.zero_grad()
            _mark("stepped")
    return dict(_reached(profiler))


def _mark(name: str) -> None:
    with record_function(MARK + name):
        pass


def _reached(profiler: Any) -> Iterator[tuple[str, int]]:
    """Bytes alive at each mark, and at most in a step; the last of a name counts."""
    events = profiler.profiler.kineto_results.events()
    wanted = [event for event in events if event.name() == "[memory]" or event.name().startswith(MARK)]
    now = peak = 0
    for event in sorted(wanted, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
        else:
            yield event.name().removeprefix(MARK), now
            if event.name() == MARK + "stepped":
                yield "peak", peak
                peak = now


def _one(wanted: str) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world, strategy, precision, *wide = wanted.split(":")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=world)
    dist.init_process_group("fake", rank=0, world_size=int(world), store=FakeStore())
    fields = WIDE if wide else FIELDS
    if strategy == "fsdp":
        found = fsdp_step(fields, precision)
    else:
        found = deepspeed_step(fields, int(strategy.removeprefix("zero")), precision, int(world))
    sys.stdout.write(json.dumps({"of": wanted, **found}) + "\n")


def main(wanted: list[str]) -> None:
    """Each in a process of its own, as an engine is not wholly let go; the libraries are loaded once."""
    import deepspeed

    # It would compile a collective of its own, under a file lock that a killed run leaves for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for one in wanted:
        child = multiprocessing.get_context("fork").Process(target=_one, args=(one,))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{one}: exit code {child.exitcode}")


if __name__ == "__main__":
    main(sys.argv[1:])
