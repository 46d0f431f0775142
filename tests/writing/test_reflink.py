"""Cloning on file systems that share blocks: the same file as a copy, almost no new disk space.

XFS and Btrfs images are loop-mounted, which takes root and their programs.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader

from gguf_fuse.api import Options, Reflink, fuse, unfuse
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError, OpenSource
from gguf_fuse.planning.record import PADDING_KEY
from gguf_fuse.verifying.manifest import verify_manifest
from gguf_fuse.writing import copy as copying
from gguf_fuse.writing.place import Copy, Placement, place
from tests.compare import assert_fused, sha256
from tests.conftest import gguf_fuse
from tests.models.random_model import ModelSpec, spec_of_size, write_random_model

IMAGE_BYTES = 1400 << 20
MAKE = {"xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}


@pytest.fixture(scope="module", params=MAKE)
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name = request.param
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting an image takes root")
    if shutil.which(MAKE[name][0]) is None:
        pytest.skip(f"{MAKE[name][0]} is not installed")
    yield from loop_mount(MAKE[name], tmp_path_factory.mktemp(name))


def loop_mount(make: list[str], folder: Path) -> Iterator[Path]:
    image, where = folder / "image", folder / "mount"
    where.mkdir()
    image.touch()
    os.truncate(image, IMAGE_BYTES)
    subprocess.run([*make, image], check=True, capture_output=True)
    mounting = subprocess.run(["mount", "-o", "loop", image, where], capture_output=True, text=True)
    if mounting.returncode:
        pytest.skip(f"cannot mount an image here: {mounting.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)
        image.unlink()


def used_bytes(where: Path) -> int:
    os.sync()
    status = os.statvfs(where)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def options(reflink: Reflink, **more: Any) -> Options:
    return Options(reflink=reflink, **more)


@pytest.mark.parametrize("type_", [T.F16, T.Q4_0], ids=lambda type_: type_.name)
def test_a_clone_is_the_copy_and_takes_no_space(mounted: Path, type_: T) -> None:
    folder = mounted / type_.name
    folder.mkdir()
    original, fused, copied, back = (folder / f"{name}.gguf" for name in "ofcb")
    write_random_model(original, spec_of_size(ModelSpec(types={"*": type_}), 210_000_000))
    most_new = read_header(original).data_start + (1 << 20)

    before = used_bytes(mounted)
    result = fuse(original, str(fused), options=options("always"))
    assert used_bytes(mounted) - before <= most_new
    assert result.written.n_cloned > 0.99 * original.stat().st_size

    before = used_bytes(mounted)
    unfuse(fused, str(back), options=options("always"))
    assert used_bytes(mounted) - before <= most_new
    assert sha256(back) == sha256(original)

    fuse(original, str(copied), options=options("never"))
    assert_equal_but_for_padding(fused, copied)
    told = folder / "o.json"
    again = fuse(original, folder / "again", options=options("always", manifest=told))
    assert again.written == result.written
    (file,) = json.loads(told.read_text())["files"]
    assert (file["name"], file["sha256"]) == ("again", sha256(fused))
    assert verify_manifest(told, fused).ok
    assert_fused(original, fused)
    shutil.rmtree(folder)


def assert_equal_but_for_padding(cloned: Path, copied: Path) -> None:
    one, other = read_header(cloned), read_header(copied)
    entries = [[(t.name, t.ne, t.type, t.offset) for t in file.tensors] for file in (one, other)]
    assert entries[0] == entries[1]
    pairs = {key: one.metadata.pair_bytes(key) for key in one.metadata if key != PADDING_KEY}
    assert pairs == {key: other.metadata.pair_bytes(key) for key in other.metadata}
    assert cloned.read_bytes()[one.data_start :] == copied.read_bytes()[other.data_start :]


def test_odd_sizes_clone_what_lies_alike(mounted: Path) -> None:
    """36 * 36 floats are no whole blocks: what is shifted alike is cloned, the rest copied."""
    original, fused, back = (mounted / f"odd-{name}.gguf" for name in "ofb")
    spec = ModelSpec(n_embd=36, n_head=3, n_head_kv=1, n_vocab=3001, alignment=8, n_ff=1201)
    write_random_model(original, spec)
    result = fuse(original, str(fused), options=options("auto"))
    assert result.written.n_cloned > 0 < result.written.n_copied
    assert_fused(original, fused)
    unfuse(fused, str(back), options=options("auto"))
    assert sha256(back) == sha256(original)


def test_shards_are_cloned(mounted: Path) -> None:
    """Each range from its own file: out of one into several, several into several and into one."""
    original, merged = mounted / "shards-o.gguf", mounted / "shards-m.gguf"
    write_random_model(original, ModelSpec(n_embd=512, types={"*": T.F16}))
    n = original.stat().st_size
    always = options("always")
    result = fuse(original, str(mounted / "cut"), options=replace(always, split_max_size=n // 4))
    assert result.written.n_cloned > 0.9 * n
    names = [output.path.name for output in result.outputs]
    assert len(names) > 3

    def sets(name: str) -> list[Path]:
        return [mounted / other.replace("cut", name) for other in names]

    assert unfuse(sets("cut")[1], str(merged), options=always).written.n_cloned > 0.9 * n
    assert sha256(merged) == sha256(original)
    unfuse(sets("cut")[0], str(sets("separate")[0]), options=options("never"))
    fused = fuse(sets("separate")[2], str(sets("fused")[0]), options=always)
    assert fused.written.n_cloned > 0.9 * n
    back = unfuse(sets("fused")[2], str(sets("back")[0]), options=always)
    assert back.written.n_cloned > 0.9 * n
    hashes = [[sha256(path) for path in sets(name)] for name in ("separate", "back")]
    assert hashes[0] == hashes[1]


def test_refusal_half_way_falls_back(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second range of every file is refused by the system call."""
    original, fused = mounted / "half.gguf", mounted / "half-fused.gguf"
    write_random_model(original, ModelSpec(n_embd=256, types={"*": T.F16}))
    monkeypatch.setattr(copying, "CLONE_BYTES", 1 << 20)
    real, calls = copying._clone, []

    def refuse_second(source: OpenSource, target_fd: int, clone: Copy) -> None:
        calls.append(clone)
        if len(calls) == 3:  # the first call probes
            raise OSError(errno.EOPNOTSUPP, "not supported")
        real(source, target_fd, clone)

    monkeypatch.setattr(copying, "_clone", refuse_second)
    result = fuse(original, str(fused), options=options("auto"))
    assert len(calls) > 3
    assert result.written.n_copied >= 1 << 20 < result.written.n_cloned
    assert_fused(original, fused)

    calls.clear()
    with pytest.raises(GGUFError, match="refused to clone"):
        fuse(original, str(fused), options=options("always", force=True))
    assert_fused(original, fused)
    assert not list(mounted.glob("*.tmp"))


