"""When it evaluates, saves and stops, step by step, with transformers' own control flags."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments

from launcher.config.schema import EarlyStopping
from launcher.plan.choose import Every, Plan
from launcher.run.directory import RunDirectory
from launcher.worker.cadence import BestEvaluation, Cadence, Clock
from launcher.worker.divergence import Diverged, Divergence
from launcher.worker.stop import Agreement, StopSignals
from launcher.worker.trainer import LauncherTrainer
from tests.conftest import small_plan, stale

STEPS = 12
PLAN = replace(small_plan(), steps=STEPS, samples=96, eval_every=Every(), checkpoint_every=Every())


class Drive:
    """A run of `STEPS` steps as the Trainer takes them; `losses` are what its evaluations give."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        rank: int = 0,
        early: EarlyStopping | None = None,
        losses: list[float] | None = None,
        best: BestEvaluation | None = None,
    ) -> None:
        self.request = folder / "requests" / "stop"
        self.signals = StopSignals()
        self.best = best or BestEvaluation()
        self.divergence = Divergence(RunDirectory(folder), 0, 100, tolerates_overflow=False)
        self.cadence = Cadence(
            plan,
            Agreement(1),
            self.signals,
            rank=rank,
            stop_request=self.request,
            best=self.best,
            early_stopping=early,
            divergence=self.divergence,
        )
        self._losses = iter(losses or [])
        self._arguments = TrainingArguments(output_dir=str(folder), use_cpu=True)
        self.evaluated: list[int] = []
        self.saved: list[int] = []
        self.last = 0

    def go(
        self,
        at: dict[int, Callable[[], object]] | None = None,
        start: int = 0,
        during: dict[str, Callable[[], object]] | None = None,
        backward: dict[int, Callable[[], object]] | None = None,
    ) -> Drive:
        """Take every step; `at` happens in a step's forward pass, `backward` in its backward pass, `during`
        in each evaluation's 3rd pass, or save."""
        state, control = TrainerState(), TrainerControl()
        self.cadence.on_train_begin(self._arguments, state, control)
        for step in range(start + 1, STEPS + 1):
            (at or {}).get(step, lambda: None)()
            self.cadence.propose()
            (backward or {}).get(step, lambda: None)()
            state.global_step = self.last = step
            self.cadence.on_step_end(self._arguments, state, control)
            if control.should_evaluate:
                control.should_evaluate = False
                self._evaluate(state, control, during)
            if control.should_save:
                control.should_save = False
                (during or {}).get("save", lambda: None)()
                self.saved.append(step)
                self.cadence.on_save(self._arguments, state, control)
            if control.should_training_stop:
                break
        return self

    def _evaluate(
        self, state: TrainerState, control: TrainerControl, during: dict[str, Callable[[], object]] | None
    ) -> None:
        """Five forward passes, as `LauncherTrainer.evaluate` takes them."""
        for turn in range(5):
            if turn == 2:
                (during or {}).get("evaluate", lambda: None)()
            if not self.cadence.evaluation_goes_on(state.global_step):
                control.should_save = control.should_training_stop = True
                return
        self.evaluated.append(state.global_step)
        found = {"eval_loss": next(self._losses, 1.0)}
        self.cadence.on_evaluate(self._arguments, state, control, metrics=found)


def every(evaluations: Every, saves: Every) -> Plan:
    return replace(PLAN, eval_every=evaluations, checkpoint_every=saves)


def test_in_steps_and_at_the_end(tmp_path: Path) -> None:
    run = Drive(tmp_path, every(Every(steps=5), Every(steps=4))).go()
    assert run.evaluated == [5, 10, 12]
    assert run.saved == [4, 8, 12]
    assert not run.cadence.stopped


def test_resumed_it_falls_on_the_same_steps(tmp_path: Path) -> None:
    run = Drive(tmp_path, every(Every(steps=5), Every(steps=4))).go(start=7)
    assert (run.evaluated, run.saved) == ([10, 12], [8, 12])


def test_without_validation_it_never_evaluates(tmp_path: Path) -> None:
    run = Drive(tmp_path, every(Every(), Every(steps=100))).go()
    assert run.evaluated == []
    assert run.saved == [12], "the end is always saved"


