"""Ctrl-C and its like: when they end the program, how, and when they have to wait."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

TYPE_CHECKING = False  # as in gguf_fuse
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn, TypeAlias

    Handler: TypeAlias = Callable[[int, FrameType | None], object] | signal.Handlers

_IMPORT = "<frozen importlib._bootstrap>"  # what the code is called that loads a module

# Windows has no SIGHUP.
STOPPING = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


class Stopped(KeyboardInterrupt):
    """One of the signals came. args: what has become of the output by now, where that is known."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def words(number: int) -> str:
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"


def end_at_once() -> None:
    """For as long as nothing is begun: no exception, which an import could swallow or print."""
    _heed(_leave)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """In the block a signal raises Stopped, once: another one would break the cleaning up.

    After it signals are ignored: all that is left to do is to say how it went.
    """
    _heed(_stop)
    try:
        yield
    finally:
        _heed(_ignore)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """What is in the block is done whole; a signal comes after it, or not at all if it fails.

    By Python's handlers, not by a mask: the progress bar's thread would take what is masked here.
    """
    import threading

    came: list[int] = []
    handlers: dict[int, Handler] = {}
    try:
        for number in STOPPING if threading.current_thread() is threading.main_thread() else ():
            handler = signal.getsignal(number)
            if callable(handler) and number not in handlers:
                handlers[number] = handler
                signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)


def _heed(handler: Handler) -> None:
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    if _imports(frame):  # which could swallow it: the signal comes again
        import threading

        with contextlib.suppress(RuntimeError):  # no thread to be had
            threading.Timer(0.001, signal.raise_signal, [number]).start()
            return
    _heed(_ignore)
    raise Stopped(number)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being loaded."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False


def _ignore(number: int, frame: FrameType | None) -> None:
    """Not SIG_IGN: of a signal that came just before, Python would complain that it ignores it."""


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"gguf-fuse: {words(number)}; nothing was written\n".encode())
    os._exit(128 + number)
