"""Gains as a picture: a point and its interval for each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gguf_fuse.format.source import GGUFError
from gguf_fuse.llama.bench import GRAPH_OPT
from gguf_fuse.llama.compare import Row
from gguf_fuse.measuring.plot import check_plot

__all__ = ["check_plot", "plot"]

_COLOURS = {"faster": "#1b7837", "slower": "#b2182b"}


def plot(rows: Sequence[Row], device: str, path: Path) -> None:
    """As PNG or SVG by the name's ending. Raises GGUFError where the file cannot be written."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.6 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row.test}\n{GRAPH_OPT}=1" if row.graph_opt else str(row.test) for row in rows]
    for at, row in enumerate(rows):
        low, gain, high = (_percent(x) for x in (row.gain.low, row.gain.ratio, row.gain.high))
        colour = _COLOURS.get(row.gain.word, "#777777")
        axes.plot([low, high], [at, at], color=colour, linewidth=2)
        axes.plot(gain, at, "o", color=colour)
        words = f"{gain:+.1f} %" if row.gain.seen else row.gain.word
        axes.annotate(words, (max(high, gain), at), (8, 0), textcoords="offset points", va="center")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.25)
    axes.set_xlabel("gain of fusing, tokens per second (%), with its 95 % interval")
    axes.set_title(f"Fused against separate in llama.cpp\n{device}", fontsize="medium", loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    try:
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            figure.savefig(path, dpi=200)
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)
