"""Stop, kill, damage, fill, freeze: real training on real text, compared with an undisturbed run to the bit.

./scripts/chaos [--stops N] [--kills N] [--supervised N] [--others N] [--short] [--seed N] [--write]

The text is the Python standard library's own source. Ranks are real processes that talk through gloo, forked
from this one so that an attempt costs a second instead of ten; where a row is about the supervisor, it is
`launcher train`. Weights are compared by their bytes; and every rank notes the rows that enter the model, so
that the rows of each step can be compared too, each trained once. Prints a card; exit code 1 where one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

from launcher.run import checkpoints as ledger
from launcher.run import journal
from launcher.run.directory import RunDirectory
from launcher.run.heartbeat import read_beat
from launcher.run.outcome import Outcome, read_end
from launcher.worker import main as worker

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/benchmarks/reliability.md"
STEPS = 120
LONG_STEPS = 5 * STEPS
"""Of a run in which a rank is frozen: found, it is let go on while it writes its stacks, and is not to finish
in these seconds."""
SKEW_SECONDS = 2.0
HANG_SECONDS = 120.0
"""An attempt that takes longer hangs."""
CHARACTERS = 1_500_000
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LATE = 0.03
"""Seconds after the start of a save within which a kill that is meant for it comes."""

Rows = dict[int, list[str]]


class Record(TrainerCallback):
    """Notes, in the run directory, the rows that enter the model in each step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        file = Path(args.output_dir, f"rows-{args.process_index}.jsonl")
        attempt = int(os.environ["LAUNCHER_ATTEMPT"])

        def note(module: Any, _: Any, inputs: Mapping[str, Any]) -> None:
            if module.training:
                rows = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in inputs["input_ids"].numpy()]
                said = {"step": state.global_step + 1, "attempt": attempt, "rows": rows}
                with file.open("a", encoding="utf-8") as stream:
                    print(json.dumps(said), file=stream)

        model.register_forward_pre_hook(note, with_kwargs=True)


