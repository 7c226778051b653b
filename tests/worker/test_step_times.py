from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from launcher.plan.choose import Plan
from launcher.worker.ceiling import matmul_flops
from launcher.worker.step_times import (
    HostStopwatch,
    OwnTime,
    Slowest,
    Spent,
    StepTimes,
    StreamStopwatch,
    TimedIterator,
    slowest,
)
from launcher.worker.stop import Agreement
from tests.conftest import small_plan

PLAN = small_plan()
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Clock:
    """Stands in for the `time` of what is timed: only work moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1.7e9 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("launcher.worker.step_times.time", found)
    return found


class Drive:
    """Steps with the Trainer's own calls, in its order."""

    def __init__(self, folder: Path, clock: Clock, plan: Plan = PLAN) -> None:
        self.times = StepTimes(plan, Agreement(1))
        self._clock = clock
        self._about = (
            TrainingArguments(output_dir=str(folder), use_cpu=True),
            TrainerState(),
            TrainerControl(),
        )
        self.times.on_train_begin(*self._about)

    def step(
        self, *, data: float = 0.0, forward: float = 0.0, backward: float = 0.0, aside: float = 0.0
    ) -> None:
        def loader() -> Iterator[int]:
            self._clock.work(data)
            yield 1

        self.times.go_on()
        assert next(TimedIterator(loader(), self.times.data_wait)) == 1
        self.times.on_step_begin(*self._about)
        with self.times.forward.running():
            self._clock.work(forward)
        self._clock.work(backward)
        self.times.on_step_end(*self._about)
        self._clock.work(aside)

    def report(self) -> Spent:
        self.times.read(self.times.lap(), together=True)
        return self.times.spent


def test_each_second_is_where_it_belongs(tmp_path: Path, clock: Clock) -> None:
    run = Drive(tmp_path, clock)
    for _ in range(2):
        run.step(data=4.0, forward=2.0, backward=6.0, aside=10.0)
    assert run.report() == Spent(8.0, 16.0, [OwnTime(4.0, 2.0)], 22.0 + 22.0, 2, clock.time())
    run.step(data=1.0)
    again = run.report()
    assert (again.data_wait, again.host, again.training) == (1.0, 0.0, 1.0), "each report begins anew"


def test_what_comes_after_its_end_is_not_in_a_report_that_is_read_late(tmp_path: Path, clock: Clock) -> None:
    run = Drive(tmp_path, clock)
    run.step(data=1.0, forward=2.0)
    lap = run.times.lap()
    run.step(data=20.0, forward=40.0)
    run.times.read(lap, together=True)
    assert run.times.spent.by_rank == [OwnTime(1.0, 2.0)]
    assert run.times.spent.training == 1.0 + 2.0, "of the first step too: its data is waited for"
    assert run.report().by_rank == [OwnTime(20.0, 40.0)]


def test_training_time_leaves_out_evaluating_saving_and_what_is_before_the_first_step(
    tmp_path: Path, clock: Clock
) -> None:
    run = Drive(tmp_path, clock)
    clock.work(30.0)
    for pause in (0.0, 30.0, 0.0):
        run.step(data=0.5, forward=2.0)
        if pause:
            run.times.leave()
            clock.work(pause)
    spent = run.report()
    training = (spent.steps, spent.training, spent.step_seconds)
    assert training == (3, 7.5, 2.5), "what is waited for after a pause is training"
    assert spent.ended == clock.time()
    assert run.report().training == 0.0, "each report begins anew"


def test_a_report_made_after_training_has_paused_ends_where_it_paused(tmp_path: Path, clock: Clock) -> None:
    run = Drive(tmp_path, clock)
    run.step(forward=2.0)
    run.times.leave()
    clock.work(30.0)
    run.times.leave()
    assert run.report().training == 2.0
    run.step(forward=2.0)
    assert run.report().training == 2.0


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_a_forward_pass_that_gathers_parameters_is_not_a_rank_s_own(
    tmp_path: Path, clock: Clock, strategy: str
) -> None:
    run = Drive(tmp_path, clock, replace(PLAN, strategy=strategy))
    run.step(data=1.0, forward=2.0)
    assert run.report().by_rank == [OwnTime(1.0, 0.0)]


def test_an_iterator_that_ends_ends_when_timed() -> None:
    assert list(TimedIterator(iter([1, 2]), HostStopwatch())) == [1, 2]


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
