"""The program as a whole: help, version, completion, the bare form, signals, encodings."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_fuse import __version__
from tests.conftest import gguf_fuse

Model = Callable[..., Path]

COMMANDS = ["fuse", "unfuse", "inspect", "recipe", "verify", "bench", "demo"]


def test_help_names_the_main_job_and_every_command() -> None:
    shown = gguf_fuse("--help").stdout
    assert "gguf-fuse --fuse-qkv-weights in.gguf out.gguf" in shown
    for command in COMMANDS:
        assert re.search(rf"^│ {command} ", shown, re.MULTILINE)
    assert "Exit codes" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command: str) -> None:
    done = gguf_fuse(command, "--help")
    assert done.returncode == 0
    assert f"Example: gguf-fuse {command}" in done.stdout


def assert_not_loaded(arguments: list[str | Path], *modules: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gguf_fuse", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for module in modules:
        assert not re.search(rf"\| +{re.escape(module)}$", done.stderr, re.MULTILINE), module


def test_nothing_heavy_is_loaded_for_little(packed: Path) -> None:
    heavy = ("numpy", "gguf", "rich.progress")
    assert_not_loaded(["--help"], *heavy, "gguf_fuse.api", "gguf_fuse.format.header")
    assert_not_loaded(["inspect", packed], *heavy, "concurrent.futures", "rich._emoji_codes")
    assert_not_loaded(["fuse", packed, packed.with_name("out.gguf")], *heavy, "rich._emoji_codes")


def test_names_are_printed_as_they_are(packed: Path) -> None:
    odd = packed.rename(packed.with_name(":cat: [red].gguf"))
    assert str(odd) in gguf_fuse("inspect", odd).stdout


def test_version() -> None:
    assert gguf_fuse("--version").stdout == f"gguf-fuse {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    complete = f"complete_{shell}"
    environment = {
        **os.environ,
        "_GGUF_FUSE_COMPLETE": complete,
        "COMP_WORDS": "gguf-fuse ins",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "gguf-fuse ins",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    assert "inspect" in gguf_fuse(env=environment).stdout


def test_bare_form_is_the_fuse_command(model: Model, tmp_path: Path) -> None:
    original = model()
    outputs = [tmp_path / name for name in ("bare.gguf", "before.gguf", "command.gguf")]
    assert gguf_fuse("--fuse-qkv-weights", original, outputs[0]).returncode == 0
    assert gguf_fuse("-q", "--fuse-qkv-weights", original, outputs[1]).stdout == ""
    assert gguf_fuse("fuse", original, outputs[2]).returncode == 0
    first, *others = (output.read_bytes() for output in outputs)
    assert others == [first, first]


def test_a_misspelled_flag_gets_the_right_one_named(tmp_path: Path) -> None:
    result = gguf_fuse("--fuse-qkv-weight", tmp_path / "in.gguf", tmp_path / "out.gguf")
    assert result.returncode == 2
    assert "No such option: --fuse-qkv-weight (Possible options: --fuse-qkv-weights)" in " ".join(
        result.stderr.replace("│", "").split()
    )


def test_another_command_does_not_take_the_flag_of_fuse(tmp_path: Path) -> None:
    result = gguf_fuse("inspect", "--fuse-qkv-weights", tmp_path / "in.gguf")
    assert result.returncode == 2
    assert "Usage: gguf-fuse inspect" in result.stderr


def test_an_encoding_without_the_letters(model: Model) -> None:
    original = model("\u6a21\u578b.gguf")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = gguf_fuse("inspect", original, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the platform has no SIGHUP")
def test_nohup_is_respected(model: Model, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from gguf_fuse import cli\n"
        "from gguf_fuse.writing import publish as write\n"
        "sync = os.fsync\n"
        "def hang_up(fd):\n    os.kill(os.getpid(), signal.SIGHUP)\n    sync(fd)\n"
        "os.fsync = hang_up\n"
        "cli.main()"
    )
    output = tmp_path / "out.gguf"
    command = [sys.executable, "-c", script, "fuse", str(model()), str(output)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert output.exists()
