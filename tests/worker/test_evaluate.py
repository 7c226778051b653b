"""Evaluation in real processes, against one document at a time without padding."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import EvalPrediction, GPT2Config, GPT2LMHeadModel

from launcher.config.schema import DataSection
from launcher.data.blocks import Blocks
from launcher.data.packing import Packing
from launcher.data.prepare import prepare
from launcher.data.store import open_store
from launcher.data.tokenizers import train_tokenizer
from launcher.worker.collate import IGNORED, Row, collate_of, stack
from launcher.worker.dataset import StoredValidationRows
from launcher.worker.evaluate import evaluate
from tests.conftest import sentences

BLOCK = 16
VOCABULARY = 300


@dataclass(frozen=True)
class Way:
    """How documents become rows."""

    packing: Packing
    isolated: bool = False


WAYS = (
    Way("pad"),
    Way("concat"),
    Way("best_fit"),
    Way("pad", isolated=True),
    Way("concat", isolated=True),
    Way("best_fit", isolated=True),
)


def small_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=BLOCK,
            n_embd=32,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.5,
            use_cache=False,  # as the Trainer has it
        )
    )


def validation(folder: Path, documents: list[str]) -> Path:
    """A store with these documents as its validation text."""
    (folder / "train.txt").write_text("\n".join(sentences(50)) + "\n")
    (folder / "held.txt").write_text("\n".join(documents) + "\n")
    data = DataSection(train=[str(folder / "train.txt")], validation=[str(folder / "held.txt")])
    return prepare(data, train_tokenizer(sentences(200), VOCABULARY), folder / "cache", 1)


def read(store: Path, way: Way) -> StoredValidationRows:
    return StoredValidationRows(Blocks(open_store(store), "validation", BLOCK, way.packing))


def counted(prediction: EvalPrediction) -> Mapping[str, float]:
    labels, ids = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    known = labels != IGNORED
    return {
        "accuracy": float((ids == labels)[known].mean()),
        "known": float(known.sum()),
        "rows": float(len(labels)),
        "width": float(labels.shape[1]),
        "sum": float(labels[known].sum()),
    }


def evaluated(store: Path, way: Way, micro_batch: int, rank: int, world_size: int) -> dict[str, float]:
    tokenizer = open_store(store).tokenizer()
    data = DataSection(train=["text"], packing=way.packing, isolate_documents=way.isolated)
    model = small_model().train()
    found = evaluate(
        model,
        read(store, way),
        collate_of(data, tokenizer.end_of_text_id, tokenizer.pad_id, flash=False),
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        block_size=BLOCK,
        device=torch.device("cpu"),
        metrics=[counted],
        goes_on=lambda: True,
    )
    assert found is not None
    assert model.training, "training goes on as it was"
    return found


def apart(row: Row, end: int) -> list[Row]:
    """The documents of a row."""
    ends = [place + 1 for place, token in enumerate(row) if token == end]
    return [row[start:stop] for start, stop in pairwise([0, *ends, len(row)]) if start < stop]


def expected(store: Path, way: Way) -> dict[str, float]:
    """The same numbers, one row (one document, where they are isolated) at a time, nothing padded, in double
    precision."""
    model = small_model().double().eval()
    lost, right, count, total, rows = 0.0, 0, 0, 0, read(store, way)
    end = open_store(store).manifest.content.tokenizer.end_of_text_id
    seen = [rows[index] for index in range(len(rows))]
    if way.isolated:
        seen = [document for row in seen for document in apart(row, end)]
    for ids in map(torch.from_numpy, seen):
        if len(ids) == 1:
            continue
        with torch.no_grad():
            scores = model(input_ids=ids[None]).logits[0, :-1]
        lost += torch.nn.functional.cross_entropy(scores, ids[1:], reduction="sum").item()
        right += int((scores.argmax(-1) == ids[1:]).sum())
        count += len(ids) - 1
        total += int(ids[1:].sum())
    return {
        "eval_loss": lost / count,
        "eval_perplexity": math.exp(lost / count),
        "eval_tokens": count,
        "eval_accuracy": right / count,
        "eval_known": count,
        "eval_rows": len(rows),
        "eval_width": BLOCK - 1,
        "eval_sum": total,
    }


Case = tuple[str, str, Way, int]
"""A name, a store, a way and a micro-batch."""


def _one_rank(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {name: evaluated(Path(store), way, micro, rank, world) for name, store, way, micro in cases}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def documents(count: int) -> list[str]:
    """Of quite different lengths, some longer than a block."""
    return [line[: 4 + 17 * n % 61].strip() for n, line in enumerate(sentences(count, seed=9))]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("count", "micro_batch"), [(3, 1), (7, 1), (7, 2), (11, 8)])
def test_one_rank_and_any_micro_batch(tmp_path: Path, way: Way, count: int, micro_batch: int) -> None:
    store = validation(tmp_path, documents(count))
    assert evaluated(store, way, micro_batch, 0, 1) == pytest.approx(expected(store, way), rel=1e-5)


def test_two_ranks_count_every_token_once(tmp_path: Path) -> None:
    wanted: list[tuple[str, Way, int, int]] = [
        ("padded", Way("pad"), 7, 2),
        ("blocks", Way("concat"), 11, 2),
        ("one rank has nothing", Way("pad"), 1, 4),
        ("apart", Way("best_fit", isolated=True), 11, 2),
    ]
    cases: list[Case] = []
    for name, way, count, micro_batch in wanted:
        folder = tmp_path / name
        folder.mkdir()
        cases.append((name, str(validation(folder, documents(count))), way, micro_batch))
    spawn(_one_rank, args=(2, str(tmp_path), cases), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second, "ranks decide alike"
    for name, store, way, _ in cases:
        assert first[name] == pytest.approx(expected(Path(store), way), rel=1e-5), name


def test_a_row_of_one_token_has_nothing_to_predict_and_spoils_nothing(tmp_path: Path) -> None:
    store = validation(tmp_path, ["the of and"] * 3)
    tokenizer = open_store(store).tokenizer()
    letters = next(n for n in range(1, 200) if len(tokenizer.encode_batch(["x" * n])[0]) == BLOCK)
    (tmp_path / "again").mkdir()
    store = validation(tmp_path / "again", ["the of and", "x" * letters, "to in"])
    rows = read(store, Way("pad"))
    assert 1 in [len(rows[index]) for index in range(len(rows))], "the end-of-text alone in its row"
    assert evaluated(store, Way("pad"), 1, 0, 1) == pytest.approx(expected(store, Way("pad")), rel=1e-5)


def test_it_is_given_up_where_it_may_not_go_on(tmp_path: Path) -> None:
    asked: list[int] = []
    model = small_model().train()
    found = evaluate(
        model,
        read(validation(tmp_path, documents(9)), Way("concat")),
        stack,
        rank=0,
        world_size=1,
        micro_batch=1,
        block_size=BLOCK,
        device=torch.device("cpu"),
        metrics=[],
        goes_on=lambda: len(asked) < 2 and not asked.append(0),  # type: ignore[func-returns-value]
    )
    assert found is None
    assert len(asked) == 2
    assert model.training


def test_perplexity_of_a_ruined_model_is_a_number(tmp_path: Path) -> None:
    store = validation(tmp_path, documents(3))
    model: Any = small_model()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e4)
    found = evaluate(
        model,
        read(store, Way("concat")),
        stack,
        rank=0,
        world_size=1,
        micro_batch=2,
        block_size=BLOCK,
        device=torch.device("cpu"),
        metrics=[],
        goes_on=lambda: True,
    )
    assert found is not None
    assert found["eval_loss"] > 700
    assert math.isfinite(found["eval_perplexity"])
    assert found.keys() == {"eval_loss", "eval_perplexity", "eval_tokens"}
