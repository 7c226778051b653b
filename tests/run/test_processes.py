"""Whether a process lives, and that a killed one is waited for no longer than it lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

from launcher.run.processes import end, kill, lives


def test_one_that_has_ended_lives_no_more_though_nobody_has_asked_how() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = psutil.Process(process.pid)
    assert lives(seen)
    os.kill(process.pid, signal.SIGSTOP)
    assert lives(seen)
    begun = time.monotonic()
    kill([seen], seconds=60)
    assert time.monotonic() - begun < 30, "nobody asks about it meanwhile"
    assert not lives(seen)
    assert seen.status() == psutil.STATUS_ZOMBIE
    process.communicate()
    assert not lives(seen)
    kill([seen], seconds=60)


def test_one_whose_first_thread_has_ended_lives_until_its_last_one_has() -> None:
    script = (
        "import ctypes, os, sys, threading, time\n"
        "threading.Thread(target=sys.stdin.read).start()\n"
        "print(flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        seen = psutil.Process(process.pid)
        while seen.status() != psutil.STATUS_ZOMBIE:
            assert process.poll() is None
            time.sleep(0.01)
        assert lives(seen)
        kill([seen], seconds=60)
        assert not lives(seen)
    finally:
        process.kill()
        process.communicate()


def test_what_was_started_ends_with_all_below_it_whatever_their_sessions() -> None:
    grandchild = "subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1, start_new_session=True)"
    script = f"import subprocess, sys; print(({grandchild}).pid, flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    seen = psutil.Process(int(process.stdout.readline()))
    assert lives(seen)
    end(process)
    assert process.returncode == -signal.SIGKILL
    assert not lives(seen)
    end(process)
    process.communicate()