def rows_of(directory: RunDirectory) -> Rows:
    """The rows of each step, as they were trained last: what came after a checkpoint and was lost is not."""
    noted: dict[int, tuple[int, list[str]]] = {}
    for file in directory.root.glob("rows-*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill
                said = json.loads(line)
                attempt, rows = noted.get(said["step"], (0, []))
                if said["attempt"] >= attempt:
                    kept = rows if said["attempt"] == attempt else []
                    noted[said["step"]] = (said["attempt"], kept + said["rows"])
    return {step: sorted(rows) for step, (_, rows) in noted.items()}


def losses_of(directory: RunDirectory) -> list[tuple[int, float]]:
    lines = map(json.loads, directory.metrics.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def weights_of(directory: RunDirectory) -> bytes:
    return (directory.model / "model.safetensors").read_bytes()


@dataclass
class Bench:
    """Run directories that are ready to be trained, by world size and kind: with dropout, without, longer,
    under zero2, with streamed text."""

    folder: Path
    rng: random.Random
    count: int = 0
    undisturbed: dict[tuple[str, int], RunDirectory] = field(default_factory=dict)

    def prepare(self) -> None:
        library = Path(sysconfig.get_paths()["stdlib"])
        text = "".join(file.read_text("utf-8", "replace") for file in sorted(library.glob("*.py")))[
            :CHARACTERS
        ]
        (self.folder / "text.txt").write_text(text, encoding="utf-8")
        for ranks in (1, 2, 4):
            cluster = {"name": f"{ranks}", "gpu": "cpu", "gpus_per_node": ranks}
            (self.folder / f"{ranks}.yaml").write_text(json.dumps(cluster))
        run: dict[str, Any] = {
            "model": {
                "name": "gpt2",
                "tokenizer": {"train": {"vocab_size": 1000}},
                "overrides": {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64},
            },
            "data": {"train": ["text.txt"], "validation": 0.01, "sample_by": "line", "block_size": 64},
            "train": {
                "batch_size": 8,
                "micro_batch": 2,
                "steps": STEPS,
                "learning_rate": 1e-3,
                "log_every": 1,
                "eval_every": 50,
                "callbacks": ["scripts.chaos:Record"],
            },
            "checkpoint": {"every": 15},
            "report_to": [],
        }
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        kinds: dict[str, dict[str, Any]] = {
            "drop": {},
            "quiet": {"model": {**run["model"], "overrides": {**run["model"]["overrides"], **quiet}}},
            "long": {"train": {**run["train"], "steps": LONG_STEPS}},
            "zero2": {"train": {**run["train"], "strategy": "zero2"}},
            "stream": {"data": {**run["data"], "mode": "stream"}},
        }
        for name, other in kinds.items():
            (self.folder / f"{name}.yaml").write_text(json.dumps({**run, **other, "name": name}))

    def directory(self, kind: str, ranks: int, at: Path | None = None) -> RunDirectory:
        """A run directory of its own, that nothing has been trained in."""
        template = self.folder / f"ready-{kind}-{ranks}"
        if not template.exists():
            write_ready(self.folder, kind, ranks, template)
        self.count += 1
        root = (at or self.folder / "trials") / f"{self.count}"
        shutil.copytree(template, root)
        return RunDirectory(root)

    def reference(self, kind: str, ranks: int) -> RunDirectory:
        """The same run, undisturbed; every row of its text is trained once."""
        if (kind, ranks) not in self.undisturbed:
            directory = self.directory(kind, ranks)
            attempt = Attempt(directory, ranks)
            assert attempt.wait() == {Outcome.FINISHED}, attempt.said()
            trained = [row for rows in rows_of(directory).values() for row in rows]
            assert len(trained) == len(set(trained)) == 8 * (LONG_STEPS if kind == "long" else STEPS)
            self.undisturbed[kind, ranks] = directory
        return self.undisturbed[kind, ranks]

    def differs(self, directory: RunDirectory, kind: str, ranks: int) -> str:
        """What of a disturbed run is not as it should be; empty: nothing."""
        reference = self.reference(kind, ranks)
        ours, theirs = losses_of(directory), losses_of(reference)
        attempts = range(1, directory.next_attempt())
        ends = [read_end(directory.record(attempt, 0)) for attempt in attempts]
        about = f"on {ranks} ranks; attempts ended at {[end and end.step for end in ends]}"
        for one, other in zip(ours, theirs, strict=False):
            if one != other:
                return f"another loss from step {one[0]} on ({one[1]}, {other[1]}) {about}"
        if len(ours) != len(theirs) or weights_of(directory) != weights_of(reference):
            return f"other weights {about}"
        return "" if rows_of(directory) == rows_of(reference) else f"other rows {about}"


def write_ready(folder: Path, kind: str, ranks: int, template: Path) -> None:
    """What `launcher train` writes before it starts the ranks."""
    from launcher.cli.arguments import assembled
    from launcher.run.assemble import assemble, write_run
    from launcher.run.text import ready_text

    with contextlib.chdir(folder):
        draft = assembled(
            Path(f"{kind}.yaml"), [f"name={template.name}", "output_dir=."], Path(f"{ranks}.yaml")
        )
        text = ready_text(draft, 1, lambda *_: None, lambda _: None)
        write_run(
            assemble(draft.run, draft.cluster, draft.machine, text), RunDirectory(template), text, "{}\n"
        )


def accelerate_says(directory: RunDirectory) -> dict[str, str]:
    """What `accelerate launch` puts into the environment of the ranks, for the engine."""
    if not directory.deepspeed.exists():
        return {"ACCELERATE_USE_CPU": "true"}
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(directory.deepspeed)}


class Attempt:
    """Ranks of a run, forked from this process, which has imported all they need."""

    def __init__(
        self, directory: RunDirectory, ranks: int, first: Callable[[int], None] = lambda _: None
    ) -> None:
        self.directory = directory
        self.number = directory.next_attempt()
        self.ranks = ranks
        directory.logs(self.number).mkdir(parents=True)
        self._noted = self._size()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.living = {self._fork(rank, port, first): rank for rank in range(ranks)}
        self.begun = time.monotonic()

    def _fork(self, rank: int, port: int, first: Callable[[int], None]) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            log = os.open(self.directory.launch_log(self.number), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"LAUNCHER_ATTEMPT": f"{self.number}", **accelerate_says(self.directory)}
            if self.ranks > 1:  # accelerate gives a single process none of these either
                os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "MASTER_PORT": f"{port}"}
                size = f"{self.ranks}"
                os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            first(rank)
            code = worker.main([str(self.directory.root)])
        except BaseException:  # noqa: BLE001 - it must not go on as the parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _size(self) -> int:
        file = self.directory.root / "rows-0.jsonl"
        return file.stat().st_size if file.exists() else 0

    def reap(self) -> bool:
        """Whether a rank is still there."""
        for pid in list(self.living):
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                del self.living[pid]
        return bool(self.living)

    def until(self, happens: Callable[[], bool]) -> bool:
        """Wait until it `happens`; False where a rank has ended before."""
        deadline = time.monotonic() + HANG_SECONDS
        while not happens():
            if not self.reap() or len(self.living) < self.ranks or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def trains(self) -> bool:
        return self._size() > self._noted

    def saves(self) -> bool:
        return any(self.directory.checkpoints.glob(".step-*.writing"))

    def send(self, number: int, pids: list[int] | None = None) -> None:
        for pid in self.living if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float = HANG_SECONDS) -> set[Outcome]:
        """How its ranks ended, by their last words. Raises AssertionError where they hang."""
        deadline = time.monotonic() + seconds
        while self.reap():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"attempt {self.number} hangs: {self.directory.root}")
            time.sleep(0.01)
        ends = [read_end(self.directory.record(self.number, rank)) for rank in range(self.ranks)]
        return {end.outcome for end in ends if end is not None}

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def said(self) -> str:
        files = sorted(self.directory.logs(self.number).glob("*"))
        return "\n".join(file.read_text("utf-8", "replace")[-2000:] for file in files if file.is_file())


