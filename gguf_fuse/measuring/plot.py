"""The decode rows of a benchmark as a picture. matplotlib is optional, so it is imported late."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from gguf_fuse.format.source import GGUFError
from gguf_fuse.measuring.bench import Bench


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


def plot(result: Bench, path: Path) -> None:
    """Time per token over the context, as PNG or SVG by the name's ending.

    Raises GGUFError as `check_plot` does, or where the file cannot be written.
    """
    check_plot(path)
    if not result.decode:
        raise GGUFError(f"{path}: nothing to draw: memory was too small for every n_kv")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    n_kv, shape = [row.n_kv for row in result.decode], result.shape
    for name, label, style in (
        ("expand_ms", "K and V expanded to all heads", "s-"),
        ("broadcast_ms", "broadcast", "^-"),
        ("split_ms", "split over KV", "o-"),
        ("stream_ms", "K and V merely read once", "k--"),
    ):
        axes.plot(n_kv, [getattr(row, name) for row in result.decode], style, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="context (cells of the KV cache)",
        ylabel="attention of one layer, one token (ms)",
        title=f"{shape.n_head} heads, {shape.n_head_kv} KV heads, {shape.head_dim} wide, "
        f"threads: {result.threads}",
    )
    axes.set_xticks(n_kv, [str(length) for length in n_kv])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error
