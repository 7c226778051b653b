from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.durable import Mark, mark_of
from launcher.errors import RequestError, TrainingError
from launcher.run import checkpoints as ledger
from tests.conftest import lacks


def save(folder: Path, step: int, content: bytes = b"weights") -> ledger.Checkpoint:
    temporary = ledger.begin(folder, step)
    (temporary / "model.safetensors").write_bytes(content)
    (temporary / "part").mkdir()
    (temporary / "part" / "rank-1.pt").write_bytes(b"optimizer")
    return ledger.commit(temporary, step=step, samples=step * 8, world_size=2, created=1.5)


def test_a_committed_checkpoint_is_whole_and_read_back(tmp_path: Path) -> None:
    written = save(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    (found,) = ledger.committed(tmp_path)
    assert found == written
    assert (found.step, found.samples, found.world_size, found.bytes) == (5, 40, 2, len(b"weightsoptimizer"))
    assert found.damage() == []


def test_what_was_never_committed_is_no_checkpoint(tmp_path: Path) -> None:
    temporary = ledger.begin(tmp_path, 5)
    (temporary / "model.safetensors").write_bytes(b"half")
    assert ledger.committed(tmp_path) == []
    assert ledger.latest_good(tmp_path) is None
    again = ledger.begin(tmp_path, 5)
    assert list(again.iterdir()) == [], "what a crash left is not taken over"


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove", "manifest", "count", "outside", "no manifest"]
)
def test_a_damaged_newest_is_found_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10).folder
    file = newest / "model.safetensors"
    if damage == "flip":
        file.write_bytes(b"weightz")
    elif damage == "truncate":
        os.truncate(file, 3)
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        os.truncate(newest / ledger.MANIFEST, 20)
    elif damage == "count":
        manifest = (newest / ledger.MANIFEST).read_text()
        (newest / ledger.MANIFEST).write_text(manifest.replace('"samples": 80', '"samples": 88'))
    elif damage == "outside":
        (tmp_path / "elsewhere").write_bytes(file.read_bytes())
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere")
    else:
        (newest / ledger.MANIFEST).unlink()
    good = ledger.latest_good(tmp_path)
    assert good is not None
    assert good.step == 5
    ((name, reason),) = ledger.set_aside_damaged(tmp_path, newer_than=5)
    assert name == "step-00000010"
    assert ("model.safetensors" in reason) or ("MANIFEST.json" in reason)
    assert (tmp_path / "quarantine" / "step-00000010" / "WHY.txt").read_text() == f"{reason}\n"
    assert [each.step for each in ledger.committed(tmp_path)] == [5]


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    ledger.prune(tmp_path, keep=2, protect=(1,))
    assert [each.step for each in ledger.committed(tmp_path)] == [1, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (1, 3, 4)]


def test_the_same_step_again_replaces_the_old(tmp_path: Path) -> None:
    save(tmp_path, 5, b"before")
    save(tmp_path, 5, b"after!")
    (found,) = ledger.committed(tmp_path)
    assert (found.folder / "model.safetensors").read_bytes() == b"after!"
    assert found.damage() == []


def test_the_manifest_names_every_file_with_size_and_hash(tmp_path: Path) -> None:
    folder = save(tmp_path, 5).folder
    manifest = json.loads((folder / ledger.MANIFEST).read_text())
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    assert sizes == {"model.safetensors": 7, "part/rank-1.pt": 9}


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret", "part/../../secret"])
def test_a_manifest_that_names_a_file_elsewhere_is_none(tmp_path: Path, name: str) -> None:
    newest = save(tmp_path, 5).folder
    manifest = json.loads((newest / ledger.MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["model.safetensors"]
    del manifest["sha256"]
    (newest / ledger.MANIFEST).write_text(json.dumps({**manifest, "sha256": ledger._own_hash(manifest)}))
    assert ledger.committed(tmp_path) == []
    (reasons,) = ledger.damages(tmp_path, None).values()
    assert reasons is not None
    assert reasons == ["no readable MANIFEST.json"]


def test_a_manifest_of_another_version_or_without_its_own_hash_is_none(tmp_path: Path) -> None:
    newest = save(tmp_path, 5).folder
    manifest = json.loads((newest / ledger.MANIFEST).read_text())
    del manifest["sha256"]
    older = {**manifest, "version": 1}
    for other in (manifest, older, {**older, "sha256": ledger._own_hash(older)}):
        (newest / ledger.MANIFEST).write_text(json.dumps(other))
        assert ledger.committed(tmp_path) == []


def test_a_crash_while_one_is_replaced_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5, b"before")
    rename = Path.rename

    def crash(path: Path, target: Path) -> Path:
        if path.name.endswith(".writing"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5, b"after!")
    assert ledger.committed(tmp_path) == []
    monkeypatch.undo()
    good = ledger.latest_good(tmp_path)
    assert good is not None
    assert (good.folder / "model.safetensors").read_bytes() == b"before"


def test_what_is_not_whole_is_not_among_the_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "model.safetensors").unlink()
    ledger.prune(tmp_path, keep=1, protect=())
    assert [each.step for each in ledger.committed(tmp_path)] == [2, 3]
    assert ledger.latest_good(tmp_path) == ledger.committed(tmp_path)[0]


