"""The checker: what is right passes, and every fault is caught and its place named.

The numeric checks are also tested alone, without the comparison of bytes: each must catch what it
can see by itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl  # type: ignore[import-untyped, unused-ignore]
from gguf import GGMLQuantizationType as T
from gguf.constants import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gguf_fuse import attention
from gguf_fuse.attention import AttentionParams, Floats
from gguf_fuse.cli import app
from gguf_fuse.format.header import (
    GGUFError,
    TensorInfo,
    align,
    encode_pair,
    encode_start,
    encode_tensors,
    read_header,
    read_tensors,
)
from gguf_fuse.models.layer import Projections, project
from gguf_fuse.verifying import numbers as checker
from gguf_fuse.verifying.numbers import (
    Choice,
    Options,
    Report,
    choose_layers,
    compare_numbers,
    parse_layers,
    verify,
)
from gguf_fuse.verifying.structure import compare_structure
from tests.conftest import blas_threads, fused_copy, gguf_fuse, unfused_copy
from tests.models.architectures import LAYOUTS
from tests.models.random_model import ModelSpec, spec_of_size, write_random_model
from tests.test_layer import ENCODERS

Model = Callable[..., Path]

QUICK = Options(n_prompt=9, n_decode=2, n_seqs=2, n_kv=70, threads=2)
CHECKS = {"projection", "prefill", "decode_expand", "decode_broadcast", "decode_split"}


@dataclass
class Contents:
    """A file taken apart, to be changed and written again."""

    path: Path
    pairs: dict[str, bytes]
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]]  # ne, type, data

    @classmethod
    def of(cls, path: Path) -> Contents:
        header = read_header(path)
        data = read_tensors(header, [tensor.name for tensor in header.tensors])
        return cls(
            path,
            {key: header.metadata.pair_bytes(key) for key in header.metadata},
            {tensor.name: (tensor.ne, tensor.type, data[tensor.name]) for tensor in header.tensors},
        )

    def write(self) -> Path:
        header = read_header(self.path)
        infos, body = [], bytearray()
        for name, (ne, kind, data) in self.tensors.items():
            infos.append(TensorInfo(name, ne, kind, len(body), len(data)))
            body += data.ljust(align(len(data), header.alignment), b"\0")
        order = header.byte_order
        head = encode_start(header.version, order, len(infos), len(self.pairs))
        head += b"".join(self.pairs.values()) + encode_tensors(infos, order)
        self.path.write_bytes(head.ljust(align(len(head), header.alignment), b"\0") + body)
        return self.path

    def rows(self, name: str) -> list[bytes]:
        ne, _, data = self.tensors[name]
        n_bytes = len(data) // ne[-1]
        return [data[at : at + n_bytes] for at in range(0, len(data), n_bytes)]

    def set_rows(self, name: str, rows: list[bytes]) -> None:
        ne, kind, _ = self.tensors[name]
        self.tensors[name] = ((*ne[:-1], len(rows)), kind, b"".join(rows))

    def pair(self, key: str, kind: GGUFValueType, value: Any) -> None:
        self.pairs[key] = encode_pair(key, kind, value, "little")


Fault = Callable[[Contents], None]


def check(original: Path, fused: Path, **changes: Any) -> Report:
    return verify(original, fused, Options(**{**QUICK.__dict__, **changes}))


def problems(original: Path, fused: Path) -> list[str]:
    return list(compare_structure(read_header(original), read_header(fused)).problems)


# -- what is right passes -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0])
def test_types_pass(model: Model, kind: T) -> None:
    original = model(types={"*": kind})
    report = check(original, fused_copy(original))
    assert report.ok
    assert report.structure.n_fused == len(report.layers) == 2
    assert all(set(layer.checks) == CHECKS and layer.note is None for layer in report.layers)


@pytest.mark.parametrize(
    ("architecture", "spec"),
    [
        ("llama", {"n_head_kv": 1, "rope_freqs": True}),
        ("llama", {"scales": "equal", "rope_scaling": "yarn"}),
        ("llama", {"key_length": 24, "value_length": 8}),
        ("llama", {"big_endian": True}),
        ("llama", {"n_layer": 1, "n_head_kv": 4, "alignment": 64}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3", {}),
        ("gpt-oss", {}),
        ("stablelm", {}),
        ("olmo", {}),
        ("refact", {}),
        ("qwen35", {}),
    ],
)
def test_architectures_pass(model: Model, architecture: str, spec: dict[str, Any]) -> None:
    original = model(architecture=architecture, **spec)
    report = check(original, fused_copy(original))
    assert report.ok
    computed = [layer for layer in report.layers if layer.note is None]
    assert computed
    assert all(set(layer.checks) == CHECKS for layer in computed)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_encoders_pass(model: Model, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """As they are, with norms behind attention and feed-forward; and fused."""
    monkeypatch.setitem(LAYOUTS, architecture, ENCODERS[architecture])
    original = model(architecture=architecture)
    copy = original.with_name("copy.gguf")
    shutil.copy(original, copy)
    for other in (copy, fused_copy(original)):
        report = check(original, other)
        assert report.ok
        assert all(set(layer.checks) == CHECKS for layer in report.layers)


def test_layers_that_were_skipped_are_computed_as_well(model: Model) -> None:
    original = model(n_layer=3, types={"*": T.F16, "blk.1.attn_v.weight": T.F32})
    report = check(original, fused_copy(original))
    assert report.ok
    assert report.structure.n_fused == 2
    assert [layer.layer for layer in report.layers] == ["blk.0", "blk.1", "blk.2"]


def test_equal_and_restored_files_pass(model: Model) -> None:
    original = model(architecture="qwen2")
    restored = unfused_copy(fused_copy(original))
    for other in (original, restored):
        report = check(original, other)
        assert report.ok
        assert report.structure.n_fused == 0


def test_a_type_that_nobody_knows_is_compared_without_its_padding(model: Model) -> None:
    contents = Contents.of(model())
    contents.tensors["new.weight"] = ((7,), 142, b"\1" * 33)
    contents.tensors["last.weight"] = ((7,), 142, b"\2" * 33)
    original = contents.write()
    fused = fused_copy(original)
    assert problems(original, fused) == []
    data = bytearray(fused.read_bytes())
    data[data.rindex(b"\2")] = 3
    fused.write_bytes(data)
    assert "last.weight differs" in problems(original, fused)[0]


@pytest.mark.parametrize("n_lost", [1, 100])
def test_a_type_that_nobody_knows_is_compared_to_its_end(model: Model, n_lost: int) -> None:
    """How long such a tensor is, the header does not say: the file could just end earlier."""
    contents = Contents.of(model())
    contents.tensors["last.weight"] = ((7,), 142, b"\2" * 3008)
    original = contents.write()
    fused = fused_copy(original)
    end = fused.read_bytes().rindex(b"\2") + 1
    os.truncate(fused, end - n_lost)
    (problem,) = problems(original, fused)
    assert problem == f"last.weight: {3008 - n_lost} bytes, but 3008 in the original"


def test_a_type_that_nobody_knows_is_not_computed(model: Model) -> None:
    contents = Contents.of(model())
    ne, _, data = contents.tensors["blk.1.attn_q.weight"]
    contents.tensors["blk.1.attn_q.weight"] = (ne, 142, data)
    original = contents.write()
    report = check(original, fused_copy(original))
    assert report.ok
    known, unknown = report.layers
    assert (set(known.checks), known.note, unknown.checks) == (CHECKS, None, {})
    reason = "tensor 'blk.1.attn_q.weight': gguf-py cannot dequantize type 142"
    assert unknown.note == f"numbers not computed: {reason}"


def test_attention_that_is_not_modelled_is_marked(model: Model) -> None:
    original = model(architecture="bitnet")
    fused = fused_copy(original, any_architecture=True)
    report = check(original, fused)
    assert report.ok
    for layer in report.layers:
        assert set(layer.checks) == {"projection"}
        assert "not modelled" in (layer.note or "")
    printed = gguf_fuse("verify", original, fused).stdout
    assert "PARTLY numbers" in printed
    assert "attention not modelled" in printed


@pytest.mark.parametrize(
    ("architecture", "checks", "others"),
    [
        ("qwen35", CHECKS, ["blk.0", "blk.2"]),  # linear attention
        ("jamba", {"projection"}, ["blk.0", "blk.2"]),  # state spaces
        ("deepseek2", set(), ["blk.0", "blk.1", "blk.2", "blk.3"]),  # MLA
    ],
)
def test_layers_of_another_kind_are_named(
    model: Model, architecture: str, checks: set[str], others: list[str]
) -> None:
    original = model(architecture=architecture, n_layer=4)
    report = check(original, original)
    assert report.ok
    assert [layer.layer for layer in report.layers if not layer.checks] == others
    for layer in report.layers:
        assert set(layer.checks) == (set() if layer.layer in others else checks)
        assert layer.checks or "no Q, K and V of its own" in (layer.note or "")
    printed = gguf_fuse("verify", original, original).stdout
    n_computed = 4 - len(others)
    assert f"PARTLY numbers: {n_computed} layers computed" in printed
    assert f"{len(others)} not" in printed


def test_layers_of_another_kind_are_no_matter_where_layers_are_chosen(model: Model) -> None:
    original = model(architecture="qwen35", n_layer=4)
    (report,) = check(original, original, layers=parse_layers("1")).layers
    assert (report.layer, report.note, set(report.checks)) == ("blk.1", None, CHECKS)
    printed = gguf_fuse("verify", original, original, "--layers", "1").stdout
    assert "ok numbers: 1 layer computed; " in printed


# -- faults in the bytes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    original = tmp_path_factory.mktemp("pair") / "in.gguf"
    write_random_model(original, ModelSpec("qwen2", types={"*": T.Q8_0}))
    return original, fused_copy(original)


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found(pair: tuple[Path, Path], where: float, bit: int) -> None:
    original, fused = pair
    header, good = read_header(fused), fused.read_bytes()
    n_bytes = sum(tensor.n_bytes for tensor in header.tensors)
    at = int(where * n_bytes)
    for tensor in header.tensors:
        if at < tensor.n_bytes:
            break
        at -= tensor.n_bytes
    place = header.data_start + tensor.offset + at
    bad = bytearray(good)
    bad[place] ^= 1 << bit
    try:
        fused.write_bytes(bad)
        (problem,) = problems(original, fused)
    finally:
        fused.write_bytes(good)
    assert problem.startswith(tensor.name)
    assert f"byte {place} of the fused file" in problem


def test_a_flipped_bit_names_part_and_row(model: Model) -> None:
    original = model(types={"*": T.F16})  # 64 + 32 + 32 rows of 64
    fused = fused_copy(original)
    tensors = {tensor.name: tensor for tensor in read_header(fused).tensors}
    start = read_header(fused).data_start + tensors["blk.1.attn_qkv.weight"].offset
    data = bytearray(fused.read_bytes())
    for row in (63, 64, 99):
        data[start + row * 128 + 5] ^= 16
    fused.write_bytes(data)
    found = problems(original, fused)
    assert len(found) == 3
    for problem, (name, row) in zip(
        found, (("attn_q", 63), ("attn_k", 0), ("attn_v", 3)), strict=True
    ):
        assert problem.startswith(f"blk.1.attn_qkv.weight: {name} differs in row {row} ")


@pytest.mark.parametrize("at", [0, 262_143, 262_144, 524_288, 599_999])
def test_a_tensor_of_several_blocks_is_compared_to_its_end(model: Model, at: int) -> None:
    contents = Contents.of(model(n_layer=1))
    contents.tensors["big.weight"] = ((1000, 150), T.F32, bytes(600_000))
    original = contents.write()
    fused = fused_copy(original)
    (big,) = (tensor for tensor in read_header(fused).tensors if tensor.name == "big.weight")
    data = bytearray(fused.read_bytes())
    data[read_header(fused).data_start + big.offset + at] ^= 1
    fused.write_bytes(data)
    (problem,) = problems(original, fused)
    assert problem.startswith(f"big.weight differs in row {at // 4000} ")


def swap_k_and_v(c: Contents) -> None:
    rows = c.rows("blk.1.attn_qkv.weight")
    c.set_rows("blk.1.attn_qkv.weight", rows[:64] + rows[96:] + rows[64:96])


def swap_two_heads(c: Contents) -> None:
    rows = c.rows("blk.1.attn_qkv.weight")
    c.set_rows("blk.1.attn_qkv.weight", rows[16:32] + rows[:16] + rows[32:])


def drop_the_bias(c: Contents) -> None:
    del c.tensors["blk.1.attn_qkv.bias"]


def change_the_bias(c: Contents) -> None:
    rows = c.rows("blk.1.attn_qkv.bias")
    c.set_rows("blk.1.attn_qkv.bias", [*rows[:70], np.float32(0.5).tobytes(), *rows[71:]])


def take_the_q_of_another_layer(c: Contents) -> None:
    rows = c.rows("blk.1.attn_qkv.weight")
    c.set_rows("blk.1.attn_qkv.weight", c.rows("blk.0.attn_qkv.weight")[:64] + rows[64:])


def lose_a_row(c: Contents) -> None:
    c.set_rows("blk.1.attn_qkv.weight", c.rows("blk.1.attn_qkv.weight")[:-1])


def change_the_scale(c: Contents) -> None:
    ne, kind, data = c.tensors["blk.1.attn_qkv.scale"]
    scale = np.frombuffer(data, np.float32) * np.float32(1.001)
    c.tensors["blk.1.attn_qkv.scale"] = (ne, kind, scale.tobytes())


def change_the_sinks(c: Contents) -> None:
    ne, kind, data = c.tensors["blk.1.attn_sinks.weight"]
    c.tensors["blk.1.attn_sinks.weight"] = (ne, kind, data[4:] + data[:4])


def change_a_k_norm(c: Contents) -> None:
    ne, kind, data = c.tensors["blk.1.attn_k_norm.weight"]
    c.tensors["blk.1.attn_k_norm.weight"] = (ne, kind, data[4:] + data[:4])


def leave_a_tensor_out(c: Contents) -> None:
    del c.tensors["blk.1.ffn_up.weight"]


def add_a_tensor(c: Contents) -> None:
    c.tensors["blk.1.attn_k.weight"] = ((64, 2), T.F32, bytes(512))


def reorder_tensors(c: Contents) -> None:
    c.tensors["output_norm.weight"] = c.tensors.pop("output_norm.weight")


def change_a_value(c: Contents) -> None:
    key = f"{read_header(c.path).architecture}.rope.freq_base"
    c.pair(key, GGUFValueType.FLOAT32, 500000)


def change_a_long_value(c: Contents) -> None:
    c.pair("general.name", GGUFValueType.STRING, "x" * 61)


def change_a_value_type(c: Contents) -> None:
    key = f"{read_header(c.path).architecture}.block_count"
    c.pair(key, GGUFValueType.UINT64, 2)


def change_a_token(c: Contents) -> None:
    c.pairs["tokenizer.ggml.tokens"] = c.pairs["tokenizer.ggml.tokens"][:-1] + b"~"


def lose_a_token(c: Contents) -> None:
    tokens = read_header(c.path).metadata["tokenizer.ggml.tokens"]
    c.pair("tokenizer.ggml.tokens", GGUFValueType.STRING, tokens[:-1])


def remove_a_key(c: Contents) -> None:
    del c.pairs["general.name"]


def add_a_key(c: Contents) -> None:
    c.pair("general.author", GGUFValueType.STRING, "nobody")


def pad_with_something(c: Contents) -> None:
    c.pair("gguf_fuse.padding", GGUFValueType.UINT8, [0, 0, 1])


def pad_with_text(c: Contents) -> None:
    c.pair("gguf_fuse.padding", GGUFValueType.STRING, "")


def cut_into_less_than_nothing(c: Contents) -> None:
    c.pair("gguf_fuse.shards", GGUFValueType.INT32, [-1, 34])  # of 33 tensors


def add_an_unknown_key_of_our_own(c: Contents) -> None:
    c.pair("gguf_fuse.future", GGUFValueType.UINT32, 1)


def reorder_keys(c: Contents) -> None:
    c.pairs = {"general.name": c.pairs["general.name"], **c.pairs}


def record_other_rows(c: Contents) -> None:
    rows = read_header(c.path).metadata["gguf_fuse.rows"]
    c.pair("gguf_fuse.rows", GGUFValueType.UINT64, [rows[0] - 16, rows[1] + 16, *rows[2:]])


def record_other_positions(c: Contents) -> None:
    at = read_header(c.path).metadata["gguf_fuse.positions"]
    c.pair("gguf_fuse.positions", GGUFValueType.UINT64, [at[1], at[0], *at[2:]])


def record_too_little(c: Contents) -> None:
    metadata = read_header(c.path).metadata
    names = metadata["gguf_fuse.tensors"][:-1]
    c.pair("gguf_fuse.tensors", GGUFValueType.STRING, names)
    for key in ("gguf_fuse.rows", "gguf_fuse.positions"):
        c.pair(key, GGUFValueType.UINT64, metadata[key][:-3])


def record_another_version(c: Contents) -> None:
    c.pair("gguf_fuse.version", GGUFValueType.UINT32, 99)


def record_without_rows(c: Contents) -> None:
    del c.pairs["gguf_fuse.rows"]


def record_rows_as_text(c: Contents) -> None:
    c.pair("gguf_fuse.rows", GGUFValueType.STRING, "64, 32, 32")


def record_fewer_rows(c: Contents) -> None:
    rows = read_header(c.path).metadata["gguf_fuse.rows"]
    c.pair("gguf_fuse.rows", GGUFValueType.UINT64, rows[:-3])


def record_the_first_layer_alone(c: Contents) -> None:
    metadata = read_header(c.path).metadata
    names = [name for name in metadata["gguf_fuse.tensors"] if name.startswith("blk.0.")]
    c.pair("gguf_fuse.tensors", GGUFValueType.STRING, names)
    for key in ("gguf_fuse.rows", "gguf_fuse.positions"):
        c.pair(key, GGUFValueType.UINT64, metadata[key][: 3 * len(names)])


STRUCTURE_FAULTS: list[tuple[Fault, str]] = [
    (swap_k_and_v, "blk.1.attn_qkv.weight: attn_k differs in row 0 "),
    (swap_two_heads, "blk.1.attn_qkv.weight: attn_q differs in row 0 "),
    (drop_the_bias, "blk.1.attn_qkv.bias: missing in the fused file"),
    (change_the_bias, "blk.1.attn_qkv.bias: attn_k differs in element 6 "),
    (take_the_q_of_another_layer, "blk.1.attn_qkv.weight: attn_q differs in row 0 "),
    (lose_a_row, "blk.1.attn_qkv.weight: ne [64, 127], but [64, 128] in the original's"),
    (change_the_scale, "blk.1.attn_qkv.scale: attn_q differs in element 0 "),
    (leave_a_tensor_out, "blk.1.ffn_up.weight: missing in the fused file"),
    (add_a_tensor, "blk.1.attn_k.weight: only in the fused file"),
    (reorder_tensors, "tensor output.weight: stands where output_norm.weight should stand"),
    (change_a_value, "metadata qwen2.rope.freq_base: 10000.0, but 500000.0 in the fused file"),
    (change_a_long_value, "metadata general.name: the value differs in the fused file"),
    (change_a_value_type, "metadata qwen2.block_count: of type UINT32, but of type UINT64"),
    (change_a_token, "metadata tokenizer.ggml.tokens differs in byte "),
    (lose_a_token, " bytes, but "),
    (remove_a_key, "metadata general.name: missing in the fused file"),
    (add_a_key, "metadata general.author: only in the fused file"),
    (pad_with_something, "metadata gguf_fuse.padding: not an array of zeros"),
    (pad_with_text, "metadata gguf_fuse.padding: not an array of zeros"),
    (cut_into_less_than_nothing, "metadata gguf_fuse.shards: [-1, 34], the original says []"),
    (add_an_unknown_key_of_our_own, "metadata gguf_fuse.future: only in the fused file"),
    (reorder_keys, "the order differs"),
    (record_other_rows, "metadata gguf_fuse.rows: (48, 48, 32) for blk.0.attn_qkv.weight"),
    (record_other_positions, "metadata gguf_fuse.positions: "),
    (record_too_little, "metadata gguf_fuse.tensors: blk.1.attn_qkv.scale is fused but not named"),
    (record_another_version, "metadata gguf_fuse.version: 99"),
    (record_without_rows, "metadata gguf_fuse.rows: missing"),
    (record_rows_as_text, "metadata gguf_fuse.*: the record has values of a wrong type"),
    (record_fewer_rows, "metadata gguf_fuse.*: the lengths of the record's arrays do not fit"),
]


@pytest.fixture
def tampered(model: Model) -> Callable[..., tuple[Path, Path]]:
    """A file and its fused copy with a fault in it."""

    def make(fault: Fault, **spec: Any) -> tuple[Path, Path]:
        original = model(**({"architecture": "qwen2", "scales": "equal"} | spec))
        contents = Contents.of(fused_copy(original))
        fault(contents)
        return original, contents.write()

    return make


@pytest.mark.parametrize(("fault", "place"), STRUCTURE_FAULTS)
def test_faults_in_the_bytes_name_their_place(
    tampered: Callable[..., tuple[Path, Path]], fault: Fault, place: str
) -> None:
    found = problems(*tampered(fault))
    assert any(place in problem for problem in found), found


def test_a_record_is_checked_beside_half_of_one_in_the_original(model: Model) -> None:
    contents = Contents.of(model())
    contents.pair("gguf_fuse.version", GGUFValueType.UINT32, 1)
    original = contents.write()
    assert problems(original, original) == []
    contents.path = original.with_name("fused.gguf")
    contents.path.write_bytes(original.read_bytes())
    contents.pair("gguf_fuse.rows", GGUFValueType.UINT64, [1, 2, 3])
    found = problems(original, contents.write())
    assert "metadata gguf_fuse.tensors: missing, the record is incomplete" in found


@pytest.mark.parametrize("kind", ["weight", "bias", "scale"])
def test_a_part_that_the_original_lacks(model: Model, kind: str) -> None:
    """Two of three biases would be lost without a word in llama.cpp."""
    original = model(architecture="qwen2", scales="equal")
    fused = fused_copy(original)
    contents = Contents.of(original)
    del contents.tensors[f"blk.0.attn_k.{kind}"]
    found = problems(contents.write(), fused)
    assert f"blk.0: is fused, but the original has no blk.0.attn_k.{kind}" in found


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"alignment": 64}, "alignment: 32, but 64 in the fused file"),
        ({"big_endian": True}, "byte order: little, but big in the fused file"),
        ({"types": {"blk.*": T.F16}}, "type F16, but F32 in the original's"),
    ],
)
def test_another_format(model: Model, spec: dict[str, Any], problem: str) -> None:
    found = problems(model(), fused_copy(model("other.gguf", **spec)))
    assert any(problem in text for text in found), found


def test_the_two_files_exchanged(model: Model) -> None:
    original = model()
    found = problems(fused_copy(original), original)
    assert "blk.0.attn_qkv.weight: missing in the fused file" in found
    assert "blk.0.attn_q.weight: only in the fused file" in found


def test_a_file_that_changes_meanwhile(model: Model) -> None:
    original = model()
    fused = fused_copy(original)
    headers = read_header(original), read_header(fused)
    fused.write_bytes(fused.read_bytes() + b"\0")
    with pytest.raises(GGUFError, match="changed while it was read"):
        compare_structure(*headers)


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_grows_while_it_is_compared(model: Model, which: int) -> None:
    """Nothing that was compared has changed, and still nobody knows what the file is now."""
    original = model()
    files = original, fused_copy(original)

    def grow(n_bytes: int) -> None:
        with files[which].open("ab") as file:
            file.write(b"\0")

    headers = [read_header(path) for path in files]
    with pytest.raises(GGUFError, match=f"{re.escape(str(files[which]))}: changed while it was"):
        compare_structure(*headers, on_progress=grow)


def test_a_file_that_is_cut_meanwhile(model: Model) -> None:
    original = model()
    fused = fused_copy(original)
    headers = read_header(original), read_header(fused)
    words = f"{re.escape(str(fused))}: ended at byte .*: it was cut while it was read"
    with pytest.raises(GGUFError, match=words):
        compare_structure(*headers, threads=1, on_progress=lambda n: os.truncate(fused, 100))


# -- faults in the numbers, without a look at the bytes -----------------------------------------


def failed_checks(original: Path, fused: Path) -> set[str]:
    """Names of the checks of blk.1 that fail; blk.0 must be right. Without the record, which tells
    nothing of the weights."""
    contents = Contents.of(fused)
    contents.pairs = {k: v for k, v in contents.pairs.items() if not k.startswith("gguf_fuse.")}
    contents.write()
    headers = read_header(original), read_header(fused)
    (right, wrong), _ = compare_numbers(*headers, ["blk.0", "blk.1"], QUICK)
    assert right.ok
    return {name for name, found in wrong.checks.items() if not found.ok}


@pytest.mark.parametrize(
    "fault",
    [
        swap_k_and_v,
        swap_two_heads,
        drop_the_bias,
        change_the_bias,
        take_the_q_of_another_layer,
        change_the_scale,
    ],
)
def test_numbers_alone_catch_wrong_weights(
    tampered: Callable[..., tuple[Path, Path]], fault: Fault
) -> None:
    assert failed_checks(*tampered(fault)) == CHECKS


@pytest.mark.parametrize(
    ("architecture", "fault"), [("gpt-oss", change_the_sinks), ("qwen3", change_a_k_norm)]
)
def test_numbers_alone_catch_wrong_attention(
    tampered: Callable[..., tuple[Path, Path]], architecture: str, fault: Fault
) -> None:
    found = failed_checks(*tampered(fault, architecture=architecture, scales="none"))
    assert found == CHECKS - {"projection"}


def test_numbers_alone_catch_other_metadata(
    tampered: Callable[..., tuple[Path, Path]],
) -> None:
    original, fused = tampered(change_a_value)
    (found, _), _ = compare_numbers(
        read_header(original), read_header(fused), ["blk.0", "blk.1"], QUICK
    )
    assert found.checks["projection"].ok
    assert not found.checks["prefill"].ok


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lose_a_row, "'blk.1.attn_qkv.weight' has 127 rows, not 64, 32, 32"),
        (record_another_version, "gguf_fuse.version is 99, this release knows 1 and 2"),
        (
            record_the_first_layer_alone,
            "gguf_fuse.tensors does not name 'blk.1.attn_qkv.weight'",
        ),
    ],
)
def test_a_layer_that_cannot_be_computed_fails(
    tampered: Callable[..., tuple[Path, Path]], fault: Fault, reason: str
) -> None:
    report = check(*tampered(fault))
    assert not report.ok
    words = f"the fused file's layer cannot be computed: {reason}: the record of the fusion"
    assert (report.layers[1].problem or "").startswith(words)


def ignore_the_mask(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    return attention.broadcast_attention(q, k, v, None, params)


def read_one_sequence_for_all(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    first = [np.broadcast_to(part[:1], part.shape) for part in (k, v)]
    return attention.broadcast_attention(q, first[0], first[1], mask, params)


def take_heads_in_turn(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """Query head h reads h % n_head_kv, not h // group."""
    heads = np.arange(q.shape[1]) % k.shape[1]
    return attention.broadcast_attention(q, k[:, heads], v[:, heads], mask, params)


