"""The commands that look at a run, or ask it to stop, from anywhere its folder can be seen."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher import console
from launcher.cli.arguments import AsJson, RunFolder
from launcher.errors import RunDirectoryError
from launcher.sizes import size_in_words

if TYPE_CHECKING:
    from launcher.run.queue import QueuedJob
    from launcher.run.status import Status

app = typer.Typer()

WATCH_SECONDS = 1.0
JOB_WATCH_SECONDS = 5.0
"""Between two looks at a run that has a job: slurmctld has many to answer."""


@app.command(epilog="Example: launcher status runs/gpt2-shakespeare --watch")
def status(
    folder: Annotated[
        Path, typer.Argument(metavar="[RUN_DIR|FOLDER]", help="A run's folder, or one with runs in it.")
    ] = Path("runs"),
    watch: Annotated[bool, typer.Option("--watch", help="Go on until nothing runs any more.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell how one run stands, or every run in a folder."""
    from launcher.run.queue import find_job
    from launcher.run.status import find_runs, read_status

    find_runs(folder)

    def look() -> list[Status]:
        return [read_status(each, find_job(each), time.time()) for each in find_runs(folder)]

    if watch:
        _watch(look, as_json)
    elif as_json:
        console.answer_json([_fields(each) for each in look()])
    else:
        console.answer(_page(look()))


@app.command(epilog="Example: launcher logs runs/gpt2-shakespeare -f --rank 0")
def logs(
    run_dir: RunFolder,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on, over restarts, until the run ends.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Only this rank; without it, all, by time.")
    ] = None,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=1, help="This attempt; without it, the newest.")
    ] = None,
) -> None:
    """Show what the ranks have printed."""
    from launcher.run.directory import RunDirectory
    from launcher.run.logs import follow_logs, read_logs
    from launcher.run.queue import find_job
    from launcher.run.status import alive

    directory = RunDirectory(run_dir.absolute())
    directory.require(directory.orders)
    if follow:

        def goes_on() -> bool:
            return alive(directory) is not None or (
                (job := find_job(directory)) is not None and not job.is_over
            )

        lines = follow_logs(directory, attempt, rank, goes_on)
    else:
        lines = read_logs(directory, attempt, rank)
    for line in lines:
        console.answer(line.text if rank is not None else f"[{line.source}] {line.text}")


@app.command(epilog="Example: launcher stop runs/gpt2-shakespeare")
def stop(run_dir: RunFolder) -> None:
    """Ask a run to stop safely, with a checkpoint."""
    from launcher.run.directory import RunDirectory
    from launcher.run.queue import find_job, find_preparation
    from launcher.run.requests import ask_to_stop
    from launcher.run.status import alive, read_status

    directory = RunDirectory(run_dir.absolute())
    if not directory.orders.is_file() and alive(directory) is not None:
        ask_to_stop(directory, "person")
        console.answer(f"run {directory.root.name!r} is asked to stop: its text is being prepared")
        return
    found = read_status(directory, find_job(directory), time.time())
    if _taken_back(found.name, found.job, find_preparation(directory)):
        return
    if found.alive is None and (found.job is None or found.job.is_over):
        raise RunDirectoryError(
            f"run {found.name!r} is not running: it is {found.state}",
            hint=f"`launcher status {quote(str(run_dir))}` tells more",
        )
    asked = "was asked before" if found.stop_requested else "is asked"
    ask_to_stop(directory, "person")
    console.answer(
        f"run {found.name!r} {asked} to stop: its ranks agree on a step, save a checkpoint there and end; "
        "the command that started it goes on from it"
    )


def _taken_back(run: str, job: QueuedJob | None, preparing: QueuedJob | None) -> bool:
    """Cancel what of a run is queued and trains nothing yet; whether there was anything."""
    from launcher.run.queue import cancel

    queued: dict[str, str] = {}
    if job is not None and job.state == "PENDING":
        queued[job.job] = "waited in the queue"
    if preparing is not None and not preparing.is_over:
        queued[preparing.job] = "was to prepare its text"
    for each, meant in queued.items():
        cancel(each)
        console.answer(f"job {each} of run {run!r} {meant}, and is cancelled")
    return bool(queued)


def _watch(look: Callable[[], list[Status]], as_json: bool) -> None:
    """Show what `look` finds until nothing runs: drawn again in place on a terminal, else a line a change."""
    if sys.stdout.isatty() and not as_json:
        with console.live_answer() as show:
            for found in _looks(look):
                show(_page(found))
        return
    said: dict[str, tuple[str, int, int | None]] = {}
    for found in _looks(look):
        for each in found:
            about = (each.state, each.step, each.eval_step)
            if said.get(each.name) != about:
                said[each.name] = about
                console.answer_json_line(_fields(each)) if as_json else console.answer(_line(each))


