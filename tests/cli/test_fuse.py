"""fuse, as a person and a script meet it; and unfuse beside it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from tests.conftest import fused_copy, gguf_fuse
from tests.shards import in_three, shard_paths
from tests.terminal import on_a_terminal

Model = Callable[..., Path]

MIXED = {"*": T.Q4_K, "blk.[08].attn_v.weight": T.Q6_K}


def test_json_of_fuse_and_unfuse(model: Model, tmp_path: Path) -> None:
    original = model(n_layer=9, n_embd=256, n_head_kv=2, types=MIXED)
    fused, back = tmp_path / "out.gguf", tmp_path / "back.gguf"
    done = gguf_fuse("fuse", original, fused, "--json")
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert (said["command"], said["exit_code"], said["error"]) == ("fuse", 0, None)
    assert (said["input"], said["output"]) == (str(original), str(fused))
    assert said["bytes_in"] == original.stat().st_size
    assert said["bytes_out"] == fused.stat().st_size
    assert said["files"] == [str(fused)]
    assert said["architecture"] == "llama"
    assert (said["layers_fused"], said["layers_skipped"]) == (7, 2)
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
    assert (said["layers_split"], said["layers_skipped"]) == (7, 0)
    assert said["tensors_out"] == said["tensors_in"] + 14
    assert said["layers"][0]["rows"] == [256, 128, 128]
    assert {layer["status"] for layer in said["layers"]} == {"split"}


def test_json_where_nothing_is_to_be_done(model: Model, tmp_path: Path) -> None:
    original = model(n_embd=256, types={"*": T.Q4_K, "*.attn_v.weight": T.Q6_K})
    done = gguf_fuse("fuse", original, tmp_path / "out.gguf", "--json")
    assert done.returncode == 3
    said = json.loads(done.stdout)
    assert (said["output"], said["layers_fused"], said["layers_skipped"]) == (None, 0, 2)
    assert said["exit_code"] == 3
    assert done.stderr == f"gguf-fuse: {said['error']}\n"


def test_json_where_nothing_is_to_be_unfused(model: Model, tmp_path: Path) -> None:
    original = model()
    done = gguf_fuse("unfuse", original, tmp_path / "out.gguf", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["output"] is None
    done = gguf_fuse("fuse", fused_copy(original), tmp_path / "out.gguf", "--json")
    assert done.returncode == 3
    assert {layer["reason"] for layer in json.loads(done.stdout)["layers"]} == {"already fused"}


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
    lines = done.stdout.splitlines()
    to_copy = [line for line in lines if ": gguf-fuse " in line]  # these are not broken
    assert to_copy[-1].startswith("next: gguf-fuse verify ")
    assert all(len(line) <= columns for line in lines if line not in to_copy)


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


def test_dry_run_says_would_be_and_needs_no_output(model: Model, tmp_path: Path) -> None:
    original = model(n_layer=9, n_embd=256, types=MIXED)
    beside = tmp_path / "in-fused.gguf"
    shown = gguf_fuse("fuse", original, "--dry-run").stdout
    assert "blk.1-7   7  Q4_K   256 + 128 + 128  would be fused into attn_qkv\n" in shown
    assert "  would be left: types differ: Q4_K, Q4_K, Q6_K\n" in shown
    assert re.search(r"\n7 of 9 attention layers would be fused, 84 tensors -> 70; ", shown)
    assert f"3.1 MB would be written to {beside}\n" in shown
    assert list(tmp_path.iterdir()) == [original]
    shown = gguf_fuse("unfuse", fused_copy(original), tmp_path / "back", "--dry-run").stdout
    assert "would be split into" in shown and " be written to " in shown


def test_output_beside_the_input(model: Model, tmp_path: Path) -> None:
    original, beside = model(), tmp_path / "in-fused.gguf"
    done = gguf_fuse("--fuse-qkv-weights", original)
    assert done.returncode == 0
    assert done.stdout.startswith(f"OUT: {beside}\nlayers ")
    assert done.stdout.endswith(f"next: gguf-fuse verify {original} {beside}\n")
    beside.write_text("precious")
    again = gguf_fuse("--fuse-qkv-weights", original)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"gguf-fuse: {beside}: exists already; --force replaces it\n"
    assert gguf_fuse("--fuse-qkv-weights", original, "--force").returncode == 2
    assert beside.read_text() == "precious"


def test_output_beside_shards(model: Model, tmp_path: Path) -> None:
    parts = in_three(model())
    done = gguf_fuse("fuse", parts[1], "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    fused = shard_paths(tmp_path / "in-fused", 3)
    assert all(path.exists() for path in fused)
    assert gguf_fuse("verify", parts[0], fused[0], "--structure-only").returncode == 0


def test_fuse_and_verify_in_one(model: Model, tmp_path: Path) -> None:
    original = model()
    done = gguf_fuse("fuse", original, tmp_path / "out.gguf", "--verify")
    assert done.returncode == 0
    assert "attention layers fused" in done.stdout and "next:" not in done.stdout
    verified = gguf_fuse("verify", original, tmp_path / "out.gguf").stdout
    assert verified.split()[0] in done.stdout
    quiet = gguf_fuse("fuse", original, tmp_path / "out.gguf", "-f", "-q", "--verify")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


# A writer with a fault: the last byte of each file is another one.
SPOILED = """
from gguf_fuse import cli
from gguf_fuse.writing import publish
rename = publish.os.replace
def spoil(source, target):
    with open(source, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    rename(source, target)
publish.os.replace = spoil
publish.os.link = lambda source, target: (spoil(source, target + "x"), rename(target + "x", target))
cli.main()
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_what_does_not_verify_ends_as_verify_does(
    model: Model, tmp_path: Path, as_json: bool
) -> None:
    arguments = ["fuse", model(), tmp_path / "out.gguf", "--force", "--verify", "--no-sync"]
    command = [sys.executable, "-c", SPOILED, *map(str, arguments), *["--json"] * as_json]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("gguf-fuse: verification failed: ")
    assert done.stderr.count("\n") == 1
    if as_json:
        said = json.loads(done.stdout)
        assert (said["command"], said["exit_code"], said["layers_fused"]) == ("fuse", 4, 2)
        assert done.stderr == f"gguf-fuse: {said['error']}\n"


def test_unfuse_says_what_to_run_next(model: Model, tmp_path: Path) -> None:
    fused, back = fused_copy(model()), tmp_path / "back.gguf"
    shown = gguf_fuse("unfuse", fused, back).stdout
    assert shown.endswith(f"\nnext: gguf-fuse verify {back} {fused}\n")


def test_a_name_that_cannot_be_shown_makes_no_command(model: Model, tmp_path: Path) -> None:
    original = model().rename(tmp_path / "a\nb.gguf")
    for arguments in (["inspect", original], ["fuse", original, tmp_path / "out.gguf"]):
        done = gguf_fuse(*arguments)
        assert done.returncode == 0
        assert "next:" not in done.stdout


def test_no_line_ends_in_spaces(model: Model, tmp_path: Path) -> None:
    original = model(n_layer=9, n_embd=256, types=MIXED)
    for arguments in (["inspect", original], ["inspect", tmp_path], ["fuse", original]):
        shown = gguf_fuse(*arguments, env={**os.environ, "COLUMNS": "60"}).stdout
        assert shown and not re.search(r" +$", shown, re.MULTILINE)
