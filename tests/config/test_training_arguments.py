"""The list of TrainingArguments' fields against the installed transformers."""

from __future__ import annotations

import dataclasses
import re

from pydantic import TypeAdapter

from launcher.config.training_arguments import FORMER, FREE, SECRET, SET_BY_LAUNCHER, instead_of


def test_every_field_of_the_installed_transformers_is_known_and_no_other() -> None:
    from transformers import TrainingArguments

    installed = {field.name for field in dataclasses.fields(TrainingArguments)}
    known = {*FREE, *SET_BY_LAUNCHER, *SECRET} - {"push_to_hub_token"}
    assert known == installed
    assert not installed & (FORMER.keys() | {"push_to_hub_token"})


def test_the_types_are_those_of_the_installed_transformers() -> None:
    from transformers import TrainingArguments

    def names(kind: object) -> set[str]:
        """`dict | str | None` and `Union[str, NoneType]` alike; an enumeration of texts is a text."""
        text = re.sub(r"<class '(\w+)'>", r"\1", str(kind)).replace(
            "transformers.debug_utils.DebugOption", "str"
        )
        text = text.replace("transformers.training_args.OptimizerNames", "str").replace("NoneType", "None")
        text = text.replace("typing.Literal[False]", "bool").replace("dict[str, typing.Any]", "dict")
        parts = re.sub(r"typing.Union\[(.*)\]$", r"\1", text).replace(",", " |").split(" | ")
        return {"str"} if text.startswith("typing.Literal") else set(parts)

    for field in dataclasses.fields(TrainingArguments):
        if field.name in FREE:
            assert names(FREE[field.name]) == names(field.type), field.name
            if field.default is not dataclasses.MISSING:
                TypeAdapter(FREE[field.name]).validate_python(field.default, strict=True)


def test_a_field_is_in_one_table_only() -> None:
    tables = [set(FREE), set(SET_BY_LAUNCHER), set(FORMER), set(SECRET)]
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_what_to_write_for_a_field() -> None:
    assert instead_of("max_steps") == "set train.steps"
    assert instead_of("debug") == "it is a TrainingArguments field: train.extra.debug"
    assert instead_of("nonsense") is None
