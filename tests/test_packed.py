"""Whole runs whose rows hold several documents that do not see each other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.data.blocks import Blocks
from launcher.data.mixture import training_order
from launcher.data.store import open_store
from launcher.run.directory import RunDirectory
from launcher.worker.model import build_model, load_tokenizer
from tests.conftest import Workplace, last_with, losses, metrics, sentences, small_run, write_json
from tests.long import LONG

STOP = """
import os, signal
from transformers import TrainerCallback

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3 and os.environ.get("STOP") and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGUSR1)
"""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 300,
}


@pytest.fixture
def mine(workplace: Workplace) -> Workplace:
    """The workplace with lines of quite different lengths, some longer than a block."""
    lines = [" ".join([line] * (n % 4 + 1))[: 5 + 13 * n % 210] for n, line in enumerate(sentences(900))]
    (workplace.folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    (workplace.folder / "mine.py").write_text(STOP)
    return workplace


def write_run(mine: Workplace, packing: str, **keys: Any) -> None:
    run = small_run()
    run["data"] |= {"packing": packing, "isolate_documents": True}
    run["train"] |= {"steps": 6, "eval_every": 3, "micro_batch": 2} | keys
    write_json(mine.folder / "run.yaml", run)


def test_a_step_without_a_label_trains_nothing_and_goes_on(mine: Workplace) -> None:
    """A document one token longer than its rows leaves a row of one token, which has nothing to predict."""
    write_run(mine, "pad", batch_size=1, micro_batch=1, steps=150, eval_every=1000)
    keys = ("data.block_size=8", "data.isolate_documents=false")
    directory = mine.train(*keys, "model.overrides={n_layer: 1, n_embd: 32, n_head: 2, n_positions: 64}")
    run, orders = RunDirectory(directory).read_config(), RunDirectory(directory).read_orders()
    blocks = Blocks(open_store(Path(orders.store or "")), "train", 8, "pad")
    order = training_order(blocks, run.data, run.seed)
    found = {line["step"]: line["loss"] for line in metrics(directory) if "loss" in line}
    without = [step for step in found if len(blocks.read(0, order[step - 1].block)) == 1]
    assert list(found) == list(range(1, 151))
    assert [step for step, loss in found.items() if loss == 0] == without != []


def alone(model: Any, rows: list[torch.Tensor], end: int) -> tuple[float, int]:
    """The mean loss of the documents in these rows, each given to the model by itself, and its labels."""
    total, labels = 0.0, 0
    for row in rows:
        ends = [place + 1 for place, token in enumerate(row.tolist()) if token == end]
        for start, stop in pairwise([0, *ends, len(row)]):
            ids = row[None, start:stop]
            if ids.shape[1] > 1:
                with torch.no_grad():
                    total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
                labels += ids.shape[1] - 1
    return total / labels, labels


def rows_of(directory: Path, split: Any) -> list[torch.Tensor]:
    """All validation rows, or those of the first training step."""
    run, orders = RunDirectory(directory).read_config(), RunDirectory(directory).read_orders()
    assert orders.store is not None
    blocks = Blocks(open_store(Path(orders.store)), split, run.data.block_size, run.data.packing)
    numbers = (
        range(len(blocks[0]))
        if split == "validation"
        else [training_order(blocks, run.data, run.seed)[sample].block for sample in range(8)]
    )
    return [torch.from_numpy(blocks.read(0, number)) for number in numbers]


@pytest.mark.parametrize("packing", [pytest.param("best_fit", marks=LONG), "concat"])
def test_the_loss_is_that_of_documents_alone_on_any_world(mine: Workplace, packing: str) -> None:
    write_run(mine, packing)
    one, two = mine.train("name=one"), mine.train("name=two", "--cluster", "two.yaml")
    ours, theirs = losses(one), losses(two)
    assert max(abs(ours[key] - theirs[key]) for key in ours) < 1e-4
    log = (one / "logs" / "attempt-001" / "rank-0.log").read_text()
    assert log.index("isolated: documents of a row move each other's logits by") < log.index("'loss'")

    orders = RunDirectory(one).read_orders()
    tokenizer = load_tokenizer(one / "model")
    first = build_model(orders.model, orders.weights, tokenizer, 1337).eval()
    rows = rows_of(one, "train")
    expected, _ = alone(first, rows, tokenizer.eos_token_id)
    assert ours[1, "loss"] == pytest.approx(expected, abs=1e-4)
    assert metrics(one)[0]["tokens"] == metrics(two)[0]["tokens"] == sum(map(len, rows))

    final = AutoModelForCausalLM.from_pretrained(one / "model").eval()
    expected, labels = alone(final, rows_of(one, "validation"), tokenizer.eos_token_id)
    assert last_with(one, "eval_loss")["eval_loss"] == pytest.approx(expected, abs=1e-4)
    for directory in (one, two):
        assert last_with(directory, "eval_loss")["eval_tokens"] == labels


@LONG
def test_the_proof_leaves_a_resumed_run_as_it_was(mine: Workplace) -> None:
    write_run(mine, "best_fit", callbacks=["mine:Stop"])
    overrides = ("model.overrides.resid_pdrop=0.2", "--cluster", "two.yaml")
    whole = mine.train("name=whole", *overrides)
    assert mine.run("train", "run.yaml", "name=parts", *overrides, STOP="1").returncode == 130
    parts = mine.train("name=parts", *overrides)
    assert losses(parts) == losses(whole)
    weights = [(made / "model" / "model.safetensors").read_bytes() for made in (whole, parts)]
    assert weights[0] == weights[1]


def test_a_llama_trains_and_a_leak_stops_it_before_the_first_step(mine: Workplace) -> None:
    write_run(mine, "concat")
    (mine.folder / "llama").mkdir()
    write_json(mine.folder / "llama" / "config.json", LLAMA)
    overrides = ("model.name=./llama", "model.overrides={}", "train.steps=3", "train.compile=false")
    directory = mine.train("name=sound", *overrides)
    tokenizer = load_tokenizer(directory / "model")
    final = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    assert final.config.model_type == "llama"
    expected, _ = alone(final, rows_of(directory, "validation"), tokenizer.eos_token_id)
    assert last_with(directory, "eval_loss")["eval_loss"] == pytest.approx(expected, abs=1e-4)

    (mine.folder / "leak.py").write_text(
        "from transformers import TrainerCallback\n\n\n"
        "class Leak(TrainerCallback):\n"
        "    def on_init_end(self, args, state, control, **_):\n"
        "        args.use_cache = True\n"
    )
    for cluster in ((), ("--cluster", "two.yaml")):
        name = f"leak-{len(cluster)}"
        done = mine.run(
            "train", "run.yaml", f"name={name}", *overrides, *cluster, "train.callbacks=[leak:Leak]"
        )
        assert done.returncode == 1
        assert "data.isolate_documents: documents of a row see each other" in done.stderr
        assert "data.packing: pad" in done.stderr
        assert not (mine.folder / "runs" / name / "metrics.jsonl").read_text()
