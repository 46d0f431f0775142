"""The header reader against gguf-py and against hand-packed files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_fuse.format import header as header_module
from gguf_fuse.format import parser
from gguf_fuse.format.header import encode_start, encode_tensor
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.format.values import encode_pair
from tests import pack
from tests.conftest import fused_copy, unfused_copy
from tests.pack import ARRAY, INT, LONG, STRING, UINT8, UINT32, Array, Tensor, valid

Model = Callable[..., Path]

_TEXT = st.text(max_size=40)
_VALUES = {
    "UINT8": st.integers(0, 2**8 - 1),
    "INT16": st.integers(-(2**15), 2**15 - 1),
    "UINT32": st.integers(0, 2**32 - 1),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "FLOAT32": st.floats(width=32, allow_nan=False),
    "FLOAT64": st.floats(allow_nan=False),
    "BOOL": st.booleans(),
    "STRING": _TEXT,
}


@st.composite
def typed_values(draw: st.DrawFn) -> tuple[gguf.GGUFValueType, Any, gguf.GGUFValueType | None]:
    """(type, value, element type of an array)."""
    name = draw(st.sampled_from(sorted(_VALUES)))
    value_type = gguf.GGUFValueType[name]
    if draw(st.booleans()):
        return value_type, draw(_VALUES[name]), None
    # gguf-py writes no empty arrays
    return (
        gguf.GGUFValueType.ARRAY,
        draw(st.lists(_VALUES[name], min_size=1, max_size=5)),
        value_type,
    )


@settings(max_examples=60, deadline=None)
@given(values=st.lists(typed_values(), max_size=6), big=st.booleans())
def test_values_that_gguf_py_wrote(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], big: bool
) -> None:
    path = tmp_path_factory.mktemp("values") / "values.gguf"
    order = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    for i, (value_type, value, element) in enumerate(values):
        writer.add_key_value(f"test.{i}", value, value_type, element)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = read_header(path)
    assert header.byte_order == ("big" if big else "little")
    for i, (_, value, _) in enumerate(values):
        assert header.metadata[f"test.{i}"] == value
    assert list(header.metadata) == [
        "general.architecture",
        *(f"test.{i}" for i in range(len(values))),
    ]


@pytest.mark.parametrize(
    "spec",
    [{}, {"big_endian": True}, {"alignment": 256}, {"n_vocab": 2000, "tokenizer": "bpe"}],
    ids=str,
)
def test_model_as_gguf_py_reads_it(model: Model, spec: dict[str, Any]) -> None:
    path = model(architecture="qwen2", **spec)
    reader, header = gguf.GGUFReader(path), read_header(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert header.metadata[key] == field.contents()
    assert header.alignment == reader.alignment
    assert header.data_start == reader.data_offset
    read = [(t.name, list(t.ne), t.type, t.n_bytes, t.offset) for t in header.tensors]
    assert read == [
        (t.name, t.shape.tolist(), t.tensor_type, t.n_bytes, t.data_offset - reader.data_offset)
        for t in reader.tensors
    ]


ORDERS: list[Literal["<", ">"]] = ["<", ">"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("version", [2, 3])
def test_versions_and_byte_orders_are_kept(
    tmp_path: Path, version: int, order: Literal["<", ">"]
) -> None:
    file = valid()
    file.version, file.order = version, order
    path = tmp_path / "in.gguf"
    path.write_bytes(file.pack())
    fused = fused_copy(path)
    header = read_header(fused)
    assert (header.version, header.byte_order) == (version, "little" if order == "<" else "big")
    assert fused.read_bytes() == pack.fused(file).pack()  # golden bytes: packed by struct alone
    assert unfused_copy(fused).read_bytes() == file.pack()


def test_nested_arrays(tmp_path: Path) -> None:
    inner = [
        Array(UINT32, [1, 2]),
        Array(STRING, ["a", "", "\u00e9"]),
        Array(ARRAY, [Array(UINT8, b"")]),
    ]
    path = tmp_path / "nested.gguf"
    path.write_bytes(valid().key("test.nested", ARRAY, Array(ARRAY, inner)).pack())
    header = read_header(path)
    assert header.metadata["test.nested"] == [[1, 2], ["a", "", "\u00e9"], [[]]]
    assert unfused_copy(fused_copy(path)).read_bytes() == path.read_bytes()


def test_a_value_that_is_no_utf8_is_read_and_copied(tmp_path: Path) -> None:
    """Real vocabularies hold such tokens; only names must be text."""
    raw = (3).to_bytes(8, "little") + b"a\xffb"
    path = tmp_path / "bytes.gguf"
    path.write_bytes(valid().key("test.bytes", STRING, raw).pack())
    assert read_header(path).metadata["test.bytes"] == "a\ufffdb"
    assert raw in fused_copy(path).read_bytes()


def test_unknown_tensor_types_are_copied_and_never_fused(tmp_path: Path) -> None:
    """Newer llama.cpp and ik_llama.cpp have types of their own: bytes run to the next tensor."""
    file = valid()
    for part in "qkv":
        file.tensor(f"blk.1.attn_{part}.weight", type=142)
    path = tmp_path / "in.gguf"
    path.write_bytes(file.pack())
    fused = fused_copy(path)
    names = [tensor.name for tensor in read_header(fused).tensors]
    assert "blk.0.attn_qkv.weight" in names and "blk.1.attn_q.weight" in names
    assert unfused_copy(fused).read_bytes() == file.pack()


def test_scalar_tensor_without_dimensions(tmp_path: Path) -> None:
    """gguf-py writes a 0-d array so, and llama.cpp reads it as one element."""
    file = valid()
    file.tensors.append(Tensor("scalar", (), pack.F32, bytes(4)))
    path = tmp_path / "in.gguf"
    path.write_bytes(file.pack())
    assert read_header(path).tensors[-1].n_bytes == 4
    assert unfused_copy(fused_copy(path)).read_bytes() == file.pack()


def test_a_vocabulary_is_walked_through_a_small_window(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strings, keys and tensor names on every side of a window's edge."""
    path = model(n_vocab=1200, tokenizer="bpe", architecture="qwen2")
    expected = read_header(path)
    for size in (8, 9, 13, 64, 1000):
        monkeypatch.setattr(parser, "_WINDOW_BYTES", size)
        header = read_header(path)
        assert header.tensors == expected.tensors
        assert header.data_start == expected.data_start
        segments = [header.metadata.segment(key) for key in header.metadata]
        assert segments == [expected.metadata.segment(key) for key in expected.metadata]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [3, 2000], ids=["kept", "read when it is asked for"])
