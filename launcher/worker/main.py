"""One rank of a run, top to bottom: build, verify, train, save.

Started by `accelerate launch --config_file RUN_DIR/accelerate.yaml -m launcher.worker RUN_DIR`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from launcher.config.schema import RunConfig
from launcher.data.blocks import Blocks
from launcher.data.mixture import training_order
from launcher.data.phases import Phases, phases_text
from launcher.data.store import SPLITS, TOKENIZER_FOLDER, open_store
from launcher.errors import LauncherError, RequestError
from launcher.plan.choose import Plan
from launcher.plan.orders import Orders
from launcher.plan.shape import flops_per_token
from launcher.plan.sharding import zero_stage
from launcher.run import checkpoints as ledger
from launcher.run.directory import RunDirectory, write_text
from launcher.run.outcome import FAILURES, Outcome, RankEnd
from launcher.worker import saving
from launcher.worker.cadence import BestEvaluation, Cadence
from launcher.worker.checkpoint import CheckpointWriter, newest_good
from launcher.worker.chunked_loss import prove_chunked_loss
from launcher.worker.collate import Isolate, collate_of, stack
from launcher.worker.dataset import StoredRows, StoredValidationRows, TrainingRows, ValidationRows
from launcher.worker.divergence import Diverged, Divergence
from launcher.worker.fast import cache_whole_graphs, make_fast, set_matmul_precision, taken_by
from launcher.worker.heart import Heart
from launcher.worker.isolation import prove_isolation
from launcher.worker.loss_share import share_loss
from launcher.worker.metrics import MetricsFile, Progress
from launcher.worker.model import load_tokenizer, trained_model
from launcher.worker.out_of_memory import explain, held_memory, is_out_of_memory
from launcher.worker.pickles import allow_deepspeed, read_as_data
from launcher.worker.probe import check_predicts_next
from launcher.worker.rank import Rank, join, last_word, say_last, tells_failure
from launcher.worker.recomputing import recompute
from launcher.worker.report import Report
from launcher.worker.resume import check_length, go_on
from launcher.worker.step_times import StepTimes
from launcher.worker.stop import Agreement, StopSignals
from launcher.worker.stream import open_stream
from launcher.worker.together import barrier
from launcher.worker.tracing import compiled_so_far
from launcher.worker.trainer import LauncherTrainer, Rows, training_arguments
from launcher.worker.verify import verify
from launcher.worker.wandb import go_on_in_its_run, keep_in_folder


class Verify(TrainerCallback):
    """Compares the live run with the plan once everything is built and before step 1."""

    def __init__(
        self,
        directory: RunDirectory,
        orders: Orders,
        run: RunConfig,
        rows: Rows,
        start_step: int,
        attention: str,
    ) -> None:
        self._directory = directory
        self._orders = orders
        self._run = run
        self._rows = rows
        self._start_step = start_step
        self._attention = attention
        self._begun: float | None = None
        self.trainer: LauncherTrainer | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._orders.plan.compile and state.global_step == self._start_step:
            cache_whole_graphs()
            self._begun = self._begun or time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._begun is not None:
            took = time.perf_counter() - self._begun
            made = compiled_so_far("the layers" if self._orders.plan.strategy == "fsdp" else "the model")
            print(f"compiled: the first step took {took:.1f} s, torch.compile included; {made}", flush=True)
            self._begun = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self.trainer is not None
        plan, collate = self._orders.plan, self._rows.collate
        said = verify(
            self.trainer,
            self._directory,
            self._orders,
            self._run.train,
            self._start_step,
            self._attention,
        )
        print(said, flush=True)
        assert self._orders.vocabulary is not None
        if "chunked_loss" in taken_by(self.trainer.bare_model):
            said = prove_chunked_loss(
                self.trainer.bare_model,
                vocabulary=self._orders.vocabulary,
                block_size=plan.block_size,
                device=args.device,
                precision=plan.precision,
            )
            print(said, flush=True)
        if isinstance(collate, Isolate):
            said = prove_isolation(
                self.trainer.model_wrapped,
                collate,
                rows=plan.batch.micro_batch,
                block_size=plan.block_size,
                vocabulary=self._orders.vocabulary,
                device=args.device,
                precision=plan.precision,
            )
            print(said, flush=True)


class Reached(TrainerCallback):
    """The last step that was done, and by whom."""

    def __init__(self, heart: Heart) -> None:
        self._heart = heart
        self.step = 0
        self.trainer: LauncherTrainer | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.step = state.global_step
        self._heart.step(self.step)

    def end_saving(self) -> None:
        """After a failure: let a checkpoint that is being written still be committed, if it can be."""
        if self.trainer is None:
            return
        with self._heart.during("saving"):
            try:
                self.trainer.writer.finish()
            except Exception as error:  # noqa: BLE001 - the failure before it is the one that is told
                with contextlib.suppress(OSError):  # a full disk has no room for the log either
                    told = f"{type(error).__name__}: {error}"
                    print(f"the last checkpoint may not be committed: {told}", flush=True)


def main(arguments: list[str]) -> int:
    """Run one rank; returns its exit code."""
    if len(arguments) != 1:
        print("usage: python -m launcher.worker RUN_DIR", file=sys.stderr)
        return 2
    directory = RunDirectory(Path(arguments[0]).absolute())
    try:
        orders, run = directory.read_orders(), directory.read_config()
        rank = join(directory, run, orders.plan, os.environ)
    except LauncherError as error:
        print(f"error: {error.told}", file=sys.stderr)
        return error.exit_code
    disable_progress_bar()  # of transformers: the log is a file
    read_as_data(os.environ)
    if zero_stage(orders.plan.strategy) is not None:
        allow_deepspeed()
    signals = StopSignals()
    signals.install()
    reached, tells = Reached(rank.heart), False
    try:
        end = train(directory, orders, run, rank, signals, reached)
    except KeyboardInterrupt as interrupt:
        end = last_word(rank.number, reached.step, interrupt)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this rank's last word
        tells = tells_failure(directory, rank)
        held = held_memory(reached.trainer, orders.plan.device) if is_out_of_memory(error) else None
        end = last_word(rank.number, reached.step, error)
        if isinstance(error, Diverged):
            end = replace(end, outcome=Outcome.DIVERGED)
        if held is not None:
            begun = bool(ledger.committed(directory.checkpoints))
            message, hint = explain(error, orders, held, step=reached.step, begun=begun)
            end = replace(end, outcome=Outcome.OUT_OF_MEMORY, error=message, hint=hint)
        reached.end_saving()
    rank.heart.stop()
    say_last(end, directory, rank, tells=tells)
    if end.outcome in FAILURES:
        # The others wait for this rank in a collective: leave without the clean-up that would join them.
        sys.stdout.flush()
        os._exit(end.exit_code)
    return 0


def train(
    directory: RunDirectory,
    orders: Orders,
    run: RunConfig,
    rank: Rank,
    signals: StopSignals,
    reached: Reached,
) -> RankEnd:
    """Build, verify, train, save; returns how it ended."""
    plan = orders.plan
    tokenizer, rows = open_rows(directory, orders, run)
    checkpoint = newest_good(directory.checkpoints, rank=rank.number)
    start_step = 0 if checkpoint is None else checkpoint.step
    best = BestEvaluation()
    if checkpoint is not None:
        best = BestEvaluation(**checkpoint.state()["best"])
    phases = go_on(directory, run, rows.training, checkpoint)
    barrier()
    if rank.number == 0:
        write_text(directory.phases, phases_text(phases.phases))
        for name, reason in ledger.set_aside_damaged(directory.checkpoints, start_step):
            print(f"checkpoint {name} set aside in checkpoints/quarantine: {reason}", flush=True)

    check_length(phases, plan, start_step)
    set_matmul_precision(plan.fast)
    model = trained_model(orders, tokenizer, run.seed)
    attention = model.config._attn_implementation
    fell_back = make_ready(model, plan)
    agreement = Agreement(rank.world_size)
    times = StepTimes(plan, agreement)
    divergence = Divergence(
        directory, start_step, orders.vocabulary, tolerates_overflow=plan.precision == "fp16"
    )
    cadence = Cadence(
        plan,
        agreement,
        signals,
        rank=rank.number,
        stop_request=directory.stop_request,
        best=best,
        early_stopping=run.train.early_stopping,
        divergence=divergence,
    )
    writer = CheckpointWriter(
        directory.checkpoints,
        rank.heart,
        rank=rank.number,
        world_size=rank.world_size,
        keep=run.checkpoint.keep,
    )
    checks = Verify(directory, orders, run, rows, start_step, attention)
    reached.step = start_step
    # Times stop before anything waits. The writer waits for the last checkpoint before the report is closed.
    callbacks: list[TrainerCallback] = [checks, times, reached, cadence, writer]
    if rank.number == 0:
        report, others = reports(directory, orders, run, rank, rows.training, phases, times, start_step)
        writer.told = report.saved
        callbacks += [report, *others]
    callbacks += [load_callback(name) for name in run.train.callbacks]
    trainer = LauncherTrainer(
        model,
        training_arguments(run, orders, directory),
        rows,
        run=run,
        orders=orders,
        phases=phases,
        writer=writer,
        checkpoints=directory.checkpoints,
        start_step=start_step,
        metrics=[load_object("train.metrics", name) for name in run.train.metrics],
        best=best,
        heart=rank.heart,
        cadence=cadence,
        divergence=divergence,
        agreement=agreement,
        times=times,
        callbacks=callbacks,
        fell_back=fell_back,
    )
    checks.trainer = reached.trainer = trainer
    trainer.args.eval_on_start = checkpoint is not None and checkpoint.state().get("evaluation_is_due", False)
    # Ranks draw unlike dropout masks; the weights were drawn alike before.
    set_seed((run.seed + rank.number) % 2**32)

    assert plan.steps is not None
    if agreement.any(cadence.is_asked_to_stop()):  # while it started: nothing is there to be saved
        return RankEnd(rank.number, Outcome.STOPPED, start_step, time.time())
    if start_step < plan.steps and not best.is_final:
        trainer.train_from(checkpoint)
        rows.training.close()
    elif checkpoint is not None:
        trainer.take_final(checkpoint)
    with rank.heart.during("saving"):
        barrier()  # rank 0 may still write
    if cadence.stopped:
        return RankEnd(rank.number, Outcome.STOPPED, reached.step, time.time())

    with rank.heart.during("finishing"):
        if rank.number == 0:
            whole = trainer.final_model(lambda: trained_model(orders, tokenizer, run.seed))
            saving.save_model(whole, tokenizer, directory.model)
            upload(directory, run, rank)
        barrier()
    return RankEnd(
        rank.number,
        Outcome.FINISHED,
        reached.step,
        time.time(),
        planned_steps=plan.steps,
        reason=cadence.told_of_end(reached.step),
    )


def make_ready(model: PreTrainedModel, plan: Plan) -> dict[str, str]:
    """Have `model` train as planned. Returns the fast paths that it cannot take, each with the reason; raises
    RequestError for one that is not trained on the next token."""
    check_predicts_next(model, plan.block_size)
    fell_back = make_fast(model, plan.fast, block_size=plan.block_size)
    if "chunked_loss" not in taken_by(model):
        said = share_loss(model, block_size=plan.block_size)
        if said is not None:
            print(said, flush=True)
    recompute(model, plan.gradient_checkpointing)
    return fell_back


def upload(directory: RunDirectory, run: RunConfig, rank: Rank) -> None:
    """Push the final model to the Hub, where the run asks for it, and say where it is."""
    if run.push_to_hub is not None:
        where = saving.push_model(directory.model, run.push_to_hub)
        print(f"uploaded to {where}", file=rank.terminal, flush=True)


def open_rows(
    directory: RunDirectory, orders: Orders, run: RunConfig
) -> tuple[PreTrainedTokenizerBase, Rows]:
    """The tokenizer of the text, and the rows to train and evaluate on."""
    if run.data.mode == "stream":
        folder, training, validation = directory.tokenizer, *open_stream(directory, orders, run)
    else:
        folder, training, validation = open_store_of(orders, run)
    tokenizer = load_tokenizer(folder)
    flash = str(orders.model.get("attn_implementation")).startswith("flash")
    collate = collate_of(run.data, tokenizer.eos_token_id, tokenizer.pad_token_id, flash=flash)
    return tokenizer, Rows(
        training=training,
        validation=validation,
        collate=collate,
        labels=run.data.block_size - 1 if collate is stack else None,
    )


def open_store_of(orders: Orders, run: RunConfig) -> tuple[Path, TrainingRows, ValidationRows]:
    """The tokenizer's folder and the rows of a run whose text is prepared."""
    if orders.store is None or orders.plan.samples is None:
        raise RequestError(
            "this run's text is not prepared",
            hint="run `launcher train RUN`, which prepares it and plans anew",
        )
    store = open_store(Path(orders.store))
    training, validation = (Blocks(store, split, run.data.block_size, run.data.packing) for split in SPLITS)
    rows = StoredRows(training, training_order(training, run.data, run.seed), orders.plan.samples)
    return store.path / TOKENIZER_FOLDER, rows, StoredValidationRows(validation)


