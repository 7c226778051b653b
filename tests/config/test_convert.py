"""What old files say together: conflicts, the batch, and that nothing is passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.convert import Conversion
from launcher.config.load import load_run
from launcher.errors import ConfigError, Fault
from tests.config import old_files
from tests.config.old_files import JSON, SAMPLES, YAML, conflicts, of, said


def without(text: str, **changed: str) -> str:
    """`text` with words changed, each of which is in it."""
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    return text


def test_both_files_together() -> None:
    conversion = of(old_files.ZERO2_WITH_OFFLOAD, old_files.DEEPSPEED_WITH_A_JSON)
    assert conversion.settings["train.strategy"].comment == f"{JSON}:20 zero_optimization.stage"
    assert said(conversion)["cluster.nodes"] == 2
    alone = conflicts(None, old_files.DEEPSPEED_WITH_A_JSON)
    assert "zero2.json, which was not given" in alone["deepspeed_config.deepspeed_config_file"]


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_written_loads_and_says_what_was_said(name: str, tmp_path: Path) -> None:
    conversion = of(*SAMPLES[name])
    file = tmp_path / "run.yaml"
    file.write_text(conversion.run("gpt2", "run"))
    config = load_run(file).config.model_dump(mode="json")
    for key, setting in conversion.of("train").items():
        value: Any = config
        for part in key.split("."):
            value = value[part]
        assert value == setting.value, key
        assert setting.comment in file.read_text()


def leaves(value: Any, at: str = "") -> set[str]:
    if isinstance(value, dict) and (value or not at):
        return {leaf for name, each in value.items() for leaf in leaves(each, f"{at}.{name}" if at else name)}
    return {at}


def named(conversion: Conversion) -> set[str]:
    """The keys that settings come from, and those that were not taken over."""
    return {origin.key for origin in conversion.origins.values()} | {left.key for left in conversion.left}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_key_is_taken_over_or_listed(name: str) -> None:
    conversion = of(*SAMPLES[name])
    told = {key for key in named(conversion) if not key.startswith("no ")}
    written = set().union(*(leaves(yaml.safe_load(text)) for text in SAMPLES[name] if text))
    assert written == told
    assert not [left for left in conversion.left if "does not know" in left.why]


_VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-2, 40), st.floats(-1, 2, allow_nan=False)),
    st.sampled_from(
        ["auto", "cpu", "none", "nvme", "no", "bf16", "FSDP", "NO", "DEEPSPEED", "WarmupLR", "Lion"]
    ),
    st.lists(st.floats(0, 1), max_size=3),
    st.just({}),
)


_KEYS = sorted(
    set().union(*(leaves(yaml.safe_load(text)) for pair in SAMPLES.values() for text in pair if text))
    - {"fsdp_config"}  # elsewhere a section
)


def faults_in(accelerate: dict[str, Any]) -> tuple[Fault, ...]:
    try:
        of(accelerate=accelerate)
    except ConfigError as error:
        return error.faults
    return ()


@given(
    st.dictionaries(st.sampled_from([*_KEYS, "unheard.of", "moe.enabled"]), _VALUES, min_size=1, max_size=12)
)
def test_no_file_passes_a_key_in_silence(flat: dict[str, Any]) -> None:
    nested: dict[str, Any] = {"distributed_type": "NO"}
    for key, value in flat.items():
        *sections, last = key.split(".")
        here = nested
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    refused = faults_in(nested)
    assert all(fault.place and fault.hint for fault in refused)
    if refused:
        return
    conversion = of(accelerate=nested)
    assert leaves(nested) == {key for key in named(conversion) if not key.startswith("no ")}


def test_two_strategies() -> None:
    found = conflicts(old_files.TRAINER_ZERO3, old_files.FSDP2_ON_FOUR_NODES)
    assert found == {
        "distributed_type": f"train.strategy would be fsdp, and zero3 by {JSON}:16 zero_optimization.stage "
        f"({YAML}:13)"
    }


def test_a_batch_that_is_not_its_product() -> None:
    message = conflicts({"train_batch_size": 100, "train_micro_batch_size_per_gpu": 8})["train_batch_size"]
    assert message == f"100 is no multiple of 8 ({JSON}:3 train_micro_batch_size_per_gpu) ({JSON}:2)"
    found = conflicts(
        without(old_files.ZERO2_WITH_OFFLOAD, **{"256": "512"}), old_files.DEEPSPEED_WITH_A_JSON
    )
    assert "512 is not 4 (" in found["train_batch_size"]
    assert f"16 ({YAML}:20 num_processes)" in found["train_batch_size"]


def test_accelerates_precision_against_the_json() -> None:
    accelerate = without(old_files.DEEPSPEED_WITH_A_JSON, use_cpu="mixed_precision: fp16\nuse_cpu")
    assert "fp16, and bf16" in conflicts(old_files.ZERO2_WITH_OFFLOAD, accelerate)["mixed_precision"]
    off = conflicts({"fp16": {"enabled": False}, "zero_optimization": {"stage": 2}}, accelerate)
    assert set(off) == {"fp16.enabled"}


def test_everything_wrong_at_once() -> None:
    found = conflicts(
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}, "optimizer": {"type": "Lion"}},
        {"distributed_type": "FSDP", "num_machines": 2, "num_processes": 3, "mixed_precision": "fp8"},
    )
    assert set(found) == {"fp16.enabled", "optimizer.type", "num_processes", "mixed_precision"}


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (("name: mine\n",), "neither a DeepSpeed JSON nor an accelerate YAML"),
        ((old_files.TRAINER_ZERO3, old_files.ZERO2_WITH_OFFLOAD), "a second file of DeepSpeed's"),
    ],
)
def test_files_of_other_kinds(texts: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        of(*texts)


def test_without_the_ranks_a_micro_batch_alone_says_no_batch() -> None:
    conversion = of({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2})
    assert {"train.batch_size", "train.micro_batch"}.isdisjoint(said(conversion))
    assert {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} <= {
        e.key for e in conversion.left
    }


def test_what_is_not_there_is_what_deepspeed_takes_it_for() -> None:
    """Launcher's own defaults differ: it lets weights decay and chooses strategy and precision."""
    bare = of({"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}})
    assert said(bare) == {
        "train.batch_size": 8,
        "train.strategy": "ddp",
        "train.max_grad_norm": 1.0,
        "train.learning_rate": 1e-4,
        "train.weight_decay": 0.0,
        "train.betas": [0.9, 0.999],
    }
    assert bare.settings["train.betas"].comment == f"{JSON}:5 no optimizer.params.betas"
    assert "train.precision" in next(left.why for left in bare.left if left.key.startswith("no bf16"))
    torchs = of({"optimizer": {"type": "Adam", "params": {"torch_adam": True}}})
    assert said(torchs)["train.weight_decay"] == 0.01
    assert said(torchs)["train.learning_rate"] == 0.001
    auto = {"gradient_clipping": "auto", "optimizer": {"type": "AdamW", "params": {"betas": "auto"}}}
    assert {"train.max_grad_norm", "train.betas"}.isdisjoint(said(of(auto)))
    warm = {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-4, "warmup_type": "linear"}}
    assert said(of({"optimizer": {"type": "Adam"}, "scheduler": warm}))["train.learning_rate"] == 2e-4
    both = of({"train_batch_size": 8}, {"distributed_type": "FSDP", "mixed_precision": "bf16"})
    assert said(both)["train.strategy"] == "fsdp"
    assert not [left for left in both.left if left.key.startswith("no ")]


def test_a_micro_batch_follows_from_all_the_others() -> None:
    ranks = {"distributed_type": "DEEPSPEED", "num_processes": 2}
    asked = {"train_batch_size": 64, "gradient_accumulation_steps": 4}
    assert said(of(asked, ranks))["train.micro_batch"] == 8
    assert "train.micro_batch" not in said(of(asked)), "the ranks are not known"


def test_an_accumulation_that_is_auto_is_not_taken_for_one() -> None:
    steps = {"gradient_accumulation_steps": "auto"}
    micro = {"train_micro_batch_size_per_gpu": 4}
    ranks = {"distributed_type": "DEEPSPEED", "num_processes": 2}
    assert said(of(micro, ranks))["train.batch_size"] == 8
    assert "train.batch_size" not in said(of(micro | steps, ranks))
    assert "train.batch_size" not in said(of(micro, ranks | {"deepspeed_config": steps}))
