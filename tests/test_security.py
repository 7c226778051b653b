"""What a run may not do: run code from a checkpoint, tell a secret, write for all, or be misquoted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.errors import TrainingError
from launcher.run import checkpoints as ledger
from launcher.run.directory import RunDirectory
from launcher.worker.pickles import refusing_code
from launcher.worker.reshard import reshard
from scripts.check_strategies import Bench, Cell
from tests.conftest import Workplace, sentences, small_run, write_json
from tests.worker.planting import plant

SECRETS = {
    "HF_TOKEN": "hf_aVerySecretToken0123456789abcdef",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIAVERYSECRETKEY001",
    "AWS_SECRET_ACCESS_KEY": "averysecret/AwsSecretAccessKey+0123456789",
    "AWS_SESSION_TOKEN": "averysecretsessiontoken/0123456789",
}
NAME = "a $(touch ran) `touch ran`; touch ran & 'b' \"c\" \\ *"
"""A run's name that any shell would make something else of, were it not quoted."""


class ProcessList(threading.Thread):
    """Reads every process's command line, again and again, until it is ended."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bytes] = set()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            for each in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(each.read_bytes())
                except OSError:  # it has ended
                    continue


@dataclass(frozen=True)
class Told:
    """A run with such a name, trained by command and by launch.sh, and all that was said meanwhile."""

    place: Workplace
    directory: Path
    home: Path
    said: list[str]
    commands: set[bytes]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    # A folder of such a name too, so that every path in the run has it.
    here, home = tmp_path_factory.mktemp("outer") / NAME, tmp_path_factory.mktemp("home")
    here.mkdir()
    (here / "corpus.txt").write_text("\n".join(sentences(2000)), encoding="utf-8")
    run = small_run()
    run["name"] = NAME
    run["report_to"] = ["tensorboard"]
    run["train"] |= {"steps": 4, "eval_every": 2}
    write_json(here / "run.yaml", run)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    place = Workplace(here, {**SECRETS, "HF_HOME": str(home), "PATH": path})
    directory = here / "runs" / NAME
    processes = ProcessList()
    processes.start()
    before = os.umask(0o027)
    try:
        done = place.run("train", "run.yaml", "data.cache_dir=stores")
        assert done.returncode == 0, done.stderr
        for made in ("model", "checkpoints"):
            (directory / made).rename(tmp_path_factory.mktemp("made") / made)
        (directory / "metrics.jsonl").unlink()
        by_hand = subprocess.run(
            ["sh", str(directory / "launch.sh")],
            cwd="/",
            env={**os.environ, **place.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert by_hand.returncode == 0, by_hand.stderr
    finally:
        os.umask(before)
        processes.ended.set()
        processes.join()
    said = [done.stdout, done.stderr, by_hand.stdout, by_hand.stderr]
    return Told(place, directory, home, said, processes.seen)


def test_no_secret_is_told(told: Told) -> None:
    assert any(b"launcher.worker" in command for command in told.commands)
    written = {**told.place.files(), **Workplace(told.home).files()}
    for secret in SECRETS.values():
        assert [name for name, content in written.items() if secret.encode() in content] == []
        assert not any(secret.encode() in command for command in told.commands)
        assert not any(secret in text for text in told.said)


def test_a_name_for_a_shell_is_only_a_name(told: Told) -> None:
    assert (told.directory / "model" / "model.safetensors").is_file()
    assert not list(told.place.folder.parent.rglob("ran"))
    assert not Path("/ran").exists()


def test_files_are_made_with_the_users_umask(told: Told) -> None:
    made = [path for path in told.place.folder.rglob("*") if path.name not in ("corpus.txt", "run.yaml")]
    for path in made:
        expected = 0o750 if path.is_dir() or path.suffix == ".sh" else 0o640
        assert path.stat().st_mode & 0o777 == expected, path
    assert len(made) > 30


REFUSED = "asks for posix.mkdir, and a checkpoint is data alone"


def test_nothing_planted_in_a_checkpoint_of_ddp_runs(told: Told) -> None:
    marker = told.place.folder / "planted"
    plant(told.directory / "checkpoints" / "step-00000004", "optimizer.pt", marker)
    assert told.place.run("checkpoint", "verify", str(told.directory)).returncode == 0, "the hashes are right"
    went_on = told.place.run("train", "run.yaml", "data.cache_dir=stores", "train.steps=6")
    assert went_on.returncode == 1, went_on.stderr
    assert REFUSED in went_on.stderr
    assert not marker.exists()


def test_nothing_planted_in_a_checkpoint_of_deepspeed_runs(tmp_path: Path) -> None:
    bench, cell = Bench(tmp_path, sentences(2000)), Cell("zero2", "fp32")
    began = bench.train(*cell.overrides(), "--cluster", "one.yaml", STOP="1")
    assert began.returncode == 130, began.stderr
    marker, directory = tmp_path / "planted", RunDirectory(tmp_path / "runs" / cell.name)
    checkpoint = ledger.committed(directory.checkpoints)[-1]
    plant(checkpoint.folder, "global_step*/*optim_states.pt", marker)
    went_on = bench.train(*cell.overrides(), "--cluster", "one.yaml")
    assert went_on.returncode == 1, went_on.stderr
    assert REFUSED in went_on.stderr
    exported = Workplace(tmp_path).run("checkpoint", "export", str(directory.root))
    assert exported.returncode == 1
    assert REFUSED in exported.stderr
    assert not list(directory.exports.glob("*"))
    # For another number of ranks DeepSpeed takes it apart, in a process of its own.
    with pytest.raises(TrainingError, match=r"asks for posix\.mkdir"), refusing_code(checkpoint.folder):
        reshard(checkpoint)
    assert not marker.exists()
