"""Writing checkpoints: in the background, on a full disk, and seen to disk."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from launcher.errors import RequestError, TrainingError
from launcher.run import checkpoints as ledger
from launcher.run.outcome import Attempt, End, Evidence, Outcome, Patience, decide, what_next
from launcher.worker.checkpoint import CheckpointWriter, Saved, host_copy, newest_good
from launcher.worker.heart import Heart
from launcher.worker.main import Reached
from launcher.worker.rank import last_word
from launcher.worker.saving import save_model
from tests.conftest import lacks

MEBIBYTE = 1 << 20


class Writing:
    """A writer of one rank, and what it told."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder / "checkpoints"
        heart = Heart(folder / "heartbeat", folder / "stacks", 0, {})
        self.writer = CheckpointWriter(self.folder, heart, rank=0, world_size=1, keep=keep)
        self.told: list[Saved] = []
        self.writer.told = self.told.append

    def save_and_wait(self, step: int, write: Callable[[Path], None], *, copied: bool) -> None:
        self.save(step, write, copied=copied)
        self.writer.finish()

    def save(self, step: int, write: Callable[[Path], None], *, size: int = 0, copied: bool = False) -> None:
        with self.writer.writing(step, size) as folder:
            if not copied:
                write(folder)
            self.writer.commit(
                folder,
                step=step,
                samples=step,
                best=None,
                state={"step": step},
                copied=partial(write, folder) if copied else None,
            )

    def begin_step(self) -> None:
        nothing: Any = SimpleNamespace()
        self.writer.on_step_begin(nothing, nothing, nothing)

    def steps(self) -> list[int]:
        return [each.step for each in ledger.committed(self.folder)]


def small(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)


def large(folder: Path) -> None:
    """More than the small disk has, as the optimizer's state is written."""
    torch.save(torch.zeros(4 * MEBIBYTE), folder / "optimizer.pt")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB and 64 inodes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = "size=8m,nr_inodes=64"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        lacks(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path) -> None:
    writing = Writing(tmp_path)
    may_end = threading.Event()
    writing.save(1, small)

    def late(folder: Path) -> None:
        may_end.wait(10)
        small(folder)

    writing.save(2, late, copied=True)
    assert writing.steps() == [1], "it is not there before it is whole"
    writing.begin_step()
    assert [each.step for each in writing.told] == [1]
    may_end.set()
    writing.save(3, small, copied=True)
    assert writing.steps()[:2] == [1, 2], "the one before is always waited for"
    writing.writer.finish()
    assert writing.steps() == [2, 3]
    assert [each.step for each in writing.told] == [1, 2, 3]
    last = writing.told[-1]
    assert last.bytes == 1000 + len('{\n  "step": 3\n}\n')
    assert last.seconds >= 0
    assert ledger.committed(writing.folder)[-1].state() == {"step": 3}
    assert not list(writing.folder.glob(".*"))


def test_ranks_that_wrote_their_parts_wait_in_the_save_until_it_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = Writing(tmp_path)
    met: list[list[int]] = []
    monkeypatch.setattr("launcher.worker.checkpoint.barrier", lambda: met.append(writing.steps()))
    writing.save(1, small)
    assert met[-1] == [1]


def test_what_fails_in_the_background_fails_the_run_at_the_next_step(tmp_path: Path) -> None:
    writing = Writing(tmp_path)
    writing.save(1, small)

    def fail(_: Path) -> None:
        raise ArithmeticError("went wrong")

    writing.save(2, fail, copied=True)
    assert writing.writer._pending is not None
    writing.writer._pending.exception()
    with pytest.raises(ArithmeticError, match="went wrong"):
        writing.begin_step()
    assert writing.steps() == [1]


def test_after_a_failure_the_log_says_why_the_last_checkpoint_was_not_committed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    may_fail = threading.Event()

    def fails(_folder: Path) -> None:
        may_fail.wait(10)
        raise ArithmeticError("went wrong")

    writing = Writing(tmp_path)
    writing.save(1, fails, copied=True)
    may_fail.set()
    reached = Reached(Heart(tmp_path / "heartbeat", tmp_path / "stacks", 0, {}))
    reached.trainer = SimpleNamespace(writer=writing.writer)  # type: ignore[assignment]
    reached.end_saving()
    said = capsys.readouterr().out
    assert said == "the last checkpoint may not be committed: ArithmeticError: went wrong\n"


@pytest.mark.parametrize("copied", [False, True])
def test_a_disk_that_fills_up_leaves_the_good_one_and_says_so(disk: Path, copied: bool) -> None:
    writing = Writing(disk)
    writing.save(1, small)
    with pytest.raises(TrainingError, match="No space left on device") as full:
        writing.save_and_wait(2, large, copied=copied)
    assert "the checkpoint of step 2 could not be written in" in full.value.message
    assert "the checkpoints before it are whole" in (full.value.hint or "")
    good = ledger.latest_good(writing.folder)
    assert good is not None
    assert good.step == 1
    assert not list(writing.folder.glob(".*")), "what was half-written has given its room back"


def test_a_disk_without_room_is_told_before_anything_is_written(disk: Path) -> None:
    writing = Writing(disk)
    wrote: list[Path] = []
    with pytest.raises(TrainingError, match=r"needs about 9\.0 MiB in .*, and [78]\.\d MiB are free"):
        writing.save(1, wrote.append, size=9 * MEBIBYTE)
    writing.save(1, small, size=7 * MEBIBYTE)
    for number in range(os.statvfs(disk).f_favail - 2):
        (disk / str(number)).touch()
    with pytest.raises(TrainingError, match=r"a checkpoint needs about 2 files in .* there are inodes for 1"):
        writing.save(2, wrote.append)
    assert not wrote


