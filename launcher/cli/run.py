"""The commands on a run: start one, plan it, train it, look into it."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from launcher import console
from launcher.cli.arguments import AsJson, ClusterFile, Overrides, RunFile, Workers, assembled
from launcher.errors import RequestError
from launcher.sizes import size_in_words

if TYPE_CHECKING:
    from launcher.run.assemble import Assembly

app = typer.Typer()


@app.command(epilog="Example: launcher init run.yaml --preset gpt2-medium --from ds_config.json")
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")] = Path("run.yaml"),
    preset: Annotated[str, typer.Option("--preset", help="The model to start from.")] = "gpt2",
    cluster: Annotated[bool, typer.Option("--cluster", help="Write a starter cluster.yaml instead.")] = False,
    old: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="OLD",
            help="A DeepSpeed JSON or an accelerate YAML to convert; give it twice for one of each.",
        ),
    ] = None,
) -> None:
    """Write a starter run.yaml, or cluster.yaml."""
    from launcher.config.presets import starter_cluster, starter_run

    if old:
        text = _converted(old, file, preset, cluster)
    else:
        text = starter_cluster() if cluster else starter_run(preset, file.stem)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise RequestError(f"{file} exists", hint="name another file: nothing is overwritten") from error
    except OSError as error:
        raise RequestError(f"{file} cannot be written: {error.strerror}") from error
    console.say(f"wrote {file}; next: launcher plan {'RUN --cluster ' if cluster else ''}{quote(str(file))}")


def _converted(old: list[Path], file: Path, preset: str, cluster: bool) -> str:
    """The text of the file to write. What it leaves out of the old files is told, with the reason."""
    from launcher.config.convert import convert
    from launcher.config.load import read_mappings
    from launcher.config.presets import starter_cluster

    conversion = convert(read_mappings(old, hint="--from takes a DeepSpeed JSON or an accelerate YAML"))
    ours, other = ("cluster", "train") if cluster else ("train", "cluster")
    if cluster and not conversion.of(ours):
        raise RequestError(
            f"--from: {' and '.join(path.name for path in old)} says nothing of a cluster",
            hint="leave --from out; or name the accelerate YAML that has num_processes",
        )
    text = starter_cluster(conversion.of("cluster")) if cluster else conversion.run(preset, file.stem)
    taken = {said.key for said in conversion.origins.values()}
    told: dict[tuple[str, str], list[str]] = {}
    for each in conversion.left:
        how = "taken over, but" if each.key in taken else "not taken over"
        told.setdefault((how, each.why), []).append(f"{each.key} ({each.place})")
    if belongs := [f"{key} from {setting.comment}" for key, setting in conversion.of(other).items()]:
        command = f"launcher init {'run.yaml' if cluster else 'cluster.yaml --cluster'} --from ..."
        told["not taken over", f"it belongs in the other file: {command}"] = belongs
    for (how, why), keys in told.items():
        console.say(f"{how}: {', '.join(keys)}\n  {why}")
    return text


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
    from launcher.run.assemble import assemble, going_on, write_rendered
    from launcher.run.directory import RunDirectory, check_no_run
    from launcher.run.preflight import absent_text

    assembly = going_on(assembled(run, overrides, cluster), console.say)
    for said in absent_text(assembly.run):
        console.say(f"note: {said}")
    if assembly.plan.steps is None and write is None:
        from launcher.run.text import planned_with_text  # what reads text takes longer to load than to plan

        assembly = planned_with_text(assembly)
    if write is not None:
        directory = RunDirectory(write.absolute())
        check_no_run(directory)
        from launcher.run.text import text_at_hand  # it lists all there is

        text = text_at_hand(assembly, console.say)
        if text is not None:
            assembly = assemble(assembly.run, assembly.cluster, assembly.machine, text)
        try:
            write_rendered(assembly, directory, text)
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
    from launcher.cli.supervise import train_to_the_end
    from launcher.run.assemble import write_run
    from launcher.run.beginning import planned_anew
    from launcher.run.directory import check_same_run, run_directory
    from launcher.run.environment import describe_environment
    from launcher.run.holding import only_supervisor
    from launcher.run.local import Local
    from launcher.run.preflight import check_launch, check_local, say_upload
    from launcher.run.preparing import stoppable
    from launcher.run.supervise import is_finished
    from launcher.run.text import ready_text

    draft = assembled(run, overrides, cluster)
    directory = run_directory(draft.run.config)
    check_local(draft.cluster.config)
    environment = draft.cluster.config.env
    check_launch(draft.run.config, draft.place, draft.machine, draft.plan.strategy, environment)
    check_same_run(directory, draft.run.config)
    say_upload(draft.run.config, console.say)
    launching = Local(directory, environment)
    with only_supervisor(directory, launching, console.say):
        check_same_run(directory, draft.run.config)
        # Whoever gives this command wants it trained, whatever was asked of it before.
        directory.stop_request.unlink(missing_ok=True)
        with stoppable(directory, launching, console.say):
            text = ready_text(draft, workers or draft.machine.cores, console.Bar("preparing"), console.say)
        final = planned_anew(draft, text, directory, console.say)
        _show_plan(final, stream_of_answer=False)
        finished = is_finished(directory, final.plan.steps)
        if not finished:
            write_run(final, directory, text, describe_environment(final.machine, Path.cwd()))
        if final.plan.nodes > 1 and not finished:
            script = quote(str(directory.launch))
            console.say(f"ready; on each of the {final.plan.nodes} nodes: sh {script} NODE HOST PORT")
            return
        train_to_the_end(directory, launching)
        if finished and (repository := draft.run.config.push_to_hub) is not None:
            model = quote(str(directory.model))
            console.say(f"if it is not in {repository} yet: hf upload {repository} {model}")


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
    from launcher.run.assemble import with_earlier_text
    from launcher.run.explain import explain_key

    explained = explain_key(with_earlier_text(assembled(run, overrides, cluster)), key)
    if as_json:
        console.answer_json(explained)
        return
    for each in explained:
        rows = [] if each["became"] is None else [("became", each["became"])]
        rows += [("set by", each["set_by"]), ("means", each["meaning"])]
        rows += [(place["file"] + f":{place['line']}", place["text"]) for place in each["places"]]
        console.answer(console.section(f"{each['key']} = {each['value']}", rows))


@app.command(epilog="Example: launcher doctor --model run.yaml")
def doctor(
    cluster: ClusterFile = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="RUN_OR_NAME",
            help="Try which fast paths a model takes: a run.yaml, a run's folder, or a name for model.name.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that this machine is ready to train; with --model, that a model is ready to be fast."""
    from launcher.config.load import load_cluster
    from launcher.run.doctor import examine
    from launcher.run.machine import find_machine
    from launcher.run.model_doctor import examine_model

    if model is None:
        checks = examine(find_machine(), load_cluster(cluster).config)
    else:
        checks = examine_model(model, cluster)
    if as_json:
        console.answer_json(
            [{"check": c.name, "state": c.state, "found": c.found, "remedy": c.remedy} for c in checks]
        )
    else:
        width = max(18, *(len(check.name) + 2 for check in checks))
        for check in checks:
            console.answer(f"{check.state:<8}{check.name:<{width}}{check.found}")
            if check.remedy:
                console.answer(f"{'':<8}{'':<{width}}hint: {check.remedy}")
    if any(check.state == "missing" for check in checks):
        raise SystemExit(3)


