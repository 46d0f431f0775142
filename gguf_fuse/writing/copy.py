"""The copy engine: ranges of open files into another, cloned where the file system can.

Measured (2 cores, ext4 and tmpfs, in and out of the page cache): positional reads and writes of
1 MB blocks by two threads into a preallocated file beat copy_file_range, sendfile, larger blocks
and more threads; without preallocation two threads take about twice as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gguf_fuse.format.source import OpenSource, Source, abort, any_fetched, in_turn, pace
from gguf_fuse.progress import OnProgress
from gguf_fuse.writing.place import Copy

BLOCK_BYTES = 1 << 20
# One request to clone: short enough for Ctrl-C and the progress bar.
CLONE_BYTES = 1 << 30

GAP_BYTES = 1 << 12  # that are fetched for nothing, rather than asking once more

Opened = Mapping[Source, OpenSource]

_FICLONERANGE = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
# Their offsets would be cut to 32 bits on a machine that has no more.
_HAS_LIBC_CALLS = sys.platform == "linux" and sys.maxsize > 2**32
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
# What a file system says that cannot clone at all, or not this range.
_CANNOT_CLONE = {
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.EPERM,
    errno.ETXTBSY,
    errno.ENOSYS,
}
# What a file system says that has no fsync.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def copy_ranges(
    sources: Opened,
    target_fd: int,
    copies: Iterable[Copy],
    *,
    threads: int,
    on_block: Callable[[Copy, memoryview], None],
) -> None:
    """Copy, by threads with one buffer each: memory does not grow.

    on_block: called, by any of the threads, with each block that was written, and its bytes. Raises
    OSError if writing fails, GGUFError if reading does.
    """
    if hasattr(os, "posix_fadvise"):  # the kernel then reads further ahead
        for fd in (file.fd for file in sources.values() if file.fd is not None):
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    block_bytes, threads = pace(sources, BLOCK_BYTES, threads)

    def work(groups: Iterator[list[Copy]]) -> None:
        buffer = memoryview(bytearray(block_bytes))
        for group in groups:
            start = group[0].start
            view = buffer[: max(block.start + block.n_bytes for block in group) - start]
            sources[group[0].source].read_at(view, start)
            for block in group:
                part = view[block.start - start :][: block.n_bytes]
                write_all(target_fd, part, block.target)
                on_block(block, part)

    in_turn(_groups(sources, copies, block_bytes), threads, work, lambda: abort(sources))


def _groups(sources: Opened, copies: Iterable[Copy], most: int) -> Iterator[list[Copy]]:
    """Blocks that are read at once: of files on a disk each by itself; where a read is a request,
    those that lie beside each other.
    """
    blocks = iter_blocks(copies, most)
    if not any_fetched(sources):
        yield from ([block] for block in blocks)
        return
    order = {source: at for at, source in enumerate(sources)}
    group: list[Copy] = []
    end = 0
    for block in sorted(blocks, key=lambda block: (order[block.source], block.start)):
        grown = max(end, block.start + block.n_bytes)
        if group and (
            block.source != group[0].source
            or block.start - end > GAP_BYTES
            or grown - group[0].start > most
        ):
            yield group
            group, grown = [], block.start + block.n_bytes
        group.append(block)
        end = grown
    if group:
        yield group


def iter_blocks(copies: Iterable[Copy], most: int = BLOCK_BYTES) -> Iterator[Copy]:
    """The same ranges in pieces of at most `most` bytes."""
    for copy in copies:
        for start in range(0, copy.n_bytes, most):
            yield copy.part(start, min(most, copy.n_bytes - start))


def write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        n_bytes = _write_at(fd, view, offset)
        view, offset = view[n_bytes:], offset + n_bytes


if sys.platform == "win32":
    _seek = threading.Lock()

    def _write_at(fd: int, view: memoryview, offset: int) -> int:
        with _seek:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, view)

else:

    def _write_at(fd: int, view: memoryview, offset: int) -> int:
        return os.pwrite(fd, view, offset)


def clone_block(source: OpenSource, folder: Path) -> int | None:
    """The size of the blocks that a new file in the folder can share with the source, if it can.

    Found by cloning one block into a file without a name.
    """
    if sys.platform != "linux" or source.fd is None:
        return None
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR)  # no file system that clones lacks O_TMPFILE
        try:
            block = os.fstatvfs(fd).f_bsize
            n_bytes = min(block, os.fstat(source.fd).st_size)
            _clone(source, fd, Copy(source.source, 0, 0, n_bytes))
        finally:
            os.close(fd)
    except OSError:
        return None
    return block


def clone_ranges(
    sources: Opened, target_fd: int, clones: Iterable[Copy], on_progress: OnProgress
) -> list[Copy]:
    """Clone, and give back the ranges that the file system refused: they are to be copied.

    Raises OSError for anything but a refusal, a full disk above all.
    """
    refused = []
    for clone in iter_blocks(clones, CLONE_BYTES):
        try:
            _clone(sources[clone.source], target_fd, clone)
        except OSError as error:
            if error.errno not in _CANNOT_CLONE:
                raise
            refused.append(clone)
            continue
        on_progress(clone.n_bytes)
    return refused


def _clone(source: OpenSource, target_fd: int, clone: Copy) -> None:
    import fcntl

    request = struct.pack("qQQQ", source.fd, clone.start, clone.n_bytes, clone.target)
    fcntl.ioctl(target_fd, _FICLONERANGE, request)


def libc_call(name: str, *arguments: int | bytes) -> int:
    """A Linux call that Python has no name for: 0, or the errno; ENOSYS where there is none."""
    if not _HAS_LIBC_CALLS:
        return errno.ENOSYS
    try:
        function = _libc_function(name)
    except AttributeError:  # an older libc
        return errno.ENOSYS
    passed = (value if isinstance(value, bytes) else ctypes.c_long(value) for value in arguments)
    return ctypes.get_errno() if function(*passed) else 0


@functools.cache
def _libc_function(name: str) -> Callable[..., int]:
    # Kept: opening libc takes ten times as long as a call, and there is one for each block.
    function: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), name)
    return function


def start_write_back(fd: int, block: Copy) -> None:
    """Let the disk begin with a block that was written, so that a later fsync has less to wait."""
    libc_call("sync_file_range", fd, block.target, block.n_bytes, _SYNC_FILE_RANGE_WRITE)


def flush(fd: int) -> None:
    """Raises OSError, which tells of the way out for a file system that cannot."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        words = f"{error.strerror}: this disk cannot be waited for; --no-sync does not wait"
        raise OSError(error.errno, words) from error


def reserve(fd: int, n_bytes: int, copies: Sequence[Copy]) -> None:
    """Give the file its length, and space to the ranges that will be copied into it.

    A full disk shows at once, and the file system allocates in one piece. Not posix_fallocate:
    where the file system cannot, that writes to every block instead. Raises OSError.
    """
    os.ftruncate(fd, n_bytes)
    for start, end in _targets(copies):
        error = libc_call("fallocate", fd, 0, start, end - start)
        if error in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OSError(error, os.strerror(error))


def _targets(copies: Iterable[Copy]) -> Iterator[tuple[int, int]]:
    """Where the ranges go, those that touch as one: experts' slices are many and small."""
    start = end = 0
    for copy in copies:
        if copy.target != end and end > start:
            yield start, end
        start = start if copy.target == end else copy.target
        end = copy.target + copy.n_bytes
    if end > start:
        yield start, end


def without_holes(sources: Opened, copies: Sequence[Copy]) -> list[Copy]:
    """The parts of the ranges that hold data: a hole of a source stays one in the new file."""
    return [
        copy.part(start - copy.start, stop - start)
        for copy in copies
        for start, stop in sources[copy.source].data(copy.start, copy.start + copy.n_bytes)
    ]
