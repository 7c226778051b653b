"""Which checkpoint the final model is made of, and which weights make none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState

from launcher.errors import TrainingError
from launcher.run import checkpoints as ledger
from launcher.worker.cadence import BestEvaluation
from launcher.worker.saving import save_model
from launcher.worker.trainer import LauncherTrainer
from tests.conftest import small_plan
from tests.worker.parity import gpt2


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


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        (lambda weight: weight.data.view(-1)[-1:].fill_(math.nan), "hold NaN or infinity"),
        (lambda weight: setattr(weight, "data", torch.empty(0)), "are empty"),
    ],
    ids=["nan", "empty"],
)
def test_a_weight_that_is_not_whole_is_named_and_an_older_model_stays(
    tmp_path: Path, flaw: Callable[[torch.nn.Parameter], object], said: str
) -> None:
    older = tmp_path / "model"
    older.mkdir()
    (older / "model.safetensors").write_bytes(b"older")
    model = gpt2()
    flaw(model.get_parameter("transformer.ln_f.weight"))
    tokenizer: Any = SimpleNamespace(save_pretrained=lambda folder: None)
    with pytest.raises(TrainingError, match=rf"1 of its \d+ weights {said}: transformer\.ln_f\.weight$"):
        save_model(model, tokenizer, older)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "model.safetensors"]
    assert (older / "model.safetensors").read_bytes() == b"older"
