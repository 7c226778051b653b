"""The run directory: every path in it, and the rule that it is never overwritten or deleted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, TextIO

from launcher.durable import write_whole
from launcher.errors import ConfigError, MachineError, RequestError, RunDirectoryError

if TYPE_CHECKING:  # typed configurations take 0.2 s to import, and watching a run needs none
    from launcher.config.schema import RunConfig
    from launcher.plan.choose import Plan
    from launcher.plan.orders import Orders

MAY_CHANGE = frozenset(
    {
        *("train.steps", "train.tokens", "train.epochs", "train.batch_size", "train.micro_batch"),
        "train.gradient_checkpointing",
        *("data.skip.steps", "data.skip.documents", "output_dir"),
        *("checkpoint.every", "checkpoint.keep", "train.log_every", "report_to", "push_to_hub"),
    }
)
"""Keys that may differ when a run goes on: its length may grow, its batch change, text be left out from there
on, and its folder be named otherwise; and what saves and reports it, which touches neither text nor weights.

Not `train.eval_every`: early stopping counts evaluations.
"""


LOCKS = frozenset({".lock", ".ranks.lock"})
GIVEN = LOCKS | {"requests"}
"""All there is in a folder that a run has only been given, and not yet been written to."""
WITHOUT_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""What a file system says that keeps no locks."""
LOOK_SECONDS = 0.2
"""Far longer than looking whether a lock is held takes."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run; nothing here need exist."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def cluster(self) -> Path:
        return self.root / "cluster.yaml"

    @property
    def orders(self) -> Path:
        return self.root / "plan.json"

    @property
    def stream(self) -> Path:
        """With `data.mode: stream`, the files that are read, as they were when the run began."""
        return self.root / "stream.json"

    @property
    def tokenizer(self) -> Path:
        """With `data.mode: stream`, the tokenizer; else it is in the token store."""
        return self.root / "tokenizer"

    @property
    def accelerate(self) -> Path:
        return self.root / "accelerate.yaml"

    @property
    def deepspeed(self) -> Path:
        """DeepSpeed's own configuration, where the strategy is one of its."""
        return self.root / "deepspeed.json"

    @property
    def launch(self) -> Path:
        return self.root / "launch.sh"

    @property
    def job(self) -> Path:
        """What sbatch is given, on a SLURM cluster."""
        return self.root / "job.sbatch"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def journal(self) -> Path:
        return self.root / "journal.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def phases(self) -> Path:
        """Which samples are in which step, as the run was trained last."""
        return self.root / "phases.json"

    @property
    def stop_request(self) -> Path:
        return self.root / "requests" / "stop"

    @property
    def stacks_request(self) -> Path:
        """While it is there, each rank writes the stacks of all its threads to its log, once."""
        return self.root / "requests" / "stacks"

    @property
    def handover(self) -> Path:
        """While it is there, another supervisor waits to take the place of the one that has the run."""
        return self.root / "requests" / "handover"

    @property
    def node_check(self) -> Path:
        """A word that every node of a job must be able to read, before there are ranks."""
        return self.root / "requests" / "nodes"

    @property
    def lock(self) -> Path:
        """Held by the supervisor while it lives."""
        return self.root / ".lock"

    @property
    def ranks_lock(self) -> Path:
        """Held by rank 0 while it lives."""
        return self.root / ".ranks.lock"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def exports(self) -> Path:
        """Models made of single checkpoints, each in a folder of the checkpoint's name."""
        return self.root / "exports"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def wandb_run(self) -> Path:
        """The id of its run at Weights & Biases."""
        return self.root / "wandb" / "run-id"

    def logs(self, attempt: int) -> Path:
        return self.root / "logs" / f"attempt-{attempt:03d}"

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs(attempt) / f"rank-{rank}.log"

    def launch_log(self, attempt: int) -> Path:
        """What `accelerate launch` itself says, and a rank before it has a log of its own."""
        return self.logs(attempt) / "launch.log"

    def record(self, attempt: int, rank: int) -> Path:
        """A rank's own last word on how its attempt ended."""
        return self.logs(attempt) / f"rank-{rank}.end.json"

    def failed(self, attempt: int) -> Path:
        """Made by the first rank to fail of those that were launched by hand, which tells of it."""
        return self.logs(attempt) / "failed"

    def heartbeat(self, attempt: int, rank: int) -> Path:
        """Where a rank says, every second, that it lives and how far it is; see `run.heartbeat`."""
        return self.logs(attempt) / f"rank-{rank}.heartbeat"

    def next_attempt(self) -> int:
        """One more than the newest attempt that has a folder."""
        numbers = [int(folder.name.removeprefix("attempt-")) for folder in self.root.glob("logs/attempt-*")]
        return max(numbers, default=0) + 1

    def read_config(self) -> RunConfig:
        """The configuration of this run. Raises RunDirectoryError if there is none that can be read."""
        from launcher.config.load import load_run

        self.require(self.config)
        try:
            return load_run(self.config).config
        except ConfigError as error:
            raise RunDirectoryError(
                f"{self.config} cannot be read: {error.faults[0]}",
                hint="choose another name, or mend that file",
            ) from error

    def read_orders(self) -> Orders:
        """The worker's orders. Raises RunDirectoryError if there are none."""
        from launcher.plan.orders import parse_orders

        self.require(self.orders)
        return parse_orders(self.orders.read_text(encoding="utf-8"))

    def require(self, file: Path) -> None:
        """Raise RunDirectoryError unless `file`, which every run has, is there."""
        if not file.is_file():
            raise RunDirectoryError(
                f"{self.root} is not a run directory: it has no {file.name}",
                hint="give the folder that `launcher train` made, such as runs/NAME",
            )


