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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from gguf_fuse.choices import MOST_THREADS, Reflink, require_count, require_word
from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError, opened
from gguf_fuse.machine import COPY_THREADS
from gguf_fuse.planning.plan import new_bytes
from gguf_fuse.progress import OnProgress, ignore
from gguf_fuse.writing.copy import (
    Opened,
    clone_ranges,
    copy_ranges,
    reserve,
    start_write_back,
    without_holes,
    write_all,
)
from gguf_fuse.writing.place import Copy, Placement
from gguf_fuse.writing.whole import refuse_other_bytes

TEMPORARY_MARK = ".gguf-fuse-"

_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends without it


@dataclass(frozen=True)
class Options:
    """How to write, the same for both ways. on_start gets the number of bytes to come.

    sync: wait until the data is on the disk, so that the files survive a power failure. reflink:
    whether to share blocks with the source where the file system can; "always" fails where it
    cannot. on_flush: called when the last wait for the disk begins. split_max_size (bytes of data),
    split_max_tensors: cut the output into shards. Raises GGUFError for a value that cannot be.
    """

    dry_run: bool = False
    force: bool = False
    sync: bool = True
    threads: int = COPY_THREADS
    reflink: Reflink = "auto"
    on_start: Callable[[int], None] = ignore
    on_progress: OnProgress = ignore
    on_flush: Callable[[], None] = ignore
    split_max_size: int | None = None
    split_max_tensors: int | None = None

    def __post_init__(self) -> None:
        require_count("threads", self.threads, MOST_THREADS)
        require_word("reflink", self.reflink, Reflink)
        for option in ("split_max_size", "split_max_tensors"):
            value = getattr(self, option)
            if value is not None:
                require_count(option, value, sys.maxsize)


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
    try:
        for output, real in zip(outputs, reals, strict=True):
            path = output.path
            check_place(source, path, real, force)
            if reals.count(real) > 1:
                raise GGUFError(f"{path}: two shards would be the same file, {real}")
            n_bytes = output.placement.n_bytes - output.placement.n_cloned
            needed[real.parent] = needed.get(real.parent, 0) + n_bytes
        path = outputs[0].path
        for folder, n_bytes in needed.items():
            free = shutil.disk_usage(folder).free
            if free < n_bytes:
                raise GGUFError(
                    f"{path}: {n_bytes} bytes are needed, {free} are free on the disk of {folder}"
                )
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error
    return reals


def check_place(source: Header, destination: Path, real: Path, force: bool) -> None:
    """Raises GGUFError where nothing can, or without force may, be put there."""
    if not real.parent.is_dir():
        fault = "is not a folder" if real.parent.exists() else "does not exist"
        raise GGUFError(f"{destination}: the folder {real.parent} {fault}")
    with contextlib.suppress(FileNotFoundError):
        status = destination.stat()  # not of `real`: /dev/stdout may lead to a pipe without a name
        if any(file.is_file(status) for file in source.sources):
            raise GGUFError(f"{destination}: input and output are the same file")
        if stat.S_ISDIR(status.st_mode):
            raise GGUFError(f"{destination}: a folder, not a regular file; give the name of a file")
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(f"{destination}: not a regular file; use - to write to standard output")
        if not force:
            raise GGUFError(f"{destination}: exists already; --force replaces it")


def write(source: Header, outputs: Sequence[Output], options: Options) -> Written:
    """Write the new files, all of them whole or none at all.

    Raises GGUFError for anything `check_destinations` refuses, a failed read or write, and a
    source that changed since its header was read.
    """
    reals = check_destinations(source, outputs, force=options.force)
    at = outputs[0]
    n_copied = n_cloned = 0
    try:
        with (
            opened(source.sources) as sources,
            _published(source, reals, options.force) as temporaries,
        ):
            for at, temporary, real in zip(outputs, temporaries, reals, strict=True):
                with _created(temporary, like=real) as target_fd:
                    clones, copies = _fill(sources, target_fd, at, options)
                    for file in sources.values():
                        file.refuse_changed()
                    if options.sync:
                        if at is outputs[-1]:
                            options.on_flush()
                        os.fsync(target_fd)
                n_cloned, n_copied = n_cloned + clones, n_copied + copies
            placements = [output.placement for output in outputs]
            refuse_other_bytes(sources, placements, temporaries)
    except OSError as error:
        raise GGUFError(f"{at.path}: {error.strerror}; nothing was written") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written") from None
    if options.sync:
        for folder in {real.parent for real in reals}:
            _sync_folder(folder)
    return Written(n_copied, n_cloned)


def _fill(sources: Opened, target_fd: int, output: Output, options: Options) -> tuple[int, int]:
    """Write all of one file -> bytes cloned and copied. Raises as `write` does."""
    placement = output.placement
    reserve(target_fd, placement.n_bytes, ())
    for start, data in placement.literals:
        write_all(target_fd, new_bytes(data), start)
    refused = clone_ranges(sources, target_fd, placement.clones, options.on_progress)
    if refused and options.reflink == "always":
        raise GGUFError(f"{output.path}: the file system refused to clone a range")
    copies = without_holes(sources, [*placement.copies, *refused])
    reserve(target_fd, placement.n_bytes, copies)

    def on_block(block: Copy) -> None:
        if options.sync:
            start_write_back(target_fd, block)
        options.on_progress(block.n_bytes)

    copy_ranges(sources, target_fd, copies, threads=options.threads, on_block=on_block)
    n_refused = sum(clone.n_bytes for clone in refused)
    return placement.n_cloned - n_refused, sum(copy.n_bytes for copy in copies)


@contextlib.contextmanager
def _published(source: Header, destinations: Sequence[Path], force: bool) -> Iterator[list[Path]]:
    """Temporary names beside the destinations; renamed to them at the end, all or none.

    Removed on any failure, an interrupt included.
    """
    temporaries = [_beside(destination) for destination in destinations]
    try:
        yield temporaries
        for destination in destinations:
            check_place(source, destination, destination, force)  # time has gone by
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
                old = replaced[destination] = _beside(destination)
                try:
                    os.link(destination, old)
                except OSError:  # a file system without second names
                    destination.replace(old)
            _rename(temporary, destination, force)
    except BaseException:
        for temporary, destination in moves:
            if destination in replaced:
                if replaced[destination].exists():
                    replaced[destination].replace(destination)
            # An interrupt may come between the giving of the new name and the taking of the old.
            elif not temporary.exists() or (
                destination.exists() and temporary.samefile(destination)
            ):
                destination.unlink(missing_ok=True)
        raise
    finally:
        for path in replaced.values():
            path.unlink(missing_ok=True)


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


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where a folder can be synchronised at all."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
