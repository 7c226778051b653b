"""From what was asked to what will happen here: the inputs of a plan found, and a run directory written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from launcher import __version__
from launcher.config.load import Loaded, dump
from launcher.config.models import ModelSource, find_model
from launcher.config.schema import ClusterConfig, GPUFigures, RunConfig, TokenizerFromCorpus
from launcher.config.slurm import memory_bytes
from launcher.errors import (
    LauncherError,
    MachineError,
    RequestError,
    RunDirectoryError,
    as_one,
    gathering,
    placed,
)
from launcher.plan.batch import NOTHING_DONE, Done, check_divides
from launcher.plan.choose import Blocks, Place, Plan, make_plan
from launcher.plan.hardware import GIGA, GPU, find_gpu, from_figures
from launcher.plan.orders import Orders, format_orders
from launcher.plan.shape import Shape, shape_of, with_vocabulary
from launcher.plan.sharding import zero_stage
from launcher.render.accelerate import render_accelerate
from launcher.render.command import render_launch
from launcher.render.deepspeed import render_deepspeed
from launcher.render.sbatch import BatchJob, cpus_per_node, render_job, supervise_command
from launcher.run.checkpoints import committed
from launcher.run.directory import (
    RunDirectory,
    changed_for_good,
    check_goes_on,
    configuration_hash,
    has_begun,
    run_directory,
    write_files,
    write_text,
)
from launcher.run.machine import Machine
from launcher.run.saying import Say
from launcher.run.stopping import need_of

if TYPE_CHECKING:
    from launcher.data.stream import StreamText
    from launcher.data.tokenizers import Tokenizer


LEAST_LEAD = 30
"""Seconds before the time limit at which SLURM tells the supervisor, at the least."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything a plan was made from, and the plan."""

    run: Loaded[RunConfig]
    cluster: Loaded[ClusterConfig]
    machine: Machine
    place: Place
    model: ModelSource
    shape: Shape | None
    plan: Plan


@dataclass(frozen=True, slots=True)
class Prepared:
    """A token store, the size of the tokenizer it was made with, and what it holds."""

    store: Path
    vocabulary: int
    blocks: Blocks


@dataclass(frozen=True, slots=True)
class Streamed:
    """With `data.mode: stream`, what the ranks read instead of a store, and the tokenizer they read it with.

    Nobody has counted the blocks.
    """

    text: StreamText
    tokenizer: Tokenizer

    store: ClassVar[None] = None
    blocks: ClassVar[None] = None

    @property
    def vocabulary(self) -> int:
        return self.tokenizer.size


Text: TypeAlias = Prepared | Streamed
"""The text of a run, ready to be trained on."""


def assemble(
    run: Loaded[RunConfig], cluster: Loaded[ClusterConfig], machine: Machine, text: Text | None = None
) -> Assembly:
    """Plan `run` on `cluster`; where that leaves something to be found, on `machine`.

    Without `text` the vocabulary is the tokenizer's announced size, and the length of a run
    measured in epochs stays open. What is wrong with the model, the cluster and the batch is raised together.
    """
    errors: list[LauncherError] = []
    train = run.config.train
    of_cluster = {f"cluster.{key}": where for key, where in cluster.origins.items()}
    with placed({**run.origins, **of_cluster}):
        with gathering(errors):
            model = find_model(run.config.model)
        with gathering(errors):
            place = find_place(cluster.config, machine)
            micro = None if train.micro_batch == "auto" else train.micro_batch
            check_divides(train.batch_size, place.world_size, micro)
        if errors:
            raise as_one(errors)
        vocabulary = text.vocabulary if text else _announced_vocabulary(model)
        from_scratch = run.config.model.init == "scratch"
        shape = shape_of(with_vocabulary(model.config, vocabulary, scratch=from_scratch))
        plan = make_plan(
            run.config,
            place,
            shape=shape,
            positions=shape.positions if shape else _positions(model.config),
            attention=model.config.get("attn_implementation"),
            blocks=text.blocks if text else None,
            done=how_far(run_directory(run.config), run.config),
        )
    return Assembly(run, cluster, machine, place, model, shape, plan)


def how_far(directory: RunDirectory, run: RunConfig) -> Done:
    """How far a run has come that goes on as `run`, by its newest checkpoint. It is not verified: the worker
    does that, and says so where another one leads to another length."""
    checkpoints = committed(directory.checkpoints)
    if not checkpoints or changed_for_good(directory.read_config(), run):
        return NOTHING_DONE
    newest = checkpoints[-1]
    plan = directory.read_orders().plan
    return Done(newest.step, newest.samples, plan.warmup_steps, plan.strategy, plan.fast.padded_vocabulary)


