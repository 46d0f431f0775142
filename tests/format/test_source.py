"""The seam: what is read, and that it is still what it was when it was found."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError, Segment, Source, in_turn, opened

Model = Callable[..., Path]

DESCRIPTORS = Path("/proc/self/fd")
DATA = bytes(range(251)) * 400  # a prime period: a shifted range shows


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return Source.find(path)


def test_ranges(source: Source) -> None:
    assert source.n_bytes == len(DATA)
    whole = Segment(source, 0, len(DATA))
    assert whole.read() == DATA
    assert whole.part(1000, 77).part(7, 9).read() == DATA[1007:1016]
    assert source.read(len(DATA), 0) == b""


def test_several_threads_read_one_open_source(source: Source) -> None:
    with opened([source]) as files, ThreadPoolExecutor(8) as pool:

        def read(start: int) -> bytes:
            data = bytearray(1000)
            files[source].read_at(memoryview(data), start)
            return bytes(data)

        starts = range(0, len(DATA) - 1000, 997)
        assert list(pool.map(read, starts)) == [DATA[at : at + 1000] for at in starts]


def test_several_sources(source: Source, tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    other.write_bytes(DATA[::-1])
    second = Source.find(other)
    with opened([source, second, source]) as files:
        for one, data in ((source, DATA), (second, DATA[::-1])):
            view = memoryview(bytearray(10))
            files[one].read_at(view, 5)
            assert view == data[5:15]


def change_size(path: Path) -> None:
    path.write_bytes(DATA + b"x")


def change_time(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def replace_it(path: Path) -> None:
    status = path.stat()
    path.rename(path.with_name("old"))
    path.write_bytes(DATA)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [change_size, change_time, replace_it])
def test_a_source_that_changed_is_not_read(source: Source, change: Callable[[Path], None]) -> None:
    change(Path(source.path))
    with pytest.raises(GGUFError, match=r"data\.bin: changed while it was read"):
        source.read(0, 10)


def test_a_source_that_changes_while_it_is_open(source: Source) -> None:
    with opened([source]) as files:
        files[source].refuse_changed()
        os.truncate(source.path, 100)
        with pytest.raises(GGUFError, match=r"data\.bin: changed while it was read"):
            files[source].refuse_changed()
        with pytest.raises(GGUFError, match=r"ended at byte 100: it was cut while it was read"):
            files[source].read_at(memoryview(bytearray(10)), 95)


def test_a_source_that_is_gone(source: Source) -> None:
    Path(source.path).unlink()
    with pytest.raises(GGUFError, match=r"data\.bin: No such file or directory"):
        source.read(0, 10)


def test_the_same_file_by_another_name(source: Source, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.hardlink_to(source.path)
    assert source.is_file(link.stat())
    link.unlink()
    link.write_bytes(DATA)
    assert not source.is_file(link.stat())


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="the platform does not list descriptors")
def test_no_descriptor_stays_open(source: Source) -> None:
    before = len([*DESCRIPTORS.iterdir()])
    source.read(0, 10)
    with pytest.raises(GGUFError), opened([source, Source("missing", source.stamp)]):
        pass
    assert len([*DESCRIPTORS.iterdir()]) == before


def test_short_metadata_is_read_once(model: Model) -> None:
    """Looking at it again opens no file: a layer of verify asks for some forty keys."""
    path = model()
    header = read_header(path)
    path.unlink()
    short = [key for key in header.metadata if header.metadata.segment(key).n_bytes <= 4096]
    assert len(short) > 15
    assert all(header.metadata[key] is not None for key in short)


def test_what_goes_on_meanwhile_ends_where_another_thread_fails() -> None:
    steps: list[int] = []

    def meanwhile() -> Iterator[None]:
        for step in range(2000):
            steps.append(step)
            yield time.sleep(0.005)

    def work(blocks: Iterator[int]) -> None:
        raise GGUFError(f"block {next(blocks)} cannot be read")

    with pytest.raises(GGUFError, match="block 7 cannot be read"):
        in_turn(iter([7, 8]), 2, work, meanwhile=meanwhile())
    assert len(steps) < 2000


@pytest.mark.parametrize("threads", [1, 2])
def test_what_goes_on_meanwhile_comes_last_where_one_thread_is_alone(threads: int) -> None:
    done: list[str] = []

    def work(blocks: Iterator[str]) -> None:
        for block in blocks:
            time.sleep(0.05)  # so that the other thread's step is done
            done.append(block)

    in_turn(iter(["a", "b"]), threads, work, meanwhile=map(done.append, ["step"]))
    assert sorted(done) == ["a", "b", "step"]
    assert done.index("step") == (2 if threads == 1 else 0)
