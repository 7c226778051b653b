"""Files behind a URL: through fsspec, with patience for what passes, and words for what does not.

No message holds what a URL may hold of secrets, and no exception of a library is passed on: its text may
name the address that a server sent us to, signature and all.
"""

from __future__ import annotations

import errno
import inspect
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from launcher.errors import DataError, LauncherError, MachineError, RequestError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CONNECT_SECONDS = 10.0  # to be answered at all
READ_SECONDS = 30.0  # between one byte and the next
LISTING_SECONDS = 20.0  # how long a fault is waited out that is met before anything worked
READING_SECONDS = 120.0  # and one that is met in the middle
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
PROBED = 1 << 20  # bytes from which it matters whether a server gives ranges

EXTRAS: Mapping[str, str] = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
TAGS = (
    "ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "xet_hash", "blob_id", "version",
    "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created", "CRC",
)  # fmt: skip
"""What file systems call the thing that changes when a file does, the surest first."""
LIST_AS_THEY_TELL = frozenset({"http", "https", "hf", "s3", "s3a", "gs", "gcs"})
"""File systems that say the same of a file in a list as when asked for it alone."""
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 529})
LASTING = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG, errno.EMSGSIZE})
NETWORK = frozenset(
    {"aiohttp", "aiobotocore", "botocore", "gcsfs", "httpcore", "httpx", "httpx2", "huggingface_hub",
     "requests", "urllib3", "fsspec", "s3fs", "ssl"}
)  # fmt: skip

_QUERY = re.compile(r"""(\?|[#;](?=[^\s'"<>)]*=))[^\s'"<>)]*""")  # and what holds values as one does

Result = TypeVar("Result")


def file_system(url: str) -> AbstractFileSystem:
    """What reads this URL. Raises RequestError for an unknown protocol, MachineError for a missing extra."""
    import fsspec

    protocol = url.partition("://")[0]
    extra = EXTRAS.get(protocol)
    try:
        settings = _settings(protocol)
        # Asked of the signature: one that is made without what it needs complains again when it is let go.
        inspect.signature(fsspec.get_filesystem_class(protocol).__init__).bind(None, **settings)
        system = fsspec.filesystem(protocol, **settings)
    except ImportError as error:
        install = f"pip install 'launcher[{extra}]'" if extra else f"pip install {error.name or protocol}"
        raise MachineError(f"reading {protocol}:// needs a package that is not here", hint=install) from None
    except (ValueError, TypeError):  # no such protocol; or one whose address alone is not enough
        known = "s3://, gs://, https://, hf:// and whatever else fsspec opens by its address alone"
        raise RequestError(
            f"{protocol}:// is no protocol that can be read", hint=f"there are {known}"
        ) from None
    if protocol in ("s3", "s3a"):
        system.retries = 1  # the patience is ours
    return system


def _settings(protocol: str) -> dict[str, Any]:
    """What a file system is told so that it waits as long as we say, and gives bytes as they are stored."""
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        waits = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        return {
            "use_listings_cache": False,
            "client_kwargs": {"timeout": waits, "trust_env": True},
            "headers": {"Accept-Encoding": "identity"},
        }
    if protocol in ("s3", "s3a"):
        waits_for = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        retries = {"total_max_attempts": 1}
        return {"use_listings_cache": False, "config_kwargs": {**waits_for, "retries": retries}}
    return {}


def mark(system: AbstractFileSystem, path: str) -> tuple[int, str]:
    """Size in bytes, and what changes when the file does ("" where nothing says so).

    The Hub, which looks up a whole folder for it and counts requests, is asked once by each process.
    """
    if not path.startswith("hf://"):
        system.invalidate_cache()
    return mark_of(system.info(path), path)


def mark_of(info: Mapping[str, Any], path: str) -> tuple[int, str]:
    """The same from what a file system said of the file."""
    size = info.get("size")
    if size is None:
        raise DataError(
            f"{shown(path)}: the server does not say how large it is",
            hint="download the file, or put it where its size is known",
        )
    return int(size), next((str(info[tag]) for tag in TAGS if info.get(tag)), "")