def _announced_vocabulary(model: ModelSource) -> int | None:
    """The tokenizer's size as far as it can be told at a glance; None: the model's own vocabulary."""
    if isinstance(model.tokenizer, TokenizerFromCorpus):
        return model.tokenizer.train.vocab_size
    file = Path(model.tokenizer, "tokenizer.json")
    if model.kind == "folder" or not file.is_file():
        return None
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        # A mapping of token to id for BPE and WordPiece; pairs of token and score, in order, for Unigram.
        entries = tokenizer["model"]["vocab"]
        ids = entries.values() if isinstance(entries, dict) else range(len(entries))
        return int(max([*ids, *(added["id"] for added in tokenizer["added_tokens"])])) + 1
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{file} is not a tokenizer: {type(error).__name__}: {error}",
            hint="save it again with save_pretrained",
            key="model.tokenizer",
        ) from error


def _positions(config: Mapping[str, object]) -> int | None:
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def find_place(cluster: ClusterConfig, machine: Machine) -> Place:
    """The hardware that `cluster` names, with each `auto` replaced by what `machine` has."""
    gpu = _gpu(cluster.gpu, machine)
    if cluster.gpus_per_node != "auto":
        ranks = cluster.gpus_per_node
    elif gpu.is_cpu:
        ranks = 1
    elif machine.gpus:
        ranks = len(machine.gpus)
    else:
        raise MachineError(
            f"cluster {cluster.name}: gpus_per_node=auto counts the GPUs of this machine, and it has none",
            hint="write how many GPUs a node of that cluster has",
            key="cluster.gpus_per_node",
        )
    lent = cluster.launch == "slurm"  # then this machine is none of the nodes
    here = machine.memory if gpu.is_cpu or len(machine.gpus) >= ranks else None
    return Place(
        cluster.name,
        cluster.nodes,
        ranks,
        gpu,
        cpus_per_node(cluster.slurm, ranks, on_cpu=gpu.is_cpu) if lent else machine.cores,
        memory_bytes(cluster.slurm.memory) if lent else here,
        network=None if cluster.network_gbps is None else cluster.network_gbps * GIGA / 8,
        price_per_gpu_hour=cluster.price_per_gpu_hour,
    )


def _gpu(asked: str | GPUFigures, machine: Machine) -> GPU:
    if isinstance(asked, GPUFigures):
        return from_figures(**asked.model_dump())
    if asked == "auto":
        return machine.gpu() or find_gpu("cpu")
    return find_gpu(asked)


def rendered_files(
    assembly: Assembly, directory: RunDirectory, text: Text | None, launcher: str = "launcher"
) -> dict[Path, str]:
    """Every file of the run directory that is rendered from the plan: path to text. `launcher`: the command's
    path on the nodes of a SLURM cluster."""
    weights = (
        None
        if assembly.run.config.model.init == "scratch"
        else assembly.model.folder or assembly.model.hub_id
    )
    orders = Orders(
        launcher=__version__,
        configuration=configuration_hash(assembly.run.config),
        plan=assembly.plan,
        model=assembly.model.config,
        weights=weights,
        store=str(text.store) if text and text.store else None,
        vocabulary=text.vocabulary if text else None,
    )
    plan = assembly.plan
    deepspeed = {}
    if zero_stage(plan.strategy) is not None:
        text_of_it = render_deepspeed(
            plan,
            max_grad_norm=assembly.run.config.train.max_grad_norm,
            shape=assembly.shape,
        )
        deepspeed[directory.deepspeed] = text_of_it
    return {
        directory.config: dump(assembly.run.config),
        directory.cluster: dump(assembly.cluster.config),
        directory.orders: format_orders(orders),
        directory.accelerate: render_accelerate(assembly.plan, str(directory.deepspeed)),
        directory.launch: render_launch(str(directory.root), assembly.cluster.config.env, nodes=plan.nodes),
        **deepspeed,
        **_job_script(assembly, directory, launcher),
    }


def _job_script(assembly: Assembly, directory: RunDirectory, launcher: str) -> dict[Path, str]:
    if assembly.cluster.config.launch != "slurm":
        return {}
    job = job_of(assembly, directory, launcher)
    with placed(assembly.cluster.origins):
        return {directory.job: render_job(job, job_template(job.slurm.template))}


