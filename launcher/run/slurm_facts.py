"""What SLURM did to an attempt, told from what it says of the job and of the step. Pure.

Tried with Slurm 22.05: `docs/guides/slurm.md` has what each event looks like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from launcher.run.outcome import Facts
from launcher.run.slurm import JobState

CANCELLED = re.compile(
    r"\*\*\* (?:STEP|JOB) \S+ ON \S+ CANCELLED AT \S+(?: DUE TO (.+?))?(?:, SEE [^*]*)? \*\*\*"
)
"""What slurmstepd writes as it ends a step, and why."""
FAILED_NODE = re.compile(r"srun: error: Node failure on (\S+)")
OUT_OF_MEMORY = re.compile(r"oom[-_]kill|OUT_OF_MEMORY|: Out Of Memory\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Seen:
    """All that bears on an attempt of a job.

    `state`: the job now, None where slurmctld does not answer or has forgotten it. `restarts`: how often it
    had been requeued when the attempt began. `words`: what srun and slurmstepd said. `down`: nodes
    of the attempt that are down now. `warned`: SLURM has said (USR1) that the time limit is near.
    """

    state: JobState | None
    restarts: int
    words: str = ""
    down: tuple[str, ...] = ()
    warned: bool = False


def is_requeued(seen: Seen) -> bool:
    """Whether SLURM starts the job again by itself: it counts a requeue in the moment it decides on it."""
    return seen.state is not None and seen.state.restarts > seen.restarts


def facts_of(seen: Seen, *, now: float, need: float) -> Facts:
    """The facts of an attempt at `now` (seconds since the epoch), where a safe stop takes `need` seconds."""
    state = seen.state
    reasons = [reason or "" for reason in CANCELLED.findall(seen.words)]
    failed = tuple(dict.fromkeys(FAILED_NODE.findall(seen.words))) or (
        seen.down if is_requeued(seen) or "NODE FAILURE" in reasons else ()
    )
    if not failed and "NODE FAILURE" in reasons:
        failed = ("a node",)
    preempted = is_requeued(seen) or (state is not None and state.preempted) or "PREEMPTION" in reasons
    ends_at = None if state is None or state.state != "RUNNING" else state.end
    out_of_time = "TIME LIMIT" in reasons or (state is not None and state.reason == "TimeLimit")
    near = seen.warned if ends_at is None else ends_at - now <= need
    return Facts(
        preempted=preempted and not failed,
        time_limit=out_of_time or near,
        cancelled=_cancelled(state) and not (preempted or failed or out_of_time),
        out_of_memory=OUT_OF_MEMORY.search(seen.words) is not None,
        failed_nodes=failed,
        ends_at=ends_at,
    )


def _cancelled(state: JobState | None) -> bool:
    """A job that ends while its supervisor still runs was ended by a person, unless SLURM has said why."""
    return state is not None and state.state in ("COMPLETING", "CANCELLED")
