"""Documents of one row against documents alone, and models that leak against the proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.errors import TrainingError
from launcher.worker.collate import IGNORED, Isolate, Row, Tensors
from launcher.worker.isolation import prove_isolation
from launcher.worker.leaving import leave

END, PAD, VOCABULARY, WIDTH = 0, 1, 60, 32
KINDS = ("gpt2", "llama")


def small(kind: str, **fields: Any) -> PreTrainedModel:
    """A model of two layers, as the Trainer has it: without a cache."""
    torch.manual_seed(3)
    shapes: dict[str, dict[str, Any]] = {
        "gpt2": {"n_positions": WIDTH, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.5},
        "llama": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": WIDTH,
        },
    }
    ids = {"vocab_size": VOCABULARY, "bos_token_id": END, "eos_token_id": END}
    config = AutoConfig.for_model(kind, **{**ids, "use_cache": False, **shapes[kind], **fields})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.loss_type = "ForCausalLM"
    return model


def proof(
    model: torch.nn.Module,
    collate: Isolate | None = None,
    *,
    rows: int = 2,
    width: int = WIDTH,
    precision: str = "fp32",
) -> str:
    return prove_isolation(
        model,
        collate or Isolate(END, PAD),
        rows=rows,
        block_size=width,
        vocabulary=VOCABULARY,
        device=torch.device("cpu"),
        precision=precision,
    )


def test_positions_and_labels_begin_again_at_each_document() -> None:
    batch = Isolate(END, PAD)([np.array([7, 8, END, 9, END, END, 5]), np.array([4, END, 6])])
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    none = IGNORED
    assert batch["input_ids"].tolist() == [[7, 8, END, 9, END, END, 5], [4, END, 6, PAD, PAD, PAD, PAD]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 1, 0, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[none, 8, END, none, END, none, none], [none, END, *[none] * 5]]


documents = st.lists(
    st.lists(st.integers(2, VOCABULARY - 1), max_size=7).map(lambda ids: [*ids, END]), min_size=1, max_size=4
)


@pytest.mark.parametrize("pad", [PAD, END])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_are_as_if_alone(kind: str, pad: int) -> None:
    model = small(kind).eval()

    @settings(deadline=None, max_examples=40)
    @given(rows=st.lists(documents, min_size=1, max_size=3))
    def check(rows: list[list[list[int]]]) -> None:
        batch = Isolate(END, pad)([np.array([token for ids in row for token in ids]) for row in rows])
        with torch.no_grad():
            found = model(**batch)
            total, labels = 0.0, 0
            for number, row in enumerate(rows):
                start = 0
                for ids in row:
                    alone = model(input_ids=torch.tensor([ids])).logits[0]
                    together = found.logits[number, start : start + len(ids)]
                    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
                    loss = torch.nn.functional.cross_entropy(
                        alone[:-1], torch.tensor(ids[1:], dtype=torch.int64), reduction="sum"
                    )
                    total, labels, start = total + loss.item(), labels + len(ids) - 1, start + len(ids)
        assert int(batch["labels"][:, 1:].ne(IGNORED).sum()) == labels
        if labels:
            assert found.loss.item() == pytest.approx(total / labels, abs=1e-4)

    check()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(1, WIDTH), (3, WIDTH), (2, 17), (2, 5), (2, 4), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_model_passes_and_is_left_as_it_was(kind: str, rows: int, width: int, precision: str) -> None:
    model = small(kind).train()
    before = torch.random.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        said = proof(model, rows=rows, width=width, precision=precision)
    assert said.startswith("isolated: ")
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


class OnesMask(Isolate):
    """What transformers' own collators do."""

    def __call__(self, rows: Sequence[Row]) -> Tensors:
        batch = super().__call__(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


class Deaf(torch.nn.Module):
    """A model that takes positions and ignores them."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids)


class Unable(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> Any:
        raise AssertionError("never called")


class Backwards(Deaf):
    """A model whose documents see those that come after them."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        out = self.inner(input_ids=input_ids, position_ids=position_ids)
        out.logits = out.logits + out.logits.flip(1)
        return out


class Far(Deaf):
    """A model whose last token of all sees the first."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        out = self.inner(input_ids=input_ids, position_ids=position_ids)
        out.logits = torch.cat([out.logits[:, :-1], out.logits[:, -1:] + out.logits[:, :1]], dim=1)
        return out


class Placed(Deaf):
    """A model to whom it matters where in its row a document stands."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        out = self.inner(input_ids=input_ids, position_ids=position_ids)
        out.logits = out.logits * torch.linspace(0.5, 1.0, input_ids.shape[1])[:, None]
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leak", ["mask", "cache", "deaf", "backwards", "far", "placed"])
def test_a_leak_is_caught(kind: str, rows: int, leak: str, precision: str) -> None:
    model: torch.nn.Module = small(kind, use_cache=True) if leak == "cache" else small(kind)
    wrappers = {"deaf": Deaf, "backwards": Backwards, "far": Far, "placed": Placed}
    if leak in wrappers:
        model = wrappers[leak](model)  # type: ignore[arg-type]
    collate = OnesMask(END, PAD) if leak == "mask" else Isolate(END, PAD)
    model.train()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        pytest.raises(TrainingError, match=r"one changes another's logits by [0-9.e-]+, where") as caught,
    ):
        proof(model, collate, rows=rows, precision=precision)
    assert "data.packing: pad" in (caught.value.hint or "")
    assert model.training


