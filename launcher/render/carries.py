"""Where each key ends up: for every key of the configuration, the rendered places that carry it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml

PLAN, ACCELERATE, DEEPSPEED, LAUNCH = "plan.json", "accelerate.yaml", "deepspeed.json", "launch.sh"
JOB = "job.sbatch"

Path = tuple[str, str]


def _job(*beginnings: str) -> tuple[Path, ...]:
    """Lines of the job script, by a pattern of how they begin."""
    return tuple((JOB, beginning) for beginning in beginnings)


def _option(*names: str) -> tuple[Path, ...]:
    return _job(*(rf"#SBATCH --{name}\b(?!-)" for name in names))


def _plan(*names: str) -> tuple[Path, ...]:
    return tuple((PLAN, f"plan.{name}") for name in names)


CAUSAL = ("fast.causal_attention", "fast.reasons.causal_attention")

ENGINE: tuple[Path, ...] = (
    (DEEPSPEED, ""),
    *(
        (ACCELERATE, key)
        for key in ("distributed_type", "deepspeed_config", "fsdp_config", "dynamo_config", "mixed_precision")
    ),
)
"""What differs from strategy to strategy."""

FAST: tuple[Path, ...] = tuple(
    path
    for name in ("chunked_loss", "padded_vocabulary", "tf32")
    for path in _plan(f"fast.{name}", f"fast.reasons.{name}")
)
"""What hangs on the engine, the precision and the vocabulary."""

FIT: tuple[Path, ...] = (
    *_plan("strategy", "offload", "batch", "gradient_checkpointing", "compile"),
    *_plan("memory", "host_memory", "forecast"),
    *FAST,
    *ENGINE,
    *_option("signal"),
)
"""What is chosen together, so that the run fits and is fast."""

ONE_PLACE = ("tanh_gelu", "causal_attention", "fused_adamw", "tf32")
TAKES_MEMORY = ("chunked_loss", "padded_vocabulary")
"""Fast paths that the plan alone names, and those that memory and speed depend on too."""

LENGTH = _plan("steps", "samples", "warmup_steps", "forecast.hours", "forecast.price")
TEXT: tuple[Path, ...] = ((PLAN, "store"), (PLAN, "vocabulary"), *_plan("blocks", "eval_every"), *LENGTH)
"""What depends on the prepared text."""

CPUS = ("cpus-per-task",)
OWN = "own lines"
"""Stands for the lines that a key's value is written as, whole: `_own_lines`."""
START, TITLE = "exec ", "# .*Submit it with: sbatch "
FOLDER: tuple[Path, ...] = (
    (ACCELERATE, "deepspeed_config.deepspeed_config_file"),
    (LAUNCH, START),
    *_option("output"),
    *_job(START, TITLE),
)
"""What names the run directory."""

CARRIES: Mapping[str, tuple[Path, ...]] = {
    "name": (*_plan("name"), *_option("job-name"), *FOLDER),
    "model.name": ((PLAN, "model"), (PLAN, "weights"), *TEXT, *_plan("parameters"), *FIT),
    "model.init": ((PLAN, "weights"), *_plan("parameters"), *FIT),
    "model.tokenizer": (*TEXT, *_plan("parameters"), *FIT),
    "model.overrides": ((PLAN, "model"), *_plan("parameters", *CAUSAL), *FIT),
    "data.train": TEXT,
    "data.validation": TEXT,
    "data.format": TEXT,
    "data.sample_by": TEXT,
    "data.text_field": TEXT,
    "data.mode": ((PLAN, "store"), *_plan("blocks")),
    "data.cache_dir": ((PLAN, "store"),),
    "data.block_size": (*_plan("block_size", "blocks", "eval_every"), *LENGTH, *FIT),
    "data.packing": (*_plan("blocks", "eval_every", *CAUSAL), *LENGTH, *FIT),
    "data.isolate_documents": (*_plan(*CAUSAL), *FIT),
    "train.batch_size": (*FIT, *LENGTH),
    "train.tokens": LENGTH,
    "train.steps": LENGTH,
    "train.epochs": LENGTH,
    "train.warmup": _plan("warmup_steps"),
    "train.max_grad_norm": ((DEEPSPEED, "gradient_clipping"),),
    "train.precision": (*_plan("precision", "peak_flops"), *FIT),
    "train.gradient_checkpointing": FIT,
    "train.strategy": (*FIT, (ACCELERATE, "use_cpu")),
    "train.offload": (*FIT, (ACCELERATE, "use_cpu")),
    "train.micro_batch": FIT,
    "train.extra": _plan("fast.fused_adamw", "fast.reasons.fused_adamw"),
    "train.compile": FIT,
    **{f"train.fast.{name}": _plan(f"fast.{name}", f"fast.reasons.{name}") for name in ONE_PLACE},
    **{f"train.fast.{name}": (*_plan(f"fast.{name}", f"fast.reasons.{name}"), *FIT) for name in TAKES_MEMORY},
    "train.eval_every": _plan("eval_every"),
    "checkpoint.every": _plan("checkpoint_every"),
    "output_dir": ((PLAN, "store"), *FOLDER),
    "cluster.name": _plan("cluster"),
    "cluster.launch": (*_job(""), *_plan("threads_per_rank", "memory_available"), *FIT),
    "cluster.nodes": (
        *_plan("nodes"),
        *FIT,
        (ACCELERATE, "num_machines"),
        (ACCELERATE, "num_processes"),
        (ACCELERATE, "main_process_port"),
        (ACCELERATE, "rdzv_backend"),
        (ACCELERATE, "same_network"),
        (LAUNCH, rf"{START}|\[ |# usage: "),
        *_option("nodes"),
        *_job(TITLE),
    ),
    "cluster.network_gbps": FIT,
    "cluster.gpus_per_node": (
        *_plan("ranks_per_node", "threads_per_rank", "memory_available"),
        *FIT,
        (ACCELERATE, "num_processes"),
        *_option("gpus-per-node", "cpus-per-task"),
    ),
    "cluster.gpu": (
        *_plan("gpu", "device", "precision", "peak_flops", "threads_per_rank", "memory_available"),
        *FIT,
        (ACCELERATE, "use_cpu"),
        *_option("gpus-per-node", "cpus-per-task"),
    ),
    "cluster.price_per_gpu_hour": _plan("forecast.price"),
    "cluster.env": ((LAUNCH, OWN), *_job(OWN)),
    **{
        f"cluster.slurm.{key}": _option(option)
        for key, option in {
            **{
                name: name for name in ("partition", "account", "qos", "constraint", "reservation", "exclude")
            },
            "time_limit": "time",
        }.items()
    },
    "cluster.slurm.gpu_type": _option("gpus-per-node"),
    "cluster.slurm.memory": (*_option("mem"), *_plan("memory_available"), *FIT),
    "cluster.slurm.exclusive": (
        *_option("exclusive", *CPUS),
        *_job("export SRUN"),
        *_plan("threads_per_rank"),
    ),
    "cluster.slurm.cpus_per_node": (*_option(*CPUS), *_job("export SRUN"), *_plan("threads_per_rank")),
    "cluster.slurm.setup": _job(OWN),
    "cluster.slurm.extra": _job(OWN),
    "cluster.slurm.template": _job(""),
}
"""Key to (file, dotted path in it, or a pattern of how a line of a script begins; empty: all of it), besides
`config.yaml` or `cluster.yaml`, which carry every key. A key that is not here is read by the worker from
`config.yaml` itself."""


