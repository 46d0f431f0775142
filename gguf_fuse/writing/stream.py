"""Placement -> standard output, front to back."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError, abort, opened, pace
from gguf_fuse.planning.plan import new_bytes
from gguf_fuse.progress import OnProgress
from gguf_fuse.writing.copy import BLOCK_BYTES, Opened, iter_blocks
from gguf_fuse.writing.place import Copy, Placement
from gguf_fuse.writing.publish import Written


def stream(
    source: Header, placement: Placement, target_fd: int, on_progress: OnProgress
) -> Written:
    """Write the new file to a pipe. Raises GGUFError where reading or writing fails.

    The placement must be one without clones.
    """
    try:
        if any(file.is_file(os.fstat(target_fd)) for file in source.sources):
            raise GGUFError(f"{source.path}: input and standard output are the same file")
        with opened(source.sources) as sources:
            at = 0
            for start, data in _pieces(sources, placement):
                _write_zeros(target_fd, start - at)
                _write_bytes(target_fd, data)
                on_progress(start + len(data) - at)
                at = start + len(data)
            _write_zeros(target_fd, placement.n_bytes - at)
            for file in sources.values():
                file.refuse_changed()
    except OSError as error:
        raise GGUFError(f"standard output: {error.strerror}") from error
    return Written(sum(copy.n_bytes for copy in placement.copies), 0)


def _pieces(sources: Opened, placement: Placement) -> Iterator[tuple[int, memoryview]]:
    """All that is not zero, in the order of the new file; a view holds until the next one."""
    literals = deque(placement.literals)
    with contextlib.closing(_read(sources, placement.copies)) as blocks:
        for block, view in blocks:
            while literals and literals[0][0] < block.target:
                at, data = literals.popleft()
                yield at, new_bytes(data)
            yield block.target, view
    yield from ((at, new_bytes(data)) for at, data in literals)


def _read(sources: Opened, copies: Iterable[Copy]) -> Generator[tuple[Copy, memoryview]]:
    """Block by block, in order; those that are fetched, several at once and ahead."""
    block_bytes, threads = pace(sources, BLOCK_BYTES, 1)
    buffers = [memoryview(bytearray(block_bytes)) for _ in range(threads)]

    def fill(block: Copy, buffer: memoryview) -> tuple[Copy, memoryview]:
        view = buffer[: block.n_bytes]
        sources[block.source].read_at(view, block.start)
        return block, view

    blocks = iter_blocks(copies, block_bytes)
    if threads == 1:
        yield from (fill(block, buffers[0]) for block in blocks)
        return
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


def _write_zeros(fd: int, count: int) -> None:
    zeros = memoryview(bytes(min(count, BLOCK_BYTES)))
    while count:
        _write_bytes(fd, zeros[:count])
        count -= len(zeros[:count])


def _write_bytes(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]
