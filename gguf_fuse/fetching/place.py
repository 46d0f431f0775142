"""What every kind of address comes to: a Place, whose bytes can be had in ranges."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from gguf_fuse.progress import ignore

NOTICED_S = 1.0  # a shorter wait nobody notices


class FetchError(OSError):
    """Nothing, or nothing right, came back. strerror: what a user needs to know."""

    def __init__(self, problem: str) -> None:
        super().__init__(errno.EIO, problem)


class Changed(FetchError):
    """Another version lies there now."""

    def __init__(self) -> None:
        super().__init__("changed while it was read; run again when it is at rest")


class Ranges(Protocol):
    """An open Place. Several threads may read at once."""

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill the view with the bytes from `start` on, of the very version of the place.

        Raises FetchError where that cannot be had, after the tries that are worth it.
        """

    def abort(self) -> None:
        """Make reads in other threads end soon, with FetchError."""


@dataclass(frozen=True)
class Place:
    """One version of a file. address: as messages name it, without secrets.

    version: what tells it from others (an ETag). sha256: of the whole file, revision: the commit
    that it is of, where the host tells them.
    """

    address: str
    n_bytes: int
    version: str
    sha256: str | None = None
    revision: str | None = None
    open: Callable[[], Ranges] = field(kw_only=True, compare=False, repr=False)


class Tally:
    """How many bytes were fetched, of all places together."""

    def __init__(self) -> None:
        self._lock, self.n_bytes = threading.Lock(), 0

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self.n_bytes += n_bytes


fetched = Tally()


class Waits:
    """Tells that a try has failed and the next one is waited for; of all threads together: those
    that wait at the same time mostly wait for the same server.
    """

    def __init__(self) -> None:
        self._lock, self._until = threading.Lock(), 0.0
        self.tell: Callable[[str], None] = ignore

    def begin(self, problem: str, seconds: float) -> None:
        now = time.monotonic()
        with self._lock:
            if seconds < NOTICED_S or now < self._until:
                return
            self._until = now + seconds
        self.tell(f"{problem}; trying again in {seconds:.0f} s")


waits = Waits()


class Stop:
    """What `abort` sets, and waits between tries look at."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Raises FetchError if it is set, at once."""
        if self._event.wait(seconds):
            raise FetchError("stopped")
