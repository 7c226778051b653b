"""Job scripts and their faults. Scripts of others are written anew here, in the smallest form that has the
fault: no line of them is theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.schema import SlurmSection
from launcher.render.lint import lint
from launcher.render.sbatch import BatchJob, render_job, supervise_command

TEMPLATE = Path("launcher/render/job.sbatch.j2")

GOOD = """\
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
srun --kill-on-bad-exit=1 bash -c 'accelerate launch --machine_rank "$SLURM_PROCID" \\
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" train.py'
"""


def rules(script: str) -> list[tuple[int, str]]:
    return [(finding.line, finding.rule) for finding in lint(script)]


def test_a_sound_script_has_none() -> None:
    assert rules(GOOD) == []


@pytest.mark.parametrize(
    ("before", "after", "finding"),
    [
        ("--nodes=2", "--nodes=2 --output=$HOME/log", (2, "variable-in-option")),
        ("bash -c 'accelerate", 'bash -c "accelerate', (10, "expanded-early")),
        ("srun --kill-on-bad-exit=1 bash", "bash", (10, "no-srun")),
        ('export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"\n', "", (9, "cpus-not-passed-on")),
        ("B:USR1", "USR1", (4, "signal-without-b")),
        ("$(scontrol", "${MASTER_ADDR:-localhost} #", (8, "localhost-fallback")),
        ("$((20000 + SLURM_JOB_ID % 10000))", "29500", (9, "fixed-port")),
        ("--kill-on-bad-exit=1 ", "", (10, "no-kill-on-bad-exit")),
        ("#SBATCH --open-mode=append\n", "", (5, "log-overwritten")),
    ],
)
def test_each_fault_is_found_at_its_line(before: str, after: str, finding: tuple[int, str]) -> None:
    assert before in GOOD
    assert rules(GOOD.replace(before, after)) == [finding]


def test_every_finding_has_a_remedy() -> None:
    broken = "#SBATCH -N2 -o $X\n#SBATCH --requeue\naccelerate launch --main_process_port 29500 train.py\n"
    found = lint(broken)
    assert [finding.rule for finding in found] == [
        "variable-in-option",
        "log-overwritten",
        "fixed-port",
        "no-srun",
    ]
    assert all(finding.remedy and finding.message for finding in found)


PEERS = {
    "accelerate#2816: each node is told that it is the first": (
        """\
#!/bin/bash
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
head=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
export START="accelerate launch --num_machines 4 --machine_rank $SLURM_PROCID \\
    --main_process_ip $head --main_process_port 29500"
srun $START train.py
""",
        [(5, "expanded-early"), (5, "fixed-port"), (7, "no-kill-on-bad-exit")],
    ),
    "axolotl, LLaMA-Factory: a variable where sbatch reads": (
        """\
#!/bin/bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=${NODES}
srun --kill-on-bad-exit=1 torchrun --rdzv_endpoint=$HEAD:29400 train.py
""",
        [(2, "variable-in-option"), (3, "variable-in-option"), (4, "fixed-port")],
    ),
    "TorchDR#249: one port for every job of a node": (
        "#SBATCH --nodes=1\nexport MASTER_PORT=${MASTER_PORT:-29500}\nsrun -K1 torchrun train.py\n",
        [(2, "fixed-port")],
    ),
    "pith-train#91: a node that knows no other is its own world": (
        """\
#SBATCH --nodes=2
export MASTER_ADDR=${MASTER_ADDR:-localhost}
srun --kill-on-bad-exit=1 torchrun --nnodes=2 train.py
""",
        [(2, "localhost-fallback")],
    ),
    "accelerate's several nodes, started on one": (
        "#SBATCH -N 2\naccelerate launch --num_machines 2 train.py\n",
        [(2, "no-srun")],
    ),
    "torch's launcher under a signal that it dies of": (
        "#SBATCH --signal=SIGUSR1@90\n#SBATCH --requeue\nsrun -K torchrun train.py\n",
        [(1, "signal-without-b"), (2, "log-overwritten")],
    ),
    "Lightning's: a task for each rank, without a launcher": (
        "#SBATCH --nodes=4\n#SBATCH -c 8\nsrun python3 train.py\n",
        [(3, "cpus-not-passed-on"), (3, "no-kill-on-bad-exit")],
    ),
    "one CPU for eight ranks": (
        "#SBATCH --cpus-per-task=64\nsrun -K torchrun --nproc-per-node 8 train.py\n",
        [(2, "cpus-not-passed-on")],
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_what_others_published_is_caught(name: str) -> None:
    script, findings = PEERS[name]
    assert rules(script) == findings


def test_a_program_that_handles_the_signal_itself_is_left_alone() -> None:
    assert rules("#SBATCH --signal=SIGUSR1@90\nsrun python train.py\n") == []


@pytest.mark.parametrize(
    "line",
    [
        "if true; then srun -K torchrun train.py; fi",
        "for node in $nodes; do srun -K -w $node torchrun train.py & done",
        "/opt/slurm/bin/srun -K torchrun train.py",
        "! srun -K torchrun train.py",
    ],
)
def test_srun_is_known_wherever_a_command_may_stand(line: str) -> None:
    assert rules(f"#SBATCH --nodes=2\n{line}\n") == []


@pytest.mark.parametrize("value", ["8", "$SLURM_CPUS_PER_TASK", '"$SLURM_CPUS_PER_TASK"'])
def test_cpus_may_be_passed_on_by_hand(value: str) -> None:
    assert rules(f"#SBATCH -c 8\nsrun -K -c {value} torchrun train.py\n") == []


def test_a_quote_may_be_open_over_several_lines() -> None:
    script = "#SBATCH -N 2\nsrun -K bash -c 'cd src\n  torchrun $SLURM_NODEID\n'\ntorchrun x\n"
    assert rules(script) == [(5, "no-srun")]
    assert rules(script.replace("'", '"')) == [(2, "expanded-early"), (5, "no-srun")]


@pytest.mark.parametrize(
    "line",
    ["echo it\\'s", "echo 1 # it's", """echo "$(echo 'a"b')" """, "echo $'it\\'s'", "echo $((1<<EOF))"],
)
def test_what_opens_no_quote_hides_nothing(line: str) -> None:
    assert rules(f"#SBATCH -N 2\n{line}\ntorchrun train.py\n") == [(3, "no-srun")]


@pytest.mark.parametrize("begin", ["<<EOF", "<< 'EOF'", "<<-\\EOF", '> it <<"EOF" # it\'s'])
def test_a_heredoc_is_data(begin: str) -> None:
    end = "\tEOF" if "-" in begin else "EOF"
    script = f"#SBATCH -N 2\ncat {begin}\ntorchrun it's $SLURM_NODEID\n{end}\ntorchrun train.py\n"
    assert rules(script) == [(5, "no-srun")]


def test_a_comment_is_no_command() -> None:
    assert rules("#!/bin/bash\n# accelerate launch --main_process_port 29500\nhostname # torchrun\n") == []


def test_options_after_the_first_command_are_not_options() -> None:
    assert rules("hostname\n#SBATCH --output=$HOME/x\n") == []


@pytest.mark.parametrize("slurm", [SlurmSection(), SlurmSection(exclusive=True, partition="a b")])
def test_our_own_script_has_none(slurm: SlurmSection) -> None:
    job = BatchJob(
        "run", "runs/run", supervise_command("launcher", "runs/run"), 4, 8, 64, slurm, {"A": "b"}, 120
    )
    assert rules(render_job(job, TEMPLATE.read_text(encoding="utf-8"))) == []