def test_full_disk_in_the_midst_of_cloning(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, fused = mounted / "full.gguf", mounted / "full-fused.gguf"
    write_random_model(original, ModelSpec(n_embd=256, types={"*": T.F16}))
    calls: list[Copy] = []
    real = copying._clone

    def fill_up(source: OpenSource, target_fd: int, clone: Copy) -> None:
        calls.append(clone)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target_fd, clone)

    monkeypatch.setattr(copying, "_clone", fill_up)
    with pytest.raises(GGUFError, match="No space left on device; nothing was written"):
        fuse(original, str(fused), options=options("auto"))
    assert not fused.exists()
    assert not list(mounted.glob("*.tmp"))


def test_command_says_what_was_cloned(mounted: Path) -> None:
    original, fused = mounted / "cli.gguf", mounted / "cli-fused.gguf"
    write_random_model(original, ModelSpec(n_embd=256, types={"*": T.F16}))
    done = gguf_fuse("fuse", original, fused, "--reflink", "always")
    assert done.returncode == 0, done.stderr
    assert "cloned" in done.stdout


def test_always_fails_with_one_line_where_cloning_is_impossible(tmp_path: Path) -> None:
    shared_memory = Path("/dev/shm")
    folder = shared_memory if shared_memory.is_dir() else tmp_path
    original, fused = tmp_path / "in.gguf", folder / f"{tmp_path.name}-out.gguf"
    write_random_model(original, ModelSpec())
    done = gguf_fuse("fuse", original, fused, "--reflink", "always")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "--reflink auto copies instead" in done.stderr
    assert not fused.exists()


