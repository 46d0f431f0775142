"""A run that fetches keeps what it has when it is broken off, and the same command goes on.

The new files grow under names that are found again (.part). A journal beside the first one tells
on its first line which versions of which files, and what plan, they are of; and on each further
line of one range that is written: number of the part, start, bytes, checksum. Nobody waits for the
disk to have those: what the parts really hold is checked before a run goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gguf_fuse.format.source import (
    BINARY,
    GGUFError,
    OtherBytes,
    Source,
    any_fetched,
    in_turn,
    opened,
)
from gguf_fuse.progress import OnProgress
from gguf_fuse.writing.copy import BLOCK_BYTES
from gguf_fuse.writing.lines import Lines, open_lines
from gguf_fuse.writing.place import Copy, Placement
from gguf_fuse.writing.temporary import Temporaries, beside, known_beside

PART, JOURNAL = "part", "journal"


def temporaries(
    placements: Sequence[Placement], reals: Sequence[Path], *, resume: bool
) -> Temporaries:
    """Where the files of the placements grow, to be closed; reals: where they are to be.

    Without `resume`, what an earlier run kept is removed. Raises OSError, and GGUFError where
    another process writes there.
    """
    if not resume:
        _forget(reals)
    if not resume or not _is_fetched(placements):
        return Temporaries([beside(real) for real in reals])
    journal = _journal(reals[0])
    try:
        return Parts(placements, reals, journal)
    except BaseException:
        journal.close()
        raise


def kept_bytes(placement: Placement, real: Path) -> int:
    """Space on the disk that the file has already, though it is not there yet."""
    part = known_beside(real, PART)
    if not _is_ours(part) or not _is_fetched([placement]):
        return 0
    return getattr(part.stat(), "st_blocks", 0) * 512


class _Range(NamedTuple):
    """A line of the journal."""

    part: int
    start: int
    n_bytes: int
    checksum: int


class Parts(Temporaries):
    """New files that stay when the run fails. The journal is this process's own until `close`."""

    def __init__(
        self, placements: Sequence[Placement], reals: Sequence[Path], journal: Lines
    ) -> None:
        super().__init__([known_beside(real, PART) for real in reals])
        self._journal, self._lock = journal, threading.Lock()
        self._sizes = [sum(copy.n_bytes for copy in one.copies) for one in placements]
        self._placements = placements
        self._news = self._begin(_bound(placements))
        self._claimed: list[list[_Range]] = [[] for _ in placements]
        for told in filter(None, (_range(line, placements) for line in journal.found[1:])):
            self._claimed[told.part].append(told)
        self._there: list[list[tuple[int, int]]] = [[] for _ in placements]
        self._done = [
            min(sum(told.n_bytes for told in claimed), size)
            for claimed, size in zip(self._claimed, self._sizes, strict=True)
        ]

    def _begin(self, bound: dict[str, Any]) -> str | None:
        """What is of no use is removed; why, in words, where that is news."""
        had = any(map(os.path.lexists, self.paths))
        why = _difference(self._journal.found, bound)
        for path in self.paths:
            if why is not None or not _is_ours(path):
                path.unlink(missing_ok=True)
        if why is None:
            self._journal.mend()
            return None
        self._journal.clear()
        self._journal.add(bound)
        with contextlib.suppress(OSError):  # a disk that cannot be waited for
            self._journal.flush()  # without this line, all that follows is worth nothing
        return f"{self.paths[0]} {why}; begun anew" if had else None

    def look(self, threads: int, on_progress: OnProgress, on_resume: Callable[[str], None]) -> None:
        n_damaged = 0
        for number, (path, claimed) in enumerate(zip(self.paths, self._claimed, strict=True)):
            if not path.exists():
                claimed = []
            good = _good(path, claimed, threads, on_progress) if claimed else set()
            n_damaged += sum(told.n_bytes for told in claimed if told not in good)
            self._there[number] = _joined(good)
            missing = self.missing(number, self._placements[number].copies)
            self._done[number] = self._sizes[number] - sum(copy.n_bytes for copy in missing)
        self.n_resumed = sum(self._done)
        if self._news is not None:
            on_resume(self._news)
        if self.n_resumed or n_damaged:
            damaged = f"; {n_damaged} are damaged and fetched again" if n_damaged else ""
            on_resume(f"going on with {self._names()}: {self._how_many()} are there{damaged}")

    def missing(self, number: int, copies: Sequence[Copy]) -> Sequence[Copy]:
        return list(_without(copies, self._there[number]))

    def wrote(self, number: int, block: Copy, view: memoryview) -> None:
        checksum = zlib.crc32(view, _seed(number, block.target, block.n_bytes))
        with self._lock:
            self._journal.add(_Range(number, block.target, block.n_bytes, checksum))
            self._done[number] += block.n_bytes

    def kept(self, error: BaseException) -> str | None:
        for number, path in enumerate(self.paths):
            if not path.exists():
                self._done[number] = 0
        if isinstance(error, OtherBytes) or not any(self._done):
            return None
        return (
            f"{self._how_many()} are kept in {self._names()}: the same command goes on, with "
            "--no-resume it begins anew"
        )

    def _open(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | BINARY) if path.exists() else super()._open(path)

    def end(self) -> None:
        self._journal.remove()

    def close(self) -> None:
        self._journal.close()

    def _how_many(self) -> str:
        return f"{sum(self._done)} of {sum(self._sizes)} bytes"

    def _names(self) -> str:
        others = len(self.paths) - 1
        return f"{self.paths[0]}{f' and {others} more' if others else ''}"


