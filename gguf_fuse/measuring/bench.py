"""What fusing and splitting gain: projections and decode, timed -> rows.

Axis names are those of `attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_fuse.attention import attend, split
from gguf_fuse.attention.projections import Linear, Projections, Rows, split_rows
from gguf_fuse.attention.shapes import Floats
from gguf_fuse.attention.softmax import AttentionParams
from gguf_fuse.attention.threads import blas_threads, run_on_threads
from gguf_fuse.format.header import Header
from gguf_fuse.format.shards import read_model
from gguf_fuse.format.source import GGUFError
from gguf_fuse.machine import COMPUTE_THREADS, free_bytes
from gguf_fuse.measuring.timing import interleaved
from gguf_fuse.models.names import attention_layers
from gguf_fuse.models.spec import read_spec
from gguf_fuse.progress import OnProgress, OnStart, ignore

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
    rows: Rows = (4096, 1024, 1024)


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
    threads: int = COMPUTE_THREADS,
    on_start: OnStart = ignore,
    on_progress: OnProgress = ignore,
) -> Bench:
    """Time one attention layer of the shape that `model` has, or of DEFAULT_SHAPE; data are random.

    Raises GGUFError where the model has no layer whose attention is modelled.
    """
    source, shape = "default shape", DEFAULT_SHAPE
    if model is not None:
        source, shape = shape_of(read_model(model))
    random = np.random.default_rng(0)
    fitting = [n_kv for n_kv in N_KV if _decode_bytes(shape, n_kv) <= free_bytes()]
    projection, decode = [], []
    with blas_threads(threads):
        on_start("projections", len(N_TOKENS))
        weight = _random(random, sum(shape.rows), shape.n_embd)  # [q + k + v rows, n_embd]
        for n_tokens in N_TOKENS:
            projection.append(_bench_projection(shape, weight, n_tokens, random))
            on_progress(1)
        del weight
        on_start("decode", len(fitting))
        for n_kv in fitting:
            decode.append(_bench_decode(shape, n_kv, threads, random))
            on_progress(1)
    left_out = tuple(n_kv for n_kv in N_KV if n_kv not in fitting)
    return Bench(source, shape, threads, tuple(projection), tuple(decode), left_out)


def shape_of(header: Header) -> tuple[str, Shape]:
    """Of the first attention layer that can be computed, and a name for it. Raises GGUFError."""
    refusal: GGUFError | None = None
    for layer in attention_layers(header.tensors):
        try:
            spec = read_spec(header, layer)
        except GGUFError as error:
            refusal = refusal or error
            continue
        sizes = (spec.n_embd, spec.n_head, spec.n_head_kv, spec.head_dim, spec.head_dim_v)
        return f"{header.path}, {layer}", Shape(*sizes, spec.rows)
    raise refusal or GGUFError(
        f"{header.path}: no layer has Q, K and V, whose shapes bench could take; without MODEL it "
        "has its own"
    )


def _bench_projection(
    shape: Shape, weight: Floats, n_tokens: int, random: np.random.Generator
) -> ProjectionRow:
    """Both ways read the same bytes; as three weights they are views of the one."""
    x = _random(random, 1, n_tokens, shape.n_embd)  # [1, n_tokens, n_embd]
    separate = tuple(Linear(part.T) for part in split_rows(weight.T, shape.rows))
    ms = interleaved(
        {
            "separate": functools.partial(Projections(shape.rows, separate).project, x),
            "fused": functools.partial(Projections(shape.rows, (Linear(weight),)).project, x),
        }
    )
    return ProjectionRow(n_tokens, ms["separate"], ms["fused"])


def _bench_decode(shape: Shape, n_kv: int, threads: int, random: np.random.Generator) -> DecodeRow:
    q = _random(random, 1, shape.n_head, 1, shape.head_dim)  # [1, n_head, 1, head_dim]
    k = _random(random, 1, shape.n_head_kv, n_kv, shape.head_dim)  # [1, n_head_kv, n_kv, head_dim]
    v = _random(random, 1, shape.n_head_kv, n_kv, shape.head_dim_v)  # [..., n_kv, head_dim_v]
    call = (q, k, v, None, AttentionParams(scale=shape.head_dim**-0.5))
    ms = interleaved(
        {
            "expand": functools.partial(attend.expanded_attention, *call),
            "broadcast": functools.partial(attend.broadcast_attention, *call),
            "split": functools.partial(split.split_attention, *call, n_threads=threads),
            "stream": functools.partial(stream, (k, v), threads),
        }
    )
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

    run_on_threads(work, threads)


def _decode_bytes(shape: Shape, n_kv: int) -> int:
    """K and V as they are and copied out to all heads, and scores."""
    group = shape.n_head // shape.n_head_kv
    cell = shape.n_head_kv * (shape.head_dim + shape.head_dim_v)
    return 4 * n_kv * (cell * (1 + group) + 2 * shape.n_head)


def _random(random: np.random.Generator, *shape: int) -> Floats:
    return random.standard_normal(shape, dtype=np.float32)
