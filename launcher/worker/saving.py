"""The weights of a checkpoint, and the final model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launcher.errors import TrainingError
from launcher.run.checkpoints import publish
from launcher.worker.checkpoint import explained, open_as_folder
from launcher.worker.pickles import allow_deepspeed, refusing_code
from launcher.worker.reshard import read_universal
from launcher.worker.vocabulary import take_out_padding

FSDP_WEIGHTS = "pytorch_model_fsdp_0"
"""The folder that accelerate has FSDP write its weights to."""
SHOWN = 5
"""Weights named in an error, at most."""


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights of the checkpoint in `folder` into `model`, which is whole."""
    weights = read_weights(folder)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # A tied weight is saved once, so its other name is missing by design.
    missing = [name for name in missing if name not in (model.all_tied_weights_keys or {})]
    if missing or unexpected:
        raise TrainingError(
            f"{folder}: weights do not match the model: missing {missing}, unexpected {unexpected}"
        )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of the checkpoint in `folder`, whole and in fp32 on the CPU, whichever engine saved it.

    Raises TrainingError where a file of it holds more than data.
    """
    with refusing_code(folder):
        return _read_weights(folder)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    if (folder / FSDP_WEIGHTS).is_dir():
        return _read_distributed(folder / FSDP_WEIGHTS)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    allow_deepspeed()
    try:
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    except ValueError:
        # ZeRO-1 under bf16 has an optimizer of its own, whose state DeepSpeed's shorter way does not read.
        return read_universal(next(folder.glob("global_step*")))
    return weights


def _read_distributed(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that torch.distributed.checkpoint saved in shards, read by one process alone."""
    found: dict[str, Any] = {}
    _load_state_dict(
        found, storage_reader=FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    weights: dict[str, torch.Tensor] = found["model"]
    return weights


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write the final model and tokenizer for `from_pretrained`: whole under another name, then renamed.

    What padded its vocabulary is taken out of `model` first.
    Raises TrainingError where a weight is empty, or not all of its numbers are finite, and where `target`
    cannot be written, on a full disk say; it is untouched.
    """
    take_out_padding(model)
    check_weights(model.state_dict())
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    with explained(temporary, "the final model"):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        open_as_folder(temporary)
        if target.exists():
            shutil.rmtree(target)
        publish(temporary, target)


def check_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise TrainingError unless every one of a final model's `weights` is there and finite."""
    empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
    wrong = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    for names, what in ((empty, "are empty"), (wrong, "hold NaN or infinity")):
        if names:
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            raise TrainingError(
                f"the final model is not written: {len(names)} of its {len(weights)} weights {what}: {shown}",
                hint="the checkpoints are as they were: `launcher checkpoint export` makes a model of an "
                "earlier one",
            )


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
            hint=f"the model is whole in {folder}; "
            f"upload it with `hf upload {repository} {quote(str(folder))}`",
        ) from error
    return str(url)
