"""Loading a run and a cluster: values, origins, overrides, and every fault in one pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config.addresses import no_pattern_in
from launcher.config.keys import leaves
from launcher.config.load import differences, dump, load_cluster, load_files, load_run
from launcher.config.schema import ClusterConfig, RunConfig
from launcher.errors import ConfigError, Fault

ROOT = Path(__file__).parents[2]
RUN = """\
name: r
model:
  name: gpt2
data:
  train: [a.txt]
train:
  batch_size: 8
  steps: 100
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def faults_of(path: Path, *overrides: str) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    assert caught.value.exit_code == 2
    return list(caught.value.faults)


def only_fault(path: Path, *overrides: str) -> tuple[str, str, str | None, str | None]:
    (fault,) = faults_of(path, *overrides)
    return fault.path, fault.message, fault.place, fault.hint


# Values and where they came from


def test_a_value_knows_the_line_it_was_written_on(run_file: Path) -> None:
    loaded = load_run(run_file)
    assert loaded.config.train.batch_size == 8
    assert loaded.origins["train.batch_size"] == "run.yaml:7"
    assert loaded.origins["data.train"] == "run.yaml:5"
    assert loaded.origins["train.learning_rate"] == "default"
    assert loaded.config.train.learning_rate == 6e-4


def test_every_leaf_has_an_origin(run_file: Path) -> None:
    assert set(load_run(run_file).origins) == {".".join(path) for path, _ in leaves(RunConfig)}
    assert set(load_cluster(None).origins) == {".".join(path) for path, _ in leaves(ClusterConfig)}


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = RUN.replace("steps: 100", "tokens: 10e9\n  learning_rate: 3e-4\n  betas: [0.9, 0.99]\nseed: 1e3")
    config = load_run(written(tmp_path / "run.yaml", text)).config
    assert config.train.tokens == 10_000_000_000
    assert type(config.train.tokens) is int
    assert config.seed == 1000
    assert config.train.learning_rate == 3e-4
    assert config.train.betas == (0.9, 0.99)


def test_json_is_read_as_yaml(tmp_path: Path) -> None:
    text = json.dumps(yaml.safe_load(RUN), indent=1)
    loaded = load_run(written(tmp_path / "run.json", text))
    assert loaded.config.train.steps == 100
    assert loaded.origins["train.steps"].startswith("run.json:")


def test_no_cluster_file_is_all_defaults() -> None:
    loaded = load_cluster(None)
    assert loaded.config == ClusterConfig.model_validate({})
    assert set(loaded.origins.values()) == {"default"}


# Overrides on the command line


def test_an_override_is_yaml_and_the_last_word(run_file: Path) -> None:
    loaded = load_run(
        run_file,
        [
            "train.batch_size=64",
            "data.train=[b.txt,c.txt]",
            "model.tokenizer={train: {vocab_size: 512}}",
            "model.overrides.n_layer=2",
            "model.overrides.n_head=4",
            "train.batch_size=32",
            "data.validation=0",
        ],
    )
    assert loaded.config.train.batch_size == 32
    assert loaded.origins["train.batch_size"] == "override train.batch_size=32"
    assert loaded.config.data.train == ["b.txt", "c.txt"]
    assert loaded.config.model.overrides == {"n_layer": 2, "n_head": 4}
    assert loaded.origins["model.overrides"] == "override model.overrides.n_head=4"
    assert loaded.origins["model.overrides.n_layer"] == "override model.overrides.n_layer=2"
    assert loaded.origins["model.tokenizer"] == "override model.tokenizer=..."
    assert loaded.origins["model.tokenizer.train.vocab_size"] == "override model.tokenizer=..."
    assert loaded.config.data.validation == 0


def test_an_override_joins_what_the_file_says_beside_it(tmp_path: Path) -> None:
    path = written(tmp_path / "run.yaml", RUN.replace("gpt2\n", "gpt2\n  overrides:\n    n_head: 4\n"))
    loaded = load_run(path, ["model.overrides.n_layer=2"])
    assert loaded.config.model.overrides == {"n_head": 4, "n_layer": 2}
    assert loaded.origins["model.overrides.n_head"] == "run.yaml:5"
    assert loaded.origins["model.overrides"] == "override model.overrides.n_layer=2"


def test_an_override_may_reach_into_a_value_that_is_no_mapping(run_file: Path) -> None:
    loaded = load_run(run_file, ["model.tokenizer=gpt2", "model.tokenizer.train.vocab_size=300"])
    assert loaded.config.model.tokenizer is not None
    assert not isinstance(loaded.config.model.tokenizer, str)
    assert loaded.config.model.tokenizer.train.vocab_size == 300


