"""A store is whole or is refused, and any flipped byte is found."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.data.damage import verify_store
from launcher.data.store import FORMAT_VERSION, MANIFEST, Manifest, Store, open_store, write_manifest
from launcher.errors import StoreError


@pytest.mark.parametrize("key", ["tokens", "documents"])
def test_a_manifest_that_was_changed(store: Store, key: str) -> None:
    manifest = json.loads((store.path / MANIFEST).read_text())
    manifest["shards"][0][key] += 1
    (store.path / MANIFEST).write_text(json.dumps(manifest))
    for read in (open_store, verify_store):
        with pytest.raises(StoreError, match="checksum"):
            read(store.path)


def test_a_flipped_byte_of_the_manifest_is_found_wherever_it_is(store: Store) -> None:
    path = store.path / MANIFEST
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(StoreError):
            open_store(store.path)
    path.write_bytes(content)
    assert open_store(store.path).manifest == store.manifest


@pytest.mark.parametrize("content", ["{", "{}", "[]", "3", '{"content": 3}'])
def test_a_manifest_that_makes_no_sense(store: Store, content: str) -> None:
    (store.path / MANIFEST).write_text(content)
    with pytest.raises(StoreError, match="damaged") as refused:
        open_store(store.path)
    assert refused.value.hint


class Strange(Manifest):
    """A manifest as another launcher might write it."""

    strange: int = 3


def test_a_manifest_of_another_form_is_refused(store: Store) -> None:
    write_manifest(store.path, Strange(**store.manifest.model_dump()))
    with pytest.raises(StoreError, match=r"damaged: strange: Extra inputs") as refused:
        verify_store(store.path)
    assert refused.value.hint


def test_a_folder_without_a_manifest_is_no_store(store: Store) -> None:
    (store.path / MANIFEST).unlink()
    for read in (open_store, verify_store):
        with pytest.raises(StoreError, match="not a token store"):
            read(store.path)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_another_format_version_is_refused(store: Store, version: int) -> None:
    content = store.manifest.content.model_copy(update={"format_version": version})
    write_manifest(store.path, store.manifest.model_copy(update={"content": content}))
    with pytest.raises(StoreError, match=f"format version {version}, not {FORMAT_VERSION}"):
        open_store(store.path)


def test_the_manifest_says_what_the_store_is(store: Store) -> None:
    tokenizer = store.tokenizer()
    recorded = store.manifest.content.tokenizer
    assert recorded.fingerprint == tokenizer.fingerprint
    assert recorded.probe_ids == tokenizer.probe_ids()
    assert store.path.name == store.manifest.content.name
    assert store.vocabulary == tokenizer.size


@pytest.mark.parametrize("packing", ["concat", "pad", "best_fit"])
def test_a_summary_adds_up(store: Store, packing: Any) -> None:
    rows = store.summary(32, packing)
    assert [(row.split, row.source) for row in rows] == [("train", "text"), ("validation", "text")]
    for row in rows:
        assert row.tokens + row.padding == row.blocks * 32 + row.dropped
    assert sum(row.tokens for row in rows) == store.manifest.ledger[0].tokens_in
    assert sum(row.documents for row in rows) == 1100
