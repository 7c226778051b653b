"""A real SLURM cluster on one machine: slurmctld, and three nodes that differ as machines do.

Each node is a slurmd in network, UTS, PID and mount namespaces of its own: its own address and host name, no
process of another node in sight, and everything in it gone when it is killed. Needs root and Debian's
slurm-wlm, munge and iproute2. Its GPUs are plain files that SLURM counts.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

NODES = ("n1", "n2", "n3")
GPUS = 2
"""On each node."""

KILL_WAIT = 20
GRACE = 60
"""Seconds between SLURM's SIGTERM and its SIGKILL: at a job's end, and on preemption in partition `grace`."""

PR_SET_PDEATHSIG = 1
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare")

CONFIGURATION = """\
ClusterName=drill
SlurmctldHost={host}({network}.1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=5,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmdLogFile={folder}/%n.log
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobSubmitPlugins=lua
KillWait={kill_wait}
SlurmdTimeout=12
MessageTimeout=8
MinJobAge=3600
ReturnToService=2
{nodes}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 MaxTime=60
PartitionName=grace Nodes=ALL PriorityTier=1 MaxTime=60 GraceTime={grace}
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=60 PreemptMode=OFF
"""

ACCOUNTS = """\
-- Without a database SLURM knows no accounts: it is told here which one there is not.
function slurm_job_submit(job, partitions, uid)
    if job.account == "nobody" then return 2045 end
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid) return slurm.SUCCESS end
return slurm.SUCCESS
"""
"""2045 is ESLURM_INVALID_ACCOUNT (slurm/slurm_errno.h)."""

NODE = """\
set -eu
mount --bind {folder}/hosts /etc/hosts
hostname {name}
while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip addr add {address}/24 dev eth0
ip link set eth0 up
ip route add default via {network}.1
slurmd -D -N {name} -f {folder}/slurm.conf &
# The first process of a node: it takes in orphans, and lives until the node is killed.
while :; do wait || true; sleep 0.2; done
"""


def why_not() -> str | None:
    """What this machine lacks for a cluster; None where nothing."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"SLURM tests need Debian's slurm-wlm, munge and iproute2: no {', '.join(missing)}"
    return None if os.geteuid() == 0 else "SLURM tests make network namespaces, which needs root"