def configuration_hash(run: RunConfig) -> str:
    """What decides whether two configurations are the same run: sha256 of its canonical JSON."""
    canonical = json.dumps(run.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def run_directory(run: RunConfig) -> RunDirectory:
    """Where `run` lives: `output_dir/name`, absolute."""
    return RunDirectory(Path(run.output_dir).expanduser().absolute() / run.name)


def find_model_folder(source: str) -> Path | str:
    """The model that `source` names: a run's final one, or else a folder or Hub id.

    Raises RunDirectoryError for a run that has no final model yet, and RequestError where there is no model.
    """
    from launcher.run.checkpoints import MANIFEST

    directory = RunDirectory(Path(source).absolute())
    if (directory.root / MANIFEST).is_file():
        raise RequestError(
            f"{source} is a checkpoint, not a model",
            hint="`launcher checkpoint export RUN_DIR` makes a model of one: give the folder that it prints",
        )
    if not directory.orders.is_file():
        from launcher.config.models import find_trained

        return find_trained(source or ".")
    if not directory.model.is_dir():
        raise RunDirectoryError(
            f"{source} has no model yet: the run is not finished",
            hint="let `launcher train` finish, or give the folder that "
            f"`launcher checkpoint export {quote(source)}` makes",
        )
    return directory.model


def check_same_run(directory: RunDirectory, run: RunConfig) -> None:
    """Refuse a folder that belongs to something else; touches nothing.

    Raises RunDirectoryError, listing the keys that differ, where another configuration has this
    name, and where the folder holds something that is not a run.
    """
    if not directory.root.exists():
        return
    if not directory.config.is_file():
        if directory.root.is_dir() and {path.name for path in directory.root.iterdir()} <= GIVEN:
            return
        raise RunDirectoryError(
            f"{directory.root} exists and is not a run directory",
            hint="choose another name or output_dir",
        )
    before = directory.read_config()
    changed = changed_for_good(before, run)
    if changed and has_begun(directory):
        raise RunDirectoryError(
            f"run {run.name!r} exists in {directory.root} with another configuration; "
            f"{len(changed)} {'key differs' if len(changed) == 1 else 'keys differ'}: "
            + "; ".join(f"{key} was {_value(before, key)}, is now {_value(run, key)}" for key in changed),
            hint="give the new run another name, or undo the change to resume the old one",
        )


def check_no_run(directory: RunDirectory) -> None:
    """Raise RunDirectoryError for a folder in which a run lives: its own commands write to it."""
    of_a_run = (directory.environment, directory.journal, directory.checkpoints, directory.lock)
    if any(path.exists() for path in of_a_run):
        raise RunDirectoryError(f"{directory.root} is the folder of a run", hint="name another folder")


def changed_for_good(before: RunConfig, run: RunConfig) -> list[str]:
    """The keys that differ and may not, were `before` to go on as `run`."""
    from launcher.config.load import differences

    return [key for key in differences(before, run) if key not in MAY_CHANGE]


def _value(run: RunConfig, key: str) -> str:
    from launcher.config.faults import at

    return json.dumps(at(run.model_dump(mode="json"), tuple(key.split("."))), ensure_ascii=False)


def check_goes_on(directory: RunDirectory, plan: Plan, store: Path | None) -> None:
    """Raise RunDirectoryError if a run that has begun would be cut short, or go on with other text.

    `store` is the token store now, None for a stream, whose text `run.text` compares. A run may grow; its
    learning rate has followed the longer schedule. With another batch size as many samples may take fewer
    steps, and the last step may round them otherwise.
    """
    if not has_begun(directory):
        return
    orders = directory.read_orders()
    if store is not None and orders.store is not None and Path(orders.store).name != store.name:
        raise RunDirectoryError(
            f"the text or tokenizer of run {directory.root.name!r} has changed since it began: "
            f"its token store was {orders.store}, and is now {store}",
            hint="put the files back as they were (times of change too), or give the new run another name",
        )
    before = orders.plan
    if before.steps is None or before.samples is None or plan.steps is None or plan.samples is None:
        return
    if plan.steps < before.steps and plan.samples <= before.samples - before.batch.batch_size:
        raise RunDirectoryError(
            f"run {directory.root.name!r} was planned for {before.steps:,} steps, "
            f"and {plan.steps:,} are asked for now",
            hint="a run may grow but not shrink: give the shorter one another name",
        )


def has_begun(directory: RunDirectory) -> bool:
    """Whether anything was trained here: until then a mistake in the configuration may be mended."""
    reported = directory.metrics.is_file() and directory.metrics.stat().st_size > 0
    return reported or any(directory.checkpoints.glob("step-[0-9]*"))


def hold(lock: Path, directory: RunDirectory, by: str) -> TextIO:
    """Hold `lock` until the returned stream is closed or this process ends.

    Raises RunDirectoryError, saying that `by` trains the run, where another process holds it, and
    MachineError where the file system has no locks.
    """
    stream = lock.open("w", encoding="utf-8")
    try:
        try:
            _flock(stream, fcntl.LOCK_EX)
        except BlockingIOError:
            time.sleep(LOOK_SECONDS)  # it may be `is_held` that looks
            _flock(stream, fcntl.LOCK_EX)
    except BlockingIOError as error:
        stream.close()
        raise RunDirectoryError(
            f"{directory.root} is being trained by {by}",
            hint="wait for it to end, or give this run another name",
        ) from error
    if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(stream.fileno())):
        # Who held it before has taken it away: a lock on that one would keep nobody out.
        stream.close()
        return hold(lock, directory, by)
    return stream


