"""What can be wrong with the path of the input."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.conftest import gguf_fuse, let_others_in
from tests.pack import fused, save, valid
from tests.server import COMMANDS, Run, assert_cheap, assert_one_line, command_line


def assert_input_refused(run: Run, path: Path | str, *words: str) -> None:
    folder = Path(path).parent
    before = sorted(folder.iterdir()) if folder.is_dir() else []
    for command in COMMANDS:
        out = [] if command == "inspect" else [folder / "out"]
        outcome = run(command, path, *out)
        assert_one_line(outcome, *words)
        assert_cheap(outcome)
    assert not folder.is_dir() or sorted(folder.iterdir()) == before


def test_input_is_missing(run: Run, tmp_path: Path) -> None:
    assert_input_refused(run, tmp_path / "no.gguf", f"{tmp_path}/no.gguf", "No such file")


def test_input_is_a_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    for command in ("fuse", "unfuse"):
        outcome = run(command, tmp_path / "folder.gguf", tmp_path / "out")
        assert_one_line(outcome, "folder.gguf", "not a regular file")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.gguf"]


def test_input_is_a_pipe_that_nobody_writes_to(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert_input_refused(run, tmp_path / "pipe.gguf", "pipe.gguf", "not a regular file")


def test_input_is_a_socket(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.gguf")
        assert_input_refused(run, tmp_path / "socket.gguf", "not a regular file")


def test_input_is_an_endless_device(run: Run, tmp_path: Path) -> None:
    for command in COMMANDS:
        out = [] if command == "inspect" else [tmp_path / "out"]
        assert_one_line(run(command, "/dev/zero", *out), "/dev/zero", "not a regular file")


def test_input_is_a_broken_link(run: Run, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to("nowhere")
    assert_input_refused(run, tmp_path / "link.gguf", "link.gguf", "No such file")


def test_input_is_a_link_to_itself(run: Run, tmp_path: Path) -> None:
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    assert_input_refused(run, tmp_path / "loop.gguf", "loop.gguf", "symbolic links")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root can become another user")
def test_input_is_unreadable(run: Run, packed: Path) -> None:
    packed.chmod(0)
    for command in COMMANDS:
        outcome = run(*command_line(command, packed), uid=65534)
        assert_one_line(outcome, str(packed), "Permission denied")


def test_input_in_a_missing_folder(run: Run, tmp_path: Path) -> None:
    assert_input_refused(run, tmp_path / "no" / "no.gguf", "No such file")


def test_input_name_is_too_long(run: Run, tmp_path: Path) -> None:
    assert_input_refused(run, tmp_path / ("x" * 300), "name too long")


def test_input_name_is_empty(run: Run, tmp_path: Path) -> None:
    assert_one_line(run("inspect", ""), "not a regular file")


def test_input_name_with_escapes(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31mred\n[red].gguf"
    path.write_bytes(b"GGUF")
    assert_input_refused(run, path, r"\x1b[31mred\n[red].gguf", "truncated")


def test_input_from_a_pipe(run: Run, tmp_path: Path) -> None:
    assert_one_line(
        run("fuse", "-", tmp_path / "out.gguf"), "-: standard input cannot", "give a file"
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root can become another user")
def test_input_that_may_not_be_read(run: Run, tmp_path: Path) -> None:
    let_others_in(tmp_path)
    model = save(valid(), tmp_path / "in.gguf")
    model.chmod(0o600)
    assert_one_line(run("inspect", model, uid=65534), f"{model}: Permission denied")


@pytest.mark.parametrize("command", COMMANDS)
def test_name_that_is_not_utf8(command: str, tmp_path: Path) -> None:
    """A name may hold any byte: it works, and prints, in the strict locale of most people."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    save(fused(valid()) if command == "unfuse" else valid(), path)
    locale = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    result = gguf_fuse(*command_line(command, path), text=False, env=locale)
    assert b"Traceback" not in result.stderr, result.stderr
    assert result.returncode == 0
