"""Starting the ranks on the nodes of a job, from inside it: one `srun`, one `accelerate launch` a node."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import ClassVar, Final, Self

from launcher.config.schema import ClusterConfig
from launcher.errors import Interrupted, LauncherError, MachineError, RequestError
from launcher.plan.orders import Orders
from launcher.render.srun import Step, check_command, srun_command, step_environment, step_name
from launcher.run import excluding, journal, node_check, slurm
from launcher.run.attempt import REPLACED
from launcher.run.checkpoints import newest_step
from launcher.run.directory import RunDirectory
from launcher.run.heartbeat import read_beat
from launcher.run.outcome import UNLIMITED, End, Facts, Outcome
from launcher.run.requests import is_there
from launcher.run.slurm_facts import Seen, facts_of, is_requeued
from launcher.run.stopping import need_of
from launcher.run.supervise import record_run_end

LOOK_SECONDS: Final = 15.0
"""How often slurmctld is asked about the job: it has many to answer. A signal has it asked at once."""
QUICK_SECONDS: Final = 10.0
"""How long it may take to answer where somebody waits for it."""
CLOCK_SECONDS: Final = 300.0
"""How long it stays known how far its clock is from this machine's."""
NEED_SECONDS: Final = 5.0
"""How long what a stop takes stays known."""
KILL_SECONDS: Final = 30.0
"""How long killed ranks are waited for."""
REQUEUE_SECONDS: Final = 600.0
"""How long a slurmctld that does not answer is asked for a requeue: without it the run would be over."""


