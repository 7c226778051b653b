"""How long a command takes to answer: wall time of whole processes, the median of five.

./scripts/bench_start [--write]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
LIMIT = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="keep the result in docs/benchmarks/start.md")
    asked = parser.parse_args()
    launcher = str(Path(sys.executable).with_name("launcher"))
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "launcher --help": [launcher, "--help"],
        "launcher plan configs/runs/gpt2.yaml": [launcher, "plan", "configs/runs/gpt2.yaml"],
        "launcher plan configs/runs/gpt2-xl.yaml --cluster configs/clusters/8x-h100-80gb.yaml": [
            *(launcher, "plan", "configs/runs/gpt2-xl.yaml"),
            *("--cluster", "configs/clusters/8x-h100-80gb.yaml"),
        ],
    }
    rows = {name: median_seconds(command) for name, command in commands.items()}
    lines = [f"| `{name}` | {seconds:.3f} | {seconds / LIMIT:.2f} |" for name, seconds in rows.items()]
    text = "\n".join(["| command | seconds | of the 0.3 s allowed |", "|---|---|---|", *lines, ""])
    print(text)
    if asked.write:
        head = (
            f"# How quickly a command answers\n\n`./scripts/bench_start --write`: the median of {ROUNDS}.\n\n"
        )
        (ROOT / "docs/benchmarks/start.md").write_text(head + text, encoding="utf-8")


def median_seconds(command: list[str]) -> float:
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