@dataclass
class Cluster:
    """A running cluster. `environment` is what its commands need, on the login node that this machine is."""

    folder: Path
    bridge: str
    environment: Mapping[str, str]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    controller: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, check: bool = True) -> str:
        """What a command says on standard output. Raises RuntimeError with what it said where it failed."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def on(self, node: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, in all its namespaces."""
        child = (
            Path(f"/proc/{self.nodes[node].pid}/task/{self.nodes[node].pid}/children").read_text().split()[0]
        )
        enter = ["nsenter", "--target", child, "--net", "--uts", "--mount", "--pid", *command]
        return subprocess.run(
            enter, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )

    def state(self, node: str) -> str:
        """A node's state as SLURM gives it, such as `idle` or `down*`."""
        return self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T").split("\n")[0]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_soon(self, job: str) -> None:
        """A requeued job is held back for two minutes: do not wait for that. For some seconds it must be:
        nodes refuse it while they take back its last credential."""
        eligible = datetime.fromisoformat(self.job(job)["EligibleTime"])
        if (eligible - datetime.now()).total_seconds() > 10:
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now+5seconds", check=False)

    def cut_off(self, node: str) -> None:
        """Take a node's network away."""
        self.run("ip", "link", "set", f"{self.bridge}{node}", "down")

    def reconnect(self, node: str) -> None:
        self.run("ip", "link", "set", f"{self.bridge}{node}", "up")
        self.wait(lambda: self.state(node) in ("idle", "mixed", "allocated"), f"{node} is back", 60)

    def restart_controller(self) -> None:
        """End slurmctld and start it again from its saved state."""
        assert self.controller is not None
        self.controller.send_signal(signal.SIGTERM)
        self.controller.wait(30)
        self._start_controller()

    def clear(self) -> None:
        """End every job, and have every node whole again."""
        self.run("scancel", "--user=root", check=False)
        self.wait(lambda: not self.run("squeue", "--noheader"), "all jobs have ended", 60)
        for node in NODES:
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def wait(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        """Until `condition` holds. Raises TimeoutError with what the cluster looks like."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                looks = [self.run(command, check=False) for command in ("squeue", "sinfo")]
                raise TimeoutError(f"not within {seconds:.0f} s: {what}\n" + "\n".join(looks))
            time.sleep(0.1)

    def _start_controller(self) -> None:
        command = ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")]
        self.controller = _daemon(command, self.folder / "slurmctld.out", self.environment)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster of three idle nodes, gone without trace afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    number, bridge = _bridge()
    network = f"10.213.{number}"
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    made = Cluster(folder, bridge, environment)
    others: list[subprocess.Popen[bytes]] = []
    try:
        _write(folder, number, network)
        others.append(_munged(folder))
        _ip("addr", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for index, name in enumerate(NODES):
            made.nodes[name] = _node(made, name, network, index)
        made._start_controller()
        made.wait(lambda: _all_idle(made), "three idle nodes", 60)
        yield made
    finally:
        for process in [*made.nodes.values(), *([made.controller] if made.controller else []), *others]:
            process.kill()
            process.wait()
        # The kernel takes a dead node's link away some time later.
        for link in (*(f"{bridge}{name}" for name in made.nodes), bridge):
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _bridge() -> tuple[int, str]:
    """A number that no other cluster of this machine has, and the bridge that it is known by."""
    for number in range(256):
        name = f"slurm{number}n"
        done = subprocess.run(["ip", "link", "add", name, "type", "bridge"], capture_output=True, check=False)
        if done.returncode == 0:
            return number, name
    raise RuntimeError("no bridge can be made: `ip link` shows those of earlier clusters")


def _all_idle(made: Cluster) -> bool:
    return made.run("sinfo", "--noheader", "--partition=batch", "--format=%D %T", check=False) == "3 idle"


def _write(folder: Path, number: int, network: str) -> None:
    files = [folder / f"gpu{index}" for index in range(GPUS)]
    for name in ("state", *NODES):
        (folder / name).mkdir()
    for file in files:
        file.touch()
    nodes = [
        f"NodeName={name} NodeAddr={network}.{11 + index} CPUs=8 RealMemory=16000 Gres=gpu:{GPUS}"
        for index, name in enumerate(NODES)
    ]
    text = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0],
        network=network,
        folder=folder,
        kill_wait=KILL_WAIT,
        grace=GRACE,
        port=10000 + number,
        slurmd_port=11000 + number,
        nodes="\n".join(nodes),
    )
    hosts = ["127.0.0.1 localhost", *(f"{network}.{11 + index} {name}" for index, name in enumerate(NODES))]
    hosts.append(f"{network}.1 {socket.gethostname()}")
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (folder / "job_submit.lua").write_text(ACCOUNTS)
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _munged(folder: Path) -> subprocess.Popen[bytes]:
    places = {
        "socket": "socket",
        "key-file": "key",
        "pid-file": "pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    options = [f"--{option}={folder}/munge.{name}" for option, name in places.items()]
    process = _daemon(["munged", "--foreground", "--force", *options], folder / "munged.out", {})
    end = time.monotonic() + 10
    while not (folder / "munge.socket").exists():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"munged did not start: {(folder / 'munged.out').read_text()}")
        time.sleep(0.02)
    return process


def _node(made: Cluster, name: str, network: str, index: int) -> subprocess.Popen[bytes]:
    script = made.folder / f"{name}.sh"
    address = f"{network}.{11 + index}"
    script.write_text(NODE.format(folder=made.folder, name=name, address=address, network=network))
    apart = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    process = _daemon([*apart, "bash", str(script)], made.folder / f"{name}.out", made.environment)
    inside = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + 10
    while not inside.read_text():
        if time.monotonic() > end:
            raise RuntimeError(f"node {name} did not start: {(made.folder / f'{name}.out').read_text()}")
        time.sleep(0.02)
    child = inside.read_text().split()[0]
    link = f"{made.bridge}{name}"
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", child)
    _ip("link", "set", link, "master", made.bridge, "up")
    return process


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr}")


def _daemon(command: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    """In the child: be killed when whoever made the cluster is gone, however it went (prctl(2))."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
