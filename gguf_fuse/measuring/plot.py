"""The decode rows of a benchmark as a picture. matplotlib is optional, so it is imported late."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from gguf_fuse.format.source import GGUFError
from gguf_fuse.machine import processor
from gguf_fuse.measuring.bench import Bench, Row

# By way: its label, line, marker and colour; in grey, too, they can be told apart.
STYLES = {
    "expand": ("K and V expanded", "-", "s", "#b35806"),
    "broadcast": ("broadcast", "-.", "^", "#7b3294"),
    "split": ("split over KV", "-", "o", "#000000"),
    "stream": ("K and V merely read", ":", "", "#666666"),
}
TITLE = "Attention of one token, by three ways, against merely reading K and V"
REMARK = "\n* too few rounds, or reading was noisy, or took longer than a way to compute"
LINE = 0.06  # between two labels, of the height of the axes


def check_plot(path: Path) -> None:
    """Raises GGUFError where `plot` would, so that nobody waits for a benchmark in vain."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise GGUFError(f"{path}: the name must end in .png or .svg")
    if not path.parent.is_dir():
        raise GGUFError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise GGUFError(f"{path}: is a folder; --plot wants the name of a file")
    if importlib.util.find_spec("matplotlib") is None:
        raise GGUFError(
            "--plot needs matplotlib, which is not installed: pip install 'gguf-fuse[plot]'"
        )


def plot(layer: Bench, rows: Sequence[Row], path: Path) -> None:
    """Time per token over the context, as PNG or SVG by the name's ending.

    Lines are medians, bands the middle half of the rounds. Raises GGUFError as `check_plot` does,
    or where the file cannot be written.
    """
    check_plot(path)
    if not rows:
        raise GGUFError(f"{path}: nothing to draw: memory was too small for every n_kv")
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(TITLE, loc="left", weight="bold", pad=36)
    axes.text(0, 1.02, _conditions(layer, rows), transform=axes.transAxes, color="#444444")
    axes.set(xscale="log", yscale="log", ylabel="time for one layer")
    n_kv, ends, times = [row.size for row in rows], [], []
    for way, (_, line, marker, colour) in STYLES.items():
        spreads = [row.spread(way) for row in rows]
        medians = [each.median for each in spreads]
        axes.plot(n_kv, medians, line, marker=marker, color=colour)
        low, high = [each.low for each in spreads], [each.high for each in spreads]
        axes.fill_between(n_kv, low, high, color=colour, alpha=0.2, linewidth=0)
        ends.append(math.log10(medians[-1]))
        times += low + high
    axes.set_xticks(n_kv, [_cells(row.size) + "*" * _doubtful(row) for row in rows])
    axes.set_xlabel("cells of the KV cache" + REMARK * any(map(_doubtful, rows)))
    bottom, top = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    decades = [10.0**power for power in range(bottom, top + 1)]
    axes.set_yticks(decades, [f"{ms:g} ms" for ms in decades])
    axes.set_ylim(decades[0], decades[-1])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    heights = apart([(end - bottom) / (top - bottom) for end in ends])
    for (label, _, _, colour), at in zip(STYLES.values(), heights, strict=True):
        axes.text(1.01, at, label, transform=axes.transAxes, color=colour, va="center")
    try:
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
            figure.savefig(path, dpi=200)
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error


def apart(heights: Sequence[float]) -> list[float]:
    """The same, moved up where two labels would lie over each other."""
    moved, lowest = list(heights), float("-inf")
    for at in sorted(range(len(heights)), key=heights.__getitem__):
        moved[at] = lowest = max(heights[at], lowest + LINE)
    return moved


def _conditions(layer: Bench, rows: Sequence[Row]) -> str:
    shape, rounds = layer.shape, sorted({row.spread("split").n for row in rows})
    counted = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return (
        f"{shape.n_head} heads, {shape.n_head_kv} KV heads, {shape.head_dim} wide; {processor()}, "
        f"threads: {layer.threads}\nmedians of {counted} rounds in turn, with their middle half"
    )


def _cells(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _doubtful(row: Row) -> bool:
    """Nothing is faster than reading: where it seems to be, the machine was busy."""
    reading = row.spread("stream")
    return reading.noisy or reading.median > min(row.spread(way).median for way in STYLES)
