"""What a person gets wrong: one clear error with place and hint, the right exit code, nothing written."""

from __future__ import annotations

import gzip
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Workplace, small_run, write_json
from tests.data.faulty import Site, serving
from tests.loopback import ANY_PORT, Quiet, answering


def refused(
    workplace: Workplace, *arguments: str, code: int = 2, says: tuple[str, ...], **environment: str
) -> str:
    """`launcher train` with these overrides is refused, says so, and leaves the folder as it was."""
    before = workplace.files()
    done = workplace.run("train", "run.yaml", *arguments, **environment)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    for part in says:
        assert part in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
    assert workplace.files() == before, "something was written"
    return done.stderr


def test_every_misspelt_key_and_wrong_type_in_one_pass(workplace: Workplace) -> None:
    run = small_run()
    run["train"]["learning_rte"] = 1e-3
    run["model"]["tokenizer"] = {"train": {"vocab_sise": 300}}
    run["data"]["block_size"] = "many"
    run["train"]["tokens"] = 1000
    write_json(workplace.folder / "run.yaml", run)
    text = refused(
        workplace,
        "checkpont.keep=1",
        says=(
            "learning_rte",
            "learning_rate",
            "vocab_sise",
            "vocab_size",
            "data.block_size",
            "checkpont",
            "run.yaml:",
        ),
    )
    assert "train.steps" in text
    assert "train.tokens" in text
    assert "override checkpont.keep=1" in text


def test_a_batch_that_does_not_divide(workplace: Workplace) -> None:
    refused(
        workplace,
        "--cluster",
        "two.yaml",
        "train.batch_size=9",
        says=("train.batch_size=9 does not divide over 2 ranks", "8 or 10", "1 or 3 ranks"),
    )


def test_no_matching_files(workplace: Workplace) -> None:
    refused(workplace, "data.train=[nothing/*.txt]", says=("nothing/*.txt",))


def test_no_matching_files_to_validate_on(workplace: Workplace) -> None:
    refused(
        workplace,
        "data.validation=[nosuch.txt]",
        says=("no file matches nosuch.txt (override data.validation=[nosuch.txt])",),
    )


def test_an_empty_corpus(workplace: Workplace) -> None:
    (workplace.folder / "corpus.txt").write_text("\n \n")
    refused(workplace, "model.tokenizer={train: {vocab_size: 300}}", says=("no document to train on",))


def test_a_corpus_shorter_than_a_block(workplace: Workplace) -> None:
    (workplace.folder / "corpus.txt").write_text("only this\n")
    refused(workplace, "data.validation=0", says=("not one block of 64", "data.block_size"))


def test_text_that_is_not_utf_8(workplace: Workplace) -> None:
    with (workplace.folder / "corpus.txt").open("ab") as stream:
        offset = stream.tell()
        stream.write(b"caf\xe9 noir\n")
    refused(workplace, says=("corpus.txt", f"byte {offset + 3}", "not UTF-8"))


