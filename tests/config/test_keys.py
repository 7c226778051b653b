"""The schema as keys: leaves, plain words, and the nearest name."""

from __future__ import annotations

import pytest

from launcher.config.document import dotted
from launcher.config.keys import in_words, leaves, nearest, sections, takes, where_it_belongs
from launcher.config.schema import ClusterConfig, DataSection, RunConfig, Section, TrainSection


def test_leaves_are_the_keys_of_a_full_file_in_its_order() -> None:
    names = [dotted(path) for path, _ in leaves(RunConfig)]
    assert names[:3] == ["name", "model.name", "model.init"]
    assert "train" not in names
    assert "train.early_stopping" in names
    assert names[-4:] == ["report_to", "push_to_hub", "seed", "output_dir"]
    assert len(names) == len(set(names))


def test_every_leaf_can_be_said_in_words() -> None:
    for model in (RunConfig, ClusterConfig):
        for path, field in leaves(model):
            words = in_words(field)
            assert words, path
            assert "class" not in words
            assert "typing" not in words


@pytest.mark.parametrize(
    ("section", "name", "words"),
    [
        (TrainSection, "batch_size", "a whole number from 1 on"),
        (TrainSection, "learning_rate", "a number above 0"),
        (TrainSection, "betas", "a list of 2 numbers"),
        (TrainSection, "micro_batch", "auto, or a whole number from 1 on"),
        (TrainSection, "compile", "auto, or true or false"),
        (TrainSection, "schedule", "one of cosine, linear, constant"),
        (TrainSection, "eval_every", "a number of steps, or a duration such as 30min"),
        (DataSection, "train", "a list of text, or a list of {name, files, weight}"),
        (DataSection, "validation", "a number, or a list of text"),
        (RunConfig, "seed", "a whole number from 0 to 4294967295"),
        (RunConfig, "report_to", "a list out of tensorboard, wandb, trackio"),
        (ClusterConfig, "env", "a mapping of names to values"),
    ],
)
def test_what_a_key_takes_in_plain_words(section: type[Section], name: str, words: str) -> None:
    assert takes(section, name) == words


@pytest.mark.parametrize(
    ("section", "name", "hint"),
    [
        ("train", "learning_rte", "did you mean train.learning_rate?"),
        ("train", "lr", "did you mean train.learning_rate?"),
        ("train", "Batch_Size", "did you mean train.batch_size?"),
        ("train", "block_size", "block_size belongs in data: data.block_size"),
        ("model", "seed", "seed belongs at the top level: seed"),
        ("", "train.steps", "write steps under train"),
        ("", "nmae", "did you mean name?"),
        ("model", "pakcing", "did you mean data.packing?"),
        (
            "",
            "nodse",
            "the top level has name, model, data, train, checkpoint, report_to, "
            "push_to_hub, seed, output_dir",
        ),
        ("checkpoint", "zzz", "checkpoint has every, keep"),
    ],
)
def test_where_an_unknown_key_belongs(section: str, name: str, hint: str) -> None:
    by_name = {dotted(at): model for at, model in sections(RunConfig)}
    assert where_it_belongs(RunConfig, by_name[section], section, name) == hint


def test_nothing_is_near_to_noise() -> None:
    assert nearest("qqqqqq", ["learning_rate", "steps"]) == []
