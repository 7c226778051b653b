"""Rules over more than one key, and what is not in this version: path, place, message and hint of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.load import load_cluster, load_files, load_run
from launcher.errors import ConfigError, Fault

RUN = "name: r\nmodel: {name: gpt2}\ndata: {train: [a.txt]}\ntrain: {batch_size: 8, epochs: 1}\n"


def fault_of(tmp_path: Path, *overrides: str) -> Fault:
    (tmp_path / "run.yaml").write_text(RUN)
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml", overrides)
    (fault,) = caught.value.faults
    return fault


def loads(tmp_path: Path, *overrides: str) -> bool:
    (tmp_path / "run.yaml").write_text(RUN)
    return load_run(tmp_path / "run.yaml", overrides).config is not None


@pytest.mark.parametrize(
    ("overrides", "path", "message", "hint"),
    [
        (["train.epochs=null"], "train", "none is set", "set one of them"),
        (
            ["train.tokens=1e6", "data.packing=pad"],
            "train.tokens",
            "with data.packing pad rows differ in length",
            "set train.steps or",
        ),
        (
            ["train.tokens=1e6", "data.packing=best_fit"],
            "train.tokens",
            "with data.packing best_fit rows differ in length",
            "set train.steps or",
        ),
        (
            ["model.overrides.n_layer=2", "model.init=pretrained"],
            "model.overrides",
            "pretrained weights have the shape they have",
            "set model.init: scratch",
        ),
        (["data.mode=stream"], "train.epochs", "nobody has counted", "set train.steps or train.tokens"),
        (
            ["data.mode=stream", "data.packing=pad", "train.epochs=null", "train.steps=5"],
            "data.packing",
            "pad needs all documents at hand",
            "set data.packing: concat",
        ),
        (
            ["train.extra={lr_scheduler_kwargs: {min_lr: 0.1}}"],
            "train.extra.lr_scheduler_kwargs",
            "train.schedule cosine takes no min_lr",
            "cosine takes num_cycles",
        ),
        (
            ["train.schedule=linear", "train.extra={lr_scheduler_kwargs: {num_cycles: 2}}"],
            "train.extra.lr_scheduler_kwargs",
            "train.schedule linear takes no num_cycles",
            "linear and constant take nothing",
        ),
        (
            [
                *("data.mode=stream", "train.epochs=null", "train.steps=5"),
                "train.extra={dataloader_num_workers: 2}",
            ],
            "train.extra.dataloader_num_workers",
            "a thread of the rank itself reads ahead",
            "take it out",
        ),
        (
            ["model.init=pretrained", "model.tokenizer={train: {vocab_size: 300}}"],
            "model.tokenizer",
            "only the ids of their own tokenizer",
            "set model.tokenizer: null",
        ),
        (["train.betas=[0.9, 1.0]"], "train.betas.1", "not including, 1, got 1", "0.9 and 0.95"),
        (["train.betas=[-0.1, 0.9]"], "train.betas.0", "got -0.1", "0.9 and 0.95"),
        (["train.warmup=1.5"], "train.warmup", "a number of steps, which 1.5 is not", "write a whole number"),
        (
            ["train.steps=10", "train.warmup=11"],
            "train.warmup",
            "11 steps of warmup do not fit in 10",
            "at most 10",
        ),
        (["data.validation=1"], "data.validation", "not including, 1, got 1", "write 0.01"),
        (["data.validation=-0.1"], "data.validation", "got -0.1", "write 0.01"),
        (
            ["data.validation=[]"],
            "data.validation",
            "the list of files is empty",
            "write 0 for no validation",
        ),
        (
            ["data.validation=0", "train.early_stopping={patience: 2}"],
            "train.early_stopping",
            "it watches eval_loss, and data.validation is 0",
            "set data.validation",
        ),
        (
            ["data.train=[{name: a, files: [x], weight: 1}, {name: a, files: [y], weight: 1}]"],
            "data.train.1.name",
            "two sources are called a",
            "give each source its own name",
        ),
        (["train.metrics=[accuracy]"], "train.metrics.0", "expected module:name", "my_metrics:accuracy"),
        (["train.callbacks=['a:b', 'x y:z']"], "train.callbacks.1", "got x y:z", "my_callbacks:MyCallback"),
        (["train.extra.max_steps=3"], "train.extra.max_steps", "launcher sets this", "set train.steps"),
        (["train.extra.fsdp=full_shard"], "train.extra.fsdp", "launcher sets this", "set train.strategy"),
        (
            ["train.extra.warmup_ratio=0.1"],
            "train.extra.warmup_ratio",
            "no such field any more",
            "train.warmup",
        ),
        (["train.extra.label_smoothing=1"], "train.extra.label_smoothing", "has no such field", "_factor?"),
        (["train.extra.max_step=1"], "train.extra.max_step", "has no such field", "set train.steps"),
        (
            ["train.extra.adam_epsilon=abc"],
            "train.extra.adam_epsilon",
            'expected a number, got the text "abc"',
            "transformers documents",
        ),
        (
            ["train.extra.dataloader_num_workers=true"],
            "train.extra.dataloader_num_workers",
            "expected a whole number, got true",
            "transformers documents",
        ),
        (
            ["data.isolate_documents=true", "train.extra.use_cache=true"],
            "train.extra.use_cache",
            "with a cache the documents of a row see each other",
            "take it out of train.extra",
        ),
        (["train.extra.hub_token=hf_x"], "train.extra.hub_token", "it is a secret", "`hf auth login`"),
    ],
)
def test_a_broken_rule(tmp_path: Path, overrides: list[str], path: str, message: str, hint: str) -> None:
    fault = fault_of(tmp_path, *overrides)
    assert fault.path == path
    assert message in fault.message
    assert hint in (fault.hint or "")
    assert fault.place is not None
    assert fault.place.startswith(("run.yaml", "override "))


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=10", "train.warmup=10"],
        ["train.steps=10", "train.warmup=0.5"],
        ["train.betas=[0, 0.999]"],
        ["data.validation=0"],
        ["data.validation=0.99"],
        ["train.micro_batch=8"],
        ["train.epochs=0.5", "data.packing=pad"],
        ["train.epochs=0.5", "data.packing=best_fit", "data.isolate_documents=true"],
        ["train.epochs=0.5", "data.packing=pad", "data.isolate_documents=true"],
        ["data.packing=pad", "data.isolate_documents=true", "train.extra.use_cache=true"],
        ["train.metrics=['my.metrics:f1']"],
        ["train.extra={label_smoothing_factor: 0.1, optim: adafactor}"],
        ["train.extra={label_smoothing_factor: 1, adam_epsilon: 1e-6, debug: [underflow_overflow]}"],
        ["data.train=[{name: a, files: [x], weight: 1}, {name: b, files: [y], weight: 1}]"],
    ],
)
def test_what_keeps_the_rules_loads(tmp_path: Path, overrides: list[str]) -> None:
    assert loads(tmp_path, *overrides)


@pytest.mark.parametrize(
    "override",
    ["data.train=['']", "data.train=[{name: a, files: [x, ''], weight: 1}]"],
)
def test_an_empty_path_is_refused(tmp_path: Path, override: str) -> None:
    fault = fault_of(tmp_path, override)
    assert (fault.path, fault.message) == ("data.train", "an empty path names no file")
    assert fault_of(tmp_path, "data.validation=['']").path == "data.validation"


@pytest.mark.parametrize(
    "override",
    [
        "data.skip.documents=['train-00003:\uff11\uff12']",
        "data.skip.steps=['\uff11\uff12']",
        "checkpoint.every='\uff11\uff15min'",
    ],
)
def test_only_plain_digits_are_numbers(tmp_path: Path, override: str) -> None:
    assert "expected" in str(fault_of(tmp_path, override))


def test_lengths_in_conflict_are_placed_where_the_second_stands(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        RUN.replace("{batch_size: 8, epochs: 1}", "\n  batch_size: 8\n  epochs: 1\n  steps: 5")
    )
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml")
    (fault,) = caught.value.faults
    assert (fault.path, fault.place, fault.hint) == ("train.epochs", "run.yaml:6", "keep one of them")
    assert "train.steps is set too" in fault.message


@pytest.mark.parametrize(
    ("strategy", "offload", "hint"),
    [
        ("ddp", "optimizer", "set train.strategy: zero1 or zero2 or zero3, or train.offload: none"),
        ("ddp", "parameters", "set train.strategy: zero3 or fsdp, or train.offload: none"),
        ("zero1", "parameters", "set train.strategy: zero3 or fsdp"),
        ("zero2", "parameters", "set train.strategy: zero3 or fsdp"),
        ("fsdp", "optimizer", "set train.strategy: zero1 or zero2 or zero3"),
    ],
)
def test_what_a_strategy_cannot_offload(tmp_path: Path, strategy: str, offload: str, hint: str) -> None:
    fault = fault_of(tmp_path, f"train.strategy={strategy}", f"train.offload={offload}")
    assert fault.path == "train.offload"
    assert fault.message == f"train.strategy {strategy} cannot keep the {offload} in CPU memory"
    assert fault.place == f"override train.offload={offload}"
    assert hint in (fault.hint or "")


def test_every_slurm_key_at_its_default_loads(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("slurm: {partition: null, exclude: [], setup: [], extra: []}\n")
    assert load_cluster(tmp_path / "c.yaml").config.launch == "local"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://ex[0]/x", "a bracket in the name of a host, ex[0]: nothing can match it"),
        ("zip://a::https://[ab]/x.zip", "a bracket in the name of a host, [ab]: nothing can match it"),
        ("a/**b/*.txt", "** with other letters between two slashes: nothing can match it"),
    ],
)
def test_what_can_be_no_pattern_is_refused(tmp_path: Path, path: str, message: str) -> None:
    fault = fault_of(tmp_path, f'data.train=["{path}"]')
    assert (fault.path, fault.message) == ("data.train", message)
    sound = '["a[0]/**/x", "https://a/b[0-9].txt", "zip://[ab]/a**b::s3://b/x.zip", "file:///a/[bc]"]'
    assert loads(tmp_path, f"data.train={sound}")


def test_a_stream_has_nothing_to_skip_in(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    overrides = ["data.mode=stream", "data.skip={steps: [120], documents: [train-00003:1542]}"]
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml", overrides)
    skipped = {fault.path: fault for fault in caught.value.faults if fault.path.startswith("data.skip")}
    assert list(skipped) == ["data.skip.steps", "data.skip.documents"]
    for fault in skipped.values():
        assert "a stream has no store" in fault.message
        assert "set data.mode: prepared" in (fault.hint or "")
    assert loads(tmp_path, "data.skip={steps: [7, 130-135], documents: [train-00003:1542]}")


@pytest.mark.parametrize(
    ("gpu", "path", "message", "hint"),
    [
        ("H100", "gpu", "'H100' is not in the catalogue", "did you mean h100-sxm-80gb or h100-pcie-80gb?"),
        ("h100-smx-80gb", "gpu", "not in the catalogue", "h100-sxm-80gb"),
        ("l40", "gpu", "not in the catalogue", "l40s-48gb"),
        (
            "quantum",
            "gpu",
            "not in the catalogue",
            "the catalogue has cpu, t4-16gb, v100-sxm-16gb, v100-sxm-32gb",
        ),
        (
            "a1",
            "gpu",
            "",
            "or describe it by its memory and its peak, as gpu: {name: a1, memory_gb: ..., bf16",
        ),
        (
            "{name: t4-16gb, memory_gb: 32}",
            "gpu.name",
            "'t4-16gb' is in the catalogue",
            "write gpu: t4-16gb, or",
        ),
    ],
)
def test_a_gpu_is_in_the_catalogue_or_described(
    tmp_path: Path, gpu: str, path: str, message: str, hint: str
) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "c.yaml").write_text(f"name: c\ngpu: {gpu}\n")
    with pytest.raises(ConfigError) as caught:
        load_files(tmp_path / "run.yaml", ["train.schedule=cosin"], tmp_path / "c.yaml")
    schedule, fault = caught.value.faults
    assert (schedule.path, fault.path, fault.place) == ("train.schedule", path, "c.yaml:2")
    assert message in fault.message
    assert hint in (fault.hint or "")
