"""Which files a data set of the `datasets` library is: a folder that it saved, or a name on the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.data import remote
from launcher.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fsspec import AbstractFileSystem

SPLIT = "train"
READABLE = re.compile(
    r"\.(txt|text|jsonl|json|ndjson|parquet|arrow)(\.(gz|bz2|xz|zst|zstd))?$", re.IGNORECASE
)
_ON_THE_HUB = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/?")


def saved_files(folder: Path) -> list[Path] | None:
    """The files of a folder that `save_to_disk` wrote, or None; of its train split where it has splits.

    Raises DataError for a data set of other splits only, and for one whose files are not there.
    """
    if (splits := _names(folder / "dataset_dict.json", "splits")) is not None:
        if SPLIT not in splits:
            names = ", ".join(map(str, splits))
            raise DataError(f"{folder} has no split {SPLIT!r}, but {names}", hint=f"name one: {folder}/SPLIT")
        folder /= SPLIT
    if (files := _names(folder / "state.json", "_data_files")) is None:
        return None
    paths = [folder / Path(str(file["filename"])).name for file in files]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{folder}: its file {path.name} is not there", hint="save the data set again")
    return paths


def _names(path: Path, key: str) -> list[Any] | None:
    """The list under a key of a JSON file, where there is one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DataError(f"not JSON: {error}", file=str(path), hint="save the data set again") from None
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, list) else None


def is_on_the_hub(url: str) -> bool:
    """Whether this names a data set of the Hub, and no file in it."""
    return _ON_THE_HUB.fullmatch(url) is not None


def hub_files(system: AbstractFileSystem, url: str) -> list[Mapping[str, Any]]:
    """What the Hub says of each file of the train split, as `datasets` finds them.

    Raises DataError for a data set of several configurations, without a train split, or of files that are
    neither text, jsonl, parquet nor Arrow.
    """
    found = _ON_THE_HUB.fullmatch(url)
    assert found is not None
    name, revision = found["name"], found["revision"]
    by_name = f"name the files of one, with wildcards: {url.rstrip('/')}/..."
    splits = remote.persist(url, lambda: _splits(url, name, revision, by_name))
    if SPLIT not in splits:
        raise DataError(f"{url} has no split {SPLIT!r}, but {', '.join(splits) or 'none'}", hint=by_name)
    # By the revision that was asked for: a commit that leaves the files alone changes nothing.
    paths = {
        re.sub(r"@[^/]+", "", str(path), count=1).partition(f"datasets/{name}/")[2] for path in splits[SPLIT]
    }
    for path in sorted(paths):
        if READABLE.search(path) is None:
            raise DataError(
                f"{url}: {path} is neither text, jsonl, parquet nor Arrow",
                hint="convert it; or, where only the name is another, name the files and set data.format",
            )
    root = url.removeprefix("hf://").rstrip("/")
    every = remote.persist(url, lambda: system.find(root, detail=True))
    return [info for file, info in every.items() if file.removeprefix(f"{root}/") in paths]


def _splits(url: str, name: str, revision: str | None, hint: str) -> Mapping[str, list[str]]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, revision=revision)
    except ValueError as error:
        raise DataError(f"{url}: {str(error).strip().splitlines()[0]}", hint=hint) from None
    return builder.config.data_files or {}
