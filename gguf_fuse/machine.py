"""What this machine is and has to give: processor, threads, memory."""

import contextlib
import os
import platform
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


def processor() -> str:
    """Its name, as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
