"""What is to be written, where and how; and whether it can be, before anything is."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_fuse.choices import MOST_THREADS, Reflink, require_count, require_word
from gguf_fuse.format.source import AnyPath, GGUFError, Source
from gguf_fuse.machine import COPY_THREADS
from gguf_fuse.progress import OnProgress, ignore
from gguf_fuse.writing.manifest import manifest_paths
from gguf_fuse.writing.place import Placement
from gguf_fuse.writing.resume import kept_bytes


@dataclass(frozen=True)
class Options:
    """How to write, the same for both ways. on_start gets the number of bytes to come.

    sync: wait until the data is on the disk, so that the files survive a power failure. reflink:
    whether to share blocks with the source where the file system can; "always" fails where it
    cannot. on_flush: called when the last wait for the disk begins. split_max_size (bytes of data),
    split_max_tensors: cut the output into shards. manifest: the file that is to tell the SHA-256 of
    all that is written. resume: go on where an earlier run that fetched was broken off, and keep
    what this one has; else begin anew. on_resume: called with a line that says what has become of
    what an earlier run kept. Raises GGUFError for a value that cannot be.
    """

    dry_run: bool = False
    force: bool = False
    sync: bool = True
    threads: int = COPY_THREADS
    reflink: Reflink = "auto"
    on_start: Callable[[int], None] = ignore
    on_progress: OnProgress = ignore
    on_flush: Callable[[], None] = ignore
    split_max_size: int | None = None
    split_max_tensors: int | None = None
    manifest: AnyPath | None = None
    resume: bool = True
    on_resume: Callable[[str], None] = ignore

    def __post_init__(self) -> None:
        require_count("threads", self.threads, MOST_THREADS)
        require_word("reflink", self.reflink, Reflink)
        for option in ("split_max_size", "split_max_tensors"):
            value = getattr(self, option)
            if value is not None:
                require_count(option, value, sys.maxsize)


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes of data by how they came into the new file. Holes of the source are neither.

    n_resumed: of those that were copied, by an earlier run that was broken off.
    """

    n_copied: int
    n_cloned: int
    n_resumed: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """One file of the result, the only one or a shard, and where it goes."""

    path: Path
    placement: Placement


def check_destinations(
    read: Sequence[Source],
    outputs: Sequence[Output],
    *,
    force: bool,
    manifest: AnyPath | None = None,
) -> list[Path]:
    """The real paths to write to, links resolved; those of the manifest come last.

    read: every file that is read, not only those that are copied from. Raises GGUFError where an
    output is one of them, no regular file, there already (without force), in no folder, two are the
    same, or a disk has too little space free for all of them.
    """
    paths = [output.path for output in outputs]
    paths += [] if manifest is None else manifest_paths(manifest)
    reals = [Path(os.path.realpath(path)) for path in paths]
    needed: dict[Path, int] = {}
    try:
        for path, real in zip(paths, reals, strict=True):
            check_place(read, path, real, force)
            if reals.count(real) > 1:
                is_manifest = real in reals[len(outputs) :]
                what = "the manifest and OUT" if is_manifest else "two shards"
                raise GGUFError(f"{path}: {what} would be the same file, {real}")
        for output, real in zip(outputs, reals, strict=False):
            n_bytes = output.placement.n_bytes - output.placement.n_cloned
            n_bytes -= kept_bytes(output.placement, real)
            needed[real.parent] = needed.get(real.parent, 0) + n_bytes
        for folder, n_bytes in needed.items():
            free = _free_bytes(folder)
            if free < n_bytes:
                raise GGUFError(
                    f"{outputs[0].path}: {n_bytes} bytes are needed, {free} are free on the disk "
                    f"of {folder}"
                )
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error
    return reals


def _free_bytes(folder: Path) -> float:
    """No limit where a mount does not tell, or tells of a disk of no size."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return float("inf")
    return usage.free if usage.total else float("inf")


def check_place(read: Sequence[Source], destination: Path, real: Path, force: bool) -> None:
    """Raises GGUFError where nothing can, or without force may, be put there."""
    if not real.parent.is_dir():
        fault = "is not a folder" if real.parent.exists() else "does not exist"
        raise GGUFError(f"{destination}: the folder {real.parent} {fault}")
    with contextlib.suppress(FileNotFoundError):
        status = destination.stat()  # not of `real`: /dev/stdout may lead to a pipe without a name
        for file in read:
            if file.is_file(status):
                raise GGUFError(
                    f"{destination}: input and output are the same file, {file.path}; give another "
                    "name"
                )
        if stat.S_ISDIR(status.st_mode):
            raise GGUFError(f"{destination}: a folder, not a regular file; give the name of a file")
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(
                f"{destination}: not a regular file; use - as OUT to write to standard output"
            )
        if not force:
            raise GGUFError(f"{destination}: exists already; --force replaces it")