def _looks(look: Callable[[], list[Status]]) -> Iterator[list[Status]]:
    """What `look` finds, again and again until nothing runs."""
    while True:
        found = look()
        yield found
        if not any(each.alive or (each.job and not each.job.is_over) for each in found):
            return
        time.sleep(JOB_WATCH_SECONDS if any(each.job for each in found) else WATCH_SECONDS)


def _fields(found: Status) -> dict[str, Any]:
    return {"state": found.state, **asdict(found)}


def _page(found: Sequence[Status]) -> str:
    """One run in full, or a table of several."""
    if len(found) == 1:
        return console.section(f"{found[0].name}: {found[0].state}", _rows(found[0]))
    header = ("run", "state", "step", "loss", "tokens/s", "time left", "checkpoint")
    return console.table(header, [_cells(each) for each in found])


def _line(found: Status) -> str:
    name, state, step, loss, speed, left, _ = _cells(found)
    return f"{name}  {state}  step {step}  loss {loss}  {speed} tokens/s  {left} left"


def _cells(found: Status) -> tuple[str, ...]:
    saved = found.checkpoint
    return (
        found.name,
        found.state,
        f"{found.step}/{_or(found.steps)}",
        _or(found.loss, ".4f"),
        "-" if found.tokens_per_second is None else console.count(found.tokens_per_second),
        _left(found),
        "-" if saved is None else f"{saved.step}, {console.duration(saved.age)} ago",
    )


def _rows(found: Status) -> list[tuple[str, str]]:
    saved = found.checkpoint
    done = "" if not found.steps else f" ({found.step / found.steps:.1%})"
    doing = f", {found.phase}" if found.phase and found.alive else ""
    rows = [
        ("step", f"{found.step} of {_or(found.steps)}{done}{doing}"),
        ("loss", _or(found.loss, ".4f")),
        (
            "evaluation",
            "-" if found.eval_loss is None else f"{_or(found.eval_loss, '.4f')} at {found.eval_step}",
        ),
        ("tokens", "-" if found.tokens is None else console.count(found.tokens)),
        ("tokens/s", "-" if found.tokens_per_second is None else console.count(found.tokens_per_second)),
        ("MFU, by PaLM's count", _share(found.mfu, "of the datasheet's peak")),
        ("", _share(found.matmul_share, "of what a large matrix product reaches")),
        ("waited for data", _between_reports(found.data_wait_seconds)),
        ("host in steps", _between_reports(found.host_seconds)),
        ("slowest rank", _slowest(found)),
        (
            "GPU memory, peak",
            "-" if found.peak_memory_bytes is None else size_in_words(found.peak_memory_bytes),
        ),
        ("time left", _left(found)),
        (
            "last good checkpoint",
            "none yet"
            if saved is None
            else f"step {saved.step}, {console.duration(saved.age)} ago, {size_in_words(saved.bytes)}",
        ),
    ]
    rows += _job_rows(found.job) if found.job else []
    for each in found.attempts:
        ended = "" if each.outcome is None else f" at step {each.step}"
        lasted = "" if each.seconds is None else f" after {console.duration(each.seconds)}"
        reason = "" if each.reason is None else f": {each.reason}"
        state = each.outcome or (found.state if each is found.attempts[-1] else "killed")
        rows.append((f"attempt {each.number}", f"{state}{ended}{lasted}{reason}"))
    if not found.attempts and found.reason is not None:
        rows.append(("ended", found.reason))
    rows.append(("folder", str(found.folder)))
    return [(name, value) for name, value in rows if value != "-"]


def _job_rows(job: QueuedJob) -> list[tuple[str, str]]:
    again = f", requeued {job.restarts} time{'s' if job.restarts > 1 else ''}" if job.restarts else ""
    on = f" on {job.nodes}" if job.nodes else ""
    rows = [("job", f"{job.job} {job.state}{on}{again}")]
    if job.state != "PENDING":
        return rows
    ours = f": {job.why}" if job.why else ""
    place = "" if job.position is None else f"; number {job.position} of {job.waiting} that wait"
    start = (
        "not known yet" if job.start is None else datetime.fromtimestamp(job.start).isoformat(" ", "minutes")
    )
    return [*rows, ("waits for", f"{job.reason}{ours}{place}"), ("expected start", start)]


def _share(value: float | None, of: str) -> str:
    return "-" if value is None else f"{value:.1%} {of}"


def _between_reports(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s between the last two reports"


def _slowest(found: Status) -> str:
    if found.slowest_rank is None or found.slowest_rank_lag_seconds is None:
        return "-"
    return f"{found.slowest_rank}, {found.slowest_rank_lag_seconds * 1000:.1f} ms a step behind the median"


def _left(found: Status) -> str:
    return "-" if found.seconds_left is None or not found.alive else console.duration(found.seconds_left)


def _or(value: float | str | None, form: str = "") -> str:
    """A number as `form` has it; a word (NaN is one) as it is; `-` where nothing is known."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, form)
