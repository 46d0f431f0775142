"""Models in several files: merged, kept apart, cut anew; all of them or nothing.

The shards that go in are written by gguf-py, so that the package has no say in what a set is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse import VerifyOptions, verify
from gguf_fuse.api import Options, fuse, unfuse
from gguf_fuse.format import shards
from gguf_fuse.format.source import GGUFError
from gguf_fuse.planning.record import SHARDS_KEY
from gguf_fuse.writing import write
from tests.compare import assert_judged_equal, needs_llama_cpp, sha256
from tests.conftest import FAST, fused_copy
from tests.edit import bytes_of
from tests.pack import INT32, UINT16, save, valid
from tests.shards import (
    CUTS,
    between_q_k_and_v,
    cut,
    failure,
    in_three,
    kept,
    names_of,
    one_by_one,
    read,
    shard_paths,
)

Model = Callable[..., Path]

SPECS: dict[str, dict[str, Any]] = {
    "grouped": {"n_head": 8, "n_head_kv": 2, "types": {"*": T.F16}},
    "biases": {"architecture": "qwen2", "n_head_kv": 2},
    "not all fusable": {"n_embd": 256, "types": {"*": T.Q4_0, "blk.0.attn_v.weight": T.Q8_0}},
    "odd sizes": {"n_embd": 36, "n_head": 3, "n_head_kv": 1},
}


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


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("into", CUTS.values(), ids=CUTS.keys())
def test_llama_cpp_loads_kept_shards(model: Model, into: Callable[[Path], list[Path]]) -> None:
    original = model("whole.gguf", architecture="qwen2", n_head_kv=2, types={"*": T.F16})
    parts = into(original)
    assert_judged_equal(original, kept(parts[0], "fused", len(parts))[0])


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("limit", [{"split_max_tensors": 4}, {"split_max_size": 60_000}])
def test_llama_cpp_loads_new_shards(model: Model, limit: dict[str, int]) -> None:
    original = model("whole.gguf", n_head_kv=2, types={"*": T.Q8_0})
    given = in_three(original)[2]
    fuse(given, str(original.with_name("out")), options=replace(FAST, **limit))
    assert_judged_equal(original, min(original.parent.glob("out-*")))


# -- verify --------------------------------------------------------------------------------------


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
        with bytes_of(path) as data:
            data[-40] ^= 1
        report = verify(original, fused[0], VerifyOptions(structure_only=True))
        (problem,) = report.structure.problems
        assert f"byte {len(data) - 40} of shard {number} of the fused file" in problem
        with bytes_of(path) as data:
            data[-40] ^= 1


def test_verify_checks_what_is_recorded_of_the_cut(model: Model) -> None:
    original = model("whole.gguf")
    n = len(names_of(original))
    fused = kept(in_three(original)[0], "fused", 3)
    other = cut(original, "other", (4, 8, n - 12))
    report = verify(other[0], fused[0], VerifyOptions(structure_only=True))
    assert [SHARDS_KEY in problem for problem in report.structure.problems] == [True]


def test_a_pipe_is_one_file(model: Model) -> None:
    with pytest.raises(GGUFError, match=r"^-: standard output is one file; shards need a name"):
        fuse(model(), "-", options=Options(split_max_tensors=1))


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
def test_existing_shard(three: list[Path], tmp_path: Path, number: int) -> None:
    out = put_old(tmp_path, [number])
    before = contents(tmp_path)
    text = failure(three[0], out[0])
    assert str(out[number - 1]) in text and "--force" in text
    fuse(three[0], str(out[0]), options=Options(dry_run=True))
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


@pytest.mark.slow
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
