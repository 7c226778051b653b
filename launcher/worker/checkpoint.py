"""Writing a checkpoint: every rank's part, and one commit.

Where one rank holds all the state it is copied, and written while training goes on; the checkpoint before is
always waited for. What fails in the background fails the run at the next step.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.errors import RequestError, TrainingError
from launcher.run import checkpoints as ledger
from launcher.run.machine import memory_left
from launcher.worker.heart import Heart
from launcher.worker.together import as_rank_0_has_it, barrier, of_all_ranks

UNWRITABLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
OF_A_RANK: Final = re.compile(r"rank_(\d+)_mp_|^__(\d+)_|^rng_state_(\d+)\.")
"""Whose file it is, by the names that DeepSpeed, torch and transformers give."""
COPY_LEAVES: Final = 1.25
"""A copy is made where there is so many times its size of memory left."""
FILES: Final = 16
"""Files of a checkpoint, about, and as many again for each rank."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What saving the checkpoint of `step` took, in seconds, and how many of them training stood still."""

    step: int
    bytes: int
    seconds: float
    stall_seconds: float


def newest_good(checkpoints: Path, *, rank: int) -> ledger.Checkpoint | None:
    """The newest checkpoint that verifies, the same on every rank: rank 0 alone reads every byte of it. None
    where there never was one.

    Raises RequestError on every rank where all there were are damaged, and TrainingError on a rank that does
    not see the one that is good.
    """
    good = ledger.latest_good(checkpoints) if rank == 0 else None
    damaged: dict[str, str] = {}
    if rank == 0 and good is None:
        ledger.set_aside_damaged(checkpoints, newer_than=-1)
        damaged = ledger.quarantined(checkpoints)
    step, damaged = as_rank_0_has_it((None if good is None else good.step, damaged))
    if damaged:
        raise _none_is_good(checkpoints, damaged)
    if rank == 0 or step is None:
        return good
    for each in ledger.committed(checkpoints):
        if each.step == step:
            return each
    raise TrainingError(
        f"rank {rank} does not see the checkpoint of step {step} in {checkpoints}",
        hint="output_dir must be a folder that every node shares",
    )


def _none_is_good(checkpoints: Path, damaged: Mapping[str, str]) -> RequestError:
    """Beginning at step 0 would take for nothing what was trained: that is for a person to say."""
    folder = checkpoints / ledger.QUARANTINE
    named = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
    return RequestError(
        f"no checkpoint of this run is good: {len(damaged)} {'is' if len(damaged) == 1 else 'are'} set aside "
        f"in {folder}, and there is no other: {named}",
        hint=f"put a whole copy of one into {checkpoints} under its name step-NNNNNNNN, or give the run "
        f"another name; to begin this one again at step 0, move {folder} away",
    )


