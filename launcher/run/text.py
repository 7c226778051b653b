"""A run's text as a token store: made where it is not there yet, and counted."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.config.schema import RunConfig, TokenizerFromCorpus
from launcher.data.prepare import Progress, check_blocks, prepare, resolve_tokenizer
from launcher.data.store import MANIFEST, Store, check_files, open_store
from launcher.data.tokenizers import unfilled
from launcher.errors import DataError, LauncherError
from launcher.plan.choose import Blocks
from launcher.run.assemble import Assembly, Prepared


def prepare_text(draft: Assembly, workers: int, progress: Progress, say: Callable[[str], None]) -> Prepared:
    """The store of the draft's run, and what it holds.

    Raises DataError or RequestError for text or a tokenizer that cannot be used; a folder that this
    call made is then gone again.
    """
    run = draft.run.config
    try:
        return _prepare(draft, run, workers, progress, say)
    except LauncherError as error:
        error.place(draft.run.origins)
        raise


def _prepare(
    draft: Assembly, run: RunConfig, workers: int, progress: Progress, say: Callable[[str], None]
) -> Prepared:
    with _nothing_left_on_failure(store_cache(run)) as cache:
        tokenizer = resolve_tokenizer(draft.model.tokenizer, run.data, cache)
        asked = draft.model.tokenizer
        if isinstance(asked, TokenizerFromCorpus) and (
            sentence := unfilled(tokenizer, asked.train.vocab_size)
        ):
            say(f"note: {sentence}")
        finished = set(cache.glob(f"*/{MANIFEST}"))
        folder = prepare(run.data, tokenizer, cache, workers, progress)
        store = open_store(folder)
        check_files(store)
        try:
            check_blocks(store, run.data.block_size, run.data.packing)
        except DataError:
            if folder / MANIFEST not in finished:
                shutil.rmtree(folder)
            raise
    blocks = _count(store, run)
    if run.data.validation not in (0, []) and not blocks.validation:
        say("note: data.validation holds out no block of this text: nothing will be evaluated")
    return Prepared(folder, store.vocabulary, blocks)


def store_cache(run: RunConfig) -> Path:
    """The folder of all token stores: `data.cache_dir`, or `.stores` in `output_dir`."""
    if run.data.cache_dir is not None:
        return Path(run.data.cache_dir).expanduser().absolute()
    return Path(run.output_dir).expanduser().absolute() / ".stores"


def _count(store: Store, run: RunConfig) -> Blocks:
    summary = store.summary(run.data.block_size, run.data.packing)
    training = [each for each in summary if each.split == "train"]
    return Blocks(
        train=sum(each.blocks for each in training),
        train_tokens=sum(each.tokens - each.dropped for each in training),
        validation=sum(each.blocks for each in summary if each.split == "validation"),
    )


@contextmanager
def _nothing_left_on_failure(cache: Path) -> Iterator[Path]:
    """Yield `cache`; if what follows fails, take back what it put there, and no one else's files."""
    before = _entries(cache)
    new_folders = [folder for folder in (cache, *cache.parents) if not folder.exists()]
    try:
        yield cache
    except BaseException:
        for lock in _entries(cache) - before:
            _take_back(lock)
        for folder in (cache / "tokenizers", *new_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _entries(cache: Path) -> set[Path]:
    """The lock of each store and each trained tokenizer in `cache`."""
    return {*cache.glob("*.lock"), *cache.glob("tokenizers/*.lock")}


def _take_back(lock: Path) -> None:
    """Remove a trained tokenizer and its lock, or a store's lock, unless someone holds or has used it."""
    folder = lock.with_suffix("")
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink()
