"""Places where a long text may be cut and tokenised in parts, with the ids of the whole.

A rule is a kind of place where a pre-tokenizer begins a new piece, whatever stands around. It holds for a
tokenizer when it is proven: on every pair of texts of many kinds with such a place between them, and on
places in a sample of the corpus, both the ids and the pieces that the model is given one by one must be
those of the two parts. One counter-example, or an added token that could lie across the place, refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, product
from typing import Any

from pydantic_core import from_json

from launcher.data.tokenizers import Tokenizer

PLACES = 400  # of a rule in the sample that are tried, at most
AROUND = 100  # characters of the sample that are tokenised on either side of a place
WINDOW = 1 << 12  # characters from the end of a text that are searched first
IDEOGRAPH = "[\u4e00-\u9fff]"
STOPS = "\u3001\u3002\uff0c\uff01\uff1f"
NEIGHBOURS = (
    *("word", "Word", "x", "don't", "they'", "12", "1,234", "x_", "f(", ")", "!", "...", "-", "'", '"', "\\"),
    *("\u00e9", "e\u0301", "\u0301", "\u00bd", "\u0661", "\u201d", "\u2014", "\u017f", "\u0130", "\ufeff"),
    *("\u4e2d", "\u6587\u5b57", "\u3042", "\ud55c", "\u0928\u093f", "\u0e44\u0e17", "\u0639\u0631", "\u3002"),
    *("\U0001f600", "\U0001f469\u200d\U0001f4bb", "\ue000", "\U000323b0", "\x00", "\x7f", "\u200b", "\u0cdc"),
)


@dataclass(frozen=True, slots=True)
class CutRule:
    """One kind of place: before, or `after`, one of the characters `marks` where `pattern` finds it."""

    marks: str
    pattern: re.Pattern[str]
    after: bool = False

    def places(self, text: str, start: int = 0) -> Iterator[int]:
        """The places in `text` from `start` on, 0 < place < len(text), in order."""
        found = self.pattern.finditer(text, start)
        return (match.end() if self.after else match.start() for match in found)

    def last(self, text: str, least: int) -> int:
        """The last place of `text` that is above `least`, or `least`."""
        window, place = WINDOW, least
        while place == least:
            start = max(least, len(text) - window)
            place = max(chain(self.places(text, start), (least,)))
            if start == least:
                break
            window *= 8
        return place


RULES: Mapping[str, CutRule] = {
    "after a newline between two characters": CutRule("\n", re.compile(r"\n(?<=\S\n)(?=\S)"), after=True),
    "before a space between two characters": CutRule(" ", re.compile(r" (?<=\S )(?=\S)")),
    "before a stop between two ideographs": CutRule(
        STOPS, re.compile(f"[{STOPS}](?<={IDEOGRAPH}[{STOPS}])(?={IDEOGRAPH})")
    ),
}
"""Rules by name. White space is what Python calls so, of which a regular expression's is a part."""


@dataclass(frozen=True, slots=True)
class ProvenCuts:
    """Places where a text may be cut and tokenised in parts with the same ids: proven for one tokenizer."""

    rules: tuple[str, ...]

    def last(self, text: str) -> int | None:
        """The last safe place to cut `text` at, 0 < place < len(text); None: there is none."""
        place = 0
        for name in self.rules:
            place = RULES[name].last(text, place)
        return place or None


class Anywhere:
    """Cuts a long text where it is: good enough for a sample, which no whole document need be read for."""

    def last(self, text: str) -> int | None:
        """A place in `text`, as `ProvenCuts.last`."""
        return len(text) - 1


class CutsOnDemand:
    """The places that `prove_cuts` finds, proven when a text is first to be cut: few corpora have one."""

    def __init__(self, tokenizer: Tokenizer, sample: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._sample = sample

    @cached_property
    def _proven(self) -> ProvenCuts:
        return prove_cuts(self._tokenizer, self._sample)

    def last(self, text: str) -> int | None:
        """As `ProvenCuts.last`."""
        return self._proven.last(text)


def prove_cuts(tokenizer: Tokenizer, sample: Sequence[str]) -> ProvenCuts:
    """The rules that hold for a tokenizer. `sample`: texts of the corpus."""
    added = from_json(tokenizer.specification).get("added_tokens") or []
    return ProvenCuts(
        tuple(
            name
            for name, rule in RULES.items()
            if not any(_lies_across(token, rule) for token in added)
            and _holds(tokenizer, _between_neighbours(rule))
            and _holds(tokenizer, islice(_in_sample(rule, sample), PLACES))
        )
    )


def _lies_across(token: Mapping[str, Any], rule: CutRule) -> bool:
    """Whether an added token could span the rule's places, or looks at or swallows what stands around it."""
    wide = any(token.get(key) for key in ("single_word", "lstrip", "rstrip"))
    return wide or any(mark in token["content"] for mark in rule.marks)


def _holds(tokenizer: Tokenizer, parts: Iterable[tuple[str, str]]) -> bool:
    """Whether tokenising each pair of parts is tokenising the two joined."""
    pairs = list(parts)
    texts = list(dict.fromkeys(chain.from_iterable((a, b, a + b) for a, b in pairs)))
    ids = dict(zip(texts, (each.tobytes() for each in tokenizer.encode_batch(texts)), strict=True))
    if any(ids[a] + ids[b] != ids[a + b] for a, b in pairs):
        return False
    pieces = {text: tokenizer.pieces(text) for text in texts}
    return all(pieces[a] + pieces[b] == pieces[a + b] for a, b in pairs)


def _between_neighbours(rule: CutRule) -> Iterator[tuple[str, str]]:
    for before, mark, after in product(NEIGHBOURS, rule.marks, NEIGHBOURS):
        text = before + mark + after
        place = len(before) + rule.after
        if place in rule.places(text):
            yield text[:place], text[place:]


def _in_sample(rule: CutRule, sample: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in sample:
        for place in rule.places(text):
            yield text[max(0, place - AROUND) : place], text[place : place + AROUND]
