"""What the examples in configs/ become: configs/rendered/RUN-on-CLUSTER/, the same on every machine.

    ./scripts/render_examples

A test renders them again and compares bytes, so a change in them is seen where it is made.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from launcher.config.load import load_cluster, load_run
from launcher.run.assemble import assemble, rendered_files
from launcher.run.directory import RunDirectory, write_files
from launcher.run.machine import Machine

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXAMPLES = (
    ("gpt2", "8x-h100-80gb"),
    ("gpt2-medium", "8x-h100-80gb"),
    ("gpt2-large", "8x-h100-80gb"),
    ("gpt2-xl", "8x-h100-80gb"),
    ("gpt2", "cpu-2-ranks"),
)
MACHINE = Machine(hostname="example", cores=4, memory=16 * 2**30, gpus=(), driver=None)
"""Stands in for the machine that this runs on, which must leave no trace in the files."""


def rendered(run: str, cluster: str) -> dict[str, str]:
    """The files of `runs/RUN`, name to text, before its text is prepared."""
    asked = load_run(CONFIGS / "runs" / f"{run}.yaml")
    assembly = assemble(asked, load_cluster(CONFIGS / "clusters" / f"{cluster}.yaml"), MACHINE)
    directory = RunDirectory(Path(asked.config.output_dir, asked.config.name))
    files = rendered_files(assembly, directory, None)
    return {path.relative_to(directory.root).as_posix(): text for path, text in files.items()}


def main() -> None:
    shutil.rmtree(CONFIGS / "rendered", ignore_errors=True)  # with files that are not rendered any more
    for run, cluster in EXAMPLES:
        folder = CONFIGS / "rendered" / f"{run}-on-{cluster}"
        write_files((folder / name, text) for name, text in rendered(run, cluster).items())
        print(folder.relative_to(CONFIGS.parent))


if __name__ == "__main__":
    main()
