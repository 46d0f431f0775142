"""What fusing and splitting gain: projections and decode, timed -> rows. Prints nothing.

All ways of one row take turns, so that a busy moment of the machine meets each of them, and the
median counts. Axis names are those of `attention`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_fuse import attention
from gguf_fuse.attention import DEFAULT_THREADS, AttentionParams, Floats, Linear, blas_threads
from gguf_fuse.format.header import Header
from gguf_fuse.format.shards import read_model
from gguf_fuse.format.source import GGUFError
from gguf_fuse.machine import free_bytes
from gguf_fuse.measuring.timing import interleaved
from gguf_fuse.models.names import attention_layers
from gguf_fuse.models.spec import read_spec
from gguf_fuse.progress import OnProgress, OnStart, ignore_progress, ignore_start

N_TOKENS = (1, 8, 64, 512)
N_KV = tuple(512 << doubling for doubling in range(8))  # 512 to 65536

STREAM_BYTES = 4 << 20  # one call reads so much: more or less was slower, measured on two machines


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one attention layer, in elements. rows: of Q, K and V, which may hold a gate."""

    n_embd: int = 4096
    n_head: int = 32
    n_head_kv: int = 8
    head_dim: int = 128
    head_dim_v: int = 128
    rows: tuple[int, int, int] = (4096, 1024, 1024)


DEFAULT_SHAPE = Shape()


