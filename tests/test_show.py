"""`launcher data show`: a store, and the text of a step, against the files themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from launcher.data.store import open_store
from tests.conftest import Workplace, sentences, small_run, write_json


def test_the_rows_of_a_step_lead_back_to_the_bytes(workplace: Workplace) -> None:
    store = open_store(Path(workplace.answered("data", "prepare", "run.yaml")["store"]))
    tokenizer = store.tokenizer()
    before = workplace.files()
    shown = workplace.answered("data", "show", "run.yaml", "--step", "20")
    assert workplace.files() == before
    assert [row["sample"] for row in shown["rows"]] == list(range(152, 160))
    for row in shown["rows"]:
        ids: list[int] = []
        for passage in row["passages"]:
            content = Path(passage["file"]).read_bytes()
            text = content[passage["offset"] : passage["offset"] + passage["length"]].decode()
            document = [*tokenizer.encode_batch([text])[0].tolist(), tokenizer.end_of_text_id]
            assert passage["document_tokens"] == len(document)
            start = passage["first_token"]
            ids += document[start : start + passage["tokens"]]
        assert len(ids) == 64
        assert row["text"] == tokenizer.decode(ids)[:200]
    plain = workplace.run("data", "show", "run.yaml", "--step", "20").stdout
    assert f"step 20: 8 rows, certificate {shown['certificate']}\nsample 152: source text" in plain
    first = shown["rows"][0]["passages"][0]
    end = first["offset"] + first["length"]
    assert f"{first['document']}  {first['file']}: bytes {first['offset']} to {end}, tokens " in plain

    two = workplace.answered("data", "show", "run.yaml", "--cluster", "two.yaml", "--step", "20")
    assert two == shown
    larger = workplace.answered("data", "show", "run.yaml", "train.batch_size=32", "--step", "5")
    assert [row["sample"] for row in larger["rows"]] == list(range(128, 160))
    assert larger["rows"][24:] == shown["rows"]
    banned = workplace.answered("data", "show", "run.yaml", "data.skip.steps=[1]", "--step", "20")
    assert [row["sample"] for row in banned["rows"]] == list(range(160, 168))
    beyond = workplace.run("data", "show", "run.yaml", "--step", "21")
    assert beyond.returncode == 2
    assert "--step 21: the run has 20 steps\n  hint: give 1 to 20\n" in beyond.stderr


def test_what_is_not_prepared_is_not_made(workplace: Workplace) -> None:
    before = workplace.files()
    for step in ((), ("--step", "1")):
        done = workplace.run("data", "show", "run.yaml", *step)
        assert done.returncode == 2
        assert "the text of run 'small' is not prepared" in done.stderr
        assert "launcher data prepare" in done.stderr
    assert workplace.files() == before
    folder = workplace.run("data", "show", "runs", "train.steps=5")
    assert (folder.returncode, "go with a run.yaml" in folder.stderr) == (2, True)


@pytest.mark.parametrize("packing", ["concat", "pad", "best_fit"])
def test_the_ledger_is_exact_and_duplicates_are_shown(workplace: Workplace, packing: str) -> None:
    run = small_run()
    run["data"] |= {
        "train": [
            {"name": "a", "files": ["a.txt"], "weight": 1},
            {"name": "b", "files": ["b.txt"], "weight": 2},
        ],
        "validation": ["held.txt"],
        "packing": packing,
    }
    write_json(workplace.folder / "run.yaml", run)
    texts = {
        "a": sentences(300),
        "b": [*sentences(200, 2), "", " "],
        "held": [*sentences(40, 3), sentences(300)[7]],
    }
    for name, lines in texts.items():
        (workplace.folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    store = Path(workplace.answered("data", "prepare", "run.yaml")["store"])
    tokenizer = open_store(store).tokenizer()
    shown = workplace.answered("data", "show", "run.yaml")
    sources = {"a": texts["a"], "b": texts["b"][:200], "validation": texts["held"]}
    for record in shown["ledger"]:
        lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(sources[record["source"]])]
        blocks = record["blocks"]
        assert record["tokens_in"] == sum(lengths)
        assert record["skipped_empty"] == (2 if record["source"] == "b" else 0)
        dropped = sum(lengths) % 64 if packing == "concat" else 0
        assert blocks["dropped"] == dropped
        if packing != "best_fit":
            padded = sum(-length % 64 for length in lengths) if packing == "pad" else 0
            assert blocks["padded"] == padded
        assert (blocks["train"] + blocks["validation"] + blocks["padded"]) % 64 == 0
        assert blocks["train"] + blocks["validation"] + blocks["dropped"] == record["tokens_in"]
        assert blocks["validation" if record["source"] != "validation" else "train"] == 0
    assert shown["duplicates"]["documents"] == 1
    (twin,) = shown["duplicates"]["examples"]
    assert twin["train"]["document"] == "train-00000:7"
    assert twin["validation"]["file"] == str(workplace.folder / "held.txt")
    alone = workplace.answered("data", "show", str(store))
    assert [{**record, "blocks": None} for record in shown["ledger"]] == [
        {**record, "blocks": None} for record in alone["ledger"]
    ]
    plain = workplace.run("data", "show", "run.yaml").stdout
    assert "1 documents of the training text are in the validation text too\n  train-00000:7  " in plain
    assert f"positions padded ({packing}, 64 tokens)" in plain


def test_bad_records_that_were_skipped_are_listed(workplace: Workplace) -> None:
    lines = [json.dumps({"text": text}) for text in sentences(200)]
    lines[3], lines[150] = "{", '{"other": 1}'
    (workplace.folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    given = ("run.yaml", "data.train=[a.jsonl]")
    assert workplace.run("data", "prepare", *given, "--skip-bad").returncode == 0
    shown = workplace.answered("data", "show", *given)
    file = str(workplace.folder / "a.jsonl")
    assert [(record["file"], record["line"]) for record in shown["bad"]] == [(file, 4), (file, 151)]
    assert shown["ledger"][0]["skipped_bad"] == 2
    plain = workplace.run("data", "show", *given).stdout
    assert f"\n2 bad records were left out\n  {file}:4" in plain
    assert "no field 'text'" in plain


@pytest.mark.parametrize("name", ["a.parquet", "named-otherwise"])
def test_a_document_of_a_table_is_a_row(workplace: Workplace, name: str) -> None:
    texts = list(sentences(300))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), workplace.folder / name, row_group_size=70)
    given = (
        "run.yaml",
        f"data.train=[{name}]",
        "data.format=parquet",
        "data.packing=pad",
        "data.block_size=64",
    )
    assert workplace.run("data", "prepare", *given).returncode == 0
    shown = workplace.answered("data", "show", *given, "--step", "3")
    for row in shown["rows"]:
        (passage,) = row["passages"]
        assert passage["counted"] == "row"
        assert row["text"].removesuffix("<|endoftext|>") == texts[passage["offset"]][:200]
        assert passage["length"] == len(texts[passage["offset"]].encode())
    first = shown["rows"][0]["passages"][0]
    plain = workplace.run("data", "show", *given, "--step", "3").stdout
    assert f"{first['file']}: row {first['offset']}, {first['length']} bytes of text, tokens 1 to " in plain
