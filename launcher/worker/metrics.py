"""What a run tells of itself: metrics.jsonl, and one progress bar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from launcher.durable import write_whole


class MetricsFile:
    """`metrics.jsonl`: one object a line, each flushed as it is written.

    A resumed run drops the lines after the step it goes on from, so that no step stands there twice.
    """

    def __init__(self, file: Path, resumed_from: int) -> None:
        if file.exists():
            _keep_until(file, resumed_from)
        self._stream = file.open("a", encoding="utf-8")

    def write(self, numbers: Mapping[str, float | int | str | None]) -> None:
        self._stream.write(json.dumps(numbers) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _keep_until(file: Path, step: int) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    write_whole(file, (line.encode() for line in kept))


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""tqdm's own without steps a second, so that 80 columns hold it and the numbers."""


class Progress:
    """One bar on a terminal; a plain line a report elsewhere."""

    def __init__(self, stream: TextIO, *, steps: int, done: int, name: str) -> None:
        self._stream = stream
        self._steps = steps
        self._bar = (
            tqdm(total=steps, initial=done, desc=name, bar_format=BAR, file=stream, dynamic_ncols=True)
            if stream.isatty()
            else None
        )

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def report(self, numbers: Mapping[str, float | int | None]) -> None:
        """Show the newest numbers: training's in the bar, an evaluation's in a line of its own."""
        shown = {
            name: numbers[name]
            for name in ("loss", "eval_loss", "tokens_per_second")
            if numbers.get(name) is not None
        }
        if self._bar is not None and "eval_loss" not in shown:
            self._bar.set_postfix_str(
                ", ".join(
                    f"{value:,.0f} tok/s" if name == "tokens_per_second" else f"{name} {value:,.4g}"
                    for name, value in shown.items()
                )
            )
            return
        text = "  ".join(
            f"{name} {value:,.4f}" if "loss" in name else f"{name} {value:,.0f}"
            for name, value in shown.items()
        )
        line = f"step {numbers['step']}/{self._steps}  {text}"
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
