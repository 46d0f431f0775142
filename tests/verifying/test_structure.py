"""Every fault in the bytes is caught, and its place named."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as T
from gguf.constants import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_fuse.format.header import TensorInfo
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.verifying.report import VerifyOptions
from gguf_fuse.verifying.structure import compare_structure
from tests import pack
from tests.conftest import fused_copy
from tests.edit import bytes_of
from tests.verifying.faults import (
    QUICK,
    Contents,
    Fault,
    add_a_key,
    add_a_tensor,
    add_an_unknown_key_of_our_own,
    change_a_long_value,
    change_a_token,
    change_a_value,
    change_a_value_type,
    change_the_bias,
    change_the_scale,
    cut_into_less_than_nothing,
    drop_the_bias,
    leave_a_tensor_out,
    lose_a_row,
    lose_a_token,
    pad_with_something,
    pad_with_text,
    problems,
    record_another_version,
    record_fewer_rows,
    record_other_positions,
    record_other_rows,
    record_rows_as_text,
    record_too_little,
    record_without_rows,
    remove_a_key,
    reorder_keys,
    reorder_tensors,
    swap_k_and_v,
    swap_two_heads,
    take_the_q_of_another_layer,
)

Model = Callable[..., Path]


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
    problem, *_ = problems(original, fused)
    assert problem == f"last.weight: {3008 - n_lost} bytes, but 3008 in the original"


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


@pytest.mark.parametrize("suffix", ["weight", "bias", "scale"])
def test_a_part_that_the_original_lacks(model: Model, suffix: str) -> None:
    """Two of three biases would be lost without a word in llama.cpp."""
    original = model(architecture="qwen2", scales="equal")
    fused = fused_copy(original)
    contents = Contents.of(original)
    del contents.tensors[f"blk.0.attn_k.{suffix}"]
    found = problems(contents.write(), fused)
    assert f"blk.0: is fused, but the original has no blk.0.attn_k.{suffix}" in found


def test_a_fused_bias_takes_no_name_of_the_original(model: Model) -> None:
    """The original's own bias of that name would be lost without a word."""
    original = model(architecture="qwen2")
    fused = fused_copy(original)
    contents = Contents.of(original)
    contents.tensors["blk.0.attn_qkv.bias"] = ((128,), T.F32, bytes(512))
    found = problems(contents.write(), fused)
    assert "blk.0.attn_qkv.bias: is fused, but the original has its own" in found


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
        compare_structure(*headers, QUICK)


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
        compare_structure(*headers, VerifyOptions(on_progress=grow))


def test_a_file_that_is_cut_meanwhile(model: Model) -> None:
    original = model()
    fused = fused_copy(original)
    headers = read_header(original), read_header(fused)
    words = f"{re.escape(str(fused))}: ended at byte .*: it was cut while it was read"
    options = VerifyOptions(threads=1, on_progress=lambda n: os.truncate(fused, 100))
    with pytest.raises(GGUFError, match=words):
        compare_structure(*headers, options)


def test_the_time_is_that_of_comparing_alone(model: Model) -> None:
    """Not that of what goes on meanwhile, where that takes longer."""
    original = model()
    headers = read_header(original), read_header(fused_copy(original))
    left = [sum(tensor.n_bytes for tensor in headers[0].tensors)]
    compared: list[float] = []

    def on_progress(n_bytes: int) -> None:
        left[0] -= n_bytes

    def meanwhile() -> Iterator[None]:
        while left[0] > 0:
            yield time.sleep(0.001)
        compared.append(time.perf_counter())
        yield time.sleep(0.05)

    started = time.perf_counter()
    found = compare_structure(
        *headers, VerifyOptions(threads=2, on_progress=on_progress), meanwhile()
    )
    assert 0 < found.seconds < compared[0] - started


# -- the layout that llama.cpp wants -------------------------------------------------------------


def packed_pair(tmp_path: Path, change: Callable[[pack.File], object]) -> tuple[Path, Path]:
    """A model, and its fused file as it should be but for the change."""
    file = pack.fused(pack.valid())
    change(file)
    return pack.save(pack.valid(), tmp_path / "in.gguf"), pack.save(file, tmp_path / "fused.gguf")


def test_a_gap_before_a_tensor(tmp_path: Path) -> None:
    """ggml/src/gguf.cpp: "has offset 9056, expected 8928"."""
    file = pack.fused(pack.valid())
    offsets = {tensor.name: tensor.offset for tensor in layout_of(file)}
    name = "blk.1.attn_output.weight"

    def move(file: pack.File) -> None:
        later = [tensor.name for tensor in file.tensors]
        for later_name in later[later.index(name) :]:
            file.tensor(str(later_name), offset=offsets[str(later_name)] + 64)
        at = later.index(name) - 1
        data = file.tensors[at].data + bytes(64)
        file.tensors[at] = replace(file.tensors[at], data=data)

    at = offsets[name]
    expected = f"tensor '{name}' has offset {at + 64}, expected {at}"
    assert problems(*packed_pair(tmp_path, move))[0] == expected