Row = Iterator[str]
"""What a row tries, one after another: each an empty text, or what was wrong."""


def stops(bench: Bench, count: int, kind: str = "drop", worlds: Sequence[int] = (2, 4)) -> Row:
    """Stop requests, at random moments, to one random rank or more, with skews up to 2 s."""
    done = 0
    while done < count:
        ranks = bench.rng.choice(worlds)
        directory = bench.directory(kind, ranks)
        finished = False
        while not finished:
            attempt = Attempt(directory, ranks)
            asks = done < count and attempt.until(attempt.trains)
            if asks:
                time.sleep(bench.rng.uniform(0, 1.5))
                attempt.reap()
                living = list(attempt.living)
                pids = bench.rng.sample(living, min(len(living), bench.rng.randint(1, ranks)))
                for pid in pids:
                    attempt.send(bench.rng.choice(SIGNALS), [pid])
                    if pid != pids[-1]:
                        time.sleep(bench.rng.uniform(0, SKEW_SECONDS))
            outcomes = attempt.wait()
            finished = outcomes == {Outcome.FINISHED}
            if outcomes == {Outcome.STOPPED}:
                done += 1
                yield _one_checkpoint(attempt)
            elif not finished:
                done += 1
                yield f"{outcomes or 'nothing said'}: {attempt.said()}"
                break
        else:
            if wrong := bench.differs(directory, kind, ranks):
                yield wrong
        shutil.rmtree(directory.root)


def _one_checkpoint(attempt: Attempt) -> str:
    """All ranks stopped at one step, which has a checkpoint that verifies."""
    ends = [read_end(attempt.directory.record(attempt.number, rank)) for rank in range(attempt.ranks)]
    steps = {end.step for end in ends if end is not None}
    good = ledger.latest_good(attempt.directory.checkpoints)
    left = list(attempt.directory.checkpoints.glob(".*"))
    if good is None or steps != {good.step} or left:
        return f"stopped at {steps}, saved {good and good.step}, left {left}"
    return ""