def test_what_cannot_be_deleted_yet_does_not_fail_the_save(tmp_path: Path) -> None:
    """As on a network file system, where a file that somebody reads stays."""
    busy = save(tmp_path, 5).folder / "busy"
    busy.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(busy)], capture_output=True)
    if mounted.returncode:
        lacks(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        save(tmp_path, 10)
        ledger.prune(tmp_path, keep=1, protect=())
        save(tmp_path, 15)
        assert [each.step for each in ledger.committed(tmp_path)] == [10, 15]
    finally:
        subprocess.run(["umount", "-l", *map(str, tmp_path.rglob("busy"))], check=True)
    save(tmp_path, 20)
    assert not list(tmp_path.glob(".*"))


def test_a_folder_gets_its_name_once_all_in_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "weights").write_bytes(b"w")
    synced: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    ledger.publish(tmp_path / "new", tmp_path / "model")
    assert sorted(synced[:3]) == ["deep", "new", "weights"]
    assert synced[3:] == [tmp_path.name]
    assert (tmp_path / "model" / "deep" / "weights").read_bytes() == b"w"


def test_what_a_rank_has_sealed_is_in_the_manifest_though_it_is_not_listed_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = ledger.begin(tmp_path, 5)
    (temporary / "rank-1.pt").write_bytes(b"optimizer")
    sealed = ledger.seal(temporary, ["rank-1.pt"])
    monkeypatch.setattr(ledger, "names_in", lambda folder: [])
    made = ledger.commit(temporary, step=5, samples=40, world_size=2, created=0.0, sealed=sealed)
    assert list(made.files) == ["rank-1.pt"]


def test_a_sector_that_cannot_be_read_is_damage_and_the_one_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10).folder
    read = mark_of

    def fails(file: Path) -> Mark:
        if file.parent == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file)

    monkeypatch.setattr(ledger, "mark_of", fails)
    found = ledger.latest_good(tmp_path)
    assert found is not None
    assert found.step == 5
    (reasons,) = ledger.damages(tmp_path, 10).values()
    assert reasons == [f"{name} cannot be read: Input/output error" for name in ("model.safetensors",)]


def test_one_that_a_run_removes_while_it_is_verified_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    read = mark_of

    def prune(file: Path) -> Mark:
        ledger.prune(tmp_path, keep=1, protect=())
        return read(file)

    monkeypatch.setattr(ledger, "mark_of", prune)
    assert ledger.damages(tmp_path, None) == {
        "step-00000001": None,
        "step-00000002": None,
        "step-00000003": [],
    }
    save(tmp_path, 4)
    with pytest.raises(RequestError, match="the checkpoint of step 3 was removed or replaced meanwhile"):
        ledger.good_at(tmp_path, 3)


def test_one_that_a_run_replaces_while_it_is_verified_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5, b"before")
    read = mark_of

    def replace(file: Path) -> Mark:
        monkeypatch.setattr(ledger, "mark_of", read)
        save(tmp_path, 5, b"after")
        return read(file)

    monkeypatch.setattr(ledger, "mark_of", replace)
    assert ledger.damages(tmp_path, 5) == {"step-00000005": None}
    assert ledger.damages(tmp_path, 5) == {"step-00000005": []}


def test_what_was_set_aside_is_told_with_its_reason(tmp_path: Path) -> None:
    for step in (5, 10):
        (save(tmp_path, step).folder / "model.safetensors").unlink()
        assert ledger.set_aside_damaged(tmp_path, newer_than=-1)
    save(tmp_path, 10)
    (tmp_path / "step-00000010" / ledger.MANIFEST).unlink()
    ledger.set_aside_damaged(tmp_path, newer_than=-1)
    (tmp_path / "quarantine" / "step-00000005" / ledger.REASON).unlink()
    assert ledger.quarantined(tmp_path) == {
        "step-00000005": "its WHY.txt is missing",
        "step-00000010": "model.safetensors is missing",
        "step-00000010.2": "no readable MANIFEST.json",
    }
    assert ledger.quarantined(tmp_path / "elsewhere") == {}


def test_a_crash_before_the_replaced_one_is_deleted_leaves_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5, b"before")
    monkeypatch.setattr(ledger, "_delete", lambda folder: None)
    save(tmp_path, 5, b"after!")
    monkeypatch.undo()
    assert (tmp_path / ".step-00000005.replaced").is_dir()
    for turn in ("as the next attempt finds it", "and once it has begun to save"):
        good = ledger.latest_good(tmp_path)
        assert good is not None
        assert (good.folder / "model.safetensors").read_bytes() == b"after!", turn
        ledger.begin(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-00000010.writing", "step-00000005"]


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"f_bavail": 100, "f_files": 0, "f_favail": 0}, None),
        ({"f_bavail": 100, "f_files": 9, "f_favail": 2}, "about 3 files in .*, and there are inodes for 2"),
        ({"f_bavail": 99, "f_files": 0, "f_favail": 0}, "needs about .* in .*, and .* are free"),
    ],
    ids=["inodes as they are needed", "no inodes", "what is left is root's"],
)
def test_room_is_what_anyone_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: dict[str, int], told: str | None
) -> None:
    found = SimpleNamespace(f_frsize=4096, f_bfree=200, f_ffree=there["f_files"], **there)
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    expected = contextlib.nullcontext() if told is None else pytest.raises(TrainingError, match=told)
    with expected:
        ledger.check_room(tmp_path, size=100 * 4096, files=3)
