from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from launcher.worker.heart import _waits
from launcher.worker.stop import Agreement, StopSignals, Wishes


def test_alone_a_wish_is_granted_once_it_is_settled() -> None:
    agreement = Agreement(1)
    assert agreement.settle() == Wishes()
    agreement.propose(Wishes(save=True))
    assert agreement.settle() == Wishes(save=True)
    agreement.propose(Wishes())
    assert agreement.settle() == Wishes()
    agreement.propose(Wishes(stop=True))
    assert agreement.settle() == Wishes(stop=True)
    assert agreement.settle() == Wishes()
    assert agreement.gather((1.5, 2)) == [[1.5, 2]]


def _ask_on_one_rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    agreement = Agreement(world)
    stopped = None
    for step in range(1, 20):
        time.sleep(0.001 * rank)
        agreement.propose(Wishes(stop=rank == 1 and step >= 7, evaluate=rank == 0 and step == 3))
        assert agreement.gather((rank, step)) == [[0, step], [1, step], [2, step]]
        assert agreement.any(rank == step % 3)
        if agreement.settle().stop:
            stopped = step
            break
    assert agreement.gather([rank / 2]) == [[0.0], [0.5], [1.0]], "at the step of the stop too"
    Path(folder, f"rank-{rank}").write_text(str(stopped))
    dist.destroy_process_group()


def test_one_rank_s_wish_stops_all_at_the_same_step() -> None:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_ask_on_one_rank, args=(3, folder), nprocs=3)  # type: ignore[no-untyped-call]
        assert [Path(folder, f"rank-{rank}").read_text() for rank in range(3)] == ["7", "7", "7"]


@pytest.fixture
def signals() -> StopSignals:
    return StopSignals()


def test_a_signal_is_only_noted_and_a_second_ctrl_c_is_honoured_at_once(signals: StopSignals) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        signals.install()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_rank_that_waits_for_the_others_wishes_is_seen_to_wait() -> None:
    """Else, where one is stuck in an evaluation, all would be named."""
    seen: list[bool] = []

    class Work:
        def wait(self) -> None:
            seen.append(_waits(sys._getframe()))

    agreement = Agreement(1)
    agreement._pending = (torch.zeros(4, dtype=torch.int32), Work())  # type: ignore[assignment]
    agreement.settle()
    assert seen == [True]
    assert not _waits(sys._getframe())
