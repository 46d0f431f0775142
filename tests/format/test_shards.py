"""Sets of shards as they are found: complete, damaged, incomplete, unusual."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gguf_fuse import VerifyOptions, verify
from gguf_fuse.api import fuse, unfuse
from gguf_fuse.format import shards
from gguf_fuse.writing.cut import parse_size
from tests.compare import sha256
from tests.conftest import FAST, fused_copy
from tests.pack import (
    ARRAY,
    FLOAT32,
    INT32,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Array,
    File,
    fused,
    save,
    valid,
)
from tests.server import Run, assert_one_line
from tests.shards import failure, good_set, kept, shard_paths

Spoil = Callable[[list[File]], object]


BAD_SETS: dict[str, tuple[Spoil, int, tuple[str, ...]]] = {
    # what is wrong, the shard that the message must name, and its words
    "count": (lambda s: s[1].key("split.count", UINT16, 4), 2, ("split.count is 4", "not 3")),
    "no count": (lambda s: s[2].pairs.pop(1), 3, ("split.count is missing",)),
    "no number": (lambda s: s[1].pairs.pop(0), 2, ("split.no is missing",)),
    "text as number": (lambda s: s[1].key("split.no", STRING, "1"), 2, ("split.no",)),
    "doubled": (lambda s: s.__setitem__(2, s[1]), 3, ("shard 2 of 3 by its split.no", "twice")),
    "tensor twice": (
        lambda s: s[2].tensors.append(s[1].tensors[0]),
        3,
        (str(valid().tensors[3].name), "00002-of-00003"),
    ),
    "another model": (lambda s: s[2].key("split.tensors.count", INT32, 7), 3, ("is 7, but 10",)),
    "no total": (lambda s: [shard.pairs.pop() for shard in s], 1, ("split.tensors.count",)),
    "tensor lost": (lambda s: s[1].tensors.pop(), 1, ("is 10, but", "hold 9 tensors")),
    "byte order": (lambda s: setattr(s[1], "order", ">"), 2, ("byte order is big",)),
    "version": (lambda s: setattr(s[2], "version", 2), 3, ("version is 2",)),
}


def test_a_good_set_is_good(tmp_path: Path) -> None:
    paths = shard_paths(tmp_path / "in", 3)
    for shard, path in zip(good_set(), paths, strict=True):
        save(shard, path)
    fuse(paths[1], str(tmp_path / "out"), options=FAST)
    whole = save(valid(), tmp_path / "whole.gguf")
    assert (tmp_path / "out").read_bytes() == fused_copy(whole).read_bytes()


def reorder(made: list[File]) -> None:
    for shard in made:
        shard.pairs.sort(key=lambda pair: not str(pair.key).startswith("split."))


def align_first(made: list[File]) -> None:
    """As llama-gguf-split does: only the first shard has the key, the others are at 32."""
    made[0].key("general.alignment", UINT32, 64).alignment = 64


def add_more(made: list[File]) -> None:
    made[1].key("general.architecture", STRING, "llama").key("note", STRING, "kept")


UNUSUAL: dict[str, Callable[[list[File]], object]] = {
    "big endian": lambda s: [setattr(shard, "order", ">") for shard in s],
    "version 2": lambda s: [setattr(shard, "version", 2) for shard in s],
    "split keys first": reorder,
    "own alignments": align_first,
    "metadata in the second": add_more,
    "nothing in the second": lambda s: [s[2].tensors.extend(s[1].tensors), s[1].tensors.clear()],
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_sets_come_back(tmp_path: Path, change: Callable[[list[File]], object]) -> None:
    made, paths = good_set(), shard_paths(tmp_path / "in", 3)
    change(made)
    for shard, path in zip(made, paths, strict=True):
        save(shard, path)
    fused = kept(paths[0], "fused", 3)
    assert verify(paths[2], fused[1], VerifyOptions(structure_only=True)).ok
    back = kept(fused[2], "back", 3, unfuse)
    assert [sha256(path) for path in back] == [sha256(path) for path in paths]
    for name, limit in (("all.gguf", None), ("cut", 4)):
        fuse(paths[0], str(tmp_path / name), options=replace(FAST, split_max_tensors=limit))
    for path in (tmp_path / "all.gguf", *tmp_path.glob("cut-00002*")):
        assert verify(paths[0], path, VerifyOptions(structure_only=True)).ok


@pytest.mark.parametrize("given", [0, 1, 2])
@pytest.mark.parametrize(("spoil", "number", "words"), BAD_SETS.values(), ids=BAD_SETS.keys())
def test_bad_set(
    tmp_path: Path, spoil: Spoil, number: int, words: tuple[str, ...], given: int
) -> None:
    made, paths = good_set(), shard_paths(tmp_path / "in", 3)
    spoil(made)
    for shard, path in zip(made, paths, strict=True):
        save(shard, path)
    outcome = failure(paths[given], tmp_path / "out.gguf")
    if given + 1 == number and words[0].startswith("split.count is 4"):
        words = ("is shard 2 of 4", "its name")
    assert outcome.startswith(f"{paths[number - 1]}: ")
    assert [word for word in words if word not in outcome] == []
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("given", [0, 1, 2])
def test_missing_shards(tmp_path: Path, given: int) -> None:
    paths = shard_paths(tmp_path / "in", 3)
    save(good_set()[given], paths[given])
    text = failure(paths[given], tmp_path / "out")
    first, second = sorted({1, 2, 3} - {given + 1})
    assert text.startswith(f"{paths[given]}: missing of 3 shards: {first}, {second}; ")
    assert text.endswith(f"no {paths[first - 1]}")
    assert list(tmp_path.iterdir()) == [paths[given]]


@pytest.mark.parametrize("name", ["in.gguf", "in-00002-of-00004.gguf", "in-2-of-3.gguf"])
def test_name_that_is_none_of_a_shard(tmp_path: Path, name: str) -> None:
    path = save(good_set()[1], tmp_path / name)
    text = failure(path, tmp_path / "out")
    assert text.startswith(f"{path}: is shard 2 of 3") and "-00002-of-00003.gguf" in text


def test_damaged_shard(tmp_path: Path) -> None:
    paths = shard_paths(tmp_path / "in", 3)
    for shard, path in zip(good_set(), paths, strict=True):
        save(shard, path)
    os.truncate(paths[2], paths[2].stat().st_size - 1000)
    assert failure(paths[0], tmp_path / "out").startswith(f"{paths[2]}: tensor")


def test_absurd_count(tmp_path: Path) -> None:
    file = valid().key("split.no", UINT32, 0).key("split.count", UINT32, 2**32 - 1)
    path = save(file, tmp_path / "in-00001-of-00002.gguf")
    assert "4294967295" in failure(path, tmp_path / "out")
    file.key("split.count", UINT32, 65535)
    path = save(file, tmp_path / "in-00001-of-65535.gguf")
    assert "missing of 65535 shards: 2, 3, 4, 5, 6, 7, 8, 9, ...; " in failure(path, tmp_path / "o")


def test_tensors_of_all_shards_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_TENSORS", 9)
    paths = shard_paths(tmp_path / "in", 3)
    for file, path in zip(good_set(), paths, strict=True):
        save(file, path)
    assert "the shards have more than 9 tensors" in failure(paths[0], tmp_path / "out.gguf")


def test_sizes() -> None:
    texts = {"4G": 4 * 10**9, "500M": 500 * 10**6, "1K": 1000, "77": 77}
    assert {text: parse_size(text) for text in texts} == texts
    for text in ("", "0", "0G", "-1", "1.5G", "4g", "4GB", "G", "4 G", "9" * 20):
        with pytest.raises(ValueError, match="4G"):
            parse_size(text)


@pytest.mark.parametrize("command", ["fuse", "unfuse"])
@pytest.mark.parametrize("value_type", [UINT8, UINT16, UINT32, INT32, UINT64])
def test_shard(value_type: int, command: str, run: Run, tmp_path: Path) -> None:
    file = (fused(valid()) if command == "unfuse" else valid()).key("split.no", value_type, 0)
    path = save(file.key("split.count", value_type, 3), tmp_path / "model-00001-of-00003.gguf")
    outcome = run(command, path, tmp_path / "out")
    assert_one_line(outcome, str(path), "missing of 3 shards: 2, 3", "model-00002-of-00003.gguf")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [(STRING, "3"), (FLOAT32, 3.0), (ARRAY, Array(UINT16, [0, 3]))])
def test_shard_with_a_count_of_the_wrong_type(
    value: tuple[int, object], run: Run, tmp_path: Path
) -> None:
    """Taking part of a model for the whole one makes a corrupt file (mesh-llm#177)."""
    path = save(valid().key("split.count", *value), tmp_path / "in.gguf")
    assert_one_line(run("fuse", path, tmp_path / "out"), str(path), "split.count")
    assert list(tmp_path.iterdir()) == [path]
