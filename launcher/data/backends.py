"""Other libraries that give a byte-level BPE's ids faster than the reference does.

Which tokenizers they can serve is read in tokenizer.json, never guessed from a name: a byte-level BPE whose
text is cut into pieces by one regular expression, with no normalizer. That they then give the reference's
ids is for `proof.py` to show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

REFERENCE = "tokenizers"
BYTE_LEVEL_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's, in encoder.py
)
CACHE_BYTES = 96 << 20  # a process grows by so much before gigatoken's memory of words is thrown away
CACHE_CHARACTERS = 1 << 27  # or it has met so many, so that a larger corpus takes no more than a small one
LOOK_EVERY = 1 << 20  # characters between two looks at how much it has grown

Encode = Callable[[str], NDArray[np.uint32]]
"""The ids of a text. Nothing is added; the name of an added token in it becomes its id. One thread works."""


class UnservedError(Exception):
    """A backend cannot serve a tokenizer; says why."""


@dataclass(frozen=True, slots=True)
class ByteLevelBPE:
    """A tokenizer that the backends can serve.

    `pattern` cuts a text into pieces, `ranks` are the ids of the model's tokens by their bytes, in the order
    of merging, `added` those of the tokens found in a text before it is cut. `rest`: all that its
    tokenizer.json says besides vocabulary and merges.
    """

    specification: str
    rest: Mapping[str, Any]
    pattern: str
    ranks: Mapping[bytes, int]
    added: Mapping[str, int]


def read_byte_level(specification: str) -> ByteLevelBPE:
    """What the backends need of a tokenizer.json. Raises UnservedError for what they do not do."""
    content = from_json(specification)  # not json: half as fast
    added = content.get("added_tokens") or []
    model = content["model"]
    _check_added(added)
    if content.get("normalizer") is not None:
        raise UnservedError(f"it has a normalizer ({content['normalizer'].get('type')})")
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise UnservedError(f"its model is not a byte-level BPE ({model.get('type')})")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnservedError("its model marks the parts of words")
    pattern = _pattern(content.get("pre_tokenizer") or {})
    names = {str(token["content"]): int(token["id"]) for token in added}
    model_rest = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    rest = content | {"model": model_rest}
    return ByteLevelBPE(specification, rest, pattern, _ranks(model, names), names)


def open_backend(name: str, tokenizer: ByteLevelBPE) -> Encode:
    """The backend of this name at work on a tokenizer.

    Raises UnservedError when it is not installed or refuses the tokenizer.
    """
    try:
        return OPENERS[name](tokenizer)
    except ImportError:
        raise UnservedError("it is not installed") from None
    except UnservedError:
        raise
    # Both are compiled from Rust, and raise whatever class suits the line they stopped at.
    except Exception as error:
        raise UnservedError(f"it refuses this tokenizer ({error})") from error


def byte_symbols() -> Mapping[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: GPT-2's `bytes_to_unicode`."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in sorted(shown)} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _open_gigatoken(tokenizer: ByteLevelBPE) -> Encode:
    import psutil
    from gigatoken import Tokenizer

    memory = psutil.Process().memory_info
    encoder = Tokenizer.from_json(tokenizer.specification)
    begun, met, unlooked = memory().rss, 0, 0

    def encode(text: str) -> NDArray[np.uint32]:
        nonlocal encoder, begun, met, unlooked
        # It remembers every word it has met, without end: a fresh one remembers none.
        if unlooked > LOOK_EVERY:
            met, unlooked = met + unlooked, 0
            if met > CACHE_CHARACTERS or memory().rss - begun > CACHE_BYTES:
                del encoder
                encoder = Tokenizer.from_json(tokenizer.specification)
                begun, met = memory().rss, 0
        unlooked += len(text)
        ids: NDArray[np.uint32] = encoder.encode(text)
        return ids

    return encode


def _open_tiktoken(tokenizer: ByteLevelBPE) -> Encode:
    from tiktoken import Encoding

    encoding = Encoding(
        "from tokenizer.json",
        pat_str=tokenizer.pattern,
        mergeable_ranks=dict(tokenizer.ranks),
        special_tokens=dict(tokenizer.added),
    )

    def encode(text: str) -> NDArray[np.uint32]:
        return encoding.encode_to_numpy(text, allowed_special="all")

    return encode


OPENERS: Mapping[str, Callable[[ByteLevelBPE], Encode]] = {
    "gigatoken": _open_gigatoken,
    "tiktoken": _open_tiktoken,
}
"""The backends, the fastest first: each is several times as fast as the next, on any machine and text."""


def _check_added(added: Sequence[Mapping[str, Any]]) -> None:
    """Raise UnservedError for an added token that is not simply found wherever it stands in a text."""
    for token in added:
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            raise UnservedError(f"its token {token['content']!r} looks at what stands around it")
    names = [str(token["content"]) for token in added]
    by_first: dict[str, list[str]] = {}
    for name in names:
        by_first.setdefault(name[0], []).append(name)
    for name in names:
        for start in range(len(name)):
            for other in by_first.get(name[start], ()):
                if (start or other != name) and other.startswith(name[start : start + len(other)]):
                    raise UnservedError(f"its tokens {name!r} and {other!r} can overlap")


def _pattern(pre_tokenizer: Mapping[str, Any]) -> str:
    """The one regular expression that cuts text into pieces, before their bytes become symbols."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = steps[-1] if steps else {}
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        kind = pre_tokenizer.get("type")
        raise UnservedError(f"its pre-tokenizer is not byte-level, or adds a space ({kind})")
    if len(steps) == 1 and byte_level.get("use_regex", True):
        return BYTE_LEVEL_PATTERN
    split = steps[0]
    if len(steps) == 2 and split.get("type") == "Split" and not byte_level.get("use_regex", True):
        pattern = split.get("pattern", {}).get("Regex")
        if pattern and split.get("behavior") == "Isolated" and not split.get("invert"):
            return str(pattern)
    raise UnservedError("its pre-tokenizer is not one regular expression")


def _ranks(model: Mapping[str, Any], added: Mapping[str, int]) -> dict[bytes, int]:
    """The model's tokens by their bytes. Ids must rise in the order of merging: tiktoken merges by id."""
    symbols = byte_symbols()
    vocabulary: Mapping[str, int] = model["vocab"]
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merged = [vocabulary["".join(merge)] for merge in merges]
    if any(first > second for first, second in pairwise(merged)):
        raise UnservedError("its ids do not follow the order of its merges")
    made = {*merged, *(vocabulary[symbol] for symbol in symbols if symbol in vocabulary)}
    ranks = {}
    for token, identity in vocabulary.items():
        spelled = [symbols[each] for each in token if each in symbols]
        if identity in made and len(spelled) == len(token):
            ranks[bytes(spelled)] = identity
        elif token not in added:
            raise UnservedError(f"its token {token!r} is not merged from bytes")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise UnservedError("its vocabulary does not hold every byte")
    return ranks
