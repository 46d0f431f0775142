"""A process that carries out tasks: one JSON line of standard input each, lines of events back.

A process of its own: what kills it (memory, a signal) costs one file, and the batch goes on.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from typing import Any

from gguf_fuse.batching.task import Task, carry_out

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_EVERY_S = 0.1


class _Teller:
    """Events of one task, not more of them than anybody can see."""

    def __init__(self) -> None:
        self.n_bytes, self.told = 0, 0.0

    def start(self, total: int) -> None:
        _tell({"total": total})

    def advance(self, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        if time.monotonic() - self.told > _EVERY_S:
            self.told = time.monotonic()
            _tell({"bytes": self.n_bytes})


def _tell(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def main() -> None:
    if sys.platform != "win32":  # blocked until now: see `local`
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    _end_with_parent()
    for line in sys.stdin:
        teller = _Teller()
        task = Task.of(json.loads(line))
        _tell({"entry": carry_out(task, teller.start, teller.advance).as_dict()})


def _end_with_parent() -> None:
    """Interrupted when the batch is killed: what it began, it cleans up."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(128 + signal.SIGINT)