def take_back(directory: RunDirectory, made: Iterable[Path]) -> None:
    """Remove the folders that were `made` for a run, innermost first, where it came to nothing: only what it
    was given is there. Call it while holding its lock."""
    if {path.name for path in directory.root.iterdir()} <= GIVEN:
        directory.stop_request.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            directory.stop_request.parent.rmdir()
        for lock in LOCKS:
            (directory.root / lock).unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def is_held(lock: Path) -> bool:
    """Whether a process that lives holds `lock`. Raises MachineError where the file system has no locks."""
    try:
        with lock.open(encoding="utf-8") as stream:
            _flock(stream, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _flock(stream: TextIO, how: int) -> None:
    """Lock a file without waiting. Raises BlockingIOError where another process has it."""
    try:
        fcntl.flock(stream, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        stream.close()
        raise MachineError(
            f"{stream.name} cannot be locked: {error.strerror}",
            hint="without a lock two commands could train a run at a time: set output_dir to a folder on a "
            "file system that has file locks, or have this one mounted with them (Lustre: -o flock)",
        ) from error


def check_writable(folder: Path, key: str) -> None:
    """Raise RequestError unless something can be made in `folder`, which `key` names, or above it.

    It tries, because permission bits do not tell of read-only mounts, quotas or being root.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".launcher-", dir=existing):
            pass
    except OSError as error:
        raise RequestError(
            f"{key}: cannot write in {existing}: {error.strerror}",
            hint=f"set {key} to a folder you may write to",
        ) from error


def write_text(file: Path, text: str) -> None:
    """Write a whole file or none, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, (text.encode(),))


def write_files(files: Iterable[tuple[Path, str]]) -> None:
    """Write each `(path, text)`; a path ending in `.sh` is made executable for those who may read it."""
    for file, text in files:
        write_text(file, text)
        if file.suffix == ".sh":
            mode = file.stat().st_mode
            file.chmod(mode | (mode & 0o444) >> 2)
