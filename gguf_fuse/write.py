"""Plan -> new file: the copy engine and the atomic publication.

The new file grows under a temporary name beside its destination and is renamed when it is whole:
at every instant the destination is absent, old, or complete. The source is only ever read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from gguf_fuse.fusion import Plan
from gguf_fuse.gguf_file import GGUFError, Header, Stamp, TensorInfo, align, encode_header

DEFAULT_THREADS = min(4, os.cpu_count() or 1)
BLOCK_BYTES = 1 << 20
TEMPORARY_MARK = ".gguf-fuse-"

_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it

OnProgress = Callable[[int], None]  # called with a number of bytes that were just written


@dataclass(frozen=True, slots=True)
class Copy:
    """A range of bytes of the source and where it goes; starts count from the files' starts."""

    source: int
    target: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The whole new file: the header's bytes, then copies in rising order, zeros between them."""

    header: bytes
    copies: tuple[Copy, ...]
    n_bytes: int

    @property
    def n_copied(self) -> int:
        return sum(copy.n_bytes for copy in self.copies)


def place(plan: Plan) -> Placement:
    """Give every tensor its offset: the running sum of sizes, each padded to the alignment."""
    infos, offset = [], 0
    for tensor in plan.tensors:
        infos.append(TensorInfo(tensor.name, tensor.ne, tensor.type, offset, tensor.n_bytes))
        offset = align(offset + tensor.n_bytes, plan.alignment)
    metadata = (plan.n_metadata, plan.metadata_bytes)
    header = encode_header(plan.version, plan.byte_order, plan.alignment, metadata, infos)
    copies: list[Copy] = []
    for tensor, info in zip(plan.tensors, infos, strict=True):
        target = len(header) + info.offset
        for segment in tensor.segments:
            _append(copies, Copy(segment.start, target, segment.n_bytes))
            target += segment.n_bytes
    return Placement(header, tuple(copies), len(header) + offset)


def _append(copies: list[Copy], copy: Copy) -> None:
    """Add a copy, or lengthen the last one where it goes on in both files."""
    if copies:
        last = copies[-1]
        ends = (last.source + last.n_bytes, last.target + last.n_bytes)
        if ends == (copy.source, copy.target):
            copies[-1] = Copy(last.source, last.target, last.n_bytes + copy.n_bytes)
            return
    copies.append(copy)


def check_destination(source: Header, destination: Path, n_bytes: int, *, force: bool) -> Path:
    """The real path to write to, links resolved.

    Raises GGUFError where it is the source itself, no regular file, there already (without
    force), in no folder, or on a disk with less than n_bytes free.
    """
    real = Path(os.path.realpath(destination))
    if not real.parent.is_dir():
        raise GGUFError(f"{destination}: the folder {real.parent} does not exist")
    with contextlib.suppress(FileNotFoundError):
        status = real.stat()
        if Stamp.of(status)[:2] == source.stamp[:2]:
            raise GGUFError(f"{destination}: input and output are the same file")
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(f"{destination}: not a regular file; use - to write to standard output")
        if not force:
            raise GGUFError(f"{destination}: exists already; --force replaces it")
    free = shutil.disk_usage(real.parent).free
    if free < n_bytes:
        raise GGUFError(
            f"{destination}: {n_bytes} bytes are needed, {free} are free on the disk of "
            f"{real.parent}"
        )
    return real


def write(
    source: Header,
    placement: Placement,
    destination: Path,
    *,
    force: bool = False,
    sync: bool = True,
    threads: int = DEFAULT_THREADS,
    on_progress: OnProgress = lambda n_bytes: None,
    on_flush: Callable[[], None] = lambda: None,
) -> None:
    """Write the new file, whole or not at all.

    sync: wait until the data is on the disk, so that the file survives a power failure.
    on_flush: called when that wait begins.

    Raises GGUFError for anything `check_destination` refuses, a failed read or write, and a source
    that changed since its header was read.
    """
    real = check_destination(source, destination, placement.n_bytes, force=force)
    try:
        with _open_source(source) as source_fd, _published(real, force) as target_fd:
            _preallocate(target_fd, placement.n_bytes)
            _write_all(target_fd, memoryview(placement.header), 0)
            on_progress(len(placement.header))
            _copy_all(source_fd, target_fd, placement.copies, threads, on_progress)
            _check_unchanged(source, source_fd)
            if sync:
                on_flush()
                os.fsync(target_fd)
        if sync:
            _sync_folder(real.parent)
    except OSError as error:
        raise GGUFError(f"{destination}: {error.strerror}; nothing was written") from error


