"""The short form of `scripts/chaos`: what it prints is what it found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_run_that_is_stopped_killed_and_damaged_is_the_same_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chaos", "--short", "--seed", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and " pass " in line]
    assert len(rows) == (7 if os.getuid() == 0 else 5)