def kills(bench: Bench, count: int, kind: str = "drop") -> Row:
    """SIGKILL of a random rank or of all, three in five of them while a checkpoint is written."""
    done = 0
    while done < count:
        directory = bench.directory(kind, 2)
        for _ in range(6):
            attempt = Attempt(directory, 2)
            saving = bench.rng.random() < 0.6
            if saving and attempt.until(attempt.saves):
                time.sleep(bench.rng.uniform(0, LATE))
            elif not saving:
                attempt.until(attempt.trains)
                time.sleep(bench.rng.uniform(0, 3))
            if attempt.reap() and len(attempt.living) == 2 and done < count:
                done += 1
                attempt.send(signal.SIGKILL, bench.rng.sample(list(attempt.living), bench.rng.choice((1, 2))))
                attempt.until(lambda: False)
                attempt.kill()  # as the supervisor does
                yield ""
            elif attempt.wait() == {Outcome.FINISHED}:
                break
        else:
            attempt = Attempt(directory, 2)
            attempt.wait()
        yield bench.differs(directory, kind, 2) if directory.model.is_dir() else attempt.said()
        shutil.rmtree(directory.root)


def damage(bench: Bench, _: int) -> Row:
    """Every file of a checkpoint truncated, bit-flipped or removed in turn."""
    whole = bench.reference("drop", 2).checkpoints
    older, newest = ledger.committed(whole)[-2:]
    for name in [*newest.files, ledger.MANIFEST]:
        for spoil in (_truncate, _flip, Path.unlink):
            copy = bench.folder / "damaged"
            shutil.copytree(whole, copy)
            spoil(copy / newest.folder.name / name)
            good = ledger.latest_good(copy)
            used = None if good is None else good.step
            moved = ledger.set_aside_damaged(copy, used or 0)
            named = name == ledger.MANIFEST or name in "".join(why for _, why in moved)
            aside = (copy / "quarantine" / newest.folder.name).is_dir()
            yield (
                "" if used == older.step and named and aside else f"{spoil.__name__} {name}: {used}, {moved}"
            )
            shutil.rmtree(copy)
    directory = bench.directory("drop", 2)
    shutil.copytree(whole, directory.checkpoints)
    for each in ledger.committed(directory.checkpoints):
        _flip(each.folder / ledger.STATE)
    for _turn in ("as they are found", "once they are set aside"):
        attempt = Attempt(directory, 2)
        refused = (
            attempt.wait() == {Outcome.CRASHED} and "no checkpoint of this run is good" in attempt.said()
        )
        yield "" if refused and not rows_of(directory) else f"all damaged: {attempt.said()}"


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


@contextlib.contextmanager
def small_disk(bench: Bench, size: str) -> Iterator[Path]:
    folder = bench.folder / "disk"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(bench: Bench, _: int) -> Row:
    """A file system that fills up while a checkpoint is written; then room is made."""
    with small_disk(bench, "64m") as disk:
        directory = bench.directory("drop", 2, disk)
        attempt = Attempt(directory, 2)
        attempt.until(lambda: bool(ledger.committed(directory.checkpoints)))
        attempt.until(attempt.saves)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 16))
        attempt.until(lambda: False)
        attempt.kill()
        said = attempt.said()
        good = ledger.latest_good(directory.checkpoints)
        yield "" if good is not None else "no good checkpoint is left"
        yield "" if "No space left on device" in said or "are free" in said else f"it does not say so: {said}"
        filler.unlink()
        Attempt(directory, 2).wait()
        yield bench.differs(directory, "drop", 2)


def read_only(bench: Bench, _: int) -> Row:
    """A file system that becomes read-only, and writable again."""
    with small_disk(bench, "64m") as disk:
        directory = bench.directory("drop", 2, disk)
        attempt = Attempt(directory, 2)
        attempt.until(lambda: bool(ledger.committed(directory.checkpoints)))
        # Files that are open for writing keep a file system from it, as they would a person.
        forced = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, text=True)
        if forced.returncode:
            directory.checkpoints.rename(disk / "away")
            directory.checkpoints.write_text("not a folder: nothing can be written here\n")
        attempt.until(lambda: False)
        attempt.kill()
        if forced.returncode:
            directory.checkpoints.unlink()
            (disk / "away").rename(directory.checkpoints)
        else:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        Attempt(directory, 2).wait()
        yield bench.differs(directory, "drop", 2)


