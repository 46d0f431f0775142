"""The ledger of a batch, its memory: a file of JSON lines in its output folder, only ever added to.

One line says that work on an output begins (only where nothing was there that is not ours), a later
one what became of it. What began and did not end was broken off: its output may be replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf_fuse.batching.task import Entry
from gguf_fuse.format.source import GGUFError

NAME = "gguf-fuse-batch.jsonl"


class Ledger:
    """entries: by output, the last one. begun: outputs whose last work did not end."""

    def __init__(self, path: Path, fd: int | None) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.begun: set[str] = set()
        self._fd = fd

    def begin(self, output: str) -> None:
        """Raises GGUFError if it cannot be written, as `add` does."""
        self.begun.add(output)
        self._append({"begun": output})

    def add(self, entry: Entry) -> None:
        self._take(entry.as_dict())
        self._append(entry.as_dict())

    def _take(self, line: dict[str, Any]) -> None:
        if "begun" in line:
            self.begun.add(line["begun"])
            return
        entry = Entry.of(line)
        self.entries[entry.output] = entry
        self.begun.discard(entry.output)

    def _append(self, line: dict[str, Any]) -> None:
        if self._fd is None:
            return
        try:
            os.write(self._fd, json.dumps(line).encode() + b"\n")
            os.fsync(self._fd)
        except OSError as error:
            raise GGUFError(f"{self.path}: {error.strerror}; the batch cannot go on") from error


@contextlib.contextmanager
def opened(folder: Path, *, dry_run: bool = False) -> Iterator[Ledger]:
    """The ledger of the folder, which is made if it is not there; on a dry run, only read.

    Raises GGUFError where it cannot be read or written, holds a line that is none of its own, or
    is another batch's at this moment. A last line that was cut off is removed.
    """
    path = folder / NAME
    try:
        if dry_run:
            text = path.read_bytes() if path.exists() else b""
            yield _filled(Ledger(path, None), text)
            return
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error
    with os.fdopen(fd, "rb+", buffering=0) as file:
        _lock(fd, path)
        text = file.readall()
        ledger = _filled(Ledger(path, fd), text)
        file.truncate(text.rfind(b"\n") + 1)
        yield ledger


def _filled(ledger: Ledger, text: bytes) -> Ledger:
    for number, line in enumerate(text.split(b"\n")[:-1], 1):  # what follows the last was cut off
        try:
            ledger._take(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise GGUFError(
                f"{ledger.path}: line {number} is none of a ledger: {line[:40]!r}; move the "
                "file away to begin anew"
            ) from error
    return ledger


def _lock(fd: int, path: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise GGUFError(f"{path}: another batch is at work here; wait for it") from None
    except OSError:
        return  # a mount without locks
