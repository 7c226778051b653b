"""The presets against transformers, and the starter files against the loader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config.load import load_cluster, load_run
from launcher.config.presets import (
    GPT2_FIELDS,
    GPT2_OTHER_NAMES,
    PRESETS,
    preset_named,
    starter_cluster,
    starter_run,
)
from launcher.config.schema import ClusterConfig
from launcher.errors import RequestError

ROOT = Path(__file__).parents[2]
PUBLISHED_PARAMETERS = {  # of the checkpoints at openai-community, the tied head counted once
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**PRESETS[name].config()))  # type: ignore[arg-type]
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED_PARAMETERS[name]


def test_the_fields_of_gpt2_are_those_of_the_installed_transformers() -> None:
    from transformers import GPT2Config

    installed = GPT2Config()
    assert set(GPT2_FIELDS) == set(GPT2Config.__annotations__)
    assert {name: getattr(installed, name) for name in GPT2_FIELDS} == GPT2_FIELDS
    assert GPT2Config.attribute_map == GPT2_OTHER_NAMES


@pytest.mark.parametrize("name", PRESETS)
def test_every_head_is_64_wide(name: str) -> None:
    assert PRESETS[name].n_embd == 64 * PRESETS[name].n_head


def test_tokens_are_about_twenty_for_each_parameter() -> None:
    for name, preset in PRESETS.items():
        assert float(preset.tokens) / PUBLISHED_PARAMETERS[name] == pytest.approx(20, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_the_starter_run_is_the_example_run(name: str) -> None:
    example = ROOT / "configs" / "runs" / f"{name}.yaml"
    assert example.read_text() == starter_run(name, name)
    config = load_run(example).config
    assert (config.name, config.model.name, config.model.init) == (name, name, "scratch")
    assert config.train.learning_rate == float(PRESETS[name].learning_rate)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/-")).filter(bool))
def test_a_starter_run_takes_any_name_a_run_may_have(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(starter_run("gpt2", name), encoding="utf-8")
    if name not in {".", ".."}:
        assert load_run(path).config.name == name


@pytest.mark.parametrize("name", ["true", "123", "3e-4", "null", "a: b", "#x", "it's"])
def test_a_name_that_yaml_would_misread_is_quoted(name: str) -> None:
    assert yaml.safe_load(starter_run("gpt2", name))["name"] == name


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="no preset is called gpt2-mediun") as caught:
        starter_run("gpt2-mediun", "x")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean gpt2-medium")
    with pytest.raises(RequestError) as caught:
        preset_named("zzz")
    assert caught.value.hint == "there are gpt2, gpt2-medium, gpt2-large, gpt2-xl"


def test_the_starter_cluster_is_this_machine(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(starter_cluster())
    config = load_cluster(tmp_path / "c.yaml").config
    assert config == ClusterConfig.model_validate({"name": "my-machine"})


def test_the_starter_clusters_lines_for_slurm_are_a_cluster_on_slurm(tmp_path: Path) -> None:
    text = starter_cluster().replace("launch: local\n", "")
    text = text.replace("gpus_per_node: auto", "gpus_per_node: 8").replace("gpu: auto", "gpu: h100-sxm-80gb")
    head, _, rest = text.partition("# On a SLURM cluster")
    (tmp_path / "c.yaml").write_text(head + re.sub("^# ", "", rest.partition("\n")[2], flags=re.MULTILINE))
    config = load_cluster(tmp_path / "c.yaml").config
    assert (config.launch, config.slurm.partition, config.slurm.exclusive) == ("slurm", "gpu", True)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "runs").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_example_run_loads(path: Path) -> None:
    assert load_run(path).config.name == path.stem


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "clusters").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_example_cluster_loads(path: Path) -> None:
    assert load_cluster(path).config.name == path.stem


def test_the_fine_tuning_example_says_what_its_walk_through_says() -> None:
    config = load_run(ROOT / "configs" / "runs" / "finetune.yaml").config
    assert (config.model.name, config.model.init) == ("model", "pretrained")
    assert (config.data.train, config.data.validation) == (["train.txt"], ["val.txt"])
    assert (config.data.sample_by, config.data.block_size, config.data.packing) == ("line", 64, "pad")
    train = config.train
    assert (train.epochs, train.batch_size, train.micro_batch) == (3, 8, 1)
    assert (train.learning_rate, train.schedule, train.warmup, train.weight_decay) == (
        5e-5,
        "linear",
        0,
        0.01,
    )
    assert (train.eval_every, train.log_every, train.precision) == (10, 5, "auto")
    assert config.checkpoint.keep == 2