def layout_of(file: pack.File) -> tuple[TensorInfo, ...]:
    with tempfile.TemporaryDirectory() as folder:
        return read_header(pack.save(file, Path(folder) / "file.gguf")).tensors


def test_tensors_in_another_order_than_their_data(tmp_path: Path) -> None:
    """Each one's own bytes are right, and llama.cpp still refuses the file."""

    def exchange(file: pack.File) -> None:
        (one, other) = (t for t in file.tensors if str(t.name).endswith("attn_output.weight"))
        offsets = {tensor.name: tensor.offset for tensor in layout_of(file)}
        file.tensor(str(one.name), offset=offsets[str(other.name)], data=other.data)
        file.tensor(str(other.name), offset=offsets[str(one.name)], data=one.data)

    original, fused = packed_pair(tmp_path, exchange)
    assert any("has offset" in problem for problem in problems(original, fused))


@pytest.mark.parametrize("more", [b"\0" * 32, b"\1", "twice"])
def test_bytes_that_belong_to_no_tensor(tmp_path: Path, more: bytes | str) -> None:
    original, fused = packed_pair(tmp_path, lambda file: None)
    data = fused.read_bytes()
    behind = data if isinstance(more, str) else more
    fused.write_bytes(data + behind)
    (problem,) = problems(original, fused)
    assert f"{len(behind)} bytes behind" in problem
    assert ("a second GGUF file" in problem) == (more == "twice")


def test_padding_that_is_cut(tmp_path: Path) -> None:
    """gguf_init_from_file_impl reads the padded size of all tensors, or refuses the file."""
    original, fused = packed_pair(tmp_path, lambda file: None)
    fused.write_bytes(fused.read_bytes()[:-3])
    assert problems(original, fused) == ["3 bytes of padding are missing behind the last tensor"]


def test_padding_that_is_not_zero(tmp_path: Path) -> None:
    original, fused = packed_pair(tmp_path, lambda file: None)
    header = read_header(fused)
    last = header.tensors[-1].data
    with bytes_of(fused) as data:
        assert not any(data[last.start + last.n_bytes :])
        data[-1] = 1
        data[header.end] = 2
    (problem,) = problems(original, fused)
    assert problem == "2 bytes of padding between the fused file's tensors are not zero"


def test_what_is_wrong_with_the_original_alone_is_a_note(tmp_path: Path) -> None:
    original, fused = packed_pair(tmp_path, lambda file: None)
    original.write_bytes(original.read_bytes() + bytes(32))
    found = compare_structure(read_header(original), read_header(fused), QUICK)
    assert found.ok
    (note,) = found.notes
    assert note.startswith("the original: tensor ")
    assert "32 bytes behind" in note


@pytest.mark.parametrize("ne", [(), (2, 16), (16, 2)])
def test_biases_that_are_no_rows_cannot_be_fused(tmp_path: Path, ne: tuple[int, ...]) -> None:
    before = pack.valid(n_layers=1)
    before.tensors += [pack.tensor(f"blk.0.attn_{part}.bias", ne) for part in "qkv"]
    after = pack.fused(pack.valid(n_layers=1))
    after.tensors += [pack.tensor("blk.0.attn_qkv.bias", (64,))]
    original = pack.save(before, tmp_path / "in.gguf")
    found = problems(original, pack.save(after, tmp_path / "fused.gguf"))
    words = f"blk.0.attn_qkv.bias: is fused, but blk.0.attn_q.bias is {list(ne)}, which has no rows"
    assert any(problem.startswith(words) for problem in found)


def test_parts_with_rows_of_another_length_cannot_be_fused(tmp_path: Path) -> None:
    """As many bytes as it should have, but not row by row."""
    before = pack.valid(n_layers=1).tensor(pack.V, ne=(16, 32))
    after = pack.fused(pack.valid(n_layers=1))
    original = pack.save(before, tmp_path / "in.gguf")
    found = problems(original, pack.save(after, tmp_path / "fused.gguf"))
    words = f"{pack.QKV}: is fused, but {pack.V} is [16, 32], {pack.Q} [32, 32]"
    assert any(problem == words for problem in found)


# -- two files that are no pair ------------------------------------------------------------------


def test_a_file_without_most_tensors_is_one_line(model: Model) -> None:
    original = model()
    contents = Contents.of(fused_copy(original))
    contents.tensors = dict(list(contents.tensors.items())[:3])
    (problem,) = problems(original, contents.write())
    assert problem.startswith("two different models: 18 of 21 tensors differ in name, type or ")


def test_another_architecture_is_one_line(model: Model) -> None:
    found = problems(model(), fused_copy(model("other.gguf", architecture="qwen2")))
    assert found == ["two different models: architecture 'llama', but 'qwen2' in the fused file"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"n_embd": 128}, "tensors differ in name, type or shape; "),
        ({"seed": 2}, "tensors hold other data; "),
    ],
)
def test_another_model_is_one_line(model: Model, spec: dict[str, Any], words: str) -> None:
    found = problems(model(), fused_copy(model("other.gguf", **spec)))
    told = [problem for problem in found if not problem.startswith("metadata ")]
    assert len(told) == 1
    assert re.match(rf"two different models: \d+ of \d+ {words}", told[0])
