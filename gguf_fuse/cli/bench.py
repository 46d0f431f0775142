"""The command bench."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.text import Text

from gguf_fuse.cli import console
from gguf_fuse.cli.console import gained, ms, text
from gguf_fuse.cli.options import AsJson, ComputeThreads, Quiet, existing_file
from gguf_fuse.cli.outcome import print_json
from gguf_fuse.machine import COMPUTE_THREADS, processor

if TYPE_CHECKING:
    from gguf_fuse.measuring.bench import Bench, Row
    from gguf_fuse.measuring.gain import Gain

_PROJECTION, _DECODE = ("separate", "fused"), ("expand", "broadcast", "split", "stream")
_SHORT = {"no difference seen": "none seen", "too few rounds": "too few"}
_WIDE = 80  # columns that the tables with spreads take


def bench(
    model: Annotated[
        Path | None,
        existing_file("[MODEL]", "Whose shapes to take; else 32 heads, 8 KV heads, 128 wide."),
    ] = None,
    threads: ComputeThreads = COMPUTE_THREADS,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer sizes, in 20 s instead of a minute.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png|.svg", help="Draw time per token over context."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time projections, separate and fused, and the ways to decode. Weights are random."""
    if quiet and not as_json and plot is None:
        raise typer.BadParameter("-q leaves nothing to show: add --json or --plot FILE")
    from gguf_fuse.measuring import bench as benchmark
    from gguf_fuse.measuring import plot as drawing

    if plot is not None:
        drawing.check_plot(plot)
    extent = benchmark.QUICK if quick else benchmark.FULL
    layer = benchmark.prepare(model, threads=threads, extent=extent)
    projection: list[Row] = []
    decode: list[Row] = []
    if as_json or quiet:
        with console.progress_bar(quiet) as bar:
            projection += _counted(bar, "projections", layer.extent.n_tokens, layer.projection())
            decode += _counted(bar, "decode", layer.extent.n_kv, layer.decode())
    else:
        console.print_parts(_parts(layer, projection, decode))
    if as_json:
        print_json(_json(layer, projection, decode))
    if plot is not None:
        drawing.plot(layer, decode, plot)  # last: if it fails, the numbers are not lost


def _counted(
    bar: console.Bar, what: str, sizes: Sequence[int], rows: Iterable[Row]
) -> Iterator[Row]:
    bar.start(what, len(sizes))
    for row in rows:
        yield row
        bar.advance(1)


def _parts(layer: Bench, projection: list[Row], decode: list[Row]) -> Iterator[Text]:
    """For people: each row is timed when it is asked for, and kept in its list."""
    from gguf_fuse.measuring.gain import MIN_ROUNDS, MIN_SAMPLES

    shape = layer.shape
    yield text(
        f"{layer.source}: n_embd {shape.n_embd}, {shape.n_head} heads, {shape.n_head_kv} KV heads, "
        f"{shape.head_dim} wide; {processor()}, threads: {layer.threads}"
    )
    yield text("medians in ms, ± half the width of the middle half of the rounds")
    yield text()
    yield from _lines(_projection_columns(), layer.projection(), projection)
    yield text(projection_verdict(projection))
    yield text()
    yield from _lines(_decode_columns(), layer.decode(), decode)
    yield text("vs expand, of reading: the speed of split; 100% is K and V merely read once")
    if min(len(times) for row in (*projection, *decode) for times in row.ms.values()) < MIN_ROUNDS:
        line = f"too few rounds fitted into the time to conclude: fewer than {MIN_ROUNDS}"
        yield text(f"{line}; ±?: fewer than {MIN_SAMPLES}", "yellow")
    readings = [row.spread("stream") for row in decode]
    if any(reading.noisy for reading in readings):
        yield text("noisy: reading itself varied by more than a fifth (±10%)", "yellow")
    yield from _left_out("free memory", "n_kv", layer.too_large)
    yield from _left_out("time", "n_tokens", _untimed(layer.extent.n_tokens, projection))
    yield from _left_out("time", "n_kv", _untimed(layer.extent.n_kv, decode))


def _untimed(sizes: Sequence[int], rows: Sequence[Row]) -> Sequence[int]:
    return sizes[len(rows) :]


def _left_out(lacking: str, what: str, sizes: Sequence[int]) -> Iterator[Text]:
    if sizes:
        listed = ", ".join(map(str, sizes))
        yield text(f"left out, not enough {lacking}: {what} {listed}", "yellow")