class Slurm:
    """Every rank on the nodes of this job (`run.launching.Launching`), while it is `in_touch`."""

    asking: ClassVar = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    """Signals that ask for a stop. SIGUSR1 only warns: SLURM may send it a minute early, which may be before
    the first step, and the end of the job is known."""
    takes_over: ClassVar = True
    told_seconds: ClassVar = 5.0
    """Within which slurmctld tells, once it has sent a signal, that it takes the nodes."""

    def __init__(self, directory: RunDirectory, cluster: ClusterConfig) -> None:
        job = slurm.own_job()
        if job is None:
            raise MachineError(
                f"this run goes through SLURM, and this is not one of its jobs: {directory.root}",
                hint=f"launcher submit RUN --cluster FILE, or: sbatch {quote(str(directory.job))}",
            )
        self.job = job
        self._directory = directory
        self._cluster = cluster
        self._restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        # A job of one's own making may have more nodes than the run is planned for.
        self._hosts = slurm.hosts(os.environ["SLURM_JOB_NODELIST"])[: cluster.nodes]
        self._attempt = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._look = Look(job)
        self._signals = 0
        self._warned = False
        self._need = (-math.inf, 0.0)

    @contextlib.contextmanager
    def in_touch(self) -> Iterator[Self]:
        """While inside, its warning is heard, and slurmctld is asked about the job now and then."""
        before = signal.signal(signal.SIGUSR1, self._note_warning)
        try:
            with self._look.again_and_again():
                yield self
        finally:
            signal.signal(signal.SIGUSR1, before)

    @property
    def _orders(self) -> Orders:
        """As they are now: a drafted run is planned while this is in touch."""
        return self._directory.read_orders()

    def start(self, attempt: int) -> SlurmRanks:
        """Start every rank of every node.

        srun has a session of its own, so that a signal to the batch script reaches only the supervisor. If
        that is killed, SLURM ends the job, and the ranks have KillWait to stop safely. Rank 0's progress
        goes to the job's log; what srun says to the attempt's `launch.log`, and what accelerate says on a
        node to `node-NAME.log` beside it.
        """
        self._attempt = attempt
        journal.record(
            self._directory.journal,
            "job",
            attempt=attempt,
            job=self.job,
            restarts=self._restarts,
            nodes=list(self._hosts),
        )
        log = self._directory.launch_log(attempt)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            process = subprocess.Popen(
                srun_command(self._step(attempt)),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                stderr=stream,
                env={**os.environ, **step_environment(attempt, self._cluster.env)},
                start_new_session=True,
            )
        self._process = process
        return SlurmRanks(process, self.job, attempt, self._look)

    def facts(self, signals: Sequence[int]) -> Facts:
        if len(signals) > self._signals:
            self._look.soon()
        self._signals = len(signals)
        is_over = self._process is not None and self._process.poll() is not None
        words = self._words(self._attempt, is_over=is_over)
        seen = Seen(self._look.newest, self._restarts, words, warned=self._warned)
        return facts_of(seen, now=time.time(), need=self._stop_seconds())

    def ends_at(self) -> float | None:
        """When the job's time is over, in seconds since the epoch; None: never, or slurmctld does not say."""
        state = self._look.now()
        return None if state is None or state.state != "RUNNING" else state.end

    def past(self, attempt: int) -> Facts:
        """By what srun said then, and by how often the job has been requeued since."""
        told = next(
            (
                event
                for event in reversed(journal.events(self._directory.journal, "job"))
                if event["attempt"] == attempt
            ),
            None,
        )
        if told is None or told["job"] != self.job:
            return Facts()
        out = {node.name for node in slurm.nodes(",".join(told["nodes"])) if node.is_out}
        down = tuple(name for name in told["nodes"] if name in out)
        seen = Seen(slurm.job_state(self.job), told["restarts"], self._words(attempt, is_over=True), down)
        return facts_of(seen, now=0.0, need=0.0)

    def hands_over(self, outcome: Outcome, why: str) -> bool:
        """Have the job requeued where the nodes are to be taken away, or may be at fault. Raises MachineError
        where SLURM does not, which ends the run."""
        if outcome not in UNLIMITED and outcome is not Outcome.HUNG:
            return False
        outlive_own_requeue()
        try:
            self._requeue()
        except RequestError as error:  # a job that may not be, or none that was handed in by sbatch
            end = End(outcome, f"{why}; SLURM does not queue job {self.job} again: {error.message}")
            step = newest_step(self._directory.checkpoints)
            record_run_end(self._directory, end, step, MachineError.exit_code)
            hint = "hand the run in again with `launcher submit`: it goes on from its last checkpoint"
            raise MachineError(end.reason, hint=hint) from error
        # Only now: who cannot reach slurmctld may be cut off, and is not to blame a node that is not.
        if outcome is Outcome.HUNG and (host := self._hung_host()) is not None:
            excluding.avoid(self._directory, [host], why, time.time())
        excluded: tuple[str, ...] = ()
        try:
            excluded = self._exclude()
        except LauncherError as error:  # it is queued again all the same
            why = f"{why}; no node could be excluded: {error.message}"
        journal.note(self._directory.journal, "requeued", job=self.job, why=why, exclude=list(excluded))
        return True

    def _requeue(self) -> None:
        """Have the job queued again, unless SLURM has done so by itself. Raises Interrupted where the next
        supervisor is there already: this one's node is cut off."""
        until = time.monotonic() + REQUEUE_SECONDS
        while not is_requeued(Seen(self._look.now(), self._restarts)):
            if is_there(self._directory.handover):
                raise Interrupted(REPLACED)
            try:
                slurm.said("scontrol", "requeue", self.job)
            except MachineError:
                if time.monotonic() > until:
                    raise
                time.sleep(NEED_SECONDS)
            else:
                return

    def _exclude(self) -> tuple[str, ...]:
        """Have the queued job stay away from the nodes to avoid now, and from none whose time is up."""
        if not excluding.has_avoided(self._directory):
            return ()
        asked, state = self._cluster.slurm, self._look.now()
        partitions = [] if state is None else state.partition.split(",")
        excluded = excluding.excluded_now(self._directory, asked, partitions, len(self._hosts), time.time())
        named = excluding.exclude_list(asked, excluded)
        slurm.said("scontrol", "update", f"JobId={self.job}", f"ExcNodeList={named}")
        return excluded

    def check_nodes(self) -> None:
        """Have every node answer for itself, unless all did lately; be requeued without those at fault.

        Raises Interrupted where the job is queued again, and MachineError where that would not help.
        """
        now, planned = time.time(), self._orders.plan.nodes
        if len(self._hosts) < planned:
            raise MachineError(
                f"job {self.job} has {len(self._hosts)} of the {planned} nodes that the run is planned for",
                hint="the job script asks for as many: launcher submit, or sbatch with it as it is",
            )
        if set(self._hosts) <= node_check.proven(self._directory, now):
            return
        plan = self._orders.plan
        backend, gpus = "gloo", 0
        if plan.device != "cpu":
            backend, gpus = "nccl", plan.batch.world_size // plan.nodes
        word = f"{self.job} {now}"
        command = check_command(self._step(node_check.failures(self._directory)), word, backend)
        room = plan.checkpoint_bytes or 0
        found = node_check.findings(
            self._directory,
            command,
            word,
            self._hosts,
            room=room,
            gpus=gpus,
            own_versions=self._cluster.slurm.container is None,
        )
        if found.faults and (taken := self._taken_away()):
            self.hands_over(Outcome.PREEMPTED, taken)
            raise Interrupted(f"{taken} while the nodes were tried; queued again")
        node_check.record(self._directory, self._hosts, found, now)
        if not found.faults:
            return
        why = "; ".join(found.faults)
        if not found.culprits or node_check.failures(self._directory) >= node_check.PATIENCE:
            step = newest_step(self._directory.checkpoints)
            record_run_end(self._directory, End(Outcome.NO_PROGRESS, why), step, MachineError.exit_code)
            raise MachineError(f"the nodes of job {self.job} cannot train this run: {why}")
        excluding.avoid(self._directory, found.culprits, why, now)
        self.hands_over(Outcome.NODE_FAILED, why)
        raise Interrupted(f"{why}; queued again without {', '.join(found.culprits)}")

    def _hung_host(self) -> str | None:
        """The one node that the ranks which hung last were on; None where it was not one of several."""
        hung = journal.events(self._directory.journal, "hung")
        if not hung or len(self._hosts) == 1:
            return None
        beats = [
            read_beat(self._directory.heartbeat(hung[-1]["attempt"], rank)) for rank in hung[-1]["ranks"]
        ]
        hosts = {beat.host.partition(".")[0] for beat in beats if beat is not None}
        # SLURM's name for a node may be shorter than its own.
        named = [host for host in self._hosts if host.partition(".")[0] in hosts]
        return named[0] if len(hosts) == len(named) == 1 else None

    def _taken_away(self) -> str | None:
        """Whether it is SLURM that takes the nodes away just now, in words."""
        facts = facts_of(Seen(self._look.now(), self._restarts), now=time.time(), need=0.0)
        return "the scheduler took the nodes back" if facts.preempted or facts.failed_nodes else None

    def _note_warning(self, _number: int, _frame: FrameType | None) -> None:
        self._warned = True

    def _step(self, attempt: int) -> Step:
        container = self._cluster.slurm.container
        store = self._orders.store
        folders = [self._directory.root, *([Path(store)] if store else [])]
        return Step(
            directory=str(self._directory.root),
            attempt=attempt,
            job_id=int(os.environ["SLURM_JOB_ID"]),
            hosts=self._hosts,
            logs=str(self._directory.logs(attempt)),
            accelerate="accelerate" if container else str(Path(sys.executable).with_name("accelerate")),
            python="python" if container else sys.executable,
            container=container,
            shown=tuple(str(folder) for folder in folders),
        )

    def _words(self, attempt: int, *, is_over: bool) -> str:
        """What srun said; once the attempt is over, also what slurmstepd said, which goes where the ranks of
        its node write."""
        said = _text(self._directory.launch_log(attempt))
        return said + "\n" + words_of_slurmstepd(self._directory.logs(attempt)) if is_over else said

    def _stop_seconds(self) -> float:
        """What a safe stop takes, read anew now and then: it is asked for several times a second."""
        now = time.monotonic()
        if now - self._need[0] > NEED_SECONDS:
            self._need = now, need_of(self._directory, self._orders.plan, self._attempt).seconds
        return self._need[1]


