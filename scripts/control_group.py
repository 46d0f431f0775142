"""A Linux control group of its own for a benchmark: less memory, a slower disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def less_memory(n_bytes: int) -> AbstractContextManager[Path | None]:
    """Whose processes have no more, page cache and all -> its folder; None: not to be had."""
    return _group("memory", "memory", {"limit_in_bytes": f"{n_bytes}"}, {"max": f"{n_bytes}"})


def slow_disk(where: Path, bytes_per_s: int) -> AbstractContextManager[Path | None]:
    """Whose processes read and write the disk of `where` no faster, each; else as `less_memory`."""
    try:
        disk = _disk_of(where)
    except OSError:  # in memory, or over a network
        return contextlib.nullcontext()
    version_1 = {f"throttle.{way}_bps_device": f"{disk} {bytes_per_s}" for way in ("read", "write")}
    version_2 = {"max": f"{disk} rbps={bytes_per_s} wbps={bytes_per_s}"}
    return _group("blkio", "io", version_1, version_2)


def inside(group: Path, command: list[str]) -> list[str]:
    """The command, begun in the group."""
    return ["sh", "-c", f'echo $$ >{group}/cgroup.procs && exec "$@"', "sh", *command]


@contextlib.contextmanager
def _group(
    old: str, new: str, version_1: dict[str, str], version_2: dict[str, str]
) -> Iterator[Path | None]:
    """old, new: what the controller is called in versions 1 and 2, with its settings."""
    first = (_GROUPS / old).is_dir()
    parent, name, settings = (_GROUPS / old, old, version_1) if first else (_GROUPS, new, version_2)
    folder = parent / f"gguf-fuse-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir()
            stack.callback(folder.rmdir)
            for setting, value in settings.items():
                (folder / f"{name}.{setting}").write_text(value)
        except OSError:
            stack.close()
            yield None
            return
        yield folder


def _disk_of(where: Path) -> str:
    """The whole disk, "254:0": limits are not taken of a partition."""
    device = where.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    whole = entry.parent if (entry / "partition").exists() else entry
    return (whole / "dev").read_text().strip()
