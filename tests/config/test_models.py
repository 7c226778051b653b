"""Finding a model: folders, presets, and a Hub that answers, does not know, or cannot be reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launcher.config.models import ModelSource, find_model
from launcher.config.presets import GPT2_FIELDS
from launcher.config.schema import ModelSection, TokenizerFromCorpus
from launcher.errors import ConfigError, RequestError
from tests.loopback import ANY_PORT, Quiet, answering

ROOT = Path(__file__).parents[2]
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
HEADS = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def find(**keys: object) -> ModelSource:
    return find_model(ModelSection.model_validate(keys))


def refusal(**keys: object) -> tuple[str, str]:
    with pytest.raises(RequestError) as caught:
        find(**keys)
    assert caught.value.exit_code == 2
    return caught.value.message, caught.value.hint or ""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder_with(path: Path, files: Mapping[str, object]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# Presets


@pytest.mark.usefixtures("here")
def test_a_preset_from_scratch_needs_no_files() -> None:
    found = find(name="gpt2-medium")
    assert (found.kind, found.folder, found.hub_id) == ("preset", None, None)
    assert (found.config["model_type"], found.config["n_layer"], found.config["n_embd"]) == ("gpt2", 24, 1024)
    assert found.tokenizer == "openai-community/gpt2-medium"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["gpt2-xl", "openai-community/gpt2-xl"])
def test_a_pretrained_preset_is_its_hub_repository(name: str) -> None:
    found = find(name=name, init="pretrained")
    assert (found.kind, found.folder, found.hub_id) == ("hub", None, "openai-community/gpt2-xl")
    assert found.config["n_layer"] == 48


@pytest.mark.usefixtures("here")
def test_a_tokenizer_may_come_from_elsewhere() -> None:
    from_corpus = find(name="gpt2", tokenizer={"train": {"vocab_size": 300}}).tokenizer
    assert isinstance(from_corpus, TokenizerFromCorpus)
    assert from_corpus.train.vocab_size == 300
    assert find(name="gpt2", tokenizer="user/tokenizer").tokenizer == "user/tokenizer"
    assert find(name="gpt2", tokenizer="gpt2-large").tokenizer == "openai-community/gpt2-large"


def test_a_tokenizer_folder_is_absolute_and_must_hold_one(here: Path) -> None:
    folder_with(here / "tok", {"tokenizer.json": "{}"})
    folder_with(here / "empty", {"notes.txt": "x"})
    assert find(name="gpt2", tokenizer="tok").tokenizer == str(here / "tok")
    message, hint = refusal(name="gpt2", tokenizer="empty")
    assert message == f"no tokenizer in {here / 'empty'}: it has no tokenizer.json; it holds notes.txt"
    assert "model.tokenizer" in hint
    assert refusal(name="gpt2", tokenizer="./nowhere")[0].endswith("there is no such folder")


# Overrides


@pytest.mark.usefixtures("here")
def test_overrides_change_the_config() -> None:
    config = find(
        name="gpt2", overrides={"n_layer": 2, "n_embd": 64, "n_head": 4, "eos_token_id": None}
    ).config
    assert (config["n_layer"], config["n_embd"], config["n_head"], config["eos_token_id"]) == (2, 64, 4, None)
    assert config["n_positions"] == 1024


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("overrides", "path", "message", "hint"),
    [
        (
            {"n_layers": 2},
            "model.overrides.n_layers",
            "the model's config has no such field",
            "did you mean n_layer?",
        ),
        (
            {"hidden_size": 2},
            "model.overrides.hidden_size",
            "GPT-2 has another name for this field",
            "write n_embd",
        ),
        ({"n_layer": 0}, "model.overrides.n_layer", "expected a whole number from 1 on, got 0", None),
        ({"n_layer": True}, "model.overrides.n_layer", "expected a whole number from 1 on, got true", None),
        (
            {"n_layer": 10**13},
            "model.overrides.n_layer",
            "expected at most 1,000,000,000,000, got 10000000000000",
            None,
        ),
        ({"n_embd": 1.5}, "model.overrides.n_embd", "expected a whole number from 1 on, got 1.5", None),
        ({"attn_pdrop": "0"}, "model.overrides.attn_pdrop", 'expected a number, got the text "0"', None),
        ({"use_cache": 1}, "model.overrides.use_cache", "expected true or false, got 1", None),
        (
            {"n_embd": 100},
            "model.overrides",
            "n_embd 100 cannot be cut into 12 heads (n_head)",
            "make n_embd a multiple of n_head",
        ),
        ({"model_type": "llama"}, "model.overrides.model_type", "the model's config has no such field", None),
        (
            {"attn_implementation": "flash"},
            "model.overrides.attn_implementation",
            'expected sdpa, eager or flash_attention_2, got the text "flash"',
            None,
        ),
    ],
)
def test_a_wrong_override_is_refused(
    overrides: dict[str, object], path: str, message: str, hint: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        find(name="gpt2", overrides=overrides)
    (fault,) = caught.value.faults
    assert (fault.path, fault.message) == (path, message)
    if hint is not None:
        assert fault.hint is not None
        assert fault.hint.startswith(hint.rstrip("?"))


@pytest.mark.usefixtures("here")
def test_all_wrong_overrides_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        find(name="gpt2", overrides={"n_layers": 2, "n_hed": 2, "n_embd": 0})
    assert [fault.path for fault in caught.value.faults] == [
        "model.overrides.n_layers",
        "model.overrides.n_hed",
        "model.overrides.n_embd",
    ]


# Folders


def test_a_folder_with_a_config_is_the_model_even_under_a_presets_name(here: Path) -> None:
    folder_with(here / "gpt2", {"config.json": LLAMA})
    found = find(name="gpt2", init="pretrained")
    assert (found.kind, found.folder, found.hub_id) == ("folder", str(here / "gpt2"), None)
    assert found.config == LLAMA
    assert found.tokenizer == str(here / "gpt2")


def test_a_folder_without_a_config_does_not_hide_a_preset(here: Path) -> None:
    folder_with(here / "gpt2", {"notes.txt": "x"})
    assert find(name="gpt2").kind == "preset"


def test_any_model_may_be_asked_for_its_attention(here: Path) -> None:
    folder_with(here / "llama", {"config.json": LLAMA})
    for name in ("gpt2", "llama"):
        config = find(name=name, overrides={"attn_implementation": "eager"}).config
        assert config["attn_implementation"] == "eager"


def test_a_config_of_another_family_lists_the_fields_that_may_be_overridden(here: Path) -> None:
    folder_with(here / "llama", {"config.json": LLAMA})
    assert find(name="llama", overrides={"hidden_size": 32}).config["hidden_size"] == 32
    with pytest.raises(ConfigError) as caught:
        find(name="llama", overrides={"hidden_sise": 32})
    assert caught.value.faults[0].path == "model.overrides.hidden_sise"
    assert caught.value.faults[0].hint == "did you mean hidden_size?"
    with pytest.raises(ConfigError) as caught:
        find(name="llama", overrides={"attention_bias": 1})
    assert len(caught.value.faults) == 1, "a field that it lacks is not also of the wrong kind"


@pytest.mark.parametrize(
    ("config", "overrides", "path", "message"),
    [
        (
            HEADS,
            {"num_hidden_layers": "64"},
            "model.overrides.num_hidden_layers",
            'from 1 on, got the text "64"',
        ),
        (HEADS, {"vocab_size": 0}, "model.overrides.vocab_size", "from 1 on, got 0"),
        (HEADS, {"num_attention_heads": 6}, "model.overrides", "hidden_size 64 cannot be cut into 6 heads"),
        (
            HEADS,
            {"num_key_value_heads": 3},
            "model.overrides",
            "4 heads (num_attention_heads) cannot share 3",
        ),
        (
            {**HEADS, "num_hidden_layers": 2.5},
            {"hidden_size": 32},
            "model.name",
            "num_hidden_layers of its config: expected a whole number from 1 on, got 2.5",
        ),
        ({"model_type": "qwen2", "attention_dropout": "0"}, {}, "model.name", "expected a number"),
        ({"model_type": "gpt2", "n_head": 0}, {}, "model.name", "n_head of its config: expected a whole"),
        ({"model_type": "gpt2", "n_inner": -4}, {}, "model.name", "n_inner of its config: expected a whole"),
    ],
)
def test_a_shape_that_no_model_has_is_refused(
    here: Path, config: dict[str, object], overrides: dict[str, object], path: str, message: str
) -> None:
    folder_with(here / "model", {"config.json": config})
    with pytest.raises(ConfigError) as caught:
        find(name="./model", overrides=overrides)
    (fault,) = caught.value.faults
    assert fault.path == path
    assert message in fault.message


def test_a_field_that_transformers_lets_be_null_may_be_null(here: Path) -> None:
    folder_with(here / "model", {"config.json": {**HEADS, "num_key_value_heads": None, "head_dim": None}})
    assert find(name="./model").config["head_dim"] is None
    assert find(name="gpt2", overrides={"n_inner": None}).config["n_inner"] is None


def test_gpt2_under_the_names_of_other_models_is_the_model_that_transformers_builds(here: Path) -> None:
    from transformers import AutoConfig

    config = {"model_type": "gpt2", "hidden_size": 128, "num_attention_heads": 4, "n_ctx": 64}
    config |= {"n_layer": 3, "num_hidden_layers": 2}
    folder_with(here / "model", {"config.json": config})
    ours, theirs = find(name="./model").config, AutoConfig.from_pretrained(here / "model")
    for name in ("n_embd", "n_head", "n_layer", "n_positions"):
        assert {**GPT2_FIELDS, **ours}[name] == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./nowhere", "nowhere: there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("model", "it has no config.json; it holds weights.bin"),
        ("void", "it has no config.json; it holds nothing"),
        ("file.txt", "it is a file, not a folder"),
    ],
)
def test_a_path_that_holds_no_model_says_what_it_holds(here: Path, name: str, reason: str) -> None:
    folder_with(here / "model", {"weights.bin": "x"})
    folder_with(here / "void", {})
    (here / "file.txt").write_text("x")
    message, hint = refusal(name=name)
    assert message.startswith(f"no model in {here}")
    assert message.endswith(reason)
    assert "gpt2-medium" in hint


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "cannot be read"), ("[]", "names no model_type"), ('{"n_layer": 2}', "names no model_type")],
)
def test_a_broken_config_is_refused(here: Path, content: str, reason: str) -> None:
    folder_with(here / "model", {"config.json": content})
    message, hint = refusal(name="model")
    assert reason in message
    assert str(here / "model" / "config.json") in message
    assert hint


# The Hub


class Hub(Quiet, BaseHTTPRequestHandler):
    """As much of the Hub as one file of one repository."""

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(json.dumps(LLAMA).encode())

    def _answer(self, body: bytes) -> None:
        if self.path != "/user/model/resolve/main/config.json":
            self.send_response(503 if "busy" in self.path else 404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", '"0123456789"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(json.dumps(LLAMA))))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with answering(ThreadingHTTPServer(ANY_PORT, Hub)) as url:
        yield url


PROGRAM = """\
import json, sys
from launcher.config.models import find_model
from launcher.config.schema import ModelSection
from launcher.errors import RequestError
try:
    found = find_model(ModelSection.model_validate({"name": sys.argv[1]}))
    answer = [found.kind, found.hub_id, found.config, found.tokenizer]
