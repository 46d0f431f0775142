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
from tests.terminal import on_a_terminal

Model = Callable[..., Path]

MIXED = {"*": T.Q4_K, "blk.[08].attn_v.weight": T.Q6_K}


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