@dataclass(frozen=True, slots=True)
class ProjectionRow:
    n_tokens: int
    separate_ms: float
    fused_ms: float


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One query token over n_kv cells; stream_ms: K and V merely read once, the roofline."""

    n_kv: int
    expand_ms: float
    broadcast_ms: float
    split_ms: float
    stream_ms: float


@dataclass(frozen=True)
class Bench:
    """source: where the shape is from. left_out: values of n_kv that the free memory forbids."""

    source: str
    shape: Shape
    threads: int
    projection: tuple[ProjectionRow, ...]
    decode: tuple[DecodeRow, ...]
    left_out: tuple[int, ...]


def bench(
    model: Path | None = None,
    *,
    n_tokens: Sequence[int] | None = None,
    n_kv: Sequence[int] | None = None,
    threads: int = DEFAULT_THREADS,
    seed: int = 0,
    on_start: OnStart = ignore_start,
    on_progress: OnProgress = ignore_progress,
) -> Bench:
    """Time one attention layer of the shape that `model` has, or of DEFAULT_SHAPE; data are random.

    n_tokens, n_kv: the rows; None is N_TOKENS and N_KV.

    Raises GGUFError where the model has no layer whose attention is modelled.
    """
    n_tokens, n_kv = n_tokens or N_TOKENS, n_kv or N_KV
    source, shape = (
        ("default shape", DEFAULT_SHAPE) if model is None else shape_of(read_model(model))
    )
    random = np.random.default_rng(seed)
    fitting = [length for length in n_kv if _decode_bytes(shape, length) <= free_bytes()]
    projection, decode = [], []
    with blas_threads(threads):
        on_start("projections", len(n_tokens))
        weight = _random(random, sum(shape.rows), shape.n_embd)  # [q + k + v rows, n_embd]
        for count in n_tokens:
            projection.append(_bench_projection(shape, weight, count, random))
            on_progress(1)
        del weight
        on_start("decode", len(fitting))
        for length in fitting:
            decode.append(_bench_decode(shape, length, threads, random))
            on_progress(1)
    left_out = tuple(length for length in n_kv if length not in fitting)
    return Bench(source, shape, threads, tuple(projection), tuple(decode), left_out)


def shape_of(header: Header) -> tuple[str, Shape]:
    """Of the first attention layer that can be computed, and a name for it. Raises GGUFError."""
    refusal: GGUFError | None = None
    for name in attention_layers(header.tensors):
        try:
            spec = read_spec(header, name)
        except GGUFError as error:
            refusal = refusal or error
            continue
        sizes = (spec.n_embd, spec.n_head, spec.n_head_kv, spec.head_dim, spec.head_dim_v)
        return f"{header.path}, {name}", Shape(*sizes, spec.rows)
    raise refusal or GGUFError(
        f"{header.path}: no layer has Q, K and V, whose shapes bench could take; without MODEL it "
        "has its own"
    )


# -- projections --------------------------------------------------------------------------------


def _bench_projection(
    shape: Shape, weight: Floats, n_tokens: int, random: np.random.Generator
) -> ProjectionRow:
    """Both ways read the same bytes; as three weights they are views of the one."""
    x = _random(random, 1, n_tokens, shape.n_embd)  # [1, n_tokens, n_embd]
    at_k, at_v = shape.rows[0], shape.rows[0] + shape.rows[1]
    q, k, v = (Linear(part) for part in (weight[:at_k], weight[at_k:at_v], weight[at_v:]))
    ms = interleaved(
        {
            "separate": functools.partial(attention.project_separate, x, q, k, v),
            "fused": functools.partial(attention.project_fused, x, Linear(weight), shape.rows),
        }
    )
    return ProjectionRow(n_tokens, ms["separate"], ms["fused"])


# -- decode -------------------------------------------------------------------------------------


def _bench_decode(shape: Shape, n_kv: int, threads: int, random: np.random.Generator) -> DecodeRow:
    q = _random(random, 1, shape.n_head, 1, shape.head_dim)  # [1, n_head, 1, head_dim]
    k = _random(random, 1, shape.n_head_kv, n_kv, shape.head_dim)  # [1, n_head_kv, n_kv, head_dim]
    v = _random(random, 1, shape.n_head_kv, n_kv, shape.head_dim_v)  # [..., n_kv, head_dim_v]
    params = AttentionParams(scale=shape.head_dim**-0.5)
    split = functools.partial(attention.split_attention, n_threads=threads)
    ways: dict[str, Callable[[], object]] = {
        name: functools.partial(way, q, k, v, None, params)
        for name, way in (
            ("expand", attention.expanded_attention),
            ("broadcast", attention.broadcast_attention),
            ("split", split),
        )
    }
    ways["stream"] = functools.partial(stream, (k, v), threads)
    ms = interleaved(ways)
    return DecodeRow(n_kv, ms["expand"], ms["broadcast"], ms["split"], ms["stream"])


def stream(arrays: Sequence[Floats], threads: int) -> None:
    """Read every element once, as fast as numpy can: a dot product with itself, on one core each.

    Of sum, max, bitwise or, count_nonzero, GEMV and dot, dot was the fastest.
    """
    step = STREAM_BYTES // arrays[0].itemsize
    flat = [array.reshape(-1) for array in arrays]
    parts = iter([part[at : at + step] for part in flat for at in range(0, len(part), step)])

    def work() -> None:
        for part in parts:  # a list's iterator: next() is atomic
            np.dot(part, part)

    attention.run_on_threads(work, threads)


def _decode_bytes(shape: Shape, n_kv: int) -> int:
    """K and V as they are and copied out to all heads, and scores."""
    group = shape.n_head // shape.n_head_kv
    cell = shape.n_head_kv * (shape.head_dim + shape.head_dim_v)
    return 4 * n_kv * (cell * (1 + group) + 2 * shape.n_head)


def _random(random: np.random.Generator, *shape: int) -> Floats:
    return random.standard_normal(shape, dtype=np.float32)


# -- plot ---------------------------------------------------------------------------------------


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
    n_kv = [row.n_kv for row in result.decode]
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
        title=f"{_heads(result.shape)}, threads: {result.threads}",
    )
    axes.set_xticks(n_kv, [str(length) for length in n_kv])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error


def _heads(shape: Shape) -> str:
    return f"{shape.n_head} heads, {shape.n_head_kv} KV heads, {shape.head_dim} wide"
