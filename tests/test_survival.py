"""What goes wrong around a run: killed supervisors, changed text, mended mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.run import journal
from launcher.run.checkpoints import committed
from launcher.run.directory import RunDirectory
from launcher.run.processes import lives
from tests.conftest import Workplace, losses, metrics, small_run, write_json

LONG = ("train.steps=100000", "train.eval_every=100000", "checkpoint.every=100000")


@contextmanager
def training(workplace: Workplace, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`launcher train` once its ranks have reported a step; whatever is left is ended."""
    command = [sys.executable, "-m", "launcher", "train", "run.yaml", *arguments]
    process = subprocess.Popen(command, cwd=workplace.folder, stderr=subprocess.PIPE, text=True)
    numbers = workplace.folder / "runs" / "small" / "metrics.jsonl"
    family: list[psutil.Process] = []
    try:
        wait_for(lambda: numbers.exists() and numbers.stat().st_size > 0, process)
        family = psutil.Process(process.pid).children(recursive=True)
        yield process
    finally:
        for each in [*family, psutil.Process(process.pid)] if process.poll() is None else family:
            if each.is_running():
                each.kill()
        process.wait()


def wait_for(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not holds() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    family = psutil.Process(process.pid).children(recursive=True)
    return [each for each in family if "launcher.worker" in each.cmdline() and "launch" not in each.cmdline()]


def test_a_second_ctrl_c_ends_every_rank_at_once(workplace: Workplace) -> None:
    with training(workplace, *LONG, "--cluster", "two.yaml") as process:
        both = ranks(process)
        assert len(both) == 2
        both[1].send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "ended at once" in said
        assert not any(map(lives, both))


def test_a_run_whose_supervisor_is_killed_is_taken_up_once_its_ranks_have_stopped(
    workplace: Workplace,
) -> None:
    directory = RunDirectory(workplace.folder / "runs" / "small")
    with training(workplace, *LONG) as process:
        (rank,) = ranks(process)
        rank.send_signal(signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        command = [sys.executable, "-m", "launcher", "supervise", str(directory.root)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as following:
            assert following.stderr is not None
            assert "attempt 1 lost its supervisor; waiting for its ranks" in following.stderr.readline()
            rank.send_signal(signal.SIGCONT)
            rank.wait(timeout=60)
            saved = committed(directory.checkpoints)[-1].step
            wait_for(lambda: metrics(directory.root)[-1]["step"] > saved, following)
            following.send_signal(signal.SIGTERM)
            _, said = following.communicate(timeout=60)
    assert following.returncode == 130
    assert "stopped safely at step" in said
    first, second = (event for event in journal.read(directory.journal) if event["event"] == "attempt_ended")
    assert (first["outcome"], first["step"], first["orphaned"]) == ("CRASHED", saved, True)
    assert second["outcome"] == "STOPPED"
    assert second["step"] == committed(directory.checkpoints)[-1].step > saved


def test_a_stop_while_text_is_prepared_keeps_what_is_finished(workplace: Workplace) -> None:
    text = (workplace.folder / "corpus.txt").read_text()
    names = [f"part-{number}.txt" for number in range(24)]
    for name in names:
        (workplace.folder / name).write_text(name + text * 20)
    sources = ", ".join(
        f"{{name: s{number}, files: [{name}], weight: 1}}" for number, name in enumerate(names)
    )
    command = [sys.executable, "-m", "launcher", "train", "run.yaml", f"data.train=[{sources}]"]
    directory = RunDirectory(workplace.folder / "runs" / "small")
    stores = workplace.folder / "runs" / ".stores"
    with subprocess.Popen(command, cwd=workplace.folder, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: any(stores.glob("*/units/*.json")), process)
        asked = CliRunner().invoke(app, ["stop", str(directory.root)])
        assert "its text is being prepared" in asked.stdout
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped while its text was prepared\n  hint: the same command goes on" in said
    assert "units are finished and kept" in said
    assert 0 < len(list(stores.glob("*/units/*.json"))) < len(names)
    assert not directory.root.exists(), "nothing was written to it"


FAULTS = """
import os, signal, time
import torch
from transformers import TrainerCallback

class Faults(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **_):
        first = args.process_index == 1 and state.global_step
        fault = (os.environ["LAUNCHER_ATTEMPT"], first)
        if fault == ("1", 3):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == ("2", 5):
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)
        if fault == ("3", 7):
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")
"""


def test_killed_frozen_and_diverged(workplace: Workplace) -> None:
    """One run of two ranks that meets all three: each is named, and what can go on goes on."""
    (workplace.folder / "mine.py").write_text(FAULTS)
    arguments = ("--cluster", "two.yaml", "train.callbacks=[mine:Faults]", "checkpoint.every=4")
    done = workplace.run("train", "run.yaml", *arguments, "train.log_every=2", LAUNCHER_HANG_SECONDS="4")
    directory = RunDirectory(workplace.folder / "runs" / "small")
    assert done.returncode == 1, done.stderr
    killed, frozen, diverged = (
        event for event in journal.read(directory.journal) if event["event"] == "attempt_ended"
    )
    assert (killed["outcome"], killed["reason"]) == ("CRASHED", "rank 1 was killed")
    assert frozen["outcome"] == "HUNG"
    assert frozen["reason"].startswith("rank 1 did not run at all")
    (hung,) = (event for event in journal.read(directory.journal) if event["event"] == "hung")
    assert (hung["rank"], hung["attempt"]) == (1, 2)
    for rank in (0, 1):
        assert "most recent call first" in directory.log(2, rank).read_text()
    assert "in on_step_begin" in directory.log(2, 1).read_text(), "where it was stopped"
    assert (diverged["outcome"], diverged["retry"]) == ("DIVERGED", False)
    assert "training diverged in steps 7 to 8: loss is nan at step 8; nothing was saved" in done.stderr
    assert "data.skip.steps=[7-8]" in done.stderr
    assert [each.step for each in committed(directory.checkpoints)] == [4]
    assert not committed(directory.checkpoints)[0].damage()


def test_a_run_does_not_go_on_with_other_text(workplace: Workplace) -> None:
    workplace.train()
    with (workplace.folder / "corpus.txt").open("a") as stream:
        stream.write("one more line\n")
    before = workplace.files()
    done = workplace.run("train", "run.yaml", "train.steps=30")
    assert done.returncode == 2
    assert "has changed since it began" in done.stderr
    after = workplace.files()
    assert {name: after[name] for name in before if name.startswith("runs/small/")} == {
        name: content for name, content in before.items() if name.startswith("runs/small/")
    }


def test_a_mistake_found_before_the_first_step_can_be_mended_under_the_same_name(
    workplace: Workplace,
) -> None:
    wrong = workplace.run("train", "run.yaml", "train.extra={optim: foo}")
    assert wrong.returncode == 2, wrong.stderr
    assert "train.extra" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    workplace.train()


def test_early_stopping_is_final_even_if_something_fails_after_it(workplace: Workplace) -> None:
    run = small_run()
    run["train"] |= {"steps": 60, "eval_every": 2, "learning_rate": 0.3, "early_stopping": {"patience": 1}}
    run["push_to_hub"] = "someone/something"
    write_json(workplace.folder / "run.yaml", run)
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_notarealtoken"}
    first = workplace.run("train", "run.yaml", **unreachable)
    assert "note: push_to_hub" not in first.stderr, "there is a token"
    directory = workplace.folder / "runs" / "small"
    assert first.returncode == 1
    assert "push_to_hub: someone/something could not be uploaded" in first.stderr
    assert "the model is whole" in first.stderr
    ended = losses(directory)
    assert max(step for step, _ in ended) < 60
    unknown = {**unreachable, "HF_TOKEN": "", "HF_TOKEN_PATH": str(workplace.folder / "none")}
    again = workplace.run("train", "run.yaml", **unknown)
    assert again.returncode == 1
    assert "note: push_to_hub: no token of the Hub is here" in again.stderr
    assert losses(directory) == ended
    for file in directory.rglob("*"):
        assert not file.is_file() or b"hf_notarealtoken" not in file.read_bytes()


TURNS = """
import os, signal
from transformers import TrainerCallback

class Turns(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        turn = (os.environ["LAUNCHER_ATTEMPT"], state.global_step)
        if turn == ("1", 3):
            raise ArithmeticError("wrong")
        if turn == ("2", 10):
            os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_crash_is_tried_again_and_an_evaluation_that_was_stopped_in_is_made_up_for(
    workplace: Workplace,
) -> None:
    (workplace.folder / "mine.py").write_text(TURNS)
    several_passes = "data.validation=0.5"
    arguments = ("train", "run.yaml", "train.callbacks=[mine:Turns]", several_passes)
    stopped = workplace.run(*arguments)
    directory = workplace.folder / "runs" / "small"
    assert stopped.returncode == 130, stopped.stderr
    assert "attempt 1 ended at step 3: CRASHED: rank 0: ArithmeticError: wrong" in stopped.stderr
    assert "Traceback" in RunDirectory(directory).log(1, 0).read_text()
    assert "Traceback" not in stopped.stderr
    assert "stopped safely at step 10 with a checkpoint" in stopped.stderr
    assert (10, "eval_loss") not in losses(directory)
    assert [line["step"] for line in metrics(directory) if "save_seconds" in line] == [10], "once"
    done = workplace.run(*arguments)
    assert done.returncode == 0, done.stderr
    told = journal.read(directory / "journal.jsonl")
    ends = [(event["outcome"], event["step"]) for event in told if event["event"] == "attempt_ended"]
    assert ends == [("CRASHED", 3), ("STOPPED", 10), ("FINISHED", 20)]
    lines = [line for line in metrics(directory) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [10, 20]
    undisturbed = workplace.train("name=undisturbed", several_passes)
    assert losses(directory) == losses(undisturbed)


def test_a_linked_file_is_read_by_the_name_it_was_given(workplace: Workplace) -> None:
    blob = workplace.folder / "blobs" / "abc123"
    blob.parent.mkdir()
    blob.write_text('{"text": "the of and to"}\n' * 50)
    (workplace.folder / "linked.jsonl").symlink_to(blob)
    store = workplace.run("data", "prepare", "run.yaml", "data.train=[linked.jsonl]", "data.block_size=8")
    assert store.returncode == 0, store.stderr
    shown = workplace.run("data", "show", store.stdout.strip(), "--samples", "1")
    assert "'the of and to<|endoftext|>'" in shown.stdout


@pytest.mark.parametrize("folder", ["/proc/stores", "corpus.txt/stores"])
def test_a_cache_that_cannot_be_written(workplace: Workplace, folder: str) -> None:
    done = workplace.run("train", "run.yaml", f"data.cache_dir={folder}")
    assert done.returncode == 2
    assert "data.cache_dir" in done.stderr
    assert not Path(workplace.folder, "runs").exists()


def test_out_of_memory_is_told_with_what_held_it_and_what_to_change(workplace: Workplace) -> None:
    (workplace.folder / "mine.py").write_text(
        "import resource\n"
        "import psutil\n"
        "from transformers import TrainerCallback\n"
        "class Limit(TrainerCallback):\n"
        "    def on_step_begin(self, args, state, control, **_):\n"
        "        if state.global_step == 0:\n"
        "            most = psutil.Process().memory_info().vms + (48 << 20)\n"
        "            resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
    )
    large = ("train.batch_size=512", "train.micro_batch=256", "train.steps=1", "train.eval_every=1")
    done = workplace.run("train", "run.yaml", *large, "train.callbacks=[mine:Limit]")
    assert done.returncode == 1, done.stderr
    assert "out of memory in step 1: this rank held parameters" in done.stderr
    assert "optimizer" in done.stderr
    assert "were planned" in done.stderr
    assert "the most effective first: train." in done.stderr
    assert "train.micro_batch=128 (about 44.8 MiB less)" in done.stderr
    last = journal.read(workplace.folder / "runs" / "small" / "journal.jsonl")[-1]
    assert last["outcome"] == "OUT_OF_MEMORY"
    # And with what it said, under the same name, it goes on.
    workplace.train(*large, "train.micro_batch=128", "train.gradient_checkpointing=true")
