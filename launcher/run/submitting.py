"""From a plan to a job in the queue: what is checked before, what is written down, how it is waited for."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config.load import load_cluster
from launcher.config.schema import ClusterConfig
from launcher.config.slurm import time_limit_seconds
from launcher.errors import MachineError, RequestError, placed
from launcher.render.sbatch import prepare_command, render_job, sweep_command
from launcher.run import journal, slurm
from launcher.run.assemble import Assembly, check_prepared, job_of, job_template
from launcher.run.cluster_checks import examine_cluster
from launcher.run.directory import RunDirectory, run_directory, write_text
from launcher.run.excluding import exclude_list, excluded_now, why_avoided
from launcher.run.preflight import say_upload
from launcher.run.saying import Say
from launcher.run.stopping import need_of

PREPARE_CPUS = 8
"""CPUs for each job that prepares text, where the cluster file does not say how many a node lends."""
PREPARE_SCRIPT = "prepare.sbatch"
WAIT_SECONDS = 10.0
"""How often slurmctld is asked about a job that is waited for; at first more often."""


def check_slurm(cluster: ClusterConfig) -> None:
    """Raise RequestError for a cluster that takes no jobs."""
    if cluster.launch != "slurm":
        raise RequestError(
            f"cluster {cluster.name} does not go through SLURM (launch: {cluster.launch})",
            hint="set launch: slurm in the cluster file, or use `launcher train`",
        )


def check_submission(assembly: Assembly, say: Say) -> None:
    """Raise RequestError or MachineError for a job that could never run; say what may surprise."""
    cluster, place = assembly.cluster.config, assembly.place
    directory = run_directory(assembly.run.config)
    need = need_of(directory, assembly.plan)
    say_upload(assembly.run.config, say)
    with placed(assembly.cluster.origins):
        _check_time(cluster.slurm.time_limit, need.seconds)
        for check in examine_cluster(cluster, place, directory.root, need):
            if check.state == "missing":
                kind = MachineError if check.key is None else RequestError
                raise kind(f"{check.name}: {check.found}", hint=check.remedy, key=check.key)
            if check.state == "warning":
                say(f"note: {check.name}: {check.found}\n  hint: {check.remedy}")


def _check_time(limit: str | None, need: float) -> None:
    if limit is not None and time_limit_seconds(limit) < 2 * need:
        raise RequestError(
            f"slurm.time_limit: {limit} is too short: a safe stop alone takes about {need:.0f} s",
            hint="set a longer one",
            key="slurm.time_limit",
        )


def submit_run(directory: RunDirectory, after: str | None, say: Say) -> str:
    """Hand in the job of a written run, to start once job `after` has finished well; returns its id.

    It stays away from the nodes that did the run harm lately, as the run's last job did.
    """
    directory.logs(1).parent.mkdir(parents=True, exist_ok=True)  # slurmd opens the log, and makes no folders
    asked = load_cluster(directory.cluster).config
    partitions = [] if asked.slurm.partition is None else asked.slurm.partition.split(",")
    excluded = excluded_now(directory, asked.slurm, partitions, asked.nodes, time.time())
    options = []
    if excluded:
        say(f"note: the job stays away from {', '.join(excluded)}: {why_avoided(directory, excluded)}")
        options = [f"--exclude={exclude_list(asked.slurm, excluded)}"]
    job = slurm.submit(directory.job, asked.slurm, *_dependency(after), *options)
    journal.record(directory.journal, "submitted", job=job, after=after, exclude=list(excluded))
    return job


def _dependency(after: str | None) -> list[str]:
    # A job whose condition cannot come true any more would wait for ever.
    return [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]


def submit_sweep(drafts: Sequence[Assembly], folder: Path, launcher: str) -> str:
    """Hand in the written runs of a sweep as one array, its script in `folder`; returns the array's id."""
    directories = [run_directory(draft.run.config) for draft in drafts]
    script = RunDirectory(folder).job
    write_text(script, sweep_script(drafts, folder, launcher))
    (folder / "logs").mkdir(exist_ok=True)
    array = slurm.submit(script, drafts[0].cluster.config.slurm)
    for index, directory in enumerate(directories):
        directory.logs(1).parent.mkdir(parents=True, exist_ok=True)
        journal.record(directory.journal, "submitted", job=f"{array}_{index}", after=None)
    return array


def sweep_script(drafts: Sequence[Assembly], folder: Path, launcher: str) -> str:
    """The text of the job script of a sweep, which is kept in `folder`."""
    jobs = [job_of(draft, RunDirectory(folder), launcher) for draft in drafts]
    job = replace(
        jobs[0],
        name=folder.name,
        command=sweep_command(launcher, [str(run_directory(draft.run.config).root) for draft in drafts]),
        lead=max(job.lead or 0 for job in jobs),
        array=f"0-{len(drafts) - 1}",
    )
    return render_job(job, job_template(job.slurm.template))


