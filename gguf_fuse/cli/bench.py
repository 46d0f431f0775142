"""The command bench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from gguf_fuse.cli import console
from gguf_fuse.cli.console import ms, number, text
from gguf_fuse.cli.options import AsJson, ComputeThreads, Quiet, existing_file
from gguf_fuse.machine import COMPUTE_THREADS

if TYPE_CHECKING:
    from gguf_fuse.measuring.bench import Bench, DecodeRow, ProjectionRow

_NO_GAIN = 0.05  # a difference in time below this is noise


def bench(
    model: Annotated[
        Path | None,
        existing_file("[MODEL]", "Whose shapes to take; else 32 heads, 8 KV heads, 128 wide."),
    ] = None,
    threads: ComputeThreads = COMPUTE_THREADS,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png|.svg", help="Draw time per token over context."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Time projections, separate and fused, and the ways to decode. Weights are random."""
    from gguf_fuse.measuring import bench as benchmark
    from gguf_fuse.measuring import plot as drawing

    if plot is not None:
        drawing.check_plot(plot)
    with console.progress_bar(quiet) as bar:
        result = benchmark.bench(
            model, threads=threads, on_start=bar.start, on_progress=bar.advance
        )
    if as_json:
        console.print_json(asdict(result))
    elif not quiet:
        console.print_parts(_parts(result))
    if plot is not None:
        drawing.plot(result, plot)  # last: if it fails, the numbers are not lost


def _parts(result: Bench) -> Iterator[RenderableType]:
    shape = result.shape
    yield text(
        f"{result.source}: n_embd {shape.n_embd}, {shape.n_head} heads, {shape.n_head_kv} KV "
        f"heads, {shape.head_dim} wide; threads: {result.threads}; medians in ms",
    )
    yield text()
    rows = result.projection
    yield _table(
        {
            "n_tokens": [str(row.n_tokens) for row in rows],
            "separate": [ms(row.separate_ms) for row in rows],
            "fused": [ms(row.fused_ms) for row in rows],
            "gain": [f"{_gain(row):+.0%}" for row in rows],
        }
    )
    yield text(projection_verdict(rows))
    yield text()
    yield _decode_table(result.decode)
    yield text("of reading: the speed of split, where 100% is K and V merely read once")
    if result.left_out:
        left_out = ", ".join(map(str, result.left_out))
        yield text(f"left out, not enough free memory: n_kv {left_out}", "yellow")


def _decode_table(rows: Sequence[DecodeRow]) -> console.Fitting:
    wide = {
        "n_kv": [str(row.n_kv) for row in rows],
        "expand": [ms(row.expand_ms) for row in rows],
        "broadcast": [ms(row.broadcast_ms) for row in rows],
        "split": [ms(row.split_ms) for row in rows],
        "K, V\nread": [ms(row.stream_ms) for row in rows],
        "expand\n/ split": [f"{row.expand_ms / row.split_ms:.1f} x" for row in rows],
        "of\nreading": [f"{row.stream_ms / row.split_ms:.0%}" for row in rows],
    }
    narrow = {title: wide[title] for title in ("n_kv", "expand", "split", "of\nreading")}
    return console.Fitting(_table(wide), _table(narrow))


def _table(columns: dict[str, list[str]]) -> Table:
    return console.table(map(number, columns), zip(*columns.values(), strict=True))


def _gain(row: ProjectionRow) -> float:
    return row.separate_ms / row.fused_ms - 1


def projection_verdict(rows: Sequence[ProjectionRow]) -> str:
    """What the measurement says of fusing, and no more than that."""
    equal = f"gains nothing (within {_NO_GAIN:.0%})"
    found: dict[str, list[str]] = {"gains": [], equal: [], "costs": []}
    for row in rows:
        gain = _gain(row)
        verdict = "gains" if gain > _NO_GAIN else "costs" if gain < -_NO_GAIN else equal
        found[verdict].append(str(row.n_tokens))
    parts = [f"{what} at n_tokens {', '.join(counts)}" for what, counts in found.items() if counts]
    return f"here, in numpy, fusing {'; '.join(parts)}" if parts else ""
