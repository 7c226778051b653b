"""What looks like a secret is refused wherever it stands, and never repeated; what does not is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.config.load import load_cluster
from launcher.config.secrets import is_private, secret_in
from launcher.errors import ConfigError
from tests.config.test_rules import fault_of, loads

HUB = "hf_opensesameOPENSESAME0123"


@pytest.mark.parametrize(
    "override",
    [
        "data.train=[https://somebody:opensesame@example.org/a.txt]",
        "data.train=['https://example.org/a.txt?X-Amz-Signature=opensesame']",
        "data.train=[{name: a, files: ['https://example.org/a?sig=opensesame'], weight: 1}]",
        "data.validation=['zip://a::https://example.org/a.zip?access_token=opensesame']",
        "data.validation=['https://example.org/a.txt?api_key=opensesame']",
        "data.train=['https://example.org/a.txt#access_token=opensesame']",
        "data.train=['https://example.org/a.txt#sig%6Eature=opensesame&x=1']",
        "data.train=['https://example.org/a.txt;token=opensesame']",
        "data.train=['https://example.org/a.txt?x=1;sig=opensesame']",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(tmp_path: Path, override: str) -> None:
    fault = fault_of(tmp_path, override)
    assert fault.path.startswith(override.partition("=")[0] + ".")
    assert "credentials" in str(fault.hint)
    assert "opensesame" not in f"{fault} {fault.hint}"


@pytest.mark.parametrize(
    "override",
    [
        "data.train=['s3://bucket/**/*.jsonl.zst', 'https://example.org/a.txt?version=7']",
        "data.train=['hf://datasets/owner/name@main/*.parquet', 'zip://a@b.txt::/x/b.zip']",
        "data.train=['/data/what?access_token=is/a@b.txt']",
        "data.train=['abfs://container@account.dfs.core.windows.net/a.txt', 'hf_OpenWebText/a']",
        "data.train=['zip://part[0-9].txt::z.zip', 's3://bucket[0]/a.txt']",
        "data.train=['https://example.org/a;v=7/b.txt#part=2', 's3://bucket/token=3/a.txt', 's3://b/a?b.txt']",
    ],
)
def test_a_url_without_a_secret_is_fine(tmp_path: Path, override: str) -> None:
    assert loads(tmp_path, override)


@pytest.mark.parametrize(
    "override",
    [
        "push_to_hub=https://somebody:opensesame@huggingface.co/a/b",
        f"push_to_hub={HUB}",
        "model.name=https://somebody:opensesame@example.org/a",
        f"model.tokenizer=https://{HUB}@example.org/a",
        f"train.schedule={HUB}",
        f"seed={HUB}",
        "data.train=https://somebody:opensesame@example.org/a.txt",
        "output_dir='x; export HF_TOKEN=opensesame'",
        "https://somebody:opensesame@example.org/a=b",
        HUB,
    ],
)
def test_a_secret_anywhere_in_a_run_is_refused_and_not_repeated(tmp_path: Path, override: str) -> None:
    fault = fault_of(tmp_path, override)
    assert "opensesame" not in f"{fault} {fault.hint}"


CLUSTER = {"launch": "slurm", "gpus_per_node": 8, "gpu": "h100-sxm-80gb"}


def cluster_faults(folder: Path, more: dict[str, Any]) -> list[str]:
    (folder / "c.yaml").write_text(json.dumps({**CLUSTER, **more}))
    with pytest.raises(ConfigError) as caught:
        load_cluster(folder / "c.yaml")
    assert "opensesame" not in f"{caught.value} {[fault.hint for fault in caught.value.faults]}"
    assert all("shell that starts launcher" in (fault.hint or "") for fault in caught.value.faults)
    return [fault.path for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "http://user:opensesame@127.0.0.1:9"),
        ("MY_HF", HUB),
        ("MYURL", "https://h/x?token=opensesame"),
        ("HEADER", "Bearer opensesame"),
        *((name, "opensesame") for name in ("OPENAI_KEY", "PGPASS", "MYSQL_PWD", "GH_PAT", "PASSPHRASE")),
        *((name, "opensesame") for name in ("AUTH", "AWS_ACCESS_KEY_ID", "openai_key", "API_KEY_1")),
    ],
)
def test_a_secret_in_env_is_refused(tmp_path: Path, name: str, value: str) -> None:
    assert cluster_faults(tmp_path, {"env": {"A": "b", name: value}}) == [f"env.{name}"]


@pytest.mark.parametrize(
    "line",
    [
        f"export MINE={HUB}",
        "export HF_TOKEN=opensesame",
        "cd /x;PGPASS='opensesame' psql",
        "curl -H 'Authorization: Bearer opensesame' https://example.org",
        "export HTTPS_PROXY=http://user:opensesame@127.0.0.1:9 && true",
        "curl --password=opensesame x",
    ],
)
def test_a_secret_in_a_line_of_a_job_is_refused(tmp_path: Path, line: str) -> None:
    assert cluster_faults(tmp_path, {"slurm": {"setup": ["true", line]}}) == ["slurm.setup.1"]
    assert cluster_faults(tmp_path, {"slurm": {"extra": [f"--comment={line}"]}}) == ["slurm.extra.0"]


def test_what_is_no_secret_is_taken(tmp_path: Path) -> None:
    lines = [
        "export HF_TOKEN=$(cat ~/.token)",
        'export HF_TOKEN="${MINE}" GH_PAT=`cat x`',
        "curl http://$ME:$PASSWORD@example.org/x?token=$TOKEN",
        "pip install git+ssh://git@github.com/a/b; git clone git@github.com:a/b",
        "sort --key=2; export PATH=/x:$PATH HF_HUB_DISABLE_IMPLICIT_TOKEN=1",
    ]
    container = {"runtime": "pyxis", "image": "docker://ubuntu:22.04@sha256:0123456789abcdef"}
    env = {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "TOKENIZERS_PARALLELISM": "false", "NCCL_IB_PKEY": "abc"}
    slurm = {"setup": lines, "container": container}
    (tmp_path / "c.yaml").write_text(json.dumps({**CLUSTER, "slurm": slurm, "env": env}))
    assert load_cluster(tmp_path / "c.yaml").config.env == env


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "a.hub_token", "PGPASSWORD"]
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_private(name)


@pytest.mark.parametrize(
    "name",
    [
        "train.tokens",
        "TOKENIZERS_PARALLELISM",
        "NCCL_DEBUG",
        "PATH",
        "KEYBOARD",
        "AUTHOR",
        "PASSES",
        "PWD",
        "SSH_AUTH_SOCK",
        "text_key",
    ],
)
def test_other_names_are_no_secrets(name: str) -> None:
    assert not is_private(name)


def test_a_long_text_is_judged_at_once() -> None:
    for part in ("x-", "a", "hf_", "sk-", "a=1 ", "://", " "):
        assert secret_in(part * (1 << 18)) is None


def test_a_secret_in_the_environment_is_refused_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("env:\n  NCCL_DEBUG: INFO\n  HF_TOKEN: hf_x\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster(tmp_path / "c.yaml")
    (fault,) = caught.value.faults
    assert (fault.path, fault.place) == ("env.HF_TOKEN", "c.yaml:3")
    assert "hf_x" not in str(caught.value)
    assert fault.hint == "export HF_TOKEN in the shell that starts launcher: ranks and jobs inherit it"
