"""The two that launcher is measured against on a GPU: the stock Trainer, and a hand-written compiled loop.

    python -m scripts.gpu_rows stock|loop '{"layers": 12, "heads": 12, "width": 768, ...}'

The shape and the settings are one JSON object. Both draw blocks of 1024 random ids: what they are does not
change how long a step takes. Neither is launcher's: nothing of its package is imported here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from torch.utils.data import Dataset

from scripts.bare_loop import GPT2
from scripts.gpu_meter import Meter

ROWS = 4096
VOCABULARY = 50257
PADDED_VOCABULARY = 50304
ENDLESS = 1_000_000
LOG_EVERY = 10


class RandomBlocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of ids, each its own labels, as `DataCollatorForLanguageModeling` makes them."""

    def __init__(self, block_size: int) -> None:
        self._ids = torch.randint(VOCABULARY, (ROWS, block_size), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return ENDLESS * 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._ids[index % ROWS]
        return {"input_ids": ids, "labels": ids}


def stock(asked: dict[str, Any]) -> None:
    """transformers' own Trainer and model, with its own defaults but for what the row names."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    dropout = asked["dropout"]
    config = GPT2Config(
        n_layer=asked["layers"],
        n_head=asked["heads"],
        n_embd=asked["width"],
        n_positions=asked["block_size"],
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    torch.manual_seed(1337)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=asked["micro_batch"],
        gradient_accumulation_steps=asked["accumulation"],
        max_steps=ENDLESS,
        learning_rate=6e-4,
        weight_decay=0.1,
        bf16=asked["precision"] == "bf16",
        fp16=asked["precision"] == "fp16",
        torch_compile=asked["compile"],
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        activation_checkpointing=asked["checkpointing"],
    )
    rows = RandomBlocks(asked["block_size"])
    Trainer(GPT2LMHeadModel(config), arguments, train_dataset=rows, callbacks=[Meter()]).train()


def loop(asked: dict[str, Any]) -> None:
    """What one writes by hand: compiled, bf16 autocast, fused AdamW, TF32, a vocabulary padded to 50,304."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1337)
    width, block = asked["width"], asked["block_size"]
    model = GPT2(asked["layers"], asked["heads"], width, PADDED_VOCABULARY, block).cuda()
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=6e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    compiled = torch.compile(model)
    rows = torch.randint(VOCABULARY, (ROWS, block + 1), generator=torch.Generator().manual_seed(1))
    meter, draw = Meter(), torch.Generator().manual_seed(2)
    for step in range(ENDLESS):
        meter.begins()
        loss = torch.zeros(())
        for _ in range(asked["accumulation"]):
            chosen = rows[torch.randint(ROWS, (asked["micro_batch"],), generator=draw)].pin_memory()
            here = chosen[:, :-1].to("cuda", non_blocking=True)
            following = chosen[:, 1:].to("cuda", non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = compiled(here, following)
            (loss / asked["accumulation"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0:
            loss.item()
        meter.ends()


if __name__ == "__main__":
    {"stock": stock, "loop": loop}[sys.argv[1]](json.loads(sys.argv[2]))
