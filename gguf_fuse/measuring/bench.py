"""What fusing and splitting gain: projections and decode, timed -> rows.

Axis names are those of `attention`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from gguf_fuse.measuring.gain import Gain, Spread, gain, spread
from gguf_fuse.measuring.timing import Times, Ways, interleaved
from gguf_fuse.models.names import attention_layers
from gguf_fuse.models.spec import read_spec

STREAM_BYTES = 4 << 20  # one call reads so much: more or less was slower, measured on two machines


@dataclass(frozen=True, slots=True)
class Extent:
    """The sizes that are timed, and how many seconds the projections and the decodes may take."""

    n_tokens: tuple[int, ...]
    n_kv: tuple[int, ...]
    projection_s: float
    decode_s: float


FULL = Extent((1, 8, 64, 512), tuple(512 << doubling for doubling in range(8)), 11, 40)
QUICK = Extent((1, 64), (512, 4096, 16384), 3, 12)


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
class Row:
    """What one size took. size: tokens of a projection, or cells that one token attends to.

    Ways of a projection: separate, fused; of decode: expand, broadcast, split, and stream, which is
    K and V merely read once, the roofline.
    """

    size: int
    ms: Times

    def spread(self, way: str) -> Spread:
        return spread(self.ms[way])

    def gain(self, before: str, after: str) -> Gain:
        return gain(self.ms[before], self.ms[after])


@dataclass(frozen=True, slots=True)
class Bench:
    """What is timed: one attention layer, whose shape is from `source`; the data are random."""

    source: str
    shape: Shape
    threads: int
    extent: Extent
    too_large: tuple[int, ...]  # values of n_kv that the free memory forbids; not in `extent`

    def projection(self) -> Iterator[Row]:
        """Each row as soon as it is done; large sizes are left out where time runs short."""
        weight = _random(sum(self.shape.rows), self.shape.n_embd)  # [q + k + v rows, n_embd]
        ways = functools.partial(_projection_ways, self, weight)
        return self._rows(self.extent.n_tokens, ways, self.extent.projection_s)

    def decode(self) -> Iterator[Row]:
        """Each row as soon as it is done; large sizes are left out where time runs short."""
        ways = functools.partial(_decode_ways, self)
        return self._rows(self.extent.n_kv, ways, self.extent.decode_s)

    def _rows(
        self, sizes: Sequence[int], ways: Callable[[int], Ways], seconds: float
    ) -> Iterator[Row]:
        """The time is shared by the roots of the sizes: long ones get more of it for fewer rounds,
        and what the short ones leave.
        """
        ends, a_round = time.perf_counter() + seconds, 0.0  # a_round: seconds for each unit of size
        for at, size in enumerate(sizes):
            left = ends - time.perf_counter()
            if at and a_round * size > left:
                return
            share = size**0.5 / sum(each**0.5 for each in sizes[at:])
            with blas_threads(self.threads):
                ms = interleaved(ways(size), left * share)
            a_round = sum(times[-1] for times in ms.values()) / 1e3 / size
            yield Row(size, ms)


def prepare(
    model: Path | None = None, *, threads: int = COMPUTE_THREADS, extent: Extent = FULL
) -> Bench:
    """A benchmark of the shape that `model` has, or of DEFAULT_SHAPE.

    Raises GGUFError where the model has no layer whose attention is modelled.
    """
    source, shape = "default shape", DEFAULT_SHAPE
    if model is not None:
        source, shape = shape_of(read_model(model))
    free = free_bytes()
    too_large = tuple(n_kv for n_kv in extent.n_kv if _decode_bytes(shape, n_kv) > free)
    fitting = tuple(n_kv for n_kv in extent.n_kv if n_kv not in too_large)
    return Bench(source, shape, threads, replace(extent, n_kv=fitting), too_large)


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


def _projection_ways(bench: Bench, weight: Floats, n_tokens: int) -> Ways:
    """Both ways read the same bytes; as three weights they are views of the one."""
    x, rows = _random(1, n_tokens, bench.shape.n_embd), bench.shape.rows  # [1, n_tokens, n_embd]
    separate = tuple(Linear(part.T) for part in split_rows(weight.T, rows))
    return {
        "separate": functools.partial(Projections(rows, separate).project, x),
        "fused": functools.partial(Projections(rows, (Linear(weight),)).project, x),
    }


def _decode_ways(bench: Bench, n_kv: int) -> Ways:
    shape, threads = bench.shape, bench.threads
    q = _random(1, shape.n_head, 1, shape.head_dim)  # [1, n_head, 1, head_dim]
    k = _random(1, shape.n_head_kv, n_kv, shape.head_dim)  # [1, n_head_kv, n_kv, head_dim]
    v = _random(1, shape.n_head_kv, n_kv, shape.head_dim_v)  # [1, n_head_kv, n_kv, head_dim_v]
    call = (q, k, v, None, AttentionParams(scale=shape.head_dim**-0.5))
    return {
        "expand": functools.partial(attend.expanded_attention, *call),
        "broadcast": functools.partial(attend.broadcast_attention, *call),
        "split": functools.partial(split.split_attention, *call, n_threads=threads),
        "stream": functools.partial(stream, (k, v), threads),
    }


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


def _random(*shape: int) -> Floats:
    """Numbers that repeat after a million: to draw them all would take longer than to time them."""
    drawn = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32)  # flat
    return np.resize(drawn, shape)
