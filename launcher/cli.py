"""The commands: parse, call, print. Whatever they need is imported where it is needed, so that
help is quick."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

# pydantic would look through every installed package for plugins at each start; launcher uses none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from launcher import __version__, console
from launcher.errors import Interrupted, LauncherError, RequestError

if TYPE_CHECKING:
    from launcher.data.units import Slice
    from launcher.run.assemble import Assembly, Prepared

app = typer.Typer(
    name="launcher",
    help="Train GPT-2-family and other Hugging Face causal language models out of one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(
    help="The token store: prepare it, verify it, look into it.", no_args_is_help=True, rich_markup_mode=None
)
checkpoint = typer.Typer(
    help="The ledger of a run's checkpoints.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data, name="data")
app.add_typer(checkpoint, name="checkpoint")

RunFile = Annotated[Path, typer.Argument(metavar="RUN", help="The run.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides, such as train.steps=100.")
]
ClusterFile = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="The cluster.yaml; without it, this machine as found."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run, such as runs/NAME.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes to tokenise with; without it, one per core.")
]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train GPT-2-family and other Hugging Face causal language models out of one YAML file."""
    if version:
        console.answer(__version__)


@app.command(epilog="Example: launcher init run.yaml --preset gpt2-medium")
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = Path("run.yaml"),
    preset: Annotated[str, typer.Option("--preset", help="The model to start from.")] = "gpt2",
    cluster: Annotated[bool, typer.Option("--cluster", help="Write a starter cluster.yaml instead.")] = False,
) -> None:
    """Write a starter run.yaml, or cluster.yaml."""
    from launcher.config.presets import starter_cluster, starter_run

    text = starter_cluster() if cluster else starter_run(preset, file.stem)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise RequestError(f"{file} exists", hint="name another file: nothing is overwritten") from error
    except OSError as error:
        raise RequestError(f"{file} cannot be written: {error.strerror}") from error
    console.say(f"wrote {file}; next: launcher plan {'RUN --cluster ' if cluster else ''}{file}")


@app.command(epilog="Example: launcher plan run.yaml --cluster cluster.yaml train.batch_size=256")
def plan(
    run: RunFile,
    overrides: Overrides = None,
    cluster: ClusterFile = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="DIR", help="Write the rendered files here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what will happen, without doing it."""
    from launcher.run.assemble import assemble, earlier, rendered_files
    from launcher.run.directory import RunDirectory, run_directory, write_files

    assembly = _assemble(run, overrides, cluster)
    if assembly.plan.steps is None and (
        before := earlier(run_directory(assembly.run.config), assembly.run.config)
    ):
        assembly = assemble(assembly.run, assembly.cluster, assembly.machine, before)
    if write is not None:
        files = rendered_files(assembly, RunDirectory(write.absolute()), None)
        try:
            write_files(files.items())
        except OSError as error:
            raise RequestError(
                f"--write: {error.filename or write} cannot be written: {error.strerror}"
            ) from error
    if as_json:
        console.answer_json({"plan": assembly.plan.as_dict(), "tokens": assembly.plan.tokens})
    else:
        _show_plan(assembly)


@app.command(epilog="Example: launcher train run.yaml train.learning_rate=3e-4")
def train(
    run: RunFile, overrides: Overrides = None, cluster: ClusterFile = None, workers: Workers = None
) -> None:
    """Prepare the text if needed, then train here; the same command again resumes."""
    from launcher.run.assemble import assemble, write_run
    from launcher.run.directory import check_goes_on, check_same_run, run_directory
    from launcher.run.environment import describe_environment
    from launcher.run.preflight import check_launch
    from launcher.run.samples import check_skip
    from launcher.run.supervise import is_finished, only_supervisor, supervise
    from launcher.run.text import ready_text

    draft = _assemble(run, overrides, cluster)
    directory = run_directory(draft.run.config)
    check_launch(draft.run.config, draft.place, draft.machine, draft.plan.strategy)
    check_same_run(directory, draft.run.config)
    text = ready_text(draft, workers or draft.machine.cores, console.Bar("preparing"), console.say)
    final = assemble(draft.run, draft.cluster, draft.machine, text)
    _show_plan(final, stream_of_answer=False)
    with only_supervisor(directory):
        check_same_run(directory, final.run.config)
        check_goes_on(directory, final.plan, text.store)
        if text.store and (said := check_skip(final.run.config, final.plan, text.store, directory)):
            console.say(said)
        if is_finished(directory, final.plan.steps):
            console.say(f"run {final.plan.name} is finished; its model is in {directory.model}")
            return
        write_run(final, directory, text, describe_environment(final.machine, Path.cwd()))
        if final.plan.nodes > 1:
            console.say(
                f"ready; on each of the {final.plan.nodes} nodes: sh {directory.launch} NODE HOST PORT"
            )
            return
        step = supervise(
            directory,
            world_size=final.plan.batch.world_size,
            steps=final.plan.steps,
            environment=final.cluster.config.env,
        )
    console.say(f"finished at step {step}; the model is in {directory.model}")
    console.say(f"next: launcher generate {directory.root}")


@app.command(epilog="Example: launcher generate runs/gpt2-shakespeare --prompt 'To be'")
def generate(
    source: Annotated[
        str, typer.Argument(metavar="RUN_DIR_OR_MODEL", help="A run's folder, a model's folder or a Hub id.")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", help="The text to go on from; without it, from nothing.")
    ] = "",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many tokens at most.")] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Draw from so many likeliest tokens; 0: from all.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same text.")] = 1337,
    as_json: AsJson = False,
) -> None:
    """Sample text from a trained model."""
    import subprocess

    from launcher.run.directory import find_model_folder

    command = [sys.executable, "-m", "launcher.worker.generate", str(find_model_folder(source)), prompt]
    command += [str(tokens), str(temperature), str(top_k), str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.returncode)
    if as_json:
        console.answer_json({"model": source, "prompt": prompt, "text": done.stdout})
    else:
        console.answer(done.stdout)


