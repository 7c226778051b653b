"""What tests of whole commands share: a small real run, and the command itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest

from launcher.plan.batch import Batch
from launcher.plan.choose import Blocks, Every, Plan
from launcher.plan.fast import Fast

WORDS = (
    *("the", "of", "and", "to", "in", "that", "he", "was", "it", "his", "is", "with"),
    *("as", "had", "for", "at", "by", "on", "not", "be", "from", "but", "have", "they"),
)


# A busy machine is no failure: where a test bounds how long something took, that tells at once from never.
hypothesis.settings.register_profile("launcher", deadline=None)
hypothesis.settings.load_profile("launcher")

# Two tests at a time on two cores: more threads in each would wait for each other. Ranks are told their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that runs the tests in the background has them ignore SIGINT, nohup SIGHUP, and so would what they
# start: a test that sends one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Put temporary files into one folder, which goes at the end: torchelastic leaves some at each start.

    pytest's own stay where they always are, to be looked at.
    """
    if hasattr(config, "workerinput"):
        return  # one of several processes, which have the first one's environment
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="tests-"))
    folder.chmod(0o755)  # who runs a SLURM cluster's daemons comes by
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def stale(*_: object, **__: object) -> None:
    """What a network file system may answer for a moment, in place of any function that asks it."""
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@dataclass(frozen=True)
class Workplace:
    """A folder to run commands in."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One `launcher` command, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **self.environment, **environment},
        )

    def train(self, *arguments: str) -> Path:
        """Train `run.yaml` with overrides, and return its run directory."""
        done = self.run("train", "run.yaml", *arguments)
        assert done.returncode == 0, done.stderr
        name = next((each.removeprefix("name=") for each in arguments if each.startswith("name=")), "small")
        return self.folder / "runs" / name

    def answered(self, *arguments: str) -> Any:
        """The whole of a command's stdout, as JSON."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def files(self) -> dict[str, bytes]:
        """Every file here: path to content."""
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes() if path.is_file() else b""
            for path in sorted(self.folder.rglob("*"))
        }


def small_run() -> dict[str, Any]:
    """A run that trains in seconds on a CPU and draws no random masks."""
    return {
        "name": "small",
        "model": {
            "name": "gpt2",
            "tokenizer": {"train": {"vocab_size": 300}},
            "overrides": {
                "n_layer": 2,
                "n_head": 2,
                "n_embd": 32,
                "n_positions": 64,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            },
        },
        "data": {"train": ["corpus.txt"], "validation": 0.05, "sample_by": "line", "block_size": 64},
        "train": {"batch_size": 8, "steps": 20, "learning_rate": 1e-3, "log_every": 1, "eval_every": 10},
        "checkpoint": {"every": 10},
        "report_to": [],
    }


def small_plan() -> Plan:
    """A plan for two ranks on the CPU, as `small_run` gives one."""
    return Plan(
        name="run",
        cluster="here",
        gpu="cpu",
        device="cpu",
        nodes=1,
        ranks_per_node=2,
        threads_per_rank=1,
        strategy="ddp",
        offload="none",
        precision="fp32",
        gradient_checkpointing=False,
        compile=False,
        batch=Batch(8, 2, 2, 2),
        block_size=64,
        steps=20,
        samples=160,
        warmup_steps=0,
        eval_every=Every(steps=10),
        checkpoint_every=Every(seconds=900.0),
        blocks=Blocks(1000, 64000, 10),
        parameters=12345,
        memory={"parameters": 49380},
        memory_available=None,
        forecast=None,
        host_memory=0,
        peak_flops=None,
        fast=Fast(),
    )


def sentences(count: int, seed: int = 1) -> Sequence[str]:
    """Lines of common words, the same for the same seed."""
    state = seed
    lines = []
    for _ in range(count):
        words = []
        for _ in range(12):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            words.append(WORDS[(state >> 33) % len(WORDS)])
        lines.append(" ".join(words))
    return lines


def lacks(why: str) -> NoReturn:
    """Skip a test that cannot run here; in continuous integration, where nobody would see that, fail."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)


def write_json(file: Path, value: object) -> None:
    """JSON is YAML: what tests write as configurations."""
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def last_with(directory: Path, name: str) -> dict[str, Any]:
    """The last line of a run's metrics.jsonl that has this number: a report, an evaluation or a save."""
    return [line for line in metrics(directory) if name in line][-1]


def losses(directory: Path) -> dict[tuple[int, str], float]:
    """(step, loss or eval_loss) to its value."""
    return {
        (line["step"], name): line[name]
        for line in metrics(directory)
        for name in ("loss", "eval_loss")
        if name in line
    }


def weights(directory: Path) -> bytes:
    """A run's final model."""
    return (directory / "model" / "model.safetensors").read_bytes()


def make_workplace(folder: Path, run: Mapping[str, Any], **environment: str) -> Workplace:
    """`folder` with `run.yaml`, its corpus, and a cluster of two ranks on the CPU."""
    (folder / "corpus.txt").write_text("\n".join(sentences(2000)) + "\n", encoding="utf-8")
    write_json(folder / "run.yaml", run)
    write_json(folder / "two.yaml", {"name": "two", "gpu": "cpu", "gpus_per_node": 2})
    return Workplace(folder, environment)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small to share: with a test on every core, threads would wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """A folder to run `small_run` in."""
    return make_workplace(tmp_path, small_run())
