"""Models in several files: found, checked, merged, kept apart, cut anew; all of them or nothing.

The shards that go in are written by gguf-py, so that the package has no say in what a set is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse import VerifyOptions, verify
from gguf_fuse.api import Options, Result, fuse, unfuse
from gguf_fuse.format import shards
from gguf_fuse.format.header import GGUFError
from gguf_fuse.writing import publish as write
from tests import llama_judge, pack
from tests.conftest import FAST, fused_copy, gguf_fuse
from tests.pack import INT32, STRING, UINT16, UINT32, File, valid

Model = Callable[..., Path]
Tensors = list[tuple[str, int, bytes]]

PROMPT = [1, 261, 7, 300, 45, 46, 290, 12, 9, 270, 33]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shard_paths(prefix: Path | str, count: int) -> list[Path]:
    return [Path(f"{prefix}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


class Writer(gguf.GGUFWriter):  # type: ignore[misc, unused-ignore]
    """gguf-py's, with the keys in the order of llama-gguf-split."""

    def add_shard_kv_data(self) -> None:
        super().add_shard_kv_data()
        for pairs in self.kv_data:
            if "split.count" in pairs:
                pairs["split.count"] = pairs.pop("split.count")


def cut(path: Path, name: str, sizes: Sequence[int] = (), **limits: int) -> list[Path]:
    """The same model in shards of so many tensors, or within gguf-py's own limits, by gguf-py."""
    reader = gguf.GGUFReader(path)
    kind = Writer if limits else gguf.GGUFWriter
    writer = kind(path.with_name(f"{name}.gguf"), "", **limits)  # type: ignore[arg-type]
    writer.kv_data[0].clear()
    writer.data_alignment = reader.alignment
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if sizes:
        flat = list(writer.tensors[0].items())
        ends = np.cumsum(sizes)
        assert ends[-1] == len(flat)
        writer.tensors = [dict(flat[end - n : end]) for n, end in zip(sizes, ends, strict=True)]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return shard_paths(path.with_name(name), len(writer.tensors))


def names_of(path: Path) -> list[str]:
    return [tensor.name for tensor in gguf.GGUFReader(path).tensors]


def read(paths: Sequence[Path]) -> tuple[dict[str, Any], Tensors]:
    """What gguf-py finds: the first file's metadata without what tells of shards, all tensors."""
    readers = [gguf.GGUFReader(path) for path in paths]
    ours = ("GGUF.", "split.", shards.SHARDS_KEY)
    metadata = {
        key: field.contents()
        for key, field in readers[0].fields.items()
        if not key.startswith(ours)
    }
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    return metadata, [(t.name, int(t.tensor_type), t.data.tobytes()) for t in tensors]


def in_three(path: Path, name: str = "in") -> list[Path]:
    n = len(names_of(path))
    return cut(path, name, (5, 7, n - 12))


def between_q_k_and_v(path: Path) -> list[Path]:
    """Shards that end behind each Q and each K of every layer."""
    names = names_of(path)
    ends = [at for at, name in enumerate(names, 1) if name.endswith(("_q.weight", "_k.weight"))]
    ends.append(len(names))
    return cut(path, "in", np.diff([0, *ends]).tolist())


def one_by_one(path: Path) -> list[Path]:
    """A tensor each: where K and V were, nothing is left."""
    return cut(path, "in", split_max_tensors=1)


CUTS: dict[str, Callable[[Path], list[Path]]] = {
    "anywhere": in_three,
    "between Q, K and V": between_q_k_and_v,
    "one by one": one_by_one,
}
SPECS: dict[str, dict[str, Any]] = {
    "grouped": {"n_head": 8, "n_head_kv": 2, "types": {"*": T.F16}},
    "biases": {"architecture": "qwen2", "n_head_kv": 2},
    "not all fusable": {"n_embd": 256, "types": {"*": T.Q4_0, "blk.0.attn_v.weight": T.Q8_0}},
    "odd sizes": {"n_embd": 36, "n_head": 3, "n_head_kv": 1},
}


