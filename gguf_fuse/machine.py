"""Threads and memory that this machine has to give."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

COPY_THREADS = min(2, os.cpu_count() or 1)  # of commands that rewrite
COMPUTE_THREADS = min(4, os.cpu_count() or 1)  # of commands that compute
SPARE = 0.8  # of what is free, the most to take


def free_bytes() -> float:
    """Memory to take without hurting others; no limit where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return SPARE * 1024 * int(line.split()[1])
    return float("inf")
