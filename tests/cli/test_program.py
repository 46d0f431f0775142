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

COMMANDS = ["fuse", "unfuse", "inspect", "verify", "bench", "demo"]


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


def test_help_loads_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gguf_fuse", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for heavy in ("numpy", "gguf", "rich.progress", "gguf_fuse.api"):
        assert not re.search(rf"\| +{heavy}$", done.stderr, re.MULTILINE)


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


# Ctrl-C at the n-th import after the first instruction of ours.
_INTERRUPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
from gguf_fuse.cli.start import main
n = 0
def count(event, arguments):
    global n
    n += event == "import"
    if event == "import" and n == {at}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(count)
main()
"""


@pytest.mark.parametrize("at", [1, 3, 30, 60, 90, 120, 150, 180])
def test_ctrl_c_while_the_program_is_loaded(at: int, model: Model, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _INTERRUPT.format(at=at), "fuse", str(model()), "out.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr in (
        "gguf-fuse: interrupted; nothing was written\n",
        "gguf-fuse: interrupted\n",  # in the command itself, before its file is begun
    )
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the platform has no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [("--help", 1), ("--version", 1), ("fuse --help", 1), ("fuse IN OUT -f", 1), ("fuse", 2)],
)
def test_what_is_printed_finds_no_room(arguments: str, code: int, model: Model) -> None:
    """One line where standard error still takes it, the right code where it does not."""
    original = model()
    out = original.with_name("out.gguf")
    paths = {"IN": str(original), "OUT": str(out)}
    words = [paths.get(word, word) for word in arguments.split()]
    with Path("/dev/full").open("w") as full:
        done = gguf_fuse(*words, stdout=full)
        silent = gguf_fuse(*words, stdout=full, stderr=full)
    assert done.returncode == silent.returncode == code
    if code == 1:
        whole = f"; {out} is there and whole" if "OUT" in arguments else ""
        line = f"gguf-fuse: standard output: No space left on device{whole}\n"
        assert done.stderr == line


@pytest.mark.skipif(os.name != "posix", reason="POSIX shells close streams")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str, model: Model) -> None:
    """Their numbers go to no file that is written: what a library prints would go into it."""
    original = model()
    command = f'"$0" -m gguf_fuse fuse "$1" "$1.out" {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, str(original)], check=False)
    assert done.returncode == 0
    assert gguf_fuse("verify", original, f"{original}.out", "--structure-only").returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
@pytest.mark.parametrize("mib", [16, 20, 25, 30, 40, 60, 100])
def test_too_little_address_space(mib: int, model: Model) -> None:
    """One line, whatever could not be loaded; less than this, and Python itself does not start."""
    original = model()
    command = f'ulimit -v {mib * 1024}; "$0" -m gguf_fuse fuse "$1" "$1.out"'
    arguments = ["sh", "-c", command, sys.executable, str(original)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        assert done.returncode == 1
        assert re.fullmatch("gguf-fuse: .*not enough memory.*\n", done.stderr), done.stderr
        assert done.stdout == ""
