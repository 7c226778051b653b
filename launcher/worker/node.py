"""One node of a job before training: its versions, what it sees, and all-reduces with each other node.

Started on every node: `python -m launcher.worker.node RUN_DIR WORD HOST,HOST PORT BACKEND`.
Its answer is one line of JSON on standard output (`run.nodes.NodeReport`).
"""

from __future__ import annotations

import contextlib
import errno
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
from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

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
    folder, word, hosts, port, backend = arguments
    directory = RunDirectory(Path(folder))
    number, sees = int(os.environ["SLURM_NODEID"]), _sees(directory, word)
    names = hosts.split(",")
    taken = int(port) if number == 0 and len(names) > 1 and _is_taken(int(port)) else None
    said = {
        "host": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "sees": sees,
        "free": shutil.disk_usage(directory.root).free if sees else 0,
        "gpus": torch.cuda.device_count(),
        "versions": versions(),
        "taken": taken,
        "pairs": _pairs(number, names, int(port), backend) if len(names) > 1 and taken is None else [],
    }
    # In one piece, whatever PYTHONUNBUFFERED says: other nodes write to the same pipe.
    sys.stdout.write(f"{json.dumps(said)}\n")
    sys.stdout.flush()
    return 0


def _sees(directory: RunDirectory, word: str) -> bool:
    """Whether this node reads the word that the supervisor has just written, and may write too."""
    try:
        return directory.node_check.read_text(encoding="utf-8") == word and os.access(directory.root, os.W_OK)
    except OSError:
        return False


def _is_taken(port: int) -> bool:
    """Whether another program on this node has the port: the others would wait for it to speak as we do."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _pairs(number: int, names: list[str], port: int, backend: str) -> list[dict[str, object]]:
    """An all-reduce of node `number` with each other of `names`, and the seconds it took; null where it
    failed, or where one of them was not there."""
    everyone = range(len(names))
    alone = [_told(names[other], None) for other in (everyone[1:] if number == 0 else [0])]
    try:
        store = TCPStore(names[0], port, is_master=number == 0, timeout=STARTING, wait_for_workers=False)
        present = _present(store, number, len(names))
    except Exception as error:  # noqa: BLE001 - whatever it is, this node has not met the first
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return alone
    if number not in present:
        return alone
    found = [_told(names[other], None) for other in everyone if other not in present]
    own = present.index(number)
    for index, pairs in enumerate(rounds(len(present))):
        # Who had a partner that failed comes late, and is not to be taken for one that fails.
        store.add(f"round-{index}", 1)
        _wait_for(store, f"round-{index}", len(present))
        pair = next((each for each in pairs if own in each), None)
        if pair is None:
            continue
        other = pair[1] if pair[0] == own else pair[0]
        meeting = PrefixStore(f"round-{index}-{pair[0]}", store)
        found.append(_told(names[present[other]], _all_reduce(meeting, pair.index(own), backend)))
    # The store is the first node's: it leaves last.
    store.add("done", 1)
    if number == 0:
        _wait_for(store, "done", len(present))
    return found


def _wait_for(store: Store, name: str, count: int) -> None:
    """Wait until so many have added 1 to `name`, for twice as long as a pair may take."""
    deadline = time.monotonic() + 2 * TIMEOUT.total_seconds()
    while store.add(name, 0) < count and time.monotonic() < deadline:
        time.sleep(0.05)


def _told(name: str, seconds: float | None) -> dict[str, object]:
    return {"with": name, "seconds": seconds}


def _present(store: Store, number: int, count: int) -> list[int]:
    """The nodes that are there by the time that the first has waited STARTING for them: it tells the others,
    so that all begin together. Raises what the store does for one that cannot reach it."""
    store.set(f"here-{number}", "")
    if number == 0:
        deadline, here = time.monotonic() + STARTING.total_seconds(), []
        for other in range(count):
            with contextlib.suppress(DistStoreError):
                left = max(0.1, deadline - time.monotonic())
                store.wait([f"here-{other}"], timedelta(seconds=left))
                here.append(other)
        store.set("present", json.dumps(here))
    store.set_timeout(STARTING + TIMEOUT)
    found: list[int] = json.loads(store.get("present"))
    store.set_timeout(TIMEOUT)
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