except RequestError as error:
    answer = [error.exit_code, error.message, error.hint]
sys.stdout.write(json.dumps(answer))
"""


def ask(name: str, home: Path, **environment: str) -> list[object]:
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name],
        env=clean | {"HF_HOME": str(home), "PYTHONPATH": str(ROOT)} | environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, list)
    return answer


def test_a_hub_id_is_asked_for_its_config_and_remembered(hub: str, tmp_path: Path) -> None:
    found = ["hub", "user/model", LLAMA, "user/model"]
    assert ask("user/model", tmp_path, HF_ENDPOINT=hub) == found
    assert ask("user/model", tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1") == found
    assert ask("user/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9") == found


@pytest.mark.parametrize(
    ("name", "hint"),
    [("user/nothing", "the presets are gpt2,"), ("gpt-2-medium", "did you mean gpt2-medium?")],
)
def test_a_model_that_the_hub_does_not_know_is_refused(
    hub: str, tmp_path: Path, name: str, hint: str
) -> None:
    code, message, said = ask(name, tmp_path, HF_ENDPOINT=hub)
    assert code == 2
    assert message == f"no model {name}: no folder of that name here, no preset, and {hub} answered 404"
    assert str(said).startswith(hint)


def test_offline_says_so_and_what_to_do(tmp_path: Path) -> None:
    code, message, hint = ask("user/model", tmp_path, HF_HUB_OFFLINE="1")
    assert code == 2
    assert "https://huggingface.co cannot be reached" in str(message)
    assert "offline mode" in str(message)
    assert hint == "download it where there is a network (`hf download`), or give a local folder"


def test_a_hub_out_of_reach_is_refused_in_bounded_time(hub: str, tmp_path: Path) -> None:
    code, message, hint = ask("gpt2-smal", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2
    assert "http://127.0.0.1:9 cannot be reached" in str(message)
    assert str(hint).startswith("did you mean gpt2")
    assert f"{hub} answered 503" in str(ask("user/busy", tmp_path, HF_ENDPOINT=hub)[1])


def test_what_is_no_hub_id_is_refused(tmp_path: Path) -> None:
    code, message, hint = ask("my model", tmp_path)
    assert code == 2
    assert str(message).endswith("and it is no Hub id either")
    assert str(hint).startswith("the presets are")