def test_a_model_without_positions_is_refused_by_name() -> None:
    with pytest.raises(TrainingError, match=r"this model cannot: .*position_ids"):
        proof(Unable())


def test_numbers_that_are_none_prove_nothing() -> None:
    model: Any = small("gpt2")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="nan"):
        proof(model)


def by_lengths(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **told: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as FlashAttention's packed kernel does it: rows end to end, cut where it is told."""
    assert attention_mask is None
    causal: Any = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    rows, heads, width, size = query.shape
    assert told["max_length_q"] == told["max_length_k"] == width
    assert torch.equal(told["cu_seq_lens_q"], told["cu_seq_lens_k"])
    assert told["cu_seq_lens_q"].dtype == torch.int32
    ends = told["cu_seq_lens_q"].tolist()
    assert (ends[0], ends[-1]) == (0, rows * width)
    flat = [each.transpose(1, 2).reshape(rows * width, heads, size) for each in (query, key, value)]
    parts = [
        causal(*(each[start:stop].transpose(0, 1) for each in flat)).transpose(0, 1)
        for start, stop in pairwise(ends)
    ]
    return torch.cat(parts).reshape(rows, width, heads, size), None


def test_flash_attention_is_told_of_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that takes what transformers hands FlashAttention; the kernel itself needs a GPU."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "by_lengths", by_lengths)
    model = small("gpt2").eval()
    model.config._attn_implementation = "by_lengths"
    assert proof(model, Isolate(END, PAD, flash=True), rows=3).startswith("isolated")
    rows = [np.array([5, 6, END, 7, 8, 9, END]), np.array([3, END, 4])]
    with torch.no_grad():
        found = model(**Isolate(END, PAD, flash=True)(rows)).logits
        model.config._attn_implementation = "sdpa"
        expected = model(**Isolate(END, PAD)(rows)).logits
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, :3], expected[1, :3], rtol=1e-4, atol=1e-5)


def _one_rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    said: dict[str, str] = {}
    for name, model in (("sound", small("gpt2")), ("leaking", small("gpt2", use_cache=True))):
        wrapped = DistributedDataParallel(model)
        try:
            said[name] = proof(wrapped)
        except TrainingError as error:
            said[name] = error.message
        wrapped(**Isolate(END, PAD)([np.arange(2, 12)])).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    # As ranks do. DDP's end holds the interpreter while it waits for gloo's thread, which may need it once
    # more: PyTorch 2.13 was seen to wait for ever.
    leave(0)


def test_two_ranks_prove_it_alike_and_train_on(tmp_path: Path) -> None:
    spawn(_one_rank, args=(2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["sound"].startswith("isolated")
    assert "see each other" in first["leaking"]
