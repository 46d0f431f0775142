"""Where tensors lie: what llama.cpp refuses, and that no byte of a file is lost in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader

from gguf_fuse import GGUFError
from gguf_fuse.format.layout import is_canonical, misplaced, nonzero_padding
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.shards import read_model
from tests import pack
from tests.conftest import dry, fused_copy, unfused_copy
from tests.edit import bytes_of
from tests.pack import K, Q, Tensor, V, fused, save, valid
from tests.server import Run, assert_one_line
from tests.shards import good_set, shard_paths

Q8_1, Q1_0, Q2_0, NEWER = 9, 41, 42, 142
K_AT, V_AT = 4480, 6528  # their offsets in `valid()`


def data_of(name: str) -> bytes:
    return next(tensor.data for tensor in valid().tensors if tensor.name == name)


def with_gap(n_bytes: int) -> bytes:
    """Bytes of no tensor between Q and K; the offsets behind them follow."""
    return valid().tensor(Q, data=data_of(Q) + bytes(n_bytes)).pack()


def not_at_the_start() -> bytes:
    first = "token_embd.weight"
    return valid().tensor(first, data=bytes(64) + data_of(first), offset=64).pack()


def swapped() -> bytes:
    """K and V have changed places in the data, not in the list."""
    file = valid().tensor(K, offset=V_AT, data=data_of(V))
    return file.tensor(V, offset=K_AT, data=data_of(K)).pack()


def blocks(type_id: int, block: int, block_bytes: int, only: str | None = None) -> bytes:
    """Q, K and V of a fork's own blocks under an id of ours; only: the others are F32."""
    file, tensors = valid(), []
    for name in (Q, K, V):
        own = Tensor(name, (256, 32), type_id, b"\1" * (256 * 32 // block * block_bytes))
        tensors.append(own if only in (None, name) else pack.tensor(name, (256, 32)))
    return replace(file, tensors=tensors).pack()


def saved_set(folder: Path) -> list[Path]:
    paths = shard_paths(folder / "in", 3)
    return [save(shard, path) for shard, path in zip(good_set(), paths, strict=True)]


def layout_of(path: Path, content: bytes) -> tuple[list[str], bool]:
    path.write_bytes(content)
    header = read_header(path)
    return misplaced(header), is_canonical(header)


def test_as_llama_cpp_writes_it(tmp_path: Path) -> None:
    assert layout_of(tmp_path / "in.gguf", valid().pack()) == ([], True)
    assert layout_of(tmp_path / "fused.gguf", fused(valid()).pack()) == ([], True)


def test_a_gap_names_both_offsets(tmp_path: Path) -> None:
    lines, canonical = layout_of(tmp_path / "in.gguf", with_gap(96))
    assert lines[0] == f"tensor {K!r} has offset 4576, expected 4480"
    assert lines[1].startswith(f"tensor {Q!r} (F32 [32, 32]) takes 4096 bytes")
    assert lines[1].endswith(f"but there are 4192 before tensor {K!r}")
    assert len(lines) == 2 and not canonical


def test_another_order_is_told_and_fused_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "in.gguf"
    lines, canonical = layout_of(path, swapped())
    assert lines[:2] == [
        f"tensor {K!r} has offset {V_AT}, expected {K_AT}",
        f"tensor {V!r} has offset {K_AT}, expected 8576",
    ]
    assert not canonical
    assert fused_copy(path).read_bytes() == fused(valid()).pack()


def test_a_shard_is_named(tmp_path: Path) -> None:
    first = saved_set(tmp_path)[0]
    with bytes_of(first) as data:
        data += bytes(64)
    (line,) = misplaced(read_model(first))
    assert line.startswith(f"{first}: tensor ") and "but there are" in line


# Content, and what the refusal of fuse and unfuse says.
UNACCOUNTED: dict[str, tuple[Callable[[], bytes], tuple[str, ...]]] = {
    "a gap": (lambda: with_gap(32), (repr(Q), "F32 [32, 32]", "4096 bytes", "4128", repr(K))),
    "bytes behind": (
        lambda: valid().pack() + b"x" * 70,
        ("'output_norm.weight'", "132 bytes", "230", "the 70 bytes behind it", "head -c"),
    ),
    "a second file": (
        lambda: valid().pack() * 2,
        ("second GGUF file", f"at byte {len(valid().pack())}", "llama-gguf-split --merge"),
    ),
    "a header alone": (
        lambda: replace(valid(), tensors=[], alignment=1).pack() + bytes(99),
        ("bytes behind the header",),
    ),
    "before the first": (not_at_the_start, ("64 bytes before tensor 'token_embd.weight'",)),
    "longer blocks": (lambda: blocks(Q1_0, 128, 50), (repr(Q), "Q1_0", "fork", "1152", "3200")),
    "longer blocks of the last": (
        lambda: blocks(Q1_0, 128, 50, only=V),
        (repr(V), "Q1_0 [256, 32]", "1152", "3200", "end of the file"),
    ),
    "shorter blocks": (lambda: blocks(Q2_0, 128, 34), (repr(Q), "2304 bytes of Q2_0", "overlaps")),
    "shorter blocks of the last": (lambda: blocks(Q2_0, 128, 34, only=V), (repr(V), "Q2_0")),
}


@pytest.mark.parametrize("case", UNACCOUNTED)
@pytest.mark.parametrize("command", ["fuse", "unfuse"])
def test_bytes_of_no_tensor_are_refused(case: str, command: str, run: Run, tmp_path: Path) -> None:
    make, words = UNACCOUNTED[case]
    path = save(make(), tmp_path / "in.gguf")
    assert_one_line(run(command, path, tmp_path / "out"), str(path), *words)
    assert list(tmp_path.iterdir()) == [path]


def test_adapters_and_matrices_lose_nothing_either(run: Run, tmp_path: Path) -> None:
    for file in (pack.lora(), pack.matrix(Q, K, V)):
        path = save(file.pack() + bytes(64), tmp_path / "in.gguf")
        assert_one_line(run("fuse", path, tmp_path / "out"), "64 bytes behind")


def test_shards_put_together_by_cat(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    path.write_bytes(b"".join(part.read_bytes() for part in saved_set(tmp_path)))
    with pytest.raises(GGUFError, match=r"second GGUF file .* llama-gguf-split --merge"):
        read_model(path)


def test_types_newer_than_the_table_are_copied_by_their_room(tmp_path: Path) -> None:
    """In the middle with the padding, at the end whatever there is."""
    file = valid().tensor("blk.1.attn_output.weight", type=NEWER)
    file.tensor("output_norm.weight", type=NEWER)
    path = save(file.pack(), tmp_path / "in.gguf")
    assert unfused_copy(fused_copy(path)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("type_id", "block_bytes"), [(Q8_1, 36 * 2), (Q2_0, 18)])
def test_types_that_gguf_py_does_not_know_right(
    type_id: int, block_bytes: int, tmp_path: Path
) -> None:
    """It gives Q8_1 (32 elements) 40 bytes in place of 36, and has no Q2_0 (64 in 18)."""
    file = valid()
    for name, n_rows in ((Q, 64), (K, 32), (V, 32)):
        data = bytes(range(1, block_bytes + 1)) * n_rows
        file.tensor(name, ne=(64, n_rows), type=type_id, data=data)
    path = save(file, tmp_path / "in.gguf")
    output = fused_copy(path)
    assert output.read_bytes() == fused(file).pack()
    assert unfused_copy(output).read_bytes() == file.pack()


@pytest.mark.parametrize("ne", [(0,), (32, 0), (0, 3, 1)])
@pytest.mark.parametrize("type_id", [pack.F32, pack.Q4_K, NEWER])
@pytest.mark.parametrize("at", [0, 3, 10])
def test_tensors_without_elements_are_carried_along(
    ne: tuple[int, ...], type_id: int, at: int, run: Run, tmp_path: Path
) -> None:
    """First, between Q and K, and last, where the offset is the end of the file."""
    file = valid()
    file.tensors.insert(at, Tensor("placeholder", ne, type_id, b""))
    path = save(file, tmp_path / "in.gguf")
    assert layout_of(path, file.pack()) == ([], True)
    output = fused_copy(path)
    assert output.read_bytes() == fused(file).pack()
    assert unfused_copy(output).read_bytes() == file.pack()
    assert run("verify", path, output, "--structure-only").code == 0
    if type_id == pack.F32:
        assert [t.name for t in GGUFReader(output).tensors if not t.n_bytes] == ["placeholder"]


def test_padding_that_is_not_zero_is_counted_and_said(run: Run, tmp_path: Path) -> None:
    file, path = valid(), tmp_path / "in.gguf"
    data, at = bytearray(file.pack()), 0
    for name, field in file.fields():
        if name == "header padding":
            data[at : at + 3] = b"abc"
        if name == "padding of 'output_norm.weight'":
            data[at : at + len(field)] = b"x" * len(field)
        at += len(field)
    assert layout_of(path, bytes(data)) == ([], True)
    assert nonzero_padding(read_header(path)) == 3 + 28
    outcome = run("fuse", path, tmp_path / "out")
    assert outcome.code == 0 and (tmp_path / "out").read_bytes() == fused(file).pack()
    assert "31 bytes of padding are not zero" in outcome.out
    assert "not this file bit for bit" in outcome.out
    again = ("fuse", path, tmp_path / "out", "--force")
    assert json.loads(run(*again, "--json").out)["bit_for_bit"] is False
    path.write_bytes(file.pack())
    assert "bit for bit" not in run(*again).out
    assert json.loads(run(*again, "--json").out)["bit_for_bit"] is True


def test_a_dry_run_refuses_as_well(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="takes 4096 bytes"):
        dry(save(with_gap(32), tmp_path / "in.gguf"))
