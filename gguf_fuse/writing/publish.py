"""New files get their names, all of them or none.

They grow under temporary names beside their destinations: at every instant a destination is absent,
old, or complete. Whatever ends the writing early says what has become of the files: nothing was
written, or they are there and whole, and what was not done.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from gguf_fuse import signals
from gguf_fuse.format.source import GGUFError, Source
from gguf_fuse.writing.copy import flush, libc_call
from gguf_fuse.writing.outputs import Options, check_place
from gguf_fuse.writing.temporary import Temporaries, beside

Move = tuple[Path, Path]  # from the temporary name to the destination

_RENAME_NOREPLACE, _AT_FDCWD = 1, -100  # linux/fs.h, linux/fcntl.h


class Publication:
    """The files of one run.

    named: as messages call them. own: where they are to be, links resolved. others: where their
    manifest's files are to be, which grow at `small`. nothing: what is said when none is there.
    at: the file that is worked on; what fails, fails there.
    """

    def __init__(
        self,
        read: Sequence[Source],
        named: Sequence[Path],
        own: Sequence[Path],
        others: Sequence[Path],
        options: Options,
        nothing: str = "nothing was written",
    ) -> None:
        self._read, self._named, self._nothing = read, named, nothing
        self._own, self._others, self._options = own, others, options
        self.at, self.small = named[0], [beside(real) for real in others]
        self._growing, self._whole = Temporaries(()), False
        self._left: list[str] = []  # what could not be undone, or not be done behind the renaming

    def publish(self, grow: Callable[[], Temporaries], fill: Callable[[Temporaries], None]) -> None:
        """Let the files grow, `fill` them, give them their names.

        Raises GGUFError for what fails, in these two as well. It, and a KeyboardInterrupt's args,
        tell what has become of the files.
        """
        try:
            with signals.waiting():
                self._growing = grow()
            fill(self._growing)
            self.at = self._named[0]
            self._name_all()
        except BaseException as error:
            with signals.waiting():
                self._raise_told(error)
        finally:
            self._growing.close()
        if self._left:
            raise GGUFError(self._outcome())

    def _name_all(self) -> None:
        reals = [*self._own, *self._others]
        for real in reals:
            check_place(self._read, real, real, self._options.force)  # time has gone by
        with signals.waiting():
            moves = list(zip(self._growing.paths, self._own, strict=True))
            others = list(zip(self.small, self._others, strict=True))
            replaced = _give_names(moves, others, self._options, self._left)
            self._whole = True
            _remove([*self._growing.paths, *self.small, *replaced], self._left)
            self._end(self._left)
        if self._options.sync:
            _flush_folders(reals, self._left)

    def _raise_told(self, error: BaseException) -> NoReturn:
        """Clean up, and raise the error with what has become of the files."""
        if self._whole and self._options.sync:
            self._left.append("its name may not be on the disk yet")
        kept = None if self._whole or self._left else self._growing.kept(error)
        told, stale = kept or self._outcome(), list[str]()
        if not self._whole:
            _remove(self.small, stale)
        if kept is None:
            _remove([] if self._whole else self._growing.paths, stale)
            self._end(stale)
        told = "; ".join([told, *stale])
        if isinstance(error, OSError):
            raise GGUFError(f"{self.at}: {error.strerror}; {told}") from error
        if isinstance(error, GGUFError) and (kept or self._left or stale):
            raise GGUFError(f"{error}; {told}") from error
        if isinstance(error, KeyboardInterrupt):
            error.args = (told,)
        raise error

    def _outcome(self) -> str:
        if not self._whole:
            first = "it could not be undone" if self._left else self._nothing
        elif len(self._named) == 1:
            first = f"{self._named[0]} is there and whole"
        else:
            n_others = len(self._named) - 1
            first = f"{self._named[0]} and the other {n_others} shards are there and whole"
        return "; ".join([first, *self._left])

    def _end(self, left: list[str]) -> None:
        with _noted(left, "the journal could not be removed"):
            self._growing.end()


def _give_names(
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


@contextlib.contextmanager
def _noted(left: list[str], words: str) -> Iterator[None]:
    """A failure ends nothing here: it is told with the rest."""
    try:
        yield
    except OSError as error:
        left.append(f"{words}: {error.strerror}")


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
