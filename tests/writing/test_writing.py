"""The copy engine and the ways out: threads, holes, pipes, links, memory."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st

from gguf_fuse.api import fuse
from gguf_fuse.format import source
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError, Source, Stamp
from gguf_fuse.writing import copy as copying
from gguf_fuse.writing.place import Copy, place
from tests.conftest import FAST, dry, fused_copy, gguf_fuse
from tests.edit import bytes_of
from tests.models.random_model import ModelSpec, spec_of_size, write_random_model
from tests.pack import Tensor, valid
from tests.server import Run

Model = Callable[..., Path]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_write_the_same_file(model: Model, tmp_path: Path, threads: int) -> None:
    original = model(n_embd=256, n_layer=3, types={"*": T.Q8_0})
    expected = fused_copy(original).read_bytes()
    output = tmp_path / "threads.gguf"
    fuse(original, str(output), options=replace(FAST, threads=threads))
    assert output.read_bytes() == expected


NOWHERE = Source("nowhere.gguf", Stamp(0, 0, 0, 0, 0))


@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    block=st.integers(1, 17),
)
def test_blocks_are_the_ranges_in_order(lengths: list[int], block: int) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    copies = [
        Copy(NOWHERE, start, start + 1000, n) for start, n in zip(starts, lengths, strict=True)
    ]
    covered = [
        (piece.start + i, piece.target + i)
        for piece in copying.iter_blocks(copies, block)
        for i in range(piece.n_bytes)
    ]
    assert covered == [(i, i + 1000) for i in range(sum(lengths))]


def test_adjacent_ranges_are_merged(model: Model) -> None:
    """Q, K and V of a file of the converter lie side by side: all data moves as one range."""
    placement = dry(model(types={"*": T.F16})).placement
    metadata, data = placement.copies
    assert metadata.target == 24 and data.target == placement.data_start


def test_padding_is_zero_whatever_the_input_had_there(model: Model) -> None:
    """Bytes between tensors may be anybody's memory: they are not carried along."""
    original = model(n_embd=36, n_head=3, n_head_kv=1, alignment=32)
    expected = fused_copy(original).read_bytes()
    header = read_header(original)
    with bytes_of(original) as data:
        for tensor in header.tensors:
            end = header.data_start + tensor.offset + tensor.n_bytes
            data[end : end + -end % header.alignment] = b"\xaa" * (-end % header.alignment)
        assert data != original.read_bytes()
    again = original.with_name("again.gguf")
    fuse(original, str(again), options=FAST)
    assert again.read_bytes() == expected


