"""Whole runs: real processes, real text, the files they leave."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.data.blocks import Blocks
from launcher.data.store import open_store
from launcher.run.directory import RunDirectory
from tests.conftest import Workplace, last_with, losses, metrics, sentences, small_run, weights, write_json
from tests.long import LONG

STOP_AT_SEVEN = """
import glob, os, signal
from transformers import TrainerCallback

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 7 and os.environ.get("STOP") and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGUSR1)

class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, **_):
        print("begins with", len(glob.glob(args.output_dir + "/checkpoints/step-*")), "checkpoints")

def accuracy(prediction):
    known = prediction.label_ids != -100
    return {"accuracy": (prediction.predictions == prediction.label_ids)[known].mean()}
"""


@pytest.fixture
def mine(workplace: Workplace) -> Workplace:
    """The workplace with a module of the user's own."""
    (workplace.folder / "mine.py").write_text(STOP_AT_SEVEN)
    return workplace


def test_twice_and_by_hand_and_over_two_ranks_it_is_the_same_run(workplace: Workplace) -> None:
    first = workplace.train()
    again = workplace.train("name=again")
    assert losses(first) == losses(again)
    assert weights(first) == weights(again)

    written = (first / "plan.json").read_text().splitlines()
    (explained,) = workplace.answered("explain", "run.yaml", "train.micro_batch")
    places = [place for place in explained["places"] if place["file"] == "plan.json"]
    assert places
    assert all(written[place["line"] - 1].strip() == place["text"] for place in places)

    two = workplace.train("name=two", "--cluster", "two.yaml")
    ours, theirs = losses(first), losses(two)
    assert ours.keys() == theirs.keys()
    assert len([key for key in ours if key[1] == "loss"]) == 20
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-4
    assert ours[20, "loss"] < ours[1, "loss"] - 0.4, "nothing was learned"

    for made in ("model", "checkpoints"):
        shutil.rmtree(two / made)
    (two / "metrics.jsonl").unlink()
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [str(accelerate), "launch", "--config_file", str(two / "accelerate.yaml")]
    done = subprocess.run(
        [*command, "-m", "launcher.worker", str(two)], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step 20/20" in done.stdout
    assert losses(two) == theirs
    assert [folder.name for folder in sorted((two / "logs").iterdir())] == ["attempt-001", "attempt-002"]


def test_the_model_is_stock_and_its_evaluation_is_what_transformers_computes(workplace: Workplace) -> None:
    directory = workplace.train("report_to=[tensorboard]")
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    assert model.config.activation_function == "gelu_new"
    assert len(tokenizer) == model.config.vocab_size == 300
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.eos_token_id

    orders = RunDirectory(directory).read_orders()
    assert orders.store is not None
    blocks = Blocks(open_store(Path(orders.store)), "validation", 64, "concat")
    ids = torch.from_numpy(np.stack([blocks.read(0, block) for block in range(len(blocks[0]))]))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    last = last_with(directory, "eval_loss")
    assert last["step"] == 20
    assert last["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert last["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert last["eval_tokens"] == ids.numel() - len(ids)

    assert list((directory / "tensorboard").glob("events.out.*"))
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    done = workplace.run("generate", str(directory), "--prompt", "the ", "--tokens", "5", "--json")
    assert json.loads(done.stdout)["text"].startswith("the ")
    finished = workplace.run("train", "run.yaml", "report_to=[tensorboard]")
    assert "is finished" in finished.stderr


def test_another_configuration_of_the_same_name_is_refused_and_a_longer_one_goes_on(
    mine: Workplace,
) -> None:
    run = small_run()
    run["train"] |= {"callbacks": ["mine:Look"], "eval_every": 1000}
    write_json(mine.folder / "run.yaml", run)
    directory = mine.train()
    before = mine.files()
    done = mine.run("train", "run.yaml", "train.learning_rate=0.5", "seed=3")
    assert done.returncode == 2
    for part in ("train.learning_rate was 0.001, is now 0.5", "seed was 1337, is now 3", "another name"):
        assert part in done.stderr
    for command in ("train", "plan"):
        shorter = mine.run(command, "run.yaml", "train.steps=10")
        assert shorter.returncode == 2
        assert "may grow but not shrink" in shorter.stderr
    assert mine.files() == before
    other = ("train.log_every=2", "checkpoint={every: 6, keep: 1}", "report_to=[tensorboard]")
    mine.train("train.steps=24", *other)
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-00000024"]
    assert "begins with 1 checkpoints" in RunDirectory(directory).log(2, 0).read_text()
    assert list((directory / "tensorboard").iterdir())
    rates = {line["step"]: line["learning_rate"] for line in metrics(directory) if "loss" in line}
    assert list(rates) == [*range(1, 21), 22, 24]
    # At its end the shorter run had come down to a rate of nothing.
    for step in (22, 24):
        assert rates[step] == pytest.approx(1e-3 * (1 + math.cos(math.pi * (step - 1) / 24)) / 2)


@pytest.mark.parametrize(
    "cluster",
    [pytest.param((), marks=LONG, id="one rank"), pytest.param(("--cluster", "two.yaml"), id="two ranks")],
)
def test_stopped_and_resumed_it_ends_in_the_same_weights(mine: Workplace, cluster: tuple[str, ...]) -> None:
    run = small_run()
    run["model"]["overrides"]["resid_pdrop"] = 0.2
    run["train"] |= {"callbacks": ["mine:Stop"], "micro_batch": 2}
    write_json(mine.folder / "run.yaml", run)
    whole = mine.train("name=whole", *cluster)

    stopped = mine.run("train", "run.yaml", "name=parts", *cluster, STOP="1")
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped safely at step 8 with a checkpoint" in stopped.stderr
    parts = mine.train("name=parts", *cluster)
    assert losses(parts) == losses(whole)
    assert weights(parts) == weights(whole)
    found = json.loads(mine.run("checkpoint", "list", str(parts), "--json").stdout)
    assert [(each["step"], each["samples"]) for each in found] == [(10, 80), (20, 160)]
    assert mine.run("checkpoint", "verify", str(parts)).returncode == 0


def test_ctrl_c_stops_safely_and_a_second_command_is_kept_out(workplace: Workplace) -> None:
    command = [sys.executable, "-m", "launcher", "train", "run.yaml", "train.steps=100000"]
    process = subprocess.Popen(command, cwd=workplace.folder, stderr=subprocess.PIPE, text=True)
    try:
        numbers = workplace.folder / "runs" / "small" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (numbers.exists() and numbers.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        other = workplace.run("train", "run.yaml", "train.steps=100000")
        assert other.returncode == 2
        assert "being trained by another command" in other.stderr
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "stopped safely at step" in said
    directory = RunDirectory(workplace.folder / "runs" / "small")
    steps = [line["step"] for line in metrics(directory.root) if "loss" in line]
    assert directory.checkpoints.joinpath(f"step-{steps[-1]:08d}").is_dir()


def test_padded_documents_train_the_same_on_any_world_and_learn_to_stop(mine: Workplace) -> None:
    run = small_run()
    run["data"] |= {"packing": "pad", "validation": ["held.txt"]}
    run["train"] = {
        "batch_size": 8,
        "micro_batch": 2,
        "epochs": 1,
        "log_every": 1,
        "metrics": ["mine:accuracy"],
    }
    write_json(mine.folder / "run.yaml", run)
    (mine.folder / "corpus.txt").write_text(
        "\n".join(line[: 5 + 3 * n % 60] for n, line in enumerate(sentences(150)))
    )
    (mine.folder / "held.txt").write_text("\n".join(sentences(9, seed=2)))
    one, two = mine.train("name=one"), mine.train("name=two", "--cluster", "two.yaml")
    ours, theirs = losses(one), losses(two)
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-4
    for directory, ranks in ((one, {None}), (two, {None, 0, 1})):
        reports = [line for line in metrics(directory) if "loss" in line]
        between = [after["time"] - before["time"] for before, after in itertools.pairwise(reports)]
        for each, seconds in zip(reports[1:], between, strict=True):
            assert 0 < each["data_wait_seconds"] + each["host_seconds"] < seconds + 0.01
            assert each["slowest_rank"] in ranks
            assert (each["slowest_rank"] is None) == (each["slowest_rank_lag_seconds"] is None)
            assert (each["mfu"], each["matmul_share"]) == (None, None)

    model = AutoModelForCausalLM.from_pretrained(one / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(one / "model")
    total, right, count = 0.0, 0, 0
    for line in sentences(9, seed=2):
        whole = [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(whole), 64):
            ids = torch.tensor([whole[start : start + 64]])
            with torch.no_grad():
                out = model(input_ids=ids, labels=ids)
            tokens = ids.shape[1] - 1
            total += out.loss.item() * tokens if tokens else 0.0
            right += int((out.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum())
            count += tokens
    for directory in (one, two):
        last = last_with(directory, "eval_loss")
        assert last["eval_tokens"] == count, "the end-of-text of each document is a label too"
        assert last["eval_loss"] == pytest.approx(total / count, abs=1e-4)
        assert last["eval_accuracy"] == pytest.approx(right / count, abs=1e-6)
    assert last_with(one, "tokens")["tokens"] == last_with(two, "tokens")["tokens"]


def test_durations_are_agreed_on_and_act_once(workplace: Workplace) -> None:
    directory = workplace.train(
        "train.steps=400", "train.eval_every=1s", "checkpoint={every: 2s, keep: 9}", "--cluster", "two.yaml"
    )
    evaluations = [step for step, name in losses(directory) if name == "eval_loss"]
    assert evaluations[-1] == 400
    assert len(evaluations) > 1
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(evaluations[:-1]))
    assert len(list((directory / "checkpoints").iterdir())) >= 1


def test_early_stopping_keeps_the_best(workplace: Workplace) -> None:
    overrides = (
        "train.eval_every=2",
        "train.learning_rate=0.3",
        "train.early_stopping={patience: 2}",
        "train.log_every=100",
        "checkpoint={every: 1000, keep: 1}",
    )
    done = workplace.run("train", "run.yaml", "train.steps=60", *overrides)
    assert done.returncode == 0, done.stderr
    directory = workplace.folder / "runs" / "small"
    evaluations = {step: value for (step, name), value in losses(directory).items() if name == "eval_loss"}
    assert max(evaluations) < 60, "it was to stop early"
    assert [step for step, name in losses(directory) if name == "loss"] == [1, *evaluations]
    best = min(evaluations, key=lambda step: evaluations[step])
    saved = directory / "checkpoints" / f"step-{best:08d}" / "model.safetensors"
    assert weights(directory) == saved.read_bytes()
    why = f"stopped early: eval_loss has not fallen for 2 evaluations; the model is that of step {best}"
    assert f"{why}\nfinished at step {max(evaluations)}; the model is in" in done.stderr
    assert why in workplace.run("status", str(directory)).stdout
    assert "is finished" in workplace.run("train", "run.yaml", "train.steps=60", *overrides).stderr
    longer = workplace.run("train", "run.yaml", "train.steps=90", *overrides)
    assert longer.returncode == 2, longer.stderr
    assert f"was ended at step {max(evaluations)} by train.early_stopping" in longer.stderr
    assert not (directory / "logs" / "attempt-002").exists(), "no rank was started for that"


def test_gpt2_medium_is_planned_for_eight_gpus_and_trains_tiny_on_the_cpu(workplace: Workplace) -> None:
    root = Path(__file__).parent.parent
    shutil.copy(root / "configs/runs/gpt2-medium.yaml", workplace.folder / "medium.yaml")
    planned = workplace.run(
        "plan", "medium.yaml", "--cluster", str(root / "configs/clusters/8x-a100-80gb.yaml"), "--json"
    )
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)["plan"]
    assert plan["parameters"] == 354_823_168
    assert (plan["batch"]["world_size"], plan["precision"], plan["device"]) == (8, "bf16", "cuda")
    assert plan["batch"]["micro_batch"] * plan["batch"]["accumulation"] * 8 == plan["batch"]["batch_size"]
    done = workplace.run(
        "train",
        "medium.yaml",
        "data.train=[corpus.txt]",
        "data.block_size=32",
        "model.tokenizer={train: {vocab_size: 300}}",
        "model.overrides={n_layer: 2, n_head: 2, n_embd: 16}",
        "train.batch_size=4",
        "train.steps=2",
        "train.precision=bf16",
        "train.gradient_checkpointing=true",
    )
    assert done.returncode == 0, done.stderr
    assert [
        line["step"] for line in metrics(workplace.folder / "runs" / "gpt2-medium") if "loss" in line
    ] == [1, 2]


def test_the_fine_tuning_file_on_a_model_made_here(workplace: Workplace) -> None:
    made = workplace.train()
    shutil.copytree(made / "model", workplace.folder / "model")
    lines = sentences(120, seed=5)
    (workplace.folder / "train.txt").write_text("\n".join(lines[:100]) + "\n")
    (workplace.folder / "val.txt").write_text("\n".join(lines[100:]) + "\n")
    shutil.copy(
        Path(__file__).parent.parent / "configs/runs/finetune.yaml", workplace.folder / "finetune.yaml"
    )
    done = workplace.run("train", "finetune.yaml")
    assert done.returncode == 0, done.stderr
    directory = workplace.folder / "runs" / "finetune"
    found = losses(directory)
    assert [step for step, name in found if name == "eval_loss"][:3] == [10, 20, 30]
    assert [step for step, name in found if name == "loss"][:4] == [1, 5, 10, 15]
    assert len(list((directory / "checkpoints").iterdir())) == 2
    evaluations = [value for (_, name), value in found.items() if name == "eval_loss"]
    assert evaluations[-1] < evaluations[0]
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    assert (
        tokenizer("the of")["input_ids"]
        == AutoTokenizer.from_pretrained(made / "model")("the of")["input_ids"]
    )
    plan = json.loads((directory / "plan.json").read_text())["plan"]
    assert (plan["batch"]["micro_batch"], plan["batch"]["accumulation"]) == (1, 8)
    rows = plan["blocks"]["train"]
    assert plan["steps"] == math.ceil(3 * rows / 8)


@LONG  # tests/test_chaos.py damages every file of one
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(mine: Workplace) -> None:
    run = small_run()
    run["train"]["callbacks"] = ["mine:Stop"]
    run["checkpoint"] = {"every": 5}
    write_json(mine.folder / "run.yaml", run)
    whole = mine.train("name=whole")
    assert mine.run("train", "run.yaml", "name=parts", STOP="1").returncode == 130
    newest = mine.folder / "runs/parts/checkpoints/step-00000008/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    parts = mine.train("name=parts")
    assert (parts / "checkpoints/quarantine/step-00000008").is_dir()
    assert "step-00000008 set aside" in (parts / "logs/attempt-002/rank-0.log").read_text()
    assert losses(parts) == losses(whole)
    assert weights(parts) == weights(whole)
