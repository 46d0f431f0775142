"""The command compare."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Column
from rich.text import Text

from gguf_fuse import __version__
from gguf_fuse.cli import console
from gguf_fuse.cli.console import Fitting, number, table, text
from gguf_fuse.cli.options import AsJson, Quiet, existing_file
from gguf_fuse.cli.outcome import print_json

if TYPE_CHECKING:
    from gguf_fuse.llama.bench import Run, Settings, Way
    from gguf_fuse.llama.compare import Best, Row

_MOST = 1 << 24  # tokens: more is a slip of the keyboard
_STYLES = {"faster": "green", "slower": "red"}


def _counts(option: str, words: str) -> Any:
    return typer.Option(option, metavar="N[,N...]", help=f"{words}, as llama-bench's.")


def compare(
    original: Annotated[Path, existing_file("ORIGINAL", "The file before.")],
    fused: Annotated[Path, existing_file("FUSED", "The file after.")],
    extra: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- OPTIONS]", help="More options of llama-bench, such as -ngl 20."
        ),
    ] = None,
    n_prompt: Annotated[str, _counts("-p", "Tokens of a prompt, or of a small batch")] = "8,512",
    n_gen: Annotated[str, _counts("-n", "Tokens to generate")] = "128",
    n_depth: Annotated[str, _counts("-d", "Tokens that are in the cache before that")] = "0",
    rounds: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="Processes for each file; fewer than 9 conclude nothing."
        ),
    ] = 9,
    repetitions: Annotated[
        int, typer.Option("-r", min=1, max=1000, help="Samples of each process, after a first one.")
    ] = 3,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="Threads of the CPU.", show_default="llama.cpp's choice"),
    ] = None,
    llama_bench: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The program.", show_default="from PATH, or xllamacpp"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|.svg", help="Draw the gains.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a section for a model card.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time ORIGINAL and FUSED in llama.cpp, in turn, each time in a fresh process."""
    from gguf_fuse.format.shards import read_model
    from gguf_fuse.llama import bench
    from gguf_fuse.llama import plot as drawing

    counts = (_parsed("-p", n_prompt), _parsed("-n", n_gen), _parsed("-d", n_depth))
    settings = bench.Settings(*counts, repetitions, threads)
    if not settings.tests:
        raise typer.BadParameter("nothing to time: -p and -n are both 0")
    if extra and not extra[0].startswith("-"):
        raise typer.BadParameter(f"{extra[0]}: two files are compared; options of llama-bench: --")
    if as_json and markdown:
        raise typer.BadParameter("give --json or --markdown, not both")
    if quiet and plot is None and not (as_json or markdown):
        raise typer.BadParameter("-q leaves nothing to show: add --json or --plot FILE")
    if plot is not None:
        drawing.check_plot(plot)
    runner = bench.find_runner(llama_bench, extra or ())
    result = _Comparison(original, fused, settings, rounds, tuple(extra or ()))
    headers = read_model(original), read_model(fused)
    try:
        with console.progress_bar(quiet) as bar:
            turns = bench.take_turns(runner, *headers, settings, rounds, bar.start, bar.advance)
            for way, run in turns:
                result.runs.setdefault(way, []).append(run)
    except KeyboardInterrupt:
        if result.rounds_done:
            _show(result, as_json, markdown, quiet)
        raise KeyboardInterrupt(f"{result.rounds_done} of {rounds} rounds were done") from None
    _show(result, as_json, markdown, quiet)
    if plot is not None:
        # Last: if it fails, the numbers are not lost.
        drawing.plot(result.rows, result.device, plot)


@dataclass(frozen=True)
class _Comparison:
    """What was asked, and what is known so far."""

    original: Path
    fused: Path
    settings: Settings
    rounds: int
    extra: tuple[str, ...]
    runs: dict[Way, list[Run]] = field(default_factory=dict)

    @property
    def rounds_done(self) -> int:
        return min(map(len, self.runs.values())) if len(self.runs) > 1 else 0

    @property
    def _first(self) -> Run:
        return next(iter(self.runs.values()))[0]

    @property
    def device(self) -> str:
        """What computed, and by which llama.cpp."""
        return f"{self._first.backends}: {self._first.device}; {self._first.version}"

    @property
    def rows(self) -> list[Row]:
        from gguf_fuse.llama.compare import rows

        return rows(self.runs)

    @property
    def best(self) -> list[Best]:
        """Where there is more to choose from than the two files, and it can be told."""
        from gguf_fuse.llama.compare import best
        from gguf_fuse.measuring.gain import MIN_ROUNDS

        enough = len(self.runs) > 2 and self.rounds_done >= MIN_ROUNDS
        return best(self.runs) if enough else []

    @property
    def command(self) -> str:
        """That others can run, whatever their folders."""
        settings = self.settings
        lists = (settings.n_prompt, settings.n_gen, settings.n_depth)
        options = [",".join(map(str, counts)) for counts in lists]
        parts = ["gguf-fuse", "compare", self.original.name, self.fused.name, "-p", options[0]]
        parts += ["-n", options[1], "-d", options[2], "-r", str(settings.repetitions)]
        parts += ["--rounds", str(self.rounds)]
        parts += ["--threads", str(settings.threads)] if settings.threads else []
        return shlex.join([*parts, *(["--", *self.extra] if self.extra else [])])


