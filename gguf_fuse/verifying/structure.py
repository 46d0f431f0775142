"""ORIGINAL and FUSED -> Structure: do they hold the same bytes?

Exact, and of all layers: a fused tensor is its parts end to end, and all else is the same.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.source import OpenSource, Segment, Source, opened
from gguf_fuse.format.types import type_name
from gguf_fuse.machine import COPY_THREADS
from gguf_fuse.planning.record import VERSION_KEY
from gguf_fuse.progress import OnProgress, OnStart, ignore
from gguf_fuse.verifying.fused import FORMS, FusedTensor, find_fused
from gguf_fuse.verifying.metadata import (
    compare_metadata,
    cutting_problems,
    order_problems,
    padding_problems,
    record_problems,
)

BLOCK_BYTES = 256 * 1024  # two of them stay in the L2 cache between reading and comparing


@dataclass(frozen=True)
class Structure:
    """Whether the two files hold the same bytes; each problem names its place."""

    problems: tuple[str, ...]
    n_fused: int  # attention layers that are fused in FUSED alone
    n_fused_experts: int  # layers whose experts are
    n_bytes: int  # compared, of one file
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes that must be equal, of a tensor or a metadata pair (its place).

    unit: "row", "element" of a tensor of one dimension, "byte" of a metadata pair.
    """

    place: str
    original: Segment
    fused: Segment
    unit: str
    unit_bytes: int

    @property
    def n_bytes(self) -> int:
        return self.original.n_bytes


def compare_structure(
    original: Header,
    fused: Header,
    *,
    threads: int = COPY_THREADS,
    on_start: OnStart = ignore,
    on_progress: OnProgress = ignore,
) -> Structure:
    """Every tensor and every metadata value of both files, byte for byte.

    What is fused, and where its rows must come from, follows from ORIGINAL's tensors alone: the
    record in FUSED's metadata is checked, not believed. Memory does not grow with the files.
    Raises GGUFError for a file that cannot be read, or that changes meanwhile.
    """
    started = time.perf_counter()
    made, problems = find_fused(original, fused)
    problems = _swap_problems(original, fused) + problems
    problems += _format_problems(original, fused)
    long_pairs, misfits = compare_metadata(original, fused)
    problems += misfits
    problems += record_problems(original, fused, made)
    problems += cutting_problems(original, fused)
    problems += padding_problems(original, fused)
    problems += _listing_problems(original, fused, made)
    ranges, misfits = _ranges(original, fused, made)
    problems += misfits
    pairs = [_Range(f"metadata {key}", *pair, "byte", 1) for key, pair in long_pairs.items()]
    ranges = [*pairs, *ranges]
    n_bytes = sum(part.n_bytes for part in ranges)
    on_start("comparing", n_bytes)
    problems += _compare_data(original, fused, ranges, threads, on_progress)
    n_fused, n_experts = (
        sum(tensor.name.endswith(f".{form}.weight") for tensor in made) for form, *_ in FORMS
    )
    return Structure(tuple(problems), n_fused, n_experts, n_bytes, time.perf_counter() - started)


def _swap_problems(original: Header, fused: Header) -> list[str]:
    if VERSION_KEY not in original.metadata or VERSION_KEY in fused.metadata:
        return []
    return ["the first file is the fused one, the second is not: ORIGINAL comes first"]


def _format_problems(original: Header, fused: Header) -> list[str]:
    facts = [
        ("version", original.version, fused.version),
        ("byte order", original.byte_order, fused.byte_order),
        ("alignment", original.alignment, fused.alignment),
    ]
    return [f"{what}: {a}, but {b} in the fused file" for what, a, b in facts if a != b]


def _listing_problems(original: Header, fused: Header, made: Sequence[FusedTensor]) -> list[str]:
    """Nothing missing, nothing extra, the order kept: a fused tensor stands where Q stood."""
    stands_for = {tensor.parts[0].name: tensor.name for tensor in made}
    absorbed = {part.name for tensor in made for part in tensor.parts[1:]}
    expected = [
        stands_for.get(tensor.name, tensor.name)
        for tensor in original.tensors
        if tensor.name not in absorbed
    ]
    present = [tensor.name for tensor in fused.tensors]
    wanted, there = set(expected), set(present)
    problems = [f"{name}: missing in the fused file" for name in expected if name not in there]
    problems += [f"{name}: only in the fused file" for name in present if name not in wanted]
    return problems + order_problems(
        "tensor",
        [name for name in expected if name in there],
        [name for name in present if name in wanted],
    )


def _ranges(
    original: Header, fused: Header, made: Sequence[FusedTensor]
) -> tuple[list[_Range], list[str]]:
    """What to compare, in the order of FUSED; a tensor of another shape or type is a problem."""
    before = {tensor.name: tensor for tensor in original.tensors}
    fused_from = {tensor.name: tensor for tensor in made}
    ranges: list[_Range] = []
    problems: list[str] = []
    for tensor in fused.tensors:
        source = fused_from.get(tensor.name)
        if source is None and tensor.name not in before:
            continue  # named as extra already
        parts = source.parts if source else (before[tensor.name],)
        ne = source.ne if source else parts[0].ne
        misfits = [
            f"{tensor.name}: {what} {has}, but {wanted} in the original's {part.name}"
            for part in parts
            for what, has, wanted in _facts(tensor, part, ne)
            if has != wanted
        ]
        if not misfits and not source:
            misfits = _room_problems(original, fused, parts[0], tensor)
        problems += misfits
        if not misfits:
            ranges += _tensor_ranges(tensor, parts, source)
    return ranges, problems