def test_a_fault_of_an_override_inside_a_value_is_the_override_s(run_file: Path) -> None:
    path, message, place, _ = only_fault(run_file, "train.steps.x=5")
    assert (path, place) == ("train.steps", "override train.steps.x=5")
    assert message.endswith("got a mapping")


def test_null_clears_a_key(tmp_path: Path) -> None:
    path = written(tmp_path / "run.yaml", RUN + "  schedule: linear\n")
    loaded = load_run(path, ["train.schedule=null", "train.early_stopping.patience=null"])
    assert loaded.config.train.schedule == "cosine"
    assert loaded.origins["train.schedule"] == "override train.schedule=null"
    assert loaded.config.train.early_stopping is None


def test_null_on_a_required_key_is_a_missing_key(run_file: Path) -> None:
    path, message, place, hint = only_fault(run_file, "train.batch_size=null")
    assert (path, message) == ("train.batch_size", "missing required key")
    assert place == "override train.batch_size=null"
    assert hint == "Sequences per optimizer step, over the whole world."


@pytest.mark.parametrize("override", ["train.tokens=1e6", "train.epochs=2"])
def test_an_override_of_the_length_replaces_the_files(run_file: Path, override: str) -> None:
    loaded = load_run(run_file, [override])
    assert loaded.config.train.steps is None
    assert loaded.origins["train.steps"] == f"override {override}"


def test_no_length_in_an_override_leaves_the_files(run_file: Path) -> None:
    loaded = load_run(run_file, ["train.epochs=null"])
    assert loaded.config.train.steps == load_run(run_file).config.train.steps
    assert loaded.config.train.steps is not None


def test_two_lengths_on_the_command_line_conflict(run_file: Path) -> None:
    path, message, place, hint = only_fault(run_file, "train.tokens=1e6", "train.epochs=2")
    assert path == "train.epochs"
    assert "train.tokens is set too" in message
    assert place == "override train.epochs=2"
    assert hint == "keep one of them"


@pytest.mark.parametrize("text", ["nokey", "=3", "train.=3", ".a=1"])
def test_what_is_no_key_value_is_refused(run_file: Path, text: str) -> None:
    path, message, place, hint = only_fault(run_file, text)
    assert path == (text.partition("=")[0] or "=")
    assert message == "expected KEY=VALUE with a dotted key"
    assert place is not None
    assert place.startswith("override ")
    assert hint == "write it like train.batch_size=64, without spaces"


def test_an_override_that_is_not_yaml_is_refused_beside_the_rest(run_file: Path) -> None:
    first, second = faults_of(run_file, "data.train=*.txt", "train.batch_size=no")
    assert (first.path, first.place) == ("train.batch_size", "override train.batch_size=no")
    assert (second.path, second.place) == ("data.train", "override data.train=*.txt")
    assert second.message.startswith("not YAML")
    assert second.hint is not None
    assert "quotes" in second.hint


@pytest.mark.parametrize(
    "override",
    [
        "train.extra.hub_token=hf_secret",
        "train.extra={hub_token: hf_secret}",
        'train.extra={"hub_token":"hf_secret"}',
        "hf_token=[hf_secret",
    ],
)
def test_a_secret_given_by_mistake_is_not_repeated(run_file: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(run_file, [override])
    assert "hf_secret" not in f"{caught.value}{caught.value.faults}"


# Faults


def test_all_faults_come_in_one_pass_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path / "run.yaml",
        """\
nmae: x
model:
  name: gpt2
  init: scrach
  tokenizer: {trian: {vocab_size: 3}}
data:
  train: [{name: a, files: [x]}]
  validation: 1.5
  packing: tight
train:
  batchsize: 8
  micro_batch: 0
  steps: 3
  steps: 4
  betas: [0.9]
  learning_rate: "6e-4"
  warmup: 7
  early_stopping: {patience: 0, mindelta: 3}
  extra: {max_steps: 3}
checkpoint:
""",
    )
    found = [(fault.path, fault.place) for fault in faults_of(path, "seed=-1")]
    assert found == [
        ("name", "run.yaml"),
        ("nmae", "run.yaml:1"),
        ("model.init", "run.yaml:4"),
        ("model.tokenizer.train", "run.yaml:5"),
        ("model.tokenizer.trian", "run.yaml:5"),
        ("data.train.0.weight", "run.yaml:7"),
        ("data.validation", "run.yaml:8"),
        ("data.packing", "run.yaml:9"),
        ("train.batch_size", "run.yaml:10"),
        ("train.batchsize", "run.yaml:11"),
        ("train.micro_batch", "run.yaml:12"),
        ("train.steps", "run.yaml:14"),
        ("train.betas", "run.yaml:15"),
        ("train.learning_rate", "run.yaml:16"),
        ("train.warmup", "run.yaml:17"),
        ("train.early_stopping.patience", "run.yaml:18"),
        ("train.early_stopping.mindelta", "run.yaml:18"),
        ("train.extra.max_steps", "run.yaml:19"),
        ("checkpoint", "run.yaml:20"),
        ("seed", "override seed=-1"),
    ]