def test_a_truncated_gzip(workplace: Workplace) -> None:
    whole = gzip.compress((workplace.folder / "corpus.txt").read_bytes())
    (workplace.folder / "corpus.txt.gz").write_bytes(whole[: len(whole) // 2])
    refused(workplace, "data.train=[corpus.txt.gz]", says=("corpus.txt.gz",))


@pytest.mark.parametrize(
    ("line", "says"), [("{not json}", "not JSON"), ('{"body": "x"}', "text"), ('{"text": 7}', "text")]
)
def test_a_bad_json_line(workplace: Workplace, line: str, says: str) -> None:
    lines = [json.dumps({"text": "a fine line"})] * 3 + [line]
    (workplace.folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    refused(workplace, "data.train=[corpus.jsonl]", says=("corpus.jsonl:4", says))


def test_a_table_without_the_column(workplace: Workplace) -> None:
    pq.write_table(pa.table({"content": ["a text"]}), workplace.folder / "a.parquet")
    refused(workplace, "data.train=[a.parquet]", says=("a.parquet", "'content'", "data.text_field"))


def test_a_server_that_refuses(workplace: Workplace) -> None:
    with serving(Site({"/a.txt": b"no"}, refused={"/a.txt"})) as site:
        refused(workplace, f"data.train=['{site.url}/a.txt']", says=("127.0.0.1 refuses to give it (403)",))


def test_a_signed_url(workplace: Workplace) -> None:
    signed = "https://files.example/a.txt?X-Amz-Signature=opensesame"
    said = refused(workplace, f"data.train=['{signed}']", says=("the URL is signed", "credentials"))
    assert "opensesame" not in said


def test_a_model_that_does_not_exist_offline(workplace: Workplace) -> None:
    refused(workplace, "model.name=nobody/nothing", says=("nobody/nothing",), HF_HUB_OFFLINE="1")
    refused(workplace, "model.name=./no/such/folder", says=("no/such/folder",))


class NothingHere(Quiet, BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815 - the name that http.server looks for


def test_a_model_that_does_not_exist_online(
    workplace: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with answering(ThreadingHTTPServer(ANY_PORT, NothingHere)) as url:
        refused(
            workplace,
            "model.name=nobody/nothing",
            says=("nobody/nothing",),
            HF_ENDPOINT=url,
            HF_HOME=str(tmp_path_factory.mktemp("hub")),
        )


def test_a_block_longer_than_the_model(workplace: Workplace) -> None:
    refused(workplace, "data.block_size=65", says=("data.block_size=65", "64 positions"))


def test_fp16_on_a_cpu(workplace: Workplace) -> None:
    (workplace.folder / "cpu.yaml").write_text("gpu: cpu\n")
    refused(workplace, "train.precision=fp16", "--cluster", "cpu.yaml", code=3, says=("fp16", "GPU"))


def test_a_gpu_that_is_not_here(workplace: Workplace) -> None:
    (workplace.folder / "gpus.yaml").write_text("gpu: h100-sxm-80gb\ngpus_per_node: 8\n")
    refused(workplace, "--cluster", "gpus.yaml", code=3, says=("8 x h100-sxm-80gb", "this machine has"))


@pytest.mark.parametrize("folder", ["/proc/runs", "corpus.txt/runs"])
def test_an_output_folder_that_cannot_be_written(workplace: Workplace, folder: str) -> None:
    refused(workplace, f"output_dir={folder}", says=("output_dir",))


def test_a_cache_that_cannot_be_made(workplace: Workplace) -> None:
    before = workplace.files()
    done = workplace.run("data", "prepare", "run.yaml", "data.cache_dir=corpus.txt/stores")
    assert done.returncode == 2, done.stderr
    assert "data.cache_dir: cannot write in" in done.stderr
    assert workplace.files() == before


def test_a_table_with_two_columns_of_one_name(workplace: Workplace) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, workplace.folder / "a.parquet")
    refused(workplace, "data.train=[a.parquet]", says=("a.parquet", "two columns are called 'text'"))


def test_a_metric_that_cannot_be_imported(workplace: Workplace) -> None:
    done = workplace.run("train", "run.yaml", "train.metrics=[nowhere:accuracy]")
    assert done.returncode == 2
    assert "train.metrics: nowhere:accuracy cannot be imported" in done.stderr


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "train.callbacks=[pathlib:Path]",
            "train.callbacks: pathlib:Path is not a TrainerCallback",
        ),
        (
            "train.extra={lr_scheduler_kwargs: {num_cycles: abc}}",
            "train.extra: the schedule cosine refuses it",
        ),
    ],
)
def test_what_only_the_ranks_can_refuse_is_not_tried_again(
    workplace: Workplace, override: str, says: str
) -> None:
    done = workplace.run("train", "run.yaml", override)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "attempt 2" not in done.stderr


def test_a_package_to_report_to_that_is_not_installed(workplace: Workplace) -> None:
    refused(workplace, "report_to=[wandb]", code=3, says=("wandb is not installed", "pip install wandb"))


def test_init_overwrites_nothing(workplace: Workplace) -> None:
    done = workplace.run("init", "run.yaml")
    assert done.returncode == 2
    assert "exists" in done.stderr


def test_a_folder_that_is_no_run(workplace: Workplace) -> None:
    for command in (("checkpoint", "list"), ("data", "show", "--step", "1")):
        done = workplace.run(*command, str(workplace.folder))
        assert done.returncode == 2, done.stderr
        assert "not a run directory" in done.stderr


def test_a_folder_of_something_else_is_left_alone(workplace: Workplace) -> None:
    folder = workplace.folder / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "precious").write_text("mine")
    refused(workplace, says=("not a run directory",))
    assert Path(folder, "precious").read_text() == "mine"
