"""Placements -> new files, published atomically. What is read is never written to."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gguf_fuse.format.source import GGUFError, OpenSource, Source, opened
from gguf_fuse.planning.plan import new_bytes
from gguf_fuse.progress import OnProgress, ignore
from gguf_fuse.writing.copy import (
    Opened,
    clone_ranges,
    copy_ranges,
    flush,
    reserve,
    start_write_back,
    without_holes,
    write_all,
)
from gguf_fuse.writing.hashing import Hashes, hash_beside
from gguf_fuse.writing.manifest import contents, ranges
from gguf_fuse.writing.outputs import Options, Output, Written, check_destinations
from gguf_fuse.writing.place import Copy
from gguf_fuse.writing.publish import Publication
from gguf_fuse.writing.resume import temporaries
from gguf_fuse.writing.temporary import Temporaries, beside
from gguf_fuse.writing.whole import refuse_other_bytes


def write(read: Sequence[Source], outputs: Sequence[Output], options: Options) -> Written:
    """Write the new files, all of them whole or none at all.

    read: every file that is read; the first one's permissions are those of the outputs.

    Raises GGUFError for anything `check_destinations` refuses, a failed read or write, and a
    source that changed since its header was read. It, and a KeyboardInterrupt's args, tell what has
    become of the outputs.
    """
    reals = check_destinations(read, outputs, force=options.force, manifest=options.manifest)
    own, others = reals[: len(outputs)], reals[len(outputs) :]
    paths, placements = zip(*((one.path, one.placement) for one in outputs), strict=True)
    files = Publication(read, paths, own, others, options)
    filled: list[_Filled] = []
    n_resumed = 0

    def fill_all(growing: Temporaries) -> None:
        nonlocal n_resumed
        growing.look(options.threads, _on_copied(options), options.on_resume)
        n_resumed = growing.n_resumed
        with opened(read) as sources:
            for number, output in enumerate(outputs):
                files.at, is_last = output.path, output is outputs[-1]
                filled.append(_fill(sources, growing, number, output, options, is_last=is_last))
            refuse_other_bytes(sources, placements, growing.paths)
            if options.manifest is not None:
                files.at = Path(options.manifest)
                hashes = [found for one in filled for found in one.hashes]
                said = contents(files.at, read, list(zip(paths, placements, strict=True)), hashes)
                _fill_small(Temporaries(files.small), said, sources, options)

    files.publish(functools.partial(temporaries, placements, own, resume=options.resume), fill_all)
    n_copied = sum(one.n_copied for one in filled)
    return Written(n_copied, sum(one.n_cloned for one in filled), n_resumed)


def write_manifest(
    read: Sequence[Source], sources: Opened, output: Output, hashes: Hashes, options: Options
) -> None:
    """The manifest of what went to standard output: both its files, or none.

    Raises as `write` does.
    """
    assert options.manifest is not None
    path = Path(options.manifest)
    reals = check_destinations(read, (), force=options.force, manifest=path)
    nothing = "the manifest was not written"
    files = Publication(read, [path], reals, (), options, nothing)

    def fill_both(growing: Temporaries) -> None:
        said = contents(path, read, [(output.path, output.placement)], [hashes])
        _fill_small(growing, said, sources, options)

    files.publish(lambda: Temporaries([beside(real) for real in reals]), fill_both)


class _Filled(NamedTuple):
    """Bytes by how they came into the file; hashes: if they were wanted."""

    n_cloned: int
    n_copied: int
    hashes: tuple[Hashes, ...]


def _fill(
    sources: Opened,
    growing: Temporaries,
    number: int,
    output: Output,
    options: Options,
    *,
    is_last: bool,
) -> _Filled:
    """Write one of the growing files whole.

    Raises GGUFError and OSError for a failed read or write, and a source that changed.
    """
    with growing.opened(number) as target_fd:
        filled = _copy(sources, target_fd, growing, number, output, options)
        for file in sources.values():
            file.refuse_changed()
        _set_permissions(target_fd, next(iter(sources.values())))
        if options.sync:
            if is_last:
                options.on_flush()
            flush(target_fd)
    return filled


def _fill_small(
    growing: Temporaries, contents: Sequence[bytes], sources: Opened, options: Options
) -> None:
    """Files whose bytes are all there. Raises OSError."""
    for number, data in enumerate(contents):
        with growing.opened(number) as fd:
            write_all(fd, memoryview(data), 0)
            _set_permissions(fd, next(iter(sources.values())))
            if options.sync:
                flush(fd)


def _on_copied(options: Options) -> OnProgress:
    """Progress of copying. With hashes, all progress is theirs: they come last."""
    return options.on_progress if options.manifest is None else ignore


def _copy(
    sources: Opened,
    target_fd: int,
    growing: Temporaries,
    number: int,
    output: Output,
    options: Options,
) -> _Filled:
    placement = output.placement
    progress = _on_copied(options)
    reserve(target_fd, placement.n_bytes, ())
    for start, data in placement.literals:
        write_all(target_fd, new_bytes(data), start)
    refused = clone_ranges(sources, target_fd, placement.clones, progress)
    if refused and options.reflink == "always":
        raise GGUFError(f"{output.path}: the file system refused to clone a range")
    copies = without_holes(sources, [*placement.copies, *refused])
    reserve(target_fd, placement.n_bytes, copies)

    missing = growing.missing(number, copies)

    def copy_all(tell: Callable[[Copy], None]) -> None:
        def on_block(block: Copy, view: memoryview) -> None:
            if options.sync:
                start_write_back(target_fd, block)
            growing.wrote(number, block, view)
            tell(block)

        copy_ranges(sources, target_fd, missing, threads=options.threads, on_block=on_block)

    hashes: tuple[Hashes, ...] = ()
    if options.manifest is None:
        copy_all(lambda block: progress(block.n_bytes))
    else:
        path, where, told = growing.paths[number], ranges(placement), options.on_progress
        hashes = (hash_beside(path, placement.n_bytes, where, missing, copy_all, told),)
    n_refused = sum(clone.n_bytes for clone in refused)
    return _Filled(placement.n_cloned - n_refused, sum(copy.n_bytes for copy in copies), hashes)


def _set_permissions(fd: int, like: OpenSource) -> None:
    """As `cp` does: the source's, less the umask; never setuid, setgid or sticky.

    Of a source that is fetched: those of a new file.
    """
    if not hasattr(os, "fchmod"):
        return
    umask = os.umask(0o077)  # the only way to read it
    os.umask(umask)
    with contextlib.suppress(OSError):  # a mount may have no permissions
        mode = 0o666 if like.fd is None else os.fstat(like.fd).st_mode
        os.fchmod(fd, mode & 0o777 & ~umask)