def _facts(
    tensor: TensorInfo, part: TensorInfo, ne: tuple[int, ...]
) -> list[tuple[str, object, object]]:
    return [
        ("type", type_name(tensor.type), type_name(part.type)),
        ("ne", list(tensor.ne), list(ne)),
    ]


def _room_problems(
    original: Header, fused: Header, before: TensorInfo, after: TensorInfo
) -> list[str]:
    """Of an unknown type, n_bytes is the room up to the next tensor, or to the end of the file.

    What one file has more of it than the other must be padding: zeros, and few.
    """
    longer = before if before.n_bytes > after.n_bytes else after
    shorter = min(before.n_bytes, after.n_bytes)
    surplus = longer.data.part(shorter, longer.n_bytes - shorter)
    most = max(original.alignment, fused.alignment)
    if surplus.n_bytes < most and not any(surplus.read()):
        return []
    return [f"{after.name}: {after.n_bytes} bytes, but {before.n_bytes} in the original"]


def _tensor_ranges(
    tensor: TensorInfo, parts: Sequence[TensorInfo], made: FusedTensor | None
) -> Iterator[_Range]:
    start = 0
    n_experts = made.n_experts if made else 1
    for expert, part in itertools.product(range(n_experts), parts):
        # They differ where the type is unknown, by padding: see `_room_problems`.
        n_bytes = min(part.n_bytes, tensor.n_bytes) // n_experts
        unit = "row" if len(part.ne) > 1 else "element"
        n_units = max(1, math.prod(part.ne[1:]) if len(part.ne) > 1 else math.prod(part.ne))
        place = tensor.name
        if part.name != tensor.name:
            place += f": {part.name.rsplit('.', 2)[-2]}"
        if made and made.n_outer and not made.shared:
            place += f" of expert {expert}"
        before = part.data.part(expert * n_bytes, n_bytes)
        after = tensor.data.part(start, n_bytes)
        yield _Range(place, before, after, unit, -(-n_bytes * n_experts // n_units))
        start += 0 if made and made.shared else n_bytes


def _compare_data(
    original: Header,
    fused: Header,
    ranges: Sequence[_Range],
    threads: int,
    on_progress: OnProgress,
) -> list[str]:
    """Threads take blocks in turn, each with two buffers of its own -> a problem per range."""
    blocks = ((at, start) for at, part in enumerate(ranges) for start in _starts(part))
    first: dict[int, int] = {}  # by range: the first byte that differs
    lock, stop = threading.Lock(), threading.Event()

    def work(files: Mapping[Source, OpenSource]) -> None:
        a, b = bytearray(BLOCK_BYTES), bytearray(BLOCK_BYTES)
        while not stop.is_set():
            with lock:
                at, start = next(blocks, (-1, 0))
            if at < 0:
                return
            part = ranges[at]
            n_bytes = min(BLOCK_BYTES, part.n_bytes - start)
            if start < first.get(at, part.n_bytes):
                for segment, buffer in ((part.original, a), (part.fused, b)):
                    view = memoryview(buffer)[:n_bytes]
                    files[segment.source].read_at(view, segment.start + start)
                differs = _first_difference(a, b, n_bytes)
                if differs is not None:
                    with lock:
                        first[at] = min(first.get(at, part.n_bytes), start + differs)
            on_progress(n_bytes)

    with _opened(original, fused) as files, ThreadPoolExecutor(threads) as pool:
        try:
            for future in as_completed([pool.submit(work, files) for _ in range(threads)]):
                future.result()
        except BaseException:
            stop.set()  # the pool waits for its threads: let them end at once
            raise
    return [_data_problem(original, fused, ranges[at], first[at]) for at in sorted(first)]


@contextlib.contextmanager
def _opened(original: Header, fused: Header) -> Iterator[Mapping[Source, OpenSource]]:
    """All files, the same from the reading of their headers to the end."""
    with opened([*original.sources, *fused.sources]) as files:
        yield files
        for file in files.values():
            file.refuse_changed()


def _starts(part: _Range) -> range:
    return range(0, part.n_bytes, BLOCK_BYTES)


def _first_difference(a: bytearray, b: bytearray, n_bytes: int) -> int | None:
    # == of two bytearrays is memcmp; of two memoryviews it goes element by element.
    if (a == b) if n_bytes == len(a) else (a[:n_bytes] == b[:n_bytes]):
        return None
    x, y = (np.frombuffer(data, np.uint8, n_bytes) for data in (a, b))
    return int(np.argmax(x != y))


def _data_problem(original: Header, fused: Header, part: _Range, at: int) -> str:
    return (
        f"{part.place} differs in {part.unit} {at // part.unit_bytes} "
        f"({_place(original, part.original, at)} of the original, "
        f"{_place(fused, part.fused, at)} of the fused file)"
    )


def _place(header: Header, segment: Segment, at: int) -> str:
    byte = f"byte {segment.start + at}"
    return f"{byte} of shard {header.sources.index(segment.source) + 1}" if header.shards else byte
