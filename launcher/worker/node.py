"""One node of a job before training: its versions, what it sees, and all-reduces with each other node.

Started on every node: `python -m launcher.worker.node RUN_DIR WORD HOST PORT NODES BACKEND`.
Its answer is one line of JSON on standard output (`run.nodes.NodeReport`).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from launcher.run.directory import RunDirectory
from launcher.run.environment import versions
from launcher.run.nodes import rounds

BYTES: Final = 16 << 20
"""What two nodes add up: enough to tell a slow wire from a slow start."""
TIMEOUT: Final = timedelta(seconds=30)
"""How long a node waits for another. Nodes start within seconds of each other."""
STARTING: Final = timedelta(seconds=180)
"""How long the first waits for all: a cold file system takes its time to load torch."""


def main(arguments: list[str]) -> int:
    """Answer for this node; returns its exit code."""
    folder, word, host, port, count, backend = arguments
    directory = RunDirectory(Path(folder))
    number, sees = int(os.environ["SLURM_NODEID"]), _sees(directory, word)
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    said = {
        "host": name,
        "sees": sees,
        "free": shutil.disk_usage(directory.root).free if sees else 0,
        "versions": versions(),
        "pairs": _pairs(name, number, int(count), host, int(port), backend) if int(count) > 1 else [],
    }
    print(json.dumps(said), flush=True)
    return 0


def _sees(directory: RunDirectory, word: str) -> bool:
    """Whether this node reads the word that the supervisor has just written, and may write too."""
    try:
        return directory.node_check.read_text(encoding="utf-8") == word and os.access(directory.root, os.W_OK)
    except OSError:
        return False


def _pairs(name: str, number: int, count: int, host: str, port: int, backend: str) -> list[dict[str, object]]:
    """An all-reduce with each other node, and the seconds it took; null where it failed."""
    store = TCPStore(host, port, count, is_master=number == 0, timeout=STARTING)
    store.set(f"name-{number}", name)
    names = [store.get(f"name-{other}").decode() for other in range(count)]
    store.set_timeout(TIMEOUT)
    found: list[dict[str, object]] = []
    for index, pairs in enumerate(rounds(count)):
        pair = next((each for each in pairs if number in each), None)
        if pair is None:
            continue
        other = pair[1] if pair[0] == number else pair[0]
        meeting = PrefixStore(f"round-{index}-{pair[0]}", store)
        found.append({"with": names[other], "seconds": _all_reduce(meeting, pair.index(number), backend)})
    # The store is the first node's: it leaves last.
    store.add("done", 1)
    deadline = time.monotonic() + TIMEOUT.total_seconds() * count
    while number == 0 and store.add("done", 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _all_reduce(store: Store, rank: int, backend: str) -> float | None:
    """Seconds for the second of two all-reduces of BYTES: the first makes the connection."""
    device = "cpu" if backend == "gloo" else "cuda:0"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=TIMEOUT)
        tensor = torch.ones(BYTES // 4, device=device)
        dist.all_reduce(tensor)
        float(tensor[-1])  # waits for a GPU
        begun = time.monotonic()
        dist.all_reduce(tensor)
        total = float(tensor[-1])
        return time.monotonic() - begun if total == 4.0 else None
    except Exception as error:  # noqa: BLE001 - whatever it is, these two cannot train together
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
