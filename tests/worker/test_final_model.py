"""Which checkpoint the final model is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerState

from launcher.errors import TrainingError
from launcher.run import checkpoints as ledger
from launcher.worker.cadence import BestEvaluation
from launcher.worker.trainer import LauncherTrainer
from tests.conftest import small_plan


def test_the_best_evaluations_checkpoint_is_read_again_before_it_is_the_model(tmp_path: Path) -> None:
    folder = ledger.begin(tmp_path, 5)
    (folder / "model.safetensors").write_bytes(b"weights")
    made = ledger.commit(folder, step=5, samples=40, world_size=1, created=0.0)
    (made.folder / "model.safetensors").write_bytes(b"weighty")
    trainer = object.__new__(LauncherTrainer)
    trainer._plan = small_plan()
    trainer.state = TrainerState(global_step=9)
    trainer._best = BestEvaluation(1.0, 5)
    trainer._checkpoints = tmp_path
    trainer.bare_model = None  # type: ignore[assignment]
    with pytest.raises(TrainingError, match="step 5 is damaged"):
        trainer.final_model(lambda: None)  # type: ignore[arg-type, return-value]
