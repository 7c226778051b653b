"""A run's text made ready: a token store, made where it is not there yet, and counted; or files to stream."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from launcher.config.addresses import is_url
from launcher.config.schema import RunConfig, TokenizerFromCorpus
from launcher.data.making import UNITS
from launcher.data.prepare import Progress, check_blocks, prepare, store_of
from launcher.data.store import Store, is_store, open_store
from launcher.data.stream import list_stream, read_stream_text
from launcher.data.tokenizers import Tokenizer, unfilled
from launcher.data.units import SMALLEST, WHOLE, Slice
from launcher.data.vocabulary import TOKENIZERS, find_tokenizer, resolve_tokenizer
from launcher.errors import DataError, LauncherError, RunDirectoryError, placed
from launcher.plan.choose import Blocks
from launcher.run.assemble import Assembly, Prepared, Streamed, Text, assemble
from launcher.run.directory import has_begun, run_directory
from launcher.run.preflight import paths_of
from launcher.run.saying import Say


def ready_text(draft: Assembly, workers: int, progress: Progress, say: Say) -> Text:
    """The text of the draft's run, ready to be trained on. Raises what the two ways to it raise."""
    if draft.run.config.data.mode == "stream":
        return list_text(draft, say)
    prepared = prepare_text(draft, workers, progress, say)
    assert prepared is not None, "no part of it was left to others"
    return prepared


def list_text(draft: Assembly, say: Say) -> Streamed:
    """The files that the draft's run streams, as they were when it began, and the tokenizer.

    Raises DataError or RequestError for text or a tokenizer that cannot be used, and RunDirectoryError for
    text that has changed since the run began.
    """
    run, directory = draft.run.config, run_directory(draft.run.config)
    with placed(draft.run.origins), _nothing_left_on_failure(store_cache(run)) as cache:
        tokenizer = _tokenizer(draft, cache, say)
        text = list_stream(run.data, run.train.batch_size, tokenizer, run.seed, say)
    if not has_begun(directory):
        return Streamed(text, tokenizer)
    begun = read_stream_text(directory.stream)
    if change := begun.change(text):
        raise RunDirectoryError(
            f"the text of run {run.name!r} has changed since it began: {change}",
            hint="put the files back as they were, times of change too, or name the new run otherwise",
        )
    return Streamed(begun.model_copy(update={"backend": text.backend}), tokenizer)


def _tokenizer(draft: Assembly, cache: Path, say: Say, *, skip_bad: bool = False) -> Tokenizer:
    asked = draft.model.tokenizer
    tokenizer = resolve_tokenizer(asked, draft.run.config.data, cache, skip_bad=skip_bad)
    if isinstance(asked, TokenizerFromCorpus) and (sentence := unfilled(tokenizer, asked.train.vocab_size)):
        say(f"note: {sentence}")
    return tokenizer


def prepare_text(
    draft: Assembly,
    workers: int,
    progress: Progress,
    say: Say,
    *,
    part: Slice = WHOLE,
    skip_bad: bool = False,
) -> Prepared | None:
    """The store of the draft's run, and what it holds; None while other parts of it are to be made.

    Raises DataError or RequestError for text or a tokenizer that cannot be used. Unless a unit of the store
    was finished, a folder that this call made is then gone again.
    """
    run = draft.run.config
    with placed(draft.run.origins), _nothing_left_on_failure(store_cache(run)) as cache:
        tokenizer = _tokenizer(draft, cache, say, skip_bad=skip_bad)
        folder = prepare(run.data, tokenizer, cache, workers, progress, part=part, skip_bad=skip_bad, say=say)
        return _opened(folder, run, say) if is_store(folder) else None


def _opened(folder: Path, run: RunConfig, say: Say) -> Prepared:
    store = open_store(folder)
    try:
        check_blocks(store, run.data.block_size, run.data.packing)
    except DataError:
        # It serves other block sizes: only what is made again in a moment is not worth its room.
        if _size(store) <= SMALLEST:
            shutil.rmtree(folder)
        raise
    if skipped := len(store.manifest.bad):
        shown_by = f"`launcher data show {quote(str(folder))}`"
        say(f"note: {skipped:,} bad records of the text were skipped: {shown_by}")
    blocks = _count(store, run)
    if run.data.validation not in (0, []) and not blocks.validation:
        say("note: data.validation holds out no block of this text: nothing will be evaluated")
    return Prepared(folder, store.vocabulary, blocks)


def _size(store: Store) -> int:
    """Bytes of the files it was made from."""
    return sum(file.size for listing in store.manifest.content.listing for file in listing.files)


def find_text(draft: Assembly) -> Prepared | None:
    """The store of the draft's run where it is prepared already, and what it holds. Writes nothing.

    Raises DataError or RequestError for text or a tokenizer that cannot be used.
    """
    run = draft.run.config
    cache = store_cache(run)
    with placed(draft.run.origins):
        tokenizer = find_tokenizer(draft.model.tokenizer, run.data, cache)
        folder = None if tokenizer is None else store_of(run.data, tokenizer, cache)
    if folder is None or not is_store(folder):
        return None
    store = open_store(folder)
    return Prepared(folder, store.vocabulary, _count(store, run))


def planned_with_text(draft: Assembly) -> Assembly:
    """The draft, planned with its text where that is prepared already. No network is asked: a plan is not to
    wait for one."""
    if any(is_url(path) for _, path in paths_of(draft.run.config.data)):
        return draft
    try:
        found = find_text(draft)
    except LauncherError:  # of text that is not there, say: who prepares it is told
        return draft
    return draft if found is None else assemble(draft.run, draft.cluster, draft.machine, found)


def text_at_hand(draft: Assembly, say: Say) -> Text | None:
    """The text of the draft's run where it is prepared already, or can be streamed. Where it is not, says
    what is to be done before files that are written without it can be run."""
    data = draft.run.config.data
    try:
        found = list_text(draft, say) if data.mode == "stream" else find_text(draft)
        if found is not None and found.store is not None:
            check_blocks(open_store(found.store), data.block_size, data.packing)
        why = "its text is not prepared: run `launcher data prepare` with the same arguments"
    except LauncherError as error:
        found, why = None, error.message
    if found is None:
        say(f"note: {why}; the files run by hand once that is done and they are written again")
    return found


def store_cache(run: RunConfig) -> Path:
    """The folder of all token stores: `data.cache_dir`, or `.stores` in `output_dir`."""
    if run.data.cache_dir is not None:
        return Path(run.data.cache_dir).expanduser().absolute()
    return Path(run.output_dir).expanduser().absolute() / ".stores"


def count_finished(run: RunConfig) -> int:
    """How many pieces of text and tokenizers are finished where the run's are: those are not made again."""
    cache = store_cache(run)
    patterns = ("*", f"{TOKENIZERS}/*", f"*/{UNITS}/*.json")
    return sum(1 for pattern in patterns for _ in cache.glob(pattern))


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
    """Yield `cache`; if what follows fails and leaves no store or part of one there, take back the folders
    and the trained tokenizer that it made."""
    before = set(cache.glob("*/*"))
    new_folders = [folder for folder in (cache, *cache.parents) if not folder.exists()]
    try:
        yield cache
    except BaseException:
        made = set(cache.glob("*/*")) - before
        trained = [path for path in made if path.parent.name == TOKENIZERS]
        if len(trained) == len(made):
            for folder in trained:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in (cache / TOKENIZERS, *new_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
