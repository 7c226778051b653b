"""The table of places against what really changes in the rendered files when a key changes."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config.document import dotted
from launcher.config.keys import leaves
from launcher.config.load import Loaded, differences, load_cluster, load_run
from launcher.config.presets import PRESETS
from launcher.config.schema import ClusterConfig, RunConfig
from launcher.data.tokenizers import train_tokenizer
from launcher.render.carries import CARRIES, JOB, LAUNCH, places
from launcher.run.assemble import assemble, rendered_files
from launcher.run.directory import run_directory
from launcher.run.machine import Machine
from launcher.run.text import ready_text
from tests.conftest import sentences, write_json

MACHINE = Machine("node", 8, 2**37, (), None)

ANOTHER: Mapping[str, object] = {
    "name": "another",
    "model.name": "gpt2-large",
    "model.init": "pretrained",
    "model.tokenizer": {"train": {"vocab_size": 400}},
    "model.overrides": {"n_layer": 3},
    "data.train": ["other.jsonl"],
    "data.validation": 0,
    "data.format": "text",
    "data.sample_by": "document",
    "data.text_field": "body",
    "data.block_size": 32,
    "data.packing": "pad",
    "data.mode": "stream",
    "data.isolate_documents": True,
    "data.skip.steps": ["120", "130-135"],
    "data.skip.documents": ["train-00003:1542"],
    "data.cache_dir": "stores",
    "train.batch_size": 1024,
    "train.tokens": 100_000,
    "train.steps": 200,
    "train.epochs": 3,
    "train.learning_rate": 0.01,
    "train.schedule": "linear",
    "train.warmup": 0.5,
    "train.weight_decay": 0.2,
    "train.betas": [0.8, 0.99],
    "train.max_grad_norm": 2,
    "train.precision": "fp32",
    "train.gradient_checkpointing": True,
    "train.strategy": "zero1",
    "train.offload": "optimizer",
    "train.micro_batch": 1,
    "train.compile": True,
    "train.fast.tanh_gelu": False,
    "train.fast.causal_attention": False,
    "train.fast.chunked_loss": False,
    "train.fast.padded_vocabulary": False,
    "train.fast.fused_adamw": False,
    "train.fast.tf32": False,
    "train.eval_every": "30min",
    "train.log_every": 5,
    "train.early_stopping": {"patience": 3},
    "train.metrics": ["mine:accuracy"],
    "train.callbacks": ["mine:Stop"],
    "train.extra": {"optim": "adamw_torch"},
    "checkpoint.every": "30min",
    "checkpoint.keep": 3,
    "report_to": [],
    "push_to_hub": "user/name",
    "seed": 7,
    "output_dir": "elsewhere",
    "cluster.name": "elsewhere",
    "cluster.nodes": 1,
    "cluster.network_gbps": 400,
    "cluster.gpus_per_node": 4,
    "cluster.gpu": "h100-sxm-80gb",
    "cluster.price_per_gpu_hour": 2.5,
    "cluster.launch": "local",
    "cluster.slurm.partition": "gpu",
    "cluster.slurm.account": "lab",
    "cluster.slurm.qos": "high",
    "cluster.slurm.time_limit": "12:00:00",
    "cluster.slurm.constraint": "ib",
    "cluster.slurm.reservation": "ours",
    "cluster.slurm.exclude": ["n1", "n2"],
    "cluster.slurm.exclusive": True,
    "cluster.slurm.gpu_type": "a100",
    "cluster.slurm.cpus_per_node": 7,
    "cluster.slurm.memory": "20G",
    "cluster.slurm.setup": ["module load cuda", "cd /work"],
    "cluster.slurm.container": {"runtime": "pyxis", "image": "torch"},
    "cluster.slurm.extra": ["--mail-type=END"],
    "cluster.slurm.template": "mine.j2",
    "cluster.env": {"TOKENIZERS_PARALLELISM": "false", "GREETING": "good day"},
}
"""Every other key, with a value that no scenario below has."""

TAKE_MEMORY = frozenset(
    {
        *("model.name", "model.init", "model.tokenizer", "model.overrides", "data.block_size"),
        *("train.batch_size", "train.precision", "train.gradient_checkpointing", "train.micro_batch"),
        *("cluster.gpus_per_node", "cluster.gpu"),
    }
)
"""Keys that may move what is chosen so that memory suffices."""


SLURM = frozenset(key for key in ANOTHER if key.startswith(("cluster.slurm.", "cluster.launch")))
"""Keys that need a cluster that goes through SLURM."""

SHARDING = frozenset({"train.strategy", "train.offload", "cluster.nodes", "cluster.network_gbps"})
"""Keys that need several GPUs to mean anything."""


@dataclass(frozen=True)
class Scenario:
    """Something to change a key in; `prepared`: its text is really prepared, each time."""

    run: dict[str, Any]
    cluster: dict[str, Any]
    prepared: bool
    keys: frozenset[str]
    another: Mapping[str, object] = field(default_factory=dict)

    def value(self, key: str) -> object:
        """What `key` is changed to here."""
        return self.another.get(key, ANOTHER[key])


def run_of(model: dict[str, Any], data: dict[str, Any], train: dict[str, Any]) -> dict[str, Any]:
    return {"name": "run", "model": model, "data": {"train": ["corpus.jsonl"], **data}, "train": train}


SCENARIOS: Mapping[str, Scenario] = {
    # Text is there, and the length hangs on how much of it.
    "prepared": Scenario(
        run_of(
            {"name": "gpt2", "tokenizer": {"train": {"vocab_size": 300}}, "overrides": {"n_layer": 2}},
            {"validation": 0.2, "block_size": 64},
            {"batch_size": 8, "epochs": 40, "warmup": 0.1},
        ),
        {"gpu": "cpu", "gpus_per_node": 2},
        prepared=True,
        keys=frozenset(ANOTHER) - {"model.init", "data.sample_by", "data.mode"} - SHARDING - SLURM,
    ),
    "lines": Scenario(
        run_of(
            {"name": "gpt2", "tokenizer": {"train": {"vocab_size": 300}}, "overrides": {"n_layer": 2}},
            {"validation": 0.1, "block_size": 64, "format": "text"},
            {"batch_size": 8, "epochs": 40},
        ),
        {"gpu": "cpu", "gpus_per_node": 1},
        prepared=True,
        keys=frozenset({"data.sample_by", "cluster.gpus_per_node"}),
    ),
    "counted in steps": Scenario(
        run_of(
            {"name": "gpt2", "tokenizer": {"train": {"vocab_size": 300}}, "overrides": {"n_layer": 2}},
            {"validation": 0.2, "block_size": 64},
            {"batch_size": 8, "steps": 40},
        ),
        {"gpu": "cpu", "gpus_per_node": 1},
        prepared=True,
        keys=frozenset({"data.mode"}),
    ),
    # A model in a folder, with its own tokenizer and a vocabulary wider than that.
    "folder": Scenario(
        run_of({"name": "first"}, {"validation": 0.2, "block_size": 64}, {"batch_size": 8, "epochs": 40}),
        {"gpu": "cpu", "gpus_per_node": 1},
        prepared=True,
        keys=frozenset({"model.name", "model.init"}),
        another={"model.name": "second"},
    ),
    # A GPU that the model only just fits on, so that whatever takes memory moves the micro-batch.
    "tight": Scenario(
        run_of({"name": "gpt2-medium"}, {}, {"batch_size": 32, "tokens": 10**9}),
        {"gpu": "t4-16gb", "gpus_per_node": 1},
        prepared=False,
        another={"cluster.gpu": {"name": "mine", "memory_gb": 24, "bf16_tflops": 100}},
        keys=TAKE_MEMORY - {"model.name"} | {"train.tokens", "train.compile", "cluster.price_per_gpu_hour"},
    ),
    "no room": Scenario(
        run_of({"name": "gpt2"}, {"block_size": 1024}, {"batch_size": 32, "steps": 1000, "micro_batch": 16}),
        {"gpu": "t4-16gb", "gpus_per_node": 2},
        prepared=False,
        keys=TAKE_MEMORY - {"train.batch_size", "cluster.gpus_per_node"},
    ),
    "a job": Scenario(
        run_of({"name": "gpt2"}, {}, {"batch_size": 512, "steps": 1000, "micro_batch": 4}),
        {"launch": "slurm", "gpu": "cpu", "gpus_per_node": 2, "nodes": 2},
        prepared=False,
        keys=SLURM
        | {"name", "output_dir", "model.name", "cluster.env", "cluster.nodes", "cluster.gpu"}
        | {"train.strategy", "train.offload"},
        another={"cluster.gpu": "a100-sxm-80gb"},
    ),
    "a job on GPUs": Scenario(
        run_of({"name": "gpt2"}, {}, {"batch_size": 512, "steps": 1000, "micro_batch": 4}),
        {"launch": "slurm", "gpu": "a100-sxm-80gb", "gpus_per_node": 2},
        prepared=False,
        keys=frozenset({"cluster.slurm.gpu_type", "cluster.gpus_per_node"}),
    ),
    "sharded": Scenario(
        run_of(
            {"name": "gpt2"}, {}, {"batch_size": 512, "steps": 1000, "micro_batch": 4, "strategy": "zero3"}
        ),
        {"gpu": "a100-sxm-80gb", "gpus_per_node": 2, "nodes": 2, "network_gbps": 100},
        prepared=False,
        keys=TAKE_MEMORY - {"model.init", "model.tokenizer"}
        | SHARDING
        | {"train.max_grad_norm", "train.fast.padded_vocabulary", "train.fast.tf32", "name", "output_dir"},
    ),
    "sharded layers": Scenario(
        run_of(
            {"name": "gpt2"}, {}, {"batch_size": 512, "steps": 1000, "micro_batch": 4, "strategy": "fsdp"}
        ),
        {"gpu": "a100-sxm-80gb", "gpus_per_node": 2},
        prepared=False,
        keys=frozenset({"train.compile", "train.strategy"}),
    ),
}
CASES = [(name, key) for name, scenario in SCENARIOS.items() for key in ANOTHER if key in scenario.keys]


@dataclass(frozen=True)
class Rendered:
    run: Loaded[RunConfig]
    cluster: Loaded[ClusterConfig]
    files: dict[str, str]


def render(folder: Path, scenario: Scenario, key: str | None = None) -> Rendered:
    """Every file of the scenario, with `key` changed."""
    cluster, overrides = copy.deepcopy(scenario.cluster), []
    if key is not None and key.startswith("cluster."):
        *sections, last = key.removeprefix("cluster.").split(".")
        inside = cluster
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = scenario.value(key)
    elif key is not None:
        overrides = [f"{key}={json.dumps(scenario.value(key))}"]
    write_json(folder / "run.yaml", scenario.run)
    write_json(folder / "cluster.yaml", cluster)
    run, where = load_run(folder / "run.yaml", overrides), load_cluster(folder / "cluster.yaml")
    assembly, prepared = assemble(run, where, MACHINE), None
    if scenario.prepared:
        prepared = ready_text(assembly, 1, lambda *_: None, lambda _: None)
        assembly = assemble(run, where, MACHINE, prepared)
    files = rendered_files(assembly, run_directory(run.config), prepared)
    return Rendered(run, where, {path.name: text for path, text in files.items()})


@pytest.fixture(scope="module")
def renderings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str | None], Rendered]:
    """Each scenario as it is (None), and with each key changed."""
    folder = tmp_path_factory.mktemp("carries")
    for name, count in (("corpus", 150), ("other", 90)):
        lines = [{"text": line, "body": line[:30]} for line in sentences(count, seed=count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for name, vocabulary in (("first", 300), ("second", 400)):
        train_tokenizer(sentences(150), vocabulary).save(folder / name)
        write_json(folder / name / "config.json", {**PRESETS["gpt2"].config(), "n_layer": 2})
    (folder / "mine.j2").write_text("#!/bin/sh\n#SBATCH --nodes={{ nodes }}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        unchanged: list[tuple[str, str | None]] = [(name, None) for name in SCENARIOS]
        return {(name, key): render(folder, SCENARIOS[name], key) for name, key in [*unchanged, *CASES]}


def test_every_key_of_the_schema_is_tried() -> None:
    run = {dotted(path) for path, _ in leaves(RunConfig)}
    cluster = {f"cluster.{dotted(path)}" for path, _ in leaves(ClusterConfig)}
    assert run | cluster == ANOTHER.keys()
    assert {key for _, key in CASES} == ANOTHER.keys()
    assert CARRIES.keys() <= run | cluster, "the table names a key that does not exist"


def changed_lines(before: str, after: str) -> tuple[set[int], set[int]]:
    """Line numbers, from 1, of what is gone from `before` and of what is new in `after`."""
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    gone: set[int] = set()
    new: set[int] = set()
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag != "equal":
            gone |= set(range(a + 1, b + 1))
            new |= set(range(c + 1, d + 1))
    return gone, new


def named_lines(keys: list[str], files: Mapping[str, str]) -> set[tuple[str, int]]:
    return {(place.file, place.line) for key in keys for place in places(key, files)}


def carries_nothing(line: str) -> bool:
    """A comment without a value, a bracket, the name of a section; and the hash of the configuration."""
    if line.startswith("# ") and ("Submit it with" in line or "usage:" in line):
        return False
    return (
        re.fullmatch(r'\s*("?\w+"?:)?\s*[{\[\]},]*|\s*# .*', line) is not None or '"configuration":' in line
    )


@pytest.mark.parametrize(("name", "key"), CASES, ids=[f"{name}: {key}" for name, key in CASES])
def test_whatever_a_key_changes_is_named(
    renderings: Mapping[tuple[str, str | None], Rendered], name: str, key: str
) -> None:
    before, after = renderings[name, None], renderings[name, key]
    keys = differences(before.run.config, after.run.config)
    keys += [f"cluster.{each}" for each in differences(before.cluster.config, after.cluster.config)]
    assert any(each == key or each.startswith(f"{key}.") for each in keys), "nothing was changed"
    unnamed = []
    for file in before.files | after.files:  # another engine has another file
        sides = changed_lines(*(side.files.get(file, "") for side in (before, after)))
        for side, lines in zip((before, after), sides, strict=True):
            texts, named = side.files.get(file, "").splitlines(), named_lines([key, *keys], side.files)
            unnamed += [
                f"{file}:{line}: {texts[line - 1].strip()}"
                for line in sorted(lines)
                if (file, line) not in named and not carries_nothing(texts[line - 1])
            ]
    assert unnamed == []


def test_a_key_names_no_lines_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the job script, the lines that several keys write alike."""
    monkeypatch.chdir(tmp_path)
    lines = {
        "cluster.slurm.setup": ["export PATH=/opt/bin:$PATH", "# our modules", "module load cuda"],
        "cluster.slurm.extra": ["#SBATCH --mail-type=END", "#SBATCH --mem-bind=local"],
        "cluster.slurm.memory": ["#SBATCH --mem=20G", "#SBATCH --signal=B:USR1@30"],
        "cluster.env.GREETING": ["export GREETING='good day'"],
        "cluster.env": ["export GREETING='good day'", "export PATH=/bin"],
    }
    slurm = {"setup": lines["cluster.slurm.setup"], "extra": ["--mail-type=END", "--mem-bind=local"]}
    env = {"GREETING": "good day", "PATH": "/bin"}
    job = SCENARIOS["a job"]
    cluster = {**job.cluster, "slurm": {**slurm, "memory": "20G"}, "env": env}
    files = render(tmp_path, replace(job, cluster=cluster)).files
    for key, own in lines.items():
        assert [place.text for place in places(key, files) if place.file == JOB] == own, key


def value_at(files: Mapping[str, str], file: str, path: str) -> object:
    if file not in files or file in (LAUNCH, JOB) or not path:
        return files.get(file)
    found: Any = yaml.load(files[file], Loader=yaml.CSafeLoader)
    for part in path.split("."):
        found = None if found is None else found.get(part)
    return found


def test_whatever_the_table_names_can_change(
    renderings: Mapping[tuple[str, str | None], Rendered],
) -> None:
    moves = {
        key
        for name, key in CASES
        for file, path in CARRIES.get(key, ())
        if value_at(renderings[name, None].files, file, path)
        != value_at(renderings[name, key].files, file, path)
    }
    assert CARRIES.keys() - moves == set()
