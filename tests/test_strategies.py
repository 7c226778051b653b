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
from pathlib import Path

import pytest

from scripts.check_strategies import CLOSE, SAME_LOGITS, STEPS, Bench, Cell, Tried
from tests.conftest import sentences, write_json


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("strategies"), sentences(2000))


@pytest.fixture(scope="module")
def ddp(bench: Bench) -> dict[str, Tried]:
    return {precision: bench.whole(Cell("ddp", precision)) for precision in ("fp32", "bf16")}


def apart(one: Tried, other: Tried) -> float:
    assert one.losses.keys() == other.losses.keys() == set(range(1, STEPS + 1))
    return max(abs(one.losses[step] - other.losses[step]) for step in one.losses)


@pytest.mark.parametrize(
    ("cell", "then"),
    [
        (Cell("zero1", "bf16"), "one.yaml"),
        (Cell("zero2", "fp32"), "one.yaml"),
        (Cell("zero2", "bf16", "optimizer"), "two.yaml"),
        (Cell("zero3", "fp32"), "one.yaml"),
        (Cell("zero3", "bf16", "parameters"), "two.yaml"),
        (Cell("fsdp", "bf16"), "one.yaml"),
    ],
    ids=lambda value: value.name if isinstance(value, Cell) else value,
)
def test_it_trains_as_ddp_does_and_leaves_the_model_that_it_trained(
    bench: Bench, ddp: dict[str, Tried], cell: Cell, then: str
) -> None:
    tried = bench.in_parts(cell, then)
    assert apart(tried, ddp[cell.precision]) < CLOSE
    assert abs(tried.eval_loss - ddp[cell.precision].eval_loss) < CLOSE
    assert tried.logits_apart < SAME_LOGITS[cell.precision]
    assert tried.losses[STEPS] < tried.losses[1] - 0.3, "nothing was learned"
    checkpoints = bench.folder / "runs" / cell.name / "checkpoints"
    assert sorted(folder.name for folder in checkpoints.iterdir()) == ["step-00000010", "step-00000020"]


def test_resumed_on_as_many_ranks_it_is_the_same_run_to_the_bit(bench: Bench) -> None:
    cell = Cell("zero3", "bf16", "optimizer")
    parts = bench.in_parts(cell, "two.yaml")
    first = (bench.folder / "runs" / cell.name / "model" / "model.safetensors").read_bytes()
    whole = bench.whole(cell, "output_dir=again")
    second = (bench.folder / "again" / cell.name / "model" / "model.safetensors").read_bytes()
    assert parts.losses == whole.losses
    assert first == second


def test_several_nodes_are_started_by_hand_and_are_one_run(bench: Bench, ddp: dict[str, Tried]) -> None:
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
    assert losses.keys() == ddp["fp32"].losses.keys()
    assert max(abs(losses[step] - ddp["fp32"].losses[step]) for step in losses) < CLOSE
    assert (directory / "model" / "model.safetensors").is_file()