def test_a_missing_file_is_named_with_the_way_to_make_one(tmp_path: Path) -> None:
    path, message, _, hint = only_fault(tmp_path / "run.yaml")
    assert (path, message) == (str(tmp_path / "run.yaml"), "no such file")
    assert hint == "`launcher init` writes a starter file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "expected a mapping of keys, got a list of 2"),
        ("hello", 'expected a mapping of keys, got the text "hello"'),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path, said, place, hint = only_fault(written(tmp_path / "run.yaml", text))
    assert (path, said, place) == ("run.yaml", message, "run.yaml")
    assert hint


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe")
    path, message, _, hint = only_fault(tmp_path / "run.yaml")
    assert path.endswith("run.yaml")
    assert message == "not UTF-8 text: byte 6 is 0xff"
    assert hint == "save it as UTF-8"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert only_fault(tmp_path)[1] == "cannot be read: Is a directory"
    (tmp_path / "config.yaml").touch()
    assert only_fault(tmp_path)[3] == f"give the run's own file: {tmp_path / 'config.yaml'}"


def test_a_syntax_error_has_line_and_column(tmp_path: Path) -> None:
    path, message, place, hint = only_fault(
        written(tmp_path / "run.yaml", "name: r\nmodel: {name: gpt2\ndata: 1\n")
    )
    assert path == "run.yaml"
    assert message.startswith("not YAML")
    assert place == "run.yaml:3:5"
    assert hint