def job_of(assembly: Assembly, directory: RunDirectory, launcher: str) -> BatchJob:
    """The batch job of a run on a SLURM cluster."""
    place, cluster = assembly.place, assembly.cluster.config
    return BatchJob(
        name=assembly.run.config.name,
        directory=str(directory.root),
        command=supervise_command(launcher, str(directory.root)),
        nodes=place.nodes,
        gpus_per_node=None if place.is_cpu else place.ranks_per_node,
        cpus_per_node=place.cores,
        slurm=cluster.slurm,
        env=cluster.env,
        lead=max(LEAST_LEAD, math.ceil(need_of(directory, assembly.plan).seconds)),
    )


def job_template(file: str | None) -> str:
    """The text of the user's own job template, or of ours. Raises RequestError where it cannot be read."""
    if file is None:
        return resources.files("launcher.render").joinpath("job.sbatch.j2").read_text(encoding="utf-8")
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"slurm.template: {file} cannot be read: {error}",
            hint="copy slurm/job.sbatch.j2 and change it, or leave the key out",
            key="slurm.template",
        ) from error


def write_run(
    assembly: Assembly, directory: RunDirectory, text: Text, environment: str, launcher: str = "launcher"
) -> None:
    """Write the run directory, the worker's orders included."""
    if not has_begun(directory):
        directory.phases.unlink(missing_ok=True)  # of an attempt that came to nothing, perhaps on other text
    write_rendered(assembly, directory, text, launcher)
    write_text(directory.environment, environment)


def write_rendered(
    assembly: Assembly, directory: RunDirectory, text: Text | None, launcher: str = "launcher"
) -> None:
    """Write all that ranks need to be launched by hand, once there is a `text`."""
    directory.stop_request.parent.mkdir(parents=True, exist_ok=True)  # for `touch` to find
    if isinstance(text, Streamed):
        text.tokenizer.save(directory.tokenizer)
        write_text(directory.stream, text.text.model_dump_json(indent=1) + "\n")
    write_files(rendered_files(assembly, directory, text, launcher).items())


def check_prepared(run: RunConfig) -> None:
    """Raise RequestError for a run that has no token store and never will."""
    if run.data.mode == "stream":
        raise RequestError(
            f"run {run.name!r} has no token store: it trains straight from the text (data.mode: stream)",
            hint="to prepare, verify or show text, set data.mode: prepared",
            key="data.mode",
        )


def store_folder(given: Path) -> Path:
    """The token store that `given` is, or that the run it is uses."""
    directory = RunDirectory(given.absolute())
    if not directory.orders.is_file():
        return given
    check_prepared(directory.read_config())
    store = directory.read_orders().store
    if store is None:
        raise RunDirectoryError(
            f"{given} has no token store: its text is not prepared",
            hint="run `launcher data prepare RUN`",
        )
    return Path(store)


def going_on(draft: Assembly, say: Say) -> Assembly:
    """The draft, with the text of the run that it would go on with, where there is one. Says what `data.skip`
    leaves out of that run, and raises what `check_goes_on` and `say_skip` do."""
    run, directory = draft.run.config, run_directory(draft.run.config)
    before = earlier(directory, run)
    if before is None:
        begun = directory.orders.is_file() and has_begun(directory)
        if begun and (changed := changed_for_good(directory.read_config(), run)):
            other = ", ".join(changed)
            say(f"{directory.root} has begun with another {other}: this is the plan of a new run")
        elif begun:
            check_goes_on(directory, draft.plan, None)
        return draft
    if draft.plan.steps is None:
        draft = assemble(draft.run, draft.cluster, draft.machine, before)
    check_goes_on(directory, draft.plan, before.store)
    if run.data.skip.steps or run.data.skip.documents:
        from launcher.run.samples import say_skip

        say_skip(run, draft.plan, before.store, directory, say)
    return draft


def with_earlier_text(draft: Assembly) -> Assembly:
    """The draft, planned with the text of the run that it would go on with, where there is one."""
    before = earlier(run_directory(draft.run.config), draft.run.config)
    return draft if before is None else assemble(draft.run, draft.cluster, draft.machine, before)


def earlier(directory: RunDirectory, run: RunConfig) -> Prepared | None:
    """What the run in this folder was prepared with, if it is one that may go on as `run`."""
    if not directory.orders.is_file():
        return None
    orders = directory.read_orders()
    if orders.store is None or changed_for_good(directory.read_config(), run):
        return None
    assert orders.vocabulary is not None
    assert orders.plan.blocks is not None
    return Prepared(Path(orders.store), orders.vocabulary, orders.plan.blocks)
