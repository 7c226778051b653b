"""A hand-written GPT-2 training loop in plain PyTorch: what the launcher is measured against.

Started by torchrun, one process per rank. Arguments: a JSON object with layers, heads, width,
vocabulary, block_size, micro_batch, accumulation, steps, threads, tokens (a file of uint16 ids) and ends
(a file: rank 0 adds a line with the time to it as each step ends).
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        changed: torch.Tensor = self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + changed


class GPT2(nn.Module):
    def __init__(self, layers: int, heads: int, width: int, vocabulary: int, positions: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(
                    parameter, std=0.02 / (math.sqrt(2 * layers) if "out" in name or "down" in name else 1)
                )

    def forward(self, ids: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), following.view(-1))


def main() -> None:
    asked = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(1337)
    bare = GPT2(asked["layers"], asked["heads"], asked["width"], asked["vocabulary"], asked["block_size"])
    model = DistributedDataParallel(bare) if world > 1 else bare
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = np.memmap(asked["tokens"], dtype=np.uint16, mode="r")
    length = asked["block_size"]
    blocks = (len(ids) - 1) // length
    draw = np.random.default_rng(rank)
    for _ in range(asked["steps"]):
        for turn in range(asked["accumulation"]):
            chosen = draw.integers(0, blocks, asked["micro_batch"]) * length
            rows = np.stack([ids[start : start + length + 1] for start in chosen]).astype(np.int64)
            here, following = (torch.from_numpy(part.copy()) for part in (rows[:, :-1], rows[:, 1:]))
            last = turn == asked["accumulation"] - 1
            with (
                model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
            ):
                (model(here, following) / asked["accumulation"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            with Path(asked["ends"]).open("a", encoding="utf-8") as ends:
                print(time.time(), file=ends)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