# -- the placement, without any file system ------------------------------------------------------


@pytest.mark.parametrize("block", [512, 4096, 65536])
def test_placement_for_clones_covers_the_same_bytes(tmp_path: Path, block: int) -> None:
    original = tmp_path / "in.gguf"
    write_random_model(original, ModelSpec(n_embd=96, n_head=3, n_head_kv=1, alignment=32))
    plan = fuse(original, str(tmp_path / "out.gguf"), options=Options(dry_run=True)).plan
    plain, cloned = place(plan), place(plan, block)
    assert moves(plain) == moves(cloned)
    for clone in cloned.clones:
        assert clone.start % block == clone.target % block == clone.n_bytes % block == 0
    best = max(place_shifted(plan, block, n) for n in range(0, block, plan.alignment))
    data = [clone.n_bytes for clone in cloned.clones if clone.target >= cloned.data_start]
    assert sum(data) == best


def moves(placement: Placement) -> list[tuple[int, int, int]]:
    """Copies and clones, joined where they touch, as offsets within the data."""
    start = placement.data_start
    joined: list[tuple[int, int, int]] = []
    for move in sorted([*placement.copies, *placement.clones], key=lambda move: move.target):
        if move.target < start:
            continue  # metadata
        source, target, n_bytes = move.start, move.target - start, move.n_bytes
        if joined and (joined[-1][0] + joined[-1][2], joined[-1][1] + joined[-1][2]) == (
            source,
            target,
        ):
            joined[-1] = (*joined[-1][:2], joined[-1][2] + n_bytes)
        else:
            joined.append((source, target, n_bytes))
    return joined


def place_shifted(plan: Any, block: int, shift: int) -> int:
    """Whole blocks that lie alike if the data began `shift` after a block: an independent count."""
    total = 0
    for source, target, n_bytes in moves(place(replace(plan, may_add_keys=False))):
        if (source - target - shift) % block == 0:
            blocks = range(-source % block, n_bytes - block + 1, block)
            total += len(blocks) * block
    return total


def test_padded_header_is_read_by_gguf_py(tmp_path: Path) -> None:
    original = tmp_path / "in.gguf"
    write_random_model(original, ModelSpec())
    plan = fuse(original, str(tmp_path / "out.gguf"), options=Options(dry_run=True)).plan
    for block in (512, 4096, 65536):
        placement = place(plan, block)
        data, source = bytearray(placement.n_bytes), original.read_bytes()
        for at, literal in placement.literals:
            data[at : at + len(literal)] = literal
        for move in (*placement.copies, *placement.clones):
            moved = source[move.start : move.start + move.n_bytes]
            data[move.target : move.target + move.n_bytes] = moved
        path = tmp_path / f"{block}.gguf"
        path.write_bytes(data)
        fields = GGUFReader(path).fields
        assert set(fields[PADDING_KEY].contents()) == {0}
        assert read_header(path).data_start == placement.data_start


def test_no_padding_where_no_block_could_be_shared(tmp_path: Path) -> None:
    original = tmp_path / "in.gguf"
    write_random_model(original, ModelSpec(n_layer=1, n_embd=8, n_head=2, n_ff=8, n_vocab=262))
    plan = fuse(original, str(tmp_path / "out.gguf"), options=Options(dry_run=True)).plan
    assert place(plan, 65536) == place(plan)
