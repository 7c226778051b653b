"""The characters on which a fast backend is proven to agree with the reference.

Libraries carry the tables of different Unicode versions, so one may call a character a letter that another
does not know, and cut the text around it differently. A regular expression sees a character only through
the classes it is in, so each is tried once, when it is first met: in frames that show its class, under a
vocabulary whose ids show every cut. A text with a character that fails is left to the reference.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.backends import ByteLevelBPE, UnservedError, byte_symbols, open_backend, read_byte_level

NEIGHBOURS = "aA1!' \n"  # one of each class that a pre-tokenizer's regular expression tells apart
FRAMES = (*("{0}" + each for each in NEIGHBOURS), *(each + "{0}" for each in NEIGHBOURS), "{0}{0}", "'{0}a")
SEPARATOR = "<|witness|>"
UNTRIED, AGREED, DIFFERS = 0, 1, 2
CODE_POINTS = 0x110000


class GuardedBackend:
    """A backend that declines the texts on which it is not proven, character by character."""

    def __init__(self, name: str, tokenizer: ByteLevelBPE) -> None:
        """Raises UnservedError when the backend cannot serve the tokenizer."""
        from tokenizers import Tokenizer as Reference

        self._encode = open_backend(name, tokenizer)
        shown = witness(tokenizer)
        self._witness = open_backend(name, read_byte_level(shown))
        self._reference = Reference.from_str(shown)
        self._separator = self._reference.token_to_id(SEPARATOR)
        self._states = np.zeros(CODE_POINTS, dtype=np.uint8)
        self._try(np.arange(128, dtype=np.uint32))
        if (self._states[:128] == DIFFERS).any():
            raise UnservedError("it cuts plain ASCII text in other places")

    def encode(self, text: str) -> NDArray[np.uint32] | None:
        """The text's ids, or None: it is for the reference."""
        return self._encode(text) if self.covers(text) else None

    def covers(self, text: str) -> bool:
        """Whether the reference cuts text around each of these characters in the same way."""
        if text.isascii():
            return True
        codes = _codes_beyond_ascii(text)
        states = self._states[codes]
        if states.min() == UNTRIED:
            self._try(np.unique(codes[states == UNTRIED]))
            states = self._states[codes]
        return bool(states.max() == AGREED)

    def _try(self, codes: NDArray[np.uint32]) -> None:
        framed = (frame.format(chr(code)) for code in codes.tolist() for frame in FRAMES)
        text = SEPARATOR.join((*framed, ""))
        (expected,) = self._reference.encode_batch_fast([text], add_special_tokens=False)
        found, right = self._by_character(self._witness(text)), self._by_character(np.array(expected.ids))
        same = [each == rightly for each, rightly in zip(found, right, strict=True)]
        self._states[codes] = np.where(same, AGREED, DIFFERS)

    def _by_character(self, ids: NDArray[np.integer[Any]]) -> list[bytes]:
        """The ids of each character's frames, of all that were tried in one text."""
        ends = np.flatnonzero(ids == self._separator)[len(FRAMES) - 1 :: len(FRAMES)]
        return [part.tobytes() for part in np.split(ids.astype(np.uint32), ends)[:-1]]


def witness(tokenizer: ByteLevelBPE) -> str:
    """The tokenizer.json of a tokenizer that cuts text as this one does, and whose ids show where.

    Its vocabulary is the 256 bytes, and each of them before and after each of NEIGHBOURS. So a character has
    an id in common with its neighbour exactly when no cut parts them. SEPARATOR keeps frames apart.
    """
    symbols = [symbol for symbol, _ in sorted(byte_symbols().items(), key=lambda item: item[1])]
    merges: dict[tuple[str, str], None] = {}
    for own in (symbols[ord(neighbour)] for neighbour in NEIGHBOURS):
        merges |= {(symbol, own): None for symbol in symbols}
        merges |= {(own, symbol): None for symbol in symbols}
    tokens = [*symbols, *("".join(merge) for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    own_model = {"vocab": vocabulary, "merges": list(merges), "unk_token": None}
    separator = {"id": len(tokens), "content": SEPARATOR, "special": True, "normalized": False}
    separator |= {"single_word": False, "lstrip": False, "rstrip": False}
    others = {
        "model": tokenizer.rest["model"] | own_model,
        "added_tokens": [separator],
        "post_processor": None,
    }
    return json.dumps({**tokenizer.rest, **others})


def _codes_beyond_ascii(text: str) -> NDArray[np.uint32]:
    """The code points of a text, without its ASCII where that is the greater part."""
    raw = np.frombuffer(text.encode("utf-8"), dtype=np.int8)
    beyond = np.flatnonzero(raw < 0)
    if len(beyond) < len(raw) // 8:
        text = raw[beyond].tobytes().decode("utf-8")
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
