"""Hostile records, and fused files without one: refused with one line, or split as they must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gguf_fuse import GGUFError
from tests.conftest import unfused_copy
from tests.pack import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    INT64,
    Q4_0,
    QKV,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Array,
    File,
    Q,
    deep,
    fused,
    save,
    tensor,
    unrecorded,
    valid,
)
from tests.server import Run, assert_cheap, assert_one_line

SECOND = "blk.1.attn_qkv.weight"


def record(key: str, value_type: int, value: object) -> Callable[[], File]:
    return lambda: fused(valid()).key(f"gguf_fuse.{key}", value_type, value)


def rows(*numbers: int, value_type: int = UINT64) -> Callable[[], File]:
    return record("rows", ARRAY, Array(value_type, [*numbers, 32, 16, 16]))


def positions(*numbers: int, value_type: int = UINT64) -> Callable[[], File]:
    return record("positions", ARRAY, Array(value_type, [*numbers, 5, 6, 7]))


def names(*texts: str) -> Callable[[], File]:
    return record("tensors", ARRAY, Array(STRING, texts))


def without(key: str) -> Callable[[], File]:
    file = fused(valid())
    return lambda: replace(file, pairs=[p for p in file.pairs if p.key != f"gguf_fuse.{key}"])


def beside(name: str) -> Callable[[], File]:
    file = fused(valid())
    return lambda: replace(file, tensors=[*file.tensors, tensor(name, (32, 32))])


def _flat_quantized() -> File:
    """One row of 96 elements in 3 blocks: no row of its own to split."""
    flat = tensor(QKV, (96,), Q4_0)
    file = fused(valid()).tensor(QKV, ne=flat.ne, type=Q4_0, data=flat.data)
    return file.key("gguf_fuse.rows", ARRAY, Array(UINT64, [48, 24, 24, 32, 16, 16]))


RECORDS: dict[str, tuple[tuple[str, ...], Callable[[], File]]] = {
    "rows too many": ((QKV, "64", "33, 16, 16"), rows(33, 16, 16)),
    "rows too few": ((QKV, "64", "31, 16, 16"), rows(31, 16, 16)),
    "a row count of 0": ((QKV, "64", "64, 0, 0"), rows(64, 0, 0)),
    "negative rows that add up": ((QKV, "-16"), rows(48, 32, -16, value_type=INT64)),
    "huge rows": ((QKV, str(2**64 - 1)), rows(2**64 - 1, 16, 16)),
    "rows that add up modulo 2^64": ((QKV, str(2**63)), rows(2**63, 2**63, 64)),
    "rows are floats": (("gguf_fuse.rows",), rows(32, 16, 16, value_type=FLOAT32)),
    "rows are flags": (("gguf_fuse.rows",), rows(1, 1, 1, value_type=BOOL)),
    "five rows": (("gguf_fuse.rows", "5"), rows(32, 16)),
    "seven rows": (("gguf_fuse.rows", "7"), rows(32, 16, 8, 8)),
    "rows are one number": (("gguf_fuse.rows",), record("rows", UINT64, 32)),
    "rows are arrays": (("gguf_fuse.rows",), record("rows", ARRAY, deep(2))),
    "no rows": (("gguf_fuse.rows",), without("rows")),
    "no positions": (("gguf_fuse.positions",), without("positions")),
    "no names": (("gguf_fuse.tensors",), without("tensors")),
    "a position twice": (("gguf_fuse.positions",), positions(1, 2, 2)),
    "a position twice in two layers": (("gguf_fuse.positions",), positions(1, 2, 5)),
    "a position beyond the end": (("gguf_fuse.positions", "10"), positions(1, 2, 10)),
    "a huge position": (("gguf_fuse.positions",), positions(1, 2, 2**64 - 1)),
    "a negative position": (("gguf_fuse.positions",), positions(1, 2, -1, value_type=INT64)),
    "five positions": (("gguf_fuse.positions", "5"), positions(1, 2)),
    "positions are floats": (("gguf_fuse.positions",), positions(1, 2, 3, value_type=FLOAT32)),
    "a name twice": (("gguf_fuse.tensors", "twice"), names(QKV, QKV)),
    "a name that is not there": (
        ("blk.7.attn_qkv.weight",),
        names("blk.7.attn_qkv.weight", SECOND),
    ),
    "a name that is not fused": (("output_norm.weight",), names("output_norm.weight", SECOND)),
    "an empty name": (("gguf_fuse.tensors",), names("", SECOND)),
    "a name with escapes": ((r"\x1b",), names("\x1b[2J\n.attn_qkv.weight", SECOND)),
    "a name of 60,000 bytes": (("gguf_fuse.tensors",), names("x" * 60_000, SECOND)),
    "one name for two layers": (("gguf_fuse.rows",), names(QKV)),
    "names are numbers": (
        ("gguf_fuse.tensors",),
        record("tensors", ARRAY, Array(UINT32, [1, 2])),
    ),
    "names are one string": (("gguf_fuse.tensors",), record("tensors", STRING, QKV)),
    "version 0": (("gguf_fuse.version", "0"), record("version", UINT32, 0)),
    "version 3": (("gguf_fuse.version", "3"), record("version", UINT32, 3)),
    "version is a string": (("gguf_fuse.version",), record("version", STRING, "1")),
    "version is a long array": (
        ("gguf_fuse.version",),
        record("version", ARRAY, Array(UINT8, bytes(100_000))),
    ),
    "version with escapes": (("gguf_fuse.version",), record("version", STRING, "\x1b[2J\n")),
    "attn_q beside the fused tensor": ((repr(Q),), beside(Q)),
    "attn_v beside the fused tensor": (
        (repr("blk.1.attn_v.weight"),),
        beside("blk.1.attn_v.weight"),
    ),
    "a fused tensor without dimensions": (
        (QKV,),
        lambda: fused(valid()).tensor(QKV, ne=(), data=bytes(4)),
    ),
    "a quantized fused tensor of one row": ((QKV,), _flat_quantized),
    "a fused tensor of unknown type": (
        (QKV, "type 999"),
        lambda: fused(valid()).tensor(QKV, type=999),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_hostile_record(name: str, run: Run, tmp_path: Path) -> None:
    words, make = RECORDS[name]
    path = save(make(), tmp_path / "evil.gguf")
    before = path.read_bytes()
    outcome = run("unfuse", path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path], "an unfused file was written"
    assert_one_line(outcome, str(path), *words)
    assert_cheap(outcome)
    assert path.read_bytes() == before
    assert "Traceback" not in run("inspect", path).err
    assert "Traceback" not in run("fuse", path, tmp_path / "out", "--dry-run").err


def test_a_record_without_its_version(run: Run, tmp_path: Path) -> None:
    """Refused, or split by the head counts: not half of each."""
    path, out = save(without("version")(), tmp_path / "in.gguf"), tmp_path / "out"
    if run("unfuse", path, out).code == 0:
        assert out.read_bytes() == valid().pack()
    else:
        assert not out.exists()


def test_an_empty_record_beside_fused_tensors(run: Run, tmp_path: Path) -> None:
    file = fused(valid()).key("gguf_fuse.tensors", ARRAY, Array(STRING))
    for key in ("rows", "positions"):
        file.key(f"gguf_fuse.{key}", ARRAY, Array(UINT64))
    outcome = run("unfuse", save(file, tmp_path / "evil.gguf"), tmp_path / "out")
    assert outcome.code in (1, 3)
    assert "no attention layer has" not in outcome.err, "two have"
    assert not (tmp_path / "out").exists()


UNRECORDED: dict[str, tuple[tuple[str, ...], Callable[[], File]]] = {
    "no head count": (
        (QKV, "64"),
        lambda: unrecorded().key("test", UINT8, 1, old="llama.attention.head_count"),
    ),
    "rows do not add up": (
        (QKV, "64"),
        lambda: unrecorded().key("llama.attention.head_count_kv", UINT32, 4),
    ),
    "head count 0": (
        (QKV, "64"),
        lambda: unrecorded().key("llama.attention.head_count", UINT32, 0),
    ),
    "head count is a string": (
        ("'llama.attention.head_count' is STRING, it must be an integer",),
        lambda: unrecorded().key("llama.attention.head_count", STRING, "4"),
    ),
    "negative head count": (
        ("head_count' is -4, it must be 0 to",),
        lambda: unrecorded().key("llama.attention.head_count", INT32, -4),
    ),
    "negative lengths that add up": (
        ("key_length' is -8, it must be 0 to",),
        lambda: (
            unrecorded()
            .key("llama.attention.key_length", INT32, -8)
            .key("llama.attention.value_length", INT32, 56)
        ),
    ),
    "head counts for one layer of two": (
        (SECOND, "64"),
        lambda: unrecorded().key("llama.attention.head_count", ARRAY, Array(UINT32, [4])),
    ),
    "a fused tensor without dimensions": (
        (QKV,),
        lambda: unrecorded().tensor(QKV, ne=(), data=bytes(4)),
    ),
    "a fused tensor of one row": ((QKV,), lambda: unrecorded().tensor(QKV, ne=(64,))),
    "a quantized fused tensor of one row": (
        (QKV,),
        lambda: unrecorded().tensor(QKV, ne=(64,), type=Q4_0, data=bytes(36)),
    ),
    "attn_q beside the fused tensor": (
        (repr(Q),),
        lambda: replace(unrecorded(), tensors=[*unrecorded().tensors, tensor(Q, (32, 32))]),
    ),
    "a fused bias of another length": (
        ("blk.0.attn_qkv.bias",),
        lambda: replace(
            unrecorded(), tensors=[*unrecorded().tensors, tensor("blk.0.attn_qkv.bias", (63,))]
        ),
    ),
}


@pytest.mark.parametrize("name", UNRECORDED)
def test_fused_by_someone_else_and_not_to_be_split(name: str, run: Run, tmp_path: Path) -> None:
    words, make = UNRECORDED[name]
    path = save(make(), tmp_path / "evil.gguf")
    outcome = run("unfuse", path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path], "an unfused file was written"
    assert_one_line(outcome, str(path), *words)
    assert_cheap(outcome)


def test_split_into_more_tensors_than_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(unrecorded(), tmp_path / "in.gguf")
    monkeypatch.setattr("gguf_fuse.planning.record.MAX_TENSORS", 9)
    with pytest.raises(GGUFError, match=r"in\.gguf: split it has 10 tensors; at most 9 can"):
        unfused_copy(path)


def test_fused_by_someone_else_and_split(run: Run, tmp_path: Path) -> None:
    """The base of the cases above is sound."""
    path = save(unrecorded(), tmp_path / "in.gguf")
    assert run("unfuse", path, tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == valid().pack()