def test_a_clock_that_has_run_out_is_heard_at_the_end_of_the_step_and_starts_again(tmp_path: Path) -> None:
    plan = every(Every(seconds=0.3), Every(seconds=0.3))
    run = Drive(tmp_path, plan).go({5: lambda: time.sleep(0.31)})
    assert run.evaluated == run.saved == [5, 12]
    other = Drive(tmp_path, plan, rank=1).go({5: lambda: time.sleep(0.31)})
    assert other.evaluated == [12], "rank 0's clock is the one that counts"


def test_a_clock_is_due_once_its_time_has_passed() -> None:
    clock = Clock(Every(seconds=0.05))
    time.sleep(0.06)
    assert clock.is_due()
    clock.restart()
    assert not clock.is_due()
    assert not Clock(Every(steps=1)).is_due()
    assert not Clock(Every()).is_due()


@pytest.mark.parametrize("how", ["signal", "file"])
def test_asked_to_stop_it_saves_and_stops_at_the_end_of_the_step(tmp_path: Path, how: str) -> None:
    run = Drive(tmp_path, every(Every(steps=100), Every(steps=100)))

    def ask() -> None:
        if how == "signal":
            run.signals.received = signal.SIGUSR1
        else:
            run.request.parent.mkdir()
            run.request.touch()

    run.go({4: ask})
    assert (run.last, run.saved, run.evaluated) == (4, [4], [])
    assert run.cadence.stopped


def test_asked_to_stop_once_the_ranks_have_told_their_wishes_it_takes_one_step_more(tmp_path: Path) -> None:
    run = Drive(tmp_path, PLAN)
    run.go(backward={4: lambda: setattr(run.signals, "received", signal.SIGTERM)})
    assert (run.last, run.saved) == (5, [5])
    assert run.cadence.stopped


def test_only_rank_0_reads_the_file_and_every_rank_its_signals(tmp_path: Path) -> None:
    run = Drive(tmp_path, PLAN, rank=1)
    run.request.parent.mkdir()
    run.request.touch()
    assert run.go().last == STEPS
    run = Drive(tmp_path, PLAN, rank=1)
    run.signals.received = signal.SIGTERM
    assert run.go().last == 1


def test_a_file_system_that_does_not_say_for_once_is_asked_in_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Drive(tmp_path, PLAN)
    run.request.parent.mkdir()
    run.request.touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stale)
        assert not run.cadence.is_asked_to_stop()
    assert run.cadence.is_asked_to_stop()


def test_asked_at_the_last_step_it_has_finished_rather_than_stopped(tmp_path: Path) -> None:
    for step in (STEPS - 1, STEPS):
        run = Drive(tmp_path, PLAN)
        ask: dict[int, Callable[[], object]] = {
            step: lambda run=run: setattr(run.signals, "received", signal.SIGTERM)  # type: ignore[misc]
        }
        run.go(ask if step == STEPS else None, backward=ask)
        assert run.last == STEPS
        assert run.saved == [STEPS]
        assert not run.cadence.stopped


def test_asked_in_an_evaluation_it_gives_that_up_and_stops_there(tmp_path: Path) -> None:
    run = Drive(tmp_path, every(Every(steps=5), Every(steps=100)))
    run.go(during={"evaluate": lambda: setattr(run.signals, "received", signal.SIGTERM)})
    assert (run.last, run.saved, run.evaluated) == (5, [5], [])
    assert run.cadence.stopped
    assert run.cadence.evaluation_is_due


def test_where_the_evaluation_that_a_resume_begins_with_is_given_up_no_step_is_taken() -> None:
    trainer = object.__new__(LauncherTrainer)
    trainer.control = TrainerControl(should_training_stop=True)
    trainer._run_epoch(model=None)


def test_the_evaluation_of_the_last_step_is_always_made(tmp_path: Path) -> None:
    run = Drive(tmp_path, every(Every(steps=STEPS), Every(steps=100)))
    run.go(during={"evaluate": lambda: setattr(run.signals, "received", signal.SIGTERM)})
    assert (run.last, run.saved, run.evaluated) == (STEPS, [STEPS], [STEPS])
    assert not run.cadence.stopped


def test_asked_while_it_saves_it_stops_there_and_saves_no_second_time(tmp_path: Path) -> None:
    run = Drive(tmp_path, every(Every(), Every(steps=4)))
    run.go(during={"save": lambda: setattr(run.signals, "received", signal.SIGTERM)})
    assert (run.last, run.saved) == (4, [4])
    assert run.cadence.stopped


