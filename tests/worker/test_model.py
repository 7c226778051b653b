"""Models as they are built, against transformers' own and against the tokenizer they are built for."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from launcher.data.tokenizers import Tokenizer, train_tokenizer
from launcher.data.tokenizers import load_tokenizer as load_for_data
from launcher.errors import RequestError
from launcher.worker.model import build_model, load_tokenizer
from tests.conftest import sentences

FIELDS = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}


def stock_gpt2(vocabulary: int, *, pad: int | None, end: int, begin: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=32, n_positions=64,
            vocab_size=vocabulary, pad_token_id=pad, eos_token_id=end, bos_token_id=begin,
        )
    )  # fmt: skip


def bare_tokenizer(folder: Path) -> Tokenizer:
    """Letters alone: no end-of-text token, no pad token, no settings."""
    backend = Backend(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return load_for_data(str(folder))


def alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def saved(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as the worker gets it: through the store's folder."""
    tokenizer.save(folder)
    return load_tokenizer(folder)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return saved(train_tokenizer(sentences(200), 300), tmp_path / "tokenizer")


def rows(model: Any) -> int:
    """Rows of the embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def ids_of(model: Any) -> set[tuple[int, int, int]]:
    """(pad, eos, bos) as the config and as the generation config have them."""
    return {
        (where.pad_token_id, where.eos_token_id, where.bos_token_id)
        for where in (model.config, model.generation_config)
    }


def test_a_tokenizer_without_end_of_text_or_pad_gets_one_token_for_both(tmp_path: Path) -> None:
    data_side = bare_tokenizer(tmp_path / "bare")
    tokenizer = saved(data_side, tmp_path / "tokenizer")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == data_side.end_of_text_id == 256
    assert len(tokenizer) == data_side.size == 257

    model = build_model(FIELDS, None, tokenizer, seed=1)
    assert rows(model) == 257
    assert ids_of(model) == {(256, 256, 256)}
    text = sentences(1)[0]
    assert tokenizer(text)["input_ids"] == data_side.encode_batch([text])[0].tolist()


def test_a_pad_token_of_its_own_is_kept(tmp_path: Path) -> None:
    train_tokenizer(sentences(200), 300).save(tmp_path / "own")
    settings = tmp_path / "own" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "<pad>"'))
    tokenizer = saved(load_for_data(str(tmp_path / "own")), tmp_path / "tokenizer")
    assert (tokenizer.pad_token, len(tokenizer)) == ("<pad>", 301)
    model = build_model(FIELDS, None, tokenizer, seed=1)
    end = tokenizer.eos_token_id
    assert ids_of(model) == {(300, end, end)}
    assert rows(model) == 301


def test_it_attends_as_its_config_asks(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model({**FIELDS, "attn_implementation": "eager"}, None, tokenizer, seed=1)
    assert model.config._attn_implementation == "eager"


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_a_kernel_that_is_not_installed_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RequestError, match="FlashAttention2"):
        build_model({**FIELDS, "attn_implementation": "flash_attention_2"}, None, tokenizer, seed=1)


def test_from_scratch_it_is_the_stock_model_of_that_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    model = build_model(FIELDS, None, tokenizer, seed=7)
    end = tokenizer.eos_token_id
    torch.manual_seed(7)
    stock = stock_gpt2(300, pad=end, end=end, begin=end)
    ours, theirs = model.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_seed_decides_the_weights(tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (build_model(FIELDS, None, tokenizer, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def pretrained(folder: Path, vocabulary: int, *, tied: bool) -> dict[str, torch.Tensor]:
    """Weights in a folder: GPT-2, or where the output layer is its own, Llama."""
    torch.manual_seed(3)
    model: Any = (
        stock_gpt2(vocabulary, pad=None, end=5, begin=6)
        if tied
        else LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary, hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=2, eos_token_id=5, bos_token_id=6,
            )
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_vocabulary_smaller_than_the_tokenizer_s_grows_and_keeps_its_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tied: bool
) -> None:
    before = pretrained(tmp_path / "model", 290, tied=tied)
    model = build_model({}, str(tmp_path / "model"), tokenizer, seed=1)
    after = model.state_dict()
    assert model.config.vocab_size == 300
    grown = {name for name in before if before[name].shape != after[name].shape}
    assert grown == (
        {"transformer.wte.weight", "lm_head.weight"}
        if tied
        else {"model.embed_tokens.weight", "lm_head.weight"}
    )
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
    end = tokenizer.eos_token_id
    assert ids_of(model) == {(end, end, end)}

    model.save_pretrained(tmp_path / "again")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert stock.get_output_embeddings().weight.shape[0] == 300
    assert ids_of(stock) == {(end, end, end)}
    ids = torch.tensor([tokenizer("the of", return_tensors=None)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, stock.eval()(ids).logits)


def test_ids_with_gaps_all_have_a_row(tmp_path: Path) -> None:
    words = {letter: n for n, letter in enumerate(alphabet())} | {"mill": 400}
    Backend(models.WordLevel(words, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = saved(load_for_data(str(tmp_path)), tmp_path / "saved")
    assert rows(build_model(FIELDS, None, tokenizer, seed=1)) == 401
    pretrained(tmp_path / "model", 290, tied=True)
    assert rows(build_model({}, str(tmp_path / "model"), tokenizer, seed=1)) == 401


def test_a_vocabulary_that_is_large_enough_is_left_as_it_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    before = pretrained(tmp_path / "model", 320, tied=True)
    model = build_model({}, str(tmp_path / "model"), tokenizer, seed=1)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    end = tokenizer.eos_token_id
    assert ids_of(model) == {(end, end, end)}


def test_several_end_of_text_ids_stay_when_the_tokenizer_s_is_one_of_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    pretrained(tmp_path / "model", 320, tied=True)
    for ends, kept in (([end, 310], [end, 310]), ([310, 311], end)):
        for name in ("config.json", "generation_config.json"):
            file = tmp_path / "model" / name
            file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
        model: Any = build_model({}, str(tmp_path / "model"), tokenizer, seed=1)
        assert model.config.eos_token_id == model.generation_config.eos_token_id == kept


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({"model_type": "unheard-of"}, None),
        ({"model_type": "vit"}, None),
        ({**FIELDS, "n_embd": 33}, None),
        ({**FIELDS, "activation_function": 7}, None),
        ({**FIELDS, "activation_function": "gelu_newest"}, None),
        ({}, "no/such/folder/anywhere"),
    ],
)
def test_what_transformers_cannot_build_is_a_wrong_request(
    tokenizer: PreTrainedTokenizerBase,
    fields: dict[str, Any],
    weights: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RequestError, match=r"model\.name: .* cannot be built") as refused:
        build_model(fields, weights, tokenizer, seed=1)
    assert refused.value.hint is not None
