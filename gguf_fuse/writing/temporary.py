"""Where new files grow: beside their destinations, under names that tell what they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

from gguf_fuse.format.source import BINARY
from gguf_fuse.progress import OnProgress
from gguf_fuse.writing.place import Copy

TEMPORARY_MARK = ".gguf-fuse-"


def beside(destination: Path) -> Path:
    """A name that no file has."""
    return _named(destination, f"{uuid4().hex[:8]}.tmp")


def known_beside(destination: Path, ending: str) -> Path:
    """A name that the next run finds again."""
    tag = hashlib.sha256(os.fsencode(destination.name)).hexdigest()[:8]
    return _named(destination, f"{tag}.{ending}")


def _named(destination: Path, rest: str) -> Path:
    # 255 bytes is the usual limit of a name.
    stem = os.fsencode(destination.name)[:200].decode(errors="ignore")
    return destination.with_name(f"{stem}{TEMPORARY_MARK}{rest}")


class Temporaries:
    """The new files of one run, one for each destination. They go when it fails.

    `resume.Parts` are those that stay then.
    """

    n_resumed = 0

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def look(self, threads: int, on_progress: OnProgress, on_resume: Callable[[str], None]) -> None:
        """Find out what is in them already. Raises OSError and GGUFError."""

    def missing(self, number: int, copies: Sequence[Copy]) -> Sequence[Copy]:
        """What of the copies is still to be done in one of them."""
        return copies

    def wrote(self, number: int, block: Copy, view: memoryview) -> None:
        """Called by any thread when a block was written. Raises OSError."""

    def kept(self, error: BaseException) -> str | None:
        """What stays, in words, where this ended the run; None where they are to be removed."""
        return None

    def end(self) -> None:
        """They have their names, or are gone. Raises OSError."""

    def close(self) -> None:
        """Let others have them."""

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[int]:
        fd = self._open(self.paths[number])
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self, path: Path) -> int:
        """A new file that nobody else can open before it is whole."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o600)
