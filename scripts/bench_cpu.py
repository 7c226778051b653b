"""The launcher against a bare PyTorch loop, same shape, world and precision, on this machine's CPU.

    ./scripts/bench_cpu [--rounds 7] [--write]

Both train the same GPT-2 shape on the Python standard library's source with two ranks over gloo. A round
is one run of each, one after the other, and who goes first alternates, so that a machine that grows busier
favours neither. Of a run counts its median step; of the rounds, the median ratio of tokens per second.
`--write` keeps the result in docs/benchmarks/cpu.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
SHAPE = {"layers": 4, "heads": 4, "width": 256, "block_size": 256, "micro_batch": 8, "accumulation": 1}
VOCABULARY = 4096
STEPS, WARM = 25, 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="keep the result in docs/benchmarks/cpu.md")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        configure(work)
        run_launcher(work, "prepare", steps=1)
        threads = int(json.loads((work / "runs/prepare/plan.json").read_text())["plan"]["threads_per_rank"])
        rows = []
        for number in range(asked.rounds):
            if number % 2:
                bare = run_bare(work, threads)
                ours = run_launcher(work, f"round-{number}", steps=STEPS)
            else:
                ours = run_launcher(work, f"round-{number}", steps=STEPS)
                bare = run_bare(work, threads)
            rows.append((ours, bare))
            print(
                f"round {number + 1}: launcher {ours:,.0f} tokens/s, bare {bare:,.0f},"
                f" ratio {ours / bare:.3f}",
                flush=True,
            )
    ratio = statistics.median(ours / bare for ours, bare in rows)
    print(f"median ratio {ratio:.3f}")
    if asked.write:
        (ROOT / "docs/benchmarks/cpu.md").write_text(page(rows, ratio, threads), encoding="utf-8")


def configure(work: Path) -> None:
    library = sysconfig.get_path("stdlib")
    (work / "run.yaml").write_text(
        json.dumps(
            {
                "name": "bench",
                "model": {
                    "name": "gpt2",
                    "tokenizer": {"train": {"vocab_size": VOCABULARY}},
                    "overrides": {
                        "n_layer": SHAPE["layers"],
                        "n_head": SHAPE["heads"],
                        "n_embd": SHAPE["width"],
                        "n_positions": SHAPE["block_size"],
                        "resid_pdrop": 0.0,
                        "embd_pdrop": 0.0,
                        "attn_pdrop": 0.0,
                    },
                },
                "data": {
                    "train": [f"{library}/*.py"],
                    "sample_by": "document",
                    "validation": 0,
                    "block_size": SHAPE["block_size"],
                },
                "train": {
                    "batch_size": RANKS * SHAPE["micro_batch"] * SHAPE["accumulation"],
                    "micro_batch": SHAPE["micro_batch"],
                    "steps": STEPS,
                    "log_every": 1,
                    "precision": "fp32",
                },
                "report_to": [],
            }
        )
    )
    (work / "cluster.yaml").write_text(json.dumps({"gpu": "cpu", "gpus_per_node": RANKS}))


def run_launcher(work: Path, name: str, *, steps: int) -> float:
    """Tokens per second of the median step after the first WARM, from the run's own metrics."""
    command = [sys.executable, "-m", "launcher", "train", "run.yaml", "--cluster", "cluster.yaml"]
    command += [f"name={name}", f"train.steps={steps}", f"checkpoint.every={steps}"]
    subprocess.run(command, cwd=work, check=True, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (work / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["tokens_per_second"] for line in lines[min(WARM, steps - 1) :])


def run_bare(work: Path, threads: int) -> float:
    manifest = next((work / "runs" / ".stores").glob("*/manifest.json"))
    tokens = next(manifest.parent.glob("train-*.bin"))
    asked = {
        **SHAPE,
        "vocabulary": VOCABULARY,
        "steps": STEPS,
        "warm": WARM,
        "threads": threads,
        "tokens": str(tokens),
    }
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [
        torchrun,
        "--standalone",
        f"--nproc-per-node={RANKS}",
        ROOT / "scripts/bare_loop.py",
        json.dumps(asked),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["tokens_per_second"])


def page(rows: list[tuple[float, float]], ratio: float, threads: int) -> str:
    import torch

    lines = [
        f"| {n + 1} | {ours:,.0f} | {bare:,.0f} | {ours / bare:.3f} |" for n, (ours, bare) in enumerate(rows)
    ]
    shape = ", ".join(f"{name} {value}" for name, value in SHAPE.items())
    return "\n".join(
        [
            "# CPU: the launcher against a bare PyTorch loop",
            "",
            "`./scripts/bench_cpu --write` wrote this page. Both sides train the same shape in turn, and who",
            "goes first alternates; times on shared machines vary, so the ratio of a round is what counts.",
            "",
            f"{RANKS} ranks over gloo, {threads} thread(s) each, fp32; {shape}, vocabulary {VOCABULARY}; "
            f"the median of {STEPS - WARM} steps after {WARM} of warming up. "
            f"Python {platform.python_version()}, torch {torch.__version__}.",
            "",
            "| round | launcher, tokens/s | bare loop, tokens/s | ratio |",
            "|---|---|---|---|",
            *lines,
            "",
            f"Median ratio: **{ratio:.3f}**.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
