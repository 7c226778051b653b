"""The tokenizer against transformers' own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from tokenizers import models
from transformers import AutoTokenizer

from launcher.data import tokenizers as module
from launcher.data.tokenizers import PROBES, Tokenizer, load_tokenizer, train_tokenizer, unfilled, within
from launcher.errors import RequestError


def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder))


def reference_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(saved: Path) -> Any:
    """The saved tokenizer as transformers reads it."""
    return reference(saved)


@pytest.fixture(scope="module")
def gpt2_folder(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary as transformers' GPT2Tokenizer lays it out."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = json.loads((saved / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return folder


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(PROBES))
def test_a_saved_tokenizer_is_transformers_tokenizer(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    (ours,) = tokenizer.encode_batch([text])
    assert ours.tolist() == reference_ids(theirs, text)
    assert tokenizer.decode(ours) == text


def test_a_saved_tokenizer_keeps_its_special_tokens(tokenizer: Tokenizer, theirs: Any) -> None:
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.end_of_text_id == tokenizer.pad_id
    assert theirs.eos_token == "<|endoftext|>"
    assert len(theirs) == tokenizer.size


def test_beside_a_gpt2_model_it_is_still_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = reference(tmp_path)
    assert [reference_ids(theirs, text) for text in PROBES] == tokenizer.probe_ids()


def test_loading_what_was_saved_gives_the_same_tokenizer(tokenizer: Tokenizer, saved: Path) -> None:
    again = load_tokenizer(str(saved))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.probe_ids() == tokenizer.probe_ids()


def test_a_vocabulary_and_its_merges(gpt2_folder: Path) -> None:
    ours, theirs = load_tokenizer(str(gpt2_folder)), reference(gpt2_folder)
    assert ours.end_of_text_id == theirs.eos_token_id
    assert ours.probe_ids() == [reference_ids(theirs, text) for text in PROBES]


def test_a_prefix_space_is_kept(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((saved / "tokenizer.json").read_text())
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(str(tmp_path)), reference(tmp_path)
    assert ours.encode_batch(["the fox"])[0].tolist() == reference_ids(theirs, "the fox")
    ours.save(tmp_path / "again")
    assert reference_ids(reference(tmp_path / "again"), "the fox") == reference_ids(theirs, "the fox")


ADDED = {"content": "<|user|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    "config",
    [
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin|>",
            "eos_token": "<|end|>",
            "added_tokens_decoder": {"400": {**ADDED, "special": True}},
        },
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "unk_token": "tea"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "add_prefix_space": True},
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"},
    ],
    ids=["added in settings", "a word for unknown", "no prefix space", "another pre-tokenizer"],
)
def test_what_class_and_settings_make_of_tokenizer_json(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer.json").write_text((saved / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(str(tmp_path)), reference(tmp_path)
    texts = [*PROBES, "<|begin|>tea<|user|>the<|end|>", "'Tis 12 o'clock"]
    expected = [reference_ids(theirs, text) for text in texts]
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == expected
    assert (ours.end_of_text_id, ours.size) == (theirs.eos_token_id, len(theirs))
    ours.save(tmp_path / "again")
    assert [reference_ids(reference(tmp_path / "again"), text) for text in texts] == expected
    monkeypatch.setattr("subprocess.run", None)
    assert load_tokenizer(str(tmp_path / "again")).fingerprint == ours.fingerprint


def test_neither_the_folder_it_is_read_from_nor_a_site_that_prints_is_in_the_way(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text((saved / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "unk_token": "tea"}))
    (tmp_path / "random.py").write_text("raise ImportError('another random')")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('welcome', end='')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer(".").end_of_text_id == reference(tmp_path).eos_token_id


def test_what_transformers_cannot_read_is_a_wrong_request(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((saved / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": True}))
    with pytest.raises(RequestError, match="transformers cannot read it: ValueError: split_special_tokens"):
        load_tokenizer(str(tmp_path))


def without_end_of_text(saved: Path, folder: Path) -> dict[str, Any]:
    """The saved tokenizer, with its end-of-text token called something else."""
    content = (saved / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (folder / "tokenizer.json").write_text(content)
    parsed: dict[str, Any] = json.loads(content)
    return parsed


def test_a_tokenizer_without_end_of_text_is_given_one(saved: Path, tmp_path: Path) -> None:
    without_end_of_text(saved, tmp_path)
    ours = load_tokenizer(str(tmp_path))
    assert ours.end_of_text_id == ours.size - 1
    ours.save(tmp_path / "again")
    theirs = reference(tmp_path / "again")
    assert (theirs.eos_token_id, len(theirs)) == (ours.end_of_text_id, ours.size)
    assert reference_ids(theirs, "a<|endoftext|>b") == ours.encode_batch(["a<|endoftext|>b"])[0].tolist()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<|other|>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|other|>", "__type": "AddedToken"}}),
        ("special_tokens_map.json", {"eos_token": "<|other|>"}),
        ("config.json", {"eos_token_id": 0}),
        ("config.json", {"eos_token_id": [0, 5]}),
    ],
)
def test_end_of_text_is_found_wherever_it_is_named(
    saved: Path, tmp_path: Path, name: str, content: dict[str, Any]
) -> None:
    without_end_of_text(saved, tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    ours = load_tokenizer(str(tmp_path))
    assert (ours.end_of_text, ours.end_of_text_id) == ("<|other|>", 0)


def test_a_pad_token_of_its_own_is_kept(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((saved / "tokenizer.json").read_text())
    config = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(str(tmp_path)), reference(tmp_path)
    assert (ours.pad_id, ours.size) == (theirs.pad_token_id, len(theirs))
    assert ours.pad_id != ours.end_of_text_id


def test_ids_with_gaps_are_all_counted(tmp_path: Path) -> None:
    words = {"<unk>": 0, "tea": 1, "mill": 70_000}
    Reference(models.WordLevel(words, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    assert (ours.encode_batch(["mill"])[0].tolist(), ours.size) == ([70_000], 70_001)


def test_padding_and_truncation_in_the_file_do_not_touch_the_ids(saved: Path, tmp_path: Path) -> None:
    content = json.loads((saved / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (ids,) = load_tokenizer(str(tmp_path)).encode_batch([PROBES[0]])
    assert ids.tolist() == load_tokenizer(str(saved)).encode_batch([PROBES[0]])[0].tolist()


def test_training_gives_the_same_in_another_process(lines: list[str]) -> None:
    program = (
        "import json, sys; from launcher.data.tokenizers import train_tokenizer; "
        "print(train_tokenizer(json.load(sys.stdin), 600).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(lines), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == train_tokenizer(lines, 600).fingerprint


def test_a_vocabulary_that_text_cannot_fill(lines: list[str]) -> None:
    full, short = train_tokenizer(lines, 300), train_tokenizer(["tea"], 300)
    assert (full.size, unfilled(full, 300)) == (300, None)
    assert short.size < 300
    assert f"{short.size} entries" in str(unfilled(short, 300))


def test_training_reads_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINING_BYTES", 1000)
    read = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield "some tea " * 10

    train_tokenizer(endless(), 300)
    assert len(read) == 12


@given(texts=st.lists(st.text(max_size=20)), limit=st.integers(0, 60))
def test_text_within_a_limit(texts: list[str], limit: int) -> None:
    whole, kept = "".join(texts), "".join(within(texts, limit))
    assert whole.startswith(kept)
    assert limit - 4 < len(kept.encode()) <= limit or kept == whole


@pytest.mark.parametrize(
    ("content", "reason"), [({}, "no tokenizer.json"), ({"tokenizer.json": "{"}, "cannot be read")]
)
def test_a_folder_without_a_tokenizer(tmp_path: Path, content: dict[str, str], reason: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=reason):
        load_tokenizer(str(tmp_path))


def test_a_name_that_is_neither_a_folder_nor_an_id(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="neither a folder nor a Hub id"):
        load_tokenizer(str(tmp_path / "none" / "here"))


def test_a_hub_id_with_no_network(tmp_path: Path) -> None:
    program = "from launcher.data.tokenizers import load_tokenizer; load_tokenizer('nobody/nothing')"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=False
    )
    assert "RequestError: tokenizer nobody/nothing: not in the Hub's cache here" in done.stderr
