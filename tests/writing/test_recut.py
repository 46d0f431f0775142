"""However a fused file is cut, unfuse gives the original's very bytes: property by property.

Keys of a cut (`split.*`) of an original in one file are its own: left by llama-gguf-split, which
writes a count of 0 when it merges and of 1 where there is one shard.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from gguf_fuse import VerifyOptions, verify
from gguf_fuse.api import fuse, unfuse
from tests.compare import sha256
from tests.conftest import FAST
from tests.pack import INT32, UINT16, UINT32, File, Pair, save, valid
from tests.server import Run
from tests.shards import good_set, shard_paths

KEYS = ("split.no", UINT16), ("split.count", UINT16), ("split.tensors.count", INT32)


def plain(_: random.Random) -> File:
    return valid()


def left_over(count: int, types: tuple[int, ...] = (UINT16, UINT16, INT32)) -> Callable[..., File]:
    """split.* anywhere among the other keys, in any order."""

    def make(rng: random.Random) -> File:
        file = valid()
        pairs = zip(KEYS, types, (0, count, len(file.tensors)), strict=True)
        for (key, _), value_type, value in rng.sample(list(pairs), 3):
            file.pairs.insert(rng.randrange(len(file.pairs) + 1), Pair(key, value_type, value))
        return file

    return make


ORIGINALS = {
    "plain": plain,
    "merged": left_over(0),
    "one shard": left_over(1),
    "of other types": left_over(1, (UINT32, UINT16, UINT32)),
}
LIMITS = {
    "whole": {},
    "all in one by size": {"split_max_size": 4 * 10**9},
    "all in one by tensors": {"split_max_tensors": 100},
    "by size": {"split_max_size": 5000},
    "by tensors": {"split_max_tensors": 2},
}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("make", ORIGINALS.values(), ids=ORIGINALS)
@pytest.mark.parametrize("seed", range(3))
def test_one_file_comes_back(
    tmp_path: Path, make: Callable[..., File], limit: dict[str, int], seed: int
) -> None:
    original = save(make(random.Random(seed)), tmp_path / "in.gguf")
    fuse(original, str(tmp_path / "out.gguf"), options=replace(FAST, **limit))
    written = sorted(tmp_path.glob("out*"))
    whole = len(written) == 1
    for path in written:
        keys = [key for key in gguf.GGUFReader(path).fields if key.startswith("split.")]
        assert len(keys) == (0 if whole else 3)
    assert verify(original, written[-1], VerifyOptions(structure_only=True)).ok
    back = tmp_path / "back.gguf"
    unfuse(written[-1], str(back), options=FAST)
    assert sha256(back) == sha256(original)
    # On the way back too: one shard is the file, and of several, each says which it is.
    for name, options in (("one", {"split_max_size": 10**9}), ("two", {"split_max_tensors": 6})):
        unfuse(written[0], str(tmp_path / name), options=replace(FAST, **options))
    one, *two = shard_paths(tmp_path / "one", 1) + shard_paths(tmp_path / "two", 2)
    assert sha256(one) == sha256(original)
    for number, path in enumerate(two):
        fields = gguf.GGUFReader(path).fields
        found = [fields[key].contents() for key, _ in KEYS]
        assert found == [number, 2, len(valid().tensors)]


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_a_set_comes_back_as_one_file(tmp_path: Path, limit: dict[str, int]) -> None:
    parts = shard_paths(tmp_path / "in", 3)
    for shard, path in zip(good_set(), parts, strict=True):
        save(shard, path)
    fuse(parts[1], str(tmp_path / "out.gguf"), options=replace(FAST, **limit))
    fused = min(tmp_path.glob("out*"))
    assert verify(parts[0], fused, VerifyOptions(structure_only=True)).ok
    unfuse(fused, str(tmp_path / "back.gguf"), options=FAST)
    assert sha256(tmp_path / "back.gguf") == sha256(save(valid(), tmp_path / "whole.gguf"))


def test_a_one_file_original_in_kept_shards(tmp_path: Path) -> None:
    """Cut by fuse, then kept as it is cut by unfuse: the set has keys of its own cut alone."""
    original = save(left_over(0)(random.Random(1)), tmp_path / "in.gguf")
    fuse(original, str(tmp_path / "out"), options=replace(FAST, split_max_tensors=3))
    fused = sorted(tmp_path.glob("out*"))
    back = shard_paths(tmp_path / "back", len(fused))
    unfuse(fused[0], str(back[0]), options=FAST)
    counts = [gguf.GGUFReader(path).fields["split.count"].contents() for path in back]
    assert counts == [len(fused)] * len(fused)
    names = itertools.chain.from_iterable(gguf.GGUFReader(path).tensors for path in back)
    assert [tensor.name for tensor in names] == [tensor.name for tensor in valid().tensors]


@pytest.mark.parametrize(
    ("output", "options", "told"),
    [
        ("out.gguf", (), True),
        ("out", ("--split-max-tensors", "5"), True),
        ("out-00001-of-00003.gguf", (), False),
    ],
)
def test_fuse_says_that_a_set_comes_back_as_one_file(
    tmp_path: Path, run: Run, output: str, options: tuple[str, ...], told: bool
) -> None:
    parts = shard_paths(tmp_path / "in", 3)
    for shard, path in zip(good_set(), parts, strict=True):
        save(shard, path)
    command = ("fuse", parts[0], tmp_path / output, *options, "--dry-run")
    done = run(*command)
    assert done.code == 0
    assert ("unfuse will give back one file in place of the 3 shards" in done.out) == told
    assert json.loads(run(*command, "--json").out)["bit_for_bit"] != told