def test_a_run_that_is_to_keep_fewer_makes_room_but_not_of_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        Writing(tmp_path, keep=3).save_and_wait(step, small, copied=False)
    again = Writing(tmp_path, keep=1)
    again.writer.prune(best=1)
    assert again.steps() == [1, 3]


def test_a_read_only_folder_is_told(disk: Path) -> None:
    writing = Writing(disk)
    writing.save(1, small)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(TrainingError, match="Read-only file system"):
        writing.save(2, small)
    assert writing.steps() == [1]


def test_an_error_of_another_kind_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        Writing(tmp_path).save(1, fail)


def test_every_file_and_folder_is_on_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    sync, rename = os.fsync, Path.rename

    def noted_sync(descriptor: int) -> None:
        happened.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        happened.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)

    def nested(folder: Path) -> None:
        (folder / "global_step5" / "deep").mkdir(parents=True)
        (folder / "global_step5" / "deep" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"o")
        small(folder)

    Writing(tmp_path).save(5, nested)
    named = happened.index(".step-00000005.writing -> step-00000005")
    manifest = happened.index(f".{ledger.MANIFEST}.{os.getpid()}")
    content = {"weights", ledger.STATE, "zero_pp_rank_0_mp_rank_00_optim_states.pt"}
    assert content <= set(happened[:manifest]), "the manifest comes last"
    assert {"global_step5", "deep", ".step-00000005.writing"} <= set(happened[manifest:named])
    assert "checkpoints" in happened[named:]


def test_a_copy_shares_what_was_shared_and_nothing_with_its_source() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"a": weight, "tied": weight, "view": weight.T, "groups": [{"lr": 0.1, "params": [0]}]}
    copy = host_copy(state)
    weight.zero_()
    assert copy["a"] is copy["tied"]
    assert copy["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert copy["view"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert copy["groups"] == [{"lr": 0.1, "params": [0]}]
    assert copy["groups"] is not state["groups"]


def test_files_are_as_open_as_their_folder(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        writing = Writing(tmp_path)

        def private(folder: Path) -> None:
            small(folder)
            (folder / "weights").chmod(0o600)

        writing.save(1, private)
    finally:
        os.umask(before)
    folder = writing.folder / "step-00000001"
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(tmp_path: Path) -> None:
    writing = Writing(tmp_path)
    for step in (5, 10):
        writing.save_and_wait(step, small, copied=False)
        os.truncate(writing.folder / f"step-{step:08d}" / "weights", 3)
    quarantine = writing.folder / "quarantine"
    for _ in ("as they are found", "once they are set aside"):
        with pytest.raises(RequestError) as caught:
            newest_good(writing.folder, rank=0)
        for step in (5, 10):
            assert f"step-{step:08d}: weights has 3 bytes, 1000 were written" in caught.value.message
        assert str(quarantine) in caught.value.message
        assert "another name" in (caught.value.hint or "")
        end = last_word(0, 0, caught.value)
        verdict = decide(Evidence(world_size=1, ends=(end,)))
        assert (end.exit_code, verdict.outcome) == (2, Outcome.CRASHED)
        ended = Attempt(verdict.outcome, began=10, step=0, retry=verdict.retry, reason=verdict.reason)
        assert isinstance(what_next([ended], Patience()), End), "the supervisor does not try again"
    quarantine.rename(tmp_path / "away")
    assert newest_good(writing.folder, rank=0) is None, "as the hint says"


def test_a_run_that_was_killed_before_its_first_checkpoint_was_committed_begins_again(tmp_path: Path) -> None:
    (ledger.begin(tmp_path, 5) / "weights").write_bytes(b"half")
    assert newest_good(tmp_path, rank=0) is None
    assert not (tmp_path / ledger.QUARANTINE).exists()


def test_one_good_checkpoint_is_enough_whatever_was_set_aside(tmp_path: Path) -> None:
    writing = Writing(tmp_path)
    for step in (5, 10):
        writing.save_and_wait(step, small, copied=False)
    os.truncate(writing.folder / "step-00000010" / "weights", 3)
    ledger.set_aside_damaged(writing.folder, newer_than=5)
    found = newest_good(writing.folder, rank=0)
    assert found is not None
    assert found.step == 5


def test_a_final_model_that_a_full_disk_has_no_room_for_is_told_as_a_checkpoint_is(disk: Path) -> None:
    writing = Writing(disk)
    writing.save_and_wait(5, small, copied=False)
    shape: Any = {"n_layer": 1, "n_head": 1, "n_embd": 128, "n_positions": 8, "vocab_size": 30_000}
    model = GPT2LMHeadModel(GPT2Config(**shape))
    tokenizer: Any = SimpleNamespace(save_pretrained=lambda folder: None)
    with pytest.raises(
        TrainingError, match=r"the final model could not be written in .*: No space left"
    ) as caught:
        save_model(model, tokenizer, disk / "model")
    assert "the checkpoints before it are whole" in (caught.value.hint or "")
    assert not last_word(0, 5, caught.value).retry
    assert [path.name for path in disk.iterdir()] == ["checkpoints"], "the last words need room too"
    assert ledger.latest_good(writing.folder) is not None
