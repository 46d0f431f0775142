"""Files of a hub that answers as the real one does: tree, resolve, redirects, tokens."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fetching.hub import COMMIT, TOKEN, Hub, serve_hub
from tests.fetching.server import Files
from tests.fetching.test_http import FUSED, WHOLE
from tests.fetching.test_resume import PRELUDE

pytest.importorskip("huggingface_hub")

SHA256 = hashlib.sha256(WHOLE).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], Files, Any]]:
    """The hub, where its redirects lead, and how to run a command against it."""
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "in.gguf").write_bytes(WHOLE)
    with serve_hub(folder) as (own, handler, files):

        def run(*arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, **own, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": token}
            command = [sys.executable, "-c", PRELUDE + "cli.main()", *arguments]
            return subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
            )

        yield handler, files, run


def test_a_file_of_the_hub(hub: tuple[type[Hub], Files, Any], tmp_path: Path) -> None:
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


def test_other_bytes_than_the_hub_knows(hub: tuple[type[Hub], Files, Any], tmp_path: Path) -> None:
    handler, _, run = hub
    handler.sha256 = "0" * 64
    done = run("fuse", "hf://me/model/in.gguf", "out.gguf")
    assert done.returncode == 1
    assert "SHA-256" in done.stderr
    assert not list(tmp_path.glob("out.gguf*"))


def test_a_run_that_was_broken_off_goes_on(
    hub: tuple[type[Hub], Files, Any], tmp_path: Path
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
    hub: tuple[type[Hub], Files, Any], address: str, token: str, words: str
) -> None:
    done = hub[2]("inspect", address, token=token)
    assert done.returncode == 1
    assert done.stderr.startswith(f"gguf-fuse: {address}: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert token not in done.stderr
