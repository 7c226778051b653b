"""The list of TrainingArguments' fields against the installed transformers."""

from __future__ import annotations

import dataclasses

from launcher.config.training_arguments import FORMER, FREE, SECRET, SET_BY_LAUNCHER, instead_of


def test_every_field_of_the_installed_transformers_is_known_and_no_other() -> None:
    from transformers import TrainingArguments

    installed = {field.name for field in dataclasses.fields(TrainingArguments)}
    known = {*FREE, *SET_BY_LAUNCHER, *SECRET} - {"push_to_hub_token"}
    assert known == installed
    assert not installed & (FORMER.keys() | {"push_to_hub_token"})


def test_a_field_is_in_one_table_only() -> None:
    tables = [set(FREE), set(SET_BY_LAUNCHER), set(FORMER), set(SECRET)]
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_what_to_write_for_a_field() -> None:
    assert instead_of("max_steps") == "set train.steps"
    assert instead_of("debug") == "it is a TrainingArguments field: train.extra.debug"
    assert instead_of("nonsense") is None
