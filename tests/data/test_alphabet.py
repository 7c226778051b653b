"""Characters that libraries put in different classes, under a vocabulary whose ids show every cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference

from launcher.data import backends
from launcher.data.alphabet import GuardedBackend, witness
from launcher.data.backends import (
    OPENERS,
    ByteLevelBPE,
    Encode,
    UnservedError,
    open_backend,
    read_byte_level,
)
from launcher.data.tokenizers import Tokenizer

each_backend = pytest.mark.parametrize("name", OPENERS)
NEW_IN_UNICODE_17 = "\u0cdc\u088f\ua7ce\U00010940\U00016ea0\U000323b0"


@pytest.fixture(scope="module")
def showing(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that cuts text as `tokenizer` does, with ids that tell wherever it did."""
    return Tokenizer(Reference.from_str(witness(tokenizer.byte_level)), {})


@pytest.fixture(scope="module")
def fast(showing: Tokenizer) -> dict[str, Tokenizer]:
    return {name: showing.with_backend(name) for name in OPENERS}


@each_backend
@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=30) | st.text(f"aA1!' \n{NEW_IN_UNICODE_17}\u0301\u017f", max_size=30))
def test_any_characters_have_the_reference_s_ids(
    showing: Tokenizer, fast: dict[str, Tokenizer], name: str, text: str
) -> None:
    assert fast[name].encode_batch([text])[0].tolist() == showing.encode_batch([text])[0].tolist()


@pytest.mark.parametrize("character", NEW_IN_UNICODE_17)
def test_a_character_that_only_one_library_knows_is_left_to_the_reference(
    tokenizer: Tokenizer, showing: Tokenizer, character: str
) -> None:
    alone = open_backend("gigatoken", read_byte_level(showing.specification))
    text = f"a{character}a"
    differs = alone(text).tolist() != showing.encode_batch([text])[0].tolist()
    guarded = GuardedBackend("gigatoken", tokenizer.byte_level)
    assert guarded.covers(f"the old mill \u00e9{text}") is not differs
    assert (guarded.encode(text) is None) is differs
    assert guarded.covers("the old mill \u00e9 \u4e2d\u6587 \U0001f600")


def test_witness_ids_show_every_class(showing: Tokenizer) -> None:
    """Letters, numbers, others and spaces share an id with their like, and with nothing else."""
    joins = {
        character: {
            other
            for other in "a1!"
            if len(showing.encode_batch([character + other])[0]) < len((character + other).encode())
        }
        for character in ("b", "\u00e9", "\u4e2d", "2", "\u00bd", "?", "\u0301", "\u3002", "\t", "\u3000")
    }
    assert list(joins.values()) == [{"a"}] * 3 + [{"1"}] * 2 + [{"!"}] * 3 + [set()] * 2


def test_a_character_is_tried_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = GuardedBackend("tiktoken", tokenizer.byte_level)
    assert guarded.covers("\u00e9\u00e8")
    monkeypatch.setattr(guarded, "_witness", None)
    assert guarded.covers("\u00e8 \u00e9 \u00e9")
    with pytest.raises(TypeError):
        guarded.covers("\u00ea")


def test_a_backend_that_cuts_ascii_elsewhere_is_not_used(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_cuts(served: ByteLevelBPE) -> Encode:
        pattern = served.pattern.replace(r"\p{N}", r"\p{Nd}").replace("'s|", "")
        return OPENERS["tiktoken"](replace(served, pattern=pattern))

    monkeypatch.setattr(backends, "OPENERS", {"tiktoken": other_cuts})
    with pytest.raises(UnservedError, match="plain ASCII"):
        GuardedBackend("tiktoken", tokenizer.byte_level)