def _lines(columns: Sequence[_Column], rows: Iterable[Row], kept: list[Row]) -> Iterator[Text]:
    """A table whose widths are known beforehand, so that no row waits for the others."""
    yield text("  ".join(column.title.rjust(column.width) for column in columns), "bold")
    for row in rows:
        kept.append(row)
        yield text("  ".join(column.cell(row).rjust(column.width) for column in columns))


class _Column(NamedTuple):
    title: str
    width: int
    cell: Callable[[Row], str]


def _projection_columns() -> list[_Column]:
    if console.printer().width < _WIDE:
        return [
            _Column("tokens", 6, lambda row: str(row.size)),
            *(_Column(way, len(way), functools.partial(_median, way)) for way in _PROJECTION),
            _Column("gain", 9, lambda row: _short(row.gain(*_PROJECTION))),
        ]
    return [
        _Column("n_tokens", 8, lambda row: str(row.size)),
        *(_Column(way, 10, functools.partial(_spread, way)) for way in _PROJECTION),
        _Column("gain", 24, _percent),
        _Column("fused is", 18, lambda row: row.gain(*_PROJECTION).word),
    ]


def _decode_columns() -> list[_Column]:
    n_kv = _Column("n_kv", 5, lambda row: str(row.size))
    of_reading = _Column("of reading", 10, _of_reading)
    if console.printer().width < _WIDE:
        ways = ("expand", 6), ("split", 5)
        medians = [_Column(way, width, functools.partial(_median, way)) for way, width in ways]
        return [n_kv, *medians, of_reading]
    spreads = [
        _Column("K, V read" if way == "stream" else way, 11, functools.partial(_spread, way))
        for way in _DECODE
    ]
    return [n_kv, *spreads, _Column("vs expand", 9, _times_as_fast), of_reading]


def _median(way: str, row: Row) -> str:
    return ms(row.spread(way).median)


def _spread(way: str, row: Row) -> str:
    found = row.spread(way)
    half = "?" if found.few else f"{found.width / 2 / found.median:.0%}"
    return f"{ms(found.median)} ±{half}"


def _of_reading(row: Row) -> str:
    reading = row.spread("stream")
    return "noisy" if reading.noisy else f"{reading.median / row.spread('split').median:.0%}"


def _times_as_fast(row: Row) -> str:
    gain = row.gain("expand", "split")
    return _SHORT.get(gain.word, f"{gain.ratio:.1f} x")


def _percent(row: Row) -> str:
    return "?" if row.spread("fused").few else gained(row.gain(*_PROJECTION))


def _short(gain: Gain) -> str:
    return _SHORT.get(gain.word, f"{gain.ratio - 1:+.0%}")


def projection_verdict(rows: Sequence[Row]) -> str:
    """What the measurement says of fusing, and no more than that."""
    words = ("faster", "no difference seen", "slower", "too few rounds")
    found: dict[str, list[str]] = {word: [] for word in words}
    for row in rows:
        found[row.gain(*_PROJECTION).word].append(str(row.size))
    parts = [f"{word} at n_tokens {', '.join(sizes)}" for word, sizes in found.items() if sizes]
    return f"here, in numpy, fused is: {'; '.join(parts)}"


def _json(layer: Bench, projection: Sequence[Row], decode: Sequence[Row]) -> dict[str, Any]:
    return {
        "source": layer.source,
        "shape": asdict(layer.shape),
        "processor": processor(),
        "threads": layer.threads,
        "projection": [
            {"n_tokens": row.size} | _times(row) | {"gain": asdict(row.gain(*_PROJECTION))}
            for row in projection
        ],
        "decode": [
            {"n_kv": row.size}
            | _times(row)
            | {"gain": asdict(row.gain("expand", "split")), "noisy": row.spread("stream").noisy}
            for row in decode
        ],
        "left_out": [*_untimed(layer.extent.n_kv, decode), *layer.too_large],
    }


def _times(row: Row) -> dict[str, Any]:
    """How many rounds, and each way's median and quartiles."""
    spreads = {way: row.spread(way) for way in row.ms}
    rounds = {"rounds": min(each.n for each in spreads.values())}
    medians = {f"{way}_ms": each.median for way, each in spreads.items()}
    quartiles = {f"{way}_quartiles_ms": [each.low, each.high] for way, each in spreads.items()}
    return rounds | medians | quartiles
