"""A real range server, with faults to choose: what goes wrong between a hub and a user."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass
class Files:
    """What is served, and how. faults: by name, how many requests are still to suffer from it.

    asked: every range that was sent, for whoever counts bytes. goes_after: so many more of them;
    then it answers 503. silent_after: so many, it says nothing for ten seconds.
    """

    folder: Path
    faults: Counter[str] = field(default_factory=Counter)
    asked: list[tuple[int, int]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    etag: str = '"one"'
    redirect: str | None = None
    secret: str | None = None
    delay: float = 0.0
    goes_after: int | None = None
    silent_after: int = 1 << 30
    lock: threading.Lock = field(default_factory=threading.Lock)

    def path(self, asked: str) -> Path:
        return self.folder / unquote(asked.lstrip("/").partition("?")[0])

    @property
    def n_asked(self) -> int:
        return sum(last - first + 1 for first, last in self.asked)

    def has_gone(self) -> bool:
        with self.lock:
            if self.goes_after:
                self.goes_after -= 1
                return False
            return self.goes_after is not None

    def suffers(self, fault: str) -> bool:
        with self.lock:
            if self.faults[fault] > 0:
                self.faults[fault] -= 1
                return True
            return False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        files: Files = self.server.files  # type: ignore[attr-defined]
        files.headers.append(dict(self.headers))
        path = files.path(self.path)
        if files.redirect is not None:
            return self._say(302, Location=files.redirect + self.path)
        if files.secret and self.headers.get("Authorization") != f"Bearer {files.secret}":
            return self._say(401)
        if files.suffers("429"):
            return self._say(429, Retry_After="1")
        if files.suffers("503") or files.has_gone():
            return self._say(503)
        if not path.is_file():
            return self._say(404)
        if self.headers.get("If-Match", files.etag) != files.etag:
            return self._say(412)
        self._send_range(files, path)

    def do_HEAD(self) -> None:
        """As stores want it."""
        files: Files = self.server.files  # type: ignore[attr-defined]
        path = files.path(self.path)
        if not path.is_file():
            return self._head(404, {})
        date = self.date_time_string(int(path.stat().st_mtime))
        self._head(
            200, {"ETag": files.etag, "Last-Modified": date, "Content-Length": path.stat().st_size}
        )

    def _send_range(self, files: Files, path: Path) -> None:
        total = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(match[1]), int(match[2])) if match else (0, total - 1)
        last = min(last, total - 1)
        if first > last:
            return self._say(416)
        if files.suffers("200"):
            return self._say(200, body=b"x" * 100, ETag=files.etag)
        start, n_bytes = first, last - first + 1
        if files.suffers("wrong range"):
            first += 1
        told = f"bytes {first}-{last}/{total}"
        etag = '"two"' if files.suffers("other version") else files.etag
        time.sleep(files.delay if len(files.asked) < files.silent_after else 10)
        date = self.date_time_string(int(path.stat().st_mtime))
        facts = {"Content-Range": told, "ETag": etag, "Content-Length": n_bytes}
        facts |= {"Last-Modified": date}
        self._head(206, facts)
        if files.suffers("cut"):
            n_bytes //= 2
            self.close_connection = True
        else:
            with files.lock:
                files.asked.append((first, last))
        self.wfile.flush()
        with path.open("rb") as file:
            self.connection.sendfile(file, start, n_bytes)

    def _say(self, status: int, body: bytes = b"", **headers: str) -> None:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self._head(status, {**names, "Content-Length": len(body)})
        self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing: the tests look at what was asked."""


@contextmanager
def serve(folder: Path, context: Any = None) -> Iterator[tuple[str, Files]]:
    """The address of the folder, and what can be done to it. context: for TLS."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    files = Files(folder)
    server.files = files  # type: ignore[attr-defined]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        scheme = "http" if context is None else "https"
        yield f"{scheme}://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        server.server_close()
