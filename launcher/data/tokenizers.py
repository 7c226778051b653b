"""Tokenizers: text to ids exactly as transformers' AutoTokenizer gives them.

A tokenizer is a folder (`tokenizer.json`, or `vocab.json` and `merges.txt`) or a Hub id; or it is trained.
What its class and settings make of the folder is asked of transformers; what is saved here has it all in
tokenizer.json, so that a store's own tokenizer is read without.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.alphabet import GuardedBackend
from launcher.data.backends import REFERENCE, ByteLevelBPE, read_byte_level
from launcher.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Reference

KEY = "model.tokenizer"  # of a run, where a tokenizer is asked for
END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 64 << 20  # of UTF-8 text a tokenizer is trained on at most
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "config.json",
)  # fmt: skip
KEPT_SETTINGS = ("bos_token", "unk_token", "model_max_length", "chat_template")
AS_IT_IS = "PreTrainedTokenizerFast"  # the class that takes tokenizer.json so: others rebuild what is in it
PROBES = (
    'Hello, world!  It\'s 1,234.5 miles;\tnot 12.\n\n  def f(x):\n    return x_1 != "y"\r\n',
    "na\u00efve caf\u00e9 cafe\u0301 \ufb01 \u212b \u0130 \u00df \u1e9e \u2126 \uff21",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f469\u200d\U0001f4bb\U0001f1ea\U0001f1fa \ufeff\u00a0\u2003\u200b\u2028 \U0010ffff",
    "\x00\x07\x7f\u0085",
    " <|endoftext|> <s></s> <unk> [PAD] ",
)


class Tokenizer:
    """Text to ids, with what packing needs to know: end-of-text, pad, size, identity.

    The reference, the `tokenizers` library, says what the ids are; `with_backend` sets a faster one to work.
    """

    def __init__(self, reference: Reference, settings: dict[str, Any]) -> None:
        reference.no_truncation()
        reference.no_padding()
        self._reference = reference
        self._fast: GuardedBackend | None = None
        self._settings = {key: settings[key] for key in KEPT_SETTINGS if settings.get(key) is not None}
        self.end_of_text = _token_name(settings.get("eos_token")) or END_OF_TEXT
        self.end_of_text_id = _special_id(reference, self.end_of_text)
        self.pad = _token_name(settings.get("pad_token")) or self.end_of_text
        self.pad_id = _special_id(reference, self.pad)

    @cached_property
    def size(self) -> int:
        """One more than the highest id, added tokens included: where no id is left out, the entries."""
        return max(self._reference.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def specification(self) -> str:
        """The content of its tokenizer.json."""
        return str(self._reference.to_str())

    @cached_property
    def byte_level(self) -> ByteLevelBPE:
        """What a faster backend needs to know of it. Raises UnservedError where none can serve it."""
        return read_byte_level(self.specification)

    def with_backend(self, name: str) -> Tokenizer:
        """This tokenizer with another backend at work, which gives the same ids where it is proven to.

        Raises UnservedError when it cannot serve this tokenizer.
        """
        other = copy(self)
        other._fast = None if name == REFERENCE else GuardedBackend(name, self.byte_level)
        return other

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The ids of each text. Nothing is added; the name of a special token in the text becomes its id."""
        return self._reference_ids(texts) if self._fast is None else [self._encode(text) for text in texts]

    def encode_joined(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of all texts joined, end-of-text after each; and `int64[texts]`, how many ids each has.

        The lengths count the end-of-text. For many short texts this is much faster than `encode_batch`.
        """
        whole = self._encode_whole(texts)
        if whole is not None:
            return whole
        encoded = self.encode_batch(texts)
        end = np.array([self.end_of_text_id], dtype=np.int32)
        lengths = np.fromiter((len(ids) + 1 for ids in encoded), dtype=np.int64, count=len(encoded))
        parts = [part for ids in encoded for part in (ids, end)]
        return np.concatenate(parts) if parts else end[:0], lengths

    def _encode_whole(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
        """`encode_joined` in one call of the fast backend; None where the texts would run together."""
        if self._fast is None or not texts:
            return None
        joined = self.end_of_text.join((*texts, ""))
        if joined.count(self.end_of_text) > len(texts):
            return None
        ids = self._fast.encode(joined)
        if ids is None:
            return None
        ends = np.flatnonzero(ids == self.end_of_text_id)
        return ids.view(np.int32), np.diff(ends, prepend=-1)

    def _encode(self, text: str) -> NDArray[np.int32]:
        ids = self._fast.encode(text) if self._fast is not None else None
        return self._reference_ids([text])[0] if ids is None else ids.view(np.int32)

    def _reference_ids(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        encodings = self._reference.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def pieces(self, text: str) -> list[str]:
        """What the model is given one by one: the text normalized and cut. Looks for no added token."""
        normalizer, pre_tokenizer = self._reference.normalizer, self._reference.pre_tokenizer
        normalized = text if normalizer is None else normalizer.normalize_str(text)
        if pre_tokenizer is None:
            return [normalized]
        return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(normalized)]

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of ids, special tokens included."""
        return str(self._reference.decode([int(i) for i in ids], skip_special_tokens=False))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that determines ids: two tokenizers with the same one are the same."""
        content = json.loads(self.specification)
        identity = [content, self.end_of_text_id, self.pad_id]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def probe_ids(self) -> list[list[int]]:
        """The ids of fixed texts that tokenizers are prone to disagree on."""
        return [ids.tolist() for ids in self.encode_batch(PROBES)]

    def save(self, folder: Path) -> None:
        """Write what `AutoTokenizer.from_pretrained` and `load_tokenizer` read back as this tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": AS_IT_IS,
            "eos_token": self.end_of_text,
            "pad_token": self.pad,
            "clean_up_tokenization_spaces": False,
            **self._settings,
        }
        (folder / "tokenizer.json").write_text(self._reference.to_str(), encoding="utf-8")
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer in a local folder, or of a Hub id. Raises RequestError when there is none."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _from_hub(name)
    reference = _reference(folder)
    if _says_all(folder, reference):
        return Tokenizer(reference, _settings(folder, reference))
    reference, special = _as_transformers_reads(folder)
    return Tokenizer(reference, _settings(folder, reference) | special)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with an end-of-text token, from the first TRAINING_BYTES of the documents.

    The same documents give the same tokenizer. Text too short to fill the vocabulary gives a smaller one:
    see `unfilled`.
    """
    from tokenizers import Tokenizer as Reference
    from tokenizers import decoders, models, pre_tokenizers, trainers

    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reference.train_from_iterator(within(documents, TRAINING_BYTES), trainer)
    return Tokenizer(reference, {"eos_token": END_OF_TEXT})


def unfilled(tokenizer: Tokenizer, vocab_size: int) -> str | None:
    """The sentence to say when training could not fill the vocabulary that was asked for."""
    if tokenizer.size >= vocab_size:
        return None
    return (
        f"the text holds too few repeated pieces for a vocabulary of {vocab_size:,}: "
        f"the tokenizer has {tokenizer.size:,} entries"
    )


def within(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first `limit` bytes of UTF-8 of the texts; the last one is cut at a character."""
    for text in texts:
        encoded = text.encode("utf-8")
        if len(encoded) >= limit:
            yield encoded[:limit].decode("utf-8", errors="ignore")
            return
        limit -= len(encoded)
        yield text


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hint = "give a local folder that holds tokenizer.json, or the id of a repository on the Hub"
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except HFValidationError:
        raise RequestError(f"tokenizer {name}: neither a folder nor a Hub id", hint=hint, key=KEY) from None
    except LocalEntryNotFoundError:
        raise RequestError(
            f"tokenizer {name}: not in the Hub's cache here, and the Hub cannot be reached",
            hint="download it once where there is a network, or give a local folder",
            key=KEY,
        ) from None
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"tokenizer {name}: the Hub says: {reason}", hint=hint, key=KEY) from None
    return folder


