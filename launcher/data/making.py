"""A store in the making: the records of its finished units, and a folder for what is in hand.

    NAME/units/00012.json        a finished unit, written once its shards have their names: the journal
    NAME/units/2-of-8.x7f2/      what the holder of that slice's lock has in hand; unfinished files lie
                                 nowhere else

A unit's record has all that the manifest says of it, so whoever finds every record there can write the
manifest, which ends the making: `units` is then removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from launcher.data.store import TOKENIZER_FOLDER, BadRecord, Record, Shard, size_problem
from launcher.data.tokenizers import Tokenizer
from launcher.data.units import Slice, Unit
from launcher.durable import Mark, sync, write_whole
from launcher.errors import MachineError, StoreError

UNITS = "units"


class UnitRecord(Record):
    """What a unit became."""

    number: int
    source: str
    shards: list[Shard]
    skipped_empty: int
    bad: list[BadRecord]

    @property
    def tokens(self) -> int:
        """Tokens in all its shards, end-of-text included."""
        return sum(shard.tokens for shard in self.shards)


def set_up(folder: Path, part: Slice) -> Path:
    """A new folder to work on `part` in; what whoever held its lock before had in hand is removed."""
    units = folder / UNITS
    units.mkdir(parents=True, exist_ok=True)
    put_down(folder, part)
    return Path(tempfile.mkdtemp(prefix=f"{part}.", dir=units))


def put_down(folder: Path, part: Slice) -> None:
    """Remove what is in hand of a part."""
    for work in (folder / UNITS).glob(f"{part}.*"):
        shutil.rmtree(work)


def publish(work: Path, record: UnitRecord) -> None:
    """Give a unit's shards, which lie whole in `work`, their names in the store; then its record."""
    name = _record_name(record.number)
    write_whole(work / name, (record.model_dump_json().encode(),))
    for shard in record.shards:
        for file in shard.marks:
            (work / file).replace(work.parent.parent / file)
    (work / name).replace(work.parent / name)


def restore(made: Path, kept: Path, promised: Mapping[str, Mark]) -> None:
    """Of the `promised` files, which were `made` again, move those to where they are `kept` that lack there.
    What is sound is left as it is: nobody need copy or read it anew."""
    for name, mark in promised.items():
        if size_problem(kept / name, mark.size):
            (made / name).replace(kept / name)
        else:
            (made / name).unlink()


def finished(folder: Path, units: Sequence[Unit]) -> list[UnitRecord]:
    """The records, in order, of those units whose shards are there in their full size."""
    records = [_read(folder / UNITS / _record_name(unit.number)) for unit in units]
    return [
        record
        for record in records
        if record is not None and all(_is_there(folder, shard) for shard in record.shards)
    ]


def unit_of(shard: str) -> int:
    """The number of the unit that a shard of this name came from."""
    return int(shard.rpartition("-")[2])


def keep_tokenizer(
    tokenizer: Tokenizer, folder: Path, work: Path, promised: Mapping[str, Mark] | None = None
) -> None:
    """Have the tokenizer's files in the store, as the manifest `promised` them where there is one.

    Raises OSError, and StoreError where they would differ.
    """
    kept, made = folder / TOKENIZER_FOLDER, work / TOKENIZER_FOLDER
    if promised is None and kept.exists():
        return
    tokenizer.save(made)
    marks = {path.name: write_whole(path, (path.read_bytes(),)) for path in sorted(made.iterdir())}
    sync(made)
    if promised is None:
        made.replace(kept)
        return
    if marks != promised:
        raise StoreError(
            f"{kept}: this version writes other files for the same tokenizer",
            hint=f"delete {folder} and run `launcher data prepare RUN`",
        )
    kept.mkdir(exist_ok=True)
    restore(made, kept, promised)


def _record_name(number: int) -> str:
    return f"{number:05d}.json"


def _read(path: Path) -> UnitRecord | None:
    try:
        return UnitRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        # A record that cannot be read costs its unit once more, and nothing else.
        return None


def _is_there(folder: Path, shard: Shard) -> bool:
    return not any(size_problem(folder / file, mark.size) for file, mark in shard.marks.items())


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Say which folder it was that the system would not let be written."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{folder} cannot be written: {error.strerror}",
            hint="make room there, or set data.cache_dir; the same command goes on where it stopped",
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file lock, waiting for it. The system lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                raise MachineError(
                    f"{path} cannot be locked: {error.strerror}",
                    hint="set data.cache_dir to a folder on a file system that has file locks",
                ) from error
            # Who held it before has removed the file: a lock on that one would keep nobody out.
            if not _is_at(path, stream.fileno()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False
