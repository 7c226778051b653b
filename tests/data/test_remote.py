"""Text over the network: the same as on a disk, through every fault that passes; and words for the rest."""

from __future__ import annotations

import gc
import gzip
import io
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from launcher.data import readahead, remote
from launcher.data.files import opened
from launcher.data.sources import Reading, SourceFile, changed, list_files, splittable
from launcher.errors import DataError, LauncherError, MachineError, RequestError
from tests.data.conftest import documents
from tests.data.faulty import Fault, Site, serving

LINES = [f"line {i} of a file that is far away \u20ac" for i in range(60_000)]
BODY = ("\n".join(LINES) + "\n").encode()
TEXT = Reading(format="text")
PASSING = [
    *(Fault(status=503), Fault(cut=0), Fault(cut=70_001), Fault(status=429), Fault(status=500)),
    *(Fault(cut=1), Fault(status=502), Fault(cut=200_000), Fault(status=504)),
]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(remote, "LONGEST_DELAY", 0.05)
    monkeypatch.setattr(remote, "LISTING_SECONDS", 0.5)
    monkeypatch.setattr(readahead, "READING_SECONDS", 5.0)
    monkeypatch.setattr(readahead, "BLOCK", 300_000)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site({"/a.txt": BODY, "/a.txt.gz": gzip.compress(BODY)})) as served:
        yield served


def one(url: str) -> SourceFile:
    (file,) = list_files([url])
    return file


def texts(file: SourceFile, start: int = 0, end: int | None = None) -> list[str]:
    return [document.text for document in documents(file, TEXT, start, end)]


# Web servers


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[], PASSING], ids=["calm", "faults"])
def test_a_file_on_a_web_server(site: Site, name: str, ranges: bool, faults: list[Fault]) -> None:
    site.ranges = ranges
    file = one(f"{site.url}/{name}")
    assert splittable(file, TEXT) == (ranges and name == "a.txt")
    site.faults.extend(faults)
    assert texts(file) == LINES
    assert not changed(file)
    assert not site.faults or name == "a.txt.gz"  # which is small


def test_ranges_of_a_remote_file_are_the_file(site: Site) -> None:
    file = one(f"{site.url}/a.txt")
    bounds = [0, 1, 299_999, 1_000_000, 1_000_001, file.size]
    assert [text for start, end in pairwise(bounds) for text in texts(file, start, end)] == LINES


def test_little_more_than_the_range_is_fetched(site: Site) -> None:
    file = one(f"{site.url}/a.txt")
    site.sent = 0
    texts(file, 1_000_000, 1_200_000)
    # What lies in it from the byte before on, and the rest of its last line.
    assert site.sent <= 200_001 + readahead.FIRST


def test_nothing_is_fetched_far_ahead_of_the_reader(site: Site) -> None:
    file = one(f"{site.url}/a.txt")
    site.sent = 0
    with opened(file) as stream:
        stream.read(1)
        time.sleep(0.3)
        assert 0 < site.sent <= 3 * readahead.BLOCK


def test_a_line_that_always_breaks_off_still_carries(site: Site) -> None:
    file = one(f"{site.url}/a.txt")
    site.always = Fault(cut=readahead.FIRST)
    assert texts(file) == LINES


def test_a_server_that_likes_to_compress(site: Site) -> None:
    site.squeezes = True
    file = one(f"{site.url}/a.txt")
    assert splittable(file, TEXT)
    assert texts(file) == LINES


def test_a_server_without_head(site: Site) -> None:
    site.head = False
    assert texts(one(f"{site.url}/a.txt")) == LINES


def test_over_tls(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(Site({"/a.txt": BODY}), context) as served:
        url = f"{served.url}/a.txt"
        served.faults.extend(PASSING[1:3])
        # Which certificates are trusted is read once, when the first library asks.
        program = (
            "import sys; from launcher.data.sources import Reading, batches, list_files\n"
            "(file,) = list_files([sys.argv[1]])\n"
            "print(sum(int((batch.lengths + 1).sum()) for batch in batches(file, Reading())))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, url],
            env={**os.environ, "SSL_CERT_FILE": str(certificate)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) == len(BODY)
        assert not served.faults
        assert "certificate" in str(failure(url, DataError)).lower()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    return folder / "certificate.pem", folder / "key.pem"


def failure(url: str, kind: type[LauncherError]) -> LauncherError:
    with pytest.raises(kind) as raised:
        list_files([url])
    assert raised.value.hint
    # A library's words may hold a signed address.
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    return raised.value


def test_a_file_that_is_not_there(site: Site) -> None:
    assert "no such file" in str(failure(f"{site.url}/b.txt", DataError))


def test_a_file_that_is_refused(site: Site) -> None:
    site.refused.add("/a.txt")
    assert "127.0.0.1 refuses to give it (403)" in str(failure(f"{site.url}/a.txt", DataError))


def test_a_file_that_is_refused_later_is_no_bad_record(site: Site) -> None:
    file = one(f"{site.url}/a.txt")
    site.always = Fault(status=403)
    bad: list[DataError] = []
    with pytest.raises(DataError, match="refuses"):
        list(documents(file, TEXT, on_bad=bad.append))
    assert not bad


def test_a_file_of_unknown_size(site: Site) -> None:
    site.sized = False
    assert "how large" in str(failure(f"{site.url}/a.txt", DataError))


def test_a_server_that_stays_busy(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "READING_SECONDS", 0.3)
    file = one(f"{site.url}/a.txt")
    site.always = Fault(status=503)
    with pytest.raises(MachineError, match=r"127\.0\.0\.1 cannot be read from: it answers with status 503"):
        texts(file)


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "READ_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.txt"
        assert "it does not answer in time" in str(failure(url, MachineError))


def test_a_server_that_falls_silent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    file = one(f"{site.url}/a.txt")
    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    site.faults.extend([Fault(), Fault(wait=0.6), Fault(wait=0.6)])
    assert texts(file) == LINES


def test_nobody_listens(unused: int) -> None:
    assert "127.0.0.1 cannot be read from" in str(failure(f"http://127.0.0.1:{unused}/a.txt", MachineError))


@pytest.fixture
def unused() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_a_host_that_takes_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 0.1)
    with ExitStack() as stack:
        busy = stack.enter_context(socket.socket())
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)  # a queue of one: who comes after that is not even told to go
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(busy.getsockname())
        url = f"http://127.0.0.1:{busy.getsockname()[1]}/a.txt"
        assert "it does not answer in time" in str(failure(url, MachineError))


