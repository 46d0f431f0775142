"""Importance matrices that are refused, and damaged records in fused ones: one clear line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pack import (
    ARRAY,
    QKV,
    STRING,
    UINT32,
    UINT64,
    Array,
    K,
    Pair,
    Q,
    V,
    lacking,
    matrix,
    save,
)
from tests.server import Run, assert_one_line

BAD_MATRICES = {
    "no counts": (lacking(matrix(Q, K, V), f"{K}.counts"), "has no counts"),
    "no sums": (lacking(matrix(Q, K, V), f"{K}.in_sum2"), "has no in_sum2"),
    "no float32": (matrix(Q, K, V).tensor(f"{K}.counts", type=26), "is of I32"),
    "shapes differ": (matrix(Q, K, V).tensor(f"{K}.in_sum2", ne=(16, 2)), "blk.0: in_sum2"),
    "both": (matrix(Q, K, V, QKV, "blk.0.attn_output.weight"), "has an entry already"),
    "the old format": (b"\x10\0\0\0\x13\0\0\0blk.0.attn_k.weight" + bytes(64), "not a GGUF file"),
}


@pytest.mark.parametrize("case", BAD_MATRICES)
def test_bad_importance_matrix(case: str, run: Run, tmp_path: Path) -> None:
    content, reason = BAD_MATRICES[case]
    path = save(content, tmp_path / "in.gguf")
    assert_one_line(run("fuse", path, tmp_path / "out"), str(path), reason)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("version", Pair("", UINT32, 7), "is 7, this release knows 1"),
        ("tensors", Pair("", ARRAY, Array(STRING, [f"{QKV}.counts"])), "6 numbers, not 3"),
        (
            "tensors",
            Pair("", ARRAY, Array(STRING, [f"{QKV}.in_sum2", "blk.7.attn_qkv.weight.counts"])),
            "'blk.7.attn_qkv.weight.counts' is recorded, which the file does not have",
        ),
        ("positions", Pair("", ARRAY, Array(UINT64, [0, 2, 4])), "3 numbers, not 6"),
        ("positions", Pair("", ARRAY, Array(UINT64, [0, 2, 4, 1, 3, 99])), "among 6 tensors"),
        ("positions", Pair("", ARRAY, Array(UINT64, [0, 2, 4, 0, 3, 5])), "a number twice"),
        ("positions", Pair("", STRING, "0"), "missing or of the wrong type"),
    ],
)
def test_damaged_record_of_an_importance_matrix(
    key: str, value: Pair, problem: str, run: Run, tmp_path: Path
) -> None:
    path, fused_path = save(matrix(Q, K, V), tmp_path / "in.gguf"), tmp_path / "fused"
    assert run("fuse", path, fused_path).code == 0
    file = matrix(QKV)
    file.key("gguf_fuse.version", UINT32, 1)
    file.key("gguf_fuse.tensors", ARRAY, Array(STRING, [f"{QKV}.in_sum2", f"{QKV}.counts"]))
    file.key("gguf_fuse.positions", ARRAY, Array(UINT64, [0, 2, 4, 1, 3, 5]))
    assert fused_path.read_bytes() == file.pack()
    save(file.key(f"gguf_fuse.{key}", value.value_type, value.value), fused_path)
    outcome = run("unfuse", fused_path, tmp_path / "out")
    assert_one_line(outcome, str(fused_path), problem, "record of the fusion")
    assert not (tmp_path / "out").exists()
