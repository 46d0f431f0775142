"""A hub that answers as the real one does: tree, resolve, redirects, tokens. It has me/model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.fetching.server import Files, serve

TOKEN = "hf_0123456789abcdefghijklmnopqrstuvwx"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: str  # where its redirects lead
    n_bytes: int
    sha256: str

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say(401, {"X-Error-Code": "RepoNotFound"})
        if re.match(r"/api/models/me/model/tree/", self.path):
            tree = [
                {"type": "file", "path": path, "size": self.n_bytes, "oid": "1"}
                for path in ("README.md", "in.gguf", "q8/in.gguf")
            ]
            return self._say(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        match = re.match(r"/me/model/resolve/(\w+)/(.*)", self.path)
        if match is None or match[2].partition("?")[0] != "in.gguf":
            return self._say(404, {"X-Error-Code": "EntryNotFound"})
        self._say(
            302,
            {
                "Location": f"{self.files}/in.gguf?signature=s3cret",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(self.n_bytes),
                "X-Linked-Etag": f'"{self.sha256}"',
                "ETag": '"x"',
            },
        )

    do_HEAD = do_GET

    def _say(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def serve_hub(folder: Path) -> Iterator[tuple[dict[str, str], type[Hub], Files]]:
    """What the environment must say, the hub, and where its redirects lead: folder/in.gguf."""
    model, digest = folder / "in.gguf", hashlib.sha256()
    with model.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    with serve(folder) as (address, files):
        facts = {"n_bytes": model.stat().st_size, "sha256": digest.hexdigest()}
        handler = type("_OneHub", (Hub,), {"files": address, **facts})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}, handler, files
        finally:
            server.shutdown()
            server.server_close()
