"""Placement -> new file, published atomically.

The new file grows under a temporary name beside its destination and gets its own when it is whole:
at every instant the destination is absent, old, or complete. What is read is never written to.
Shards get their names only when all of them are whole. Whatever ends the writing early says what
has become of the output: nothing was written, or it is there and whole, and what was not done.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_fuse import signals
from gguf_fuse.choices import MOST_THREADS, Reflink, require_count, require_word
from gguf_fuse.format.source import AnyPath, GGUFError, OpenSource, Source, opened
from gguf_fuse.machine import COPY_THREADS
from gguf_fuse.planning.plan import new_bytes
from gguf_fuse.progress import OnProgress, ignore
from gguf_fuse.writing.copy import (
    Opened,
    clone_ranges,
    copy_ranges,
    libc_call,
    reserve,
    start_write_back,
    without_holes,
    write_all,
)
from gguf_fuse.writing.hashing import Hashes, hash_beside
from gguf_fuse.writing.manifest import contents, manifest_paths, ranges
from gguf_fuse.writing.place import Copy, Placement
from gguf_fuse.writing.resume import kept_bytes, temporaries
from gguf_fuse.writing.temporary import Temporaries, beside
from gguf_fuse.writing.whole import refuse_other_bytes

Move = tuple[Path, Path]  # from the temporary name to the destination

_RENAME_NOREPLACE, _AT_FDCWD = 1, -100  # linux/fs.h, linux/fcntl.h
# What a file system says that has no fsync.
_CANNOT_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


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


def write(read: Sequence[Source], outputs: Sequence[Output], options: Options) -> Written:
    """Write the new files, all of them whole or none at all.

    read: every file that is read; the first one's permissions are those of the outputs.

    Raises GGUFError for anything `check_destinations` refuses, a failed read or write, and a
    source that changed since its header was read. It, and a KeyboardInterrupt's args, tell what has
    become of the outputs.
    """
    reals = check_destinations(read, outputs, force=options.force, manifest=options.manifest)
    own, others = reals[: len(outputs)], reals[len(outputs) :]
    small = [beside(real) for real in others]  # where the manifest grows
    placements = [output.placement for output in outputs]
    at, whole, growing = outputs[0].path, False, Temporaries(())
    left: list[str] = []  # what could not be undone, or not be done behind the renaming
    try:
        with signals.waiting():
            growing = temporaries(placements, own, resume=options.resume)
        growing.look(options.threads, _progress(options), options.on_resume)
        with opened(read) as sources:
            n_cloned = n_copied = 0
            hashes: list[Hashes] = []
            for number, output in enumerate(outputs):
                at, is_last = output.path, output is outputs[-1]
                clones, copies, found = _write_one(
                    sources, growing, number, output, options, is_last
                )
                n_cloned, n_copied = n_cloned + clones, n_copied + copies
                hashes += found
            refuse_other_bytes(sources, placements, growing.paths)
            if options.manifest is not None:
                at = Path(options.manifest)
                said = contents(at, read, [(o.path, o.placement) for o in outputs], hashes)
                _write_small(small, said, sources, options)
        at = outputs[0].path
        for real in reals:
            check_place(read, real, real, options.force)  # time has gone by
        with signals.waiting():
            moves = list(zip(growing.paths, own, strict=True))
            told_by = list(zip(small, others, strict=True))
            replaced = _publish(moves, told_by, options, left)
            whole = True
            _remove([*growing.paths, *small, *replaced], left)
            _end(growing, left)
        if options.sync:
            _flush_folders(reals, left)
    except BaseException as error:
        with signals.waiting():
            if whole and options.sync:
                left.append("its name may not be on the disk yet")
            kept = None if whole or left else growing.kept(error)
            told = kept or _outcome(outputs, whole, left)
            stale: list[str] = []
            _remove([] if whole else small, stale)
            if kept is None:
                _remove([] if whole else growing.paths, stale)
                _end(growing, stale)
            told = "; ".join([told, *stale])
            if isinstance(error, OSError):
                raise GGUFError(f"{at}: {error.strerror}; {told}") from error
            if isinstance(error, GGUFError) and (kept or left or stale):
                raise GGUFError(f"{error}; {told}") from error
            if isinstance(error, KeyboardInterrupt):
                error.args = (told,)
            raise
    finally:
        growing.close()
    if left:
        raise GGUFError(_outcome(outputs, whole, left))
    return Written(n_copied, n_cloned, growing.n_resumed)


def _outcome(outputs: Sequence[Output], whole: bool, left: Sequence[str]) -> str:
    if not whole:
        first = "it could not be undone" if left else "nothing was written"
    elif len(outputs) == 1:
        first = f"{outputs[0].path} is there and whole"
    else:
        first = f"{outputs[0].path} and the other {len(outputs) - 1} shards are there and whole"
    return "; ".join([first, *left])


def write_manifest(
    read: Sequence[Source],
    sources: Opened,
    output: Output,
    hashes: Hashes,
    options: Options,
) -> None:
    """The manifest of what went to standard output: both its files, or none.

    Raises GGUFError.
    """
    assert options.manifest is not None
    reals = check_destinations(read, (), force=options.force, manifest=options.manifest)
    moves, left = [(beside(real), real) for real in reals], list[str]()
    temporaries = [temporary for temporary, _ in moves]
    path = Path(options.manifest)
    try:
        said = contents(path, read, [(output.path, output.placement)], [hashes])
        _write_small(temporaries, said, sources, options)
        with signals.waiting():
            replaced = _publish(moves, (), options, left)
            _remove([*temporaries, *replaced], left)
        if options.sync:
            _flush_folders(reals, left)
    except BaseException as error:
        with signals.waiting():
            _remove(temporaries, left)
        if isinstance(error, OSError):
            told = "; ".join([str(error.strerror), *left])
            raise GGUFError(f"{path}: the manifest was not written: {told}") from error
        raise
    if left:
        raise GGUFError("; ".join([f"{path} is there and whole", *left]))


def _write_small(
    paths: Sequence[Path], contents: Sequence[bytes], sources: Opened, options: Options
) -> None:
    files = Temporaries(paths)
    for number, data in enumerate(contents):
        with files.opened(number) as fd:
            write_all(fd, memoryview(data), 0)
            _set_permissions(fd, next(iter(sources.values())))
            if options.sync:
                flush(fd)


def _write_one(
    sources: Opened,
    growing: Temporaries,
    number: int,
    output: Output,
    options: Options,
    is_last: bool,
) -> tuple[int, int, list[Hashes]]:
    """A whole new file under a temporary name -> bytes cloned and copied, hashes if wanted.

    Raises as `write`.
    """
    with growing.opened(number) as target_fd:
        clones, copies, hashes = _fill(sources, target_fd, growing, number, output, options)
        for file in sources.values():
            file.refuse_changed()
        _set_permissions(target_fd, next(iter(sources.values())))
        if options.sync:
            if is_last:
                options.on_flush()
            flush(target_fd)
    return clones, copies, hashes


def _progress(options: Options) -> OnProgress:
    """Of copying. With hashes, progress is theirs: they come last."""
    return options.on_progress if options.manifest is None else ignore


def _fill(
    sources: Opened,
    target_fd: int,
    growing: Temporaries,
    number: int,
    output: Output,
    options: Options,
) -> tuple[int, int, list[Hashes]]:
    """Write all of one file -> as `_write_one`. Raises as `write` does."""
    placement = output.placement
    progress = _progress(options)
    reserve(target_fd, placement.n_bytes, ())
    for start, data in placement.literals:
        write_all(target_fd, new_bytes(data), start)
    refused = clone_ranges(sources, target_fd, placement.clones, progress)
    if refused and options.reflink == "always":
        raise GGUFError(f"{output.path}: the file system refused to clone a range")
    copies = without_holes(sources, [*placement.copies, *refused])
    reserve(target_fd, placement.n_bytes, copies)

    missing = growing.missing(number, copies)

    def copy_all(tell: Callable[[Copy], None]) -> None:
        def on_block(block: Copy, view: memoryview) -> None:
            if options.sync:
                start_write_back(target_fd, block)
            growing.wrote(number, block, view)
            tell(block)

        copy_ranges(sources, target_fd, missing, threads=options.threads, on_block=on_block)

    hashes: list[Hashes] = []
    if options.manifest is None:
        copy_all(lambda block: progress(block.n_bytes))
    else:
        path, where, told = growing.paths[number], ranges(placement), options.on_progress
        hashes += [hash_beside(path, placement.n_bytes, where, missing, copy_all, told)]
    n_refused = sum(clone.n_bytes for clone in refused)
    return placement.n_cloned - n_refused, sum(copy.n_bytes for copy in copies), hashes


def _set_permissions(fd: int, like: OpenSource) -> None:
    """As `cp` does: the source's, less the umask; never setuid, setgid or sticky.

    Of a source that is fetched: those of a new file.
    """
    if not hasattr(os, "fchmod"):
        return
    umask = os.umask(0o077)  # the only way to read it
    os.umask(umask)
    with contextlib.suppress(OSError):  # a mount may have no permissions
        mode = 0o666 if like.fd is None else os.fstat(like.fd).st_mode
        os.fchmod(fd, mode & 0o777 & ~umask)


def _publish(
    moves: Sequence[Move], others: Sequence[Move], options: Options, left: list[str]
) -> list[Path]:
    """Give each of (temporary, destination) its name, or none -> new names of what was there.

    Loading begins with the first shard: of an old set it goes first, and of the new one it comes
    last, so that at no moment some shards of both can be loaded, nor after a power failure. others:
    files of the manifest, which are there before what they tell of. Raises OSError and GGUFError;
    left: what could not be undone then.
    """
    first = moves[0][1]
    in_one_step = options.force and len(moves) == 1  # the old file until then
    placed: list[Path] = []
    replaced: dict[Path, Path] = {}  # by destination: where the old file is now
    try:
        for _, destination in [*moves[in_one_step:], *others]:
            if options.force and destination.exists():
                aside = beside(destination)
                destination.replace(aside)
                replaced[destination] = aside
                if destination == first and options.sync:
                    _flush_folders([first], [])
        for temporary, destination in reversed([*moves, *others]):
            if in_one_step and destination == first:
                temporary.replace(destination)
                break
            if destination == first and options.sync and len(moves) > 1:
                _flush_folders([first], [])  # what fails is told in the end
            _give_name(temporary, destination, left)
            placed.append(destination)
    except BaseException:
        _remove([path for path in placed if path not in replaced], left)
        for destination, aside in replaced.items():
            with _noted(left, f"{aside} is what {destination} was"):
                aside.replace(destination)
        raise
    return list(replaced.values())


def _give_name(temporary: Path, destination: Path, left: list[str]) -> None:
    """A second name never replaces what is there, and so does no other way here.

    The temporary name may stay. Raises GGUFError for what appeared there in the last instant.
    """
    try:
        if not (_link(temporary, destination) or _rename_new(temporary, destination)):
            # Where neither is known: an empty file of our own is in the way of all others.
            fd = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.close(fd)
                temporary.replace(destination)
            except BaseException:
                _remove([destination], left)
                raise
    except FileExistsError:
        raise GGUFError(f"{destination}: exists already; --force replaces it") from None


def _link(temporary: Path, destination: Path) -> bool:
    try:
        os.link(temporary, destination)
    except FileExistsError:
        if not destination.samefile(temporary):  # NFS may say so of a link that it has just made
            raise
    except OSError:
        return False  # a file system without second names
    return True


def _rename_new(temporary: Path, destination: Path) -> bool:
    names = (_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(destination))
    error = libc_call("renameat2", *names, _RENAME_NOREPLACE)
    if error == errno.EEXIST:
        raise FileExistsError
    return error == 0


def _remove(paths: Sequence[Path], left: list[str]) -> None:
    for path in paths:
        with _noted(left, f"{path} could not be removed"):
            path.unlink(missing_ok=True)


def _end(growing: Temporaries, left: list[str]) -> None:
    with _noted(left, "the journal could not be removed"):
        growing.end()


@contextlib.contextmanager
def _noted(left: list[str], words: str) -> Iterator[None]:
    """A failure ends nothing here: it is told with the rest."""
    try:
        yield
    except OSError as error:
        left.append(f"{words}: {error.strerror}")


def flush(fd: int) -> None:
    """Raises OSError, which tells of the way out for a file system that cannot."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        words = f"{error.strerror}: this disk cannot be waited for; --no-sync does not wait"
        raise OSError(error.errno, words) from error


def _flush_folders(files: Sequence[Path], left: list[str]) -> None:
    """Make new names durable themselves. Windows cannot."""
    if os.name != "posix":
        return
    for folder in {path.parent for path in files}:
        with _noted(left, f"the folder {folder} was not flushed to the disk"):
            fd = os.open(folder, os.O_RDONLY)
            try:
                flush(fd)
            finally:
                os.close(fd)