def outlive_own_requeue() -> None:
    """Ignore SIGTERM, by which a requeue ends this job and so this process: it is no wish to stop the run.

    Only the main thread may. Another asks for a requeue while that hears nothing (`run.preparing`): the
    handler that is there then notes the signal at most.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class SlurmRanks:
    """The ranks under one `srun` (`run.launching.Ranks`)."""

    leave_seconds = 10.0
    """SLURM would keep in its records that a step was cancelled which has done all it was to."""

    def __init__(self, process: subprocess.Popen[bytes], job: str, attempt: int, look: Look) -> None:
        self._process = process
        self._job = job
        self._attempt = attempt
        self._look = look

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            self._look.now()  # what ended the step is known by now
        return code

    def end(self) -> None:
        """Kill every rank on every node, and wait until they are gone: those of this node by hand too: it
        may be cut off from the others."""
        if self._process.poll() is not None:
            return
        with contextlib.suppress(LauncherError, subprocess.TimeoutExpired):
            for step in self._steps():
                slurm.said("scancel", "--signal=KILL", step, seconds=QUICK_SECONDS)
            self._process.wait(KILL_SECONDS)
        self._process.kill()
        self._process.wait()
        _kill_step_here(self._attempt)

    def _steps(self) -> list[str]:
        asked = ("squeue", "--noheader", "--steps", f"--jobs={self._job}", "--format=%i %j")
        lines = slurm.said(*asked, seconds=QUICK_SECONDS).splitlines()
        name = step_name(self._attempt)
        return [line.split()[0] for line in lines if line.split(maxsplit=1)[1:] == [name]]


class Look:
    """The newest answer of slurmctld about a job, asked for by a thread, so that nobody waits for it.

    When the job ends is told by this machine's clock, which may not go as slurmctld's does.
    """

    def __init__(self, job: str) -> None:
        self.newest: slurm.JobState | None = None
        self._job = job
        self._wake = threading.Event()
        self._is_over = False
        self._ahead = (-math.inf, 0.0)
        """When slurmctld's clock was last asked for, and how far ahead of ours it was."""

    @contextlib.contextmanager
    def again_and_again(self) -> Iterator[None]:
        """While inside, ask every LOOK_SECONDS. Whoever leaves does not wait for an answer."""
        threading.Thread(target=self._keep, daemon=True).start()
        try:
            yield
        finally:
            self._is_over = True
            self._wake.set()

    def soon(self) -> None:
        """Ask at once, without waiting."""
        self._wake.set()

    def now(self) -> slurm.JobState | None:
        """Ask, and wait for the answer for a while; where there is none, the last one."""
        with contextlib.suppress(LauncherError):
            state = slurm.job_state(self._job, QUICK_SECONDS)
            if state is not None and state.end is not None:
                state = replace(state, end=state.end - self._seconds_ahead())
            self.newest = state or self.newest
        return self.newest

    def _seconds_ahead(self) -> float:
        asked, here = time.monotonic(), time.time()
        if asked - self._ahead[0] > CLOCK_SECONDS:
            with contextlib.suppress(LauncherError):
                # It tells full seconds: rather an end that is one too early than one too late.
                self._ahead = asked, slurm.clock(QUICK_SECONDS) + 1 - here
        return self._ahead[1]

    def _keep(self) -> None:
        while not self._is_over:
            self.now()
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()


def words_of_slurmstepd(logs: Path) -> str:
    """What slurmstepd said in the logs of the nodes, in the folder of an attempt."""
    lines = (line for log in sorted(logs.glob("node-*.log")) for line in _text(log).splitlines())
    return "\n".join(line for line in lines if line.startswith("slurmstepd"))


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""


def _kill_step_here(attempt: int) -> None:
    """Kill what is left on this node of the ranks of an attempt of this job."""
    import psutil

    from launcher.run.processes import kill

    job, number = os.environ["SLURM_JOB_ID"], str(attempt)
    family = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SLURM_JOB_ID") == job and environment.get("LAUNCHER_ATTEMPT") == number:
                family.append(process)
    kill(family, KILL_SECONDS)