@app.command(epilog="Example: launcher explain run.yaml train.micro_batch")
def explain(
    run: RunFile,
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key such as train.batch_size or cluster.gpu.")],
    overrides: Overrides = None,
    cluster: ClusterFile = None,
    as_json: AsJson = False,
) -> None:
    """Tell who set a value and every file it ends up in."""
    from launcher.run.explain import explain_key

    explained = explain_key(_assemble(run, overrides, cluster), key)
    if as_json:
        console.answer_json(explained)
        return
    for each in explained:
        rows = [("set by", each["set_by"]), ("means", each["meaning"])]
        rows += [(place["file"] + f":{place['line']}", place["text"]) for place in each["places"]]
        console.answer(console.section(f"{each['key']} = {each['value']}", rows))


@app.command(epilog="Example: launcher doctor --cluster cluster.yaml")
def doctor(cluster: ClusterFile = None, as_json: AsJson = False) -> None:
    """Check that this machine is ready to train."""
    from launcher.config.load import load_cluster
    from launcher.run.doctor import examine
    from launcher.run.machine import find_machine

    checks = examine(find_machine(), load_cluster(cluster).config)
    if as_json:
        console.answer_json(
            [{"check": c.name, "state": c.state, "found": c.found, "remedy": c.remedy} for c in checks]
        )
    else:
        for check in checks:
            console.answer(f"{check.state:<8}{check.name:<18}{check.found}")
            if check.remedy:
                console.answer(f"{'':<8}{'':<18}hint: {check.remedy}")
    if any(check.state == "missing" for check in checks):
        raise SystemExit(3)