def reports(
    directory: RunDirectory,
    orders: Orders,
    run: RunConfig,
    rank: Rank,
    rows: TrainingRows,
    phases: Phases,
    times: StepTimes,
    start_step: int,
) -> tuple[Report, list[TrainerCallback]]:
    """Rank 0's record of the run, and what else the user looks at."""
    plan = orders.plan
    assert plan.steps is not None
    shape = orders.shape
    keep_in_folder(directory, os.environ)
    if "wandb" in run.report_to:
        go_on_in_its_run(directory, os.environ)
    report = Report(
        plan,
        rows,
        phases,
        times,
        MetricsFile(directory.metrics, start_step),
        Progress(rank.terminal, steps=plan.steps, done=start_step, name=run.name),
        flops_per_token=None if shape is None else flops_per_token(shape, plan.block_size),
    )
    if "tensorboard" not in run.report_to:
        return report, []
    from torch.utils.tensorboard import SummaryWriter  # a quarter of a second

    return report, [TensorBoardCallback(SummaryWriter(str(directory.tensorboard), purge_step=start_step))]


def load_object(key: str, path: str) -> Any:
    """The object that `module:name` names. Raises RequestError where it cannot be imported."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RequestError(
            f"{key}: {path} cannot be imported: {error}",
            hint="the module is looked for in the folder you launch from and in the installed packages",
        ) from error


def load_callback(path: str) -> TrainerCallback:
    """One of the class that `module:Class` names. Raises RequestError where that is no TrainerCallback."""
    found = load_object("train.callbacks", path)
    if not (isinstance(found, type) and issubclass(found, TrainerCallback)):
        raise RequestError(
            f"train.callbacks: {path} is not a TrainerCallback", hint="name a class derived from it"
        )
    return found()
