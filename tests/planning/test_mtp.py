"""Layers that predict further tokens (MTP): where llama.cpp reads them fused alone, they stay.

Read in llama.cpp's src/models/mimo2.cpp: "MIMO2 MTP requires fused attn_qkv".
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from gguf_fuse.planning.plan import NothingToDo
from tests.compare import sha256
from tests.conftest import fused_copy, unfused_copy
from tests.pack import STRING, UINT32, File, fused, save, valid
from tests.server import Run

REASON = "MTP (prediction of further tokens) of {} reads fused attn_qkv alone"


def of(architecture: str, n_mtp: int | None, n_layers: int = 3) -> File:
    """`valid()` of another architecture; its last layers predict further tokens."""
    file = valid(n_layers=n_layers)
    file.pairs = [
        replace(pair, key=str(pair.key).replace("llama.", f"{architecture}."))
        for pair in file.pairs
    ]
    file.key("general.architecture", STRING, architecture)
    if n_mtp is not None:
        file.key(f"{architecture}.nextn_predict_layers", UINT32, n_mtp)
    return file


def by_converter(file: File) -> File:
    return replace(fused(file), pairs=file.pairs)


def names(path: Path) -> set[str]:
    return {tensor.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("n_mtp", "kept"), [(None, ()), (0, ()), (1, (2,)), (2, (1, 2))])
def test_unfuse_leaves_them(
    tmp_path: Path, run: Run, n_mtp: int | None, kept: tuple[int, ...]
) -> None:
    path = save(by_converter(of("mimo2", n_mtp)), tmp_path / "in.gguf")
    for output in ("table", "json"):
        done = run("unfuse", path, tmp_path / output, *(["--json"] if output == "json" else []))
        assert done.code == 0, done.err
        stay = {f"blk.{layer}.attn_qkv.weight" for layer in kept}
        assert {name for name in names(tmp_path / output) if "qkv" in name} == stay
        if output == "table":
            assert (REASON.format("mimo2") in done.out) == bool(kept)
            continue
        answer = json.loads(done.out)
        left = [layer for layer in answer["layers"] if layer["status"] == "skipped"]
        assert [layer["layer"] for layer in left] == [f"blk.{layer}" for layer in kept]
        assert {layer["reason"] for layer in left} <= {REASON.format("mimo2")}
        assert (answer["layers_split"], answer["layers_skipped"]) == (3 - len(kept), len(kept))


def test_our_own_fusion_comes_back(tmp_path: Path) -> None:
    original = save(of("mimo2", 1), tmp_path / "in.gguf")
    fused = fused_copy(original)
    assert {name for name in names(fused) if "qkv" in name} == {
        f"blk.{layer}.attn_qkv.weight" for layer in range(3)
    }
    assert sha256(unfused_copy(fused)) == sha256(original)


def test_nothing_else_to_unfuse(tmp_path: Path, run: Run) -> None:
    path = save(by_converter(of("mimo2", 1, n_layers=1)), tmp_path / "in.gguf")
    with pytest.raises(NothingToDo, match=r"nothing to unfuse: blk\.0: MTP"):
        unfused_copy(path)
    done = run("unfuse", path, tmp_path / "out", "--json")
    assert done.code == 3
    assert [layer["layer"] for layer in json.loads(done.out)["layers"]] == ["blk.0"]


def test_asked_for_they_are_split(tmp_path: Path) -> None:
    path = save(by_converter(of("mimo2", 1)), tmp_path / "in.gguf")
    assert not [name for name in names(unfused_copy(path, any_architecture=True)) if "qkv" in name]


@pytest.mark.parametrize("architecture", ["glm4moe", "step35", "qwen35moe", "exaone-moe"])
def test_others_read_both(tmp_path: Path, architecture: str) -> None:
    file = of(architecture, 1)
    if architecture == "qwen35moe":  # Q with a gate: twice the rows
        file.key(f"{architecture}.attention.head_count", UINT32, 2)
        file.key(f"{architecture}.attention.key_length", UINT32, 8)
        file.key(f"{architecture}.attention.value_length", UINT32, 8)
    path = save(by_converter(file), tmp_path / "in.gguf")
    assert not [name for name in names(unfused_copy(path)) if "qkv" in name]