def _held_against(gpu: str, error: float | None) -> str:
    """What a prediction on `gpu` is worth, `error` being the largest of those of its like."""
    from launcher.plan.measured import MEASURED

    if error is not None:
        return f"predicted; measured on one such GPU, within {error:.0%}"
    where = "for such a run" if gpu in MEASURED else "on a CPU" if gpu == "cpu" else "on this GPU"
    return f"a prediction, not measured {where}"


def _show_plan(assembly: Assembly, *, stream_of_answer: bool = True) -> None:
    from launcher.plan.measured import errors_of_its_like
    from launcher.render.table import asked_rows, becomes_rows, fit_rows, speed_rows
    from launcher.run.assemble import rendered_files
    from launcher.run.directory import run_directory

    planned = assembly.plan
    errors = errors_of_its_like(planned, assembly.shape)
    blocks = [
        console.section(f"what you asked: {planned.name}", asked_rows(assembly.run.config)),
        console.section("what it becomes", becomes_rows(planned, assembly.run.config.data.packing)),
    ]
    if planned.memory is not None:
        held = {name: size for name, size in planned.memory.items() if size}
        total = sum(held.values())
        room = "" if planned.memory_available is None else f" of {size_in_words(planned.memory_available)}"
        worth = _held_against(planned.gpu, errors.memory)
        title = f"memory per rank: about {size_in_words(total)}{room} ({worth})"
        bars = console.bars(held, planned.memory_available)
        blocks.append(console.section(title, [*bars, *fit_rows(planned)]))
    worth = f": {_held_against(planned.gpu, errors.speed)}" if planned.forecast else ""
    blocks.append(console.section(f"speed{worth}", speed_rows(planned)))
    config = assembly.run.config
    files = rendered_files(assembly, run_directory(config), None)
    names = ", ".join(path.name for path in files)
    blocks.append(
        console.section("files", [("it will write", f"{names} in {config.output_dir}/{config.name}")])
    )
    (console.answer if stream_of_answer else console.say)("\n".join(blocks))