def test_a_save_that_falls_due_in_an_evaluation_is_made_after_the_next_step(tmp_path: Path) -> None:
    plan = every(Every(steps=5), Every(seconds=1.0))
    run = Drive(tmp_path, plan).go(during={"evaluate": lambda: time.sleep(0.6)})
    assert run.evaluated == [5, 10, 12]
    assert run.saved == [11, 12], "due in the second evaluation, when the ranks had told their wishes"


def test_an_exploded_loss_ends_it_with_nothing_saved(tmp_path: Path) -> None:
    run = Drive(tmp_path, every(Every(), Every(steps=6)))
    run.divergence.report({"loss": 3.0}, 1)

    def explode() -> None:
        for step in range(2, 7):
            run.divergence.report({"loss": 60.0}, step)

    with pytest.raises(Diverged, match="in steps 2 to 5: the loss has exploded"):
        run.go({5: explode})
    assert (run.last, run.saved) == (5, [])


def test_early_stopping_counts_evaluations_without_improvement(tmp_path: Path) -> None:
    losses = [5.0, 4.0, 4.1, 3.0, 3.5, 3.4, 9.0]
    run = Drive(
        tmp_path, every(Every(steps=1), Every(steps=100)), early=EarlyStopping(patience=2), losses=losses
    ).go()
    assert run.last == 6
    assert (run.best.step, run.best.loss) == (4, 3.0)
    assert run.saved == [1, 2, 4, 6], "every best one is kept, and where it stopped"
    assert not run.cadence.stopped, "nobody asked: the run is finished"
    assert run.cadence.told_of_end(run.last) == (
        "stopped early: eval_loss has not fallen for 2 evaluations; the model is that of step 4"
    )


def test_an_improvement_below_min_delta_is_none(tmp_path: Path) -> None:
    early = EarlyStopping(patience=2, min_delta=0.5)
    run = Drive(
        tmp_path, every(Every(steps=1), Every(steps=100)), early=early, losses=[5.0, 4.6, 4.51, 1.0]
    ).go()
    assert (run.last, run.best.step) == (3, 3), "it is the best all the same"
    assert "has not fallen by 0.5 for 2 evaluations" in (run.cadence.told_of_end(run.last) or "")


def test_a_run_that_goes_to_its_end_tells_of_an_older_model_alone(tmp_path: Path) -> None:
    early = EarlyStopping(patience=3)
    plan = every(Every(steps=6), Every(steps=100))
    run = Drive(tmp_path, plan, early=early, losses=[2.0, 3.0]).go()
    assert run.cadence.told_of_end(STEPS) == (
        "trained to the end; the model is that of step 6, whose eval_loss is the lowest"
    )
    assert Drive(tmp_path, plan, early=early, losses=[3.0, 2.0]).go().cadence.told_of_end(STEPS) is None
    assert Drive(tmp_path, plan).cadence.told_of_end(4) == (
        "stopped early: a callback ended training; the model is that of step 4"
    )


def test_the_count_goes_on_after_a_resume(tmp_path: Path) -> None:
    best = BestEvaluation(loss=2.0, step=3, mark=2.0, since=1)
    early = EarlyStopping(patience=2)
    run = Drive(tmp_path, every(Every(steps=1), Every(steps=100)), early=early, losses=[2.5], best=best).go(
        start=4
    )
    assert (run.last, run.best.step) == (5, 3)


def test_a_loss_that_is_not_a_number_is_no_improvement() -> None:
    best = BestEvaluation()
    assert best.add(3.0, 1, 0.0)
    assert not best.add(float("nan"), 2, 0.0)
    assert (best.loss, best.step, best.since) == (3.0, 1, 1)
    assert best.add(2.0, 3, 0.0)


def test_a_first_loss_that_is_not_a_number_does_not_stand_for_ever() -> None:
    best = BestEvaluation()
    best.add(float("nan"), 1, 0.0)
    assert best.add(2.0, 2, 0.0)
    assert (best.loss, best.step) == (2.0, 2)


def test_small_improvements_add_up_to_one_that_counts() -> None:
    best = BestEvaluation()
    counts = [best.add(loss, step, 0.5) and best.since for step, loss in enumerate((5.0, 4.8, 4.6, 4.4))]
    assert counts == [0, 1, 2, 0]


@given(losses=st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_the_best_is_the_first_of_the_lowest(losses: list[float]) -> None:
    best = BestEvaluation()
    for step, loss in enumerate(losses):
        best.add(loss, step, 0.0)
    assert best.loss == min(losses)
    assert best.step == losses.index(min(losses))
    assert best.since == len(losses) - 1 - losses.index(min(losses))
