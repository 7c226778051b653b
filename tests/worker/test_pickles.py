"""A checkpoint with something planted in it: nothing of it may run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from launcher.errors import TrainingError
from launcher.worker.pickles import allow_deepspeed, read_as_data, refusing_code
from launcher.worker.saving import read_weights
from tests.worker.planting import Planted


@pytest.fixture(autouse=True)
def data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a rank; and as it was, for the tests after."""
    environment: dict[str, str] = {}
    read_as_data(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_what_is_planted_runs_where_nothing_is_done_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    torch.save({"state": Planted(tmp_path / "ran")}, tmp_path / "optimizer.pt")
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_torch_load_runs_nothing_whatever_it_is_asked(tmp_path: Path) -> None:
    torch.save({"state": Planted(tmp_path / "ran")}, tmp_path / "optimizer.pt")
    with pytest.raises(TrainingError, match=r"asks for posix\.mkdir") as refused, refusing_code(tmp_path):
        torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert "goes on from the one before" in (refused.value.hint or "")
    assert not (tmp_path / "ran").exists()


def test_deepspeeds_classes_are_read(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(2.0, 2.0, 10, 1.0, 1, False)
    torch.save({"scaler": scaler, "at": fragment_address(numel=3, start=4)}, tmp_path / "optim_states.pt")
    allow_deepspeed()
    read = torch.load(tmp_path / "optim_states.pt", weights_only=False)
    assert (read["at"].start, read["scaler"].cur_scale) == (4, 2.0)


def test_an_index_of_torch_is_read_and_one_that_calls_something_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "pytorch_model_fsdp_0"
    weights = {"model": {"weight": torch.arange(6.0), "half": torch.ones(2, dtype=torch.bfloat16)}}
    _save_state_dict(weights, FileSystemWriter(folder), no_dist=True)
    assert read_weights(tmp_path)["weight"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]

    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = Planted(tmp_path / "ran")
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(TrainingError, match=r"asks for posix\.mkdir"):
        read_weights(tmp_path)
    assert not (tmp_path / "ran").exists()
    read = {"model": {"weight": torch.zeros(6)}}
    _load_state_dict(read, FileSystemReader(folder), no_dist=True)
    assert (tmp_path / "ran").exists(), "torch itself would have run it"


def test_a_ranks_own_index_is_looked_through_too(tmp_path: Path) -> None:
    folder = tmp_path / "pytorch_model_fsdp_0"
    _save_state_dict({"model": {"weight": torch.zeros(6)}}, FileSystemWriter(folder), no_dist=True)
    (folder / ".metadata").unlink()
    (folder / "__0.metadata").write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with pytest.raises(TrainingError, match=r"asks for posix\.mkdir"):
        read_weights(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["os.mkdir", "Metadata.__init__.__globals__", "sys"])
def test_a_name_that_leads_out_of_what_is_allowed_is_refused(tmp_path: Path, name: str) -> None:
    module = "torch.distributed.checkpoint.metadata"
    # GLOBAL by protocol 4, which takes a path of attributes as a name.
    code = pickle.PROTO + bytes([4])
    for word in (module, name):
        code += pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode()
    (tmp_path / ".metadata").write_bytes(code + pickle.STACK_GLOBAL + pickle.STOP)
    with pytest.raises(TrainingError, match="is not read"), refusing_code(tmp_path):
        pass