def clock(bench: Bench, _: int) -> Row:
    """The ranks' clock of the day jumps a day ahead and back again, every tenth of a second."""
    real = time.time

    def jump(_: int) -> None:
        time.time = lambda: real() + 86400 * (int(time.monotonic() * 10) % 3 - 1)

    directory = bench.directory("drop", 2)
    yield "" if Attempt(directory, 2, jump).wait() == {Outcome.FINISHED} else "not finished"
    yield bench.differs(directory, "drop", 2)


def worlds(bench: Bench, count: int) -> Row:
    """Stopped at random steps, and gone on with on another number of ranks."""
    reference = bench.reference("quiet", 2)
    directory, ranks = bench.directory("quiet", 2), 2
    for number in range(count + 1):
        attempt = Attempt(directory, ranks)
        if number < count and attempt.until(attempt.trains):
            time.sleep(bench.rng.uniform(0, 0.5))
            attempt.send(signal.SIGUSR1)
        outcomes = attempt.wait()
        if outcomes == {Outcome.FINISHED}:
            break
        if outcomes != {Outcome.STOPPED}:
            yield f"on {ranks} ranks: {outcomes or 'nothing said'}: {attempt.said()}"
            return
        ranks = bench.rng.choice([each for each in (1, 2, 4) if each != ranks])
        other = bench.directory("quiet", ranks)
        for name in ("plan.json", "cluster.yaml"):
            shutil.copy(other.root / name, directory.root / name)
        yield ""
    ours, theirs = losses_of(directory), losses_of(reference)
    apart = max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True))
    yield "" if apart < 1e-4 else f"losses {apart} apart"
    yield "" if rows_of(directory) == rows_of(reference) else "other rows"


