"""What a checkpoint holds pickled is read as data: one that was tampered with runs no code.

A pickle may call anything that can be imported. torch's own reader takes tensors, plain values and the
classes it was told of, and nothing else; it is made the only one, whatever a library asks it for. The index
of `torch.distributed.checkpoint` is read with plain pickle, so it is looked through before.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from launcher.errors import TrainingError

INDEX: Final = ".metadata"
"""What torch.distributed.checkpoint calls its index."""
IN_AN_INDEX: Final = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
                *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        *(
            ("torch", name)
            for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
        ),
        *(("torch", name) for name in ("uint8", "bool")),
    }
)
"""Modules and names that such an index consists of."""


def read_as_data(environment: MutableMapping[str, str]) -> None:
    """From here on `torch.load` reads data alone, whatever it is asked, in this process and its children."""
    environment["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def allow_deepspeed() -> None:
    """Let `torch.load` make the classes that DeepSpeed's own state holds: numbers with names."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


@contextmanager
def refusing_code(checkpoint: Path) -> Iterator[None]:
    """While inside, `checkpoint` is read. Raises TrainingError where a file of it holds more than data."""
    for index in checkpoint.rglob(f"*{INDEX}"):  # without one for all ranks, torch reads each rank's own
        with index.open("rb") as stream:
            try:
                _Index(stream).load()
            except pickle.UnpicklingError as error:
                raise _refusal(checkpoint, error) from error
    try:
        yield
    except pickle.UnpicklingError as error:
        raise _refusal(checkpoint, error) from error


class _Index(pickle.Unpickler):
    """Reads an index, and refuses whatever does not belong in one."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in IN_AN_INDEX:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not part of an index")
        return super().find_class(module, name)


def _refusal(checkpoint: Path, error: pickle.UnpicklingError) -> TrainingError:
    named = re.search(r"GLOBAL (\S+)", str(error))
    what = f"asks for {named[1]}" if named else f"cannot be read: {str(error).strip().splitlines()[-1]}"
    return TrainingError(
        f"{checkpoint}: a file of it {what}, and a checkpoint is data alone: it is not read",
        hint="somebody has changed it, or another version wrote it: move it away, and the same command "
        "goes on from the one before",
    )
