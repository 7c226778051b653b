"""What the Trainer refuses to save, when it writes what it saves, and with what it steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from launcher.config.schema import RunConfig
from launcher.plan.fast import Fast
from launcher.plan.orders import Orders
from launcher.run.directory import RunDirectory
from launcher.worker.checkpoint import CheckpointWriter
from launcher.worker.divergence import Diverged, Divergence
from launcher.worker.heart import Heart
from launcher.worker.stop import Agreement
from launcher.worker.trainer import LauncherTrainer, training_arguments
from tests.conftest import small_plan, small_run
from tests.worker.parity import NOTHING, STILL, batches, gpt2, made


def refused(directory: RunDirectory, rank: int, world: int, *, sound: bool) -> str:
    """How a rank that is to save at step 4 says that it does not."""
    heart = Heart(directory.root / f"beat-{rank}", directory.root / "stacks", rank, {})
    model: Any = torch.nn.Linear(3, 4)
    if not sound:
        torch.nn.init.constant_(model.bias, math.nan)
    trainer = object.__new__(LauncherTrainer)
    trainer._plan = small_plan()
    trainer._heart = heart
    trainer.bare_model = model
    trainer.state = TrainerState(global_step=4)
    trainer.writer = CheckpointWriter(directory.checkpoints, heart, rank=rank, world_size=world, keep=2)
    trainer._checkpoints = directory.checkpoints
    trainer._divergence = Divergence(directory, 2, None, tolerates_overflow=False)
    trainer._agreement = Agreement(world)
    with pytest.raises(Diverged) as caught:
        trainer._save_checkpoint(model, trial=None)
    return caught.value.message


def test_weights_that_are_not_finite_are_not_saved_though_no_report_told_of_it(tmp_path: Path) -> None:
    said = refused(RunDirectory(tmp_path), 0, 1, sound=False)
    assert said == (
        "training diverged in steps 3 to 4: the weights are not finite at step 4; nothing was saved there"
    )
    assert not (tmp_path / "checkpoints").exists()


def _save_on_one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    said = refused(RunDirectory(Path(folder)), rank, 2, sound=rank == 0)
    Path(folder, f"rank-{rank}").write_text(said)
    dist.destroy_process_group()


def test_no_rank_saves_what_is_not_finite_on_one(tmp_path: Path) -> None:
    start_processes(_save_on_one_rank, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    assert "the weights of another rank are not finite at step 4" in (tmp_path / "rank-0").read_text()
    assert ": the weights are not finite at step 4" in (tmp_path / "rank-1").read_text()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("left", "at_once"), [(0, True), (1 << 40, False)])
def test_without_memory_for_a_copy_the_state_is_written_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, at_once: bool
) -> None:
    """Either way it is the state of then, whatever the next step makes of it."""
    monkeypatch.setattr("launcher.worker.checkpoint.memory_left", lambda: left)
    trainer = object.__new__(LauncherTrainer)
    trainer.args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer.bare_model = gpt2()
    trainer.optimizer = torch.optim.AdamW(trainer.bare_model.parameters())
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda _: 1.0)
    bias = trainer.bare_model.get_parameter("transformer.ln_f.bias")
    write = trainer._copied_state(tmp_path)
    files = [tmp_path / name for name in ("model.safetensors", "optimizer.pt")]
    assert [file.exists() for file in files] == [at_once, at_once]
    torch.nn.init.ones_(bias)
    write()
    assert all(file.exists() for file in files)
    assert load_file(files[0])["transformer.ln_f.bias"].tolist() == [0.0] * len(bias)


def optimizer(model: PreTrainedModel, folder: Path, *, fused: bool) -> torch.optim.Optimizer:
    """The one that the Trainer makes for a plan with `fused_adamw` or without."""
    run = RunConfig.model_validate(small_run())
    plan = replace(small_plan(), fast=Fast(fused_adamw=fused))
    orders = Orders("0", "", plan, {}, weights=None, store=None, vocabulary=None)
    arguments = training_arguments(run, orders, RunDirectory(folder))
    return Trainer(model, arguments).create_optimizer()


def test_the_planned_optimizer_is_built_and_fused_it_takes_the_same_steps(tmp_path: Path) -> None:
    weights = []
    for fused in (True, False):
        model, batch = made(lambda: gpt2(**STILL), NOTHING)[0], batches()["concat"]
        adamw = optimizer(model, tmp_path, fused=fused)
        assert isinstance(adamw, torch.optim.AdamW)
        assert [bool(group["fused"]) for group in adamw.param_groups] == [fused, fused]
        for _ in range(5):
            adamw.zero_grad()
            model(**batch).loss.backward()
            adamw.step()
        weights.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    began = torch.cat([each.detach().flatten() for each in made(gpt2, NOTHING)[0].parameters()])
    assert float((weights[1] - began).norm()) > 0.1
    assert float((weights[0] - weights[1]).norm()) < 1e-4 * float((weights[1] - began).norm())
