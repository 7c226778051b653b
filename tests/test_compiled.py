"""Whole runs through torch.compile, with kernels that this machine's compiler builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import Workplace, losses, make_workplace, small_run
from tests.long import LONG

TWO = ("--cluster", "two.yaml")
STEPS = 6


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A folder with a run, and a cache of compiled models of its own."""
    folder = tmp_path_factory.mktemp("compiled")
    run: dict[str, Any] = small_run()
    run["model"]["overrides"] |= {"n_layer": 1, "n_embd": 192}
    run["train"] |= {"schedule": "constant", "steps": STEPS, "eval_every": 3, "micro_batch": 4}
    # bf16, so that autocast stands in the graph, and buckets that hold less than the model's gradients.
    run["train"] |= {"precision": "bf16", "extra": {"ddp_bucket_cap_mb": 1}}
    return make_workplace(folder, run, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"))


@pytest.fixture(scope="module")
def plain(mine: Workplace) -> Path:
    """The same run without torch.compile."""
    return mine.train("name=plain", "train.compile=false", *TWO)


def told(directory: Path, attempt: int) -> str:
    """What the rank's log says of its first compiled step, after how long that took."""
    log = (directory / f"logs/attempt-{attempt:03}/rank-0.log").read_text()
    (line,) = [line for line in log.splitlines() if "compiled:" in line]
    return line.partition("included; ")[2]


def assert_alike(compiled: Path, plain: Path, rounding: float) -> None:
    """Both learned the same, and left a model of the same form."""
    ours, theirs = losses(compiled), losses(plain)
    assert [step for step, name in ours if name == "loss"] == list(range(1, STEPS + 1))
    assert max(abs(ours[key] - theirs[key]) for key in theirs) < rounding
    exported, stock = (load_file(each / "model/model.safetensors") for each in (compiled, plain))
    assert {name: weight.shape for name, weight in exported.items()} == {
        name: weight.shape for name, weight in stock.items()
    }


def test_over_two_ranks_and_on_alone_and_on_from_the_cache(mine: Workplace, plain: Path) -> None:
    compiled = mine.train("name=ddp", "train.compile=true", "train.steps=2", *TWO)
    mine.train("name=ddp", "train.compile=true", "train.steps=4")
    mine.train("name=ddp", "train.compile=true")
    assert [told(compiled, attempt) for attempt in (1, 2, 3)] == [
        "the model became one graph, in 2 pieces for DDP's buckets",
        "the model became one graph",
        "the model became one graph, from the cache",
    ]
    assert_alike(compiled, plain, 2e-3)


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        ("fsdp", STEPS),
        pytest.param("fsdp", 4, marks=LONG),
        pytest.param("zero1", 4, marks=LONG),
        pytest.param("zero3", 4, marks=LONG),
    ],
)
def test_sharded_and_on_alone(mine: Workplace, plain: Path, strategy: str, steps: int) -> None:
    asked = (f"name={strategy}-{steps}", f"train.strategy={strategy}", "train.compile=true")
    compiled = mine.train(*asked, f"train.steps={steps}", *TWO)
    what = "the layers became" if strategy == "fsdp" else "the model became"
    if strategy == "zero3":
        assert "cut for: " in told(compiled, 1), "it waits for weights in between"
    else:
        assert told(compiled, 1).startswith(f"{what} one graph")
    if steps < STEPS:
        mine.train(*asked)
    # ZeRO and FSDP2 compute all in bf16, where DDP has autocast.
    assert_alike(compiled, plain, 5e-3)
