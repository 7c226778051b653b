"""Servers on loopback that fail as real ones do: on order, and for real."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import SSLContext
from typing import ClassVar

from tests.loopback import ANY_PORT, Quiet, answering

CODES: Mapping[int, str] = {403: "AccessDenied", 503: "SlowDown"}


@dataclass(frozen=True)
class Fault:
    """What happens to one answer: another status, a cut after so many bytes, a wait before it."""

    status: int = 200
    cut: int | None = None
    wait: float = 0.0


FINE = Fault()


@dataclass
class Site:
    """What a server has, how it behaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    head: bool = True
    sized: bool = True
    squeezes: bool = False
    refused: set[str] = field(default_factory=set)
    faults: deque[Fault] = field(default_factory=deque)
    always: Fault = FINE
    gets: list[str] = field(default_factory=list)
    sent: int = 0
    upstream: tuple[str, int] | None = None
    url: str = ""

    def fault(self) -> Fault:
        """The next fault on order."""
        return self.faults.popleft() if self.faults else self.always


class Handler(Quiet, BaseHTTPRequestHandler):
    """Serves a site."""

    protocol_version = "HTTP/1.1"
    site: ClassVar[Site]

    def do_HEAD(self) -> None:
        self._answer(FINE if self.site.head else Fault(status=405))

    def do_GET(self) -> None:
        self.site.gets.append(self.headers.get("Range", ""))
        self._answer(self.site.fault())

    def _answer(self, fault: Fault) -> None:
        if fault.wait:
            time.sleep(fault.wait)
        status, headers, body = self._upstream() if self.site.upstream else self._file()
        if fault.status != 200:
            code = CODES.get(fault.status, "InternalError")
            body = (
                f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            )
            status, headers = fault.status, {"Content-Type": "application/xml"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and (self.site.sized or status != 200):
            self.send_header("Content-Length", str(len(body)))
        if not self.site.sized:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body if fault.cut is None else body[: fault.cut]
        self.site.sent += len(body)
        try:
            self.wfile.write(body)
        except OSError:
            return
        if fault.cut is not None or not self.site.sized:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    def _file(self) -> tuple[int, dict[str, str], bytes]:
        path = self.path.partition("?")[0]
        if path in self.site.refused:
            return 403, {}, b"no"
        if path not in self.site.files:
            return 404, {}, b"nothing here"
        body = self.site.files[path]
        headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        if self.site.squeezes and "gzip" in self.headers.get("Accept-Encoding", ""):
            return 200, {**headers, "Content-Encoding": "gzip"}, gzip.compress(body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not self.site.ranges:
            return 200, headers, body
        first, last = int(asked[1]), min(int(asked[2]), len(body) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return 206, headers, body[first : last + 1]

    def _upstream(self) -> tuple[int, dict[str, str], bytes]:
        assert self.site.upstream is not None
        connection = http.client.HTTPConnection(*self.site.upstream, timeout=30)
        connection.request(self.command, self.path, headers=dict(self.headers.items()))
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        kept: Mapping[str, str] = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "date", "server")
        }
        return answer.status, dict(kept), body


@contextmanager
def serving(site: Site, tls: SSLContext | None = None) -> Iterator[Site]:
    """Serve the site on a free port of loopback, for as long as the context lasts."""
    handler = type("SiteHandler", (Handler,), {"site": site})
    server = ThreadingHTTPServer(ANY_PORT, handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    with answering(server) as url:
        site.url = url if tls is None else url.replace("http:", "https:")
        yield site