def kept(path: Path, name: str, count: int, way: Callable[..., Result] = fuse) -> list[Path]:
    """What `way` writes with the sharding of `path`."""
    paths = shard_paths(path.with_name(name), count)
    way(path, str(paths[0]), options=FAST)
    return paths


# -- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("into", CUTS.values(), ids=CUTS.keys())
def test_merging(model: Model, into: Callable[[Path], list[Path]], spec: dict[str, Any]) -> None:
    original = model("whole.gguf", **spec)
    parts = into(original)
    merged, wanted = original.with_name("merged.gguf"), sha256(fused_copy(original))
    for given in (parts[0], parts[1], parts[-1]):
        fuse(given, str(merged), options=replace(FAST, force=True))
        assert sha256(merged) == wanted
    back = original.with_name("back.gguf")
    unfuse(merged, str(back), options=FAST)
    assert sha256(back) == sha256(original)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("into", CUTS.values(), ids=CUTS.keys())
def test_keeping(model: Model, into: Callable[[Path], list[Path]], spec: dict[str, Any]) -> None:
    original = model("whole.gguf", **spec)
    parts = into(original)
    fused = kept(parts[-1], "fused", len(parts))
    assert read(fused) == read([fused_copy(original)])
    merged = original.with_name("merged.gguf")
    unfuse(fused[1], str(merged), options=FAST)
    assert sha256(merged) == sha256(original)
    back = kept(fused[0], "back", len(parts), unfuse)
    assert [sha256(path) for path in back] == [sha256(path) for path in parts]


def test_fused_tensors_are_where_q_was(model: Model) -> None:
    parts = between_q_k_and_v(model("whole.gguf"))
    fused = kept(parts[0], "fused", len(parts))
    for before, after in zip(parts, fused, strict=True):
        wanted = [
            name.replace("attn_q.", "attn_qkv.")
            for name in names_of(before)
            if ".attn_k." not in name and ".attn_v." not in name
        ]
        assert names_of(after) == wanted
        reader, total = gguf.GGUFReader(after), sum(len(names_of(path)) for path in fused)
        assert reader.fields["split.tensors.count"].contents() == total
        assert reader.fields["split.no"].contents() == fused.index(after)
        assert reader.fields["split.count"].contents() == len(fused)


@pytest.mark.parametrize("limit", [{"split_max_tensors": 4}, {"split_max_size": 60_000}])
def test_cutting_anew_gives_the_bytes_of_another_splitter(
    model: Model, limit: dict[str, int]
) -> None:
    original = model("whole.gguf", n_layer=3)
    wanted = cut(fused_copy(original), "wanted", **limit)
    assert len(wanted) > 3
    options = replace(FAST, force=True, **limit)
    for source in (original, in_three(original)[1]):
        for name in ("out", "out.gguf", "out-00001-of-00002.gguf"):
            fuse(source, str(original.with_name(name)), options=options)
            written = sorted(original.parent.glob("out*"))
            assert [p.name for p in written] == [p.name.replace("wanted", "out") for p in wanted]
            assert [sha256(path) for path in written] == [sha256(path) for path in wanted]


def test_cutting_anew_tells_every_shard_its_alignment(model: Model) -> None:
    original = model("whole.gguf", n_embd=36, n_head=3, n_head_kv=1, alignment=64)
    fuse(original, str(original.with_name("out")), options=replace(FAST, split_max_tensors=5))
    written = sorted(original.parent.glob("out-*"))
    assert read(written) == read([fused_copy(original)])
    assert {gguf.GGUFReader(path).alignment for path in written} == {64}


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(model: Model) -> None:
    original = model("whole.gguf")
    fuse(original, str(original.with_name("out")), options=replace(FAST, split_max_size=1))
    written = sorted(original.parent.glob("out-*"))
    assert [len(names_of(path)) for path in written] == [1] * len(names_of(fused_copy(original)))