def test_of_an_array_the_value_of_a_layer(tmp_path: Path, order: Literal["<", ">"], n: int) -> None:
    file = valid().key("test.each", ARRAY, Array(UINT32, range(70_000, 70_000 + n)))
    file.key("test.bits", ARRAY, Array(pack.BOOL, [True, False])).key("test.one", UINT32, 7)
    file.order = order
    path = tmp_path / "in.gguf"
    path.write_bytes(file.pack())
    metadata = read_header(path).metadata
    each = [metadata.of_layer("test.each", layer) for layer in (0, 2, n - 1, n)]
    assert each == [70_000, 70_002, 70_000 + n - 1, None]
    assert [metadata.of_layer("test.bits", layer) for layer in range(3)] == [True, False, None]
    assert metadata.of_layer("test.one", 5) == 7
    assert metadata.of_layer("tokenizer.ggml.tokens", 0) == metadata["tokenizer.ggml.tokens"]


def test_an_array_of_too_many_elements_to_decode(tmp_path: Path) -> None:
    path = tmp_path / "in.gguf"
    n = header_module.MAX_DECODED_ELEMENTS + 1
    value = INT.pack(UINT8) + LONG.pack(n) + bytes(n)
    path.write_bytes(valid().key("test.long", ARRAY, value).pack())
    metadata = read_header(path).metadata
    with pytest.raises(GGUFError, match=rf"'test\.long' has {n} elements, too many"):
        metadata["test.long"]
    assert metadata.of_layer("test.long", 5) == 0


def test_a_value_too_large_to_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "MAX_DECODED_BYTES", 100)
    path = tmp_path / "in.gguf"
    path.write_bytes(valid().key("test.long", STRING, "x" * 200).pack())
    with pytest.raises(GGUFError, match=r"in\.gguf: metadata key 'test\.long' takes 208 bytes"):
        read_header(path).metadata["test.long"]
    assert b"x" * 200 in fused_copy(path).read_bytes()


def test_a_file_that_is_gone_when_its_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "in.gguf"
    path.write_bytes(valid().key("test.long", STRING, "x" * parser.SHORT_PAIR).pack())
    header = read_header(path)
    path.unlink()
    assert header.metadata["general.name"] == "tiny"  # a short one is kept
    with pytest.raises(GGUFError, match=r"in\.gguf: No such file or directory"):
        header.metadata["test.long"]


def test_golden_bytes_of_the_encoder() -> None:
    start = encode_start(3, "little", 1, 2)
    assert start == bytes.fromhex("47475546 03000000 0100000000000000 0200000000000000")
    number = encode_pair("k", gguf.GGUFValueType.UINT32, 258, "big")
    assert number == bytes.fromhex("0000000000000001 6b 00000004 00000102")
    texts = encode_pair("k", gguf.GGUFValueType.STRING, ["a"], "little")
    assert texts == bytes.fromhex(
        "0100000000000000 6b 09000000 08000000 0100000000000000 0100000000000000 61"
    )
    assert encode_tensor("t", (2, 3), 1, 64, "little") == bytes.fromhex(
        "0100000000000000 74 02000000 0200000000000000 0300000000000000 01000000 4000000000000000"
    )
