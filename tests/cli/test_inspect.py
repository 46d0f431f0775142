"""inspect, as a person and a script meet it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from tests.conftest import fused_copy, gguf_fuse
from tests.planning.test_imatrix import imatrix, save
from tests.server import Run
from tests.shards import in_three

Model = Callable[..., Path]

MIXED = {"*": T.Q4_K, "blk.[08].attn_v.weight": T.Q6_K}


def statuses(path: Path) -> tuple[str, list[str]]:
    said = json.loads(gguf_fuse("inspect", path, "--json").stdout)
    assert (said["input"], said["gguf_version"]) == (str(path), 3)
    assert said["bytes_in"] == path.stat().st_size
    return said["loader"], [layer["status"] for layer in said["layers"]]


def test_json_of_inspect(model: Model) -> None:
    mixed = {"*": T.Q4_K, "blk.0.attn_v.weight": T.Q6_K}
    original = model(n_embd=256, types=mixed)
    assert statuses(original) == ("reads fused", ["not fusable", "fusable"])
    assert statuses(fused_copy(original)) == ("reads fused", ["not fusable", "fused"])
    assert statuses(model(architecture="bitnet")) == ("needs separate", ["separate", "separate"])
    unknown = model(metadata={"general.architecture": "of-tomorrow"})
    assert statuses(unknown) == ("unknown", ["separate", "separate"])


def test_one_file(model: Model, run: Run) -> None:
    original = model(n_layer=9, n_embd=256, types=MIXED)
    shown = run("inspect", original).out.splitlines()
    assert "blk.0, 8  2  mixed  256 + 128 + 128  not fusable: V is Q6_K" in shown
    assert shown[-3] == "7 of 9 attention layers fusable: V is Q6_K in 2"
    fused = original.with_name("in-fused.gguf")
    assert shown[-1] == f"next: gguf-fuse --fuse-qkv-weights {original} {fused}"
    assert run(*shlex.split(shown[-1].removeprefix("next: gguf-fuse "))).code == 0
    shown = run("inspect", fused).out.splitlines()
    assert shown[-2:] == [
        "7 of 9 attention layers fused",
        "2 of 9 attention layers left: V is Q6_K",
    ]


def test_parts_that_all_differ_are_all_named(model: Model, run: Run) -> None:
    types = {"*_q.weight": T.Q4_0, "*_k.weight": T.Q5_0, "*_v.weight": T.Q8_0}
    shown = run("inspect", model(types=types)).out
    assert "\n0 of 2 attention layers fusable: Q is Q4_0, K is Q5_0, V is Q8_0\n" in shown
    assert "next:" not in shown


def test_what_no_loader_reads_has_no_next(model: Model, run: Run) -> None:
    shown = run("inspect", model(architecture="bitnet")).out
    assert shown.endswith("\n0 of 2 attention layers fusable\n")


def test_a_matrix_has_no_loader(run: Run, tmp_path: Path) -> None:
    shown = run("inspect", save(imatrix(), tmp_path)).out
    assert "2 of 2 attention layers fusable" in shown
    for word in ("\nloader", "llama.cpp", "next:"):
        assert word not in shown


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_loader_line_is_indented(model: Model, columns: int) -> None:
    shown = gguf_fuse("inspect", model(), env={**os.environ, "COLUMNS": str(columns)}).stdout
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns or lines[-1].startswith("next: ")
    at = next(at for at, line in enumerate(lines) if line.startswith("loader       llama.cpp"))
    assert "(April 2026)" in " ".join(lines[at : at + 3])
    assert columns == 120 or lines[at + 1].startswith(
        " " * 13 + "(m" if columns == 80 else " " * 13
    )


@pytest.fixture
def folder(model: Model, tmp_path: Path) -> Path:
    """Two models, one of them in shards, one in a folder inside, and a file that is none."""
    in_three(model("whole.gguf"), "set")
    (tmp_path / "whole.gguf").unlink()
    (tmp_path / "deep").mkdir()
    model("deep/mixed.gguf", n_layer=9, n_embd=256, types=MIXED)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_text("no model")
    return tmp_path


def test_a_folder(folder: Path, run: Run) -> None:
    done = run("inspect", folder)
    assert done.code == 1
    first, *_, last = done.err.splitlines()
    assert first.startswith(f"gguf-fuse: {folder}/bad.gguf: ")
    assert last == "gguf-fuse: 1 of 3 files cannot be read"
    lines = [line.split("  ") for line in done.out.splitlines()]
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    assert cells[0] == ["file", "architecture", "size", "types", "llama.cpp", "layers"]
    deep, shards = (
        ["llama", "3.1 MB", "Q4_K, Q6_K", "reads fused", "7 of 9 fusable: V is Q6_K in 2"],
        ["llama", "469.3 kB", "F32", "reads fused", "2 of 2 fusable"],
    )
    assert cells[1] == [f"{folder}/deep/mixed.gguf", *deep]
    assert cells[2] == [f"{folder}/set-00001-of-00003.gguf", *shards]
    assert done.out.endswith("\n2 files, 3.6 MB; 2 can be fused\n")


def test_several_files_on_a_narrow_terminal(folder: Path) -> None:
    arguments = ("inspect", folder / "deep/mixed.gguf", folder / "set-00002-of-00003.gguf")
    shown = gguf_fuse(*arguments, env={**os.environ, "COLUMNS": "60"}).stdout
    assert max(map(len, shown.splitlines())) <= 60
    words = " ".join(shown.split())
    assert "mixed.gguf llama 3.1 MB Q4_K, Q6_K reads fused 7 of 9 fusable: V is Q6_K in 2" in words


def test_json_of_several(folder: Path, run: Run) -> None:
    done = run("inspect", folder, "--json")
    said = json.loads(done.out)
    assert (said["exit_code"], said["error"]) == (1, "1 of 3 files cannot be read")
    mixed, shards, bad = said["inputs"]
    assert (mixed["layers_fusable"], shards["layers_fusable"]) == (7, 2)
    assert bad == {"input": f"{folder}/bad.gguf", "error": done.err.splitlines()[0][11:]}


def test_a_folder_without_models(run: Run, tmp_path: Path) -> None:
    done = run("inspect", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert done.err == f"gguf-fuse: {tmp_path}: no *.gguf file in it\n"
