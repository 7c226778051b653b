"""Checks before anything expensive: what this machine must have for the plan to run on it."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from launcher.config.addresses import is_url
from launcher.config.load import Loaded
from launcher.config.schema import ClusterConfig, DataSection, RunConfig
from launcher.errors import MachineError, RequestError
from launcher.plan.choose import Place
from launcher.plan.sharding import zero_stage
from launcher.run.directory import check_writable, run_directory
from launcher.run.machine import Machine
from launcher.run.saying import Say
from launcher.run.wandb_login import check_wandb


def check_launch(
    run: RunConfig, place: Place, machine: Machine, strategy: str, environment: Mapping[str, str]
) -> None:
    """Raise before anything is written if this machine cannot run `run` on `place`."""
    check_run(run, strategy, environment)
    if place.nodes == 1:  # else this need not be one of them
        check_gpus(place, machine)


def check_local(cluster: ClusterConfig) -> None:
    """Raise RequestError for a cluster that is not this machine."""
    if cluster.launch == "slurm":
        raise RequestError(
            f"cluster {cluster.name} goes through SLURM (launch: slurm)",
            hint="use `launcher submit` with the same arguments",
        )


def check_run(run: RunConfig, strategy: str, environment: Mapping[str, str]) -> None:
    """Raise before anything is written if `run` could not be trained anywhere from here, where the cluster
    adds `environment` to the ranks'."""
    check_folders(run)
    if run.push_to_hub is not None:
        _check_repository(run.push_to_hub)
    if zero_stage(strategy) is not None and find_spec("deepspeed") is None:
        raise MachineError(
            f"train.strategy {strategy} runs on DeepSpeed, which is not installed",
            hint="pip install deepspeed, or set train.strategy: ddp or fsdp",
            key="train.strategy",
        )
    for package in run.report_to:
        if find_spec(package) is None:
            raise MachineError(
                f"report_to: {package} is not installed",
                hint=f"pip install {package}, or take it out of report_to",
            )
    if "wandb" in run.report_to:
        check_wandb({**os.environ, **environment})


def say_upload(run: RunConfig, say: Say) -> None:
    """Say where the Hub would not take the final model: that is found out when training is over."""
    if run.push_to_hub is None:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        say(
            f"note: push_to_hub: no token of the Hub is here to upload to {run.push_to_hub} with, and it is "
            "tried when training is over\n  hint: `hf auth login`, or set HF_TOKEN"
        )


def check_folders(run: RunConfig) -> None:
    """Raise RequestError unless the folders that `run` writes to can be written to."""
    check_writable(run_directory(run).root, "output_dir")
    if run.data.cache_dir is not None:
        check_writable(Path(run.data.cache_dir).expanduser().absolute(), "data.cache_dir")


def _check_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RequestError(
            f"push_to_hub: {name!r} cannot be a repository: {error}", hint="write it as user/name"
        ) from error


def check_gpus(place: Place, machine: Machine) -> None:
    """Raise MachineError unless this machine has the GPUs of one node of `place`."""
    if place.is_cpu:
        return
    if len(machine.gpus) < place.ranks_per_node:
        raise MachineError(
            f"the cluster {place.cluster} has {place.ranks_per_node} x {place.gpu.name} on a node; "
            f"this machine has {len(machine.gpus) or 'no'} GPU{'s' if len(machine.gpus) > 1 else ''}",
            hint="train on that machine, or without --cluster on this one as it is",
        )


def absent_text(run: Loaded[RunConfig]) -> Iterator[str]:
    """Which paths and patterns of local text match nothing here and now, in words. Training refuses them."""
    for key, path in paths_of(run.config.data):
        if not is_url(path) and not _is_there(Path(path).expanduser()):
            yield f"{key}: no file matches {path} here ({run.origins[key]})"


def paths_of(data: DataSection) -> Iterator[tuple[str, str]]:
    """Every path, pattern and URL of text that is named, each with the key that names it."""
    train = [path for each in data.train for path in ([each] if isinstance(each, str) else each.files)]
    held_out = data.validation if isinstance(data.validation, list) else []
    for key, paths in (("data.train", train), ("data.validation", held_out)):
        yield from ((key, path) for path in paths)


def _is_there(path: Path) -> bool:
    """Whether a file or pattern matches something; `data.files`, which lists all, takes longer to load."""
    found = glob.iglob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    return path.exists() or next(found, None) is not None
