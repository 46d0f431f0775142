"""Placement -> standard output, front to back."""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gguf_fuse.format.source import GGUFError, Source, abort, opened, pace
from gguf_fuse.planning.plan import new_bytes
from gguf_fuse.writing.copy import BLOCK_BYTES, Opened, flush, iter_blocks
from gguf_fuse.writing.hashing import Digests, digesting
from gguf_fuse.writing.manifest import manifest_paths, ranges
from gguf_fuse.writing.outputs import Options, Output, Written, check_destinations
from gguf_fuse.writing.place import Copy, Placement
from gguf_fuse.writing.write import write_manifest


def stream(read: Sequence[Source], output: Output, target_fd: int, options: Options) -> Written:
    """Write the new file to a pipe, or to whatever else standard output is.

    read: as for `write.write`; the placement must be one without clones.

    Raises GGUFError where reading or writing fails, or the manifest cannot be written. It, and a
    KeyboardInterrupt's args, tell how much went out.
    """
    if options.manifest is None:
        return _send(read, output, _Target(target_fd), options)
    check_destinations(read, (), force=options.force, manifest=options.manifest)
    with digesting(ranges(output.placement)) as digests:
        return _send(read, output, _Target(target_fd, digests), options)


def _send(read: Sequence[Source], output: Output, target: _Target, options: Options) -> Written:
    placement = output.placement
    try:
        status = os.fstat(target.fd)
        for same in (file for file in read if file.is_file(status)):
            raise GGUFError(f"{same.path}: input and standard output are the same file")
        manifest = () if options.manifest is None else manifest_paths(options.manifest)
        for path in (path for path in manifest if _is_file(path, status)):
            raise GGUFError(f"{path}: the manifest and standard output are the same file")
        with opened(read) as sources:
            for start, data in _pieces(sources, placement):
                before = target.at
                target.write_zeros(start)
                target.write(data)
                options.on_progress(target.at - before)
            target.write_zeros(placement.n_bytes)
            for file in sources.values():
                file.refuse_changed()
            if options.sync and stat.S_ISREG(status.st_mode):
                flush(target.fd)
            if target.digests is not None:
                write_manifest(read, sources, output, target.digests.hashes(), options)
    except (OSError, GGUFError, KeyboardInterrupt) as error:
        went = f"at least {target.at} of {placement.n_bytes} bytes were"
        whole = target.at == placement.n_bytes
        told = f"{'all of it was' if whole else went} written to standard output"
        if isinstance(error, KeyboardInterrupt):
            error.args = (told, *error.args)  # those tell of the manifest
            raise
        if isinstance(error, GGUFError):
            raise type(error)(f"{error}; {told}" if target.at else str(error)) from error
        raise GGUFError(f"standard output: {error.strerror}; {told}") from error
    return Written(sum(copy.n_bytes for copy in placement.copies), 0)


def _is_file(path: Path, status: os.stat_result) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), status)
    return False


@dataclass
class _Target:
    """at: how much is written; an interrupt may come before the last write is counted."""

    fd: int
    digests: Digests | None = None
    at: int = 0

    def write(self, view: memoryview) -> None:
        with contextlib.nullcontext() if self.digests is None else self.digests.taking(view):
            while view:
                n_bytes = os.write(self.fd, view)
                self.at, view = self.at + n_bytes, view[n_bytes:]

    def write_zeros(self, end: int) -> None:
        zeros = memoryview(bytes(min(end - self.at, BLOCK_BYTES)))
        while self.at < end:
            self.write(zeros[: end - self.at])


def _pieces(sources: Opened, placement: Placement) -> Iterator[tuple[int, memoryview]]:
    """All that is not zero, in the order of the new file; a view holds until the next one."""
    literals = deque(placement.literals)
    with contextlib.closing(read_in_order(sources, placement.copies)) as blocks:
        for block, view in blocks:
            while literals and literals[0][0] < block.target:
                at, data = literals.popleft()
                yield at, new_bytes(data)
            yield block.target, view
    yield from ((at, new_bytes(data)) for at, data in literals)


def read_in_order(
    sources: Opened, copies: Iterable[Copy], threads: int = 1
) -> Generator[tuple[Copy, memoryview]]:
    """Block by block; by several threads, or where files are fetched, several at once and ahead.

    A view holds until the next one.
    """
    block_bytes, threads = pace(sources, BLOCK_BYTES, threads)
    buffers = [memoryview(bytearray(block_bytes)) for _ in range(threads)]

    def fill(block: Copy, buffer: memoryview) -> tuple[Copy, memoryview]:
        view = buffer[: block.n_bytes]
        sources[block.source].read_at(view, block.start)
        return block, view

    blocks = iter_blocks(copies, block_bytes)
    if threads == 1:
        yield from (fill(block, buffers[0]) for block in blocks)
        return
    from concurrent.futures import ThreadPoolExecutor  # loads logging

    with ThreadPoolExecutor(threads) as pool:
        first = zip(islice(blocks, threads), buffers, strict=False)
        ahead = deque((pool.submit(fill, block, buffer), buffer) for block, buffer in first)
        try:
            while ahead:
                future, buffer = ahead.popleft()
                yield future.result()
                following = next(blocks, None)
                if following is not None:
                    ahead.append((pool.submit(fill, following, buffer), buffer))
        finally:
            abort(sources)
