"""What a run may not do: run code from a checkpoint, tell a secret, write for all, or be misquoted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

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


def test_a_run_with_a_name_for_a_shell_tells_no_secret_and_writes_for_nobody_else(
    workplace: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # A folder of such a name too, so that every path in the run has it.
    here = workplace.folder / NAME.replace("/", "-")
    here.mkdir()
    (here / "corpus.txt").write_bytes((workplace.folder / "corpus.txt").read_bytes())
    run = small_run()
    run["name"] = NAME
    run["report_to"] = ["tensorboard"]
    run["train"] |= {"steps": 4, "eval_every": 2}
    write_json(here / "run.yaml", run)
    home = tmp_path_factory.mktemp("home")
    environment = {
        **SECRETS,
        "HF_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    processes = ProcessList()
    processes.start()
    before = os.umask(0o027)
    try:
        place = Workplace(here, environment)
        done = place.run("train", "run.yaml", "data.cache_dir=stores")
        assert done.returncode == 0, done.stderr
        directory = here / "runs" / NAME
        # By hand too, from elsewhere: launch.sh holds the path.
        for made in ("model", "checkpoints"):
            (directory / made).rename(tmp_path_factory.mktemp("made") / made)
        (directory / "metrics.jsonl").unlink()
        by_hand = subprocess.run(
            ["sh", str(directory / "launch.sh")],
            cwd="/",
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert by_hand.returncode == 0, by_hand.stderr
        looked = place.run("status", str(directory))
        assert "step" in looked.stdout
    finally:
        os.umask(before)
        processes.ended.set()
        processes.join()
    assert (directory / "model" / "model.safetensors").is_file()
    assert not list(workplace.folder.rglob("ran")), "a shell has read the name"
    assert not Path("/ran").exists()

    assert any(b"launcher.worker" in line for line in processes.seen)
    said = [done.stdout, done.stderr, by_hand.stdout, by_hand.stderr, looked.stdout]
    for secret in SECRETS.values():
        for name, content in {**workplace.files(), **Workplace(home).files()}.items():
            assert secret.encode() not in content, name
        assert not any(secret.encode() in line for line in processes.seen)
        assert not any(secret in text for text in said)

    made = [path for path in here.rglob("*") if path not in (here / "corpus.txt", here / "run.yaml")]
    for path in made:
        expected = 0o750 if path.is_dir() or path.suffix == ".sh" else 0o640
        assert path.stat().st_mode & 0o777 == expected, path
    assert len(made) > 30


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("planted"), sentences(2000))


@pytest.mark.parametrize(
    ("cell", "pattern"),
    [
        (Cell("ddp", "fp32"), "optimizer.pt"),
        (Cell("zero2", "fp32"), "global_step*/*optim_states.pt"),
    ],
    ids=lambda value: value.name if isinstance(value, Cell) else "",
)
def test_nothing_that_is_planted_in_a_checkpoint_runs(bench: Bench, cell: Cell, pattern: str) -> None:
    ranks = {"ddp": ("one.yaml",), "zero2": ("two.yaml", "one.yaml")}[cell.strategy]
    began = bench.train(*cell.overrides(), "--cluster", ranks[0], STOP="1")
    assert began.returncode == 130, began.stderr
    marker = bench.folder / f"ran-{cell.name}"
    (checkpoint,) = (bench.folder / "runs" / cell.name / "checkpoints").glob("step-*")
    plant(checkpoint, pattern, marker)
    place = Workplace(bench.folder)
    assert place.run("checkpoint", "verify", f"runs/{cell.name}").returncode == 0, "the hashes are right"
    # As many ranks read it as they are; for one, DeepSpeed takes it apart first.
    for cluster in ranks:
        went_on = bench.train(*cell.overrides(), "--cluster", cluster)
        assert went_on.returncode == 1, went_on.stderr
        assert "asks for posix.mkdir, and a checkpoint is data alone" in went_on.stderr
    assert not marker.exists()
    if cell.strategy != "ddp":  # of which the weights alone are read, and they are no pickle
        exported = place.run("checkpoint", "export", f"runs/{cell.name}")
        assert exported.returncode == 1
        assert "asks for posix.mkdir" in exported.stderr
        assert not marker.exists()
        assert not (bench.folder / "runs" / cell.name / "exports" / checkpoint.name).exists()
