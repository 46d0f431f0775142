"""Files of a hub that answers as the real one does: tree, resolve, redirects, tokens."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fetching.server import Files, serve
from tests.fetching.test_http import FUSED, WHOLE
from tests.fetching.test_resume import PRELUDE

pytest.importorskip("huggingface_hub")

TOKEN = "hf_0123456789abcdefghijklmnopqrstuvwx"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA256 = hashlib.sha256(WHOLE).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: str  # where its redirects lead
    sha256 = SHA256

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say(401, {"X-Error-Code": "RepoNotFound"})
        if re.match(r"/api/models/me/model/tree/", self.path):
            tree = [
                {"type": "file", "path": path, "size": len(WHOLE), "oid": "1"}
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
                "X-Linked-Size": str(len(WHOLE)),
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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[_Hub], Files, Any]]:
    """The hub, where its redirects lead, and how to run a command against it."""
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "in.gguf").write_bytes(WHOLE)
    with serve(folder) as (address, files):
        handler = type("_OneHub", (_Hub,), {"files": address})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def run(*arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
            import os

            environment = {
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path / "hf"),
                "HF_TOKEN": token,
            }
            command = [sys.executable, "-c", PRELUDE + "cli.main()", *arguments]
            return subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
            )

        yield handler, files, run
        server.shutdown()
        server.server_close()


def test_a_file_of_the_hub(hub: tuple[type[_Hub], Files, Any], tmp_path: Path) -> None:
    _, files, run = hub
    done = run("fuse", "hf://me/model/in.gguf", "out.gguf", "--manifest", "m.json")
    assert done.returncode == 0, done.stderr
    manifest = (tmp_path / "m.json").read_text()
    (source,) = json.loads(manifest)["sources"]
    assert source == {
        **{"address": "hf://me/model/in.gguf", "bytes": len(WHOLE), "etag": '"one"'},
        **{"revision": COMMIT, "sha256": SHA256},
    }
    assert (tmp_path / "out.gguf").read_bytes() == FUSED
    assert not any("Authorization" in headers for headers in files.headers)
    for shown in (done.stdout, done.stderr, manifest):
        assert TOKEN not in shown
        assert "s3cret" not in shown
    assert (
        run("verify", "hf://me/model@main/in.gguf", "out.gguf", "--structure-only").returncode == 0
    )


def test_other_bytes_than_the_hub_knows(hub: tuple[type[_Hub], Files, Any], tmp_path: Path) -> None:
    handler, _, run = hub
    handler.sha256 = "0" * 64
    done = run("fuse", "hf://me/model/in.gguf", "out.gguf")
    assert done.returncode == 1
    assert "SHA-256" in done.stderr
    assert not list(tmp_path.glob("out.gguf*"))


def test_a_run_that_was_broken_off_goes_on(
    hub: tuple[type[_Hub], Files, Any], tmp_path: Path
) -> None:
    """By the SHA-256 that the hub tells, whatever ETag the place has that it leads to."""
    _, files, run = hub
    files.goes_after = 40
    done = run("fuse", "hf://me/model/in.gguf", "out.gguf")
    assert done.returncode == 1
    assert " bytes are kept in " in done.stderr
    for path in tmp_path.glob("out.gguf*"):
        assert TOKEN.encode() not in path.read_bytes()
        assert b"s3cret" not in path.read_bytes()
    files.goes_after, files.etag = None, '"three"'
    done = run("fuse", "hf://me/model/in.gguf", "out.gguf")
    assert "going on with" in done.stderr
    assert (tmp_path / "out.gguf").read_bytes() == FUSED


@pytest.mark.parametrize(
    ("address", "token", "words"),
    [
        ("hf://me/model/in.gguf", "hf_wrong", "no such repository, or it is private"),
        ("hf://me/model/absent.gguf", TOKEN, "no such file in the repository"),
        ("hf://me/in.gguf", TOKEN, "an address of the hub is hf://owner/repo"),
    ],
)
def test_what_cannot_be_had(
    hub: tuple[type[_Hub], Files, Any], address: str, token: str, words: str
) -> None:
    done = hub[2]("inspect", address, token=token)
    assert done.returncode == 1
    assert done.stderr.startswith(f"gguf-fuse: {address}: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert token not in done.stderr
