"""What someone might plant in a checkpoint: a pickle that makes a folder when it is read, and new hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launcher.run.checkpoints import MANIFEST


class Planted:
    """Pickled, it is a call that makes `marker`."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._marker),)


def plant(checkpoint: Path, pattern: str, marker: Path) -> Path:
    """Put it into the first file that `pattern` finds, with a manifest that fits; the file."""
    file = sorted(checkpoint.glob(pattern))[0]
    content = torch.load(file, weights_only=False)
    content["planted"] = Planted(marker)
    torch.save(content, file)
    refresh(checkpoint)
    return file


def refresh(checkpoint: Path) -> None:
    """Make the manifest again for what is there now."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "sha256": own}))