def add_sinks_per_chunk(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    assert params.sinks is not None
    twice = AttentionParams(params.scale, sinks=params.sinks + np.float32(np.log(2)))
    return attention.broadcast_attention(q, k, v, mask, twice)


def mask_all_like_the_first(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """Caught only if sequences differ in length."""
    assert mask is not None
    return attention.broadcast_attention(q, k, v, np.broadcast_to(mask[:1], mask.shape), params)


def read_the_neighbour_of_a_cell(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """V of a stretch behind the prompt, one cell on; caught only if something is there."""
    shifted = v.copy()
    shifted[:, :, 12:50] = v[:, :, 13:51]
    return attention.broadcast_attention(q, k, shifted, mask, params)


def lose_some_precision(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    """Caught only if the limit is near to what float32 costs: an F16 anywhere is 100 times this."""
    return attention.broadcast_attention(q, k, v, mask, params) * np.float32(1 + 5e-6)


@pytest.mark.parametrize(
    "fault",
    [
        ignore_the_mask,
        read_one_sequence_for_all,
        take_heads_in_turn,
        add_sinks_per_chunk,
        mask_all_like_the_first,
        read_the_neighbour_of_a_cell,
        lose_some_precision,
    ],
)
def test_faults_in_the_mathematics_are_caught(
    model: Model, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Floats]
) -> None:
    original = model(architecture="gpt-oss")
    fused = fused_copy(original)

    def faulty(*arguments: Any, n_threads: int) -> Floats:
        return fault(*arguments)

    monkeypatch.setattr(attention, "split_attention", faulty)
    report = check(original, fused)
    assert report.structure.ok
    for layer in report.layers:
        assert [name for name, found in layer.checks.items() if not found.ok] == ["decode_split"]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_every_decode_step_counts(
    model: Model, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    original = model(n_layer=1)
    steps = iter(range(3))
    split = attention.split_attention

    def faulty(*arguments: Any, **named: Any) -> Floats:
        assert named == {"n_threads": 3}
        out = split(*arguments, **named)
        return out * np.float32(1.1) if next(steps) == wrong else out

    monkeypatch.setattr(attention, "split_attention", faulty)
    monkeypatch.setattr(checker, "interleaved", lambda ways, budget: {})
    (report,) = check(original, fused_copy(original), n_decode=3, threads=3).layers
    assert [name for name, found in report.checks.items() if not found.ok] == ["decode_split"]


def test_each_way_is_timed_under_its_own_name(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def spy_project(projections: Projections, *arguments: Any) -> Any:
        calls.append("fused" if projections.separate is None else "separate")
        return project(projections, *arguments)

    monkeypatch.setattr("gguf_fuse.models.layer.project", spy_project)
    for word in ("expanded", "broadcast", "split"):
        way = getattr(attention, f"{word}_attention")

        def spy(*arguments: Any, _way: Any = way, _word: str = word, **named: Any) -> Any:
            calls.append(_word)
            return _way(*arguments, **named)

        monkeypatch.setattr(attention, f"{word}_attention", spy)

    taken: dict[str, str] = {}

    def time_nothing(ways: Mapping[str, Callable[[], object]], budget: float) -> dict[str, float]:
        assert set(blas_threads()) == {QUICK.threads}
        for name, way in ways.items():
            calls.clear()
            way()
            taken[name] = calls[0]
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(checker, "interleaved", time_nothing)
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        timing = check(*pair).timing
    assert taken == {
        "separate": "separate",
        "fused": "fused",
        "expand": "expanded",
        "broadcast": "broadcast",
        "split": "split",
    }
    assert timing is not None
    assert (timing.n_tokens, timing.n_kv) == (QUICK.n_seqs, QUICK.n_kv)


def scaled(path: Path, part: str, factor: float) -> Path:
    contents = Contents.of(path)
    ne, kind, data = contents.tensors[f"blk.1.{part}.weight"]
    values = np.frombuffer(data, np.float32).copy()
    values[:64] *= np.float32(factor)  # one row of 64
    contents.tensors[f"blk.1.{part}.weight"] = (ne, kind, values.tobytes())
    return contents.write()


@pytest.mark.parametrize(
    ("factor", "left"),
    [(np.nan, set()), (np.inf, set()), (1e8, {"projection"}), (1e30, {"projection"})],
)
@pytest.mark.parametrize("part", ["attn_q", "attn_k"])
def test_what_float32_cannot_tell_is_not_checked(
    model: Model, part: str, factor: float, left: set[str]
) -> None:
    """A limit of nan, infinity or a hundred would let everything through, and look like a check."""
    original = scaled(model(), part, factor)
    fused = fused_copy(original)
    report = check(original, fused, n_kv=600)
    assert report.ok
    sound, other = report.layers
    assert (set(sound.checks), sound.note) == (CHECKS, None)
    assert set(other.checks) == left
    assert (other.note or "").endswith("not finite, or too large for float32")
    shown = gguf_fuse("verify", original, fused)
    assert "PARTLY numbers: " in shown.stdout
    assert shown.stderr == ""


@pytest.mark.parametrize("columns", [45, 120])
def test_a_weight_that_is_not_finite_in_the_fused_file_fails(model: Model, columns: int) -> None:
    original = model()
    fused = scaled(fused_copy(original), "attn_qkv", np.nan)
    report = check(original, fused)
    assert [layer.ok for layer in report.layers] == [True, False]
    shown = gguf_fuse("verify", original, fused, env={**os.environ, "COLUMNS": str(columns)})
    assert shown.returncode == 4
    assert re.search(r"^blk\.1 .* nan .*over$", shown.stdout, re.MULTILINE)
    printed = json.loads(gguf_fuse("verify", original, fused, "--json").stdout)
    assert printed["layers"][1]["checks"]["projection"]["error"] is None


@pytest.mark.parametrize("seed", range(5))
def test_limits_leave_room_for_other_seeds(pair: tuple[Path, Path], seed: int) -> None:
    assert check(*pair, seed=seed, n_kv=600).ok


# -- the command --------------------------------------------------------------------------------


def test_swapped_files_are_named(pair: tuple[Path, Path]) -> None:
    found = problems(*reversed(pair))
    assert found[0] == "the first file is the fused one, the second is not: ORIGINAL comes first"


def test_json_is_as_documented(pair: tuple[Path, Path]) -> None:
    run = gguf_fuse("verify", *pair, "--json")
    assert (run.returncode, run.stderr) == (0, "")
    value = json.loads(run.stdout)
    assert set(value) == {"ok", "structure", "layers", "timing"}
    assert value["ok"] is True
    assert value["structure"] == {"ok": True, "problems": []}
    for layer, name in zip(value["layers"], ("blk.0", "blk.1"), strict=True):
        assert set(layer) == {"layer", "ok", "checks"}
        assert (layer["layer"], layer["ok"], set(layer["checks"])) == (name, True, CHECKS)
        for found in layer["checks"].values():
            assert set(found) == {"error", "limit", "ok"}
            assert 0 <= found["error"] <= found["limit"] < 1e-4
    assert {"separate_ms", "fused_ms", "expand_ms", "broadcast_ms", "split_ms"} <= set(
        value["timing"]
    )


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ([], {}),
        (["--n-prompt", "7"], {"n_prompt": 7}),
        (["--n-decode", "7"], {"n_decode": 7}),
        (["--n-seqs", "7"], {"n_seqs": 7}),
        (["--n-kv", "7"], {"n_kv": 7}),
        (["--threads", "7"], {"threads": 7}),
        (["--seed", "7"], {"seed": 7}),
        (["--layers", "1"], {"layers": Choice(frozenset({1}))}),
        (["--structure-only"], {"structure_only": True}),
    ],
)
def test_options_reach_the_checker(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], changes: dict[str, Any]
) -> None:
    got: list[Options] = []

    def stop(original: Path, fused: Path, options: Options) -> Report:
        got.append(options)
        raise GGUFError("seen enough")

    monkeypatch.setattr(checker, "verify", stop)
    CliRunner().invoke(app, ["verify", "-q", "a.gguf", "b.gguf", *arguments])
    (options,) = got
    own = Options(on_start=options.on_start, on_progress=options.on_progress)
    assert options == replace(own, **changes)


def test_structure_only_computes_nothing(pair: tuple[Path, Path]) -> None:
    value = json.loads(gguf_fuse("verify", *pair, "--json", "--structure-only").stdout)
    assert value["ok"] is True
    assert value["layers"] == []


@pytest.mark.parametrize("arguments", [[], ["--json"], ["-q"], ["--structure-only"]])
def test_a_fault_ends_with_exit_4(
    tampered: Callable[..., tuple[Path, Path]], arguments: list[str]
) -> None:
    run = gguf_fuse("verify", *tampered(swap_k_and_v), *arguments)
    assert run.returncode == 4
    (line,) = run.stderr.splitlines()
    assert "verification failed: blk.1.attn_qkv.weight: attn_k differs in row 0" in line
    if arguments == []:
        assert "blk.1: decode_split: error" in run.stdout
        assert ", limit " in run.stdout
    if arguments == ["-q"]:
        assert run.stdout == ""


def test_of_many_problems_twenty_are_shown(model: Model) -> None:
    original, other = model(n_layer=4), fused_copy(model("other.gguf", n_layer=4, seed=2))
    n_more = len(problems(original, other)) - 20
    assert n_more > 1
    wide = {**os.environ, "COLUMNS": "200"}
    done = gguf_fuse("verify", original, other, "--structure-only", env=wide)
    shown = done.stdout.splitlines()
    assert shown[0].startswith("FAILED structure: ")
    assert len(shown) == 22
    assert shown[-1] == f"  and {n_more} more (--json has all)"


def test_files_that_cannot_be_read_end_with_exit_1(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(pair[1].read_bytes()[:-100])
    for second in (bad, tmp_path / "absent.gguf"):
        run = gguf_fuse("verify", pair[0], second)
        assert run.returncode == 1
        assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "x", "0x", "1-", "3-1", "0,,1", "-1", "1 2", "half"])
def test_wrong_layers_are_wrong_usage(text: str) -> None:
    with pytest.raises(ValueError, match="write layers as"):
        parse_layers(text)


def test_exit_codes_of_wrong_layers(pair: tuple[Path, Path]) -> None:
    assert gguf_fuse("verify", *pair, "--layers", "3-1").returncode == 2
    run = gguf_fuse("verify", *pair, "--layers", "0,7")
    assert run.returncode == 1
    assert "no attention layer 7" in run.stderr


def test_layers_are_chosen(model: Model) -> None:
    header = read_header(model(n_layer=12))

    def chosen(text: str) -> list[int]:
        return [int(name[4:]) for name in choose_layers(header, parse_layers(text))]

    assert chosen("0,5-7") == [0, 5, 6, 7]
    assert chosen("all") == chosen("auto") == list(range(12))
    assert chosen("4x") == [0, 4, 7, 11]
    assert chosen("1x") == [0]
    assert chosen("99x") == list(range(12))


def test_a_large_model_is_sampled(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_fuse.verifying.numbers.SMALL_MODEL", 1000)
    assert len(choose_layers(read_header(model(n_layer=12)), Choice())) == 4


@pytest.mark.parametrize(("n_layer", "n_chosen"), [(5, 5), (6, 4)])
def test_large_begins_at_16_million(model: Model, n_layer: int, n_chosen: int) -> None:
    """Each layer's Q, K and V have 3 Mi elements: 5 layers are below 2^24, 6 are above."""
    sizes = {"n_embd": 1024, "n_head": 16, "n_head_kv": 16, "n_ff": 32, "types": {"*": T.Q4_0}}
    path = model(n_layer=n_layer, **sizes)
    for same in (path, fused_copy(path)):
        assert len(choose_layers(read_header(same), Choice())) == n_chosen


# -- memory -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    original = tmp_path_factory.mktemp("large") / "in.gguf"
    spec = ModelSpec(types={"*": T.F16}, n_vocab=1000)
    write_random_model(original, spec_of_size(spec, 300_000_000))
    fused = fused_copy(original)
    yield original, fused
    original.unlink()
    fused.unlink()


def peak(*arguments: str | Path) -> int:
    """Bytes of memory that `gguf-fuse verify` takes at most. Not ru_maxrss: it lives through exec,
    so that the peak of the process that runs the tests would count."""
    script = (
        "import sys\n"
        "from gguf_fuse.cli import main\n"
        "try: main()\n"
        "finally: print(*(l for l in open('/proc/self/status') if 'VmHWM' in l), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, "verify", "-q", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(run.stderr.split()[-2]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(large: tuple[Path, Path]) -> None:
    """Python with numpy takes some 50 MB; the files are 300 MB each, a layer's weights 12 MB."""
    assert peak(*large, "--structure-only") < 100e6
    few = ("--n-kv", "300", "--n-prompt", "8", "--threads", "2")
    one = peak(*large, "--layers", "0", *few)
    assert one < 150e6
    assert peak(*large, "--layers", "all", *few) < one + 30e6
