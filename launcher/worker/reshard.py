"""DeepSpeed's sharded state taken apart: for another number of ranks, or for one whole model.

DeepSpeed's universal checkpoint holds every parameter and its two moments whole, each in a file of its own,
whichever stage and however many ranks saved it. DeepSpeed converts, and each rank then reads its own part.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.errors import TrainingError
from launcher.run.checkpoints import Checkpoint
from launcher.worker.pickles import allow_deepspeed, read_as_data
from launcher.worker.together import barrier

WEIGHT = "fp32.pt"
"""In a universal checkpoint's folder of one parameter: the parameter itself."""


def reshard(checkpoint: Checkpoint) -> Path:
    """A folder beside the checkpoint, with its state for any number of ranks and everything else it holds.

    It is no checkpoint of the ledger's: see `Remove`. Raises TrainingError where DeepSpeed cannot convert it.
    """
    source = checkpoint.folder
    target = source.with_name(f".{source.name}.universal")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    state = f"global_step{checkpoint.step}"
    _convert(source / state, target / f"{state}_universal")
    (target / "latest_universal").write_text(f"{state}_universal", encoding="utf-8")
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).symlink_to(file)
    return target


def read_universal(state: Path) -> dict[str, torch.Tensor]:
    """Every parameter of DeepSpeed's `state` folder, whole and in fp32."""
    with tempfile.TemporaryDirectory(dir=state.parent.parent, prefix=".universal-") as folder:
        universal = Path(folder) / "state"
        _convert(state, universal)
        found = {}
        for weight in universal.glob(f"zero/*/{WEIGHT}"):
            read = torch.load(weight, weights_only=True)
            found[weight.parent.name] = read["param"] if isinstance(read, dict) else read
        return found


def _convert(state: Path, target: Path) -> None:
    command = [sys.executable, "-m", "launcher.worker.reshard", str(state), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "UnpicklingError" in done.stderr:
        raise pickle.UnpicklingError(done.stderr)
    if done.returncode:
        raise TrainingError(
            f"{state} cannot be converted for another number of ranks: {done.stderr.strip()[-500:]}",
            hint="resume it on as many ranks as saved it",
        )


def main(arguments: list[str]) -> None:
    """Have DeepSpeed convert, in a process whose `torch.load` reads data alone."""
    from deepspeed.checkpoint import ds_to_universal

    state, target = arguments
    read_as_data(os.environ)
    allow_deepspeed()
    sys.argv = ["ds_to_universal", "--inject_missing_state"]
    sys.argv += ["--input_folder", state, "--output_folder", target]
    ds_to_universal.main(ds_to_universal.parse_arguments())


def mend_zero3(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Undo what DeepSpeed 0.19.8 does to ZeRO-3's inner optimizer where another world saved its state.

    It gives every group what the first one had, so that norms and biases would decay, and all parameters one
    and the same count of steps, which each of them then raises (`runtime/zero/stage3.py`,
    `load_hp_checkpoint_state_from_checkpoint_dir_stage3`). Where the same world saved it, nothing changes.
    """
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()


class Remove(TrainerCallback):
    """Removes a resharded folder once every rank has read it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        barrier()
        if args.process_index == 0:
            shutil.rmtree(self._folder)


if __name__ == "__main__":
    main(sys.argv[1:])
