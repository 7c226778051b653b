"""Reports are those of the stock Trainer, number for number, and no step waits to read one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from launcher.run.directory import RunDirectory
from launcher.worker.divergence import Diverged, Divergence
from launcher.worker.reporting import LateReport, Reading, ReportingTrainer
from launcher.worker.step_times import HostMoment, Lap, StepTimes
from launcher.worker.stop import Agreement
from tests.conftest import Workplace, metrics, small_plan, small_run, write_json
from tests.worker.parity import VOCABULARY, gpt2


class Seen(TrainerCallback):
    """What callbacks are told, in its order; `at` has what else is done as a step ends."""

    def __init__(self, **at: Callable[[Any, Any], None]) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: dict[int, dict[str, float]] = {}
        self._at = {int(name.removeprefix("step_")): do for name, do in at.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        self.events.append(("done", state.global_step))
        self._at.get(state.global_step, lambda *_: None)(control, about["model"])

    def on_log(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        if "loss" in about["logs"]:
            self.events.append(("told", state.global_step))
            self.logs[state.global_step] = about["logs"]

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(("evaluated", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append(("saved", state.global_step))


Kind = TypeVar("Kind", bound=Trainer)


def trained(kind: type[Kind], folder: Path, seen: Seen) -> Kind:
    texts = torch.arange(24 * 16).mul(31).fmod(VOCABULARY).view(24, 16)
    rows = [{"input_ids": ids, "labels": ids} for ids in texts]
    torch.manual_seed(1)
    trainer = kind(
        model=gpt2(),
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=7,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            logging_steps=2,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=3,
            optim="adamw_torch_fused",
        ),
        train_dataset=rows,
        eval_dataset=rows[:2],
        callbacks=[seen],
    )
    if isinstance(trainer, ReportingTrainer):
        trainer._times = StepTimes(small_plan(), Agreement(1))
        trainer._divergence = Divergence(RunDirectory(folder), 0, None, tolerates_overflow=False)
    trainer.train()
    return trainer


def test_every_number_is_the_stock_trainers_and_is_told_a_step_later(tmp_path: Path) -> None:
    ours, stock = Seen(), Seen()
    late = trained(ReportingTrainer, tmp_path, ours)
    at_once = trained(Trainer, tmp_path, stock)
    assert sorted(ours.logs) == [1, 2, 4, 6]
    for step, logs in ours.logs.items():
        assert logs == {name: stock.logs[step][name] for name in ("loss", "grad_norm", "learning_rate")}
    told = [name for name in ours.events if name[0] == "told" or name[1] in (2, 3)]
    assert told == [("done", 2), ("told", 1), ("done", 3), ("told", 2), ("told", 4), ("told", 6)]
    assert ours.events[-1] == ("told", 6), "the last step reports nothing, and leaves nothing untold"
    assert late.state.log_history == []
    assert late._total_loss_scalar == pytest.approx(at_once._total_loss_scalar)


@pytest.mark.parametrize(
    ("flag", "then"),
    [("should_evaluate", "evaluated"), ("should_save", "saved"), ("should_training_stop", None)],
)
def test_what_follows_a_step_finds_its_report_made(tmp_path: Path, flag: str, then: str | None) -> None:
    seen = Seen(step_4=lambda control, _: setattr(control, flag, True))
    trained(ReportingTrainer, tmp_path, seen)
    at = seen.events.index(("done", 4))
    assert seen.events[at + 1 : at + 3] == [("told", 4), *([(then, 4)] if then else [])]


def test_a_report_that_is_asked_for_as_training_ends_is_made(tmp_path: Path) -> None:
    class Asking(Seen):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log = True

    seen = Asking()
    trained(ReportingTrainer, tmp_path, seen)
    assert seen.events[-2:] == [("told", 6), ("told", 7)]


def poison(_: Any, model: torch.nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan


def test_a_step_that_is_not_finite_is_named_and_not_saved(tmp_path: Path) -> None:
    seen = Seen(step_3=poison)
    with pytest.raises(Diverged, match="in steps 3 to 4: loss is nan at step 4"):
        trained(ReportingTrainer, tmp_path, seen)
    assert seen.events[-2:] == [("done", 5), ("told", 4)]
    seen = Seen(step_3=poison, step_4=lambda control, _: setattr(control, "should_save", True))
    with pytest.raises(Diverged, match="at step 4"):
        trained(ReportingTrainer, tmp_path, seen)
    assert seen.events[-2:] == [("done", 4), ("told", 4)]


class Broken(Reading):
    """What a GPU says of a reading once something has gone wrong on it."""

    def has_arrived(self) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_after_a_failure_nothing_else_that_fails_is_told(tmp_path: Path) -> None:
    trainer = trained(ReportingTrainer, tmp_path, Seen())
    moment = HostMoment()
    lap = Lap(moment, moment, (), lambda: 0.0, lambda: 0.0, host=0.0, steps=1, at=0.0)
    trainer._late = LateReport(trainer.state, Broken({"loss": 1.0}), 0.1, 1, lap)
    trainer.report_what_is_there()


def test_a_reading_is_a_copy_of_what_is_summed_up_in_place() -> None:
    loss = torch.tensor(2.5)
    reading = Reading({"loss": loss, "grad_norm": 0.5})
    loss.zero_()
    assert reading.has_arrived()
    assert reading.wait() == {"loss": 2.5, "grad_norm": 0.5}


COUNTING = """
import json, traceback
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A number that leaves its tensor, or a shape that hangs on one: on a GPU, the host waits for it.
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.found.append([str(func), [frame.name for frame in traceback.extract_stack()]])
        return func(*args, **(kwargs or {}))

class Counting(TrainerCallback):
    def on_train_begin(self, args, state, control, **_):
        self.waits = Waits()
        self.waits.__enter__()

    def on_train_end(self, args, state, control, **_):
        self.waits.__exit__(None, None, None)
        with open("waits.json", "w") as stream:
            json.dump(self.waits.found, stream)
"""

AWAITED = ("report_late", "_write_checkpoint", "evaluate", "_finalize_training", "_get_iterator")
"""Where the host may wait for the device; the last draws the loader's seed, on the host, before step 1."""


def test_no_step_of_a_real_run_waits_for_the_device(workplace: Workplace) -> None:
    (workplace.folder / "mine.py").write_text(COUNTING)
    write_json(workplace.folder / "run.yaml", small_run() | {"report_to": ["tensorboard"]})
    directory = workplace.train(
        *("train.callbacks=[mine:Counting]", "train.steps=7", "train.log_every=2", "train.eval_every=4"),
        "train.micro_batch=4",
    )
    waits = json.loads((workplace.folder / "waits.json").read_text())
    assert [stack for _, stack in waits if not any(name in stack for name in AWAITED)] == []
    reports = [line["step"] for line in metrics(directory) if "loss" in line]
    assert reports == [1, 2, 4, 6, 7]
    told = [name for name, stack in waits if "report_late" in stack]
    assert told == 2 * len(reports) * ["aten._local_scalar_dense.default"], "the loss and the norm of each"
