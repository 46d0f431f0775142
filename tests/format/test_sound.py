"""Sound files: another reader reads them and what is made of them; large values cost nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader

from tests import pack
from tests.pack import (
    ARRAY,
    F32,
    FLOAT32,
    INT,
    LONG,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    Array,
    Content,
    File,
    Tensor,
    deep,
    fused,
    head_of,
    save,
    unrecorded,
    valid,
)
from tests.server import MAX_LINE, Run, assert_cheap, command_line


def nested(file: File) -> File:
    inner = Array(ARRAY, [Array(STRING, ["a", "b"]), Array(UINT16, [1, 2, 3])])
    return file.key("test.nested", ARRAY, Array(ARRAY, [inner, Array(FLOAT32)]))


def aligned(file: File, alignment: int) -> File:
    return replace(file, alignment=alignment).key("general.alignment", UINT32, alignment)


VALID: dict[str, Callable[[], File]] = {
    "plain": valid,
    "f16": lambda: valid(pack.F16),
    "q8_0": lambda: valid(pack.Q8_0),
    "version 2": lambda: replace(valid(), version=2),
    "big endian": lambda: replace(valid(), order=">"),
    "big endian, version 2": lambda: replace(valid(), order=">", version=2),
    "alignment 8": lambda: aligned(valid(), 8),
    "alignment 16": lambda: aligned(valid(), 16),
    "alignment 64": lambda: aligned(valid(), 64),
    "alignment 4096": lambda: aligned(valid(), 4096),
    "nested arrays": lambda: nested(valid()),
    "empty arrays": lambda: valid().key("test.empty", ARRAY, Array(STRING)),
    "strings that are not UTF-8": lambda: valid().key(
        "test.bytes", STRING, LONG.pack(2) + b"\xff\xfe"
    ),
    "arrays 8 deep": lambda: valid().key("test.deep", ARRAY, deep(8)),
}


@pytest.mark.parametrize("name", VALID)
def test_valid_variant(name: str, run: Run, tmp_path: Path) -> None:
    """gguf-py reads it and the output; ours is what was packed by hand, and so is the way back."""
    file = VALID[name]()
    source, middle, back = (tmp_path / name for name in ("in.gguf", "fused.gguf", "back.gguf"))
    source.write_bytes(file.pack())
    assert run("fuse", source, middle).code == 0
    assert middle.read_bytes() == fused(file).pack()
    assert run("unfuse", middle, back).code == 0
    assert back.read_bytes() == file.pack()
    for path, wanted in ((source, file), (middle, fused(file))):
        reader = GGUFReader(path)
        read = {found.name: bytes(found.data.tobytes()) for found in reader.tensors}
        assert read == {tensor.name: tensor.data for tensor in wanted.tensors}


SPARSE: dict[str, tuple[str, Callable[[], Content]]] = {
    "a scale of 1 GB": ("inspect", lambda: _big_tensor("blk.0.attn_q.scale")),
    "an array of 30 MB as split.count": ("fuse", lambda: _big_value("split.count")),
    "an array of 30 MB as general.type": ("fuse", lambda: _big_value("general.type")),
    "an array of 30 MB as general.name": ("inspect", lambda: _big_value("general.name")),
    "an array of 30 MB as head count": (
        "unfuse",
        lambda: _big_value("llama.attention.head_count", unrecorded()),
    ),
    "an array of 30 MB as record": ("unfuse", lambda: _big_value("gguf_fuse.rows", fused(valid()))),
}


def _big_tensor(name: str) -> Content:
    file = valid()
    size = len(file.pack())
    big = Tensor(name, (1 << 28,), F32, b"")
    return head_of(replace(file, tensors=[*file.tensors, big]), size + (1 << 30) + 4096)


def _big_value(key: str, file: File | None = None) -> Content:
    """The rest of the file follows the zeros, so that its tensors are where they should be."""
    return (
        (file or valid())
        .key(key, ARRAY, Array(UINT8, bytes(0)))
        .key(
            key,
            ARRAY,
            INT.pack(UINT8) + LONG.pack(30 << 20) + bytes(30 << 20),
        )
    )


@pytest.mark.parametrize("name", SPARSE)
def test_large_values_are_not_unpacked(name: str, run: Run, tmp_path: Path) -> None:
    command, make = SPARSE[name]
    path = save(make(), tmp_path / "big.gguf")
    outcome = run(*command_line(command, path))
    assert "Traceback" not in outcome.err, outcome.err[-500:]
    assert outcome.code in (0, 1, 3)
    assert len(outcome.err) < MAX_LINE
    assert len(outcome.out) < 10 * MAX_LINE
    assert_cheap(outcome)


def test_alignment_of_16_mb_takes_no_memory(run: Run, tmp_path: Path) -> None:
    big = 1 << 24
    tensors = [
        replace(tensor, offset=index * big, data=b"")
        for index, tensor in enumerate(valid().tensors)
    ]
    file = replace(valid(), tensors=tensors).key("general.alignment", UINT32, big)
    path = save(head_of(file, big * (len(tensors) + 1)), tmp_path / "wide.gguf")
    outcome = run("fuse", path, tmp_path / "out", "--dry-run")
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.code in (0, 1)
    assert_cheap(outcome)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_name_that_json_does_not_have(value: float, run: Run, tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for pair in ((FLOAT32, value), (ARRAY, Array(FLOAT32, [value, 1.0]))):
        path = save(valid().key("general.name", *pair), tmp_path / "in.gguf")
        said = json.loads(run("inspect", path, "--json").out, parse_constant=refuse)
        assert said["name"] in (None, [None, 1.0])


@pytest.mark.parametrize("value_type", [UINT32, FLOAT32, ARRAY])
def test_name_of_another_type(value_type: int, run: Run, tmp_path: Path) -> None:
    value = Array(ARRAY, [Array(UINT8, [1])]) if value_type == ARRAY else 7
    path = save(valid().key("general.name", value_type, value), tmp_path / "in.gguf")
    assert run("inspect", path).code == 0
    assert json.loads(run("inspect", path, "--json").out)["tensors_in"] == 10
