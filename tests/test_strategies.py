"""Strategies as they really run: DeepSpeed's and FSDP's own engines, two ranks, saved, resumed and exported.

`scripts/check_strategies` tries every cell; these are enough of them to meet each engine, each precision,
each kind of offload, and each way to another number of ranks.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from launcher.run.directory import RunDirectory
from launcher.run.status import read_status
from scripts.check_strategies import CLOSE, PAGE, SAME_LOGITS, STEPS, Bench, Cell, Tried, write_table
from tests.conftest import sentences, write_json
from tests.long import LONG


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("strategies"), sentences(2000))


@pytest.fixture(scope="module")
def ddp(bench: Bench) -> Callable[[str], Tried]:
    """The same run under DDP, by precision; each is trained where it is first asked for."""
    return cache(lambda precision: bench.whole(Cell("ddp", precision)))


def apart(one: Tried, other: Tried) -> float:
    assert one.losses.keys() == other.losses.keys() == set(range(1, STEPS + 1))
    return max(abs(one.losses[step] - other.losses[step]) for step in one.losses)


@pytest.mark.parametrize(
    ("cell", "then"),
    [
        (Cell("zero1", "bf16"), "one.yaml"),
        (Cell("zero2", "bf16", "optimizer"), "one.yaml"),
        (Cell("zero3", "fp32"), "one.yaml"),
        (Cell("zero3", "bf16", "parameters"), "two.yaml"),
        (Cell("fsdp", "bf16"), "one.yaml"),
        pytest.param(Cell("zero2", "fp32"), "one.yaml", marks=LONG),
        pytest.param(Cell("zero3", "bf16", "optimizer"), "two.yaml", marks=LONG),
    ],
    ids=lambda value: value.name if isinstance(value, Cell) else value,
)
def test_it_trains_as_ddp_does_and_leaves_the_model_that_it_trained(
    bench: Bench, ddp: Callable[[str], Tried], cell: Cell, then: str
) -> None:
    tried, reference = bench.in_parts(cell, then), ddp(cell.precision)
    assert apart(tried, reference) < CLOSE
    assert abs(tried.eval_loss - reference.eval_loss) < CLOSE
    assert tried.logits_apart < SAME_LOGITS[cell.precision]
    assert tried.losses[STEPS] < tried.losses[1] - 0.3, "nothing was learned"
    directory = bench.folder / "runs" / cell.name
    steps = sorted(folder.name for folder in (directory / "checkpoints").iterdir())
    assert steps == ["step-00000010", "step-00000020"]
    files = (directory / "checkpoints" / steps[-1]).rglob("*")
    written = sum(file.stat().st_size for file in files if file.is_file())
    expected = RunDirectory(directory).read_orders().plan.checkpoint_bytes
    assert expected is not None
    assert expected < written < 2 * expected, "a small model's files are a third names and alignment"
    if then == "one.yaml":
        return
    # On as many ranks as before it is the same run to the bit.
    model = (directory / "model" / "model.safetensors").read_bytes()
    whole = bench.whole(cell, "output_dir=again")
    assert tried.losses == whole.losses
    assert model == (bench.folder / "again" / cell.name / "model" / "model.safetensors").read_bytes()


def test_several_nodes_are_started_by_hand_and_are_one_run(bench: Bench, ddp: Callable[[str], Tried]) -> None:
    cluster = {"name": "nodes", "gpu": "cpu", "gpus_per_node": 1, "nodes": 2}
    write_json(bench.folder / "nodes.yaml", cluster)
    ready = bench.train(*Cell("zero2", "fp32").overrides(), "name=nodes", "--cluster", "nodes.yaml")
    assert ready.returncode == 0, ready.stderr
    directory = bench.folder / "runs" / "nodes"
    assert f"on each of the 2 nodes: sh {directory}/launch.sh NODE HOST PORT" in ready.stderr
    assert not (directory / "metrics.jsonl").exists(), "nothing is started"
    alone = subprocess.run(
        ["sh", str(directory / "launch.sh"), "0"], capture_output=True, text=True, check=False
    )
    assert alone.returncode == 2
    assert "usage: launch.sh NODE HOST PORT" in alone.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = [
        subprocess.Popen(
            ["sh", str(directory / "launch.sh"), str(node), "127.0.0.1", str(port)],
            cwd=bench.folder,
            env={**os.environ, "PATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for node in (1, 0)
    ]
    try:
        assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    reference = ddp("fp32").losses
    assert losses.keys() == reference.keys()
    assert max(abs(losses[step] - reference[step]) for step in losses) < CLOSE
    assert (directory / "model" / "model.safetensors").is_file()
    assert read_status(RunDirectory(directory), None, time.time()).state == "finished"
    settings = (*Cell("zero2", "fp32").overrides(), "name=nodes", "push_to_hub=me/nodes")
    again = bench.train(*settings, "--cluster", "nodes.yaml")
    assert f"run nodes is finished; its model is in {directory}/model" in again.stderr
    assert f"if it is not in me/nodes yet: hf upload me/nodes {directory}/model" in again.stderr
    assert "ready" not in again.stderr


def test_what_ran_on_a_gpu_stays_in_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = PAGE.read_text(encoding="utf-8")
    page.write_text(text)
    write_table({}, page)
    assert page.read_text() == text, "nothing was tried"
    row = next(line for line in text.splitlines() if line.startswith("| zero2 | none "))
    cells = ("tested on CPU, 1; ran on one GPU, 2", "rendered only", "ran on one GPU, 3")
    page.write_text(text.replace(row, f"| zero2 | none | {' | '.join(cells)} |"))
    write_table(
        {Cell("zero2", "fp32"): True, Cell("zero2", "bf16"): True, Cell("zero1", "bf16"): False}, page
    )
    lines = page.read_text().splitlines()
    found = next(line for line in lines if line.startswith("| zero2 | none ")).split("|")
    fp32, bf16, fp16 = (cell.strip() for cell in found[3:6])
    assert fp32.startswith("tested on CPU, 2")
    assert fp32.endswith("; ran on one GPU, 2")
    assert bf16.startswith("tested on CPU, 2")
    assert fp16 == "ran on one GPU, 3"
    assert sum("fails on CPU" in line for line in lines) == 1
