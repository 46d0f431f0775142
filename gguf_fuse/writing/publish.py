"""Placement -> new file, published atomically.

The new file grows under a temporary name beside its destination and is renamed when it is whole:
at every instant the destination is absent, old, or complete. The source is only ever read. Shards
are renamed only when all of them are whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from gguf_fuse.format.header import GGUFError, Header, Stamp
from gguf_fuse.planning.plan import Computed
from gguf_fuse.writing.copy import (
    BLOCK_BYTES,
    DEFAULT_THREADS,
    InputLost,
    OnProgress,
    clone_ranges,
    copy_ranges,
    iter_blocks,
    read_source,
    reserve,
    start_write_back,
    without_holes,
    write_all,
)
from gguf_fuse.writing.place import Copy, Placement

TEMPORARY_MARK = ".gguf-fuse-"

_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes of data by how they came into the new file. Holes of the source are neither."""

    n_copied: int
    n_cloned: int


@dataclass(frozen=True, slots=True)
class Output:
    """One file of the result, the only one or a shard, and where it goes."""

    path: Path
    placement: Placement


def check_destinations(source: Header, outputs: Sequence[Output], *, force: bool) -> list[Path]:
    """The real paths to write to, links resolved.

    Raises GGUFError where one is a source itself, no regular file, there already (without force),
    in no folder, two are the same, or a disk has too little space free for all of them.
    """
    reals = [Path(os.path.realpath(output.path)) for output in outputs]
    needed: dict[Path, int] = {}
    for output, real in zip(outputs, reals, strict=True):
        try:
            _check_place(source, output.path, real, force)
        except OSError as error:
            raise GGUFError(f"{output.path}: {error.strerror}") from error
        n_bytes = output.placement.n_bytes - output.placement.n_cloned
        needed[real.parent] = needed.get(real.parent, 0) + n_bytes
        if reals.count(real) > 1:
            raise GGUFError(f"{output.path}: two shards would be the same file, {real}")
    for folder, n_bytes in needed.items():
        _check_space(outputs[0].path, folder, n_bytes)
    return reals


