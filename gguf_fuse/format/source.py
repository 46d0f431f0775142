"""What is read: a file by its name, its size and its identity, and ranges of its bytes.

Header, planning, verifying and copying read only through here. A source lies on a disk of this
machine, or where an address says (`fetching`). It is only ever read. Files are opened for as long
as something is read from them, and each time it is made sure that they are still those whose
headers were read.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import stat
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

from gguf_fuse import signals
from gguf_fuse.progress import ignore

if TYPE_CHECKING:
    from gguf_fuse.fetching.place import Place, Ranges

BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it
_MOST_AT_ONCE = 1 << 30  # a single read of the system ends at 2 GiB

AnyPath = str | os.PathLike[str]

_Block = TypeVar("_Block")
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+://")


def is_address(name: str) -> bool:
    """Whether a name is an address; all else is a path."""
    return _ADDRESS.match(name) is not None


def expand(name: str) -> list[str]:
    """Of a whole repository of a hub (hf:owner/repo), every GGUF's address; else the name.

    Raises GGUFError where the hub cannot be asked.
    """
    if not name.startswith("hf:"):
        return [name]
    from gguf_fuse.fetching import address

    try:
        return address.expand(name)
    except OSError as error:
        raise GGUFError(f"{name}: {error.strerror}") from error


# Of files that are fetched: each range costs a round trip, and each thread waits for its own.
FETCH_BYTES = 8 << 20
FETCH_THREADS = 8


class GGUFError(Exception):
    """A bad input or an I/O failure, as one line for the user: place, value, limit, remedy."""


class OtherBytes(GGUFError):
    """What is fetched is another version by now, or is not what its host says it is."""


class Stamp(NamedTuple):
    """What tells that a file is still the one that was read; times in nanoseconds.

    ctime: a program may set the mtime back, but not that.
    """

    device: int
    inode: int
    n_bytes: int
    mtime: int
    ctime: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        times = status.st_mtime_ns, status.st_ctime_ns
        return cls(status.st_dev, status.st_ino, status.st_size, *times)


@dataclass(frozen=True)
class Source:
    """A file that is read. path: as messages name it. place: of one that is fetched."""

    path: str
    stamp: Stamp
    place: Place | None = None

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> Source:
        """Raises GGUFError for what is not there or no regular file."""
        if is_address(os.fspath(path)):
            return cls._elsewhere(os.fspath(path))
        name = str(Path(path))
        try:
            status = os.stat(name)  # noqa: PTH116 (the name in messages is that of Path)
        except OSError as error:
            if name == "-":
                raise GGUFError("-: standard input cannot be read; give a file") from error
            raise GGUFError(f"{name}: {error.strerror}") from error
        except ValueError as error:  # a zero byte in the name
            raise GGUFError(f"{name}: {error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(f"{name}: not a regular file; give the path of a GGUF file")
        return cls(name, Stamp.of(status))

    @classmethod
    def _elsewhere(cls, address: str) -> Source:
        from gguf_fuse.fetching.address import find, shown

        try:
            place = find(address)
        except OSError as error:
            raise GGUFError(f"{shown(address)}: {error.strerror}") from error
        return cls(place.address, Stamp(-1, -1, place.n_bytes, -1, -1), place)

    @property
    def n_bytes(self) -> int:
        return self.stamp.n_bytes

    def is_file(self, status: os.stat_result) -> bool:
        """Whether this is the status of the same file, whatever its name."""
        return Stamp.of(status)[:2] == self.stamp[:2]

    def is_same(self, other: Source) -> bool:
        """Whether both are one file, by whatever names; of what is fetched, by one address."""
        return self.stamp[:2] == other.stamp[:2] and self.place == other.place

    def read(self, start: int, n_bytes: int) -> bytes:
        """A small range, opened for it alone. Raises GGUFError as `OpenSource` does."""
        with opened([self]) as files:
            data = files[self].read(start, n_bytes)
            files[self].refuse_changed()
        return data


class Segment(NamedTuple):
    """A range of bytes of a source; start counts from the start of the file."""

    source: Source
    start: int
    n_bytes: int

    def read(self) -> bytes:
        """Raises GGUFError as `Source.read` does."""
        return self.source.read(self.start, self.n_bytes)

    def part(self, start: int, n_bytes: int) -> Segment:
        """n_bytes of it; start counts from its own start."""
        return Segment(self.source, self.start + start, n_bytes)


class OpenSource(ABC):
    """A source while it is open. Several threads may read at once.

    fd: of a file on a disk; None of one that is fetched.
    """

    source: Source
    fd: int | None

    def read_at(self, view: memoryview, start: int) -> None:
        """Fill the view with the bytes from `start` on.

        Raises GGUFError where the file cannot be read, or ends before its header says.
        """
        try:
            self._fill(view, start)
        except OSError as error:
            self._fail(f"reading at byte {start}: {error.strerror}", error)

    def read(self, start: int, n_bytes: int) -> bytes:
        """A small range. Raises GGUFError as `read_at` does."""
        data = bytearray(n_bytes)
        self.read_at(memoryview(data), start)
        return bytes(data)

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges, start and end, that are stored; between them there are holes: zeros."""
        if start < end:
            yield start, end

    @abstractmethod
    def _fill(self, view: memoryview, start: int) -> None: ...

    @abstractmethod
    def refuse_changed(self) -> None:
        """Raises GGUFError if the file is not the one any more that was found."""

    @abstractmethod
    def abort(self) -> None:
        """Make reads that wait in other threads end."""

    def _fail(self, problem: str, cause: OSError | None = None) -> NoReturn:
        raise GGUFError(f"{self.source.path}: {problem}") from cause