def test_cutting_a_file_that_was_merged_by_llama_cpp(tmp_path: Path) -> None:
    """It leaves split.* keys behind, with a count of 0."""
    file = valid().key("split.no", UINT16, 0).key("split.count", UINT16, 0)
    path = save(file.key("split.tensors.count", INT32, 11), tmp_path / "in.gguf")
    fuse(path, str(tmp_path / "out"), options=replace(FAST, split_max_tensors=5))
    written = sorted(tmp_path.glob("out-*"))
    header = shards.read_model(written[0])
    assert len(header.shards) == 2
    for shard in header.shards:
        keys = [key for key in shard.metadata if key.startswith("split.")]
        assert sorted(keys) == sorted(shards.SPLIT_KEYS)


def test_sizes() -> None:
    texts = {"4G": 4 * 10**9, "500M": 500 * 10**6, "1K": 1000, "77": 77}
    assert {text: shards.parse_size(text) for text in texts} == texts
    for text in ("", "0", "0G", "-1", "1.5G", "4g", "4GB", "G", "4 G", "9" * 20):
        with pytest.raises(ValueError, match="4G"):
            shards.parse_size(text)


@pytest.mark.skipif(not llama_judge.available(), reason="xllamacpp is not installed")
@pytest.mark.parametrize("into", CUTS.values(), ids=CUTS.keys())
def test_llama_cpp_loads_kept_shards(model: Model, into: Callable[[Path], list[Path]]) -> None:
    original = model("whole.gguf", architecture="qwen2", n_head_kv=2, types={"*": T.F16})
    parts = into(original)
    assert_judged_equal(original, kept(parts[0], "fused", len(parts))[0])


@pytest.mark.skipif(not llama_judge.available(), reason="xllamacpp is not installed")
@pytest.mark.parametrize("limit", [{"split_max_tensors": 4}, {"split_max_size": 60_000}])
def test_llama_cpp_loads_new_shards(model: Model, limit: dict[str, int]) -> None:
    original = model("whole.gguf", n_head_kv=2, types={"*": T.Q8_0})
    given = in_three(original)[2]
    fuse(given, str(original.with_name("out")), options=replace(FAST, **limit))
    assert_judged_equal(original, min(original.parent.glob("out-*")))


def assert_judged_equal(original: Path, fused: Path) -> None:
    before, after = (llama_judge.log_probabilities(path, PROMPT) for path in (original, fused))
    assert np.isfinite(before).all() and before.std() > 0.01
    np.testing.assert_array_equal(before, after)


# -- the other commands --------------------------------------------------------------------------


def test_verify_takes_shards_on_either_side(model: Model) -> None:
    original = model("whole.gguf", n_head_kv=2)
    parts = between_q_k_and_v(original)
    fused = [fused_copy(original), kept(parts[0], "fused", len(parts))[1]]
    for before in (original, parts[1]):
        for after in fused:
            report = verify(before, after)
            assert report.ok, report
            assert report.structure.n_fused > 0 and report.layers


def test_verify_finds_one_byte_in_any_shard(model: Model) -> None:
    original = model("whole.gguf")
    fused = kept(in_three(original)[0], "fused", 3)
    for number, path in enumerate(fused, 1):
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)
        report = verify(original, fused[0], VerifyOptions(structure_only=True))
        (problem,) = report.structure.problems
        assert f"byte {len(data) - 40} of shard {number} of the fused file" in problem
        data[-40] ^= 1
        path.write_bytes(data)


def test_verify_checks_what_is_recorded_of_the_cut(model: Model) -> None:
    original = model("whole.gguf")
    n = len(names_of(original))
    fused = kept(in_three(original)[0], "fused", 3)
    other = cut(original, "other", (4, 8, n - 12))
    report = verify(other[0], fused[0], VerifyOptions(structure_only=True))
    assert [shards.SHARDS_KEY in problem for problem in report.structure.problems] == [True]


