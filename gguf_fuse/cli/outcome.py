"""How a command ends: what it fails of in one line, its exit code, its object of JSON."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

from gguf_fuse import signals

JSON_FORMAT = 1  # one more whenever a word changes its meaning or is gone; new words may come

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOTHING_TO_DO = 3
EXIT_NOT_VERIFIED = 4


class Failed(Exception):
    """How a command ends that has printed what it found: why it fails, and its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def fail(message: str, code: int) -> NoReturn:
    raise Failed(message, code)


def failing(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every expected failure into one line on stderr and the documented exit code.

    With --json the command's one object is printed when it ends, for only then both are known.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        ended = _outcome(functools.partial(command, *args, **kwargs))
        if kwargs.get("as_json"):
            answer = functools.partial(_print_answer, command.__name__, *ended)
            ended = max(ended, _outcome(answer))  # a failure is no less one if it cannot be told
        code, error = ended
        if error:
            complain(error)
        if code:
            raise typer.Exit(code)

    return run


def _outcome(action: Callable[[], None]) -> tuple[int, str]:
    """Exit code, and why it is not 0. Raises BadParameter."""
    from gguf_fuse.format.source import GGUFError  # which --help need not wait for
    from gguf_fuse.planning.plan import NothingToDo

    try:
        with signals.raised():
            action()
            sys.stdout.flush()
    except Failed as failed:
        return failed.code, str(failed)
    except typer.Exit as end:  # all is said
        return end.exit_code, ""
    except NothingToDo as nothing:
        return EXIT_NOTHING_TO_DO, str(nothing)
    except GGUFError as error:
        return EXIT_ERROR, str(error)
    except OSError as error:  # those of models are GGUFErrors by now
        return _not_done(error)
    except MemoryError as error:
        return EXIT_ERROR, f"not enough memory: {str(error) or 'nothing more can be had'}"
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, signals.Stopped) else signal.SIGINT
        return 128 + number, "; ".join([signals.words(number), *stop.args])
    except typer.BadParameter:  # told where the command line is understood
        raise
    except Exception as error:
        if "start new thread" in str(error):
            return EXIT_ERROR, "no more threads to be had; see ulimit -u"
        return EXIT_ERROR, _mistake(error)
    return 0, ""


def _not_done(error: OSError) -> tuple[int, str]:
    if error.errno == errno.ENOMEM:
        return EXIT_ERROR, f"not enough memory: {error.strerror}"
    if error.filename is None:
        return not_printed(error), ""
    return EXIT_ERROR, f"{error.filename}: {error.strerror}"


def _mistake(error: Exception) -> str:
    """One of this program, which is no file's fault."""
    import traceback

    *_, place = traceback.extract_tb(error.__traceback__)
    return (
        f"internal error, please report it: {type(error).__name__}: {error} "
        f"({Path(place.filename).name}, line {place.lineno})"
    )


def complain(message: str) -> None:
    """One line on stderr, its beginning red on a terminal."""
    line = f"gguf-fuse: {one_line(message)}"
    with contextlib.suppress(OSError):  # the exit code still tells
        if not sys.stderr.isatty():
            print(line, file=sys.stderr)
            return
        from gguf_fuse.cli.console import print_warning  # rich, which wrong usage need not wait for

        print_warning(line)


def not_printed(error: OSError) -> int:
    """Say that a stream does not take what is printed, in place of Python at its end -> exit code.

    The code of wrong usage stays, where that was to be told.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what it still holds would fail once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    with contextlib.suppress(OSError):
        print(f"gguf-fuse: standard output: {error.strerror}", file=sys.stderr)
    usage = getattr(error.__context__, "exit_code", EXIT_ERROR)
    return int(usage)


_answers: list[dict[str, Any]] = []  # what --json will print


def print_json(value: dict[str, Any]) -> None:
    """Print it when the command ends; its words are those of `cli.answer`."""
    _answers.append(value)


def to_json(value: dict[str, Any]) -> str:
    """NaN and infinities, which JSON does not have, become null."""
    import json

    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_answer(command: str, code: int, error: str) -> None:
    found = _answers.pop() if _answers else {}
    if found or error:
        begin = {"format": JSON_FORMAT, "command": command, "exit_code": code}
        print(to_json(begin | {"error": error or None} | found))


def one_line(content: str, most: int = 1000) -> str:
    """Fit for a terminal, whatever a damaged file put into a name; what is too long is cut."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in content)
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 3 :]}"
