"""Checkpoints through the ledger, and the final model."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launcher.errors import TrainingError
from launcher.run import checkpoints as ledger


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def begin_checkpoint(checkpoints: Path, step: int, rank: int) -> Path:
    """The folder every rank writes its part of the checkpoint of `step` into."""
    if rank == 0:
        ledger.begin(checkpoints, step)
    barrier()
    return checkpoints / f".step-{step:08d}.writing"


def commit_checkpoint(
    checkpoints: Path,
    folder: Path,
    *,
    step: int,
    samples: int,
    rank: int,
    world_size: int,
    keep: int,
    best: int | None,
    state: dict[str, Any],
) -> None:
    """Commit what every rank has written to `folder`, with `state`, then drop what is over `keep`.

    The checkpoint of step `best` stays: early stopping returns to it.
    """
    barrier()
    if rank == 0:
        (folder / ledger.STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        ledger.commit(folder, step=step, samples=samples, world_size=world_size, created=time.time())
        ledger.prune(checkpoints, keep=keep, protect=() if best is None else (best,))
    barrier()


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights saved in `folder` (one safetensors file or several) into `model`."""
    files = sorted(folder.glob("model*.safetensors"))
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # A tied weight is saved once, so its other name is missing by design.
    missing = [name for name in missing if name not in (model.all_tied_weights_keys or {})]
    if missing or unexpected:
        raise TrainingError(
            f"{folder}: weights do not match the model: missing {missing}, unexpected {unexpected}"
        )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write the final model and tokenizer for `from_pretrained`: whole under another name, then renamed."""
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)


def push_model(folder: Path, repository: str) -> str:
    """Upload `folder` to the Hub repository, made private if it is new; returns where it is.

    The token is the one `hf auth login` or HF_TOKEN gave. Raises TrainingError if the Hub refuses;
    the model on disk is untouched.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained with launcher")
    except (HfHubHTTPError, TransportError, OSError, RuntimeError) as error:
        raise TrainingError(
            f"push_to_hub: {repository} could not be uploaded: {error}",
            hint=f"the model is whole in {folder}; upload it with `hf upload {repository} {folder}`",
        ) from error
    return str(url)