def check_preparation(assembly: Assembly, *, is_sweep: bool) -> None:
    """Raise RequestError where text cannot be prepared in jobs of its own."""
    if is_sweep:
        raise RequestError(
            "--prepare and --sweep: the runs of a sweep may differ in their text",
            hint="prepare it first: `launcher data prepare RUN`",
        )
    check_prepared(assembly.run.config)


def submit_preparation(
    assembly: Assembly, directory: RunDirectory, launcher: str, count: int, say: Say
) -> str:
    """Hand in an array of `count` jobs without GPUs that prepare the text of a run, and the run's own job,
    which plans and trains once they have ended well; returns the latter's id.

    The run's directory holds a draft of it: the plan needs the text.
    """
    script = directory.root / PREPARE_SCRIPT
    write_text(script, preparation_script(assembly, directory, launcher, count))
    directory.logs(1).parent.mkdir(parents=True, exist_ok=True)
    array = slurm.submit(script, assembly.cluster.config.slurm)
    journal.record(directory.journal, "preparation_submitted", job=array, count=count)
    return submit_run(directory, array, say)


def preparation_script(assembly: Assembly, directory: RunDirectory, launcher: str, count: int) -> str:
    """The text of the job script of `count` jobs that prepare the text of a run."""
    slurm_section = assembly.cluster.config.slurm.model_copy(update={"exclusive": False, "memory": None})
    job = replace(
        job_of(assembly, directory, launcher),
        command=prepare_command(launcher, str(directory.root), count),
        nodes=1,
        gpus_per_node=None,
        cpus_per_node=assembly.cluster.config.slurm.cpus_per_node or PREPARE_CPUS,
        slurm=slurm_section,
        lead=None,
        array=f"1-{count}",
        file=PREPARE_SCRIPT,
    )
    return render_job(job, job_template(job.slurm.template))


def variations(axes: Sequence[str]) -> list[Mapping[str, str]]:
    """Every combination of `key=a,b` axes, as key to value. Raises RequestError for anything else."""
    values: dict[str, list[str]] = {}
    for axis in axes:
        key, equals, listed = axis.partition("=")
        found = [value for value in _split(listed) if value]
        if not equals or not key or not found:
            raise RequestError(
                f"--sweep {axis}: expected KEY=VALUE,VALUE", hint="--sweep train.learning_rate=1e-4,3e-4"
            )
        if key in values or len(set(found)) < len(found):
            raise RequestError(f"--sweep {axis}: it is there twice", hint="name each key and value once")
        values[key] = found
    return [
        dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())
    ]


def _split(listed: str) -> Iterator[str]:
    """The values between commas, but for commas inside of brackets."""
    depth, value = 0, ""
    for letter in listed:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            yield value
            value = ""
        else:
            value += letter
    yield value


def variation_name(name: str, variation: Mapping[str, str]) -> str:
    """What a run of a sweep is called: `gpt2-learning_rate=1e-4`."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in variation.items()]
    return "-".join([name, *parts]).replace("/", "_")


def launcher_here() -> str:
    """The path of the command that runs now, for the nodes: they have the same file system."""
    beside = Path(sys.executable).with_name("launcher")
    return str(beside) if beside.exists() else "launcher"


def wait_for(job: str, say: Say) -> slurm.JobState | None:
    """Wait until a job is over, saying what it does; returns its last state, None where it was forgotten."""
    last: tuple[Any, ...] = ()
    pause = 1.0
    while True:
        try:
            state = slurm.job_state(job)
        except MachineError as error:  # slurmctld is restarted: the job lives on
            if last != (error.message,):
                last = (error.message,)
                say(f"job {job}: {error.message}; asking again")
            time.sleep(WAIT_SECONDS)
            continue
        if state is None or state.is_over:
            return state
        shown = (state.state, state.reason if state.state == "PENDING" else state.nodes, state.restarts)
        if shown != last:
            last = shown
            say(
                f"job {job}: {state.state} ({shown[1]})"
                + (f", requeued {shown[2]} times" if shown[2] else "")
            )
        time.sleep(pause)
        pause = min(WAIT_SECONDS, pause * 1.2)


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ended, in words, and the exit code that `train` would have had."""

    words: str
    exit_code: int


def how_it_ended(directory: RunDirectory, state: slurm.JobState | None) -> RunEnd:
    """By the supervisor's own last word, or, where it left none, by the last state of the job."""
    events = journal.read(directory.journal)
    submitted = max((index for index, event in enumerate(events) if event["event"] == "submitted"), default=0)
    ends = [event for event in events[submitted:] if event["event"] == "ended"]
    if ends:
        return RunEnd(
            f"{ends[-1]['outcome']} at step {ends[-1]['step']}: {ends[-1]['reason']}", ends[-1]["exit_code"]
        )
    last = "is forgotten by SLURM" if state is None else f"ended as {state.state} ({state.reason})"
    return RunEnd(f"its job {last}, and its supervisor left no word: see {directory.root}/logs", 1)
