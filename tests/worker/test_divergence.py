from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.run import checkpoints as ledger
from launcher.run.directory import RunDirectory
from launcher.worker.divergence import EXPLODED, REPORTS, Diverged, Divergence

UNIFORM = math.log(300)
HERE = RunDirectory(Path("/nowhere/run"))


def divergence(directory: RunDirectory = HERE, *, fp16: bool = False) -> Divergence:
    return Divergence(directory, 0, 300, tolerates_overflow=fp16)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_is_named_with_its_steps(name: str, bad: float) -> None:
    follows = divergence()
    follows.report({"loss": 5.0, "grad_norm": 1.0}, 10)
    with pytest.raises(Diverged) as caught:
        follows.report({"loss": 5.0, "grad_norm": 1.0, name: bad}, 20)
    assert f"diverged in steps 11 to 20: {name} is {bad} at step 20" in caught.value.message
    assert "data.skip.steps=[11-20]" in (caught.value.hint or "")
    assert "data show /nowhere/run --step 11" in (caught.value.hint or "")


def test_with_fp16_an_infinite_norm_is_how_the_loss_scale_is_found() -> None:
    follows = divergence(fp16=True)
    follows.report({"loss": 5.0, "grad_norm": math.inf}, 1)
    with pytest.raises(Diverged):
        follows.report({"loss": math.nan, "grad_norm": math.inf}, 2)


def test_a_checkpoint_since_clears_the_steps_before_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    ledger.commit(ledger.begin(directory.checkpoints, 15), step=15, samples=1, world_size=1, created=0.0)
    follows = divergence(directory)
    follows.report({"loss": 5.0}, 10)
    with pytest.raises(Diverged, match="in steps 16 to 20"):
        follows.report({"loss": math.nan}, 20)


@given(losses=st.lists(st.floats(0, 1000), max_size=60))
def test_exploded_is_far_above_the_best_and_above_guessing_for_long(losses: list[float]) -> None:
    """By the definition, over the last reports."""
    follows = divergence()
    for step, loss in enumerate(losses, 1):
        follows.report({"loss": loss}, step)
    tail = range(len(losses) - REPORTS, len(losses))
    high = [step >= 0 and losses[step] > max(min(losses[: step + 1]) + 2.0, UNIFORM + 1.0) for step in tail]
    assert follows.has_exploded == all(high)


def test_a_checkpoint_made_in_an_explosion_is_to_be_moved_away(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    ledger.commit(ledger.begin(directory.checkpoints, 15), step=15, samples=1, world_size=1, created=0.0)
    follows = divergence(directory)
    follows.report({"loss": 3.0}, 10)
    for step in range(11, 16):
        follows.report({"loss": 50.0}, step)
    error = follows.error("the loss has exploded", 16)
    assert "in steps 11 to 16" in error.message
    assert f"move the checkpoints after step 10 out of {directory.checkpoints}" in (error.hint or "")


def test_a_checkpoint_at_the_very_step_is_to_be_moved_away(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    ledger.commit(ledger.begin(directory.checkpoints, 20), step=20, samples=1, world_size=1, created=0.0)
    follows = divergence(directory)
    follows.report({"loss": 5.0}, 10)
    error = follows.error("loss is nan", 20)
    assert "training diverged in step 20: loss is nan at step 20" in error.message
    assert f"move the checkpoints after step 19 out of {directory.checkpoints}" in (error.hint or "")
    assert "'data.skip.steps=[20]'" in (error.hint or "")


def test_what_an_exploded_loss_has_made_is_not_saved_though_it_is_finite() -> None:
    model, follows = torch.nn.Linear(3, 4), divergence()
    follows.report({"loss": 3.0}, 1)
    for step in range(REPORTS):
        assert follows.flaw(model.parameters()) is None
        follows.report({"loss": 50.0}, 2 + step)
    assert follows.flaw(model.parameters()) == EXPLODED


def test_weights_that_are_not_finite_are_seen_in_every_parameter() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    follows = divergence()
    assert follows.flaw(model.parameters()) is None
    for parameter in model.parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] = math.inf
        assert follows.flaw(model.parameters()) == "the weights are not finite"
        with torch.no_grad():
            parameter.copy_(before)
    assert follows.flaw(model.parameters()) is None
