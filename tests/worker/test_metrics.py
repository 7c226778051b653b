from __future__ import annotations

import io
import json
import math
import os
import pty
import termios
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from launcher.worker.dataset import TrainingRows
from launcher.worker.metrics import MetricsFile, Progress
from launcher.worker.report import Report
from launcher.worker.step_times import OwnTime, StepTimes
from launcher.worker.stop import Agreement
from tests.conftest import small_plan
from tests.worker.test_dataset import without_changes

PLAN = small_plan()


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file, 0)
    metrics.write({"step": 1, "loss": 2.5, "mfu": None})
    assert lines(file) == [{"step": 1, "loss": 2.5, "mfu": None}]
    metrics.write({"step": 2, "loss": "nan"})
    assert [line["step"] for line in lines(file)] == [1, 2]
    metrics.close()


def test_a_resumed_run_drops_what_comes_after_its_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    first = MetricsFile(file, 0)
    for step in (1, 5, 10, 10, 11, 15):
        first.write({"step": step, "loss": float(step)})
    first.close()
    again = MetricsFile(file, 10)
    again.write({"step": 11, "loss": -1.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in lines(file)] == [
        *((1, 1.0), (5, 5.0), (10, 10.0), (10, 10.0), (11, -1.0)),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", ['{"step": 3, "lo', '{"step": 3}', "", '{"step": 3, "deep": {}'])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path, cut: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n' + cut)
    metrics = MetricsFile(file, 10)
    metrics.write({"step": 11})
    metrics.close()
    assert [line["step"] for line in lines(file)] == [1, 2, 11]


def test_a_run_that_starts_anew_keeps_no_old_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n')
    MetricsFile(file, 0).close()
    assert file.read_text() == ""


class Full:
    """Rows of full blocks."""

    def lengths(self, samples: Sequence[int]) -> npt.NDArray[np.int64]:
        return np.full(len(samples), PLAN.block_size)


def report(
    file: Path, *, flops: float | None = None, peak: float | None = None, times: StepTimes | None = None
) -> Report:
    return Report(
        replace(PLAN, gpu="described", peak_flops=peak),
        cast("TrainingRows", Full()),
        without_changes(PLAN.batch.batch_size),
        times or StepTimes(PLAN, Agreement(1)),
        MetricsFile(file, 0),
        Progress(io.StringIO(), steps=12, done=0, name="run"),
        flops_per_token=flops,
    )


def test_what_json_cannot_hold_is_written_as_a_word(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    state, control = TrainerState(global_step=3), TrainerControl()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    logs = {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.5}
    report(file).on_log(arguments, state, control, logs=logs)
    report_of_evaluation = {"eval_loss": -math.inf}
    Report.on_log(report(tmp_path / "other.jsonl"), arguments, state, control, logs=report_of_evaluation)
    text = file.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text

    def refuse(word: str) -> object:
        raise AssertionError(f"{word} is not JSON")

    (line,) = [json.loads(each, parse_constant=refuse) for each in text.splitlines()]
    assert (line["loss"], line["grad_norm"], line["learning_rate"]) == ("nan", "inf", 0.5)
    assert lines(tmp_path / "other.jsonl")[0]["eval_loss"] == "-inf"


def test_speed_and_mfu_are_those_of_the_steps_that_are_reported(tmp_path: Path) -> None:
    """Read one step late: the next step's tokens and time are not in it."""
    file = tmp_path / "metrics.jsonl"
    times = StepTimes(PLAN, Agreement(1))
    rank0 = report(file, flops=1000.0, peak=1e6, times=times)
    state, control = TrainerState(), TrainerControl()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    rank0.on_train_begin(arguments, state, control)
    after = []
    for step in range(1, 6):
        state.global_step = step
        rank0.on_step_end(arguments, state, control)
        after.append(replace(state))
    for step, seconds in ((3, 0.5), (5, 0.25)):
        times.spent = replace(times.spent, training=seconds, steps=2, ended=1000.0 + step)
        rank0.on_log(arguments, after[step - 1], control, logs={"loss": 1.0})
    first, second = lines(file)
    assert (first["step"], first["tokens"], first["time"]) == (3, 3 * 8 * 64, 1003.0)
    assert first["tokens_per_second"] == 3 * 8 * 64 / 0.5
    assert (second["step"], second["tokens"]) == (5, 5 * 8 * 64)
    rate = second["tokens_per_second"]
    assert rate == 2 * 8 * 64 / 0.25
    assert second["mfu"] == pytest.approx(rate * 1000 / (1e6 * PLAN.batch.world_size))
    assert second["matmul_share"] is None, "there is no GPU to multiply on"
    assert second["peak_memory_bytes"] is None


def test_a_slow_rank_is_in_each_line_and_in_the_log_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = StepTimes(PLAN, Agreement(1))
    rank0 = report(tmp_path / "metrics.jsonl", times=times)
    state, control = TrainerState(), TrainerControl()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    usual, slow = OwnTime(0.0, 0.1), OwnTime(0.0625, 0.1)
    for by_rank in ([usual, slow, usual], [usual] * 3, *[[usual, usual, slow]] * 3):
        times.spent = replace(times.spent, data_wait=0.5, host=2.0, by_rank=by_rank)
        rank0.on_log(arguments, state, control, logs={"loss": 1.0})
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["slowest_rank"] for line in written] == [1, None, 2, 2, 2]
    assert [line["slowest_rank_lag_seconds"] for line in written] == [0.0625, None, 0.0625, 0.0625, 0.0625]
    assert {(line["data_wait_seconds"], line["host_seconds"]) for line in written} == {(0.5, 2.0)}
    said = [line for line in capsys.readouterr().out.splitlines() if "slowest" in line]
    assert said == [
        "rank 2 is the slowest: 62.5 ms a step behind the median rank, 62.5 ms of them waiting for data"
    ]


def test_elsewhere_than_on_a_terminal_a_report_is_a_plain_line() -> None:
    stream = io.StringIO()
    progress = Progress(stream, steps=20, done=0, name="run")
    progress.advance()
    progress.report({"step": 10, "loss": 3.25, "tokens_per_second": 12345.6, "mfu": None})
    progress.report({"step": 10, "eval_loss": 3.5})
    progress.close()
    assert stream.getvalue() == (
        "step 10/20  loss 3.2500  tokens_per_second 12,346\nstep 10/20  eval_loss 3.5000\n"
    )


def test_a_loss_of_exactly_zero_is_shown_too() -> None:
    stream = io.StringIO()
    Progress(stream, steps=20, done=0, name="run").report({"step": 10, "loss": 0.0})
    assert stream.getvalue() == "step 10/20  loss 0.0000\n"


def test_on_a_terminal_there_is_one_bar_and_a_line_for_each_evaluation() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as stream, os.fdopen(ours, "rb", buffering=0) as person:
        progress = Progress(stream, steps=20_000, done=10_000, name="quickstart")
        progress.advance()
        progress.report({"step": 10_001, "loss": 3.25, "tokens_per_second": 12345.6})
        progress.report({"step": 10_001, "eval_loss": 3.5})
        progress.close()
        stream.write("end")
        stream.flush()
        seen = b""
        while not seen.endswith(b"end"):
            seen += person.read(1 << 16)
    assert b"\rstep 10001/20000  eval_loss 3.5000\r\n" in seen
    bar = seen.decode().removesuffix("\r\nend").rpartition("\r")[2]
    assert bar.startswith("quickstart:  50%|")
    assert bar.endswith(", loss 3.25, 12,346 tok/s]")
    assert len(bar) < 80
    assert bar.count("█") == 5, "half of ten"
    assert seen.count(b"\n") == 2
