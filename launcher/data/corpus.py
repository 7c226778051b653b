"""Which files a run's text is: the listing of every source, and of validation files."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import realpath

from launcher.config.addresses import is_url
from launcher.config.schema import DataSection
from launcher.data.mixture import training_sources
from launcher.data.sources import Reading, SourceFile, list_files
from launcher.errors import DataError, LauncherError, RequestError

HELD_OUT = "validation"  # what the source of validation files is called


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of one source. `held_out`: given as validation text, so every document is for validation."""

    source: str
    files: tuple[SourceFile, ...]
    held_out: bool = False


def list_corpora(data: DataSection) -> list[Corpus]:
    """The files of every source, and of the validation split where it is given as files.

    A validation file that a training pattern matches too, by whatever name, is validation only. Raises
    DataError.
    """
    held_out = _listed("data.validation", data.validation) if isinstance(data.validation, list) else []
    kept_back = {_real(file.path) for file in held_out}
    corpora = []
    for name, patterns in training_sources(data):
        files = tuple(file for file in _listed("data.train", patterns) if _real(file.path) not in kept_back)
        if not files:
            raise DataError(
                f"source {name!r} has no file that is not validation text",
                hint="data.validation names every file of data.train: leave some to train on",
            )
        corpora.append(Corpus(name, files))
    if held_out:
        corpora.append(Corpus(HELD_OUT, tuple(held_out), held_out=True))
    names = [corpus.source for corpus in corpora]
    if len(set(names)) < len(names):
        raise RequestError(
            f"data.train: two sources have the same name (of {', '.join(names)})",
            hint=f"give each its own; {HELD_OUT!r} is taken where data.validation is a list of files",
        )
    return corpora


def _listed(key: str, patterns: list[str]) -> list[SourceFile]:
    """As `list_files`, whose errors name `key`."""
    try:
        return list_files(patterns)
    except LauncherError as error:
        error.key = key
        raise


def _real(path: str) -> str:
    """A name that a file, or a member of an archive, has only one of: links are followed."""
    member, chained, outside = path.rpartition("::")
    return member + chained + (outside if is_url(outside) else realpath(outside))


def reading_of(data: DataSection) -> Reading:
    """How `data` says files are read."""
    return Reading(data.format, data.sample_by, data.text_field)
