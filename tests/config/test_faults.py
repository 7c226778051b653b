"""One readable fault for each thing to mend, whatever pydantic has to say about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.load import load_run
from launcher.errors import ConfigError

RUN = "name: r\nmodel: {name: gpt2}\ndata: {train: [a.txt]}\ntrain: {batch_size: 8, epochs: 1}\n"


@pytest.mark.parametrize(
    ("override", "path", "message", "hint"),
    [
        (
            "train.batch_size='8'",
            "train.batch_size",
            'expected a whole number from 1 on, got the text "8"',
            "write 8 without quotes",
        ),
        (
            "train.steps=1_000",
            "train.steps",
            'expected a whole number from 1 on, or null, got the text "1_000"',
            "write 1000",
        ),
        (
            "train.learning_rate=nan",
            "train.learning_rate",
            'expected a number above 0, got the text "nan"',
            "The peak learning rate",
        ),
        (
            "output_dir=s3://bucket/runs",
            "output_dir",
            'expected a local or shared folder, not a URL, got the text "s3://bucket/runs"',
            "The folder that",
        ),
        (
            "data.cache_dir=s3://bucket/stores",
            "data.cache_dir",
            'expected a local or shared folder, not a URL, got the text "s3://bucket/stores"',
            "Where token stores",
        ),
        (
            'data.cache_dir="a\\nb"',
            "data.cache_dir",
            'expected one line of text, without control characters, got the text "a\\nb"',
            "Where token stores",
        ),
        (
            'push_to_hub="a/b\\n"',
            "push_to_hub",
            'expected one line of text, without control characters, got the text "a/b\\n"',
            "The Hub repository",
        ),
        (
            "train.batch_size=true",
            "train.batch_size",
            "expected a whole number from 1 on, got true",
            "Sequences per",
        ),
        (
            "train.batch_size=1.5",
            "train.batch_size",
            "expected a whole number from 1 on, got 1.5",
            "Sequences per",
        ),
        (
            "train.learning_rate=true",
            "train.learning_rate",
            "expected a number above 0, got true",
            "The peak",
        ),
        ("train.learning_rate=0", "train.learning_rate", "expected a number above 0, got 0", "The peak"),
        (
            "train.schedule=cosin",
            "train.schedule",
            'expected one of cosine, linear, constant, got the text "cosin"',
            "did you mean cosine?",
        ),
        (
            "train.compile=yes",
            "train.compile",
            'expected auto, or true or false, got the text "yes"',
            "write true",
        ),
        ("train.compile=1", "train.compile", "expected auto, or true or false, got 1", "Run the model"),
        (
            "train.micro_batch=atuo",
            "train.micro_batch",
            'expected auto, or a whole number from 1 on, got the text "atuo"',
            "did you mean auto?",
        ),
        (
            "train.micro_batch=0",
            "train.micro_batch",
            "expected auto, or a whole number from 1 on, got 0",
            "Sequences per forward",
        ),
        (
            "train.eval_every=2.5",
            "train.eval_every",
            "expected a number of steps, or a duration such as 30min, got 2.5",
            "Evaluate every",
        ),
        ("train.eval_every=0", "train.eval_every", "expected at least 1 step, got 0", "Evaluate every"),
        (
            "checkpoint.every=soon",
            "checkpoint.every",
            'expected a duration above zero such as 90s, 15min, 1.5h or 2d, got the text "soon"',
            "Save every",
        ),
        (
            "data.skip.steps=[120, 5-3]",
            "data.skip.steps.1",
            'expected a step from 1 on, or a range of steps such as 130-135, got the text "5-3"',
            None,
        ),
        (
            "data.skip.steps=[1-1000000000000]",
            "data.skip.steps.0",
            'expected a range of at most 100,000 steps, got the text "1-1000000000000"',
            None,
        ),
        (
            "data.skip.steps=12",
            "data.skip.steps",
            "expected a list of steps such as [120, 130-135], got 12",
            "Steps whose samples are banned",
        ),
        (
            "data.skip.documents=[train-00003]",
            "data.skip.documents.0",
            'expected SHARD:DOCUMENT, such as train-00003:1542, got the text "train-00003"',
            None,
        ),
        ("train.betas=[0.9]", "train.betas", "expected a list of 2 numbers, got a list of 1", "AdamW"),
        ("train.betas=[1, 2, 3]", "train.betas", "expected a list of 2 numbers, got a list of 3", "AdamW"),
        ("train.betas=[0.9, x]", "train.betas.1", 'expected a number, got the text "x"', None),
        (
            "train.early_stopping=3",
            "train.early_stopping",
            "expected {patience, min_delta}, or null, got 3",
            "Stop when",
        ),
        (
            "train.early_stopping={patience: 0}",
            "train.early_stopping.patience",
            "expected a whole number from 1 on, got 0",
            "Evaluations in a row",
        ),
        (
            "train.extra=[1]",
            "train.extra",
            "expected a mapping of names to values, got a list of 1",
            "Any other",
        ),
        (
            "data.train=a.txt",
            "data.train",
            'expected a list of text, or a list of {name, files, weight}, got the text "a.txt"',
            "write it as a list: [a.txt]",
        ),
        ("data.train=[]", "data.train", "it is empty", "The training text: paths"),
        (
            "data.train=[a, 5, b]",
            "data.train.1",
            "expected text or {name, files, weight}, got 5",
            'write it in quotes: "5"',
        ),
        (
            "data.train=[a, {name: b, files: [c], weight: 1}]",
            "data.train",
            "expected a list of text, or a list of {name, files, weight}, got a list of 2",
            "The training text: paths",
        ),
        (
            "data.train=[{name: b, files: [c]}]",
            "data.train.0.weight",
            "missing required key",
            "Share of the samples",
        ),
        (
            "data.train=[{name: b, files: [c], weight: 0}]",
            "data.train.0.weight",
            "expected a number above 0, got 0",
            "Share of the samples",
        ),
        (
            "data.train=[{name: b, files: [], weight: 1}]",
            "data.train.0.files",
            "it is empty",
            "This source's text",
        ),
        (
            "data.train=[{name: b, files: [c], weight: 1, wieght: 2}]",
            "data.train.0.wieght",
            "unknown key",
            "did you mean data.train.0.weight?",
        ),
        ("data.validation=[a, 3]", "data.validation.1", "expected text, got 3", 'write it in quotes: "3"'),
        (
            "data.validation=none",
            "data.validation",
            'expected a number, or a list of text, got the text "none"',
            "write it as a list: [none]",
        ),
        (
            "model.tokenizer=5",
            "model.tokenizer",
            "expected text, or {train}, or null, got 5",
            'write it in quotes: "5"',
        ),
        (
            "model.tokenizer={train: {vocab_size: many}}",
            "model.tokenizer.train.vocab_size",
            'expected a whole number from 257 on, got the text "many"',
            "Entries in",
        ),
        (
            "model.tokenizer={train: {vocab_size: 256}}",
            "model.tokenizer.train.vocab_size",
            "expected a whole number from 257 on, got 256",
            "Entries in the vocabulary, the 256 bytes",
        ),
        ("model.name=''", "model.name", "it is empty", "A preset"),
        (
            "name=a/b",
            "name",
            'expected a folder name: no slash, no control character, no leading dash, got the text "a/b"',
            "The run's name",
        ),
        (
            'output_dir="a\\nb"',
            "output_dir",
            'expected one line of text, without control characters, got the text "a\\nb"',
            "The folder that",
        ),
        (
            "train.batch_size=1e18",
            "train.batch_size",
            "expected at most 1,000,000,000,000, got 1e+18",
            "Sequences per optimizer step",
        ),
        (
            "train.micro_batch=1e18",
            "train.micro_batch",
            "expected at most 1,000,000,000,000, got 1e+18",
            "Sequences per forward pass",
        ),
        (
            f"train.steps={'9' * 400}",
            "train.steps",
            f"expected at most 1,000,000,000,000, got {'9' * 56}...",
            "Length of training",
        ),
        ("name=7", "name", "expected text, got 7", 'write it in quotes: "7"'),
        (
            "report_to=tensorboard",
            "report_to",
            'expected a list out of tensorboard, wandb, trackio, got the text "tensorboard"',
            "write it as a list: [tensorboard]",
        ),
        (
            "report_to=[tensorbord]",
            "report_to.0",
            'expected one of tensorboard, wandb, trackio, got the text "tensorbord"',
            "did you mean tensorboard?",
        ),
        ("seed=-1", "seed", "expected a whole number from 0 to 4294967295, got -1", "Seeds"),
        (
            "model=gpt2",
            "model",
            'expected a mapping of keys, got the text "gpt2"',
            "under it go name, init, tokenizer, overrides",
        ),
        (
            "checkpoint=5",
            "checkpoint",
            "expected a mapping of keys, got 5",
            "under it go every, keep; or leave it out",
        ),
        (
            "train.label_smoothing_factor=0.1",
            "train.label_smoothing_factor",
            "unknown key",
            "it is a TrainingArguments field: train.extra.label_smoothing_factor",
        ),
        ("train.num_train_epochs=3", "train.num_train_epochs", "unknown key", "set train.epochs"),
        ("trian.steps=3", "trian", "unknown key", "did you mean train?"),
    ],
)
def test_one_fault_in_plain_words(
    tmp_path: Path, override: str, path: str, message: str, hint: str | None
) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml", [override])
    (fault,) = caught.value.faults
    assert (fault.path, fault.message) == (path, message)
    assert fault.place is not None
    assert fault.place.startswith(f"override {override.partition('=')[0]}=")
    assert (fault.hint or "").startswith(hint or "")
    assert (fault.hint is None) == (hint is None)


def test_null_in_the_file_names_the_default(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN.replace("epochs: 1", "epochs: 1, schedule: null"))
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml")
    (fault,) = caught.value.faults
    assert (fault.path, fault.place) == ("train.schedule", "run.yaml:4")
    assert fault.message == "expected one of cosine, linear, constant, got null"
    assert fault.hint == 'leave the key out for its default, "cosine"'


def test_a_rule_is_judged_beside_a_fault_in_another_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN.replace("batch_size: 8", "batch_size: eight, warmup: 2.5"))
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml")
    assert [fault.path for fault in caught.value.faults] == ["train.batch_size", "train.warmup"]


def test_no_rule_is_judged_on_a_key_at_fault(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN.replace("epochs: 1", "steps: many, warmup: 9"))
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml")
    assert [fault.path for fault in caught.value.faults] == ["train.steps"]
