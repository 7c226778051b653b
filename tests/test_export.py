"""`launcher checkpoint export`: a checkpoint in shards becomes one model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.check_strategies import Bench, Cell
from tests.conftest import Workplace, sentences


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A folder with a run on two ranks under ZeRO-3."""
    bench = Bench(tmp_path_factory.mktemp("export"), sentences(2000))
    bench.whole(Cell("zero3", "fp32"))
    return Workplace(bench.folder)


RUN = "runs/zero3-fp32"


def test_the_last_checkpoint_is_the_final_model(trained: Workplace) -> None:
    done = trained.run("checkpoint", "export", RUN)
    assert done.returncode == 0, done.stderr
    exported = trained.folder / RUN / "exports" / "step-00000020"
    assert done.stdout.strip() == str(exported)
    final = trained.folder / RUN / "model"
    assert (exported / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    assert len(AutoTokenizer.from_pretrained(exported)) == 300


def test_an_earlier_one_is_another_model(trained: Workplace) -> None:
    done = trained.run("checkpoint", "export", RUN, "--step", "10", "--to", "half-way", "--json")
    assert json.loads(done.stdout) == {"step": 10, "model": str(trained.folder / "half-way")}
    early, late = (
        AutoModelForCausalLM.from_pretrained(trained.folder / where).state_dict()["transformer.wte.weight"]
        for where in ("half-way", f"{RUN}/model")
    )
    assert early.dtype == torch.float32
    assert not torch.equal(early, late)
    again = trained.run("checkpoint", "export", RUN, "--step", "10", "--to", "half-way")
    assert again.returncode == 2
    assert "nothing is overwritten" in again.stderr


def test_what_is_not_there_or_damaged_is_refused(trained: Workplace) -> None:
    missing = trained.run("checkpoint", "export", RUN, "--step", "7")
    assert missing.returncode == 2
    assert "there are: 10, 20" in missing.stderr
    state = next((trained.folder / RUN / "checkpoints" / "step-00000020").glob("global_step20/*optim*"))
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = trained.run("checkpoint", "export", RUN, "--step", "20", "--to", "damaged")
    assert damaged.returncode == 1
    assert "does not have the hash it was written with" in damaged.stderr
    assert not (trained.folder / "damaged").exists()
    newest = trained.run("checkpoint", "export", RUN, "--to", "good", "--json")
    assert json.loads(newest.stdout)["step"] == 10
