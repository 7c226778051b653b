"""The fast backends against the reference: which tokenizers they serve, their ids, their memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from launcher.data import backends
from launcher.data.backends import (
    OPENERS,
    REFERENCE,
    ByteLevelBPE,
    Encode,
    UnservedError,
    byte_symbols,
    open_backend,
    read_byte_level,
)
from launcher.data.tokenizers import Tokenizer

END = "<|endoftext|>"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
each_backend = pytest.mark.parametrize("name", OPENERS)
some_text = st.text(max_size=40) | st.text("a 1!'\n\r\u00e9\u4e2d\u0301", max_size=40)


@each_backend
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(some_text, max_size=6), odd=st.sampled_from(["", END, f"{END}{END}", f" {END[:-1]}"]))
def test_a_backend_gives_the_reference_s_ids(
    tokenizer: Tokenizer, fast: dict[str, Tokenizer], name: str, texts: list[str], odd: str
) -> None:
    texts = [*texts, odd + "".join(texts[:1])]
    expected = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in fast[name].encode_batch(texts)] == [ids.tolist() for ids in expected]
    ids, lengths = fast[name].encode_joined(texts)
    assert (ids.dtype.name, lengths.dtype.name) == ("int32", "int64")
    assert ids.tolist() == [i for own in expected for i in (*own, tokenizer.end_of_text_id)]
    assert lengths.tolist() == [len(own) + 1 for own in expected]


@pytest.fixture(scope="module")
def fast(tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    return {name: tokenizer.with_backend(name) for name in OPENERS}


@pytest.mark.parametrize("name", [REFERENCE, *OPENERS])
def test_no_texts(tokenizer: Tokenizer, name: str) -> None:
    ids, lengths = tokenizer.with_backend(name).encode_joined([])
    assert (len(ids), ids.dtype.name, len(lengths), lengths.dtype.name) == (0, "int32", 0, "int64")


def test_the_reference_joins_too(tokenizer: Tokenizer) -> None:
    ids, lengths = tokenizer.encode_joined(["the fox", "", "tea"])
    assert lengths.sum() == len(ids)
    assert tokenizer.decode(ids) == f"the fox{END}{END}tea{END}"


@each_backend
def test_ordinary_text_is_one_call_of_the_backend(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[str] = []
    opener = OPENERS[name]

    def counting(served: ByteLevelBPE) -> Encode:
        encode = opener(served)

        def count(text: str) -> NDArray[np.uint32]:
            calls.append(text)
            return encode(text)

        return count

    monkeypatch.setattr(backends, "OPENERS", {name: counting})
    fast = tokenizer.with_backend(name)
    fast.encode_joined(["caf\u00e9"])
    calls.clear()
    fast.encode_joined(["the fox", "", "caf\u00e9"])
    assert calls == [f"the fox{END}{END}caf\u00e9{END}"]


@each_backend
def test_a_split_by_another_expression(tokenizer: Tokenizer, name: str) -> None:
    content = json.loads(tokenizer.specification)
    split = {
        "type": "Split",
        "pattern": {"Regex": LLAMA_3},
        "behavior": "Isolated",
        "invert": False,
    }
    own = content["pre_tokenizer"] | {"use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, own]}
    other = tokenizer_of(content)
    texts = ["It'S 1234567\r\n\n  the  fox!\n", "\ttea \u4e2d\u6587\u3002\u5b57"]
    expected = other.encode_batch(texts)
    assert expected[0].tolist() != tokenizer.encode_batch(texts)[0].tolist()
    found = other.with_backend(name).encode_batch(texts)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


def tokenizer_of(content: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer as Reference

    return Tokenizer(Reference.from_str(json.dumps(content)), {"eos_token": END})


def token(content: str, identity: int, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": identity, "content": content} | {name: flags.get(name, False) for name in names}


def set_model(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].__setitem__(key, value)


def add(*tokens: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["added_tokens"].extend(tokens)


def swap_two_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.__setitem__("normalizer", {"type": "NFC"}), r"a normalizer \(NFC\)"),
        (set_model("type", "Unigram"), r"not a byte-level BPE \(Unigram\)"),
        (set_model("byte_fallback", True), "not a byte-level BPE"),
        (set_model("dropout", 0.1), "not a byte-level BPE"),
        (set_model("end_of_word_suffix", "</w>"), "marks the parts of words"),
        (lambda content: content.__setitem__("pre_tokenizer", None), "not byte-level"),
        (lambda content: content["pre_tokenizer"].__setitem__("add_prefix_space", True), "adds a space"),
        (lambda content: content["pre_tokenizer"].__setitem__("use_regex", False), "not one regular"),
        (add(token("<mask>", 400, lstrip=True)), "'<mask>' looks at what stands around"),
        (add(token("<a>", 400), token("<a>b", 401)), "'<a>' and '<a>b' can overlap"),
        (add(token("ab", 400), token("bc", 401)), "'ab' and 'bc' can overlap"),
        (add(token("a-a", 400)), "'a-a' and 'a-a' can overlap"),
        (swap_two_merges, "order of its merges"),
        (lambda content: content["model"]["merges"].pop(), "is not merged from bytes"),
        (lambda content: content["model"]["vocab"].pop("a"), "does not hold every byte"),
    ],
)
def test_a_tokenizer_that_is_not_served(
    tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    content = json.loads(tokenizer.specification)
    read_byte_level(json.dumps(content))
    change(content)
    with pytest.raises(UnservedError, match=reason):
        read_byte_level(json.dumps(content))


def test_a_backend_s_own_refusal_is_told(tokenizer: Tokenizer) -> None:
    served = read_byte_level(tokenizer.specification)
    broken = replace(served, pattern="(")
    with pytest.raises(UnservedError, match="refuses this tokenizer"):
        open_backend("tiktoken", broken)


def test_a_backend_that_is_not_installed_says_so(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UnservedError, match="not installed"):
        open_backend("gigatoken", read_byte_level(tokenizer.specification))


def test_the_symbols_of_bytes_are_the_library_s() -> None:
    symbols = byte_symbols()
    assert sorted(symbols) == sorted(pre_tokenizers.ByteLevel.alphabet())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in map(chr, range(256)):
        ((shown, _),) = cut.pre_tokenize_str(text)
        assert bytes(symbols[symbol] for symbol in shown) == text.encode()


def test_gigatoken_forgets_words_before_they_fill_the_memory(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "CACHE_BYTES", 16 << 20)
    encode = open_backend("gigatoken", read_byte_level(tokenizer.specification))
    memory = psutil.Process().memory_info
    begun = memory().rss
    most = 0
    for million in range(4):
        for start in range(0, 1_000_000, 100_000):
            first = (million + 1) * 1_000_000 + start
            encode(" ".join(map(str, range(first, first + 100_000))))
            most = max(most, memory().rss - begun)
    assert most < 100 << 20
