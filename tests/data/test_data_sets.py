"""Data sets of `datasets`: what it saved, what it cached, and the Hub as a local server plays it.

The server speaks the part of the Hub's API that the two libraries use here, as they were seen to ask for
it; the Hub itself was not at hand.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.sources import Reading, list_files
from launcher.errors import DataError
from tests.data.conftest import documents
from tests.loopback import ANY_PORT, Quiet, answering

TEXTS = [f"text {i}" for i in range(2500)]


def texts(*patterns: str) -> list[str]:
    files = list_files(patterns)
    return [document.text for file in files for document in documents(file, Reading())]


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"not its own")
    assert texts(str(tmp_path / "saved")) == TEXTS


def test_what_was_selected_before_it_was_saved(tmp_path: Path) -> None:
    chosen = datasets.Dataset.from_dict({"text": TEXTS}).select([7, 3, 5])
    chosen.save_to_disk(tmp_path / "saved")
    assert texts(str(tmp_path / "saved")) == ["text 7", "text 3", "text 5"]


def test_the_train_split_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    halves = {
        name: datasets.Dataset.from_dict({"text": [f"{name} text"]}) for name in ("train", "test", "extra")
    }
    datasets.DatasetDict(halves).save_to_disk(tmp_path / "saved")
    assert texts(str(tmp_path / "saved")) == ["train text"]
    assert texts(str(tmp_path / "saved" / "test")) == ["test text"]
    datasets.DatasetDict({"test": halves["test"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="no split 'train', but test") as refused:
        texts(str(tmp_path / "other"))
    assert str(tmp_path / "other") in str(refused.value.hint)


def test_a_saved_file_that_is_gone(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow is not there"):
        texts(str(tmp_path / "saved"))


def test_what_a_script_left_in_the_cache(tmp_path: Path) -> None:
    def generate() -> Iterator[dict[str, str]]:
        yield from ({"text": text} for text in TEXTS)

    datasets.Dataset.from_generator(generate, cache_dir=str(tmp_path))
    assert texts(f"{tmp_path}/**/*.arrow") == TEXTS


# The Hub


def parquet(*rows: str) -> bytes:
    whole = io.BytesIO()
    pq.write_table(pa.table({"text": list(rows)}), whole)
    return whole.getvalue()


FILES = {
    "owner/name": {
        "README.md": b"---\nlicense: mit\n---\n",
        "data/train-00000-of-00002.parquet": parquet("a", "b"),
        "data/train-00001-of-00002.parquet": parquet("c"),
        "data/test-00000-of-00001.parquet": parquet("t"),
        "notes/b.txt": b"one\ntwo\n",
    },
    "owner/several": {
        "README.md": b"---\nconfigs:\n- config_name: x\n  data_files: x.txt\n- config_name: y\n"
        b"  data_files: y.txt\n---\n",
        "x.txt": b"x\n",
        "y.txt": b"y\n",
    },
    "owner/sheets": {"train.csv": b"text\na\n"},
}
COMMIT = "a" * 40


class Hub(Quiet, BaseHTTPRequestHandler):
    """The files of three data sets, at one commit each."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        found = re.match(r"/(api/)?datasets/(owner/\w+)(/(revision|tree|resolve)/([^/]+))?/?(.*)", path)
        if found is None or found[2] not in FILES:
            self._none("RepoNotFound")
            return
        files, rest = FILES[found[2]], found[6]
        if found[4] == "resolve":
            self._file(files[rest]) if rest in files else self._none("EntryNotFound")
        elif found[4] == "tree":
            self._tree(files, rest, "recursive=true" in self.path)
        else:
            names = [{"rfilename": name} for name in files]
            self._json({"_id": "1", "id": found[2], "sha": COMMIT, "tags": [], "siblings": names})

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def _tree(self, files: dict[str, bytes], folder: str, deep: bool) -> None:
        under = f"{folder}/" if folder else ""
        inside = {name.removeprefix(under): body for name, body in files.items() if name.startswith(under)}
        entries: list[dict[str, Any]] = [
            {
                "type": "file",
                "path": under + name,
                "size": len(body),
                "oid": hashlib.sha1(body).hexdigest(),
            }
            for name, body in inside.items()
            if deep or "/" not in name
        ]
        folders = {name.partition("/")[0] for name in inside if "/" in name}
        entries += [{"type": "directory", "path": under + name, "size": 0, "oid": "d"} for name in folders]
        self._json(entries) if entries else self._none("EntryNotFound")

    def _file(self, body: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = body[int(asked[1]) : int(asked[2]) + 1] if asked else body
        self._answer(206 if asked else 200, part, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _none(self, code: str) -> None:
        self._answer(404, b"", **{"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with answering(ThreadingHTTPServer(ANY_PORT, Hub)) as url:
        yield url


ASK = """
import json, sys
from launcher.data import remote
from launcher.data.sources import Reading, batches, list_files
from launcher.errors import LauncherError
remote.LISTING_SECONDS = 1.0
answers = []
for url in sys.argv[1:]:
    try:
        files = list_files([url])
        texts = [text for file in files for batch in batches(file, Reading()) for text in batch.texts]
        answers.append([[file.path for file in files], texts])
    except LauncherError as error:
        answers.append([type(error).__name__, str(error), error.hint])
print(json.dumps(answers))
"""


def ask(endpoint: str, home: Path, *urls: str) -> list[list[Any]]:
    """What a process of its own reads there: both libraries keep the address from when they are loaded."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *urls],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_files_on_the_hub(hub: str, tmp_path: Path) -> None:
    train = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    root = "hf://datasets/owner/name"
    whole, pinned, named, wild = ask(
        hub, tmp_path, root, f"{root}@main", f"{root}/notes/b.txt", f"{root}/data/t*.parquet"
    )
    assert whole == [[f"{root}/{name}" for name in train], ["a", "b", "c"]]
    assert pinned == [[f"{root}@main/{name}" for name in train], ["a", "b", "c"]]
    assert named == [[f"{root}/notes/b.txt"], ["one", "two"]]
    assert wild[1] == ["t", "a", "b", "c"]


def test_what_the_hub_does_not_give(hub: str, tmp_path: Path) -> None:
    nobody, several, sheets, folder = ask(
        hub,
        tmp_path,
        "hf://datasets/owner/nobody",
        "hf://datasets/owner/several",
        "hf://datasets/owner/sheets",
        "hf://datasets/owner/name/data",
    )
    assert nobody[0] == "DataError"
    assert "no such file" in nobody[1]
    assert several[0] == "DataError"
    assert "Config name is missing" in several[1]
    assert "hf://datasets/owner/several/..." in several[2]
    assert "train.csv is neither text, jsonl, parquet nor Arrow" in sheets[1]
    assert "is a folder" in folder[1]


def test_a_hub_that_is_not_reached(tmp_path: Path) -> None:
    ((kind, message, hint),) = ask("http://127.0.0.1:9", tmp_path, "hf://datasets/owner/name")
    assert kind == "MachineError"
    assert message.startswith("hf://datasets/owner/name: 127.0.0.1 cannot be read from")
    assert "network" in hint
