"""Uploading to the Hub: a server on this machine that speaks the part of its API that an upload needs.

hf_xet is turned off: its protocol has a storage server of its own. Without it huggingface_hub uploads
large files through git-lfs's batch API, over plain HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Workplace
from tests.loopback import ANY_PORT, Quiet, answering

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123"
REPOSITORY = "someone/small"

PUSH = """
import sys
from pathlib import Path
from launcher.errors import TrainingError
from launcher.worker.saving import push_model
try:
    print(push_model(Path(sys.argv[1]), "someone/small"))
except TrainingError as error:
    print("refused", error.message, "hint:", error.hint)
"""


class Hub(ThreadingHTTPServer):
    """One repository, in memory. `refuses` is the beginning of the paths it answers with 403."""

    def __init__(self) -> None:
        super().__init__(ANY_PORT, Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.refuses: str | None = None
        self.created: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.committed: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()

    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


class Answers(Quiet, BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses is not None and self.path.startswith(self.server.refuses):
            self._answer({"error": "you may not write here"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/{REPOSITORY}"})
        elif self.path == f"/api/models/{REPOSITORY}/preupload/main":
            self._answer({"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]})
        elif self.path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            self._answer(
                {"transfer": "basic", "objects": [self._upload(each) for each in json.loads(body)["objects"]]}
            )
        elif self.path == f"/api/models/{REPOSITORY}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
            self._answer({"commitUrl": f"{self.server.url}/{REPOSITORY}/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses is not None and self.path.startswith(self.server.refuses):
            self._answer({}, 403)
            return
        self.server.blobs[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": self.path}, 403 if self.server.refuses else 404)

    def _mode(self, path: str) -> dict[str, object]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.server.url}/lfs/{asked['oid']}", "header": {}}
        return {**asked, "actions": {"upload": upload}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.committed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.committed[value["path"]] = self.server.blobs[value["oid"]]

    def _answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    with answering(server):
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model's."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


def push(model: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment once."""
    here = {"PYTHONPATH": ":".join(sys.path), "HF_HOME": str(model.parent / "hub"), **environment}
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(model)], env=here, capture_output=True, text=True, check=False
    )


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*")}


def test_a_run_s_model_is_uploaded_as_it_is_and_the_token_is_written_nowhere(
    workplace: Workplace, hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = str(tmp_path_factory.mktemp("hub"))
    done = workplace.run(
        "train", "run.yaml", "train.steps=2", f"push_to_hub={REPOSITORY}", HF_HOME=home, **hub.environment()
    )
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/{REPOSITORY}" in done.stderr
    uploaded = content(workplace.folder / "runs" / "small" / "model")
    assert hub.committed == uploaded
    assert "model.safetensors" in uploaded
    assert hub.created == [{"name": "small", "organization": "someone", "visibility": "private"}]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    written = [name for name, text in workplace.files().items() if TOKEN.encode() in text]
    assert written == []
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("refuses", "reason"), [("/api/repos/create", "403"), ("/lfs/", "uploading 'model.safetensors'")]
)
def test_a_hub_that_refuses_leaves_the_model_and_says_what_to_do(
    hub: Hub, model: Path, refuses: str, reason: str
) -> None:
    hub.refuses = refuses
    before = content(model)
    done = push(model, hub.environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"refused push_to_hub: {REPOSITORY} could not be uploaded: ")
    assert reason in done.stdout
    assert (
        f"hint: the model is whole in {model}; upload it with `hf upload {REPOSITORY} {model}`" in done.stdout
    )
    assert TOKEN not in done.stdout + done.stderr
    assert content(model) == before


def test_a_hub_that_cannot_be_reached(model: Path) -> None:
    done = push(model, {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"refused push_to_hub: {REPOSITORY} could not be uploaded: ")
