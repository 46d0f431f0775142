"""Placement -> new file, published atomically.

The new file grows under a temporary name beside its destination and is renamed when it is whole:
at every instant the destination is absent, old, or complete. The source is only ever read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from gguf_fuse.copying import (
    BLOCK_BYTES,
    DEFAULT_THREADS,
    InputLost,
    OnProgress,
    clone_ranges,
    copy_ranges,
    iter_blocks,
    read_all,
    reserve,
    start_write_back,
    without_holes,
    write_all,
)
from gguf_fuse.fusion import Computed
from gguf_fuse.gguf_file import GGUFError, Header, Stamp
from gguf_fuse.placement import Copy, Placement

TEMPORARY_MARK = ".gguf-fuse-"

_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes of data by how they came into the new file. Holes of the source are neither."""

    n_copied: int
    n_cloned: int


def check_destination(
    source: Header, destination: Path, placement: Placement, *, force: bool
) -> Path:
    """The real path to write to, links resolved.

    Raises GGUFError where it is the source itself, no regular file, there already (without
    force), in no folder, or on a disk with too little space free.
    """
    real = Path(os.path.realpath(destination))
    try:
        _check_place(source, destination, real, force)
        free = shutil.disk_usage(real.parent).free
    except OSError as error:
        raise GGUFError(f"{destination}: {error.strerror}") from error
    needed = placement.n_bytes - placement.n_cloned
    if free < needed:
        raise GGUFError(
            f"{destination}: {needed} bytes are needed, {free} are free on the disk of "
            f"{real.parent}"
        )
    return real


def _check_place(source: Header, destination: Path, real: Path, force: bool) -> None:
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


def write(
    source: Header,
    placement: Placement,
    destination: Path,
    *,
    force: bool = False,
    sync: bool = True,
    clone_all: bool = False,
    threads: int = DEFAULT_THREADS,
    on_progress: OnProgress = lambda n_bytes: None,
    on_flush: Callable[[], None] = lambda: None,
) -> Written:
    """Write the new file, whole or not at all.

    sync: wait until the data is on the disk, so that the file survives a power failure.
    clone_all: fail where a range that the placement wants cloned cannot be, instead of copying it.
    on_flush: called when the wait for the disk begins.

    Raises GGUFError for anything `check_destination` refuses, a failed read or write, and a source
    that changed since its header was read.
    """
    real = check_destination(source, destination, placement, force=force)
    try:
        with open_source(source) as source_fd, _published(real, force) as target_fd:
            reserve(target_fd, placement.n_bytes, ())
            for at, data in placement.literals:
                write_all(target_fd, _view(data), at)
            refused = clone_ranges(source_fd, target_fd, placement.clones, on_progress)
            if refused and clone_all:
                raise GGUFError(f"{destination}: the file system refused to clone a range")
            copies = without_holes(source_fd, [*placement.copies, *refused])
            reserve(target_fd, placement.n_bytes, copies)

            def on_block(block: Copy) -> None:
                if sync:
                    start_write_back(target_fd, block)
                on_progress(block.n_bytes)

            copy_ranges(source_fd, target_fd, copies, threads=threads, on_block=on_block)
            _check_unchanged(source, source_fd)
            if sync:
                on_flush()
                os.fsync(target_fd)
    except InputLost as error:
        raise GGUFError(f"{source.path}: {error}") from error
    except OSError as error:
        raise GGUFError(f"{destination}: {error.strerror}; nothing was written") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    if sync:
        _sync_folder(real.parent)
    n_refused = sum(clone.n_bytes for clone in refused)
    n_copied = sum(copy.n_bytes for copy in copies)
    return Written(n_copied, placement.n_cloned - n_refused)


def stream(
    source: Header, placement: Placement, target_fd: int, on_progress: OnProgress
) -> Written:
    """Write the new file to a pipe, front to back. Raises GGUFError as `write` does.

    The placement must be one without clones.
    """
    try:
        with open_source(source) as source_fd:
            at = 0
            for start, data in _pieces(source_fd, placement):
                _stream_zeros(target_fd, start - at)
                _stream_bytes(target_fd, data)
                on_progress(start + len(data) - at)
                at = start + len(data)
            _stream_zeros(target_fd, placement.n_bytes - at)
            _check_unchanged(source, source_fd)
    except InputLost as error:
        raise GGUFError(f"{source.path}: {error}") from error
    except OSError as error:
        raise GGUFError(f"standard output: {error.strerror}") from error
    return Written(sum(copy.n_bytes for copy in placement.copies), 0)


def _pieces(source_fd: int, placement: Placement) -> Iterator[tuple[int, memoryview]]:
    """All that is not zero, in the order of the new file; a view holds until the next one."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    literals = deque(placement.literals)
    for block in iter_blocks(placement.copies):
        while literals and literals[0][0] < block.target:
            at, data = literals.popleft()
            yield at, _view(data)
        view = buffer[: block.n_bytes]
        read_all(source_fd, view, block.source)
        yield block.target, view
    yield from ((at, _view(data)) for at, data in literals)


def _view(data: bytes | Computed) -> memoryview:
    return memoryview(data.make() if isinstance(data, Computed) else data)


def _stream_zeros(fd: int, count: int) -> None:
    zeros = memoryview(bytes(min(count, BLOCK_BYTES)))
    while count:
        _stream_bytes(fd, zeros[:count])
        count -= len(zeros[:count])


def _stream_bytes(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def open_source(source: Header) -> Iterator[int]:
    """The file whose header was read. Raises GGUFError if it is not the same any more."""
    try:
        fd = os.open(source.path, os.O_RDONLY | _BINARY)
    except OSError as error:
        raise GGUFError(f"{source.path}: {error.strerror}") from error
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


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where a folder can be synchronised at all."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
