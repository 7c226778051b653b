"""A checkpoint as one Hugging Face model: what `launcher checkpoint export` runs.

`python -m launcher.worker.export RUN_DIR CHECKPOINT TARGET`: the engine that saved it need not be there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from transformers.utils import logging

from launcher.data.store import TOKENIZER_FOLDER
from launcher.errors import LauncherError
from launcher.run.directory import RunDirectory
from launcher.worker import saving
from launcher.worker.model import load_tokenizer, trained_model
from launcher.worker.pickles import read_as_data


def export(directory: RunDirectory, checkpoint: Path, target: Path) -> None:
    """Write the model of `checkpoint` in fp32, with its tokenizer, to `target` for `from_pretrained`.

    Raises TrainingError where the weights are not the model's.
    """
    orders, run = directory.read_orders(), directory.read_config()
    store = directory.tokenizer if orders.store is None else Path(orders.store) / TOKENIZER_FOLDER
    tokenizer = load_tokenizer(store)
    model = trained_model(orders, tokenizer, run.seed)
    saving.load_weights(model, checkpoint)
    saving.save_model(model, tokenizer, target)


def main(arguments: list[str]) -> int:
    run, checkpoint, target = map(Path, arguments)
    read_as_data(os.environ)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        export(RunDirectory(run), checkpoint, target)
    except LauncherError as error:
        print(f"error: {error.told}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