def stream(source: Header, placement: Placement, target_fd: int, on_progress: OnProgress) -> None:
    """Write the new file to a pipe, front to back. Raises GGUFError as `write` does."""
    try:
        with _open_source(source) as source_fd:
            _stream_bytes(target_fd, memoryview(placement.header))
            on_progress(len(placement.header))
            buffer, at = memoryview(bytearray(BLOCK_BYTES)), len(placement.header)
            for block in _blocks(placement.copies):
                _stream_bytes(target_fd, memoryview(bytes(block.target - at)))
                view = buffer[: block.n_bytes]
                _read_all(source_fd, view, block.source)
                _stream_bytes(target_fd, view)
                at = block.target + block.n_bytes
                on_progress(block.n_bytes)
            _stream_bytes(target_fd, memoryview(bytes(placement.n_bytes - at)))
            _check_unchanged(source, source_fd)
    except OSError as error:
        raise GGUFError(f"standard output: {error.strerror}") from error


# -- copying ------------------------------------------------------------------------------------


def _copy_all(
    source_fd: int,
    target_fd: int,
    copies: tuple[Copy, ...],
    threads: int,
    on_progress: OnProgress,
) -> None:
    """Several threads take blocks in turn, each with one buffer of its own."""
    blocks, lock, stop = _blocks(copies), threading.Lock(), threading.Event()

    def work() -> None:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        while not stop.is_set():
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            view = buffer[: block.n_bytes]
            _read_all(source_fd, view, block.source)
            _write_all(target_fd, view, block.target)
            on_progress(block.n_bytes)

    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in as_completed([pool.submit(work) for _ in range(threads)]):
                future.result()
        except BaseException:
            stop.set()  # the pool waits for its threads: let them end at once
            raise


def _blocks(copies: tuple[Copy, ...]) -> Iterator[Copy]:
    for copy in copies:
        for start in range(0, copy.n_bytes, BLOCK_BYTES):
            n_bytes = min(BLOCK_BYTES, copy.n_bytes - start)
            yield Copy(copy.source + start, copy.target + start, n_bytes)


def _read_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        n_bytes = _read_at(fd, view, offset)
        if n_bytes == 0:
            raise GGUFError(f"the input ended at byte {offset}: it was cut while it was read")
        view, offset = view[n_bytes:], offset + n_bytes


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        n_bytes = _write_at(fd, view, offset)
        view, offset = view[n_bytes:], offset + n_bytes


def _stream_bytes(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


if sys.platform == "win32":
    _seek = threading.Lock()

    def _read_at(fd: int, view: memoryview, offset: int) -> int:
        with _seek:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(view))
        view[: len(data)] = data
        return len(data)

    def _write_at(fd: int, view: memoryview, offset: int) -> int:
        with _seek:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, view)

else:

    def _read_at(fd: int, view: memoryview, offset: int) -> int:
        return os.preadv(fd, [view], offset)

    def _write_at(fd: int, view: memoryview, offset: int) -> int:
        return os.pwrite(fd, view, offset)


# -- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_source(source: Header) -> Iterator[int]:
    fd = os.open(source.path, os.O_RDONLY | _BINARY)
    try:
        _check_unchanged(source, fd)
        yield fd
    finally:
        os.close(fd)


def _check_unchanged(source: Header, fd: int) -> None:
    if Stamp.of(os.fstat(fd)) != source.stamp:
        raise GGUFError(f"{source.path}: changed while it was read; run again when it is at rest")


@contextlib.contextmanager
def _published(destination: Path, force: bool) -> Iterator[int]:
    """A new file beside the destination, with a new file's permissions; renamed to it at the end.

    Removed on any failure, an interrupt included.
    """
    # 255 bytes is the usual limit of a name.
    stem = os.fsdecode(os.fsencode(destination.name)[:200])
    path = destination.with_name(f"{stem}{TEMPORARY_MARK}{uuid4().hex[:8]}.tmp")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        try:
            yield fd
        finally:
            os.close(fd)
        if not force and destination.exists():
            raise GGUFError(f"{destination}: was created meanwhile; --force replaces it")
        path.replace(destination)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _preallocate(fd: int, n_bytes: int) -> None:
    """Reserve the space: a full disk shows at once, and blocks need no allocation one by one.

    Not posix_fallocate: where the file system cannot, it writes to every block instead.
    """
    if sys.platform == "linux":
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(fd, 0, 0, n_bytes) and ctypes.get_errno() == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(fd, n_bytes)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where a folder can be synchronised at all."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
