"""What SLURM takes: the forms of its values, the options that launcher writes itself, the rules of both."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from launcher.errors import Fault

SLURM_KEYS: Final = tuple(
    f"slurm.{name}"
    for name in (
        *("partition", "account", "qos", "time_limit", "constraint", "reservation", "exclude", "exclusive"),
        *("gpu_type", "cpus_per_node", "memory", "setup", "container", "extra", "template"),
    )
)
"""Every key of `slurm`, in the order of the schema."""

OWN_OPTIONS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("job-name", "J"), "it is the run's name"),
    **dict.fromkeys(("nodes", "N"), "set nodes"),
    **dict.fromkeys(("ntasks", "n", "ntasks-per-node"), "each node runs one `accelerate launch`"),
    **dict.fromkeys(("gpus", "G", "gpus-per-node", "gpus-per-task", "gres"), "set gpus_per_node"),
    **dict.fromkeys(("cpus-per-task", "c"), "set slurm.cpus_per_node"),
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), "set slurm.memory"),
    **dict.fromkeys(("time", "t"), "set slurm.time_limit"),
    **dict.fromkeys(("partition", "p"), "set slurm.partition"),
    **dict.fromkeys(("account", "A"), "set slurm.account"),
    **dict.fromkeys(("qos", "q"), "set slurm.qos"),
    **dict.fromkeys(("constraint", "C"), "set slurm.constraint"),
    **dict.fromkeys(("exclude", "x"), "set slurm.exclude"),
    "reservation": "set slurm.reservation",
    "exclusive": "set slurm.exclusive",
    **dict.fromkeys(("output", "o", "error", "e", "open-mode"), "logs are in the run directory"),
    **dict.fromkeys(("requeue", "no-requeue"), "a run that is not finished is requeued"),
    "signal": "the supervisor is told before the time limit",
    **dict.fromkeys(("array", "a"), "use `launcher submit --sweep`"),
    **dict.fromkeys(("dependency", "d"), "use `launcher submit --then`"),
    **dict.fromkeys(("chdir", "D"), "the job runs in the folder that you submit from"),
    "export": "set env",
    **dict.fromkeys(("wait", "W"), "use `launcher submit --wait`"),
}
"""Options of sbatch, long and short, that launcher writes itself, and what to do instead."""

_OTHER_NAMES: Final = {"ARRAY": "ARRAY_INX", "TIME": "TIMELIMIT", "MEM": "MEM_PER_NODE"}
_TIME_LIMIT = re.compile(r"(?:([0-9]+)-)?([0-9]+(?::[0-9]+){0,2})")
_MEMORY = re.compile(r"([0-9]+)([KMGT]?)")
UNITS: Final[Mapping[str, int]] = {"K": 1 << 10, "": 1 << 20, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_OPTION = re.compile(r"--?([A-Za-z][A-Za-z-]*)([= ].*)?")


def variable(option: str) -> str:
    """The environment variable by which sbatch takes a long option; it overrules the job script."""
    name = option.upper().replace("-", "_")
    return f"SBATCH_{_OTHER_NAMES.get(name, name)}"


def time_limit_seconds(value: str) -> float:
    """Seconds in a time limit as sbatch takes it: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`; UNLIMITED.

    Raises ValueError for anything else, and for no time at all.
    """
    if value == "UNLIMITED":
        return math.inf
    match = _TIME_LIMIT.fullmatch(value)
    if match is None:
        raise ValueError("expected a time limit such as 24:00:00, 2-00:00:00 or 90 (minutes)")
    days, parts = match[1], [int(part) for part in match[2].split(":")]
    if days is None and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    if total == 0:
        raise ValueError("expected a time limit above zero")
    return total


def check_time_limit(value: str) -> str:
    """The value itself. Raises ValueError for what sbatch would not take."""
    time_limit_seconds(value)
    return value


def check_memory(value: str) -> str:
    """The value itself. Raises ValueError for what sbatch would not take."""
    if _MEMORY.fullmatch(value) is None:
        raise ValueError("expected memory such as 200G or 64000M, or 0 for all of it")
    return value


def memory_bytes(value: str | None) -> int | None:
    """Bytes in an amount of memory as sbatch takes it, MiB without a unit; None: none is said, or all."""
    match = _MEMORY.fullmatch(value or "0")
    assert match is not None, value
    return int(match[1]) * UNITS[match[2]] or None


def needs_a_description(launch: str, gpus_per_node: object, gpu: object) -> Iterator[Fault]:
    """This machine is the login node: what it has says nothing of the nodes."""
    if launch != "slurm":
        return
    for path, value, example in (("gpus_per_node", gpus_per_node, "8"), ("gpu", gpu, "h100-sxm-80gb")):
        if value == "auto":
            yield Fault(
                path,
                "auto looks at this machine, and with launch: slurm the nodes are others",
                hint=f"write what a node has, such as {path}: {example}",
            )


def slurm_unused(launch: str, *values: Any) -> Iterator[Fault]:
    """A key of `slurm` that is set in a cluster that does not go through SLURM."""
    if launch == "slurm":
        return
    for path, value in zip(SLURM_KEYS, values, strict=True):
        if value not in (None, [], False):
            yield Fault(
                path, "launch is local, and this is for SLURM", hint="set launch: slurm, or take it out"
            )


def single_lines(*values: Any) -> Iterator[Fault]:
    """An #SBATCH option is one line; only lines of `slurm.setup` may hold several."""
    for path, value in zip(SLURM_KEYS, values, strict=True):
        for index, text in enumerate(value if isinstance(value, list) else [value]):
            if path == "slurm.setup" or not isinstance(text, str):
                continue
            if not text.isprintable() or not text.strip():
                where = f"{path}.{index}" if isinstance(value, list) else path
                yield Fault(where, "expected one line of text", hint="take line breaks and the like out")


def options_as_written(extra: list[str]) -> Iterator[Fault]:
    """`slurm.extra` holds options of sbatch, and none that launcher writes itself."""
    for index, text in enumerate(extra):
        match = _OPTION.fullmatch(text.removeprefix("#SBATCH").strip())
        if match is None:
            yield Fault(
                f"slurm.extra.{index}", f"{text!r} is no option of sbatch", hint="write it as --mail-type=END"
            )
        elif match[1] in OWN_OPTIONS and not _other_resources(match[1], match[2] or ""):
            yield Fault(
                f"slurm.extra.{index}", f"launcher writes --{match[1]} itself", hint=OWN_OPTIONS[match[1]]
            )


def _other_resources(option: str, value: str) -> bool:
    """Whether it asks for generic resources, such as a disk of the node's own, and no GPUs among them."""
    return option == "gres" and "gpu" not in re.findall(r"\w+", value)