def _is_fetched(placements: Iterable[Placement]) -> bool:
    return any_fetched(copy.source for placement in placements for copy in placement.copies)


def _is_ours(path: Path) -> bool:
    """Whether it is a file of this user that has no other name: a link would lead to another."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and mine


def _journal(real: Path) -> Lines:
    path = known_beside(real, JOURNAL)
    if os.path.lexists(path) and not _is_ours(path):
        raise GGUFError(f"{path}: is no file of this user alone; remove it")
    busy = f"{path}: another gguf-fuse is writing {real} now; wait for it"
    return open_lines(path, busy, 0o600)


def _forget(reals: Sequence[Path]) -> None:
    parts = [known_beside(real, PART) for real in reals]
    if not any(map(os.path.lexists, (known_beside(reals[0], JOURNAL), *parts))):
        return
    with contextlib.closing(_journal(reals[0])) as journal:
        for part in parts:
            part.unlink(missing_ok=True)
        journal.remove()


def _bound(placements: Sequence[Placement]) -> dict[str, Any]:
    """What the first line of the journal says."""
    sources: dict[Source, int] = {}
    digest = hashlib.sha256()
    for placement in placements:
        for at, data in placement.literals:
            told = data if isinstance(data, bytes) else b"%d" % data.n_bytes
            digest.update(b"%d %d:" % (at, len(told)) + told)
        for source, *numbers in placement.copies:
            number = sources.setdefault(source, len(sources))
            digest.update(b"%d %d %d %d;" % (number, *numbers))
        digest.update(b"%d;" % placement.n_bytes)
    return {"sources": list(map(_version, sources)), "plan": digest.hexdigest()}


def _version(source: Source) -> list[str | int]:
    place = source.place
    if place is None:
        return [source.path, *source.stamp]
    return [place.address, place.n_bytes, place.sha256 or place.version]


def _difference(lines: Sequence[bytes], bound: dict[str, Any]) -> str | None:
    """Why what these lines tell of is not what is to be written now; None if it is."""
    was = _parsed(lines[0]) if lines else None
    if was == bound:
        return None
    if not isinstance(was, dict) or was.keys() != bound.keys():
        return "came without a journal of what is in it"
    if was["sources"] != bound["sources"]:
        return f"is of another version of {bound['sources'][0][0]}"
    return "is of other options, or of another gguf-fuse"


def _range(line: bytes, placements: Sequence[Placement]) -> _Range | None:
    """None for what is damaged: then it is as if it was not there."""
    told = _parsed(line)
    if not isinstance(told, list) or [type(value) for value in told] != [int] * 4:
        return None
    found = _Range(*told)
    if not 0 <= found.part < len(placements) or min(found) < 0:
        return None
    is_inside = found.start + found.n_bytes <= placements[found.part].n_bytes
    return found if is_inside else None


def _parsed(line: bytes) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _seed(part: int, start: int, n_bytes: int) -> int:
    """A checksum is of the place too: all zeros are alike."""
    return zlib.crc32(b"%d %d %d" % (part, start, n_bytes))


def _good(
    path: Path, claimed: Sequence[_Range], threads: int, on_progress: OnProgress
) -> set[_Range]:
    """Those of the ranges whose bytes are in the file."""
    part, good = Source.find(path), set[_Range]()
    with opened([part]) as files:

        def work(ranges: Iterator[_Range]) -> None:
            buffer = memoryview(bytearray(BLOCK_BYTES))
            for told in ranges:
                checksum = _seed(*told[:3])
                for at in range(0, told.n_bytes, BLOCK_BYTES):
                    view = buffer[: min(BLOCK_BYTES, told.n_bytes - at)]
                    files[part].read_at(view, told.start + at)
                    checksum = zlib.crc32(view, checksum)
                if checksum == told.checksum:
                    good.add(told)
                    on_progress(told.n_bytes)

        within = (told for told in claimed if told.start + told.n_bytes <= part.n_bytes)
        in_turn(within, threads, work)
    return good


def _joined(ranges: Iterable[_Range]) -> list[tuple[int, int]]:
    """Where they begin and end, in order; those that touch are one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted((told.start, told.start + told.n_bytes) for told in ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _without(copies: Iterable[Copy], there: Sequence[tuple[int, int]]) -> Iterator[Copy]:
    """What of the copies goes to places that are not in these ranges."""
    starts = [start for start, _ in there]
    for copy in copies:
        at, first = copy.target, max(bisect_right(starts, copy.target) - 1, 0)
        for number in range(first, len(there)):
            start, end = there[number]
            if start >= copy.ends[1]:
                break
            if start > at:
                yield copy.part(at - copy.target, start - at)
            at = max(at, end)
        if at < copy.ends[1]:
            yield copy.part(at - copy.target, copy.ends[1] - at)
