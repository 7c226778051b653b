"""`job.sbatch`: what sbatch is given, made from the one template or the user's own."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from launcher.config.schema import SlurmSection
from launcher.errors import RequestError

CPUS_PER_GPU: Final = 8
"""CPUs asked for with each GPU where nothing is said: the rank, its data loading and NCCL's threads."""

_OPTIONS: Final = ("partition", "account", "qos", "constraint", "reservation")


@dataclass(frozen=True, slots=True)
class BatchJob:
    """A batch job. `command` is its last, as the shell reads it; GPUs or CPUs of None are not asked for.

    `lead`: seconds before the time limit at which it is told, None for one that need not be. `array` is the
    range of its indices, `file` the script's name in `directory`.
    """

    name: str
    directory: str
    command: str
    nodes: int
    gpus_per_node: int | None
    cpus_per_node: int | None
    slurm: SlurmSection
    env: Mapping[str, str]
    lead: int | None
    array: str | None = None
    file: str = "job.sbatch"


def supervise_command(launcher: str, directory: str) -> str:
    """Supervise the run in `directory`; `launcher` is the command's path on the nodes."""
    return shlex.join([launcher, "supervise", directory])


def sweep_command(launcher: str, directories: Sequence[str]) -> str:
    """Supervise the run in that one of `directories` which is this element's, in an array from 0 on.

    They stand in the script itself, of which SLURM keeps a copy: a file of them could be another sweep's by
    the time that an element starts, or starts again.
    """
    own = '"${@:SLURM_ARRAY_TASK_ID+1:1}"'
    each = f"exec {shlex.quote(launcher)} supervise {own}"
    return shlex.join(["bash", "-c", each, "sweep", *directories])


def prepare_command(launcher: str, directory: str, count: int) -> str:
    """Prepare this element's part of the text of the run in `directory`, in an array from 1 to `count`."""
    files = [f"{directory}/config.yaml", "--cluster", f"{directory}/cluster.yaml"]
    return f'{shlex.join([launcher, "data", "prepare", *files])} --units "$SLURM_ARRAY_TASK_ID/{count}"'


def cpus_per_node(slurm: SlurmSection, ranks: int, *, on_cpu: bool) -> int | None:
    """CPUs to ask for on a node with `ranks` ranks; None: all that an exclusive node has."""
    if slurm.cpus_per_node is not None or slurm.exclusive is True:
        return slurm.cpus_per_node
    return ranks if on_cpu else ranks * CPUS_PER_GPU


def render_job(job: BatchJob, template: str) -> str:
    """The text of the job script. Raises RequestError for a template that cannot be filled in."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"quoted": quoted, "shell": shlex.quote, "comment": _on_one_line}
    try:
        return environment.from_string(template).render(_values(job))
    except jinja2.TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise RequestError(
            f"the job template cannot be filled in: {error.message}{line}",
            hint="slurm/job.sbatch.j2 uses every value there is",
            key="slurm.template",
        ) from error


def _values(job: BatchJob) -> dict[str, Any]:
    slurm = job.slurm
    options = [(name, value) for name in _OPTIONS if (value := getattr(slurm, name)) is not None]
    if slurm.time_limit is not None:
        options.append(("time", slurm.time_limit))
    if slurm.memory is not None:
        options.append(("mem", slurm.memory))
    if slurm.exclude:
        options.append(("exclude", ",".join(slurm.exclude)))
    gpus = job.gpus_per_node
    index = "%A_%a" if job.array else "%j"
    return {
        "name": job.name,
        "script": shlex.quote(f"{job.directory}/{job.file}"),
        "directory": job.directory,
        "command": job.command,
        "nodes": job.nodes,
        "gpus_per_node": f"{slurm.gpu_type}:{gpus}" if gpus and slurm.gpu_type else gpus,
        "cpus_per_node": job.cpus_per_node,
        "options": options,
        "exclusive": slurm.exclusive,
        "extra": [line.removeprefix("#SBATCH").strip() for line in slurm.extra],
        "setup": slurm.setup,
        "env": list(job.env.items()),
        "lead": job.lead,
        # sbatch fills in %j and the like, so a name's own percent sign is doubled.
        "log": f"{job.directory.replace('%', '%%')}/logs/{job.file.removesuffix('.sbatch')}-{index}.log",
        "array": job.array,
    }


def quoted(value: str) -> str:
    """A value of an #SBATCH line, quoted where sbatch would read it otherwise (tried with Slurm 22.05)."""
    if value and all(letter.isalnum() or letter in "-_./:=+@%," for letter in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _on_one_line(value: str) -> str:
    return " ".join(value.split())