def _check_space(destination: Path, folder: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise GGUFError(f"{destination}: {error.strerror}") from error
    if free < needed:
        raise GGUFError(
            f"{destination}: {needed} bytes are needed, {free} are free on the disk of {folder}"
        )


def _check_place(source: Header, destination: Path, real: Path, force: bool) -> None:
    if not real.parent.is_dir():
        fault = "is not a folder" if real.parent.exists() else "does not exist"
        raise GGUFError(f"{destination}: the folder {real.parent} {fault}")
    with contextlib.suppress(FileNotFoundError):
        status = destination.stat()  # not of `real`: /dev/stdout may lead to a pipe without a name
        if Stamp.of(status)[:2] in {file.stamp[:2] for file in source.files}:
            raise GGUFError(f"{destination}: input and output are the same file")
        if stat.S_ISDIR(status.st_mode):
            raise GGUFError(f"{destination}: a folder, not a regular file; give the name of a file")
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(f"{destination}: not a regular file; use - to write to standard output")
        if not force:
            raise GGUFError(f"{destination}: exists already; --force replaces it")


def write(
    source: Header,
    outputs: Sequence[Output],
    *,
    force: bool = False,
    sync: bool = True,
    clone_all: bool = False,
    threads: int = DEFAULT_THREADS,
    on_progress: OnProgress = lambda n_bytes: None,
    on_flush: Callable[[], None] = lambda: None,
) -> Written:
    """Write the new files, all of them whole or none at all.

    sync: wait until the data is on the disk, so that the files survive a power failure.
    clone_all: fail where a range that a placement wants cloned cannot be, instead of copying it.
    on_flush: called when the last wait for the disk begins.

    Raises GGUFError for anything `check_destinations` refuses, a failed read or write, and a
    source that changed since its header was read.
    """
    reals = check_destinations(source, outputs, force=force)
    at = outputs[0]
    n_copied = n_cloned = 0
    try:
        with open_source(source) as sources, _published(source, reals, force) as temporaries:
            for at, temporary, real in zip(outputs, temporaries, reals, strict=True):
                with _created(temporary, like=real) as target_fd:
                    clones, copies = _fill(
                        sources, target_fd, at, clone_all, sync, threads, on_progress
                    )
                    refuse_changed(source, sources)
                    if sync:
                        if at is outputs[-1]:
                            on_flush()
                        os.fsync(target_fd)
                n_cloned, n_copied = n_cloned + clones, n_copied + copies
    except InputLost as error:
        raise GGUFError(f"{source.files[error.file].path}: {error}") from error
    except OSError as error:
        raise GGUFError(f"{at.path}: {error.strerror}; nothing was written") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    if sync:
        for folder in {real.parent for real in reals}:
            _sync_folder(folder)
    return Written(n_copied, n_cloned)


def _fill(
    sources: Sequence[int],
    target_fd: int,
    output: Output,
    clone_all: bool,
    sync: bool,
    threads: int,
    on_progress: OnProgress,
) -> tuple[int, int]:
    """Write all of one file -> bytes cloned and copied. Raises as `write` does."""
    placement = output.placement
    reserve(target_fd, placement.n_bytes, ())
    for start, data in placement.literals:
        write_all(target_fd, _view(data), start)
    refused = clone_ranges(sources, target_fd, placement.clones, on_progress)
    if refused and clone_all:
        raise GGUFError(f"{output.path}: the file system refused to clone a range")
    copies = without_holes(sources, [*placement.copies, *refused])
    reserve(target_fd, placement.n_bytes, copies)

    def on_block(block: Copy) -> None:
        if sync:
            start_write_back(target_fd, block)
        on_progress(block.n_bytes)

    copy_ranges(sources, target_fd, copies, threads=threads, on_block=on_block)
    n_refused = sum(clone.n_bytes for clone in refused)
    return placement.n_cloned - n_refused, sum(copy.n_bytes for copy in copies)


def stream(
    source: Header, placement: Placement, target_fd: int, on_progress: OnProgress
) -> Written:
    """Write the new file to a pipe, front to back. Raises GGUFError as `write` does.

    The placement must be one without clones.
    """
    try:
        if Stamp.of(os.fstat(target_fd))[:2] in {file.stamp[:2] for file in source.files}:
            raise GGUFError(f"{source.path}: input and standard output are the same file")
        with open_source(source) as sources:
            at = 0
            for start, data in _pieces(sources, placement):
                _stream_zeros(target_fd, start - at)
                _stream_bytes(target_fd, data)
                on_progress(start + len(data) - at)
                at = start + len(data)
            _stream_zeros(target_fd, placement.n_bytes - at)
            refuse_changed(source, sources)
    except InputLost as error:
        raise GGUFError(f"{source.files[error.file].path}: {error}") from error
    except OSError as error:
        raise GGUFError(f"standard output: {error.strerror}") from error
    return Written(sum(copy.n_bytes for copy in placement.copies), 0)


def _pieces(sources: Sequence[int], placement: Placement) -> Iterator[tuple[int, memoryview]]:
    """All that is not zero, in the order of the new file; a view holds until the next one."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    literals = deque(placement.literals)
    for block in iter_blocks(placement.copies):
        while literals and literals[0][0] < block.target:
            at, data = literals.popleft()
            yield at, _view(data)
        view = buffer[: block.n_bytes]
        read_source(sources, view, block.source)
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
def open_source(source: Header) -> Iterator[list[int]]:
    """The files whose headers were read, in order. Raises GGUFError if one has changed."""
    _allow_open(len(source.files))
    with contextlib.ExitStack() as stack:
        fds = []
        for file in source.files:
            try:
                fds.append(os.open(file.path, os.O_RDONLY | _BINARY))
            except OSError as error:
                raise GGUFError(f"{file.path}: {error.strerror}") from error
            stack.callback(os.close, fds[-1])
        refuse_changed(source, fds)
        yield fds


def _allow_open(n_files: int) -> None:
    """A set may have more shards than a process may have open, unless it asks."""
    if sys.platform == "win32":
        return
    import resource

    wanted = 2 * n_files + 64  # verify opens two sets
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def refuse_changed(source: Header, fds: Sequence[int]) -> None:
    """Raises GGUFError if a file is not the one any more whose header was read."""
    for file, fd in zip(source.files, fds, strict=True):
        if Stamp.of(os.fstat(fd)) != file.stamp:
            raise GGUFError(f"{file.path}: changed while it was read; run again when it is at rest")


@contextlib.contextmanager
def _published(source: Header, destinations: Sequence[Path], force: bool) -> Iterator[list[Path]]:
    """Temporary names beside the destinations; renamed to them at the end, all or none.

    Removed on any failure, an interrupt included.
    """
    temporaries = [_beside(destination) for destination in destinations]
    try:
        yield temporaries
        for destination in destinations:
            _check_place(source, destination, destination, force)  # time has gone by
        _rename_all(list(zip(temporaries, destinations, strict=True)), force)
    except BaseException:
        for path in temporaries:
            path.unlink(missing_ok=True)
        raise


def _beside(destination: Path) -> Path:
    # 255 bytes is the usual limit of a name.
    stem = os.fsencode(destination.name)[:200].decode(errors="ignore")
    return destination.with_name(f"{stem}{TEMPORARY_MARK}{uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def _created(path: Path, like: Path) -> Iterator[int]:
    """A new file, with the permissions of the one it is to replace, else with a new file's."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    try:
        with contextlib.suppress(OSError):
            path.chmod(stat.S_IMODE(like.stat().st_mode))
        yield fd
    finally:
        os.close(fd)


def _rename_all(moves: Sequence[tuple[Path, Path]], force: bool) -> None:
    """Rename each of (old name, new name), or none.

    The first shard comes last: loading begins with it, so that half a set is none.
    """
    if len(moves) == 1 and force:
        _rename(*moves[0], force)  # one step, the old file until then
        return
    replaced: dict[Path, Path] = {}  # by name: another one for what was there before
    try:
        for temporary, destination in reversed(moves):
            if force and destination.exists():
                replaced[destination] = _beside(destination)
                _link(destination, replaced[destination])
            _rename(temporary, destination, force)
    except BaseException:
        for temporary, destination in moves:
            if destination in replaced:
                if replaced[destination].exists():
                    replaced[destination].replace(destination)
            elif _is_renamed(temporary, destination):
                destination.unlink(missing_ok=True)
        raise
    finally:
        for path in replaced.values():
            path.unlink(missing_ok=True)


def _is_renamed(temporary: Path, destination: Path) -> bool:
    """Also if an interrupt came between the giving of the new name and the taking of the old."""
    if not temporary.exists():
        return True
    return destination.exists() and temporary.samefile(destination)


def _rename(temporary: Path, destination: Path, force: bool) -> None:
    """Without force, what appeared in the last instant stays: a second name never replaces."""
    if not force:
        try:
            os.link(temporary, destination)
        except FileExistsError:
            raise GGUFError(f"{destination}: exists already; --force replaces it") from None
        except OSError:
            pass  # a file system without second names
        else:
            temporary.unlink()
            return
    temporary.replace(destination)


def _link(path: Path, name: Path) -> None:
    """A second name; where the file system has none, in place of the first."""
    try:
        os.link(path, name)
    except OSError:
        path.replace(name)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where a folder can be synchronised at all."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