def test_a_host_without_a_name_server() -> None:
    assert "no-such-host.invalid" in str(failure("http://no-such-host.invalid/a.txt", MachineError))


def test_a_file_that_changes_before_it_is_read(site: Site) -> None:
    file = one(f"{site.url}/a.txt")
    site.files["/a.txt"] = BODY.replace(b"line 1 ", b"LINE 1 ")
    assert changed(file)
    with pytest.raises(DataError, match="changed since it was listed"):
        texts(file)


def test_a_file_that_changes_while_it_is_read(site: Site) -> None:
    file = one(f"{site.url}/a.txt")
    found = documents(file, TEXT)
    next(found)
    site.files["/a.txt"] = BODY.replace(b"line 1 ", b"LINE 1 ")
    site.faults.append(Fault(cut=10))
    with pytest.raises(DataError, match="changed since it was listed"):
        list(found)


@pytest.mark.parametrize(
    "url",
    [
        "https://somebody:opensesame@files.example/a.txt",
        "https://files.example/a.txt?X-Amz-Credential=opensesame&X-Amz-Signature=opensesame",
        "https://files.example/a.txt?sv=1&sig=opensesame",
        "https://files.example/a.txt?access_token=opensesame",
        "zip://a.txt::https://files.example/a.zip?token=opensesame",
        "https://files.example/a.txt#token=opensesame",
        "https://files.example/a.txt;token=opensesame",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_said(url: str) -> None:
    error = failure(url, RequestError)
    assert "files.example/a" in str(error)
    assert "opensesame" not in f"{error} {error.hint}"


def test_a_query_names_a_file(site: Site) -> None:
    file = one(f"{site.url}/a.txt?version=7")
    assert file.path.endswith("?version=7")
    assert file.suffix == ".txt"
    assert texts(file) == LINES


def test_any_file_system_that_fsspec_has(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/here/a.txt", BODY)
    (tmp_path / "a.txt").write_bytes(BODY)
    for pattern in ("memory://here/*.txt", f"file://{tmp_path}/a.txt", f"file://{tmp_path}/*"):
        (file,) = list_files([pattern])
        assert texts(file) == LINES
        assert not changed(file)


def test_a_protocol_that_nobody_knows() -> None:
    assert "gopher://" in str(failure("gopher://host/a.txt", RequestError))


def test_a_protocol_that_needs_more_than_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    complaints: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", complaints.append)
    for url in ("ftp://host/a.txt", "github://a.txt"):
        assert "by its address alone" in str(failure(url, RequestError).hint)
    gc.collect()
    assert not complaints


def test_an_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    assert failure("gs://bucket/a.txt", MachineError).hint == "pip install 'launcher[gcs]'"


# Archives


def zipped(**members: bytes) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
    return whole.getvalue()


@pytest.mark.parametrize("faults", [[], PASSING], ids=["calm", "faults"])
def test_a_member_of_a_remote_archive(site: Site, faults: list[Fault]) -> None:
    site.files["/a.zip"] = zipped(b__a_txt=BODY, b__c_txt_gz=gzip.compress(BODY), d_md=b"no")
    files = list_files([f"zip://b/*::{site.url}/a.zip"])
    names = [file.path.partition("::")[0] for file in files]
    assert names == ["zip://b/a.txt", "zip://b/c.txt.gz"]
    for file in files:
        site.faults.extend(faults)
        assert not splittable(file, TEXT)
        assert texts(file) == LINES
        assert not changed(file)
    site.files["/a.zip"] = zipped(b__a_txt=b"other", b__c_txt_gz=b"")
    assert changed(files[0])


def test_a_local_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(zipped(a_txt=b"one\ntwo\n"))
    file = one(f"zip://a.txt::{tmp_path}/a.zip")
    monkeypatch.chdir(tmp_path)
    assert one("zip://a.txt::a.zip") == file
    assert texts(file) == ["one", "two"]
    with pytest.raises(DataError, match="no file matches"):
        list_files([f"zip://b.txt::{tmp_path}/a.zip"])
    content = bytearray((tmp_path / "a.zip").read_bytes())
    (tmp_path / "cut.zip").write_bytes(content[:-30])
    with pytest.raises(DataError, match="damaged zip archive"):
        list_files([f"zip://a.txt::{tmp_path}/cut.zip"])
    with pytest.raises(DataError, match=r"no file matches .*none\.zip"):
        list_files([f"zip://a.txt::{tmp_path}/none.zip"])


def test_a_damaged_member_is_a_bad_file(tmp_path: Path) -> None:
    content = bytearray(zipped(a_txt=BODY))
    content[2000] ^= 0x55
    (tmp_path / "a.zip").write_bytes(content)
    file = one(f"zip://a.txt::{tmp_path}/a.zip")
    bad: list[DataError] = []
    list(documents(file, TEXT, on_bad=bad.append))
    assert "damaged zip file" in bad[-1].reason


def test_another_chain_is_refused() -> None:
    assert "zip://MEMBER::URL" in str(failure("simplecache::https://files.example/a", RequestError).hint)


# S3, against moto's server


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = server.get_host_and_port()
    yield address
    server.stop()


@pytest.fixture
def s3(moto: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A bucket `text` behind a server that fails on order."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=f"http://{moto[0]}:{moto[1]}")
    client.create_bucket(Bucket="text")
    for name, body in {"a.txt": BODY, "deep/b.txt.gz": gzip.compress(BODY), "deep/.c.txt": b"no"}.items():
        client.put_object(Bucket="text", Key=name, Body=body)
    with serving(Site(upstream=moto)) as served:
        monkeypatch.setenv("AWS_ENDPOINT_URL", served.url)
        remote.file_system("s3://text").clear_instance_cache()
        yield served


def test_a_bucket_without_credentials(s3: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    remote.file_system("s3://text").clear_instance_cache()
    error = failure("s3://text/a.txt", MachineError)
    assert "there are no credentials for text here" in str(error)
    assert "FSSPEC_S3_ANON" in str(error.hint)


def test_a_bucket_is_listed(s3: Site) -> None:
    assert [file.path for file in list_files(["s3://text/**"])] == [
        "s3://text/a.txt",
        "s3://text/deep/b.txt.gz",
    ]
    (file,) = list_files(["s3://text/*.txt"])
    assert file.size == len(BODY)
    assert file.etag
    assert file == one("s3://text/a.txt")
    with pytest.raises(DataError, match="is a folder") as refused:
        list_files(["s3://text/deep"])
    assert refused.value.hint == "to read every file in it: s3://text/deep/**"


@pytest.mark.parametrize("name", ["a.txt", "deep/b.txt.gz"])
@pytest.mark.parametrize("faults", [[], [*PASSING, Fault(wait=0.3)]], ids=["calm", "faults"])
def test_a_file_in_a_bucket(s3: Site, name: str, faults: list[Fault]) -> None:
    file = one(f"s3://text/{name}")
    s3.faults.extend(faults)
    assert texts(file) == LINES
    assert not changed(file)
    assert not s3.faults or name == "deep/b.txt.gz"  # which is small


def test_a_bucket_that_throttles_the_listing(s3: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LISTING_SECONDS", 20.0)  # as it is: a busy machine takes its time
    s3.faults.extend([Fault(status=503)] * 3)
    assert len(list_files(["s3://text/**"])) == 2


def test_a_key_and_a_bucket_that_are_not_there(s3: Site) -> None:
    assert "no such file" in str(failure("s3://text/none.txt", DataError))
    assert "no such file" in str(failure("s3://other/a.txt", DataError))
    assert "no file matches" in str(failure("s3://text/none/*.txt", DataError))


def test_a_bucket_that_refuses(s3: Site) -> None:
    file = one("s3://text/a.txt")
    s3.always = Fault(status=403)
    with pytest.raises(DataError, match="text refuses to give it"):
        texts(file)
    with pytest.raises(DataError, match="text refuses to give it"):
        list_files(["s3://text/**"])


def test_an_object_that_changes(s3: Site, moto: tuple[str, int]) -> None:
    file = one("s3://text/a.txt")
    found = documents(file, TEXT)
    next(found)
    client = boto3.client("s3", endpoint_url=f"http://{moto[0]}:{moto[1]}")
    client.put_object(Bucket="text", Key="a.txt", Body=BODY.replace(b"line 1 ", b"LINE 1 "))
    assert changed(file)
    with pytest.raises(DataError, match="changed since it was listed"):
        list(found)


def test_no_thread_is_left(site: Site) -> None:
    found = documents(one(f"{site.url}/a.txt"), TEXT)
    next(found)
    found.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("read-ahead"):
            thread.join(5)
            assert not thread.is_alive()
