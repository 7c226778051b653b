"""The Trainer subclass: our data order, our evaluation, our checkpoints; the rest is stock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from launcher.config.schema import RunConfig
from launcher.data.phases import Phases
from launcher.errors import RequestError
from launcher.plan.choose import Plan
from launcher.plan.orders import Orders
from launcher.plan.sharding import zero_stage
from launcher.plan.states import checkpoint_bytes
from launcher.run.checkpoints import Checkpoint, good_at
from launcher.run.directory import RunDirectory
from launcher.worker import saving
from launcher.worker.cadence import BestEvaluation, Cadence
from launcher.worker.checkpoint import CheckpointWriter, has_room_for_copy, host_copy
from launcher.worker.collate import Collate, Row, Tensors, to_device
from launcher.worker.dataset import RankBatches, TrainingRows, ValidationRows, training_loader
from launcher.worker.divergence import Divergence
from launcher.worker.engine import engine_arguments, fsdp_policy, innermost, is_sharded
from launcher.worker.evaluate import Metric, evaluate
from launcher.worker.heart import Heart
from launcher.worker.pickles import refusing_code
from launcher.worker.reporting import ReportingTrainer
from launcher.worker.reshard import Remove, mend_zero3, reshard
from launcher.worker.resume import data_state
from launcher.worker.schedule import follow_samples, take_up
from launcher.worker.step_times import StepTimes, TimedIterator
from launcher.worker.stop import Agreement
from launcher.worker.together import as_rank_0_has_it


@dataclass(frozen=True, slots=True)
class Rows:
    """What there is to train and evaluate on, and how rows become tensors.

    `labels`: how many each training row has; None where rows differ and labels must be counted.
    """

    training: TrainingRows
    validation: ValidationRows
    collate: Collate
    labels: int | None


EVALUATION_TOKENS = 2048
"""Tokens in a forward pass of evaluation, where training's micro-batch has fewer: it keeps no activations."""

OPEN_DEFAULTS: Mapping[str, Any] = {
    "logging_first_step": True,
    "ddp_broadcast_buffers": False,
}
"""What launcher sets differently from transformers, and `train.extra` may set otherwise."""


def training_arguments(run: RunConfig, orders: Orders, directory: RunDirectory) -> TrainingArguments:
    """The stock arguments for the plan. Saving, evaluating and data order are ours, so theirs are off."""
    plan, train = orders.plan, run.train
    assert plan.steps is not None
    assert plan.warmup_steps is not None
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    open_defaults = {
        **OPEN_DEFAULTS,
        **_same_sums(plan),
        "optim": "adamw_torch_fused" if plan.fast.fused_adamw else "adamw_torch",
    }
    ours = {
        **engine_arguments(plan, directory.deepspeed),
        "output_dir": str(directory.root),
        "use_cpu": plan.device == "cpu",
        "seed": run.seed,
        "per_device_train_batch_size": plan.batch.micro_batch,
        "per_device_eval_batch_size": plan.batch.micro_batch,
        "gradient_accumulation_steps": plan.batch.accumulation,
        "max_steps": plan.steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": plan.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "max_grad_norm": train.max_grad_norm,
        "bf16": plan.precision == "bf16",
        "fp16": plan.precision == "fp16",
        "activation_checkpointing": False,  # the model has been told already, layer by layer
        "torch_compile": plan.compile,
        "logging_steps": train.log_every,
        # Off: it would replace a NaN loss by an old mean, and costs a synchronisation per micro-batch.
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": [name for name in run.report_to if name != "tensorboard"],
        "run_name": run.name,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ignore_data_skip": True,
    }
    with _extra_may_be_refused("TrainingArguments"):
        return TrainingArguments(**{**open_defaults, **train.extra, **ours})