@dataclass(frozen=True)
class _OpenFile(OpenSource):
    source: Source
    fd: int

    def _fill(self, view: memoryview, start: int) -> None:
        while view:
            n_bytes = _read_at(self.fd, view[:_MOST_AT_ONCE], start)
            if n_bytes == 0:
                self._fail(f"ended at byte {start}: it was cut while it was read")
            view, start = view[n_bytes:], start + n_bytes

    @functools.cached_property
    def _has_holes(self) -> bool:
        status = os.fstat(self.fd)
        return hasattr(os, "SEEK_HOLE") and status.st_blocks * 512 < status.st_size

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        if not self._has_holes:
            yield from super().data(start, end)
            return
        while start < end:
            try:
                first = os.lseek(self.fd, start, os.SEEK_DATA)
                stop = os.lseek(self.fd, first, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:  # that says: no data behind here
                    yield start, end  # a file system that cannot tell
                return
            if first >= end:
                return
            start = min(stop, end)
            yield first, start

    def refuse_changed(self) -> None:
        try:
            stamp = Stamp.of(os.fstat(self.fd))
        except OSError as error:
            self._fail(str(error.strerror), error)
        if stamp[:4] != self.source.stamp[:4]:
            self._fail("changed while it was read; run again when it is at rest")
        if stamp != self.source.stamp:
            self._fail(
                "changed while it was read, or was linked, renamed or given other permissions; run "
                "again when it is at rest"
            )

    def abort(self) -> None:
        """Nothing: a disk answers soon."""


@dataclass(frozen=True)
class _OpenPlace(OpenSource):
    source: Source
    ranges: Ranges
    fd: None = None

    def _fill(self, view: memoryview, start: int) -> None:
        from gguf_fuse.fetching.place import Changed

        try:
            self.ranges.read_into(view, start)
        except Changed as error:
            raise OtherBytes(f"{self.source.path}: {error.strerror}") from error

    def refuse_changed(self) -> None:
        """Nothing: with every range its version is checked."""

    def abort(self) -> None:
        self.ranges.abort()


@contextlib.contextmanager
def opened(sources: Sequence[Source]) -> Iterator[dict[Source, OpenSource]]:
    """The files, open. Raises GGUFError if one cannot be opened, or has changed."""
    _allow_open(len(sources))
    with contextlib.ExitStack() as stack:
        files: dict[Source, OpenSource] = {}
        for source in sources:
            if source.place is not None:
                files[source] = _OpenPlace(source, source.place.open())
                continue
            try:
                fd = os.open(source.path, os.O_RDONLY | BINARY)
            except OSError as error:
                raise GGUFError(f"{source.path}: {error.strerror}") from error
            stack.callback(_close, fd)
            files[source] = _OpenFile(source, fd)
        for file in files.values():
            file.refuse_changed()
        yield files


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):  # of what was only read, it loses nothing
        os.close(fd)


def _allow_open(n_files: int) -> None:
    """A set may have more shards than a process may have open, unless it asks."""
    if n_files == 1 or sys.platform == "win32":
        return
    import resource

    wanted = 2 * n_files + 64  # verify opens two sets
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def abort(files: Mapping[Source, OpenSource]) -> None:
    """Make reads that wait in other threads end."""
    for file in files.values():
        file.abort()


def any_fetched(sources: Iterable[Source]) -> bool:
    """Whether a read of one of them is a request, not one of a disk."""
    return any(source.place is not None for source in sources)


def pace(sources: Iterable[Source], block_bytes: int, threads: int) -> tuple[int, int]:
    """Bytes to read at once, and by how many threads: more of both where files are fetched."""
    if not any_fetched(sources):
        return block_bytes, threads
    return FETCH_BYTES, max(threads, FETCH_THREADS)


def in_turn(
    blocks: Iterator[_Block],
    threads: int,
    work: Callable[[Iterator[_Block]], None],
    on_failure: Callable[[], None] = ignore,
    meanwhile: Iterable[object] = (),
) -> None:
    """Threads, this one among them, take blocks in turn; `work` is given those of one as they come.

    meanwhile: what this thread goes through before it takes any; where it is alone, after the last.
    Raises what either raises in any of them; the others end at their next block or step then, or as
    soon as `on_failure` makes them.
    """
    lock, stop = threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def share() -> Iterator[_Block]:
        while not stop.is_set():
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            yield block

    def go_through(steps: Iterable[object]) -> None:
        for _ in steps:
            if stop.is_set():
                return

    def run(before: Iterable[object] = (), after: Iterable[object] = ()) -> None:
        try:
            go_through(before)
            work(share())
            go_through(after)
        except BaseException as error:
            errors.append(error)
            stop.set()
            on_failure()

    helpers: list[threading.Thread] = []
    try:
        # No more threads to be had: fewer do the same.
        with signals.waiting(), contextlib.suppress(RuntimeError):
            for _ in range(threads - 1):
                helper = threading.Thread(target=run)
                helper.start()
                helpers.append(helper)
        run(before=meanwhile) if helpers else run(after=meanwhile)
    finally:
        stop.set()  # after an interrupt: let them end at once
        with signals.waiting():  # none may go on with files that are closed
            for helper in helpers:
                helper.join()
    if errors:
        raise errors[0]


if sys.platform == "win32":
    _seek = threading.Lock()

    def _read_at(fd: int, view: memoryview, start: int) -> int:
        with _seek:
            os.lseek(fd, start, os.SEEK_SET)
            data = os.read(fd, len(view))
        view[: len(data)] = data
        return len(data)

else:

    def _read_at(fd: int, view: memoryview, start: int) -> int:
        return os.preadv(fd, [view], start)
