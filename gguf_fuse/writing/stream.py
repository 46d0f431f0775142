"""Placement -> standard output, front to back."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator

from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError, opened
from gguf_fuse.planning.plan import new_bytes
from gguf_fuse.progress import OnProgress
from gguf_fuse.writing.copy import BLOCK_BYTES, Opened, iter_blocks
from gguf_fuse.writing.place import Placement
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
    buffer = memoryview(bytearray(BLOCK_BYTES))
    literals = deque(placement.literals)
    for block in iter_blocks(placement.copies):
        while literals and literals[0][0] < block.target:
            at, data = literals.popleft()
            yield at, new_bytes(data)
        view = buffer[: block.n_bytes]
        sources[block.source].read_at(view, block.start)
        yield block.target, view
    yield from ((at, new_bytes(data)) for at, data in literals)


def _write_zeros(fd: int, count: int) -> None:
    zeros = memoryview(bytes(min(count, BLOCK_BYTES)))
    while count:
        _write_bytes(fd, zeros[:count])
        count -= len(zeros[:count])


def _write_bytes(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]