@contextmanager
def _extra_may_be_refused(by: str) -> Iterator[None]:
    """Raise RequestError for what is made inside of `train.extra`, where its values are refused."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"train.extra: {by} refuses it: {error}", hint="look at the values in train.extra"
        ) from error


def _same_sums(plan: Plan) -> dict[str, Any]:
    """What makes a step's sums the same whether an attempt begins with it or not.

    After its first backward pass DDP lays gradients out anew, in the order they came. From three ranks on the
    order in which gloo adds depends on that, and so did the last bit of the first step after a resume. DDP
    keeps its first layout where it looks for unused parameters, which takes a walk over the graph each step.
    """
    return {"ddp_find_unused_parameters": plan.device == "cpu" and plan.batch.world_size > 2}


class LauncherTrainer(ReportingTrainer):
    """`transformers.Trainer` on launcher's data order, evaluation and ledger."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: Rows,
        *,
        run: RunConfig,
        orders: Orders,
        phases: Phases,
        writer: CheckpointWriter,
        checkpoints: Path,
        start_step: int,
        metrics: Sequence[Metric],
        best: BestEvaluation,
        heart: Heart,
        cadence: Cadence,
        divergence: Divergence,
        agreement: Agreement,
        times: StepTimes,
        callbacks: list[TrainerCallback],
        fell_back: Mapping[str, str],
    ) -> None:
        self._plan = orders.plan  # for what the stock Trainer calls while it is made
        super().__init__(model=model, args=arguments, train_dataset=rows.training, callbacks=callbacks)
        self.bare_model = model
        self.fell_back = fell_back
        self.phases = phases
        self._rows = rows
        self._run = run
        self._store = orders.store
        self.writer = writer
        self._checkpoints = checkpoints
        self._start_step = start_step
        self._metrics = metrics
        self._best = best
        self._heart = heart
        self._cadence = cadence
        self._divergence = divergence
        self._agreement = agreement
        self._times = times

    @property
    def rank(self) -> int:
        return int(self.args.process_index)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self._plan.strategy == "fsdp":
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = fsdp_policy(self._plan)

    def get_train_dataloader(self) -> DataLoader[Row]:
        return training_loader(
            self._rows.training,
            self._batches(),
            self._rows.collate,
            self.args,
            pin_memory=self._plan.device == "cuda" and self.args.dataloader_pin_memory,
        )

    def _batches(self) -> RankBatches:
        assert self._plan.steps is not None
        return RankBatches(
            self.phases,
            self._plan.batch,
            self.rank,
            self._rows.training.deal,
            start=self._start_step,
            steps=self._plan.steps,
        )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        with _extra_may_be_refused("the optimizer"):
            return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The stock schedule; where the run's length is not given in steps, followed by samples."""
        with _extra_may_be_refused(f"the schedule {self._run.train.schedule}"):
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._run.train.steps is None:
            assert self._plan.warmup_steps is not None
            follow_samples(scheduler, self.phases, warmup=self._plan.warmup_steps, steps=num_training_steps)
        return scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """A step's micro-batches. What the loader takes for them is timed; counting labels is not."""
        self._times.go_on()
        return super().get_batch_samples(
            TimedIterator(epoch_iterator, self._times.data_wait), num_batches, device
        )

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        with self._times.forward.running():
            loss = super().compute_loss(*arguments, **named)
        if self.accelerator.sync_gradients:  # the backward pass of the step's last micro-batch comes next
            self._cadence.propose()
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Tensors], device: torch.device) -> Any:
        """Labelled tokens in the whole optimizer step. Equal rows need no counting and no collective."""
        if self._rows.labels is None:
            # Counted on the device: the stock Trainer copies the host's count there, and waits for it.
            labels = [to_device({"labels": batch["labels"]}, device) for batch in batch_samples]
            counted: Any = super()._get_num_items_in_batch(labels, device)
            return counted.clamp_min(1)  # a step may have no label at all, of documents that end a token late
        # Filled on the device: a number that is copied there waits for it.
        return torch.full((), self._plan.batch.batch_size * self._rows.labels, device=device)

    def _prepare_inputs(self, inputs: Tensors) -> Tensors:
        """The micro-batch on its device, from pinned memory and without waiting for what runs there."""
        return to_device(inputs, self.args.device)

    def floating_point_ops(self, inputs: Tensors) -> int:
        """Not counted here: the stock count walks through every parameter at each micro-batch."""
        return 0

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Every whole validation block once; see `worker.evaluate`. Given up where all ranks agree to
        stop: the run then stops here, with a checkpoint that says that the evaluation is due."""
        with self._heart.during("evaluating"):
            found = evaluate(
                self.bare_model,
                self._rows.validation,
                self._rows.collate,
                rank=self.rank,
                world_size=self._plan.batch.world_size,
                micro_batch=max(self._plan.batch.micro_batch, EVALUATION_TOKENS // self._plan.block_size),
                block_size=self._plan.block_size,
                device=self.args.device,
                metrics=self._metrics,
                goes_on=self._evaluation_goes_on,
            )
        if found is None:
            self.control.should_evaluate = False  # or the end of training would begin it, and save, once more
            self.control.should_save = self.control.should_training_stop = True
            return {}
        self._cadence.evaluation_is_due = False
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _run_epoch(self, *arguments: Any, **about: Any) -> None:
        """None of it where the evaluation that a resume begins with was given up, or was the last one: the
        stock Trainer would take one step more, and forget the wish."""
        if not self.control.should_training_stop:
            super()._run_epoch(*arguments, **about)  # type: ignore[no-untyped-call]

    def _evaluation_goes_on(self) -> bool:
        self._heart.beat()
        return self._cadence.evaluation_goes_on(self.state.global_step)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        with self._heart.during("saving"):
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        step = self.state.global_step
        flaw = self._divergence.flaw(self.bare_model.parameters())
        if self._agreement.any(flaw is not None):
            raise self._divergence.error(flaw or "the weights of another rank are not finite", step)
        with self.writer.writing(step, self._checkpoint_bytes()) as folder:
            copied = None
            if is_sharded(self._plan):
                self._save_optimizer_and_scheduler(str(folder))
            else:
                copied = self._copied_state(folder)
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
            self.writer.commit(
                folder,
                step=step,
                samples=self.phases.consumed(step),
                best=self._best.step,
                state={
                    "store": self._store,
                    **data_state(self._rows.training, self.phases, step),
                    "cursors": self._rows.training.cursors(),
                    "best": asdict(self._best),
                    "evaluation_is_due": self._cadence.evaluation_is_due,
                },
                copied=copied,
            )

    def _copied_state(self, folder: Path) -> Callable[[], None]:
        """Writes weights and optimizer as they are now, the way the stock Trainer does and reads.

        Where memory has no room for a copy of them, that has been done.
        """
        if not self.args.should_save:
            return lambda: None
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        state = {"weights": self.bare_model.state_dict(), "optimizer": self.optimizer.state_dict()}

        def write(state: Mapping[str, Any]) -> None:
            self.bare_model.save_pretrained(folder, state_dict=state["weights"])
            torch.save(state["optimizer"], folder / OPTIMIZER_NAME)

        if not has_room_for_copy(state):
            write(state)
            return lambda: None
        return partial(write, host_copy(state))

    def _checkpoint_bytes(self) -> int:
        """What a checkpoint takes, by the plan; of a model whose size it does not know, by the model."""
        if self._plan.checkpoint_bytes is not None:
            return self._plan.checkpoint_bytes
        parameters = sum(each.numel() for each in self.bare_model.parameters())
        return checkpoint_bytes(parameters, self._plan.strategy, self._plan.precision)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        assert self.lr_scheduler is not None
        take_up(
            getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        )  # accelerate's holds the stock one
        if zero_stage(self._plan.strategy) == 3:
            mend_zero3(innermost(self.optimizer), self.args.weight_decay)

    def train_from(self, checkpoint: Checkpoint | None) -> None:
        """Train to the end of the plan or to a stop. Raises TrainingError where the checkpoint holds code."""
        try:
            if checkpoint is None:
                self.train()
                return
            if self.rank == 0:  # `checkpoint.keep` may be lower now, because there is no room for another
                self.writer.prune(self._best.step)
            with refusing_code(checkpoint.folder):
                self.train(resume_from_checkpoint=str(self._resume_folder(checkpoint)))
        except BaseException:
            self.report_what_is_there()
            raise

    def _resume_folder(self, checkpoint: Checkpoint) -> Path:
        """Where this world reads the checkpoint from: itself, or what DeepSpeed makes of another world's."""
        stage, world = zero_stage(self._plan.strategy), self._plan.batch.world_size
        if stage is None or checkpoint.world_size == world:
            return checkpoint.folder
        folder = as_rank_0_has_it(reshard(checkpoint) if self.rank == 0 else checkpoint.folder)
        self.args.hf_deepspeed_config.config["checkpoint"]["load_universal"] = True
        self.add_callback(Remove(folder))
        return folder

    def take_final(self, checkpoint: Checkpoint) -> None:
        """Be where training ended before: `checkpoint` is its last, and only the model is to be made."""
        self.state.global_step = checkpoint.step
        if not is_sharded(self._plan):
            saving.load_weights(self.bare_model, checkpoint.folder)

    def final_model(self, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The model whole, with the weights of the best evaluation where early stopping keeps one.

        Where no rank holds all of it, one that `build` makes and the last checkpoint fills; call it on one
        rank.
        """
        if is_sharded(self._plan):
            unset_hf_deepspeed_config()  # or transformers would build it in shards
            model, step = build(), self._best.step or self.state.global_step
        elif self._best.step in (None, self.state.global_step):
            return self.bare_model
        else:
            model, step = self.bare_model, self._best.step
        # The best one may be old: nothing has read it since it was written.
        saving.load_weights(model, good_at(self._checkpoints, step).folder)
        return model