class CheckpointWriter(TrainerCallback):
    """Writes one checkpoint after another, `keep` of which stay; on every rank, the same calls.

    As a callback it raises what has failed in the background at the next step, and waits for the last
    checkpoint when training ends. `told`, on rank 0, is called with each that is committed.
    """

    def __init__(self, checkpoints: Path, heart: Heart, *, rank: int, world_size: int, keep: int) -> None:
        self._checkpoints = checkpoints
        self._heart = heart
        self._rank = rank
        self._world_size = world_size
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Saved] | None = None
        self._begun = self._stalled = 0.0
        self.told: Callable[[Saved], None] = lambda _: None

    @contextmanager
    def writing(self, step: int, size: int) -> Iterator[Path]:
        """While inside, every rank writes its part into the folder it is given, and commits it at the end.

        `size`: bytes it will take, about, for the first. Raises TrainingError where there is no room, or
        something cannot be written.
        """
        self.finish()
        self._begun = time.perf_counter()
        folder = self._checkpoints / f".step-{step:08d}.writing"
        with explained(folder, f"the checkpoint of step {step}"):
            before = ledger.committed(self._checkpoints)
            if self._rank == 0:
                ledger.begin(self._checkpoints, step)
            barrier()
            ledger.check_room(
                folder,
                size=before[-1].bytes if before else size,
                files=len(before[-1].files) if before else FILES * (1 + self._world_size),
            )
            yield folder
        self._stalled += time.perf_counter() - self._begun
        if self._pending is not None and self._pending.done():
            self.finish()

    def commit(
        self,
        folder: Path,
        *,
        step: int,
        samples: int,
        best: int | None,
        state: Mapping[str, Any],
        copied: Callable[[], None] | None = None,
    ) -> None:
        """Commit what every rank has written to `folder`, with `state`, then drop what is over `keep`.

        The checkpoint of step `best` stays: early stopping returns to it. `copied` writes what rank 0 has
        made a copy of, while training goes on.
        """
        sealed = _sealed_by_all(folder, self._rank, self._world_size) if copied is None else {}
        barrier()
        if self._rank == 0:
            self._commit(folder, sealed, step=step, samples=samples, best=best, state=state, copied=copied)
        if copied is None:
            barrier()  # or the others would wait in training, whose limit is no save's

    def _commit(
        self,
        folder: Path,
        sealed: ledger.Files,
        *,
        step: int,
        samples: int,
        best: int | None,
        state: Mapping[str, Any],
        copied: Callable[[], None] | None,
    ) -> None:
        begun = self._begun

        def write() -> Saved:
            with explained(folder, f"the checkpoint of step {step}"):
                if copied is not None:
                    copied()
                (folder / ledger.STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
                open_as_folder(folder)
                made = ledger.commit(
                    folder,
                    step=step,
                    samples=samples,
                    world_size=self._world_size,
                    created=time.time(),
                    sealed=sealed,
                )
                self.prune(best)
            return Saved(step, made.bytes, time.perf_counter() - begun, 0.0)

        self._pending = self._thread.submit(write)
        if copied is None:
            self._pending.result()

    def prune(self, best: int | None) -> None:
        """Drop what is over `keep`, but for the checkpoint of step `best`. Call it on rank 0."""
        ledger.prune(self._checkpoints, keep=self._keep, protect=() if best is None else (best,))

    def finish(self) -> None:
        """Wait until the checkpoint that was begun last is committed. Raises what its writing raised."""
        if self._pending is None:
            return
        begun = time.perf_counter()
        pending, self._pending = self._pending, None
        saved = pending.result()
        self._stalled += time.perf_counter() - begun
        stall, self._stalled = self._stalled, 0.0
        self._heart.saved(saved.seconds)
        self.told(Saved(saved.step, saved.bytes, saved.seconds, stall))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._pending is not None and self._pending.done():
            self.finish()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        with self._heart.during("saving"):
            self.finish()


def host_copy(state: Any) -> Any:
    """`state` with every tensor in it copied to this machine's memory; one that stands in it twice is one."""
    return _copy(state, {})


def has_room_for_copy(state: Any) -> bool:
    """Whether this machine's memory has room for a `host_copy` of `state`."""
    size = sum({_key(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(state)}.values())
    return memory_left() > COPY_LEAVES * size


def open_as_folder(folder: Path) -> None:
    """Let the files of `folder` be read by whom the folder is: safetensors makes them its owner's alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _copy(state: Any, made: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    if isinstance(state, torch.Tensor):
        if state.numel() == 0:
            return state.detach().to("cpu", copy=True)
        key = _key(state)
        if key not in made:
            made[key] = state.detach().to("cpu", copy=True)
        return made[key]
    if isinstance(state, Mapping):
        return {name: _copy(value, made) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copy(value, made) for value in state)
    return state


def _sealed_by_all(folder: Path, rank: int, world_size: int) -> ledger.Files:
    """Every file's size and hash, each seen to disk by the rank that wrote it, as far as names tell."""
    barrier()
    mine = [name for name in ledger.names_in(folder) if _writer(name, world_size) == rank]
    parts = of_all_ranks(ledger.seal(folder, mine))
    return {name: found for part in parts for name, found in part.items()}


def _writer(name: str, world_size: int) -> int:
    found = OF_A_RANK.search(name.rpartition("/")[2])
    rank = int(next(filter(None, found.groups()))) if found else 0
    return rank if rank < world_size else 0


@contextmanager
def explained(folder: Path, what: str) -> Iterator[None]:
    """While inside, `what` is written to `folder`. Raises TrainingError in place of what says, in whatever
    way, that it cannot be; `folder` is then removed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        reason = _why_unwritable(error, folder)
        if reason is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)  # the ranks' last words need room too
        raise TrainingError(
            f"{what} could not be written in {folder.parent}: {reason}",
            hint="the checkpoints before it are whole: make room there, then run the same command again",
        ) from error


def _why_unwritable(error: BaseException, folder: Path) -> str | None:
    """In words; None where the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in UNWRITABLE else None
    said = f"{error} {error.__cause__ or error.__context__ or ''}"
    for number in UNWRITABLE:
        if os.strerror(number) in said:
            return os.strerror(number)
    if "PytorchStreamWriter" not in said and "inline_container" not in said:
        return None
    try:  # torch does not say why
        with (folder / ".probe").open("wb") as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as found:
        return found.strerror
    return "a file could not be written to its end"
