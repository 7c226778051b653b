"""The same text, wherever and however it is kept, becomes the same tokens; through faults, in processes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from launcher.data import remote
from launcher.data.store import Store
from launcher.data.units import Slice
from launcher.errors import StoreError
from tests.data.conftest import Preparing, sentences
from tests.data.faulty import Fault, Site, serving
from tests.data.test_remote import zipped

LINES = sentences(3000, 5)


def tokens(store: Store) -> list[int]:
    return [int(i) for shard in store.shards("train", "text") for i in np.asarray(store.tokens(shard))]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A bucket `corpus` with two objects, whose server throttles and cuts lines now and then."""
    for name, value in {
        "ACCESS_KEY_ID": "t",
        "SECRET_ACCESS_KEY": "t",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="corpus")
    half = len(LINES) // 2
    client.put_object(Bucket="corpus", Key="a.txt", Body="\n".join(LINES[:half]).encode())
    jsonl = "\n".join(json.dumps({"text": line}) for line in LINES[half:])
    client.put_object(Bucket="corpus", Key="b.jsonl.gz", Body=gzip.compress(jsonl.encode()))
    with serving(Site(upstream=(host, port))) as site:
        monkeypatch.setenv("AWS_ENDPOINT_URL", site.url)
        remote.file_system("s3://corpus").clear_instance_cache()
        yield site
    server.stop()


@pytest.fixture
def expected(prepared: Preparing, tmp_path: Path) -> list[int]:
    (tmp_path / "all.txt").write_text("\n".join(LINES))
    return tokens(prepared([str(tmp_path / "all.txt")], validation=0.0))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bucket(prepared: Preparing, expected: list[int], bucket: Site, workers: int) -> None:
    bucket.faults.extend([Fault(), Fault(status=503), Fault(cut=1000), Fault(), Fault(status=500)])
    store = prepared(["s3://corpus/**"], workers, validation=0.0)
    assert tokens(store) == expected
    assert not bucket.faults


def test_tables_archives_and_web_servers(prepared: Preparing, expected: list[int], tmp_path: Path) -> None:
    part = len(LINES) // 4
    parts = [LINES[at : at + part] for at in range(0, len(LINES), part)]
    pq.write_table(pa.table({"text": parts[0]}), tmp_path / "0.parquet", row_group_size=100)
    datasets.Dataset.from_dict({"text": parts[1]}).save_to_disk(tmp_path / "1-saved")
    site = Site(
        {"/2.zip": zipped(a_txt="\n".join(parts[2]).encode()), "/3.txt": "\n".join(parts[3]).encode()}
    )
    site.faults.extend([Fault(), Fault(status=503), Fault(cut=100)])
    with serving(site):
        stored = [
            tokens(prepared([pattern], validation=0.0))
            for pattern in (
                str(tmp_path / "0.parquet"),
                str(tmp_path / "1-saved"),
                f"zip://a.txt::{site.url}/2.zip",
                f"{site.url}/3.txt",
            )
        ]
    assert [i for each in stored for i in each] == expected


@pytest.mark.usefixtures("small_units")
def test_a_server_that_gives_no_ranges_any_more_gives_another_store(
    prepared: Preparing, expected: list[int]
) -> None:
    """A unit that was a range of the file must not stand for one that is all of it."""
    site = Site({"/all.txt": "\n".join(LINES).encode()})
    with serving(site):
        address = f"{site.url}/all.txt"
        with pytest.raises(StoreError, match="not a token store"):
            prepared([address], validation=0.0, part=Slice(1, 2))
        site.ranges = False
        assert tokens(prepared([address], validation=0.0)) == expected
