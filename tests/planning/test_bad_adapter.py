"""Adapters that are refused, and damaged records in fused ones: one clear line each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pack import (
    ARRAY,
    F32,
    INT64,
    Q4_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    A,
    Array,
    B,
    File,
    K,
    Pair,
    Q,
    Tensor,
    fused,
    lacking,
    lora,
    save,
    valid,
)
from tests.server import Run, assert_one_line

F64 = 28  # no quant: gguf-py knows its size alone


BAD_ADAPTERS = {
    "control vector": (lora().key("adapter.type", STRING, "other"), "only LoRA"),
    "no type": (File(lora().pairs[:2], lora().tensors), "only LoRA"),
    "type of the wrong type": (lora().key("adapter.type", UINT32, 1), "only LoRA"),
    "alpha of the wrong type": (lora().key("adapter.lora.alpha", STRING, "8"), "no float32"),
    "no B": (lacking(lora(), K + B), f"{K + A!r} has no lora_b"),
    "no A": (lacking(lora(), K + A), f"{K + B!r} has no lora_a"),
    "three dimensions": (lora().tensor(Q + A, ne=(32, 2, 2)), "3 dimensions"),
    "one dimension": (lora().tensor(Q + B, ne=(128,)), "1 dimensions"),
    "ranks differ": (lora().tensor(Q + B, ne=(2, 64)), "rank 4"),
    "row lengths differ": (
        lora().tensor(Q + A, ne=(16, 8)).tensor(Q + B, ne=(8, 16)),
        "row lengths",
    ),
    "unknown type": (lora(142), "type 142"),
    "type that cannot be decoded": (
        lora().tensor(Q + A, type=F64, data=bytes(8 * 32 * 4)),
        f"{Q + A!r} is of F64, which cannot be joined with others; convert the adapter to F16",
    ),
    "rows of K unknown": (
        lacking(lora(), *(f"blk.{i}.attn_k.weight{end}" for i in (0, 1) for end in (A, B))),
        "--base",
    ),
    "rows of K ambiguous": (
        lacking(lora(), Q + A, Q + B)
        .tensor("blk.1.attn_q.weight" + B, ne=(4, 31))
        .tensor("blk.1.attn_q.weight" + A, ne=(32, 4))
        .key("general.architecture", STRING, "bitnet"),
        "needs separate",
    ),
    "unknown architecture": (
        lora().key("general.architecture", STRING, "new"),
        "--any-architecture",
    ),
    "already fused, and again": (lora().key("gguf_fuse.version", UINT32, 1), "already"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_bad_adapter(case: str, run: Run, tmp_path: Path) -> None:
    file, reason = BAD_ADAPTERS[case]
    path = save(file, tmp_path / "in.gguf")
    outcome = run("fuse", path, tmp_path / "out")
    assert_one_line(outcome, str(path), reason, code=3 if case.startswith("already") else 1)
    assert list(tmp_path.iterdir()) == [path]


def test_adapter_and_its_base(run: Run, tmp_path: Path) -> None:
    path, out = save(lora(), tmp_path / "in.gguf"), tmp_path / "out"
    base = save(valid(), tmp_path / "base.gguf")
    other = save(valid(n_embd=64), tmp_path / "other.gguf")
    weight = f"{Q!r} is for 32 columns and 32 rows, but {other} has 64 columns and 64 rows there"
    assert_one_line(run("fuse", path, out, "--base", other), f"{path}: {weight}")
    assert_one_line(run("fuse", path, out, "--base", path), str(path), "general.type")
    assert_one_line(run("fuse", path, out, "--base", tmp_path / "no"), "No such file")
    assert_one_line(run("fuse", base, out, "--base", other), str(base), "--base is for")
    assert not out.exists()
    assert run("fuse", path, out, "--base", base).code == 0


def renamed_qkv() -> File:
    """The adapter of a fused base."""
    file = lacking(
        lora(), *(f"blk.{i}.attn_{p}.weight{end}" for i in "01" for p in "kv" for end in (A, B))
    )
    for layer in (0, 1):
        old, new = f"blk.{layer}.attn_q.weight", f"blk.{layer}.attn_qkv.weight"
        file.tensor(old + A, name=new + A).tensor(
            old + B, name=new + B, ne=(4, 64), data=bytes(1024)
        )
    return file


MISFITS: dict[str, tuple[File, File, str]] = {
    "architecture": (
        lora().key("general.architecture", STRING, "qwen2"),
        valid(),
        "is for the architecture 'qwen2', but {base} is of 'llama'",
    ),
    "columns": (
        lora().tensor(K + A, ne=(64, 2)),
        valid(),
        f"{K!r} is for 64 columns and 16 rows, but {{base}} has 32 columns and 16 rows there",
    ),
    "rows, of a fused base": (
        lora().tensor(K + B, ne=(2, 32)),
        fused(valid()),
        f"{K!r} is for 32 columns and 32 rows, but {{base}} has 32 columns and 16 rows there",
    ),
    "fused, of a separate base": (
        renamed_qkv(),
        valid(n_embd=64),
        "'blk.0.attn_qkv.weight' is for 32 columns and 64 rows, but {base} has 64 columns and 128",
    ),
    "a layer too many": (
        lora(),
        valid(n_layers=1),
        "changes 'blk.1.attn_q.weight', but {base} does not have it",
    ),
    "another weight": (
        replace(
            lora(),
            tensors=[
                *lora().tensors,
                *(
                    Tensor(f"output_norm.weight{end}", ne, F32, bytes(4 * 33))
                    for end, ne in ((A, (33, 1)), (B, (1, 33)))
                ),
            ],
        ),
        valid(),
        "'output_norm.weight' is for 33 columns and 33 rows, but {base} has 33 columns and 1 rows",
    ),
    "the embedding": (
        replace(
            lora(),
            tensors=[
                *lora().tensors,
                *(
                    Tensor(f"token_embd.weight{end}", ne, F32, bytes(8 * ne[1]))
                    for end, ne in ((A, (2, 32)), (B, (2, 3)))
                ),
            ],
        ),
        valid(),
        "'token_embd.weight' is for 3 columns and 32 rows, but {base} has 32 columns and 3 rows",
    ),
}


@pytest.mark.parametrize(("file", "base", "words"), MISFITS.values(), ids=MISFITS)
def test_a_base_that_the_adapter_is_not_for(
    run: Run, tmp_path: Path, file: File, base: File, words: str
) -> None:
    path, model = save(file, tmp_path / "in.gguf"), save(base, tmp_path / "base.gguf")
    done = run("fuse", path, tmp_path / "out", "--base", model)
    assert_one_line(done, f"{path}: {words.format(base=model)}", "--base wants the model")


def test_an_adapter_of_the_embedding_fits(run: Run, tmp_path: Path) -> None:
    """llama-adapter.cpp: A and B are the other way round there."""
    file = lora()
    for end, ne in ((A, (2, 3)), (B, (2, 32))):
        file.tensors.append(Tensor(f"token_embd.weight{end}", ne, F32, bytes(4 * ne[0] * ne[1])))
    path, model = save(file, tmp_path / "in.gguf"), save(valid(), tmp_path / "base.gguf")
    assert run("fuse", path, tmp_path / "out", "--base", model).code == 0


NAMES = ["blk.0.attn_qkv.weight", "blk.1.attn_qkv.weight"]


def fused_lora() -> File:
    """What gguf-fuse makes of `lora()`."""
    file = lora()
    rows, ranks = [32, 16, 16] * 2, [4] * 6
    positions = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    for key, value_type, items in (
        ("tensors", STRING, NAMES),
        ("rows", UINT64, rows),
        ("ranks", UINT64, ranks),
        ("types", INT64, [F32] * 12),
        ("positions", INT64, positions),
        ("stored", INT64, [-1] * 12),
    ):
        file.key(f"gguf_fuse.{key}", ARRAY, Array(value_type, items))
    file.pairs.insert(4, Pair("gguf_fuse.version", UINT32, 1))
    file.tensors = []
    for name in NAMES:
        file.tensors += [Tensor(name + A, (32, 16), F32, bytes(4 * 32 * 16))]
        file.tensors += [Tensor(name + B, (16, 64), F32, bytes(4 * 16 * 64))]
    return file


def test_what_the_damaged_adapters_would_be(run: Run, tmp_path: Path) -> None:
    path, out = save(lora(), tmp_path / "in.gguf"), tmp_path / "out"
    assert run("fuse", path, out).code == 0
    assert out.read_bytes() == fused_lora().pack()
    assert run("unfuse", out, tmp_path / "back").code == 0
    assert (tmp_path / "back").read_bytes() == lora().pack()


DAMAGED_RECORDS: dict[str, tuple[str, int, Any]] = {
    "version": ("version", UINT32, 2),
    "no name": ("tensors", ARRAY, Array(STRING, [])),
    "a name twice": ("tensors", ARRAY, Array(STRING, NAMES[:1] * 2)),
    "another name": (
        "tensors",
        ARRAY,
        Array(STRING, ["blk.0.attn_qkv.weight", "blk.7.attn_qkv.weight"]),
    ),
    "no attn_qkv": ("tensors", ARRAY, Array(STRING, [NAMES[0], "token_embd.weight"])),
    "names of the wrong type": ("tensors", ARRAY, Array(UINT8, [1, 2])),
    "rows too few": ("rows", ARRAY, Array(UINT64, [32, 16])),
    "rows that do not add up": ("rows", ARRAY, Array(UINT64, [32, 16, 17] * 2)),
    "no rows": ("rows", ARRAY, Array(UINT64, [32, 32, 0] * 2)),
    "rows as a string": ("rows", STRING, "32"),
    "ranks too large": ("ranks", ARRAY, Array(UINT64, [4, 4, 9] * 2)),
    "ranks huge": ("ranks", ARRAY, Array(UINT64, [1 << 63, 4, 4] * 2)),
    "negative ranks": ("ranks", ARRAY, Array(INT64, [-4, 8, 8] * 2)),
    "no ranks": ("ranks", ARRAY, Array(UINT64, [0] * 6)),
    "unknown type": ("types", ARRAY, Array(INT64, [142] * 12)),
    "quantized type": ("types", ARRAY, Array(INT64, [Q4_0] * 12)),
    "negative type": ("types", ARRAY, Array(INT64, [-1] * 12)),
    "a place twice": ("positions", ARRAY, Array(INT64, [0] * 12)),
    "a place that is none": ("positions", ARRAY, Array(INT64, [*range(11), 99])),
    "a negative place": ("positions", ARRAY, Array(INT64, [*range(11), -1])),
    "stored nowhere": ("stored", ARRAY, Array(INT64, [0] * 12)),
    "stored before": ("stored", ARRAY, Array(INT64, [-2] * 12)),
}


@pytest.mark.parametrize("case", DAMAGED_RECORDS)
def test_damaged_record_of_an_adapter(case: str, run: Run, tmp_path: Path) -> None:
    key, value_type, value = DAMAGED_RECORDS[case]
    path = save(fused_lora().key(f"gguf_fuse.{key}", value_type, value), tmp_path / "in.gguf")
    assert_one_line(run("unfuse", path, tmp_path / "out"), str(path), "record of the fusion")
    assert list(tmp_path.iterdir()) == [path]


def test_a_recorded_type_whose_blocks_no_row_fills(run: Run, tmp_path: Path) -> None:
    """Said to be kept whole, in Q4_0, though B has rows of 4."""
    file = fused_lora().key(
        "gguf_fuse.types", ARRAY, Array(INT64, [F32, F32, F32, Q4_0, Q4_0, Q4_0] * 2)
    )
    file.key("gguf_fuse.stored", ARRAY, Array(INT64, [-1, -1, -1, 0, 0, 0] * 2))
    path = save(file, tmp_path / "in.gguf")
    words = ("gguf_fuse.types has 2 for rows of 4", "record of the fusion")
    assert_one_line(run("unfuse", path, tmp_path / "out"), str(path), *words)
    assert list(tmp_path.iterdir()) == [path]


def test_adapter_fused_elsewhere(run: Run, tmp_path: Path) -> None:
    file = fused_lora()
    path = save(File(file.pairs[:4], file.tensors), tmp_path / "in.gguf")
    assert_one_line(run("unfuse", path, tmp_path / "out"), str(path), "no record")
    assert list(tmp_path.iterdir()) == [path]
