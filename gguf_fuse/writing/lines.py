"""A file of JSON lines, only ever added to, that one process has at a time."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from gguf_fuse.format.source import BINARY, GGUFError

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY


class Lines:
    """found: the lines that were there when it was opened, without their ends."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd
        with os.fdopen(os.dup(fd), "rb") as file:
            text = file.read()
        self.found, self._end = whole_lines(text), text.rfind(b"\n") + 1

    def mend(self) -> None:
        """Remove a last line that was cut off. Raises OSError, as all here do."""
        os.ftruncate(self._fd, self._end)

    def add(self, line: Any) -> None:
        os.write(self._fd, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def flush(self) -> None:
        os.fsync(self._fd)

    def clear(self) -> None:
        os.ftruncate(self._fd, 0)
        self.found = []

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def remove(self) -> None:
        if sys.platform == "win32":  # nothing that is open can be removed there
            self.close()
        self.path.unlink(missing_ok=True)


def whole_lines(text: bytes) -> list[bytes]:
    """What follows the last line's end was cut off."""
    return text.split(b"\n")[:-1]


def open_lines(path: Path, busy: str, mode: int) -> Lines:
    """The file, to be closed; it is made, with this mode, if it is not there.

    busy: the message where another process has it. Raises GGUFError then, and OSError.
    """
    return Lines(path, _locked(path, busy, mode))


def _locked(path: Path, busy: str, mode: int) -> int:
    while True:
        fd = os.open(path, _FLAGS, mode)
        try:
            _lock(fd, busy)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # who had it has removed it


def _is_at(fd: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False


def _lock(fd: int, busy: str) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise GGUFError(busy) from None
    except OSError:
        return  # a mount without locks