def test_inspect(model: Model) -> None:
    original = model("whole.gguf")
    parts = in_three(original)
    whole, one = (
        json.loads(gguf_fuse("inspect", path, "--json").stdout) for path in (original, parts[1])
    )
    assert one["file"] == str(parts[1])
    assert one["file_bytes"] == sum(path.stat().st_size for path in parts)
    assert one | {key: whole[key] for key in ("file", "file_bytes")} == whole
    assert "one of 3 shards" in gguf_fuse("inspect", parts[1]).stdout


def test_command_line(model: Model, tmp_path: Path) -> None:
    original = model("whole.gguf")
    parts = in_three(original)
    out = shard_paths(tmp_path / "out", 3)
    done = gguf_fuse("fuse", parts[1], out[0], "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["input"], result["output"]) == (str(parts[1]), str(out[0]))
    copied = result["bytes_copied"] + result["bytes_cloned"]
    assert copied > sum(len(data) for _, _, data in read(out)[1])
    piped = subprocess.run(
        [sys.executable, "-m", "gguf_fuse", "fuse", str(parts[2]), "-"],
        capture_output=True,
        check=True,
    )
    assert piped.stdout == fused_copy(original).read_bytes()
    for options in (["--split-max-size", "50K"], ["--split-max-tensors", "6"]):
        done = gguf_fuse("unfuse", out[2], tmp_path / options[1], *options)
        assert done.returncode == 0, done.stderr
        assert read(sorted(tmp_path.glob(f"{options[1]}-*"))) == read([original])


WRONG_USAGE = {
    "both": ["out", "--split-max-size", "4G", "--split-max-tensors", "4"],
    "size": ["out", "--split-max-size", "4 apples"],
    "tensors": ["out", "--split-max-tensors", "0"],
    "pipe": ["-", "--split-max-tensors", "1"],
}


@pytest.mark.parametrize("arguments", WRONG_USAGE.values(), ids=WRONG_USAGE.keys())
def test_wrong_usage(model: Model, tmp_path: Path, arguments: list[str]) -> None:
    original = model()
    done = gguf_fuse("fuse", original, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert list(tmp_path.iterdir()) == [original]


def test_a_pipe_is_one_file(model: Model) -> None:
    with pytest.raises(GGUFError, match=r"^-: standard output is one file; shards need a name"):
        fuse(model(), "-", options=Options(split_max_tensors=1))


def test_more_shards_than_can_be_numbered(tmp_path: Path) -> None:
    file = valid()  # 6 tensors when it is fused
    small = pack.tensor("", (1,))
    file.tensors += [replace(small, name=f"t{i}") for i in range(65_530)]
    text = failure(save(file, tmp_path / "in.gguf"), tmp_path / "out", split_max_tensors=1)
    assert text == f"{tmp_path}/out: 65536 shards; at most 65535 are possible"


# -- bad sets ------------------------------------------------------------------------------------


def save(file: File, path: Path) -> Path:
    path.write_bytes(file.pack())
    return path


def good_set(n_tensors: int = 10) -> list[File]:
    """Three shards of `valid()`, by hand."""
    file = valid()
    groups = (file.tensors[:3], file.tensors[3:6], file.tensors[6:])
    made = []
    for number, tensors in enumerate(groups):
        shard = File([*file.pairs] if number == 0 else [], tensors)
        shard.key("split.no", UINT16, number).key("split.count", UINT16, 3)
        made.append(shard.key("split.tensors.count", INT32, n_tensors))
    return made


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


def failure(source: Path, output: Path, **options: Any) -> str:
    with pytest.raises(GGUFError) as caught:
        fuse(source, str(output), options=replace(FAST, **options))
    text = str(caught.value)
    assert "\n" not in text
    return text


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


# -- the output's name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "out-00001-of-00002.gguf": ("1 of 2", "has 3 shards", "--split-max-size"),
        "out-00002-of-00003.gguf": ("name the first shard", "out-00001-of-00003.gguf"),
    }.items(),
)
def test_name_that_does_not_fit(
    model: Model, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    parts = in_three(model("whole.gguf"))
    before = sorted(tmp_path.iterdir())
    text = failure(parts[0], tmp_path / name)
    assert [word for word in words if word not in text] == []
    assert sorted(tmp_path.iterdir()) == before


def test_shard_name_for_a_whole_model(model: Model, tmp_path: Path) -> None:
    assert "is one file" in failure(model(), tmp_path / "out-00001-of-00002.gguf")


def test_output_is_a_shard_of_the_input(model: Model) -> None:
    """L9498: a glob that matches two shards, and the second is taken for the output."""
    parts = in_three(model("whole.gguf"))
    hashes = [sha256(path) for path in parts]
    for given, output in ((0, 1), (1, 0), (2, 2)):
        text = failure(parts[given], parts[output], force=True)
        assert "same file" in text or "name the first shard" in text
    n = -(-len(names_of(fused_copy(parts[0].with_name("whole.gguf")))) // 3)
    text = failure(parts[0], parts[0].with_name("in"), force=True, split_max_tensors=n)
    assert "same file" in text
    link = parts[0].with_name("link.gguf")
    link.symlink_to(parts[2])
    assert "same file" in failure(parts[0], link, force=True)
    assert [sha256(path) for path in parts] == hashes


# -- all or nothing ------------------------------------------------------------------------------


@pytest.fixture
def three(model: Model) -> list[Path]:
    return in_three(model("whole.gguf"))


def put_old(tmp_path: Path, numbers: Sequence[int] = (1, 2, 3)) -> list[Path]:
    out = shard_paths(tmp_path / "out", 3)
    for number in numbers:
        out[number - 1].write_text(f"precious {number}")
    return out


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("dry_run", [False, True])
def test_existing_shard(three: list[Path], tmp_path: Path, number: int, dry_run: bool) -> None:
    out = put_old(tmp_path, [number])
    before = contents(tmp_path)
    text = failure(three[0], out[0], dry_run=dry_run)
    assert str(out[number - 1]) in text and "--force" in text
    assert contents(tmp_path) == before
    fuse(three[0], str(out[0]), options=replace(FAST, force=True))
    assert read(out) == read([fused_copy(tmp_path / "whole.gguf")])


def test_two_shards_that_would_be_one_file(three: list[Path], tmp_path: Path) -> None:
    out = shard_paths(tmp_path / "out", 3)
    for path in out[1:]:
        path.symlink_to("target")
    before = sorted(tmp_path.iterdir())
    text = failure(three[0], out[0])
    assert text == f"{out[1]}: two shards would be the same file, {tmp_path}/target"
    assert sorted(tmp_path.iterdir()) == before


def test_space_for_all_shards_together(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shard_paths(tmp_path / "out", 3)
    needed = fuse(three[0], str(out[0]), options=Options(dry_run=True)).n_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    assert f"{needed} bytes are needed" in failure(three[0], out[0], reflink="never")
    assert not any(path.exists() for path in out)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    assert fuse(three[0], str(out[0]), options=FAST).n_bytes == needed
    assert sum(path.stat().st_size for path in out) == needed


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [(), (1, 2, 3)])
def test_failure_in_the_second_shard(
    three: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    old: tuple[int, ...],
) -> None:
    out, calls = put_old(tmp_path, old), []
    before = contents(tmp_path)
    real = write.copy_ranges

    def fail(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        real(*arguments, **options)
        if len(calls) == 2:
            assert len(list(tmp_path.glob("*.tmp"))) == 2
            raise error

    monkeypatch.setattr(write, "copy_ranges", fail)
    with pytest.raises((GGUFError, KeyboardInterrupt), match="nothing was written") as caught:
        fuse(three[0], str(out[0]), options=replace(FAST, force=True))
    assert isinstance(caught.value, KeyboardInterrupt) or str(out[1]) in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("old", [(), (1, 2, 3), (2,)])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_failure_of_a_renaming(
    three: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    old: tuple[int, ...],
    links: bool,
) -> None:
    out, calls = put_old(tmp_path, old), []
    before = contents(tmp_path)
    real = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target in out and ".tmp" in self.name and len(calls) < at:
            calls.append(target)
            if len(calls) == at:
                raise PermissionError(13, "Permission denied")
        return real(self, target)

    def no_link(*names: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "replace", fail)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    assert "nothing was written" in failure(three[0], out[0], force=True)
    assert calls == out[::-1][:at]  # loading begins with the first: it is the last to appear
    assert contents(tmp_path) == before


_SIGNAL = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
calls = []
def fsync(fd, fsync=os.fsync):
    fsync(fd)
    calls.append(fd)
    if len(calls) == 2:
        os.kill(os.getpid(), {signal})
os.fsync = fsync
from gguf_fuse.cli import main
main()
"""


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_signal_after_the_second_shard(three: list[Path], tmp_path: Path, signal: str) -> None:
    out = put_old(tmp_path)
    before = contents(tmp_path)
    script = _SIGNAL.replace("{signal}", f"signal.{signal}")
    command = [sys.executable, "-c", script, "fuse", str(three[0]), str(out[0]), "--force"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == {"SIGTERM": 143, "SIGINT": 130, "SIGKILL": -9}[signal], done.stderr
    left = list(tmp_path.glob("*.tmp"))
    assert len(left) == (2 if signal == "SIGKILL" else 0)
    for path in left:
        path.unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [1, 2, 3])
def test_shard_that_changes_meanwhile(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = write.copy_ranges

    def touch(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        os.utime(three[number - 1], ns=(0, 0))

    monkeypatch.setattr(write, "copy_ranges", touch)
    before = contents(tmp_path)
    text = failure(three[0], shard_paths(tmp_path / "out", 3)[0])
    assert text.startswith(f"{three[number - 1]}: changed while")
    assert contents(tmp_path) == before


def test_shard_that_is_cut_meanwhile(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write.copy_ranges

    def truncate(*arguments: Any, **options: Any) -> None:
        os.truncate(three[1], 100)
        real(*arguments, **options)

    monkeypatch.setattr(write, "copy_ranges", truncate)
    text = failure(three[0], tmp_path / "out.gguf", reflink="never")
    assert text.startswith(f"{three[1]}: ended at byte")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
def test_more_shards_than_open_files(model: Model, tmp_path: Path) -> None:
    original = model("whole.gguf", n_layer=8)
    parts = one_by_one(original)
    out = shard_paths(tmp_path / "out", len(parts))
    limit = (
        "import resource as r; n, hard = r.getrlimit(r.RLIMIT_NOFILE);"
        "r.setrlimit(r.RLIMIT_NOFILE, (40, hard)); from gguf_fuse.cli import main; main()"
    )
    for arguments in (["fuse", parts[0], out[0]], ["verify", parts[0], out[0]]):
        command = [sys.executable, "-c", limit, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_shards_behind_links(three: list[Path], tmp_path: Path) -> None:
    """As in the cache of huggingface_hub: names are links to files called by their hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for at, path in enumerate(three):
        path.rename(blobs / f"{at}")
        (snapshot / path.name).symlink_to(blobs / f"{at}")
    fuse(snapshot / three[1].name, str(tmp_path / "out.gguf"), options=FAST)
    assert sha256(tmp_path / "out.gguf") == sha256(fused_copy(tmp_path / "whole.gguf"))
