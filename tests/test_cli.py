"""The command line as a person and a script meet it. Errors have files of their own."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse import __version__
from tests.conftest import fused_copy, gguf_fuse

Model = Callable[..., Path]

COMMANDS = ["fuse", "unfuse", "inspect", "verify", "bench", "demo"]
MIXED = {"*": T.Q4_K, "blk.[08].attn_v.weight": T.Q6_K}


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
    for heavy in ("numpy", "gguf"):
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


def test_json_of_fuse_and_unfuse(model: Model, tmp_path: Path) -> None:
    original = model(n_layer=9, n_embd=256, n_head_kv=2, types=MIXED)
    fused, back = tmp_path / "out.gguf", tmp_path / "back.gguf"
    done = gguf_fuse("fuse", original, fused, "--json")
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert list(said) == [
        "input", "output", "architecture", "layers", "fused", "skipped",
        "tensors_in", "tensors_out", "files", "bytes_copied", "bytes_cloned", "seconds",
    ]  # fmt: skip
    assert (said["input"], said["output"]) == (str(original), str(fused))
    assert said["files"] == [str(fused)]
    assert (said["architecture"], said["fused"], said["skipped"]) == ("llama", 7, 2)
    assert said["tensors_in"] - said["tensors_out"] == 14
    assert said["bytes_copied"] + said["bytes_cloned"] > 0.9 * original.stat().st_size
    assert [layer["layer"] for layer in said["layers"]] == [f"blk.{i}" for i in range(9)]
    assert said["layers"][0] == {
        "layer": "blk.0",
        "status": "skipped",
        "reason": "types differ: Q4_K, Q4_K, Q6_K",
        "types": ["Q4_K", "Q4_K", "Q6_K"],
        "rows": [256, 128, 128],
    }
    assert said["layers"][1]["status"] == "fused" and said["layers"][1]["reason"] is None
    said = json.loads(gguf_fuse("unfuse", fused, back, "--json").stdout)
    assert (said["fused"], said["skipped"], said["tensors_out"]) == (7, 0, said["tensors_in"] + 14)
    assert said["layers"][0]["rows"] == [256, 128, 128]


def test_json_where_nothing_is_to_be_done(model: Model, tmp_path: Path) -> None:
    original = model(n_embd=256, types={"*": T.Q4_K, "*.attn_v.weight": T.Q6_K})
    done = gguf_fuse("fuse", original, tmp_path / "out.gguf", "--json")
    assert done.returncode == 3
    said = json.loads(done.stdout)
    assert (said["output"], said["fused"], said["skipped"]) == (None, 0, 2)
    assert done.stderr.startswith("gguf-fuse: ") and done.stderr.count("\n") == 1


def test_json_where_nothing_is_to_be_unfused(model: Model, tmp_path: Path) -> None:
    original = model()
    done = gguf_fuse("unfuse", original, tmp_path / "out.gguf", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["output"] is None
    done = gguf_fuse("fuse", fused_copy(original), tmp_path / "out.gguf", "--json")
    assert done.returncode == 3
    assert {layer["reason"] for layer in json.loads(done.stdout)["layers"]} == {"already fused"}


def test_demo_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"precious")
    done = gguf_fuse("demo", "--keep", tmp_path)
    assert done.returncode == 1
    assert "exists already" in done.stderr
    assert (tmp_path / "model.gguf").read_bytes() == b"precious"


def test_demo_in_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    done = gguf_fuse("demo", "--keep", tmp_path / "file" / "folder")
    assert done.returncode == 1
    assert done.stderr == f"gguf-fuse: {tmp_path}/file/folder: Not a directory\n"


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


def statuses(path: Path) -> tuple[str, list[str]]:
    said = json.loads(gguf_fuse("inspect", path, "--json").stdout)
    assert list(said) == [
        "file", "version", "byte_order", "alignment", "architecture", "name", "n_tensors",
        "n_metadata", "file_bytes", "layers", "loader",
    ]  # fmt: skip
    return said["loader"], [layer["status"] for layer in said["layers"]]


def test_json_of_inspect(model: Model) -> None:
    mixed = {"*": T.Q4_K, "blk.0.attn_v.weight": T.Q6_K}
    original = model(n_embd=256, types=mixed)
    assert statuses(original) == ("reads fused", ["not fusable", "fusable"])
    assert statuses(fused_copy(original)) == ("reads fused", ["not fusable", "fused"])
    assert statuses(model(architecture="bitnet")) == ("needs separate", ["separate", "separate"])
    unknown = model(metadata={"general.architecture": "of-tomorrow"})
    assert statuses(unknown) == ("unknown", ["separate", "separate"])


def test_dry_run_says_what_the_real_run_does(model: Model, tmp_path: Path) -> None:
    original, output = model(), tmp_path / "out.gguf"
    said = json.loads(gguf_fuse("fuse", original, output, "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == [original]
    done = json.loads(gguf_fuse("fuse", original, output, "--json").stdout)
    assert said | {"seconds": 0} == done | {"seconds": 0, "files": []}


def test_json_names_the_shards(model: Model, tmp_path: Path) -> None:
    arguments = ("fuse", model(), tmp_path / "out.gguf", "--split-max-tensors", "9", "--json")
    files = json.loads(gguf_fuse(*arguments).stdout)["files"]
    assert files == sorted(str(path) for path in tmp_path.glob("out-*-of-*.gguf"))
    assert len(files) > 1


# -- what a person sees --------------------------------------------------------------------------


def test_layers_that_are_alike_share_a_line(model: Model, tmp_path: Path) -> None:
    original = model(n_layer=9, n_embd=256, types=MIXED)
    shown = gguf_fuse("fuse", original, tmp_path / "out.gguf").stdout.splitlines()
    assert re.match(r"blk\.1-7 +7 +Q4_K +256 \+ 128 \+ 128 +fused into attn_qkv", shown[1])
    assert re.match(r"blk\.0, 8 +2 +mixed +.* +left: types differ: Q4_K, Q4_K, Q6_K", shown[2])
    assert re.match(r"7 of 9 attention layers fused, \d+ tensors -> \d+; ", shown[4])


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(model: Model, tmp_path: Path, columns: int) -> None:
    original = model(n_layer=9, n_embd=256, types=MIXED)
    environment = {**os.environ, "COLUMNS": str(columns)}
    done = gguf_fuse("fuse", original, tmp_path / "out.gguf", env=environment)
    shown, _, command = done.stdout.rpartition("next: ")  # a line to copy is not broken
    assert command.startswith("gguf-fuse verify ")
    assert max(map(len, shown.splitlines())) <= columns


@pytest.mark.parametrize("columns", [30, 45, 60, 100])
def test_how_near_to_the_limit_is_always_shown(model: Model, columns: int) -> None:
    original = model()
    environment = {**os.environ, "COLUMNS": str(columns)}
    done = gguf_fuse("verify", original, fused_copy(original), env=environment)
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "limit" in done.stdout
    for line in done.stdout.splitlines():
        assert not line.startswith("blk.") or line.rstrip().endswith("%")


def test_the_next_command_can_be_pasted(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    model().rename(folder / "-in.gguf")
    fuse = [sys.executable, "-m", "gguf_fuse", "fuse", "--", "-in.gguf", "out.gguf"]
    shown = subprocess.run(fuse, cwd=folder, capture_output=True, text=True, check=True).stdout
    command = shown.rpartition("next: gguf-fuse ")[2].strip()
    assert command == "verify -- -in.gguf out.gguf"
    shown = gguf_fuse("fuse", folder / "-in.gguf", folder / "b.gguf").stdout
    command = shown.rpartition("next: gguf-fuse ")[2].strip()
    assert shlex.split(command) == ["verify", str(folder / "-in.gguf"), str(folder / "b.gguf")]


@pytest.mark.parametrize("sizes", [("--n-kv", 1 << 24), ("--n-prompt", 1 << 24)])
def test_more_than_the_memory_is_refused_beforehand(model: Model, sizes: tuple[str, int]) -> None:
    original = model()
    done = gguf_fuse("verify", original, fused_copy(original), *sizes, "--n-seqs", 5000)
    assert (done.returncode, done.stdout) == (1, "")
    line = (
        rf"gguf-fuse: {original}: blk.0: computing takes about \d+\.\d GB of memory, .* are free; "
    )
    assert re.match(line + "lower --n-prompt, --n-seqs or --n-kv\n$", done.stderr)


def test_too_little_memory_is_one_line(model: Model) -> None:
    """For this process alone, as in a container."""
    original = model()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (1 << 30, 1 << 30))
    files = original, fused_copy(original)
    done = gguf_fuse("verify", *files, "--n-kv", 1 << 20, preexec_fn=limit)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gguf-fuse: not enough memory: Unable to allocate")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--n-prompt", "--n-decode", "--n-seqs", "--n-kv"])
@pytest.mark.parametrize("value", [0, (1 << 24) + 1, 10**30])
def test_counts_have_limits(option: str, value: int) -> None:
    done = gguf_fuse("verify", "a.gguf", "b.gguf", option, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert option in done.stderr


def on_a_terminal(*arguments: Any, **environment: str) -> str:
    """All that the command writes to a terminal of 80 columns."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "gguf_fuse", *map(str, arguments)]
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    try:
        while data := os.read(master, 65536):
            shown += data
    except OSError:  # the terminal's other side is gone
        pass
    os.close(master)
    assert process.wait() == 0
    return shown.decode()


def test_dry_run_for_a_pipe_may_stand_on_a_terminal(model: Model) -> None:
    shown = on_a_terminal("fuse", model(), "-", "--dry-run")
    assert "2 of 2 attention layers" in shown and "GGUF" not in shown


def test_progress_and_colours_on_a_terminal_only(model: Model, tmp_path: Path) -> None:
    original = model(n_embd=512, n_layer=4)
    shown = on_a_terminal("fuse", original, tmp_path / "a.gguf", "--no-sync")
    bar = "\u2501\u2501\u2501"
    assert bar in shown and "\x1b[32m" in shown
    assert bar not in on_a_terminal("fuse", original, tmp_path / "b.gguf", "-q")
    plain = on_a_terminal("fuse", original, tmp_path / "c.gguf", NO_COLOR="1")
    assert bar in plain and "\x1b[32m" not in plain
    piped = gguf_fuse("fuse", original, tmp_path / "d.gguf")
    assert "\x1b" not in piped.stdout and piped.stderr == ""
