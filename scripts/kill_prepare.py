"""Fifty kills against an undisturbed run: SIGKILL at random moments, with random numbers of workers.

./scripts/kill_prepare [--kills N] [--seed N]

The text is the Python standard library's own source, in sources that are a unit each. Each line is one
attempt: how many workers it had, how long it was let run, and how many units were finished when it was
killed. An attempt that finishes first counts as none, and the store is begun again. The end is an
undisturbed attempt; every file must then be the same as in a store that was never disturbed. Exit code 1 if
not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from launcher.data.tokenizers import train_tokenizer

SOURCES = 24
CHARACTERS = 4_000_000  # of each source


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    asked = parser.parse_args()
    print(f"seed {asked.seed}")
    with tempfile.TemporaryDirectory() as folder:
        same = ends_alike(Path(folder), asked.kills, random.Random(asked.seed))
    print("PASS" if same else "FAIL")
    sys.exit(0 if same else 1)


def ends_alike(folder: Path, kills: int, rng: random.Random) -> bool:
    """Whether a store made through so many kills is the store made without one."""
    text = write_text(folder / "text")
    train_tokenizer([text], 2000).save(folder / "tokenizer")
    sources = [{"name": f"{n}", "files": [f"text/{n}.txt"], "weight": 1.0} for n in range(SOURCES)]
    run = {
        "name": "killed",
        "model": {"name": "gpt2", "tokenizer": "tokenizer"},
        "data": {"train": sources, "sample_by": "line", "validation": 0.01},
        "train": {"batch_size": 8, "steps": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    begun = time.monotonic()
    prepare(folder, "calm", 2).wait()
    whole = time.monotonic() - begun
    print(f"undisturbed: {whole:.1f} s")
    cache, survived, kept = folder / "killed", 0, 0
    while survived < kills:
        workers, limit = rng.randint(1, 4), rng.uniform(0.1, 1.1) * whole
        begun, attempt = time.monotonic(), prepare(folder, "killed", workers)
        try:
            attempt.wait(limit)
        except subprocess.TimeoutExpired:
            attempt.kill()
            attempt.wait()
            survived += 1
            kept = len(list(cache.glob("*/units/*.json")))
            print(f"kill {survived:3}: {workers} workers, after {limit:.2f} s, {kept} units finished")
        else:
            print(f"finished before a kill, with {workers} workers: begun again")
            whole, kept = whole if kept else time.monotonic() - begun, 0
            if hashes(cache) != hashes(folder / "calm"):
                return False
            for store in stores(cache):
                shutil.rmtree(store)
    prepare(folder, "killed", 2).wait()
    manifests = [next(iter(stores(folder / name))) / "manifest.json" for name in ("calm", "killed")]
    for name, manifest in zip(("undisturbed", "killed"), manifests, strict=True):
        print(f"{name:12} {hashlib.sha256(manifest.read_bytes()).hexdigest()}")
    return hashes(cache) == hashes(folder / "calm")


def write_text(folder: Path) -> str:
    """A file for each source, with much of the standard library's source; returns the text of one."""
    folder.mkdir()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in sources)
    for number in range(SOURCES):
        own = text[number * 1000 : number * 1000 + CHARACTERS]
        (folder / f"{number}.txt").write_text(f"file {number}\n{own}", encoding="utf-8")
    return text[:CHARACTERS]


def prepare(folder: Path, cache: str, workers: int) -> subprocess.Popen[bytes]:
    """`launcher data prepare` at work, its output in a file."""
    command = [sys.executable, "-m", "launcher", "data", "prepare", "run.yaml"]
    root = Path(__file__).resolve().parent.parent
    with (folder / f"{cache}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, f"data.cache_dir={cache}", "--workers", str(workers)],
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(root)},
        )


def stores(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def hashes(cache: Path) -> dict[str, str]:
    """sha256 of every file of the store, by its path there."""
    (store,) = stores(cache)
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    main()
