"""A store in the making: what is finished is kept, whatever ends it, and the end is the same bytes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.config.schema import DataSection
from launcher.data import units
from launcher.data.damage import find_missing, set_aside, verify_store
from launcher.data.making import UNITS, locked
from launcher.data.prepare import prepare
from launcher.data.store import (
    MANIFEST,
    is_store,
    open_store,
    read_manifest,
)
from launcher.data.tokenizers import Tokenizer
from launcher.data.units import Slice
from launcher.errors import DataError, MachineError, StoreError
from tests.conftest import lacks
from tests.data.conftest import hashes

PREPARE = """
import sys
from pathlib import Path
from launcher.config.schema import DataSection
from launcher.data import units
from launcher.data.prepare import prepare
from launcher.data.tokenizers import load_tokenizer

if __name__ == "__main__":
    _, text, tokenizer, cache, workers, index, count = sys.argv
    units.SMALLEST = 200_000
    data = DataSection(train=[text], validation=0.1)
    part = units.Slice(int(index), int(count))
    prepare(data, load_tokenizer(tokenizer), Path(cache), int(workers), part=part, say=print)
"""


class Interrupting:
    """Progress that ends the making at the nth report."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, *_: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def data_of(corpus: Path) -> DataSection:
    return DataSection(train=[f"{corpus}/*.txt"], validation=0.1)


@pytest.fixture
def undisturbed(corpus: Path, tokenizer: Tokenizer, tmp_path: Path, small_units: None) -> Path:
    """The store of the corpus, in small units, as it is made when nothing happens."""
    return prepare(data_of(corpus), tokenizer, tmp_path / "undisturbed", 1)


