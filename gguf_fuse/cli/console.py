"""What all commands print with: the console, tables, one progress bar, and how a failure ends."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from gguf_fuse import signals
from gguf_fuse.cli.answer import JSON_FORMAT
from gguf_fuse.format.source import GGUFError
from gguf_fuse.planning.plan import NothingToDo
from gguf_fuse.progress import ignore

if TYPE_CHECKING:
    from gguf_fuse.measuring.gain import Gain

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
    *_, place = traceback.extract_tb(error.__traceback__)
    return (
        f"internal error, please report it: {type(error).__name__}: {error} "
        f"({Path(place.filename).name}, line {place.lineno})"
    )


def complain(message: str) -> None:
    """One line on stderr, its beginning red on a terminal."""
    line = Text.assemble(("gguf-fuse:", "bold red"), f" {one_line(message)}")
    with contextlib.suppress(OSError):  # the exit code still tells
        printer(stderr=True).print(line, highlight=False, soft_wrap=True)


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
    """Into a pipe, lines are not cut to the width of a screen that is not there.

    No emoji: a file may be called :cat:.
    """
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else 10_000
    return Console(stderr=stderr, width=wide, emoji=False)


_answers: list[dict[str, Any]] = []  # what --json will print


def print_json(value: dict[str, Any]) -> None:
    """Print it when the command ends; its words are those of `cli.answer`."""
    _answers.append(value)


def to_json(value: dict[str, Any]) -> str:
    """NaN and infinities, which JSON does not have, become null."""
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


@dataclass(frozen=True)
class _Trimmed:
    """What no line of ends in spaces: a table's would."""

    part: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in Segment.split_lines(console.render(self.part, options)):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                yield from line[:-1]
                yield Segment(line[-1].text.rstrip(), line[-1].style)
            yield Segment.line()


def print_parts(parts: Iterable[RenderableType], *, stderr: bool = False) -> None:
    """One below the other; a command to be pasted is not broken."""
    out = printer(stderr=stderr)
    for part in parts:
        whole = isinstance(part, Text) and part.no_wrap
        out.print(part if whole else _Trimmed(part), highlight=False, soft_wrap=whole)


def next_line(command: str, *paths: str | Path, label: str = "next") -> Iterator[Text]:
    """The command to run next, to be pasted; none where a path cannot be shown as it is."""
    words = [str(path) for path in paths]
    if all(word.isprintable() for word in words):
        dashes = ["--"] if any(word.startswith("-") for word in words) else []
        yield Text(f"{label}: gguf-fuse {command} {shlex.join([*dashes, *words])}", no_wrap=True)


def one_line(content: str, most: int = 1000) -> str:
    """Fit for a terminal, whatever a damaged file put into a name; what is too long is cut."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in content)
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 3 :]}"


def text(content: str = "", style: str = "") -> Text:
    return Text(one_line(content), style)


def ms(value: float) -> str:
    """Milliseconds, to three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def gained(gain: Gain) -> str:
    """Percent faster, and the interval of that."""
    percent = [f"{100 * ratio - 100:+.1f}" for ratio in (gain.ratio, gain.low, gain.high)]
    return f"{percent[0]}% ({percent[1]} to {percent[2]})"


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
class Flowing:
    """A line, broken between words where it must be, never between a number and its unit.

    indent: of what follows the first line. label: in bold, before the line.
    """

    line: str
    style: str = ""
    indent: int = 0
    label: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = _UNIT.sub("\N{NO-BREAK SPACE}", self.label + one_line(self.line))
        width, further = options.max_width, " " * min(self.indent, options.max_width // 2)
        lines = textwrap.wrap(whole, width, subsequent_indent=further, break_on_hyphens=False)
        for piece in lines or [""]:
            shown = Text(piece.replace("\N{NO-BREAK SPACE}", " "), self.style)
            if piece is lines[0]:
                shown.stylize("bold", 0, len(self.label))
            yield shown


_UNIT = re.compile(r"(?<=\d) (?=([kMGTP]?B|bytes|m?s|%)\b)")


@dataclass(frozen=True)
class Fitting:
    """The wide table where there is room for it: a column that is cut off would mislead."""

    wide: Table
    narrow: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wanted = console.measure(self.wide, options=options.update(max_width=1000)).maximum
        yield self.wide if wanted <= options.max_width else self.narrow


@dataclass(frozen=True)
class Bar:
    """How far the command is. update: of rich's task. say: a line above it."""

    update: Callable[..., None]
    say: Callable[[str], None]

    def start(self, what: str, total: int) -> None:
        """A stage begins, of so many bytes or steps."""
        self.update(description=what, completed=0, total=total, visible=True)

    def advance(self, n: int) -> None:
        self.update(advance=n)


@contextlib.contextmanager
def progress_bar(quiet: bool, *, of_bytes: bool = False) -> Iterator[Bar]:
    """On stderr, where that is a terminal; what is said, elsewhere too. of_bytes: with their number
    and speed.
    """
    console = printer(stderr=True)
    if quiet or not sys.stderr.isatty() or console.is_dumb_terminal:
        yield Bar(lambda **changes: None, ignore if quiet else functools.partial(_say, console))
        return
    from rich import progress as rich

    def whole() -> Column:  # only the bar becomes shorter where there is little room
        return Column(no_wrap=True)

    of_steps = [rich.TaskProgressColumn(table_column=whole())]
    done = [rich.DownloadColumn(table_column=whole()), rich.TransferSpeedColumn(whole())]
    columns = [rich.TextColumn("{task.description}", table_column=whole()), rich.BarColumn()]
    columns += [*(done if of_bytes else of_steps), rich.TimeRemainingColumn(table_column=whole())]
    with rich.Progress(*columns, console=console, transient=True) as progress:
        update = functools.partial(progress.update, progress.add_task("", visible=False))
        yield Bar(update, functools.partial(_say, console))


def _say(console: Console, line: str) -> None:
    with contextlib.suppress(OSError):  # as in `complain`
        console.print(Text(f"gguf-fuse: {one_line(line)}"), soft_wrap=True)