def _reference(folder: Path) -> Reference:
    from tokenizers import Tokenizer as Reference
    from tokenizers import decoders, models, pre_tokenizers

    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return Reference.from_file(str(whole))
        if vocabulary.is_file() and merges.is_file():
            reference = Reference(models.BPE.from_file(str(vocabulary), str(merges)))
            reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            reference.decoder = decoders.ByteLevel()
            return reference
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise RequestError(f"tokenizer {folder}: cannot be read: {error}", key=KEY) from error
    raise RequestError(
        f"tokenizer {folder}: no tokenizer.json, nor vocab.json with merges.txt",
        hint="save one there with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        key=KEY,
    )


def _says_all(folder: Path, reference: Reference) -> bool:
    """Whether the vocabulary's files alone are what transformers makes of the folder: nothing is beside them,
    or no more than `save` writes."""
    if any((folder / name).is_file() for name in TOKENIZER_FILES[-3:]):
        return False
    config = _read_json(folder / "tokenizer_config.json")
    written = {"tokenizer_class", "eos_token", "pad_token", "clean_up_tokenization_spaces", *KEPT_SETTINGS}
    named = {_token_name(config.get(key)) for key in ("eos_token", "pad_token", "bos_token", "unk_token")}
    added = {token.content for token in reference.get_added_tokens_decoder().values()}
    as_saved = config.get("tokenizer_class") == AS_IT_IS and config.keys() <= written
    return not config or (as_saved and named <= {None, *added})


def _as_transformers_reads(folder: Path) -> tuple[Reference, dict[str, str]]:
    """The tokenizer that its class builds out of the folder, and what it calls its special tokens.

    transformers takes two seconds to load, and memory for good: it is asked in a process of its own.
    """
    from tokenizers import Tokenizer as Reference

    # -P: a random.py in the folder one stands in is not Python's.
    asking = [sys.executable, "-P", "-m", "launcher.worker.tokenizer", str(folder)]
    asked = subprocess.run(asking, capture_output=True, text=True, check=False)
    if asked.returncode:
        reason = (asked.stderr.strip() or f"exit code {asked.returncode}").splitlines()[-1]
        raise RequestError(
            f"tokenizer {folder}: transformers cannot read it: {reason}",
            hint="where its tokenizer.json says all, put it into a folder by itself, and name that",
            key=KEY,
        )
    answer = json.loads(asked.stdout.splitlines()[-1])
    return Reference.from_str(answer["content"]), answer["special"]


def _settings(folder: Path, reference: Reference) -> dict[str, Any]:
    """What the folder's JSON files say of special tokens, the most specific file last."""
    settings: dict[str, Any] = {}
    model = _read_json(folder / "config.json")
    for key in ("eos_token", "pad_token"):
        ids = model.get(f"{key}_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and (token := reference.id_to_token(first)) is not None:
            settings[key] = token
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= {key: value for key, value in _read_json(folder / name).items() if value is not None}
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path}: not JSON: {error}", key=KEY) from None
    if not isinstance(content, dict):
        raise RequestError(f"{path}: not a JSON object", key=KEY)
    return content


def _token_name(value: object) -> str | None:
    """A special token's text: a string, or transformers' {"content": ...}."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _special_id(reference: Reference, token: str) -> int:
    """The token's id; added as a special token, as transformers does, where it is not one yet."""
    reference.add_special_tokens([token])
    identity = reference.token_to_id(token)
    assert identity is not None
    return int(identity)
