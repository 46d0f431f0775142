"""SHA-256 of a file and of each of its tensors, while it is written, sent or read.

SHA-256 wants bytes in order, and threads write them in none: what is whole from the file's start is
read back from the page cache while what follows is still written. Hashing a block for the file and
for its tensor takes two threads. Measured: 0.7 s a GB each, with the processor's own instructions;
with two cores, out of the page cache, it all takes about twice as long as copying alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gguf_fuse import signals
from gguf_fuse.progress import OnProgress
from gguf_fuse.writing.copy import BLOCK_BYTES
from gguf_fuse.writing.place import Copy

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

Range = tuple[int, int]  # start and number of bytes


class Hashes(NamedTuple):
    """Of a whole file, and of ranges of it, in order."""

    whole: str
    ranges: tuple[str, ...]


class Digests:
    """What is known of a file of which bytes come in order. ranges: ascending, not overlapping."""

    def __init__(self, pool: ThreadPoolExecutor, ranges: Iterable[Range]) -> None:
        self._pool, self._at = pool, 0
        self._whole, self._range = hashlib.sha256(), hashlib.sha256()
        self._left = deque((start, start + n_bytes) for start, n_bytes in ranges)
        self._found: list[str] = []

    @contextlib.contextmanager
    def taking(self, view: memoryview) -> Iterator[None]:
        """The next bytes are hashed beside what is in the block; the view must hold until then."""
        whole = self._pool.submit(self._whole.update, view)
        ranges = self._pool.submit(self._take, view)
        try:
            yield
        finally:
            whole.result()
            ranges.result()

    def take(self, view: memoryview) -> None:
        with self.taking(view):
            pass

    def hashes(self) -> Hashes:
        """When all bytes have come."""
        empty = (hashlib.sha256().hexdigest() for _ in self._left)
        return Hashes(self._whole.hexdigest(), (*self._found, *empty))

    def _take(self, view: memoryview) -> None:
        start, end = self._at, self._at + len(view)
        self._at = end
        while self._left and self._left[0][0] < end:
            first, last = self._left[0]
            self._range.update(view[max(first - start, 0) : last - start])
            if last > end:
                return
            self._found.append(self._range.hexdigest())
            self._range = hashlib.sha256()
            self._left.popleft()


@contextlib.contextmanager
def digesting(ranges: Iterable[Range]) -> Generator[Digests]:
    from concurrent.futures import ThreadPoolExecutor  # loads logging

    with ThreadPoolExecutor(2) as pool:
        yield Digests(pool, ranges)


class _Front:
    """How far a file is whole from its start, while threads write what `copies` say.

    What no copy says is there already.
    """

    def __init__(self, copies: Sequence[Copy], n_bytes: int) -> None:
        copies = sorted((copy for copy in copies if copy.n_bytes), key=lambda copy: copy.target)
        self._left = deque((copy.target, copy.ends[1]) for copy in copies)
        self._left.append((n_bytes, n_bytes))
        self._at = self._left[0][0]
        self._written: list[Range] = []  # behind it; start and end
        self._changed = threading.Condition()
        self.failure: BaseException | None = None

    def wrote(self, block: Copy) -> None:
        """Raises what keeps the file from being hashed."""
        with self._changed:
            if self.failure is not None:
                raise self.failure
            heappush(self._written, (block.target, block.ends[1]))
            while self._written and self._written[0][0] == self._at:
                self._at = heappop(self._written)[1]
                if self._at == self._left[0][1]:
                    self._left.popleft()
                    self._at = self._left[0][0]
            self._changed.notify()

    def stop(self, failure: BaseException) -> None:
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify()

    def reaches(self, end: int) -> bool:
        """Waits until it does; False if it will not."""
        with self._changed:
            self._changed.wait_for(lambda: self._at >= end or self.failure is not None)
            return self.failure is None


def hash_beside(
    path: Path,
    n_bytes: int,
    ranges: Iterable[Range],
    copies: Sequence[Copy],
    copy: Callable[[Callable[[Copy], None]], None],
    on_progress: OnProgress,
) -> Hashes:
    """Call `copy`, which tells of every block of `copies` that is written, and hash the new file.

    on_progress: of bytes that are hashed. Raises what `copy` does, and OSError where the file
    cannot be read back.
    """
    front = _Front(copies, n_bytes)
    with digesting(ranges) as digests:

        def follow() -> None:
            try:
                _follow(path, n_bytes, front, digests, on_progress)
            except BaseException as error:
                front.stop(error)

        follower = threading.Thread(target=follow)
        try:
            with signals.waiting():
                follower.start()
            copy(front.wrote)
            follower.join()
        except BaseException as error:
            front.stop(error)
            raise
        finally:
            with signals.waiting():
                if follower.ident is not None:
                    follower.join()
        if front.failure is not None:
            raise front.failure
        return digests.hashes()


def _follow(
    path: Path, n_bytes: int, front: _Front, digests: Digests, on_progress: OnProgress
) -> None:
    buffer, at = memoryview(bytearray(BLOCK_BYTES)), 0
    with path.open("rb", buffering=0) as stream:
        while at < n_bytes:
            view = buffer[: n_bytes - at]
            if not front.reaches(at + len(view)):
                return
            n_read = stream.readinto(view)
            if not n_read:
                raise OSError(errno.EIO, f"ended at byte {at}: was it cut while it was written?")
            digests.take(view[:n_read])
            at += n_read
            on_progress(n_read)