@dataclass(frozen=True, slots=True)
class RenderedLine:
    """A line of a rendered file; `line` counts from 1."""

    file: str
    line: int
    text: str


def places(key: str, files: Mapping[str, str]) -> list[RenderedLine]:
    """Every line of the rendered `files` (name to text) that carries `key`.

    `key` is dotted, a cluster's key with `cluster.` before it.
    """
    own = (
        ("cluster.yaml", key.removeprefix("cluster.")) if key.startswith("cluster.") else ("config.yaml", key)
    )
    found, own_lines = [], _own_lines(key, files["cluster.yaml"])
    for name, path in (own, *CARRIES.get(_carried(key), ())):
        if name not in files:
            continue
        if name in (JOB, LAUNCH):
            lines = list(_matching(files[name], path, own_lines))
        else:
            lines = list(_find(files[name], path.split(".") if path else []))
        found += [
            RenderedLine(name, number, files[name].splitlines()[number - 1].strip()) for number in lines
        ]
    return list(dict.fromkeys(found))


def _carried(key: str) -> str:
    """The entry of `CARRIES` for a key, which may stand inside an open section: `model.overrides.n_layer`."""
    return next((known for known in CARRIES if key == known or key.startswith(f"{known}.")), key)


def _own_lines(key: str, cluster: str) -> set[str]:
    """Every line that the values of `key` in cluster.yaml are written as in a script, where they are."""
    values = yaml.load(cluster, Loader=yaml.CSafeLoader)
    written: list[str] = []
    if key == "cluster.slurm.setup":
        written = values["slurm"]["setup"]
    elif key == "cluster.slurm.extra":
        written = [f"#SBATCH {line.removeprefix('#SBATCH').strip()}" for line in values["slurm"]["extra"]]
    elif key.startswith("cluster.env"):
        written = [
            f"export {name}={shlex.quote(value)}"
            for name, value in values["env"].items()
            if key in ("cluster.env", f"cluster.env.{name}")
        ]
    return {line for lines in written for line in lines.splitlines() if line.strip()}


def _matching(script: str, beginning: str, own: set[str]) -> Iterator[int]:
    for number, line in enumerate(script.splitlines(), 1):
        if line in own if beginning == OWN else re.match(beginning, line):
            yield number


def _find(text: str, path: list[str]) -> Iterator[int]:
    """The line at a dotted path, or every line inside the section that stands there.

    JSON is YAML, so one parser reads both.
    """
    node = yaml.compose(text, Loader=yaml.CSafeLoader)
    line = 1
    for part in path:
        entries = node.value if isinstance(node, yaml.MappingNode) else ()
        match = next(((key, value) for key, value in entries if key.value == part), None)
        if match is None:
            return
        line, node = match[0].start_mark.line + 1, match[1]
    yield from _leaves(node, line)


def _leaves(node: yaml.Node | None, line: int) -> Iterator[int]:
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            yield from _leaves(value, key.start_mark.line + 1)
    elif isinstance(node, yaml.SequenceNode) and node.value:
        yield line
        for item in node.value:
            yield from _leaves(item, item.start_mark.line + 1)
    else:
        yield line
