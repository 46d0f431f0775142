"""Metadata that names tensors follows them, and comes back: `general.tensor_extra.*`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from gguf_fuse import VerifyOptions, verify
from gguf_fuse.api import fuse, unfuse
from gguf_fuse.format.source import GGUFError
from gguf_fuse.planning.fusions import GATE_UP
from gguf_fuse.planning.plan import NothingToDo
from tests.compare import sha256
from tests.conftest import FAST, dry, fused_copy, unfused_copy
from tests.edit import bytes_of
from tests.pack import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT16,
    INT64,
    QKV,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Array,
    File,
    K,
    Pair,
    Q,
    V,
    fused,
    save,
    tensor,
    unrecorded,
    valid,
)
from tests.shards import good_set, shard_paths

NAME, PREC = "general.tensor_extra.name", "general.tensor_extra.prec_a4"
OUTPUT = "blk.0.attn_output.weight"
Q1, K1, V1 = (f"blk.1.attn_{part}.weight" for part in "qkv")


def named(names: list[Any], values: list[Any], file: File | None = None, **other: Array) -> File:
    """The arrays in front of all other keys but the first. other: further ones, by their names."""
    file = file or valid()
    pairs = [
        Pair(NAME, ARRAY, Array(STRING, names)),
        *(Pair(f"general.tensor_extra.{key}", ARRAY, array) for key, array in other.items()),
        Pair(PREC, ARRAY, Array(BOOL, values)),
    ]
    return replace(file, pairs=[*file.pairs[:1], *pairs, *file.pairs[1:]])


def extra(path: Path) -> dict[str, Any]:
    """What gguf-py finds, by name."""
    fields = gguf.GGUFReader(path).fields
    return dict(zip(fields[NAME].contents(), fields[PREC].contents(), strict=True))


def reasons(path: Path) -> list[str | None]:
    return [layer.reason for layer in dry(path).plan.skipped]


def assert_follows(file: File, tmp_path: Path, wanted: dict[str, bool]) -> Path:
    original = save(file, tmp_path / "in.gguf")
    path = fused_copy(original)
    assert extra(path) == wanted
    assert verify(original, path, VerifyOptions(structure_only=True)).ok
    assert sha256(unfused_copy(path)) == sha256(original)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_equal_values_become_one(tmp_path: Path, order: Any) -> None:
    file = named([OUTPUT, V, Q, K], [True, False, False, False])
    file.order = order
    path = assert_follows(file, tmp_path, {OUTPUT: True, QKV: False})
    keys = [key for key in gguf.GGUFReader(path).fields if not key.startswith("GGUF.")]
    assert keys[:3] == ["general.architecture", NAME, PREC]  # where they were


def test_a_name_that_is_no_utf8_stays(tmp_path: Path) -> None:
    other = (2).to_bytes(8, "little") + b"\xff\xfe"
    original = save(named([other, Q, K, V], [True] * 4), tmp_path / "in.gguf")
    assert sha256(unfused_copy(fused_copy(original))) == sha256(original)


def test_arrays_of_any_kind_are_parallel(tmp_path: Path) -> None:
    other = {
        "note": Array(STRING, ["same", "o", "same", "same"]),
        "rank": Array(INT16, [-7, 1, -7, -7]),
        "limit": Array(FLOAT32, [float("nan"), 1.0, float("nan"), float("nan")]),
    }
    file = named([Q, OUTPUT, K, V], [False, True, False, False], **other)
    path = assert_follows(file, tmp_path, {QKV: False, OUTPUT: True})
    fields = gguf.GGUFReader(path).fields
    assert fields["general.tensor_extra.note"].contents() == ["same", "o"]
    assert fields["general.tensor_extra.rank"].contents() == [-7, 1]


@pytest.mark.parametrize("names", [[], [OUTPUT], [Q, K, V, Q1, K1, V1], [Q, Q1, V, K1, K, V1]])
def test_whichever_layers_are_named(tmp_path: Path, names: list[str]) -> None:
    wanted = {
        name.replace("attn_q.", "attn_qkv."): False
        for name in names
        if ".attn_k." not in name and ".attn_v." not in name
    }
    assert_follows(named(names, [False] * len(names)), tmp_path, wanted)


def test_no_name_counts_as_true(tmp_path: Path) -> None:
    """llama_prec_policy::load looks for values of 0 alone."""
    assert_follows(named([K, OUTPUT], [True, False]), tmp_path, {QKV: True, OUTPUT: False})


PREC_DIFFERS = f"values of {PREC} differ: "
LEFT: dict[str, tuple[File, str]] = {
    "unequal": (named([Q, K, V], [True, False, False]), PREC_DIFFERS + "true, false, false"),
    "not named": (named([Q, V], [False, False]), PREC_DIFFERS + "false, true, false"),
    "unequal in another array": (
        named([Q, K, V], [True] * 3, bits=Array(UINT8, [4, 8, 4])),
        "values of general.tensor_extra.bits differ: 4, 8, 4",
    ),
    "not named in an array that nobody knows": (
        named([Q, K], [True] * 2, bits=Array(UINT8, [4, 4])),
        "values of general.tensor_extra.bits differ: 4, 4, none",
    ),
    "twice": (named([Q, K, V, K], [False] * 4), f"{NAME} names a part of {QKV} twice"),
    "already": (named([Q, QKV], [True] * 2), f"{NAME} names {QKV} already"),
}


@pytest.mark.parametrize(("file", "reason"), LEFT.values(), ids=LEFT)
def test_a_layer_is_left(tmp_path: Path, file: File, reason: str) -> None:
    original = save(file, tmp_path / "in.gguf")
    assert reasons(original) == [reason]
    before = extra(original)
    path = fused_copy(original)  # the other layer
    assert extra(path) == before
    assert sha256(unfused_copy(path)) == sha256(original)


@pytest.mark.parametrize(
    ("file", "words"),
    {
        "length": (named([Q, K, V], [True] * 2), f"{PREC} is no array of 3 values"),
        "scalar": (named([Q], [True]).key(PREC, BOOL, True), f"{PREC} is no array of 1 values"),
        "nested": (
            named([Q], [True], x=Array(ARRAY, [Array(UINT8, [1])])),
            "general.tensor_extra.x is no array",
        ),
        "numbers": (
            named([], []).key(NAME, ARRAY, Array(UINT8, [1])),
            f"{NAME} is no array of strings",
        ),
    }.values(),
)
def test_arrays_that_tell_nothing(tmp_path: Path, file: File, words: str) -> None:
    with pytest.raises(NothingToDo, match=words) as caught:
        dry(save(file, tmp_path / "in.gguf"))
    assert "\n" not in str(caught.value)


def test_a_file_of_the_converter_gets_three_names(tmp_path: Path) -> None:
    file = named([QKV, OUTPUT], [False, True], unrecorded())
    back = unfused_copy(save(file, tmp_path / "in.gguf"))
    assert extra(back) == {Q: False, K: False, V: False, OUTPUT: True}


def test_in_shards_that_are_kept(tmp_path: Path) -> None:
    """The pair in the middle has new bytes, the keys of the cut stay around it where they were."""
    shards = good_set()
    first = named([Q, K, V], [False] * 3, shards[0])
    first.pairs = [first.pairs[0], *first.pairs[-3:], *first.pairs[1:-3]]  # split.* before them
    before, after, back = (shard_paths(tmp_path / name, 3) for name in ("in", "out", "back"))
    for shard, path in zip([first, *shards[1:]], before, strict=True):
        save(shard, path)
    fuse(before[0], str(after[0]), options=FAST)
    assert extra(after[0]) == {QKV: False}
    keys = [key for key in gguf.GGUFReader(after[0]).fields if not key.startswith("GGUF.")]
    assert keys[:6] == [str(pair.key) for pair in first.pairs[:6]]
    assert verify(before[0], after[0], VerifyOptions(structure_only=True)).ok
    unfuse(after[0], str(back[0]), options=FAST)
    assert [sha256(path) for path in back] == [sha256(path) for path in before]


def test_gate_and_up_of_experts(tmp_path: Path) -> None:
    gate, up, both = (f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "gate_up"))
    file = named([up, OUTPUT, gate], [False, True, False])
    file.key("general.architecture", STRING, "qwen35moe")
    file.tensors += [tensor(name, (32, 8, 4)) for name in (gate, up)]
    original = save(file, tmp_path / "in.gguf")
    path = fused_copy(original, fusions=(GATE_UP,))
    assert extra(path) == {both: False, OUTPUT: True}
    assert verify(original, path, VerifyOptions(structure_only=True)).ok
    assert sha256(unfused_copy(path)) == sha256(original)


# -- verify: exactly that change -----------------------------------------------------------------


def compared(file: File, tmp_path: Path, *pairs: Pair) -> tuple[str, ...]:
    """The problems where the fused file has these pairs, all else being right."""
    original = save(file, tmp_path / "in.gguf")
    path = fused_copy(original)
    own = fused(file)
    for pair in pairs:
        own.key(str(pair.key), pair.value_type, pair.value)
    own.key("gguf_fuse.version", UINT32, 3)
    kept = own.pack()
    save(own, path)
    assert path.read_bytes() == kept
    return verify(original, path, VerifyOptions(structure_only=True)).structure.problems


NAMES = Pair(NAME, ARRAY, Array(STRING, [QKV, OUTPUT]))
VALUES = Pair(PREC, ARRAY, Array(BOOL, [False, True]))


@pytest.mark.parametrize(
    ("pairs", "key"),
    [
        ((Pair(NAME, ARRAY, Array(STRING, [Q, OUTPUT])), VALUES), NAME),
        ((Pair(NAME, ARRAY, Array(STRING, [OUTPUT, QKV])), VALUES), NAME),
        ((NAMES, Pair(PREC, ARRAY, Array(BOOL, [True, True]))), PREC),
        ((NAMES, Pair(PREC, ARRAY, Array(UINT8, [0, 1]))), PREC),
        ((VALUES,), NAME),
    ],
    ids=["old name", "order", "value", "type", "names untouched"],
)
def test_verify_accepts_no_other_change(tmp_path: Path, pairs: tuple[Pair, ...], key: str) -> None:
    file = named([Q, K, V, OUTPUT], [False] * 3 + [True])
    found = compared(file, tmp_path, *pairs)
    assert f"metadata {key}: does not follow the names of the fused tensors" in found


def test_verify_reads_the_record(tmp_path: Path) -> None:
    original = save(named([Q, K, V], [False] * 3), tmp_path / "in.gguf")
    path = fused_copy(original)
    with bytes_of(path) as data:
        at = data.rindex(V.encode())  # the recorded one
        data[at + 4] += 1
    (problem,) = verify(original, path, VerifyOptions(structure_only=True)).structure.problems
    assert problem == "metadata gguf_fuse.replaced: not the pairs that the original has"


# -- a record that is damaged --------------------------------------------------------------------


def recorded(data: bytes, at: list[int]) -> File:
    file = fused(valid()).key("gguf_fuse.version", UINT32, 3)
    file.key("gguf_fuse.replaced", ARRAY, Array(UINT8, data))
    return file.key("gguf_fuse.replaced_at", ARRAY, Array(UINT64, at))


def pair(key: str, tail: bytes = b"\2\0\0\0\1\0") -> bytes:
    """Of a UINT16, unless the tail is another."""
    return len(key).to_bytes(8, "little") + key.encode() + tail


COUNT = pair("split.count")
DAMAGED: dict[str, tuple[File, str]] = {
    "place": (recorded(COUNT, [99, len(COUNT)]), "replaced_at has 99, past the last pair"),
    "too short": (recorded(COUNT, [0, len(COUNT) - 1]), "has no pair at byte 0"),
    "too long": (recorded(COUNT, [0, len(COUNT) + 1]), "different lengths"),
    "bytes behind": (recorded(COUNT + b"\0", [0, len(COUNT)]), "different lengths"),
    "odd": (recorded(COUNT, [0, len(COUNT), 1]), "different lengths"),
    "another key": (recorded(pair("general.name"), [0, 26]), "never replaced"),
    "no type": (recorded(pair("split.count", b"\77\0\0\0\1\0"), [0, len(COUNT)]), "no pair"),
    "endless": (
        recorded(pair("split.no", b"\t\0\0\0\x08\0\0\0" + b"\xff" * 8), [0, 32]),
        "no pair at byte 0",
    ),
    "negative": (
        recorded(COUNT, []).key("gguf_fuse.replaced_at", ARRAY, Array(INT64, [0, -5])),
        "replaced_at has -5",
    ),
    "key twice": (recorded(COUNT * 2, [0, len(COUNT), 1, len(COUNT)]), "has a key twice"),
    "no data": (
        fused(valid()).key("gguf_fuse.replaced_at", ARRAY, Array(UINT64, [])),
        "gguf_fuse.replaced is missing",
    ),
    "words": (
        recorded(COUNT, [0, len(COUNT)]).key(
            "gguf_fuse.replaced", ARRAY, Array(UINT16, list(COUNT))
        ),
        "different lengths",
    ),
    "version": (
        recorded(COUNT, [0, len(COUNT)]).key("gguf_fuse.version", UINT32, 1),
        "of another version",
    ),
}


@pytest.mark.parametrize(("file", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_refused(tmp_path: Path, file: File, words: str) -> None:
    path = save(file, tmp_path / "in.gguf")
    with pytest.raises(GGUFError, match="the record of the fusion does not fit") as caught:
        unfused_copy(path)
    assert words in str(caught.value)
    assert [found.name for found in tmp_path.iterdir()] == ["in.gguf"]