# What is kept


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interruption_keeps_what_is_finished(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path, workers: int
) -> None:
    cache = tmp_path / "cache"
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        prepare(data_of(corpus), tokenizer, cache, workers, Interrupting(12), say=said.append)
    assert multiprocessing.active_children() == []
    (folder,) = cache.iterdir()
    kept = list((folder / UNITS).glob("*.json"))
    assert 3 < len(kept) < 20
    assert f"{len(kept)} of" in said[0]
    before = {path: path.stat().st_ino for path in folder.glob("train-*")}
    seen: list[tuple[int, int, int]] = []
    prepare(data_of(corpus), tokenizer, cache, workers, lambda *now: seen.append(now))
    assert hashes(folder) == hashes(undisturbed)
    assert {path: path.stat().st_ino for path in before} == before, "a finished unit was made again"
    assert seen[0][0] > 0
    assert seen[0][2] > 0
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_first_unit_interrupted_leaves_nothing(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(data_of(corpus), tokenizer, tmp_path / "cache", 1, Interrupting(1))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_the_dead_had_in_hand_is_removed_by_who_goes_on(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        prepare(data_of(corpus), tokenizer, cache, 1, Interrupting(4))
    (folder,) = cache.iterdir()
    assert not [path for path in (folder / UNITS).iterdir() if path.is_dir()]
    dead, other = folder / UNITS / "1-of-1.dead", folder / UNITS / "2-of-3.at-work"
    for each in (dead, other):
        each.mkdir()
        (each / "train-00009.bin").write_bytes(b"half")
    there: list[tuple[bool, bool]] = []
    prepare(data_of(corpus), tokenizer, cache, 1, lambda *_: there.append((dead.exists(), other.exists())))
    assert set(there) == {(False, True)}
    assert hashes(folder) == hashes(undisturbed)


def test_what_is_left_in_a_finished_store_is_removed(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    whole, written = hashes(undisturbed), (undisturbed / MANIFEST).stat().st_mtime_ns
    left = undisturbed / UNITS / "2-of-3.dead"
    left.mkdir(parents=True)
    (left / "train-00001.bin").write_bytes(b"half")
    prepare(data_of(corpus), tokenizer, undisturbed.parent, 1)
    assert hashes(undisturbed) == whole
    assert (undisturbed / MANIFEST).stat().st_mtime_ns == written


@pytest.mark.parametrize("harm", ["short shard", "no shard", "half a record", "no record"])
def test_a_unit_that_is_not_whole_is_made_again(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path, harm: str
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        prepare(data_of(corpus), tokenizer, cache, 1, Interrupting(12))
    (folder,) = cache.iterdir()
    shard, record = folder / "train-00002.bin", folder / UNITS / "00002.json"
    if harm == "short shard":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif harm == "no shard":
        shard.unlink()
    elif harm == "half a record":
        record.write_bytes(record.read_bytes()[:40])
    else:
        record.unlink()
    prepare(data_of(corpus), tokenizer, cache, 1)
    assert hashes(folder) == hashes(undisturbed)


def test_bad_text_keeps_what_is_finished(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (corpus / "b.txt").write_bytes((corpus / "b.txt").read_bytes() + b"\n\xff")
    said: list[str] = []
    with pytest.raises(DataError, match=r"b\.txt:501"):
        prepare(data_of(corpus), tokenizer, tmp_path / "cache", 1, say=said.append)
    (folder,) = (tmp_path / "cache").iterdir()
    assert list((folder / UNITS).glob("*.json"))
    assert not is_store(folder)
    assert "--skip-bad" in said[0]


# Kills


@contextmanager
def preparing(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def script(lines: list[str], tokenizer: Tokenizer, tmp_path: Path) -> list[str]:
    """A command that prepares some megabytes of text; a cache folder, workers and a slice are to be added."""
    (tmp_path / "go.py").write_text(PREPARE)
    (tmp_path / "long.txt").write_text("\n".join(f"{line} {n}" for n in range(250) for line in lines))
    tokenizer.save(tmp_path / "tokenizer")
    return [sys.executable, str(tmp_path / "go.py"), str(tmp_path / "long.txt"), str(tmp_path / "tokenizer")]


def store_in(cache: Path) -> Path:
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def test_kills_at_any_moment_change_nothing(script: list[str], tmp_path: Path) -> None:
    subprocess.run([*script, str(tmp_path / "calm"), "2", "1", "1"], check=True, env=with_path())
    calm = hashes(store_in(tmp_path / "calm"))
    assert len(calm) > 60
    rng = random.Random(3)
    kills, cache = 0, tmp_path / "cache"
    while kills < 8:
        command = [*script, str(cache), str(rng.choice([1, 2, 3])), "1", "1"]
        with preparing(command) as process:
            begun = len(list(cache.glob("*/units/*.json")))
            # From the first unit that this attempt finishes, so that every attempt gets somewhere.
            while process.poll() is None and len(list(cache.glob("*/units/*.json"))) == begun:
                time.sleep(0.01)
            time.sleep(rng.random() / 4)
            if process.poll() is not None:
                assert process.returncode == 0
                shutil.rmtree(cache)
                continue
            process.send_signal(signal.SIGKILL)
            kills += 1
    subprocess.run([*script, str(cache), "2", "1", "1"], check=True, env=with_path())
    assert hashes(store_in(cache)) == calm


def with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path.cwd())}


def test_parts_at_once_with_one_killed(script: list[str], tmp_path: Path) -> None:
    subprocess.run([*script, str(tmp_path / "calm"), "1", "1", "1"], check=True, env=with_path())
    cache = tmp_path / "cache"
    commands = [[*script, str(cache), "1", str(index), "3"] for index in (1, 2, 3)]
    with preparing(commands[0]) as first, preparing(commands[1]) as second, preparing(commands[2]) as third:
        while not list(cache.glob("*/units/*.json")):
            time.sleep(0.01)
        second.kill()
        for process in (first, third):
            assert process.wait(60) == 0
    assert not is_store(store_in(cache))
    done = subprocess.run(commands[1], check=True, env=with_path(), capture_output=True, text=True)
    assert is_store(store_in(cache)), done.stdout
    assert hashes(store_in(cache)) == hashes(store_in(tmp_path / "calm"))
    assert not list(cache.glob("*.[1-3]-of-3.lock"))


def test_units_that_others_finish_meanwhile(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The store is sealed by others, and the folder of what is in hand removed, in the middle of a unit."""
    others = [Slice(1, 2), Slice(2, 2)]

    def overtake(*_: int) -> None:
        while others:
            prepare(data_of(corpus), tokenizer, tmp_path / "cache", 1, part=others.pop())

    folder = prepare(data_of(corpus), tokenizer, tmp_path / "cache", 1, overtake)
    assert others == []
    assert hashes(folder) == hashes(undisturbed)
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_the_same_part_twice_at_once(script: list[str], tmp_path: Path) -> None:
    command = [*script, str(tmp_path / "cache"), "1", "1", "1"]
    with preparing(command) as one, preparing(command) as other:
        assert one.wait(60) == 0
        assert other.wait(60) == 0
    assert verify_store(store_in(tmp_path / "cache")) == []
    assert not (store_in(tmp_path / "cache") / UNITS).exists()


def test_a_plain_prepare_finishes_the_parts(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    said: list[str] = []
    folder = prepare(data_of(corpus), tokenizer, cache, 1, part=Slice(2, 3), say=said.append)
    assert not is_store(folder)
    assert "2-of-3" in said[0]
    made = {path.stem for path in (folder / UNITS).glob("*.json")}
    assert made
    assert all(int(name) % 3 == 1 for name in made)
    # Someone else's part is in hand: it is left alone by whoever fails, and removed by whoever seals.
    left = folder / UNITS / "1-of-3.left"
    left.mkdir()
    assert hashes(prepare(data_of(corpus), tokenizer, cache, 1)) == hashes(undisturbed)


def test_a_lock_keeps_out_whoever_waited_for_a_removed_one(tmp_path: Path) -> None:
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        for _ in range(50):
            with locked(tmp_path / "a.lock"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0002)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


# A disk that is full


def test_a_full_disk_in_mid_shard(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        lacks(f"no file system can be mounted: {mounted.stderr.strip()}")
    try:
        said: list[str] = []
        with pytest.raises(MachineError, match="cannot be written: No space left on device") as refused:
            prepare(data_of(corpus), tokenizer, disk / "cache", 1, say=said.append)
        assert str(disk) in refused.value.message
        assert "make room" in (refused.value.hint or "")
        (folder,) = (disk / "cache").iterdir()
        assert not is_store(folder)
        assert "kept" in said[0]
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        prepare(data_of(corpus), tokenizer, disk / "cache", 1)
        assert hashes(folder) == hashes(undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_in_a_worker(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "SMALLEST", 30_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The tokenizer's files are larger than this, so they are put there first.
    with pytest.raises(KeyboardInterrupt):
        prepare(data_of(corpus), tokenizer, tmp_path / "cache", 2, Interrupting(3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        with pytest.raises(MachineError, match="cannot be written: File too large"):
            prepare(data_of(corpus), tokenizer, tmp_path / "cache", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not is_store(store_in(tmp_path / "cache"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see which file is synced")
@pytest.mark.parametrize("kind", ["bin", "idx", "doc", "0.json.", f"{MANIFEST}."])
def test_a_disk_that_fails_when_a_file_is_synced(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    sync = os.fsync

    def failing(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.rstrip("0123456789").endswith(kind):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(MachineError, match="cannot be written: Input/output error"):
            prepare(data_of(corpus), tokenizer, tmp_path / "cache", 1)
    assert not list(tmp_path.glob(f"cache/*/{MANIFEST}"))
    assert (kind == f"{MANIFEST}.") == bool(list(tmp_path.glob("cache/*/*.bin")))
    folder = prepare(data_of(corpus), tokenizer, tmp_path / "cache", 1)
    assert hashes(folder) == hashes(undisturbed)


# Damage, and its repair


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_each_damaged_file_is_made_again_to_the_same_bytes(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole = hashes(undisturbed)
    inodes = {path: path.stat().st_ino for path in undisturbed.rglob("*")}
    some = ["train-00003.bin", "train-00004.idx", "validation-00005.doc", "tokenizer/tokenizer.json"]
    for name in [*some, MANIFEST]:
        flip(undisturbed / name)
        said: list[str] = []
        if name == MANIFEST:
            with pytest.raises(StoreError) as refused:
                open_store(undisturbed)
            assert "launcher data prepare RUN" in (refused.value.hint or "")
        else:
            damage = verify_store(undisturbed)
            assert [each.file for each in damage] == [undisturbed / name]
            set_aside(damage)
            assert any(find_missing(undisturbed, read_manifest(undisturbed)))
        prepare(data_of(corpus), tokenizer, undisturbed.parent, 1, say=said.append)
        assert hashes(undisturbed) == whole, name
        assert said
        if name != MANIFEST:
            assert {
                path.relative_to(undisturbed).as_posix()
                for path, inode in inodes.items()
                if path.exists() and path.stat().st_ino != inode
            } == {name}
            inodes = {path: path.stat().st_ino for path in undisturbed.rglob("*")}


def test_a_shard_that_is_gone_is_made_again_by_its_part(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    whole = hashes(undisturbed)
    for name in ("train-00003.bin", "train-00004.bin"):
        (undisturbed / name).unlink()
    prepare(data_of(corpus), tokenizer, undisturbed.parent, 1, part=Slice(1, 2))
    assert not (undisturbed / "train-00003.bin").exists()
    assert (undisturbed / "train-00004.bin").exists()
    prepare(data_of(corpus), tokenizer, undisturbed.parent, 1, part=Slice(2, 2))
    assert hashes(undisturbed) == whole


def test_text_that_changed_in_secret_mends_nothing(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    file = corpus / "a.txt"
    times = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes().replace(b"fox", b"cow"))
    os.utime(file, ns=(times, times))
    (undisturbed / "train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"a\.txt no longer give"):
        prepare(data_of(corpus), tokenizer, undisturbed.parent, 1)
    assert not (undisturbed / "train-00000.bin").exists()
    assert not (undisturbed / UNITS).exists()


def test_a_run_that_reads_a_store_reads_on_while_it_is_mended(
    undisturbed: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    store = open_store(undisturbed)
    shard = store.manifest.shards[0]
    mapped = store.tokens(shard)
    before = mapped.tolist()
    (undisturbed / f"{shard.name}.idx").unlink()
    prepare(data_of(corpus), tokenizer, undisturbed.parent, 1)
    assert mapped.tolist() == before