def test_faults_of_a_cluster_file_have_places_too(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", "name: c\nnode: 2\nslurm:\n  partition: gpu\nenv:\n  HF_TOKEN: x\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert [(fault.path, fault.place, fault.hint) for fault in caught.value.faults] == [
        ("node", "c.yaml:2", "did you mean nodes?"),
        ("slurm.partition", "c.yaml:4", "set launch: slurm, or take it out"),
        (
            "env.HF_TOKEN",
            "c.yaml:6",
            "export HF_TOKEN in the shell that starts launcher: ranks and jobs inherit it",
        ),
    ]


def test_files_given_in_each_others_place_have_one_fault_each(tmp_path: Path, run_file: Path) -> None:
    cluster = written(tmp_path / "c.yaml", "name: c\nlaunch: local\nnodes: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_files(cluster, [], run_file)
    assert [(str(fault), (fault.hint or "").partition(",")[0]) for fault in caught.value.faults] == [
        ("c.yaml: this is a cluster file", "give it with --cluster"),
        ("run.yaml: this is a run file", "give it without --cluster"),
    ]


def test_faults_of_both_files_come_in_one_pass(tmp_path: Path, run_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_files(run_file, ["cluster.gpu=cpu", "nodes=2"], tmp_path / "c.yaml")
    first, second, third = caught.value.faults
    assert (first.path, second.path) == ("cluster", "nodes")
    assert "given with --cluster" in (first.hint or "")
    assert first.hint == second.hint
    assert (third.message, third.hint) == (
        "no such file",
        "`launcher init FILE --cluster` writes a starter file",
    )


# dump and differences

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8) | st.sampled_from(
    ["3e-4", "on", "0123", "24:00:00", "2026-01-31", "null", "true", "1_0", "a: b", "#x", "*x", "'", '"', " "]
)
numbers = st.floats(1e-12, 1e12)
paths = texts.filter(lambda text: "::" not in text and no_pattern_in(text) is None)
sources = st.lists(
    st.fixed_dictionaries({"files": st.lists(paths, min_size=1, max_size=2), "weight": numbers}),
    min_size=1,
    max_size=3,
).map(lambda made: [{"name": f"s{n}", **source} for n, source in enumerate(made)])
files = st.lists(paths, min_size=1, max_size=3)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
runs: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "name": texts.filter(lambda name: name[0] != "-" and "/" not in name and name.isprintable()).filter(
            lambda name: name not in {".", ".."}
        ),
        "model": st.fixed_dictionaries(
            {"name": texts},
            optional={
                "tokenizer": texts | st.just({"train": {"vocab_size": 512}}),
                "overrides": st.dictionaries(texts, anything, max_size=3),
            },
        ),
        "data": st.fixed_dictionaries(
            {"train": files | sources}, optional={"validation": st.floats(1e-6, 0.99) | files}
        ),
        "train": st.fixed_dictionaries(
            {"batch_size": st.integers(1, 10**6), "epochs": numbers},
            optional={
                "learning_rate": numbers,
                "warmup": st.floats(0, 0.99) | st.integers(1, 10**6),
                "betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2),
                "compile": st.booleans() | st.just("auto"),
                "eval_every": st.integers(1, 10**9) | st.sampled_from(["30min", "1.5h"]),
                "early_stopping": st.just({"patience": 3}) | st.none(),
                "extra": st.fixed_dictionaries(
                    {},
                    optional={
                        "lr_scheduler_kwargs": st.fixed_dictionaries({}, optional={"num_cycles": anything}),
                        "optim": texts,
                        "full_determinism": st.booleans(),
                    },
                ),
            },
        ),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(run=runs)
def test_what_is_dumped_loads_back_equal(
    run: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("dump")
    config = RunConfig.model_validate_json(json.dumps(run))
    text = dump(config)
    again = load_run(written(folder / "config.yaml", text)).config
    assert again == config
    assert differences(again, config) == []
    assert dump(again) == text
    assert yaml.safe_load(text) == json.loads(config.model_dump_json()), "another reader agrees"


def test_a_dump_writes_every_key_in_the_order_of_the_schema(run_file: Path) -> None:
    config = load_run(run_file).config
    text = dump(config)
    assert list(yaml.safe_load(text)) == list(RunConfig.model_fields)
    (run_file.parent / "full.yaml").write_text(text)
    origins = load_run(run_file.parent / "full.yaml").origins
    assert "default" not in origins.values()


def test_a_dumped_length_can_be_overridden(run_file: Path) -> None:
    (run_file.parent / "full.yaml").write_text(dump(load_run(run_file).config))
    assert load_run(run_file.parent / "full.yaml", ["train.tokens=5"]).config.train.steps is None


def test_differences_names_the_leaves_that_differ(run_file: Path) -> None:
    one = load_run(
        run_file,
        ["model.overrides={n_layer: 2, n_head: 2}", "train.extra.lr_scheduler_kwargs={num_cycles: 1}"],
    ).config
    two = load_run(
        run_file,
        ["model.overrides.n_layer=3", "train.extra.lr_scheduler_kwargs.num_cycles=true", "train.steps=5"],
    ).config
    assert differences(one, two) == [
        "model.overrides.n_layer",
        "model.overrides.n_head",
        "train.steps",
        "train.extra.lr_scheduler_kwargs.num_cycles",
    ]
    assert differences(one, one) == []


def test_loading_a_run_is_light(run_file: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from launcher.config.load import load_run;"
        f"load_run(Path({str(run_file)!r})); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"difflib", "huggingface_hub", "numpy", "torch", "transformers"} & set(done.stdout.split())


# A GPU that the catalogue lacks


@pytest.mark.parametrize(
    ("gpu", "path", "message", "hint"),
    [
        ("{name: mine}", "gpu.memory_gb", "missing required key", "Its memory in GB"),
        (
            "{name: mine, memory_gb: 24GB}",
            "gpu.memory_gb",
            'expected a number from 0.001 on, got the text "24GB"',
            "Its memory in GB",
        ),
        (
            "{name: mine, memory_gb: 1e308}",
            "gpu.memory_gb",
            "expected at most 1,000,000,000,000, got 1e+308",
            "Its memory in GB",
        ),
        (
            "{name: mine, memory_gb: 24, bf16_tflops: 1e-308}",
            "gpu.bf16_tflops",
            "expected a number from 0.001 on, or null, got 1e-308",
            "Its peak",
        ),
        (
            "{name: mine, memory_gb: 24, bf16_flops: 1}",
            "gpu.bf16_flops",
            "unknown key",
            "did you mean gpu.bf16_tflops?",
        ),
        (
            "4090",
            "gpu",
            "expected text, or {name, memory_gb, bf16_tflops, bandwidth_gbs, link_gbs}, got 4090",
            'write it in quotes: "4090"',
        ),
    ],
)
def test_a_fault_in_a_gpu_that_is_described(
    tmp_path: Path, gpu: str, path: str, message: str, hint: str
) -> None:
    file = written(tmp_path / "cluster.yaml", f"name: c\ngpu: {gpu}\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster(file)
    (fault,) = caught.value.faults
    assert (fault.path, fault.message, fault.place) == (path, message, "cluster.yaml:2")
    assert (fault.hint or "").startswith(hint)
