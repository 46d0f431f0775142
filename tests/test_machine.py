"""How much memory is free: what the machine has, and what the control groups around us allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_fuse.machine import SPARE, free_bytes

MiB = 1 << 20
V2 = "0::/a/b\n"
V1 = "5:cpu,memory:/a/b\n1:name=systemd:/\n0::/\n"
V1_FOLDER = "sys/fs/cgroup/memory"


def machine(root: Path, groups: str, **files: str) -> float:
    """Free bytes, where /proc and /sys have these files and 1000 MiB of memory are available."""
    for name, content in {
        "proc/meminfo": "MemTotal: 2048000 kB\nMemAvailable:    1024000 kB\nHugePages_Total:  0\n",
        "proc/self/cgroup": groups,
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return free_bytes(root) / SPARE / MiB


def v2(folder: str, limit: str, used: int, stat: str = "") -> dict[str, str]:
    files = {"memory.max": limit, "memory.current": str(used * MiB), "memory.stat": stat}
    return {f"sys/fs/cgroup/{folder}/{name}": content for name, content in files.items()}


def v1(folder: str, limit: int, used: int, stat: str = "") -> dict[str, str]:
    files = {"limit_in_bytes": limit * MiB, "usage_in_bytes": used * MiB, "stat": stat}
    return {f"{V1_FOLDER}/{folder}/memory.{name}": str(value) for name, value in files.items()}


def test_without_control_groups(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) == float("inf")
    assert machine(tmp_path, "") == 1000


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        (V2, v2("a/b", "max", 100), 1000),
        (V2, v2("a/b", str(300 * MiB), 100), 200),
        (V2, v2("a/b", str(3000 * MiB), 100), 1000),
        (V2, v2("a", str(150 * MiB), 50) | v2("a/b", str(300 * MiB), 10), 100),
        # What the kernel keeps of files goes when memory is needed.
        (V2, v2("a/b", str(300 * MiB), 290, f"anon 5\ninactive_file {100 * MiB}\n"), 110),
        (V2, v2("a/b", str(300 * MiB), 310), 0),
        # In a container, the mount is the group that its name outside would lead to.
        ("0::/../outside\n", v2(".", str(64 * MiB), 4), 60),
        (V1, v1("a/b", 1 << 40, 3), 1000),
        (V1, v1("a/b", 500, 100, f"total_active_file {50 * MiB}"), 450),
        (V1, v1("a/b", 500, 100) | v1("", 200, 100), 100),
        ("garbage", {}, 1000),
        (V2, v2("a/b", "?", 1), 1000),
    ],
)
def test_the_tightest_group_counts(
    groups: str, files: dict[str, str], wanted: int, tmp_path: Path
) -> None:
    assert machine(tmp_path, groups, **files) == wanted