@pytest.mark.skipif(not hasattr(os, "SEEK_HOLE"), reason="the platform does not tell holes")
def test_holes_stay_holes(tmp_path: Path) -> None:
    original, output = tmp_path / "in.gguf", tmp_path / "out.gguf"
    write_random_model(original, spec_of_size(ModelSpec(types={"*": T.F16}), 50_000_000))
    header = read_header(original)
    data = original.read_bytes()
    hole = range(header.data_start // 4096 * 4096 + 4096, len(data) - 8192)
    with original.open("r+b") as file:  # the same size, but most of it was never written
        file.truncate(hole.start)
        file.truncate(len(data))
        file.seek(hole.stop)
        file.write(data[hole.stop :])
    result = fuse(original, str(output), options=FAST)
    assert output.stat().st_blocks * 512 < 1_000_000
    assert result.written.n_copied < 1_000_000
    source, written = original.read_bytes(), output.read_bytes()
    for copy in result.placement.copies:
        expected = source[copy.start : copy.start + copy.n_bytes]
        assert written[copy.target : copy.target + copy.n_bytes] == expected


def test_a_pipe_gets_the_same_bytes(model: Model) -> None:
    original = model(n_embd=36, n_head=3, n_head_kv=1, alignment=64)
    command = [sys.executable, "-m", "gguf_fuse", "fuse", str(original), "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == fused_copy(original).read_bytes()
    assert b"attention layers fused" in done.stderr


def test_a_link_is_followed(model: Model, tmp_path: Path) -> None:
    original = model()
    real, link = tmp_path / "real.gguf", tmp_path / "link.gguf"
    link.symlink_to(real)
    fuse(original, str(link), options=FAST)
    assert link.is_symlink()
    assert real.read_bytes() == fused_copy(original).read_bytes()


def test_placement_pads_the_last_tensor(model: Model) -> None:
    plan = dry(model(n_embd=36, n_head=3, n_head_kv=1, alignment=256)).plan
    assert place(plan).n_bytes % 256 == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for n_bytes in (30_000_000, 300_000_000):
        original = tmp_path / f"{n_bytes}.gguf"
        write_random_model(original, spec_of_size(ModelSpec(types={"*": T.F16}), n_bytes))
        peaks.append(peak_of_fusing(original, tmp_path / "out.gguf"))
        original.unlink()
    assert peaks[1] < 100_000_000
    assert abs(peaks[1] - peaks[0]) < 10_000_000


def peak_of_fusing(original: Path, output: Path) -> int:
    """Peak resident memory of the whole command, in bytes."""
    script = (
        "import sys\n"
        "from gguf_fuse.cli import main\n"
        "try: main()\n"
        "finally: print(*(l for l in open('/proc/self/status') if 'VmHWM' in l), file=sys.stderr)"
    )
    options = ["--force", "--quiet", "--no-sync", "--reflink", "never"]
    command = [sys.executable, "-c", script, "fuse", str(original), str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-2]) * 1024


def test_syncing_changes_no_byte(model: Model, tmp_path: Path) -> None:
    original = model()
    for option in ("--sync", "--no-sync"):
        done = gguf_fuse("fuse", original, tmp_path / f"{option}.gguf", option)
        assert done.returncode == 0, done.stderr
    synced, unsynced = (tmp_path / f"{option}.gguf" for option in ("--sync", "--no-sync"))
    assert synced.read_bytes() == unsynced.read_bytes()


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_platforms_copy_plainly(model: Model, tmp_path: Path, platform: str) -> None:
    """Nothing Linux-only at import or in the plain copy: no fcntl, no libc calls, no O_TMPFILE."""
    original = model(types={"*": T.F16})
    output = tmp_path / "out.gguf"
    script = (
        "import sys, gguf, numpy, ctypes, os\n"
        f"sys.platform, sys.modules['fcntl'], ctypes.CDLL = {platform!r}, None, None\n"
        "del os.O_TMPFILE\n"
        "from pathlib import Path\n"
        "from gguf_fuse.api import Options, fuse\n"
        f"fuse(Path({str(original)!r}), {str(output)!r}, options=Options(threads=3))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert output.read_bytes() == fused_copy(original).read_bytes()


# -- found by review -----------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "SEEK_HOLE"), reason="the platform does not tell holes")
@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EIO, errno.EINVAL])
def test_a_file_system_that_cannot_tell_holes_has_none(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Any answer but 'no data' must not be taken for a hole: the tensors would become zeros."""
    original = model(types={"*": T.F16})
    expected = fused_copy(original).read_bytes()

    seek = os.lseek

    def refuse(fd: int, offset: int, whence: int) -> int:
        if whence in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(error, os.strerror(error))
        return seek(fd, offset, whence)

    monkeypatch.setattr(source._OpenFile, "_has_holes", True)
    monkeypatch.setattr("os.lseek", refuse)
    output = tmp_path / "out.gguf"
    fuse(original, str(output), options=FAST)
    assert output.read_bytes() == expected


def test_standard_output_may_not_be_the_input(model: Model) -> None:
    original = model()
    before = original.read_bytes()
    for redirection in ("1<>", ">>"):
        command = f'"$0" -m gguf_fuse fuse "$1" - {redirection}"$1"'
        arguments = ["sh", "-c", command, sys.executable, str(original)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 1
        assert "input and standard output are the same file" in done.stderr
        assert original.read_bytes() == before


@pytest.mark.parametrize("force", [False, True])
def test_the_input_moved_to_the_output_meanwhile_survives(
    model: Model, tmp_path: Path, force: bool
) -> None:
    original, output = model(), tmp_path / "out.gguf"
    before = original.read_bytes()

    def move(n_bytes: int) -> None:
        if original.exists():
            original.rename(output)

    with pytest.raises(GGUFError, match=r"are the same file|was linked, renamed"):
        fuse(original, str(output), options=replace(FAST, force=force, on_progress=move))
    assert output.read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]


def test_an_output_that_appears_in_the_last_instant_stays(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, output = model(), tmp_path / "out.gguf"
    link = os.link

    def late(source: Path, target: Path) -> None:
        output.write_bytes(b"precious")
        link(source, target)

    monkeypatch.setattr("gguf_fuse.writing.publish.os.link", late)
    with pytest.raises(GGUFError, match="exists already"):
        fuse(original, str(output), options=FAST)
    assert output.read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == [original, output]


def test_always_cloning_fails_where_nothing_lies_alike(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gguf_fuse.api.clone_block", lambda fd, folder: 1 << 20)
    with pytest.raises(GGUFError, match=r"no block of .* lies where it could be shared"):
        fuse(model(), str(tmp_path / "out.gguf"), options=replace(FAST, reflink="always"))
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("what", ["no end padding", "order"])
def test_a_layout_that_will_not_come_back_is_told(
    model: Model, tmp_path: Path, what: str, run: Run
) -> None:
    file = valid()
    if what == "order":  # the data of the first two tensors lies the other way round
        first, second = file.tensors[:2]
        file.tensors[0] = dataclasses.replace(first, offset=second_size(second))
        file.tensors[1] = dataclasses.replace(second, offset=0)
    data = file.pack()
    original = tmp_path / "odd.gguf"
    if what == "no end padding":
        data = data[: -(-len(file.tensors[-1].data) % 32)]
    original.write_bytes(data)
    done = run("fuse", original, tmp_path / "out.gguf")
    assert done.code == 0, done.err
    assert "not this file bit for bit" in done.out
    assert "bit for bit" not in run("fuse", model(), tmp_path / "canonical.gguf").out


def second_size(tensor: Tensor) -> int:
    return -(-len(tensor.data) // 32) * 32
