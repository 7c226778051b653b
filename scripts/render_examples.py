"""What the examples in configs/ become: configs/rendered/RUN-on-CLUSTER/, and slurm/RUN-on-CLUSTER.sbatch for
those that go through SLURM; the same on every machine.

    ./scripts/render_examples

A test renders them again and compares bytes, so a change in them is seen where it is made.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from launcher.config.load import load_cluster, load_run
from launcher.run.assemble import assemble, rendered_files
from launcher.run.directory import RunDirectory, write_files
from launcher.run.machine import Machine

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
SLURM = ROOT / "slurm"


@dataclass(frozen=True)
class Example:
    """A run on a cluster; `strategy`: one that `auto` would not take."""

    run: str
    cluster: str
    strategy: str | None = None

    @property
    def name(self) -> str:
        return f"{self.run}-on-{self.cluster}" + (f"-{self.strategy}" if self.strategy else "")


EXAMPLES = (
    Example("gpt2", "8x-h100-80gb"),
    Example("gpt2-medium", "8x-h100-80gb"),
    Example("gpt2-large", "8x-h100-80gb"),
    Example("gpt2-xl", "8x-h100-80gb"),
    Example("gpt2-xl", "8x-h100-80gb", "fsdp"),
    Example("gpt2-xl", "8x-a100-40gb"),
    Example("gpt2-xl", "4x8-h100"),
    Example("gpt2", "slurm-cpu"),
    Example("gpt2", "1x-h200"),
    Example("gpt2", "cpu-2-ranks"),
)
MACHINE = Machine(hostname="example", cores=4, memory=16 * 2**30, gpus=(), driver=None)
"""Stands in for the machine that this runs on, which must leave no trace in the files."""


def rendered(example: Example) -> dict[str, str]:
    """The files of `runs/RUN`, name to text, before its text is prepared."""
    overrides = [f"train.strategy={example.strategy}"] if example.strategy else []
    asked = load_run(CONFIGS / "runs" / f"{example.run}.yaml", overrides)
    assembly = assemble(asked, load_cluster(CONFIGS / "clusters" / f"{example.cluster}.yaml"), MACHINE)
    directory = RunDirectory(Path(asked.config.output_dir, asked.config.name))
    files = rendered_files(assembly, directory, None)
    return {path.relative_to(directory.root).as_posix(): text for path, text in files.items()}


def main() -> None:
    shutil.rmtree(CONFIGS / "rendered", ignore_errors=True)  # with files that are not rendered any more
    for script in SLURM.glob("*.sbatch"):
        script.unlink()
    for example in EXAMPLES:
        write_files((place_of(example, name), text) for name, text in rendered(example).items())
        print(CONFIGS.relative_to(ROOT) / "rendered" / example.name)


def place_of(example: Example, name: str) -> Path:
    """Where a rendered file is kept: job scripts side by side in slurm/."""
    if name == "job.sbatch":
        return SLURM / f"{example.name}.sbatch"
    return CONFIGS / "rendered" / example.name / name


if __name__ == "__main__":
    main()
