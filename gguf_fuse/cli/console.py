"""What all commands print with: the console, tables, one progress bar, and how a failure ends."""

import contextlib
import errno
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

from gguf_fuse import signals
from gguf_fuse.format.source import GGUFError
from gguf_fuse.planning.plan import NothingToDo

EXIT_ERROR = 1
EXIT_NOTHING_TO_DO = 3
EXIT_NOT_VERIFIED = 4


def failing(command: Callable[..., None]) -> Callable[..., None]:
    """Turn every expected failure into one line on stderr and the documented exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with signals.raised():
                command(*args, **kwargs)
                sys.stdout.flush()
        except NothingToDo as nothing:
            fail(str(nothing), EXIT_NOTHING_TO_DO)
        except GGUFError as error:
            fail(str(error), EXIT_ERROR)
        except OSError as error:  # those of models are GGUFErrors by now
            if error.errno == errno.ENOMEM:
                fail(f"not enough memory: {error.strerror}", EXIT_ERROR)
            if error.filename is None:
                raise typer.Exit(not_printed(error)) from error
            fail(f"{error.filename}: {error.strerror}", EXIT_ERROR)
        except MemoryError as error:
            fail(f"not enough memory: {str(error) or 'nothing more can be had'}", EXIT_ERROR)
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
            fail("no more threads to be had; see ulimit -u", EXIT_ERROR)
        except KeyboardInterrupt as stop:
            number = stop.number if isinstance(stop, signals.Stopped) else signal.SIGINT
            fail("; ".join([signals.words(number), *stop.args]), 128 + number)

    return run


def fail(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # the code still tells
        print(f"gguf-fuse: {one_line(message)}", file=sys.stderr)
    raise typer.Exit(code)


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


def printer(*, stderr: bool = False) -> Console:
    """Into a pipe, lines are not cut to the width of a screen that is not there."""
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, width=wide)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def print_parts(parts: Iterable[RenderableType]) -> None:
    for part in parts:
        printer().print(part, highlight=False)


def one_line(content: str, most: int = 1000) -> str:
    """Fit for a terminal, whatever a damaged file put into a name; what is too long is cut."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in content)
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 3 :]}"


def text(content: str = "", style: str = "") -> Text:
    return Text(one_line(content), style)


def ms(value: float) -> str:
    """Milliseconds, to three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(columns: Iterable[Column | str], rows: Iterable[Iterable[RenderableType]]) -> Table:
    """Without lines."""
    made = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for row in rows:
        made.add_row(*row)
    return made


def number(title: str, **options: Any) -> Column:
    """A column of numbers."""
    return Column(title, justify="right", **options)


@dataclass(frozen=True)
class Fitting:
    """The wide table where there is room for it: a column that is cut off would mislead."""

    wide: Table
    narrow: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wanted = console.measure(self.wide, options=options.update(max_width=1000)).maximum
        yield self.wide if wanted <= options.max_width else self.narrow


@dataclass(frozen=True)
class Bar:
    """How far the command is. update: of rich's task."""

    update: Callable[..., None]

    def start(self, what: str, total: int) -> None:
        """A stage begins, of so many bytes or steps."""
        self.update(description=what, completed=0, total=total, visible=True)

    def advance(self, n: int) -> None:
        self.update(advance=n)


@contextlib.contextmanager
def progress_bar(quiet: bool, *, of_bytes: bool = False) -> Iterator[Bar]:
    """On stderr, where that is a terminal. of_bytes: with their number and speed."""
    if quiet or not sys.stderr.isatty():
        yield Bar(lambda **changes: None)
        return
    from rich import progress as rich

    of_steps = [rich.TaskProgressColumn()]
    done = [rich.DownloadColumn(), rich.TransferSpeedColumn()] if of_bytes else of_steps
    columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), *done]
    columns.append(rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=printer(stderr=True), transient=True) as progress:
        yield Bar(functools.partial(progress.update, progress.add_task("", visible=False)))
