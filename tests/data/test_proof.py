"""The choice of a backend: the fastest that agrees, and loudly passed over where it does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer as Reference
from tokenizers import models, pre_tokenizers

from launcher.data import backends, proof
from launcher.data.backends import OPENERS, REFERENCE, ByteLevelBPE, Encode
from launcher.data.proof import HARD_TEXTS, SAMPLE_BYTES, choose_backend, proving_texts
from launcher.data.tokenizers import Tokenizer

Wrong = Callable[[str], bool]


def lying(name: str, about: Wrong) -> Callable[[ByteLevelBPE], Encode]:
    """A backend that gives another last id for some texts."""

    def opener(served: ByteLevelBPE) -> Encode:
        encode = OPENERS[name](served)

        def lie(text: str) -> NDArray[np.uint32]:
            ids = encode(text).copy()
            if about(text):
                ids[-1] += 1
            return ids

        return lie

    return opener


def inject(monkeypatch: pytest.MonkeyPatch, **wrong: Wrong) -> None:
    replaced = {name: lying(name, about) for name, about in wrong.items()}
    openers = {**OPENERS, **replaced}
    monkeypatch.setattr(backends, "OPENERS", openers)
    monkeypatch.setattr(proof, "OPENERS", openers)


def test_the_fastest_is_chosen(tokenizer: Tokenizer, lines: list[str]) -> None:
    assert choose_backend(tokenizer, lines) == proof.Choice("gigatoken", ())


def test_gpt2_s_own_tokenizer_is_served_by_all(gpt2: Tokenizer, lines: list[str]) -> None:
    assert choose_backend(gpt2, lines) == proof.Choice("gigatoken", ())
    for name in OPENERS:
        fast = gpt2.with_backend(name)
        for text in (*HARD_TEXTS, *lines):
            assert fast.encode_batch([text])[0].tolist() == gpt2.encode_batch([text])[0].tolist()


def test_a_disagreement_on_one_probe_is_caught(
    tokenizer: Tokenizer, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = next(text for text in HARD_TEXTS if "12345678901234567890" in text)
    inject(monkeypatch, gigatoken=lambda text: text == probe)
    choice = choose_backend(tokenizer, lines)
    assert choice.name == "tiktoken"
    (note,) = choice.notes
    assert note.startswith("gigatoken disagrees with the reference on '")
    assert ascii(probe[-4:])[1:-1] in note


def test_a_disagreement_on_the_corpus_alone_is_caught(
    tokenizer: Tokenizer, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, gigatoken=lambda text: text.endswith("zebra crossing"))
    assert choose_backend(tokenizer, lines).name == "gigatoken"
    choice = choose_backend(tokenizer, [*lines, "a zebra crossing"])
    assert choice.name == "tiktoken"
    assert "crossing'" in choice.notes[0]


def test_a_disagreement_on_texts_in_a_row_is_caught(
    tokenizer: Tokenizer, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, gigatoken=lambda text: text.endswith(f"zebra{tokenizer.end_of_text}"))
    assert choose_backend(tokenizer, lines).name == "gigatoken"
    choice = choose_backend(tokenizer, [*lines, "zebra"])
    assert choice.name == "tiktoken"
    assert "zebra<|endof" in choice.notes[0]


def test_where_all_disagree_the_reference_does_the_work(
    tokenizer: Tokenizer, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    between = f"{tokenizer.end_of_text}the{tokenizer.end_of_text}"
    inject(monkeypatch, gigatoken=lambda text: between in text, tiktoken=lambda text: text == lines[7])
    choice = choose_backend(tokenizer, lines)
    assert choice.name == REFERENCE
    assert [note.split()[0] for note in choice.notes] == ["gigatoken", "tiktoken"]


def test_what_is_not_installed_is_passed_over_in_silence(
    tokenizer: Tokenizer, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "find_spec", lambda name: None if name == "gigatoken" else name)
    assert choose_backend(tokenizer, lines) == proof.Choice("tiktoken", ())


def test_another_kind_of_tokenizer_is_the_reference_s() -> None:
    words = Reference(models.WordLevel({"the": 0, "fox": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    choice = choose_backend(Tokenizer(words, {}), ["the fox"])
    assert choice.name == REFERENCE
    assert choice.notes == (
        "only tokenizers can serve this tokenizer: its model is not a byte-level BPE (WordLevel)",
    )


def test_the_sample_is_read_no_further_than_its_limit(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, gigatoken=lambda text: "zebra" in text)
    long = "the old mill " * (SAMPLE_BYTES // 13) + " " * 13
    assert choose_backend(tokenizer, [long, "zebra"]).name == "gigatoken"


def test_every_token_is_proven(tokenizer: Tokenizer) -> None:
    texts = list(proving_texts(tokenizer.byte_level, tokenizer.end_of_text))
    documents = {each for text in texts for each in text.split(tokenizer.end_of_text)}
    tokens = {tokenizer.decode([i]) for i in range(tokenizer.size)} - {tokenizer.end_of_text}
    assert {token for token in tokens if "\ufffd" not in token} <= documents
    assert texts == list(proving_texts(tokenizer.byte_level, tokenizer.end_of_text))


def test_the_note_shows_characters_by_number(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, gigatoken=lambda text: "caf\u00e9 noir" in text)
    (note,) = choose_backend(tokenizer, ["some caf\u00e9 noir"]).notes
    assert note.isascii()
