"""The proof that a fast backend gives the reference's ids, and the choice of the fastest that does.

A backend must agree on fixed texts that tokenizers are prone to disagree on, on each of the tokenizer's own
tokens, on rows of them, and on a sample of the corpus. What no sample can show, characters that one
library's Unicode tables know and another's do not, `alphabet.py` watches for in every text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from launcher.data.backends import OPENERS, REFERENCE, ByteLevelBPE, UnservedError
from launcher.data.tokenizers import PROBES, Tokenizer, within

SAMPLE_BYTES = 256 << 10  # of the corpus: a tenth of a second of the reference's time
IN_A_ROW = 12  # tokens joined to a text, and texts encoded at once
DOCUMENTS = 1000  # of a token each, parted by end-of-text in one text: one by one takes twice as long
ROWS_OF = 4  # one token of so many is tried in a row too
EXCERPT = 24  # characters shown of a text that is disagreed on
HARD_TEXTS = (
    "",
    *(space * count for space in (" ", "\n", "\t", "\r\n", "\u00a0", "\u3000") for count in (1, 2, 3, 40)),
    "a  b   c\n\n\n  d\t\te \n f\r\n\r\ng \r h\n ",
    "\u0085\u2028\u2029\u200b\ufeff \u1680x\u205fy\x1c\x1d\x1e\x1fz\x0b\x0c",
    "it's IT'S It'S 'tis don't DON'T we'LL they've I'M you'Re 'S'd'' o'er '\u017f \u2019s 'l 'll'll",
    "0 1 12 123 1234 12345678901234567890 1,234.50 0x1F 1e-9 \u0661\u0662\u0663 \u00bd \u2167 \u2460",
    "a\x00b\x00\x00 \x00\x01\x7f\u0080\u009f",
    "\u0301 e\u0301\u0327\u0301x \u0301\u0301 1\u0301 !\u0301 \u093f\u094d \u0e33\u0e34 \u0bbe \u0483",
    "\u0cdc\u0c95\u0cdc \U00010d50\U00010d5a \U000105c0 \U00016d40a \ua7cba \u1c89\u1c8a \u0897",
    "\u088f\u0628 \U00010940\U00010941 \U00016ea0x \U00011db0 \U000323b0\u4e00 \U0001e6c0",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd\ufe0f \u2764\ufe0f1\ufe0f\u20e3",
    "\u01c5\u01c4\u01c6 \u02b0\u02b1 \u0345 \u00aa\u00ba \u2170 \u24d0 \ufb03 \u1e9e\u00df \u0130i\u0131I",
    "\u4e2d\u6587\u3002\u6f22\u5b57\uff0c\u3042 \u30a2\u30fc \ud55c\uae00 \u1112\u1161\u11ab \u0e44\u0e17",
    "\u202e\u0639\u0631\u0628\u064a\u0651 \u05d0\u05b8 \u0928\u093f \ue000 \uffff \U000f0000 \U0010ffff",
    "x" * 3000,
    "the quick brown fox" * 200,
    "ab" * 2000 + "\u00e9" * 500,
    "=" * 500 + "-*" * 300 + "!?" * 100,
    "https://example.org/a_b-c?d=%20&e[]=f#g <a href='x'>&amp;</a> \\n\\t $x_1^2$ //--;;{}()",
    "    if (x) {\n\t\treturn y;\n    }\n\n\n# end\n\t",
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend to use, and what to say about those that were passed over."""

    name: str
    notes: tuple[str, ...]


def choose_backend(tokenizer: Tokenizer, sample: Sequence[str]) -> Choice:
    """The fastest backend that is installed and proven to give the reference's ids.

    `sample`: texts of the corpus, of which the first SAMPLE_BYTES are used. The order of speed is fixed
    rather than measured, so that the choice depends on nothing but what is installed and what is true.
    """
    reference = tokenizer.with_backend(REFERENCE)
    try:
        served = tokenizer.byte_level
    except UnservedError as reason:
        return Choice(REFERENCE, (f"only {REFERENCE} can serve this tokenizer: {reason}",))
    texts = [*proving_texts(served, tokenizer.end_of_text), *within(sample, SAMPLE_BYTES)]
    expected = reference.encode_batch(texts)
    notes = []
    for name in (name for name in OPENERS if find_spec(name)):
        try:
            place = _disagreement(tokenizer.with_backend(name), texts, expected)
        except UnservedError as reason:
            notes.append(f"{name} cannot serve this tokenizer: {reason}")
            continue
        if place is None:
            return Choice(name, tuple(notes))
        notes.append(f"{name} disagrees with the reference on {place}: it is not used")
    return Choice(REFERENCE, tuple(notes))


def proving_texts(served: ByteLevelBPE, end_of_text: str) -> Iterator[str]:
    """The texts to agree on, whatever the corpus: the last ones hold every token, and some in a row."""
    yield from PROBES
    yield from HARD_TEXTS
    for name in served.added:
        yield from (name, f"a{name}b", f"  {name}\n {name}{name}  1", name[:-1], f"{name[:-1]}{name}")
    tokens = [token for ranked in served.ranks if (token := ranked.decode("utf-8", "ignore"))]
    yield from _joined(tokens, end_of_text)
    some = random.Random(0).sample(tokens, len(tokens) // ROWS_OF)
    yield from _joined(["".join(some[i : i + IN_A_ROW]) for i in range(0, len(some), IN_A_ROW)], end_of_text)


def _joined(documents: Sequence[str], end_of_text: str) -> Iterator[str]:
    return (end_of_text.join(documents[i : i + DOCUMENTS]) for i in range(0, len(documents), DOCUMENTS))


def _disagreement(fast: Tokenizer, texts: Sequence[str], expected: Sequence[NDArray[np.int32]]) -> str | None:
    """The first place where the ids differ, as it is shown to people: of texts alone or in a row."""
    end = np.array([fast.end_of_text_id], dtype=np.int32)
    for start in range(0, len(texts), IN_A_ROW):
        row, rights = texts[start : start + IN_A_ROW], expected[start : start + IN_A_ROW]
        for text, ids, right in zip(row, fast.encode_batch(row), rights, strict=True):
            if ids.tobytes() != right.tobytes():
                return _excerpt(fast, text, ids, right)
        ids, _ = fast.encode_joined(row)
        joined = np.concatenate([part for right in rights for part in (right, end)])
        if ids.tobytes() != joined.tobytes():
            return _excerpt(fast, fast.end_of_text.join((*row, "")), ids, joined)
    return None


def _excerpt(tokenizer: Tokenizer, text: str, ids: NDArray[np.int32], right: NDArray[np.int32]) -> str:
    common = min(len(ids), len(right))
    first = next((i for i in range(common) if ids[i] != right[i]), common)
    place = len(tokenizer.decode(right[:first]))
    return ascii(text[max(0, place - EXCERPT // 2) : place + EXCERPT // 2])