def _parsed(option: str, counts: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(count) for count in counts.split(","))
    except ValueError:
        numbers = (-1,)
    if not all(0 <= n <= _MOST for n in numbers):
        raise typer.BadParameter(f"{counts!r}: write numbers of tokens as 8,512", param_hint=option)
    return numbers


def _show(result: _Comparison, as_json: bool, markdown: bool, quiet: bool) -> None:
    if as_json:
        print_json(_json(result))
    elif markdown:
        print("\n".join(_markdown(result)))
    elif not quiet:
        console.print_parts(_parts(result))


def _json(result: _Comparison) -> dict[str, Any]:
    run, runs = result._first, result.runs
    return {
        "original": str(result.original),
        "fused": str(result.fused),
        "command_line": result.command,
        "version": run.version,
        "backends": run.backends,
        "device": run.device,
        "rounds": result.rounds,
        "rounds_done": result.rounds_done,
        "rows": [asdict(row) | {"test": str(row.test)} for row in result.rows],
        "best": [
            {"test": str(one.test), "way": str(one.way), "equal": list(map(str, one.equal))}
            for one in result.best
        ],
        "samples": [
            {"way": str(way), "round": i, "test": str(test), "samples_ts": list(samples)}
            for way, done in runs.items()
            for i, run in enumerate(done, 1)
            for test, samples in run.speeds.items()
        ],
    }


def _parts(result: _Comparison) -> Iterator[RenderableType]:
    yield text(result.device)
    yield text()
    rows = [_cells(row) for row in result.rows]
    test, gain = Column("test", no_wrap=True), number("gain", no_wrap=True)
    interval = number("95 % interval", no_wrap=True)
    wide = table([test, number("separate"), number("fused"), gain, interval, ""], rows)
    narrow = table([test, gain, interval, ""], ([row[0], *row[3:]] for row in rows))
    yield Fitting(wide, narrow)
    yield text()
    yield from map(text, _remarks(result))


def _cells(row: Row) -> list[Text]:
    *cells, word = _words(row)
    return [*map(text, cells), text(word, _STYLES.get(word, "dim"))]


def _words(row: Row) -> list[str]:
    from gguf_fuse.llama.bench import GRAPH_OPT

    test = f"{row.test}, {GRAPH_OPT}=1" if row.graph_opt else str(row.test)
    gain = row.gain
    interval = f"{_percent(gain.low)} to {_percent(gain.high)}" if gain.low < gain.high else "-"
    return [
        test,
        _speed(row.separate),
        _speed(row.fused),
        _percent(gain.ratio),
        interval,
        gain.word,
    ]


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.1f}" if tokens_per_second < 1000 else f"{tokens_per_second:.0f}"


def _remarks(result: _Comparison) -> Iterator[str]:
    """What stands below the table."""
    from gguf_fuse.measuring.gain import MIN_ROUNDS

    done = f"{result.rounds_done} rounds" if result.rounds_done != 1 else "1 round"
    yield (
        f"Tokens per second: medians of {done} in turn, {result.settings.repetitions} samples of "
        "each process after a first one that is left out."
    )
    if result.rounds_done < MIN_ROUNDS:
        yield f"Too few rounds to conclude: give --rounds {MIN_ROUNDS} or more."
    elif any(not row.gain.seen for row in result.rows):
        yield (
            "No difference seen: the interval holds 0, or samples of the same file differ by more "
            "than the gain."
        )
    if result.best:
        yield f"Best: {'; '.join(map(_best, result.best))}."


def _best(one: Best) -> str:
    equal = f" (no difference seen to {', '.join(map(str, one.equal))})" if one.equal else ""
    return f"{one.way} at {one.test}{equal}"


def _markdown(result: _Comparison) -> Iterator[str]:
    yield f"## Speed in llama.cpp: `{result.fused.name}` against `{result.original.name}`"
    yield ""
    yield f"{result.device}; gguf-fuse {__version__}."
    yield ""
    yield f"    {result.command}"
    yield ""
    yield "| test | separate | fused | gain | 95 % interval | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    yield from (f"| {' | '.join(_words(row))} |" for row in result.rows)
    yield ""
    yield from _remarks(result)
