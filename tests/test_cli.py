"""The commands as a person types them: help, answers as JSON, exit codes."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from launcher import __version__
from launcher.cli import app, main
from launcher.config.presets import PRESETS
from launcher.plan.orders import Orders, format_orders
from launcher.run import checkpoints as ledger
from launcher.run.directory import RunDirectory, hold, write_text
from tests.conftest import Workplace, small_plan


def commands(group: TyperGroup, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    """Every command, with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, (*at, name))
        elif isinstance(command, TyperCommand):
            yield (*at, name), command


ROOT = get_command(app)
assert isinstance(ROOT, TyperGroup)
COMMANDS: Mapping[str, TyperCommand] = {" ".join(words): command for words, command in commands(ROOT)}


def test_the_commands_are_those_that_work() -> None:
    assert set(COMMANDS) == {
        *("init", "plan", "train", "generate", "explain", "doctor"),
        *("submit", "lint", "supervise", "status", "logs", "stop"),
        *("data prepare", "data verify", "data show"),
        *("checkpoint list", "checkpoint verify", "checkpoint export"),
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_the_command_itself_takes(name: str) -> None:
    words = name.split()
    shown = CliRunner().invoke(app, [*words, "-h"], prog_name="launcher")
    assert shown.exit_code == 0
    assert f"Usage: launcher {name}" in shown.stdout
    example = " ".join(shown.stdout.split("Example: ")[1].split())
    program, *rest = shlex.split(example)
    assert program == "launcher"
    assert rest[: len(words)] == words
    COMMANDS[name].make_context(name, rest[len(words) :])
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for(name: str) -> None:
    for parameter in COMMANDS[name].params:
        if parameter.name != "help":
            assert getattr(parameter, "help", None), f"{name}: {parameter.name}"


@pytest.mark.parametrize(
    "arguments",
    [
        *([name] for name in ("report", "frobnicate")),
        ["plan"],
        ["plan", "run.yaml", "--frobnicate"],
        ["data", "frobnicate"],
        ["checkpoint", "list", ".", "--json=1"],
        ["data", "show", ".", "--step", "0"],
        ["generate", "model", "--tokens", "many"],
        [],
    ],
    ids=" ".join,
)
def test_what_there_is_not_is_refused_with_code_2(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stdout == "" or not arguments
    assert "Traceback" not in done.output


def test_plan_explain_and_doctor_answer_in_json(workplace: Workplace) -> None:
    plan = workplace.answered("plan", "run.yaml", "--cluster", "two.yaml", "train.steps=7")
    assert plan["plan"]["batch"]["world_size"] == 2
    assert plan["tokens"] == 7 * 8 * 64
    (entry,) = workplace.answered("explain", "run.yaml", "train.steps", "train.steps=7")
    assert (entry["value"], entry["set_by"]) == ("7", "override train.steps=7")
    checks = {
        check["check"]: check["state"] for check in workplace.answered("doctor", "--cluster", "two.yaml")
    }
    assert checks["cluster"] == checks["torch"] == "ok"


def test_a_plan_follows_the_attention_that_a_run_asks_for(workplace: Workplace) -> None:
    asked = "model.overrides.attn_implementation=flash_attention_2"
    fast = workplace.answered("plan", "run.yaml", asked)["plan"]["fast"]
    assert fast["reasons"]["causal_attention"] == "the model's attention is flash_attention_2"


def test_the_same_for_people(workplace: Workplace) -> None:
    before = workplace.files()
    plan = workplace.run("plan", "run.yaml", "--cluster", "two.yaml")
    for part in ("what you asked: small", "what it becomes", "micro-batch 4 x accumulation 1 x 2 ranks"):
        assert part in plan.stdout
    explained = workplace.run("explain", "run.yaml", "checkpoint")
    assert "checkpoint.every = 10" in explained.stdout
    assert "checkpoint.keep = 2" in explained.stdout
    assert "torch" in workplace.run("doctor").stdout
    assert plan.stderr == explained.stderr == ""
    assert workplace.files() == before


def test_what_this_machine_lacks_is_code_3(workplace: Workplace) -> None:
    (workplace.folder / "gpus.yaml").write_text("gpu: h100-sxm-80gb\ngpus_per_node: 64\n")
    done = workplace.run("doctor", "--cluster", "gpus.yaml", "--json")
    assert done.returncode == 3
    assert "cluster" in [each["check"] for each in json.loads(done.stdout) if each["state"] == "missing"]


def test_plan_names_the_files_it_will_write(workplace: Workplace) -> None:
    plain = workplace.run("plan", "run.yaml").stdout.splitlines()[-1]
    sharded = workplace.run("plan", "run.yaml", "train.strategy=zero2", "--cluster", "two.yaml")
    assert plain.endswith("accelerate.yaml, launch.sh in runs/small")
    assert "deepspeed.json" not in plain
    assert "deepspeed.json in runs/small" in sharded.stdout.splitlines()[-1]


def test_a_plan_notes_text_that_is_not_there(workplace: Workplace) -> None:
    missing = ("data.train=[c*.txt, nosuch.txt, 's3://bucket/*']", "data.validation=[no/*]")
    done = workplace.run("plan", "run.yaml", *missing)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"note: data.train: no file matches nosuch.txt here (override {missing[0]})",
        f"note: data.validation: no file matches no/* here (override {missing[1]})",
    ]
    assert workplace.run("plan", "run.yaml").stderr == ""


def test_plan_writes_what_it_would_render(workplace: Workplace) -> None:
    done = workplace.run("plan", "run.yaml", "--write", "made", "--json")
    assert done.returncode == 0, done.stderr
    assert "not prepared: run `launcher data prepare` with the same arguments" in done.stderr
    assert {file.name for file in (workplace.folder / "made").iterdir()} == {
        *("config.yaml", "cluster.yaml", "plan.json", "accelerate.yaml", "launch.sh", "requests"),
    }
    written = json.loads((workplace.folder / "made" / "plan.json").read_text())
    assert written["plan"] == json.loads(done.stdout)["plan"]
    refused = workplace.run("plan", "run.yaml", "--write", "corpus.txt/made")
    assert refused.returncode == 2
    assert "--write" in refused.stderr
    (workplace.folder / "made" / "journal.jsonl").touch()
    before = workplace.files()
    refused = workplace.run("plan", "run.yaml", "train.steps=5", "--write", "made")
    assert (refused.returncode, "is the folder of a run" in refused.stderr) == (2, True)
    assert workplace.files() == before


def test_what_plan_writes_can_be_run_where_the_text_is_there(workplace: Workplace) -> None:
    asked = ("run.yaml", "train.steps=null", "train.epochs=1")
    unknown = "steps                   known once `launcher train` has prepared the text"
    assert unknown in workplace.run("plan", *asked).stdout
    store = workplace.answered("data", "prepare", *asked)["store"]
    assert " steps                   59, " in workplace.run("plan", *asked).stdout
    done = workplace.run("plan", *asked, "--write", "made")
    assert done.stderr == ""
    assert " steps                   59, " in done.stdout
    orders = RunDirectory(workplace.folder / "made").read_orders()
    assert (orders.store, orders.plan.steps) == (store, 59)
    streamed = workplace.run("plan", "run.yaml", "data.mode=stream", "--write", "streamed")
    assert streamed.stderr == ""
    directory = RunDirectory(workplace.folder / "streamed")
    assert directory.stream.is_file()
    assert directory.tokenizer.is_dir()


@pytest.mark.parametrize("preset", PRESETS)
def test_init_then_plan(tmp_path: Path, preset: str) -> None:
    here = Workplace(tmp_path)
    made = here.run("init", "my run.yaml", "--preset", preset)
    assert made.returncode == 0, made.stderr
    assert (made.stdout, made.stderr.splitlines()[-1]) == (
        "",
        "wrote my run.yaml; next: launcher plan 'my run.yaml'",
    )
    (tmp_path / "cluster.yaml").write_text("gpu: h100-sxm-80gb\ngpus_per_node: 8\nprice_per_gpu_hour: 2.5\n")
    plan = here.answered("plan", "my run.yaml", "--cluster", "cluster.yaml")["plan"]
    assert plan["forecast"]["price"] == pytest.approx(plan["forecast"]["hours"] * 8 * 2.5, rel=1e-3)
    shown = here.run("plan", "my run.yaml", "--cluster", "cluster.yaml").stdout
    assert "speed: a prediction, not measured on this GPU" in shown
    assert f"price                   {plan['forecast']['price']:,.2f}" in shown
    assert plan["name"] == "my run"
    assert plan["batch"]["batch_size"] == PRESETS[preset].batch_size
    assert plan["precision"] == "bf16"


def test_a_plan_on_a_cpu_speaks_of_no_gpu(workplace: Workplace) -> None:
    shown = workplace.run("plan", "run.yaml").stdout
    assert "(a prediction, not measured on a CPU)" in shown
    assert "\nspeed\n  speed                   not predicted on a CPU\n" in shown
    assert "this GPU" not in shown


WITHIN = "predicted; measured on one such GPU, within"
UNLIKE = "a prediction, not measured for such a run"


@pytest.mark.parametrize(
    ("setting", "gpus", "memory", "speed"),
    [
        ("seed=1", 1, f"{WITHIN} 5%", f"{WITHIN} 10%"),
        ("train.strategy=zero3", 1, f"{WITHIN} 5%", UNLIKE),
        ("train.compile=false", 1, f"{WITHIN} 5%", UNLIKE),
        ("train.gradient_checkpointing=true", 1, f"{WITHIN} 5%", UNLIKE),
        ("train.fast.causal_attention=false", 1, f"{WITHIN} 5%", UNLIKE),
        ("train.precision=fp16", 1, f"{WITHIN} 5%", UNLIKE),
        ("data.isolate_documents=true", 1, UNLIKE, UNLIKE),
        ("model.overrides={attn_implementation: eager}", 1, UNLIKE, UNLIKE),
        ("model.overrides={n_layer: 2}", 1, UNLIKE, UNLIKE),
        ("train.extra={optim: adafactor}", 1, UNLIKE, UNLIKE),
        ("data.block_size=512", 1, UNLIKE, UNLIKE),
        ("train.micro_batch=1", 1, f"{WITHIN} 5%", UNLIKE),
        ("train.precision=fp32", 1, UNLIKE, UNLIKE),
        ("seed=1", 2, UNLIKE, UNLIKE),
    ],
)
def test_a_plan_says_what_its_like_was_measured(
    tmp_path: Path, setting: str, gpus: int, memory: str, speed: str
) -> None:
    here = Workplace(tmp_path)
    here.run("init", "run.yaml")
    (tmp_path / "cluster.yaml").write_text(f"gpu: h200-sxm-141gb\ngpus_per_node: {gpus}\n")
    shown = here.run("plan", "run.yaml", setting, "--cluster", "cluster.yaml").stdout
    assert f" GiB ({memory})\n" in shown
    assert f"\nspeed: {speed}\n" in shown


def test_a_closed_stream_is_no_error(workplace: Workplace) -> None:
    launcher = f"{sys.executable} -m launcher plan run.yaml"
    for closed, code in ((">&-", 0), ("nosuch=1 2>&-", 2)):
        done = subprocess.run(
            f"{launcher} {closed}", shell=True, cwd=workplace.folder, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (code, "")


def test_init_writes_a_cluster_file_that_plan_takes(workplace: Workplace) -> None:
    assert workplace.run("init", "--cluster", "here.yaml").returncode == 0
    assert workplace.answered("plan", "run.yaml", "--cluster", "here.yaml")["plan"]["cluster"] == "my-machine"


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_only_a_cluster_with_slurm_takes_jobs(workplace: Workplace, dry: tuple[str, ...]) -> None:
    done = workplace.run("submit", "run.yaml", "--cluster", "two.yaml", *dry)
    assert done.returncode == 2
    assert "does not go through SLURM (launch: local)" in done.stderr
    assert "Traceback" not in done.stderr


def test_lint_reads_job_scripts_and_nothing_else(workplace: Workplace) -> None:
    other = workplace.run("lint", "run.yaml")
    assert (other.returncode, "run.yaml is no job script" in other.stderr) == (2, True)
    for text, code in (("#!/bin/bash\nhostname\n", 0), ("#SBATCH --output=$HOME/log\nhostname\n", 1)):
        (workplace.folder / "job").write_text(text)
        assert workplace.run("lint", "job").returncode == code


def test_the_version_alone_on_stdout(workplace: Workplace) -> None:
    done = workplace.run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_a_traceback_only_when_asked_for(workplace: Workplace) -> None:
    plain = workplace.run("plan", "nothing.yaml")
    assert (plain.returncode, plain.stdout) == (2, "")
    assert "error: nothing.yaml: no such file" in plain.stderr
    assert "Traceback" not in plain.stderr
    for debugged in (("--debug", "plan", "nothing.yaml"), ("plan", "nothing.yaml", "--debug")):
        debug = workplace.run(*debugged)
        assert "Traceback" in debug.stderr
        assert "ConfigError" in debug.stderr
        assert debug.returncode == 2


def test_a_store_is_prepared_shown_and_verified_and_a_flipped_byte_is_found(workplace: Workplace) -> None:
    prepared = workplace.answered("data", "prepare", "run.yaml", "--workers", "1")
    store = Path(prepared["store"])
    assert prepared["vocabulary"] == 300
    again = workplace.run("data", "prepare", "run.yaml")
    assert again.stdout == f"{store}\n"

    shown = workplace.answered("data", "show", str(store), "--samples", "1")
    counts = {split["split"]: split["documents"] for split in shown["splits"]}
    assert counts["train"] + counts["validation"] == 2000
    assert (
        shown["splits"][0]["samples"][0].removesuffix("<|endoftext|>")
        in (workplace.folder / "corpus.txt").read_text()
    )
    assert "documents" in workplace.run("data", "show", str(store)).stdout
    assert workplace.answered("data", "verify", str(store)) == {"store": str(store), "damage": []}
    assert "as it was written" in workplace.run("data", "verify", str(store)).stdout

    shard = next(store.glob("train*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    found = workplace.run("data", "verify", str(store), "--json")
    assert found.returncode == 2
    (damage,) = json.loads(found.stdout)["damage"]
    assert shard.name in damage
    assert f"damaged: {damage}" in found.stderr
    assert "hint:" in found.stderr
    assert not shard.exists()
    mended = workplace.run("data", "prepare", "run.yaml")
    assert mended.returncode == 0
    assert "1 damaged of 1 units" in mended.stderr
    content[len(content) // 2] ^= 1
    assert shard.read_bytes() == content
    assert workplace.answered("data", "verify", str(store))["damage"] == []


def test_a_store_in_parts(workplace: Workplace) -> None:
    corpus = (workplace.folder / "corpus.txt").read_text()
    for name in "abc":
        (workplace.folder / f"{name}.txt").write_text(f"{name}\n{corpus}")
    sources = ", ".join(f"{{name: {name}, files: [{name}.txt], weight: 1}}" for name in "abc")
    prepare = ("data", "prepare", "run.yaml", f"data.train=[{sources}]")
    first = workplace.run(*prepare, "--units", "1/2", "--json")
    assert (first.returncode, first.stdout) == (0, "null\n"), first.stderr
    assert "1 units of other parts are not yet" in first.stderr
    second = workplace.answered(*prepare, "--units", "2/2")
    assert workplace.answered("data", "verify", second["store"])["damage"] == []
    assert workplace.answered(*prepare) == second
    refused = workplace.run(*prepare, "--units", "3/2")
    assert refused.returncode == 2
    assert "expected I/N" in refused.stderr


def test_bad_records_are_skipped_when_asked(workplace: Workplace) -> None:
    with (workplace.folder / "corpus.txt").open("ab") as stream:
        stream.write(b"caf\xe9 noir\n")
    assert workplace.run("data", "prepare", "run.yaml").returncode == 2
    done = workplace.run("data", "prepare", "run.yaml", "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "1 bad records of the text were skipped" in done.stderr
    again = workplace.run("data", "prepare", "run.yaml")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert "1 bad records" in again.stderr


def test_checkpoints_are_listed_and_the_damaged_one_marked(workplace: Workplace) -> None:
    assert workplace.run("plan", "run.yaml", "--write", "runs/small").returncode == 0
    assert workplace.run("checkpoint", "list", "runs/small").stdout == "no checkpoint yet\n"
    assert workplace.answered("checkpoint", "list", "runs/small") == []
    folder = workplace.folder / "runs" / "small" / "checkpoints"
    for step in (10, 20):
        temporary = ledger.begin(folder, step)
        (temporary / "model.safetensors").write_bytes(b"x" * 2048)
        ledger.commit(temporary, step=step, samples=step * 8, world_size=1, created=1763858761.0)
    (folder / "step-00000020" / "model.safetensors").write_bytes(b"y" * 2048)

    found = workplace.answered("checkpoint", "list", "runs/small")
    assert [(each["step"], each["samples"], each["bytes"]) for each in found] == [
        (10, 80, 2048),
        (20, 160, 2048),
    ]
    rows = workplace.run("checkpoint", "list", "runs/small").stdout.splitlines()
    assert rows[0].split() == ["step", "samples", "size", "saved"]
    assert [row.split()[0] for row in rows[1:]] == ["10", "20"]
    assert "2.0 KiB" in rows[1]

    assert workplace.run("checkpoint", "verify", "runs/small", "10").returncode == 0
    (folder / "step-00000030").mkdir()
    verified = workplace.run("checkpoint", "verify", "runs/small")
    assert verified.returncode == 1
    assert verified.stdout.splitlines() == [
        "step-00000010: good",
        "step-00000020: DAMAGED",
        "  model.safetensors does not have the hash it was written with",
        "step-00000030: DAMAGED",
        "  no readable MANIFEST.json",
    ]
    as_json = workplace.run("checkpoint", "verify", "runs/small", "20", "--json")
    assert as_json.returncode == 1
    assert [each["checkpoint"] for each in json.loads(as_json.stdout)] == ["step-00000020"]
    nowhere = workplace.run("checkpoint", "verify", "runs/small", "7")
    assert (nowhere.returncode, "there are: 10, 20, 30" in nowhere.stderr) == (2, True)


def test_a_run_is_looked_at_from_its_folder_and_what_does_not_run_is_not_stopped(
    workplace: Workplace,
) -> None:
    nothing = workplace.run("status")
    assert (nothing.returncode, "there is no run in runs" in nothing.stderr) == (2, True)
    workplace.run("plan", "run.yaml", "--write", "runs/small")
    workplace.run("plan", "run.yaml", "--write", "runs/other")
    (one,) = workplace.answered("status", "runs/small")
    assert (one["name"], one["state"], one["step"], one["steps"]) == ("small", "not started", 0, 20)
    assert "small: not started" in workplace.run("status", "runs/small").stdout
    rows = workplace.run("status").stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["run", "other", "small"]
    watched = workplace.run("status", "--watch")
    assert [line.split()[0] for line in watched.stdout.splitlines()] == ["other", "small"]
    refused = workplace.run("stop", "runs/small")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "run 'small' is not running: it is not started" in refused.stderr
    assert not RunDirectory(workplace.folder / "runs" / "small").stop_request.exists()
    unread = workplace.run("logs", "runs/small")
    assert (unread.returncode, "it has not been started yet" in unread.stderr) == (2, True)


@pytest.fixture
def handlers() -> Iterator[None]:
    """What `main` changes in this process, put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_folder_that_may_not_be_read_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: str) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", source)

    monkeypatch.setattr("launcher.run.directory.find_model_folder", refused)
    monkeypatch.setattr("sys.argv", ["launcher", "generate", "runs/theirs"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert "runs/theirs: Permission denied\n  hint: have it made readable for you" in said


@pytest.mark.usefixtures("handlers")
def test_a_full_disk_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDirectory(tmp_path / "run")
    orders = Orders("0", "", small_plan(), model={}, weights=None, store=None, vocabulary=None)
    write_text(directory.orders, format_orders(orders))
    directory.stop_request.parent.mkdir()
    # What writes whole files uses this name first.
    directory.stop_request.with_name(f".stop.{os.getpid()}").symlink_to("/dev/full")
    monkeypatch.setattr("sys.argv", ["launcher", "stop", str(directory.root)])
    with hold(directory.lock, directory, "us"), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 3
    assert "No space left on device" in capsys.readouterr().err
