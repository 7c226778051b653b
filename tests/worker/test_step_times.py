from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from launcher.worker.ceiling import matmul_flops
from launcher.worker.step_times import (
    HostStopwatch,
    OwnTime,
    Slowest,
    Spent,
    StepTimes,
    StreamStopwatch,
    Timed,
    slowest,
)
from launcher.worker.stop import Agreement
from tests.conftest import small_plan

PLAN = small_plan()
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Drive:
    """Steps with the Trainer's own calls, in its order; sleeping stands for work."""

    def __init__(self, folder: Path, times: StepTimes) -> None:
        self.times = times
        self._about = (
            TrainingArguments(output_dir=str(folder), use_cpu=True),
            TrainerState(),
            TrainerControl(),
        )
        times.on_train_begin(*self._about)

    def step(
        self, *, data: float = 0.0, forward: float = 0.0, backward: float = 0.0, aside: float = 0.0
    ) -> None:
        def loader() -> Iterator[int]:
            time.sleep(data)
            yield 1

        assert next(Timed(loader(), self.times.data_wait)) == 1
        self.times.on_step_begin(*self._about)
        with self.times.forward.running():
            time.sleep(forward)
        time.sleep(backward)
        self.times.on_step_end(*self._about)
        time.sleep(aside)

    def report(self) -> Spent:
        self.times.read(self.times.lap(), together=True)
        return self.times.spent


def test_each_second_is_where_it_belongs(tmp_path: Path) -> None:
    run = Drive(tmp_path, StepTimes(PLAN, Agreement(1)))
    began = time.perf_counter()
    for _ in range(2):
        run.step(data=0.04, forward=0.02, backward=0.06, aside=0.1)
    spent, reported = run.report(), time.perf_counter()
    (own,) = spent.by_rank
    assert 0.08 <= spent.data_wait == pytest.approx(2 * own.data_wait)
    assert 0.04 <= 2 * own.forward <= spent.host - 0.12
    assert spent.data_wait + spent.host <= reported - began - 0.2
    run.step(data=0.01)
    again = run.report()
    assert again.data_wait + again.host <= time.perf_counter() - reported, "each report begins anew"


def test_what_comes_after_its_end_is_not_in_a_report_that_is_read_late(tmp_path: Path) -> None:
    run = Drive(tmp_path, StepTimes(PLAN, Agreement(1)))
    run.step(data=0.01, forward=0.01)
    lap = run.times.lap()
    run.step(data=0.2, forward=0.2)
    run.times.read(lap, together=True)
    (own,) = run.times.spent.by_rank
    assert 0.02 <= own.total < 0.2
    assert run.times.spent.training < 0.2
    assert run.report().by_rank[0].total >= 0.4


def test_training_time_leaves_out_evaluating_saving_and_what_is_before_the_first_step(tmp_path: Path) -> None:
    run = Drive(tmp_path, StepTimes(PLAN, Agreement(1)))
    time.sleep(0.3)
    before = time.time()
    for pause in (0.0, 0.3, 0.0):
        run.step(forward=0.02)
        if pause:
            run.times.leave()
            time.sleep(pause)
    spent = run.report()
    assert spent.steps == 3
    assert 0.06 <= spent.training == pytest.approx(3 * spent.step_seconds)
    assert spent.training < 0.3
    assert before + 0.36 <= spent.ended <= time.time()
    assert run.report().training < 0.3, "each report begins anew"


def test_a_report_made_after_training_has_paused_ends_where_it_paused(tmp_path: Path) -> None:
    run = Drive(tmp_path, StepTimes(PLAN, Agreement(1)))
    run.step(forward=0.02)
    run.times.leave()
    time.sleep(0.3)
    run.times.leave()
    assert 0.02 <= run.report().training < 0.3
    run.step(forward=0.02)
    assert 0.02 <= run.report().training < 0.3


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_forward_pass_that_gathers_parameters_is_not_a_rank_s_own(tmp_path: Path, strategy: str) -> None:
    run = Drive(tmp_path, StepTimes(replace(PLAN, strategy=strategy), Agreement(1)))
    run.step(data=0.01, forward=0.01)
    (own,) = run.report().by_rank
    assert own.forward == 0.0
    assert own.data_wait >= 0.01


def test_an_iterator_that_ends_ends_when_timed() -> None:
    assert list(Timed(iter([1, 2]), HostStopwatch())) == [1, 2]


@pytest.mark.parametrize(
    ("data_waits", "forwards", "expected"),
    [
        ([0.0, 0.0, 0.0], [1.0, 1.0625, 1.0], None),
        ([0.0, 0.0, 0.0], [1.0, 1.25, 1.0], Slowest(1, 0.25, 0.0)),
        ([0.0, 0.5], [1.0, 1.0], Slowest(1, 0.5, 0.5)),
        ([0.5, 0.0, 0.0, 0.0], [0.75, 1.0, 1.0, 1.0], Slowest(0, 0.25, 0.5)),
        ([0.001, 0.002], [0.0, 0.0], None),
        ([0.0, 0.0625], [0.0, 0.0], Slowest(1, 0.0625, 0.0625)),
        ([0.5], [1.0], None),
    ],
    ids=["a sixteenth", "a quarter", "of two", "of four", "next to nothing", "sharded", "alone"],
)
def test_who_is_the_slowest(data_waits: list[float], forwards: list[float], expected: Slowest | None) -> None:
    by_rank = [OwnTime(*each) for each in zip(data_waits, forwards, strict=True)]
    assert slowest(by_rank, step_seconds=3.0) == expected


@on_cuda
def test_a_stream_is_timed_without_waiting_for_it() -> None:
    def work(cycles: int) -> None:
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]

    stopwatch = StreamStopwatch()
    work(1)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(3):
        with stopwatch.running():
            work(100_000_000)
    lap = stopwatch.lap()
    handed_out = time.perf_counter() - began
    torch.cuda.synchronize()
    waited = time.perf_counter() - began
    assert handed_out < waited / 2
    assert lap() == pytest.approx(waited, rel=0.2)


@on_cuda
def test_a_large_product_leaves_nothing_behind() -> None:
    torch.cuda.manual_seed(1)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(1)
    reached = matmul_flops(torch.bfloat16)
    assert reached is not None
    assert reached > 1e12
    assert torch.equal(torch.rand(4, device="cuda"), expected)
    assert torch.cuda.max_memory_allocated() < 2 * 8192**2, "no matrix, only what cuBLAS works in"