def supervised(bench: Bench, count: int) -> Row:
    """`launcher train`: its supervisor, a rank, accelerate or all killed, a rank frozen; then the same
    command again."""
    for number in range(count):
        name = f"supervised-{number}"
        what = ("supervisor", "rank", "everything", "freeze", "accelerate")[number % 5]
        kind = "long" if what == "freeze" else "drop"
        directory = RunDirectory(bench.folder / "runs" / name)
        command = [
            sys.executable,
            "-m",
            "launcher",
            "train",
            f"{kind}.yaml",
            f"name={name}",
            "--cluster",
            "2.yaml",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LAUNCHER_HANG_SECONDS": "8"}
        code = None
        for attempt in range(4):
            process = subprocess.Popen(
                command,
                cwd=bench.folder,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if attempt == 0:
                _disturb(process, directory, what)
            code = process.wait(timeout=600)
            if code == 0:
                break
        outcomes = [each["outcome"] for each in journal.read(directory.journal) if "outcome" in each]
        wrong = f"{what}: it ended with {code}, {outcomes}" if code else bench.differs(directory, kind, 2)
        yield wrong or ("" if what != "freeze" or "HUNG" in outcomes else f"frozen, and only {outcomes}")


def _disturb(process: subprocess.Popen[bytes], directory: RunDirectory, what: str) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not any(directory.checkpoints.glob(".step-*.writing")) and time.monotonic() < deadline:
        time.sleep(0.002)
    # A save is given half an hour, a step of training the 8 s that were asked for.
    while what == "freeze" and not _trains(directory) and time.monotonic() < deadline:
        time.sleep(0.002)
    family = psutil.Process(process.pid).children(recursive=True)
    accelerate = [each for each in family if "launch" in each.cmdline()]
    ranks = [each for each in family if "launcher.worker" in each.cmdline() and each not in accelerate]
    if what == "freeze":
        ranks[-1].suspend()
    victims = {"rank": ranks[-1:], "accelerate": accelerate, "everything": family}.get(what, [])
    if what in ("supervisor", "everything"):
        process.kill()
    for each in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def _trains(directory: RunDirectory) -> bool:
    beat = read_beat(directory.heartbeat(1, 1))
    return beat is not None and beat.phase == "training"


@dataclass(frozen=True)
class Result:
    """One row of the card."""

    what: str
    tried: int
    wrong: list[str]
    seconds: float


def play(what: str, row: Row) -> Result:
    begun, tried, wrong = time.monotonic(), 0, []
    try:
        for said in row:
            tried += 1
            if said:
                wrong.append(said)
                print(f"  {what}: {said}", flush=True)
    except Exception:  # noqa: BLE001 - a row that cannot be played has failed
        wrong.append(traceback.format_exc())
        print(wrong[-1], flush=True)
    result = Result(what, tried, wrong, time.monotonic() - begun)
    print(_line(result), flush=True)
    return result


def _line(result: Result) -> str:
    state = f"FAIL, {len(result.wrong)}" if result.wrong else "pass"
    return f"| {result.what} | {result.tried} | {state} | {result.seconds:.0f} |"


HEAD = "| what | checks | | seconds |\n|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stops", type=int, default=200)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--supervised", type=int, default=10, help="runs of `launcher train`")
    parser.add_argument(
        "--others", type=int, default=4, help="stops and kills each, under zero2 and streaming"
    )
    parser.add_argument("--worlds", type=int, default=12, help="changes of the number of ranks")
    parser.add_argument("--short", action="store_true", help="a few of each, without `launcher train`")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--write", action="store_true", help=f"keep the card in {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    if asked.short:
        asked.stops, asked.kills, asked.supervised, asked.worlds, asked.others = 3, 3, 0, 2, 0
    print(f"seed {asked.seed}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), random.Random(asked.seed))
        bench.prepare()
        rows: list[tuple[str, Row]] = [
            (f"{asked.stops} stop requests, skews up to 2 s, 2 and 4 ranks", stops(bench, asked.stops)),
            (f"{asked.kills} SIGKILLs of ranks, weighted towards saving", kills(bench, asked.kills)),
            ("every file of a checkpoint truncated, flipped, removed", damage(bench, 0)),
            ("a clock that jumps by days", clock(bench, 0)),
            (f"{asked.worlds} changes among 1, 2 and 4 ranks", worlds(bench, asked.worlds)),
        ]
        for kind, how in (("zero2", "under zero2"), ("stream", "with streamed text")):
            if asked.others:
                rows += [
                    (f"{asked.others} stop requests {how}", stops(bench, asked.others, kind, worlds=(2,))),
                    (f"{asked.others} SIGKILLs of ranks {how}", kills(bench, asked.others, kind)),
                ]
        if os.getuid() == 0:
            rows += [
                ("a disk that fills up in mid-write", full_disk(bench, 0)),
                ("a folder that becomes read-only", read_only(bench, 0)),
            ]
        if asked.supervised:
            rows.append(
                (
                    f"{asked.supervised} x `launcher train`: supervisor, rank, accelerate or all killed, "
                    "a rank frozen",
                    supervised(bench, asked.supervised),
                )
            )
        print(HEAD)
        results = [play(what, row) for what, row in rows]
    if asked.write:
        _, section, rest = PAGE.read_text(encoding="utf-8").partition("\n## ")
        PAGE.write_text(page(results, asked.seed) + section + rest, encoding="utf-8")
    sys.exit(any(result.wrong for result in results))


def page(results: list[Result], seed: int) -> str:
    called = f"`./scripts/chaos {shlex.join(sys.argv[1:])}`, seed {seed}, {os.cpu_count()} cores"
    head = (
        f"{called}, {datetime.now(UTC).date().isoformat()}: real training of a small GPT-2 on the standard "
        "library's source, gloo ranks, dropout on. After each disturbance the run goes on; its weights, the "
        "loss of every step and the rows that entered the model in it are then those of an undisturbed run, "
        "to the bit (on another number of ranks: without dropout, losses within 1e-4)."
    )
    return "\n".join(["# Stopped, killed, damaged", "", head, "", HEAD, *map(_line, results), ""])


if __name__ == "__main__":
    # As a module of its name, so that the ranks' callback is this class and not another of the same text.
    from scripts import chaos

    chaos.main()
