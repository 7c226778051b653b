"""Text to token store: cut the listing into units, convert each into shards, seal them with the manifest.

A unit's shards depend on nothing but the unit, so the store has the same bytes for any number of workers,
machines and kills. Whatever ends the making, a finished unit is kept (`data.making`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from launcher.config.schema import DataSection
from launcher.data.conversion import Conversion, InHand, Rules, Task, Tools
from launcher.data.corpus import list_corpora, reading_of
from launcher.data.damage import DAMAGED, Damage, find_missing, set_aside
from launcher.data.making import (
    UNITS,
    UnitRecord,
    finished,
    keep_tokenizer,
    locked,
    put_down,
    set_up,
    unit_of,
    writing_to,
)
from launcher.data.manifest import content_of, seal
from launcher.data.packing import Packing
from launcher.data.pool import spread
from launcher.data.proof import SAMPLE_BYTES, choose_backend
from launcher.data.store import (
    MANIFEST,
    Content,
    Manifest,
    Shard,
    Split,
    Store,
    is_store,
    read_manifest,
)
from launcher.data.tokenizers import Tokenizer
from launcher.data.units import WHOLE, Slice, Unit, cut
from launcher.data.vocabulary import spread_texts
from launcher.errors import DataError, MachineError, StoreError

PLACES = 32  # in the corpus that text to prove tools on is taken from, at most

Progress = Callable[[int, int, int], None]
"""Called with bytes done, bytes in all (of files as stored) and tokens so far; first with what was there."""


def prepare(
    data: DataSection,
    tokenizer: Tokenizer,
    cache_dir: Path,
    workers: int,
    progress: Progress | None = None,
    *,
    part: Slice = WHOLE,
    skip_bad: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """The folder of the token store of this text under this tokenizer: made if it is not there, mended
    where a file of it is missing or short.

    With a `part` of the units only those are done, and the store is there (`is_store`) once all parts are:
    whoever finishes the last one writes the manifest. A second process that asks for the same part waits
    for the first. Whatever ends it early, finished units are kept; where there are none, nothing is left.
    Raises DataError for bad or missing text, MachineError where the store cannot be written.
    """
    corpora, reading = list_corpora(data), reading_of(data)
    content = content_of(data, corpora, tokenizer)
    making = _Making(
        folder=cache_dir / content.name,
        content=content,
        tokenizer=tokenizer,
        rules=Rules(reading, content.validation_fraction, skip_bad),
        units=cut(corpora, reading, content.unit_bytes),
        part=part,
        workers=workers,
        progress=progress or _silent,
        say=say or _silent,
    )
    if not making.is_whole():
        with locked(making.lock):
            making.mend()
            making.make()
    return making.folder


def store_of(data: DataSection, tokenizer: Tokenizer, cache_dir: Path) -> Path:
    """Where the token store of this text under this tokenizer is, or would be."""
    return cache_dir / content_of(data, list_corpora(data), tokenizer).name


def check_blocks(store: Store, block_size: int, packing: Packing) -> None:
    """Raise DataError where a source, or validation text that was asked for, makes no block."""
    made = {(each.split, each.source): each for each in store.summary(block_size, packing)}
    for listing in store.manifest.content.listing:
        split: Split = "validation" if listing.held_out else "train"
        found = made.get((split, listing.source))
        if found is None or not found.blocks:
            tokens = found.tokens if found else 0
            raise DataError(
                f"the {split} text of source {listing.source!r} has {tokens:,} tokens: "
                f"not one block of {block_size:,}",
                hint="give it more text, or a smaller data.block_size",
            )


@dataclass(frozen=True, slots=True)
class _Making:
    """One process's share in making a store, or in mending one."""

    folder: Path
    content: Content
    tokenizer: Tokenizer
    rules: Rules
    units: Sequence[Unit]
    part: Slice
    workers: int
    progress: Progress
    say: Callable[[str], None]

    @property
    def lock(self) -> Path:
        """Held by whoever does this part."""
        return self.folder.with_name(f"{self.folder.name}.{self.part}.lock")

    @property
    def _store_lock(self) -> Path:
        """Held, for a moment, by whoever begins, seals or takes back the store."""
        return self.folder.with_name(f"{self.folder.name}.lock")

    def is_whole(self) -> bool:
        """Whether the store is there, with every file in its full size and nothing left of its making."""
        manifest = self._manifest()
        missing = manifest is None or any(find_missing(self.folder, manifest))
        return not missing and not (self.folder / UNITS).exists()

    def make(self) -> None:
        """Unless the store is there: do what is missing of this part, and seal it if that was all."""
        try:
            with locked(self._store_lock), writing_to(self.folder):
                if is_store(self.folder):
                    return
                work = set_up(self.folder, self.part)
                keep_tokenizer(self.tokenizer, self.folder, work)
            own = self.part.of(self.units)
            kept = [each for each in finished(self.folder, own) if self.rules.skip_bad or not each.bad]
            self._convert(own, kept, work)
            with locked(self._store_lock), writing_to(self.folder):
                put_down(self.folder, self.part)
                self._seal()
        except BaseException as error:
            # Another process that did this part too may have sealed the store, which removes `work`.
            if isinstance(error, MachineError) and is_store(self.folder):
                return
            self._leave(error)
            raise

    def mend(self) -> None:
        """Make again what a finished store lacks of this part. Without its manifest it is not finished."""
        with locked(self._store_lock), writing_to(self.folder):
            if not is_store(self.folder):
                return
            manifest = self._manifest()
            if manifest is None:
                self.say(f"note: {self.folder / MANIFEST} is damaged: the store is made again")
                set_aside([Damage(None, self.folder / MANIFEST, "damaged")])
                return
            damage = list(find_missing(self.folder, manifest))
            if self._alone():
                shutil.rmtree(self.folder / UNITS, ignore_errors=True)
            if not damage:
                return
            work = set_up(self.folder, self.part)
            if any(each.shard is None for each in damage):
                keep_tokenizer(self.tokenizer, self.folder, work, manifest.tokenizer_files)
        numbers = {unit_of(each.shard) for each in damage if each.shard is not None}
        units = [unit for unit in self.part.of(self.units) if unit.number in numbers]
        self.say(f"note: {len(units)} damaged of {len(self.units)} units are made again")
        promised: dict[int, list[Shard]] = {unit.number: [] for unit in units}
        for shard in manifest.shards:
            if unit_of(shard.name) in promised:
                promised[unit_of(shard.name)].append(shard)
        try:
            self._convert(units, [], work, promised)
        finally:
            put_down(self.folder, self.part)
            with contextlib.suppress(OSError):
                (self.folder / UNITS).rmdir()
        for each in damage:
            each.file.with_name(each.file.name + DAMAGED).unlink(missing_ok=True)

    def _manifest(self) -> Manifest | None:
        """The store's manifest, unless it is missing or damaged."""
        try:
            return read_manifest(self.folder)
        except StoreError:
            return None

    def _convert(
        self,
        units: Sequence[Unit],
        kept: Sequence[UnitRecord],
        work: Path,
        promised: dict[int, list[Shard]] | None = None,
    ) -> None:
        account = _Account(units, kept, self.progress)
        done = {record.number for record in kept}
        # A file that cannot be split may be a large unit: begun last, it would be waited for alone.
        missing = sorted((u for u in units if u.number not in done), key=lambda unit: -unit.size)
        if not missing:
            return
        # What the store skipped when it was made is skipped again; its promise tells if anything else is.
        rules = replace(self.rules, skip_bad=self.rules.skip_bad or promised is not None)
        make = partial(Conversion, self.folder, work, rules, promised)
        workers = min(self.workers, len(missing))
        with closing(spread(make, self._tasks(missing), workers, account.hear)) as converting:
            for record in converting:
                account.finish(record)

    def _tasks(self, units: Sequence[Unit]) -> Iterator[Task]:
        tools = self._tools()
        for unit in units:
            yield Task(unit, tools)

    def _tools(self) -> Tools:
        """The backend is proven here, once, on text from all over the corpus. The conversion says what is bad
        in it."""
        sample = tuple(spread_texts(self.units, self.rules.reading, SAMPLE_BYTES, PLACES, skip_bad=True))
        choice = choose_backend(self.tokenizer, sample)
        for note in choice.notes:
            self.say(f"note: {note}")
        return Tools(choice.name, sample)

    def _seal(self) -> None:
        records = finished(self.folder, self.units)
        if len(records) < len(self.units):
            missing = len(self.units) - len(records)
            self.say(f"note: units {self.part} are finished; {missing} units of other parts are not yet")
            return
        try:
            seal(self.folder, self.content, records)
        except DataError:
            shutil.rmtree(self.folder)
            raise
        (self.folder / (MANIFEST + DAMAGED)).unlink(missing_ok=True)
        shutil.rmtree(self.folder / UNITS, ignore_errors=True)

    def _leave(self, error: BaseException) -> None:
        """Keep finished units, and say so; with none, and nobody else at work, leave nothing."""
        with locked(self._store_lock):
            put_down(self.folder, self.part)
            done = len(finished(self.folder, self.units))
            if done:
                past = ", or with --skip-bad past bad records" if isinstance(error, DataError) else ""
                self.say(
                    f"note: {done} of {len(self.units)} units are finished and kept: "
                    f"`launcher data prepare` goes on from there{past}"
                )
            elif self._alone():
                shutil.rmtree(self.folder, ignore_errors=True)

    def _alone(self) -> bool:
        """Whether nobody works on another part of this store."""
        locks = self.folder.parent.glob(f"{self.folder.name}.*.lock")
        return all(lock == self.lock for lock in locks)


class _Account:
    """How far a conversion is: what was there, what has been finished, what is in hand."""

    def __init__(self, units: Sequence[Unit], kept: Sequence[UnitRecord], progress: Progress) -> None:
        self._sizes: Mapping[int, int] = {unit.number: unit.size for unit in units}
        self._total = sum(self._sizes.values())
        self._size = sum(self._sizes[record.number] for record in kept)
        self._tokens = sum(record.tokens for record in kept)
        self._in_hand: dict[int, InHand] = {}
        self._progress = progress
        self._show()

    def hear(self, report: InHand) -> None:
        """Take in how far a unit has come."""
        self._in_hand[report.unit] = report
        self._show()

    def finish(self, record: UnitRecord) -> None:
        """Take in a finished unit."""
        self._in_hand.pop(record.number, None)
        self._size += self._sizes[record.number]
        self._tokens += record.tokens
        self._show()

    def _show(self) -> None:
        self._progress(
            self._size + sum(each.size for each in self._in_hand.values()),
            self._total,
            self._tokens + sum(each.tokens for each in self._in_hand.values()),
        )


def _silent(*_: object) -> None:
    """For what nobody listens to."""
