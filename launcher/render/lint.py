"""The known faults of job scripts, whoever wrote them: each with its line and its remedy. Pure.

A script is read line by line, the lines of one command joined; nothing is run or expanded. What starts
training is known by its name: `accelerate launch`, torchrun and the like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: `line` counts from 1; `rule` is its short name."""

    line: int
    rule: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the script, the lines that it goes on over joined; `line` is its first."""

    line: int
    text: str


LAUNCHERS: Final = re.compile(
    r"\b(accelerate\s+launch|torchrun|torch\.distributed\.(?:run|launch)|deepspeed|launcher\.worker)\b"
)
PROGRAM: Final = re.compile(LAUNCHERS.pattern + r"|\bpython[\d.]*\s+(?!-c\b)")
"""What srun may start one of for each rank, without a launcher."""
SRUN: Final = re.compile(
    r"(?:^|[;&|(!]|\b(?:exec|time|nohup|env|if|then|else|do)\s)\s*(?:\S+=\S*\s+)*(?:\S*/)?srun\b"
)
PER_TASK: Final = r"SLURM_(?:PROCID|NODEID|LOCALID|TASK_PID)"
_FALLBACK: Final = r"""["']?(?:\$\{\w+:?[-=])?"""
PORT: Final = re.compile(
    rf"""(?:(?:MASTER_PORT|main_process_port|master[-_]port)[ =]+{_FALLBACK}|rdzv[-_]endpoint[ =]\S*:)"""
    r"""(?P<port>\d{4,5})(?=["'}]*(?:[\s;]|$))"""
)
"""Given as a number, or as what is taken where a variable is not set."""
LOCALHOST: Final = re.compile(
    rf"(?:MASTER_ADDR|main_process_ip|master[-_]addr|rdzv[-_]endpoint)[ =]+{_FALLBACK}"
    r"(?:localhost|127\.0\.0\.1)"
    r"|\|\|\s*echo\s+[\"']?(?:localhost|127\.0\.0\.1)"
)
VARIABLE: Final = re.compile(r"\$\{?([A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class Script:
    """A job script taken apart: its #SBATCH lines as (line, text), and its commands."""

    options: tuple[tuple[int, str], ...]
    commands: tuple[Command, ...]

    def option(self, *names: str) -> tuple[int, str] | None:
        """Line and value (empty: none) of the last #SBATCH option of one of these names."""
        found = None
        for line, text in self.options:
            for name in names:
                pattern = rf"--{name}(?:[= ]\s*(\S+)|(?=\s|$))" if len(name) > 1 else rf"-{name}\s*(\S+)"
                match = re.search(rf"(?:^|\s){pattern}", text)
                found = (line, (match[1] or "").strip("\"'")) if match else found
        return found

    def nodes(self) -> int:
        """How many nodes are asked for; where that is a range, the least."""
        asked = self.option("nodes", "N")
        match = re.match(r"\d+", asked[1]) if asked else None
        return int(match[0]) if match else 1

    def training(self) -> list[Command]:
        """The commands that start training."""
        return [command for command in self.commands if LAUNCHERS.search(command.text)]

    def says(self, pattern: str) -> bool:
        return any(re.search(pattern, command.text) for command in self.commands)


def lint(text: str) -> list[Finding]:
    """Every known fault in a job script, by line."""
    script = take_apart(text)
    found = [finding for rule in RULES for finding in rule(script)]
    return sorted(found, key=lambda finding: (finding.line, finding.rule))


def is_job_script(text: str) -> bool:
    """Whether it is a shell script at all, which sbatch takes, or has options for it."""
    return text.startswith("#!") or re.search(r"^\s*#SBATCH", text, re.MULTILINE) is not None


def take_apart(text: str) -> Script:
    """sbatch reads options until the first line that is neither empty nor a comment."""
    options: list[tuple[int, str]] = []
    commands: list[Command] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        stripped = lines[at].strip()
        if stripped and not stripped.startswith("#"):
            command, after = _command_at(lines, at)
            commands.append(Command(at + 1, command))
            at = after
            continue
        at += 1
        if stripped.startswith("#SBATCH"):
            options.append((at, _read_line(stripped.removeprefix("#SBATCH"), "")[0].strip()))
    first = commands[0].line if commands else len(text)
    early = tuple(each for each in options if each[0] < first)
    return Script(early, tuple(commands))


def _command_at(lines: Sequence[str], at: int) -> tuple[str, int]:
    """The command that begins in this line, and the index of the line after it.

    A quote that nothing closes is one that was misread here: the command then ends with its line.
    """
    parts: list[str] = []
    inside, without_quote = "", None
    while at < len(lines):
        kept, inside, heredocs = _read_line(lines[at].strip(), inside)
        at = _after_bodies(lines, at + 1, heredocs)
        if kept.endswith("\\"):
            parts.append(kept[:-1] + " ")
            continue
        parts.append(kept + "\n")
        found = ("".join(parts).strip(), at)
        if not set(inside) & set("\"'"):
            return found
        without_quote = without_quote or found
    return without_quote or ("".join(parts), at)


def _after_bodies(lines: Sequence[str], at: int, heredocs: Sequence[re.Match[str]]) -> int:
    """The index of the line after the bodies of these heredocs, which are data."""
    for heredoc in heredocs:
        indented = "\t" if heredoc["tabs"] else ""
        ends = (each for each in range(at, len(lines)) if lines[each].lstrip(indented) == heredoc["end"])
        at = next(ends, at - 1) + 1
    return at


_COMMAND: Final = re.compile(
    r"""\\.|['"()]|(?<!\S)\#.*|<<<|<<(?P<tabs>-?)\s*(?P<quote>["']?)\\?(?P<end>\w+)(?P=quote)"""
)
_MARKS: Final[Mapping[str, re.Pattern[str]]] = {
    "": _COMMAND,
    ")": _COMMAND,
    "'": re.compile("'"),
    '"': re.compile(r'\\.|"|\$\('),
}
"""What changes the meaning of what follows, by what has to be closed."""
_CLOSED_BY: Final[Mapping[str, str]] = {"'": "'", '"': '"', "(": ")", "$(": ")"}


def _read_line(line: str, inside: str) -> tuple[str, str, list[re.Match[str]]]:
    """A line without the comment at its end, what then has to be closed, the last first to be, and the
    heredocs that begin in it. `inside`: what has to be closed before it."""
    heredocs: list[re.Match[str]] = []
    at = 0
    while match := _MARKS[inside[-1:]].search(line, at):
        mark, at = match[0], match.end()
        if mark.startswith("#"):
            line = line[: match.start()].rstrip()
        elif mark == inside[-1:]:
            inside = inside[:-1]
        elif mark in _CLOSED_BY:
            inside += _CLOSED_BY[mark]
        elif match.groupdict().get("end"):
            heredocs.append(match)
    return line, inside, heredocs


def _variable_in_option(script: Script) -> Iterator[Finding]:
    for line, text in script.options:
        if match := VARIABLE.search(text):
            yield Finding(
                line,
                "variable-in-option",
                f"sbatch does not expand ${match[1]}: no shell reads an #SBATCH line",
                "write the value itself, give it on sbatch's command line, or use sbatch's own %j, %x and %A",
            )


def _expanded_early(script: Script) -> Iterator[Finding]:
    """In the batch script a variable of each task has the value of the first."""
    for command in script.commands:
        where = SRUN.search(command.text)
        early = _outside_single_quotes(command.text)
        if (match := re.search(rf"(?<!\\)\$\{{?({PER_TASK})\b", early)) and (
            where or LAUNCHERS.search(command.text) or re.match(r"(?:export\s+)?\w+=", command.text)
        ):
            yield Finding(
                command.line,
                "expanded-early",
                f"${match[1]} is expanded in the batch script, where it is 0: each node is told so",
                f"have a shell on each node expand it: srun bash -c '... ${match[1]} ...', in single quotes",
            )


def _outside_single_quotes(text: str) -> str:
    """What the batch script's own shell expands."""
    return re.sub(r"'[^']*'", "", text)


def _without_srun(script: Script) -> Iterator[Finding]:
    if script.nodes() < 2:
        return
    for command in script.training():
        if not SRUN.search(command.text) and not _wrapped(script, command):
            yield Finding(
                command.line,
                "no-srun",
                f"this runs on the first of {script.nodes()} nodes only",
                "put `srun --kill-on-bad-exit=1` before it, with one task a node",
            )


def _wrapped(script: Script, command: Command) -> bool:
    """Whether it is the value of a variable that an srun of the script runs."""
    match = re.match(r"(?:export\s+)?(\w+)=", command.text)
    return match is not None and any(
        SRUN.search(other.text) and re.search(rf"\$\{{?{match[1]}\b", other.text) for other in script.commands
    )


def _runs(script: Script) -> list[Command]:
    """The srun commands that start training, themselves or by a variable."""
    names = [
        match[1]
        for command in script.training()
        if (match := re.match(r"(?:export\s+)?(\w+)=", command.text))
    ]
    by_name = re.compile(rf"\$\{{?(?:{'|'.join(names)})\b") if names else None
    return [
        command
        for command in script.commands
        if SRUN.search(command.text)
        and (PROGRAM.search(command.text) or (by_name is not None and by_name.search(command.text)))
    ]


def _cpus_not_passed_on(script: Script) -> Iterator[Finding]:
    asked = script.option("cpus-per-task", "c")
    if asked is None or script.says(r"SRUN_CPUS_PER_TASK="):
        return
    for command in _runs(script):
        if not re.search(r"\s(?:--cpus-per-task[ =]|-c *(?:\d|\"?\$\{?SLURM_CPUS))", command.text):
            yield Finding(
                command.line,
                "cpus-not-passed-on",
                f"from Slurm 22.05 on, srun does not take over --cpus-per-task (line {asked[0]}): "
                "the ranks share one CPU",
                'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" before it',
            )


def _signal_past_the_shell(script: Script) -> Iterator[Finding]:
    asked = script.option("signal")
    if asked is None or asked[1].upper().startswith(("B:", "RB:", "BR:")):
        return
    if not script.training() and not script.says(r"\btrap\b.*\bUSR1\b"):
        return  # a program that srun starts, and that handles the signal itself
    yield Finding(
        asked[0],
        "signal-without-b",
        f"--signal={asked[1]} goes to the tasks of srun, and not to this script: torch's launchers die of it",
        f"write --signal=B:{asked[1]}, and have the script (or what it execs) handle it",
    )


def _localhost(script: Script) -> Iterator[Finding]:
    if script.nodes() < 2:
        return
    for command in script.commands:
        if LOCALHOST.search(command.text):
            yield Finding(
                command.line,
                "localhost-fallback",
                "each node that takes localhost for the meeting place trains alone",
                'take the first host: $(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            )


def _fixed_port(script: Script) -> Iterator[Finding]:
    for command in script.commands:
        if match := PORT.search(command.text):
            yield Finding(
                command.line,
                "fixed-port",
                f"two jobs on a node that both take port {match['port']} collide, or join each other",
                "derive it from the job: $((20000 + SLURM_JOB_ID % 10000))",
            )


def _survivors(script: Script) -> Iterator[Finding]:
    if script.says(r"SLURM_KILL_BAD_EXIT=1"):
        return
    for command in _runs(script):
        if script.nodes() < 2 and not script.training():
            continue  # any program, on one node
        if not re.search(r"\s(?:--kill-on-bad-exit(?:=1)?|-K1?)(?=\s)", command.text):
            yield Finding(
                command.line,
                "no-kill-on-bad-exit",
                "when one node fails, the others wait for it until the time limit",
                "srun --kill-on-bad-exit=1",
            )


def _log_overwritten(script: Script) -> Iterator[Finding]:
    requeued = script.option("requeue")
    asks = next((c for c in script.commands if re.search(r"scontrol\s+requeue", c.text)), None)
    line = requeued[0] if requeued else asks.line if asks else None
    if line is None:
        return
    mode = script.option("open-mode")
    if mode is None or not mode[1].startswith("a"):
        yield Finding(
            line,
            "log-overwritten",
            "when the job is requeued, its log is cut to nothing, with what it said of the failure",
            "#SBATCH --open-mode=append",
        )


RULES: Final[Sequence[Callable[[Script], Iterator[Finding]]]] = (
    _variable_in_option,
    _expanded_early,
    _without_srun,
    _cpus_not_passed_on,
    _signal_past_the_shell,
    _localhost,
    _fixed_port,
    _survivors,
    _log_overwritten,
)
