"""A whole run through torch.compile, with kernels that this machine's compiler builds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from tests.conftest import Workplace, losses, small_run, write_json


def told(directory: Path, attempt: int) -> str:
    """What the rank's log says of its first compiled step, after how long that took."""
    log = (directory / f"logs/attempt-{attempt:03}/rank-0.log").read_text()
    (line,) = [line for line in log.splitlines() if "compiled:" in line]
    return line.partition("included; ")[2]


def test_it_learns_the_same_over_two_ranks_and_goes_on_alone_and_from_the_cache(workplace: Workplace) -> None:
    run = small_run()
    run["model"]["overrides"] |= {"n_layer": 1, "n_embd": 192}
    run["train"] |= {"schedule": "constant", "steps": 6, "eval_every": 3, "micro_batch": 2}
    # bf16, so that autocast stands in the graph, and buckets that hold less than the model's gradients.
    run["train"] |= {"precision": "bf16", "extra": {"ddp_bucket_cap_mb": 1}}
    write_json(workplace.folder / "run.yaml", run)
    two = ("--cluster", "two.yaml")
    plain = workplace.train("name=plain", *two)

    mine = replace(workplace, environment={"TORCHINDUCTOR_CACHE_DIR": str(workplace.folder / "compiled")})
    compiled = mine.train("train.compile=true", "train.steps=2", *two)
    mine.train("train.compile=true", "train.steps=4")
    mine.train("train.compile=true")
    assert [told(compiled, attempt) for attempt in (1, 2, 3)] == [
        "the model is in 2 pieces, one for each of DDP's buckets",
        "the model is in one piece",
        "the model is in one piece, from the cache",
    ]
    ours, theirs = losses(compiled), losses(plain)
    assert [key for key in ours if key[1] == "loss"] == [(step, "loss") for step in range(1, 7)]
    assert max(abs(ours[key] - theirs[key]) for key in theirs) < 2e-3
    exported, stock = (load_file(each / "model/model.safetensors") for each in (compiled, plain))
    assert {name: weight.shape for name, weight in exported.items()} == {
        name: weight.shape for name, weight in stock.items()
    }
