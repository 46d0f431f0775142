"""Is what was fetched what its host says that it is? Its bytes lie in the new files, out of order.

A SHA-256 wants them in order, so they are put together from there, page cache mostly; the few that
no new file has (the list of tensors, padding) are fetched once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gguf_fuse.format.source import OpenSource, OtherBytes, Source
from gguf_fuse.writing.copy import BLOCK_BYTES, Opened
from gguf_fuse.writing.place import Copy, Placement

MOST_FETCHED = 64 << 20  # of a file that is not wholly in the new ones: then it is not hashed


class _Part(NamedTuple):
    """A range of the source, and the new file that has it; None: nobody has."""

    start: int
    n_bytes: int
    file: int | None
    at: int


def refuse_other_bytes(
    sources: Opened, placements: Sequence[Placement], written: Sequence[Path]
) -> None:
    """Raises OtherBytes if a source with a known SHA-256 has another one."""
    for source, file in sources.items():
        if source.place is None or source.place.sha256 is None:
            continue
        parts = list(_parts(source, placements))
        if sum(part.n_bytes for part in parts if part.file is None) > MOST_FETCHED:
            continue
        found = _sha256(file, parts, written)
        if found != source.place.sha256:
            raise OtherBytes(
                f"{source.path}: its SHA-256 is {found}, its host says {source.place.sha256}: "
                "try again; if it stays so, the file there is damaged"
            )


def _parts(source: Source, placements: Sequence[Placement]) -> Iterator[_Part]:
    """Every byte of the source once, in order."""
    held: list[tuple[Copy, int]] = [
        (copy, number)
        for number, placement in enumerate(placements)
        for copy in placement.copies
        if copy.source == source
    ]
    at = 0
    for copy, number in sorted(held, key=lambda one: one[0].start):
        if copy.start > at:
            yield _Part(at, copy.start - at, None, at)
        skipped = max(0, at - copy.start)  # shared values are in it twice
        if copy.n_bytes > skipped:
            yield _Part(copy.start + skipped, copy.n_bytes - skipped, number, copy.target + skipped)
            at = copy.start + copy.n_bytes
    if at < source.n_bytes:
        yield _Part(at, source.n_bytes - at, None, at)


def _sha256(file: OpenSource, parts: Sequence[_Part], written: Sequence[Path]) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    streams = [path.open("rb", buffering=0) for path in written]
    try:
        for part in parts:
            for done in range(0, part.n_bytes, BLOCK_BYTES):
                view = buffer[: min(BLOCK_BYTES, part.n_bytes - done)]
                if part.file is None:
                    file.read_at(view, part.start + done)
                else:
                    streams[part.file].seek(part.at + done)
                    streams[part.file].readinto(view)
                digest.update(view)
    finally:
        for stream in streams:
            stream.close()
    return digest.hexdigest()
