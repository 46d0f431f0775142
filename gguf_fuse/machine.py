"""What this machine has to give: threads and memory."""

import contextlib
import os
from pathlib import Path

# Defaults of the commands; every one of them takes --threads.
COPY_THREADS = min(2, os.cpu_count() or 1)  # more do not read and write faster
COMPUTE_THREADS = min(4, os.cpu_count() or 1)

SPARE = 0.8  # of what is free, the most to take


def free_bytes() -> float:
    """Memory to take without hurting others; no limit where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return SPARE * 1024 * int(line.split()[1])
    return float("inf")
