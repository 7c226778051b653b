"""Servers of this machine, for as long as a test asks them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Final

ANY_PORT: Final = ("127.0.0.1", 0)


class Quiet:
    """A handler of requests that prints nothing: name it before http.server's."""

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@contextmanager
def answering(server: ThreadingHTTPServer) -> Iterator[str]:
    """While inside, `server` answers at this URL."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
