"""What this machine is and has to give: processor, threads, memory."""

import contextlib
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Defaults of the commands; every one of them takes --threads.
COPY_THREADS = min(2, os.cpu_count() or 1)  # more do not read and write faster
COMPUTE_THREADS = min(4, os.cpu_count() or 1)

# Control groups of version 2, then 1: where they are mounted, and their limit, their use, and what
# of it is reclaimed where memory is needed (kernel, admin-guide/cgroup-v2.rst, cgroup-v1/memory).
_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_MOUNTS_V1 = ("sys/fs/cgroup/memory",)
_GROUP_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)

SPARE = 0.8  # of what is free, the most to take


def little_address_space() -> bool:
    """Whether `ulimit -v` leaves less than a math library takes for its threads, at its ease."""
    if sys.platform == "win32":
        return False
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return soft != resource.RLIM_INFINITY and soft < 1 << 32


def free_bytes(root: Path = Path("/")) -> float:
    """Memory to take without hurting others; no limit where the system does not tell.

    The smaller of what the machine has and what each control group around this process still may
    take. root: where /proc and /sys are.
    """
    return SPARE * min([_available(root), *(_group_room(group) for group in _groups(root))])


def _available(root: Path) -> float:
    return 1024 * _counters(root / "proc/meminfo").get("MemAvailable:", math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups and of those around them, as far as seen."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            for mount in _MOUNTS if not controllers else _MOUNTS_V1:
                if controllers and "memory" not in controllers.split(","):
                    continue
                group = PurePosixPath(name.lstrip("/"))
                # In a container the mount may be the group itself: its parents are tried too.
                yield from (root / mount / part for part in (group, *group.parents))


def _group_room(group: Path) -> float:
    """What its limit leaves; files that the kernel only keeps count as free, as in meminfo."""
    for limit, used, kept in _GROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            room = int((group / limit).read_text()) - int((group / used).read_text())
            counters = _counters(group / "memory.stat")
            return max(0, room + sum(counters.get(name, 0) for name in kept))
    return math.inf


def _counters(path: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (line.split() for line in path.read_text().splitlines())
        return {name: int(value) for name, value, *_ in lines}
    return {}


def processor() -> str:
    """Its name, as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