def gives_ranges(system: AbstractFileSystem, path: str, size: int) -> bool:
    """Whether a part of the file can be asked for; web servers may only have the whole."""
    if size < PROBED or not path.startswith(("http://", "https://")):
        return True
    try:
        with system.open(path, "rb", block_size=1, cache_type="none", size=size) as opened:
            opened.seek(size // 2)
            return len(opened.read(1)) == 1
    except ValueError:
        return False


def persist(url: str, action: Callable[[], Result]) -> Result:
    """What `action` gives, tried again while what hinders it may pass. Raises what `Patience` does."""
    patience = Patience(url, LISTING_SECONDS, time.sleep)
    while True:
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - it is judged there, and raised
            patience.bear(error)


class Patience:
    """Waits out what passes, longer each time, `seconds` in all since something last worked."""

    def __init__(self, url: str, seconds: float, sleep: Callable[[float], object]) -> None:
        self._url = url
        self._seconds = seconds
        self._sleep = sleep
        self.renew()

    def renew(self) -> None:
        """Something worked."""
        self._since: float | None = None
        self._delay = FIRST_DELAY

    def bear(self, error: Exception) -> None:
        """Wait, or raise what the error means: DataError, or MachineError once the patience is at its end."""
        reason = _cause(error)
        if isinstance(reason, LauncherError) or not _passes(reason):
            raise _told(self._url, reason) from None
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if now + self._delay > self._since + self._seconds:
            raise MachineError(
                f"{shown(self._url)}: {host(self._url)} cannot be read from: {_reason(reason)}",
                hint=f"tried for {now - self._since:.0f} s; check the address, and this machine's network",
            ) from None
        # Many that were turned away together should not come back together.
        self._sleep(self._delay * random.uniform(0.5, 1.0))
        self._delay = min(2 * self._delay, LONGEST_DELAY)


def _cause(error: Exception) -> Exception:
    """fsspec says "not found" of whatever it could not look up over HTTP; the truth is beneath."""
    beneath = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(beneath, Exception):
        return error
    return beneath if _status(beneath) is not None or _of_the_network(beneath) else error


def _passes(error: Exception) -> bool:
    """Whether it may be otherwise in a moment."""
    status = _status(error)
    if status is not None:
        return status in PASSING_STATUS
    if isinstance(error, FileNotFoundError | PermissionError | ImportError):
        return False
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError"):
        return False
    if isinstance(error, OSError) and error.errno in LASTING:
        return False
    return _of_the_network(error) or isinstance(error, OSError | EOFError)


def _of_the_network(error: Exception) -> bool:
    libraries = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, TimeoutError) or bool(libraries & NETWORK)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of whichever library."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        code = getattr(error, "status", None) or getattr(response, "status_code", None)
    return code if isinstance(code, int) else None


def _told(url: str, error: Exception) -> LauncherError:
    if isinstance(error, LauncherError):
        return error
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return DataError(f"{shown(url)}: there is no such file", hint="check the address")
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        code = f" ({status})" if status else ""
        return DataError(
            f"{shown(url)}: {host(url)} refuses to give it{code}",
            hint="check that it exists, and that this machine has credentials that may read it",
        )
    if "Credentials" in type(error).__name__:
        return MachineError(
            f"{shown(url)}: there are no credentials for {host(url)} here",
            hint="set them as its tools want them, or FSSPEC_S3_ANON=true for a public bucket",
        )
    return DataError(f"{shown(url)}: cannot be read: {_reason(error)}", hint="check the address")


def _reason(error: Exception) -> str:
    status = _status(error)
    if status is not None:
        return f"it answers with status {status}"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return "it does not answer in time"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return _without_queries(str(text).strip().splitlines()[0])


def _without_queries(text: str) -> str:
    return re.sub(r"//[^/\s@]*@", "//", _QUERY.sub("", text))


def shown(url: str) -> str:
    """The URL as it may be shown: without a user's name and password, and without a query or its like."""
    return _without_queries(url)


def host(url: str) -> str:
    """Who is asked for the file: `files.example.org` or, in an object store, the bucket."""
    parts = urlsplit(url.rpartition("::")[2])
    if parts.scheme == "hf":
        from huggingface_hub import constants

        parts = urlsplit(constants.ENDPOINT)
    return parts.hostname or parts.netloc or parts.scheme


def listed(system: AbstractFileSystem, url: str) -> list[Mapping[str, Any]]:
    """What a file system says of everything that a URL, maybe with wildcards, names."""
    wild = "*[" if url.startswith(("http://", "https://")) else "*?["
    if not any(letter in url for letter in wild):
        return [system.info(url)]
    found = system.glob(url, detail=True)
    if url.partition("://")[0] in LIST_AS_THEY_TELL:
        return list(found.values())
    return [system.info(name) for name in found]
