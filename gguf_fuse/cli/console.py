"""What all commands print with: the console, tables, one progress bar."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from gguf_fuse.cli.outcome import one_line
from gguf_fuse.progress import ignore

if TYPE_CHECKING:
    from gguf_fuse.measuring.gain import Gain


def print_warning(line: str) -> None:
    """On stderr, its beginning red."""
    shown = Text(line)
    shown.stylize("bold red", 0, line.index(":") + 1)
    printer(stderr=True).print(shown, highlight=False, soft_wrap=True)


def printer(*, stderr: bool = False) -> Console:
    """Into a pipe, lines are not cut to the width of a screen that is not there.

    No emoji: a file may be called :cat:.
    """
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else 10_000
    return Console(stderr=stderr, width=wide, emoji=False)


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
    say = ignore if quiet else functools.partial(_say, console)
    if quiet or not sys.stderr.isatty() or console.is_dumb_terminal:
        with told_of_waits(say):
            yield Bar(lambda **changes: None, say)
        return
    from rich import progress as rich

    def whole() -> Column:  # only the bar becomes shorter where there is little room
        return Column(no_wrap=True)

    of_steps = [rich.TaskProgressColumn(table_column=whole())]
    done = [rich.DownloadColumn(table_column=whole()), rich.TransferSpeedColumn(whole())]
    columns = [rich.TextColumn("{task.description}", table_column=whole()), rich.BarColumn()]
    columns += [*(done if of_bytes else of_steps), rich.TimeRemainingColumn(table_column=whole())]
    with rich.Progress(*columns, console=console, transient=True) as progress, told_of_waits(say):
        yield Bar(functools.partial(progress.update, progress.add_task("", visible=False)), say)


@contextlib.contextmanager
def told_of_waits(say: Callable[[str], None] | None = None) -> Iterator[None]:
    """What is fetched in the block tells where it waits for a server."""
    from gguf_fuse.fetching.place import waits

    waits.tell = say or functools.partial(_say, printer(stderr=True))
    try:
        yield
    finally:
        waits.tell = ignore


def _say(console: Console, line: str) -> None:
    with contextlib.suppress(OSError):  # as in `complain`
        console.print(Text(f"gguf-fuse: {one_line(line)}"), soft_wrap=True)
