"""Verification against live engines that are made to differ: each difference is found, with both values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPTNeoConfig

from launcher.config.schema import TrainSection
from launcher.plan.orders import Orders
from launcher.worker import verify as verifying
from scripts.check_strategies import Bench, Cell
from tests.conftest import Workplace, sentences, small_plan, write_json
from tests.worker import tampering

FOUND: Mapping[str, str] = {
    "weights": "planned {torch.float32}, found {torch.float",
    "optimizer's weights": "planned {torch.float32}, found {torch.float",
    "gradient checkpointing": "planned False, found True",
    "attention": "planned sdpa_causal, found eager",
    "fast paths": "'causal_attention', ",
    "weight decay": "planned [0.1, 0.0], found [0.1, 0.1]",
    "steps": "planned 2, found 7",
    "samples of the first step": "planned [0, 1, 2, 3, 4, 5, 6, 7], found [8, 9, 10, 11, 12, 13, 14, 15]",
    "device": "planned cpu, found meta",
    "loss scale": "planned None, found dynamic, from ",
    "precision": "planned no, found bf16",
    "micro-batch": "planned 2, found 3",
    "accumulation": "planned 2, found ",
    "batch": "planned 8, found 9",
    "gradient clipping": "planned 1.0, found 0.0",
    "compile": "planned False, found True",
    "ZeRO stage": "planned 2, found 1",
    "offloaded": "planned none, found optimizer",
    "gradients": "planned torch.float32, found torch.bfloat16",
    "mixed precision": "MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.bfloat16",
    "fsdp gradient checkpointing": "planned False, found in some layers",
    "fsdp compile": "planned False, found in some layers",
    "fsdp offloaded": "planned none, found some parameters",
    "version of torch": "rank 1 has 1.0",
    "sha256 of config.yaml": "rank 1 has ",
    "sha256 of manifest.json": "rank 1 has ",
}
ENGINES: Mapping[str, str] = {"ddp": "DDP", "zero2": "DeepSpeed", "fsdp": "FSDP2"}
OWN: Mapping[str, Mapping[str, Any]] = {
    "ddp": tampering.DDP,
    "zero2": tampering.ZERO,
    "fsdp": tampering.FSDP,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("verify"), sentences(2000))


def ready(bench: Bench, strategy: str) -> Path:
    """A run directory with everything a rank needs, for two nodes: nothing is started for them."""
    cell = Cell(strategy, "fp32")
    cluster = {"name": "nodes", "gpu": "cpu", "gpus_per_node": 1, "nodes": 2}
    write_json(bench.folder / "nodes.yaml", cluster)
    done = bench.train(*cell.overrides(), "train.steps=2", "--cluster", "nodes.yaml")
    assert done.returncode == 0, done.stderr
    return bench.folder / "runs" / cell.name


def launch(directory: Path, *words: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Start `ranks` of the run on this machine alone."""
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [str(accelerate), "launch", "--config_file", str(directory / "accelerate.yaml")]
    command += [
        "--num_machines",
        "1",
        "--num_processes",
        str(ranks),
        "--main_process_port",
        "0",
        "-m",
        *words,
    ]
    return subprocess.run(
        [*command, str(directory)],
        cwd=directory.parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )


@pytest.mark.parametrize("strategy", OWN)
def test_what_differs_is_found_with_both_values(bench: Bench, strategy: str) -> None:
    """One run of each engine, in which one thing after another is made to differ."""
    directory = ready(bench, strategy)
    done = launch(directory, "tests.worker.tampering")
    logs = sorted(directory.glob("logs/*/rank-*.log"))
    assert done.returncode == 0, "".join(log.read_text()[-3000:] for log in logs)
    said = json.loads((directory / "tampered.json").read_text())
    wrong = {}
    for name in (*tampering.ANYWHERE, *OWN[strategy], *tampering.RANKS):
        expected = FOUND.get(f"{strategy} {name}") or FOUND.get(name)
        if name == "engine":
            expected = f"planned {ENGINES[strategy]}, found one process"
        assert expected is not None, name
        if expected not in (said[name] or "").partition(f"{name}: ")[2]:
            wrong[name] = said[name]
    assert wrong == {}, "not found, or not with both values"


def test_ranks_of_another_number_do_not_train(bench: Bench) -> None:
    directory = ready(bench, "ddp")
    done = launch(directory, "launcher.worker", ranks=1)
    end = json.loads(max(directory.glob("logs/*/rank-0.end.json")).read_text())
    assert end["outcome"] == "CRASHED", done.stderr
    assert "world size: planned 2, found 1" in end["error"]
    assert not list(directory.glob("checkpoints/step-*"))


def test_another_stage_in_deepspeeds_file_does_not_train(bench: Bench) -> None:
    directory = ready(bench, "zero3")
    file = directory / "deepspeed.json"
    fields = json.loads(file.read_text())
    fields["zero_optimization"]["stage"] = 0
    file.write_text(json.dumps(fields))
    done = launch(directory, "launcher.worker")
    end = json.loads(max(directory.glob("logs/*/rank-0.end.json")).read_text())
    assert end["outcome"] == "CRASHED", done.stderr
    assert "ZeRO stage: planned 3, found 0" in end["error"]


def test_where_a_run_goes_on_its_loss_scale_may_have_moved() -> None:
    """transformers and DeepSpeed load the scale with the checkpoint, before verification."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler), model_wrapped=None)
    plan = replace(small_plan(), precision="fp16")
    orders = Orders("0", "", plan, {}, weights=None, store=None, vocabulary=None)
    train = TrainSection.model_validate({"batch_size": 8, "steps": 20})

    def asked_and_found() -> tuple[dict[str, object], dict[str, object]]:
        return verifying.planned(orders, train, {}, 2, "sdpa"), {"loss scale": verifying._loss_scale(trainer)}

    def differ(asked: dict[str, object], live: dict[str, object]) -> bool:
        return asked["loss scale"] != live["loss scale"]

    assert not differ(*asked_and_found())
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**12})
    assert differ(*asked_and_found())
    assert not differ(*map(verifying.with_any_scale, asked_and_found()))
    trainer.accelerator.scaler = None
    assert differ(*map(verifying.with_any_scale, asked_and_found())), "there is none"


def test_a_config_that_asks_for_no_attention_trains_with_transformers_own_choice(
    workplace: Workplace,
) -> None:
    """GPT-Neo has no fused attention: it is built with the eager one."""
    shape: dict[str, Any] = {"hidden_size": 32, "num_heads": 2, "num_layers": 2}
    kinds = [[["global", "local"], 1]]
    config = GPTNeoConfig(**shape, attention_types=kinds, max_position_embeddings=64)
    config.save_pretrained(workplace.folder / "neo")
    directory = workplace.train("model.name=./neo", "model.overrides={}", "train.steps=1")
    log = (directory / "logs" / "attempt-001" / "rank-0.log").read_text()
    assert "train.fast.causal_attention: the model's attention is eager" in log
