"""The stock Trainer on the stock GPT-2, as its documentation sets it up, for the launcher to be measured by.

Started by torchrun, one process per rank, with the JSON object that `bare_loop.py` takes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of a file of uint16 ids, one after the other."""

    def __init__(self, file: str, length: int) -> None:
        self._ids = np.memmap(file, dtype=np.uint16, mode="r")
        self._length = length

    def __len__(self) -> int:
        return len(self._ids) // self._length

    def __getitem__(self, block: int) -> dict[str, torch.Tensor]:
        ids = self._ids[block * self._length : (block + 1) * self._length].astype(np.int64)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids)}


class Ends(TrainerCallback):
    """A line with the time to `file` as each step ends, by the first rank."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_step_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        if args.process_index == 0:
            with self._file.open("a", encoding="utf-8") as ends:
                print(time.time(), file=ends)


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(1337)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=asked["vocabulary"],
            n_positions=asked["block_size"],
            n_embd=asked["width"],
            n_layer=asked["layers"],
            n_head=asked["heads"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    arguments = TrainingArguments(
        output_dir=str(Path(asked["ends"]).parent / "stock"),
        use_cpu=True,
        per_device_train_batch_size=asked["micro_batch"],
        gradient_accumulation_steps=asked["accumulation"],
        max_steps=asked["steps"],
        learning_rate=6e-4,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = Blocks(asked["tokens"], asked["block_size"])
    Trainer(model, arguments, train_dataset=rows, callbacks=[Ends(Path(asked["ends"]))]).train()


if __name__ == "__main__":
    main()