@data.command("prepare", epilog="Example: launcher data prepare run.yaml --units $SLURM_ARRAY_TASK_ID/8")
def data_prepare(
    run: RunFile,
    overrides: Overrides = None,
    workers: Workers = None,
    units: Annotated[
        str,
        typer.Option(
            "--units",
            metavar="I/N",
            help="Do the I-th of N parts; whoever finishes the last one finishes the store.",
        ),
    ] = "1/1",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out records that cannot be read, and record each.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a run's text into its token store, once; training does this itself where it is needed.

    What is finished is kept: the same command goes on where it was stopped. A damaged store is mended."""
    from launcher.data.units import parse_slice
    from launcher.run.assemble import check_prepared
    from launcher.run.preflight import check_folders

    part = parse_slice(units)
    draft = _assemble(run, overrides, None)
    check_prepared(draft.run.config)
    check_folders(draft.run.config)
    prepared = _prepare(draft, workers, part, skip_bad)
    if as_json:
        console.answer_json(
            {"store": str(prepared.store), "vocabulary": prepared.vocabulary} if prepared else None
        )
    elif prepared:
        console.answer(str(prepared.store))


@data.command("verify", epilog="Example: launcher data verify runs/.stores/1f6c...")
def data_verify(
    store: Annotated[
        Path, typer.Argument(metavar="STORE_OR_RUN_DIR", help="A token store, or a run that uses one.")
    ],
    as_json: AsJson = False,
) -> None:
    """Read every byte of a token store and compare it with its manifest; set damaged files aside."""
    from launcher.data.store import set_aside, verify_store
    from launcher.run.assemble import store_folder

    found = verify_store(store_folder(store))
    damage = [str(each) for each in found]
    if as_json:
        console.answer_json({"store": str(store), "damage": damage})
    elif not damage:
        console.answer(f"{store}: every file is as it was written")
    for each in damage:
        console.say(f"damaged: {each}")
    if damage:
        set_aside(found)
        raise RequestError(
            f"{store}: {len(damage)} damaged files, which are set aside",
            hint="`launcher data prepare RUN` makes them again, to the same bytes",
        )


@data.command("show", epilog="Example: launcher data show runs/gpt2-shakespeare --step 100")
def data_show(
    given: Annotated[
        Path,
        typer.Argument(
            metavar="STORE_OR_RUN",
            help="A token store; a run's folder, as trained; a run.yaml, as it goes on.",
        ),
    ],
    overrides: Overrides = None,
    cluster: ClusterFile = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="A run's optimizer step: which text is in it.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="How many documents to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show what is in a token store, or which text is in one step of a run, without running it."""
    from launcher.run.show import show_store
    from launcher.run.show_step import show_step
    from launcher.run.subject import subject_of_folder, subject_of_run

    if given.is_file():
        subject = subject_of_run(_assemble(given, overrides, cluster))
    elif overrides or cluster:
        raise RequestError(f"{given} is a folder: KEY=VALUE and --cluster go with a run.yaml")
    else:
        subject = subject_of_folder(given)
    if step is None:
        shown = show_store(subject.store, subject.run, samples)
    else:
        shown = show_step(subject.samples(), subject.steps, step)
    if as_json:
        console.answer_json(shown.as_json)
    else:
        console.answer(shown.text)


@checkpoint.command("list", epilog="Example: launcher checkpoint list runs/gpt2-shakespeare")
def checkpoint_list(
    run_dir: RunFolder,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare it with the manifest.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List a run's committed checkpoints, oldest first."""
    from datetime import datetime

    from launcher.run.checkpoints import committed
    from launcher.run.directory import RunDirectory

    directory = RunDirectory(run_dir.absolute())
    directory.read_orders()
    found = [(each, each.damage() if verify else None) for each in committed(directory.checkpoints)]
    if as_json:
        console.answer_json(
            [
                {
                    "step": each.step,
                    "samples": each.samples,
                    "bytes": each.bytes,
                    "created": each.created,
                    "folder": str(each.folder),
                    "damage": damage,
                }
                for each, damage in found
            ]
        )
        return
    states = {True: "good", False: "DAMAGED"}
    rows = [
        (
            f"{each.step}",
            f"{each.samples}",
            console.gibibytes(each.bytes),
            datetime.fromtimestamp(each.created).isoformat(" ", "seconds"),
            "not read" if damage is None else states[not damage],
        )
        for each, damage in found
    ]
    console.answer(
        console.table(("step", "samples", "size", "saved", "state"), rows) if rows else "no checkpoint yet"
    )


def _assemble(run: Path, overrides: list[str] | None, cluster: Path | None) -> Assembly:
    from launcher.config.load import load_cluster, load_run
    from launcher.run.assemble import assemble
    from launcher.run.machine import find_machine

    return assemble(load_run(run, overrides or []), load_cluster(cluster), find_machine())


def _prepare(
    draft: Assembly, workers: int | None, part: Slice | None = None, skip_bad: bool = False
) -> Prepared | None:
    from launcher.data.units import WHOLE
    from launcher.run.text import prepare_text

    return prepare_text(
        draft,
        workers or draft.machine.cores,
        console.Bar("preparing"),
        console.say,
        part=part or WHOLE,
        skip_bad=skip_bad,
    )


def _show_plan(assembly: Assembly, *, stream_of_answer: bool = True) -> None:
    from launcher.render.table import asked_rows, becomes_rows, speed_rows

    planned = assembly.plan
    blocks = [
        console.section(f"what you asked: {planned.name}", asked_rows(assembly.run.config)),
        console.section("what it becomes", becomes_rows(planned)),
    ]
    if planned.memory is not None:
        held = {name: size for name, size in planned.memory.items() if size}
        total = sum(held.values())
        room = (
            "" if planned.memory_available is None else f" of {console.gibibytes(planned.memory_available)}"
        )
        title = f"memory per rank: about {console.gibibytes(total)}{room} (an estimate, not yet measured)"
        blocks.append(console.section(title, console.bars(held, planned.memory_available)))
    blocks.append(console.section("speed: a prediction, not measured on this GPU", speed_rows(planned)))
    (console.answer if stream_of_answer else console.say)("\n".join(blocks))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted("interrupted")


def main() -> None:
    """Run one command and exit with its code."""
    signal.signal(signal.SIGINT, _interrupt)
    debug = "--debug" in sys.argv[1:]
    try:
        app(prog_name="launcher")
    except LauncherError as error:
        if debug:
            traceback.print_exception(error)
        console.show_error(error)
        sys.exit(error.exit_code)
