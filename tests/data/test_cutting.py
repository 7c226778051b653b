"""Cuts of a long text: the ids of the parts are those of the whole, or there is no cut."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Reference

from launcher.data.cutting import RULES, CutsOnDemand, ProvenCuts, prove_cuts
from launcher.data.tokenizers import Tokenizer

NEWLINE, SPACE, STOP = RULES
ALL = ProvenCuts((NEWLINE, SPACE, STOP))
some_text = st.text("ab1!' \n\t\u00e9\u0301\u4e2d\u3002\uff0c\u3042", max_size=40) | st.text(max_size=40)


def assert_parts_are_the_whole(tokenizer: Tokenizer, text: str) -> None:
    """Cut a text from its end until there is no place left."""
    (whole,) = tokenizer.encode_batch([text])
    parts: list[str] = []
    rest = text
    while (place := ALL.last(rest)) is not None:
        assert 0 < place < len(rest)
        parts.insert(0, rest[place:])
        rest = rest[:place]
    parts.insert(0, rest)
    assert "".join(parts) == text
    assert np.concatenate(tokenizer.encode_batch(parts)).tolist() == whole.tolist()


@settings(max_examples=400, deadline=None)
@given(text=some_text)
def test_parts_have_the_ids_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    assert_parts_are_the_whole(tokenizer, text)


@settings(max_examples=400, deadline=None)
@given(text=some_text)
def test_parts_have_the_ids_of_the_whole_in_gpt2_s_own_tokenizer(gpt2: Tokenizer, text: str) -> None:
    assert_parts_are_the_whole(gpt2, text)


def test_every_rule_holds_for_a_byte_level_bpe(tokenizer: Tokenizer, lines: list[str]) -> None:
    assert prove_cuts(tokenizer, lines) == ALL
    assert pickle.loads(pickle.dumps(ALL)) == ALL


def test_every_rule_holds_for_gpt2_s_own_tokenizer(gpt2: Tokenizer, lines: list[str]) -> None:
    assert prove_cuts(gpt2, ["\n".join(lines)]) == ALL


@pytest.mark.parametrize(
    ("text", "rules", "place"),
    [
        ("one\ntwo\nthree", (NEWLINE,), 8),
        ("one\ntwo three", (NEWLINE, SPACE), 7),
        ("one two\nthree", (NEWLINE, SPACE), 8),
        ("one two\n\n three\n", (NEWLINE, SPACE), 3),
        ("\none", (NEWLINE,), None),
        ("one\n", (NEWLINE,), None),
        (" one two ", (SPACE,), 4),
        ("\u4e2d\u6587\u3002\u5b57\u3002", (STOP,), 2),
        ("word", (NEWLINE, SPACE, STOP), None),
        ("", (NEWLINE, SPACE, STOP), None),
        ("one two", (), None),
    ],
)
def test_the_last_place(text: str, rules: tuple[str, ...], place: int | None) -> None:
    assert ProvenCuts(rules).last(text) == place


@given(text=st.text("ab \n\u4e2d\u3002", max_size=30), size=st.integers(1, 8))
def test_the_last_place_is_found_through_any_window(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.data.cutting.WINDOW", size)
        places = [place for rule in RULES.values() for place in rule.places(text)]
        assert ALL.last(text) == max(places, default=None)


def metaspace(split: bool) -> Tokenizer:
    """SentencePiece's way: words begin with a mark, the first of a text too."""
    pieces = [("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    reference = Reference(models.Unigram(pieces, unk_id=0))
    reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=split)
    return Tokenizer(reference, {})


def llama_2() -> Tokenizer:
    """A BPE that is given the whole text at once, a mark before it and for each space."""
    vocabulary = {"<unk>": 0, "\u2581": 1, "a": 2, "b": 3}
    reference = Reference(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    reference.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return Tokenizer(reference, {})


def test_a_mark_before_each_text_refuses_cuts() -> None:
    assert prove_cuts(llama_2(), []) == ProvenCuts(())
    assert prove_cuts(metaspace(split=False), []) == ProvenCuts(())
    # Where words are apart and begin with their space, that is where they may be cut.
    assert prove_cuts(metaspace(split=True), []) == ProvenCuts((SPACE,))


def test_words_that_lose_their_spaces_can_be_cut_there() -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "##b": 2, "word": 3}
    reference = Reference(models.WordPiece(vocabulary, unk_token="[UNK]"))
    assert prove_cuts(Tokenizer(reference, {}), []) == ProvenCuts(())
    reference.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    assert NEWLINE in prove_cuts(Tokenizer(reference, {}), []).rules


def with_added(tokenizer: Tokenizer, *added: AddedToken) -> Tokenizer:
    reference = Reference.from_str(tokenizer.specification)
    reference.add_tokens(list(added))
    return Tokenizer(reference, {})


@pytest.mark.parametrize(
    ("added", "kept"),
    [
        (AddedToken("<|mill|>"), (NEWLINE, SPACE, STOP)),
        (AddedToken("old mill"), (NEWLINE, STOP)),
        (AddedToken("mill\n"), (SPACE, STOP)),
        (AddedToken("\u3002"), (NEWLINE, SPACE)),
        (AddedToken("<mill>", lstrip=True), ()),
        (AddedToken("<mill>", rstrip=True), ()),
        (AddedToken("mill", single_word=True), ()),
    ],
)
def test_an_added_token_that_could_lie_across(
    tokenizer: Tokenizer, added: AddedToken, kept: tuple[str, ...]
) -> None:
    assert prove_cuts(with_added(tokenizer, added), []).rules == kept


def test_the_sample_refuses_what_the_probes_do_not_know(tokenizer: Tokenizer) -> None:
    content: dict[str, Any] = json.loads(tokenizer.specification)
    joining = {
        "type": "Split",
        "pattern": {"Regex": r" zebra fish| ?\S+|\s+"},
        "behavior": "Isolated",
    }
    own = content["pre_tokenizer"] | {"use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [joining | {"invert": False}, own]}
    odd = Tokenizer(Reference.from_str(json.dumps(content)), {})
    assert SPACE in prove_cuts(odd, ["the old mill"]).rules
    assert SPACE not in prove_cuts(odd, ["the old zebra fish"]).rules


def test_a_proof_that_is_never_needed_is_never_made(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = CutsOnDemand(tokenizer, ["the old mill"])
    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode_batch", None)
        with pytest.raises(TypeError):
            cuts.last("the old mill")
    assert cuts.last("the old mill") == ALL.last("the old mill") == len("the old")
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    assert cuts.last("the old mill by the") == len("the old mill by")


def test_other_ids_refuse_a_rule(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces say, it is the ids that count."""
    real = tokenizer.encode_batch

    def other(texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return [ids[:-1] if text == "12\n!" else ids for text, ids in zip(texts, real(texts), strict=True)]

    monkeypatch.setattr(tokenizer, "encode_batch", other)
    assert prove_cuts(tokenizer, []) == ProvenCuts((SPACE, STOP))
