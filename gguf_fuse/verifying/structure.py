"""ORIGINAL and FUSED -> Structure: do they hold the same bytes?"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.layout import misplaced, nonzero_padding
from gguf_fuse.format.source import Segment, abort, in_turn, opened, pace
from gguf_fuse.format.types import type_name
from gguf_fuse.verifying.fused import FORMS, FusedTensor, OfHeads, find_fused
from gguf_fuse.verifying.metadata import compare_metadata, order_problems, own_problems
from gguf_fuse.verifying.report import Structure, VerifyOptions

BLOCK_BYTES = 256 * 1024  # two of them stay in the L2 cache between reading and comparing


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes that must be equal, of a tensor or a metadata pair (its place names the part too).

    unit: "row", "element" of a tensor of one dimension, "byte" of a metadata pair.
    """

    name: str
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
    options: VerifyOptions,
    meanwhile: Iterable[object] = (),
) -> Structure:
    """What `compare_contents` says; and FUSED must be laid out as llama.cpp wants it.

    meanwhile: what this thread goes through while others compare, where the files differ in nothing
    but data at most. Raises GGUFError as they do, and what `meanwhile` does.
    """
    faults = tuple(_layout_problems(fused))
    found = compare_contents(original, fused, options, () if faults else meanwhile)
    return replace(
        found,
        problems=(*found.problems, *faults),
        computable=found.computable and not faults,
        notes=tuple(f"the original: {fault}" for fault in misplaced(original)),
    )


def compare_contents(
    original: Header,
    fused: Header,
    options: VerifyOptions,
    meanwhile: Iterable[object] = (),
) -> Structure:
    """Every tensor and every metadata value of both files, byte for byte.

    What is fused, and where its rows must come from, follows from ORIGINAL's tensors alone: the
    record in FUSED's metadata is checked, not believed. Memory does not grow with the files.
    meanwhile: as in `compare_structure`. Raises GGUFError for a file that cannot be read, or that
    changes while it is.
    """
    started = time.perf_counter()
    made, unlike_fused = find_fused(original, fused)
    ranges, misfits = _ranges(original, fused, made)
    listing = [*_listing_problems(original, fused, made), *misfits]
    counts = _n_layers(made)
    if unrelated := _unrelated(original, fused, listing):
        return Structure((*unlike_fused, unrelated), *counts)
    long_pairs, unequal = compare_metadata(original, fused, made)
    ranges[:0] = [
        _Range(key, f"metadata {key}", *both, "byte", 1) for key, both in long_pairs.items()
    ]
    n_bytes = sum(part.n_bytes for part in ranges)
    problems = [
        *unlike_fused,
        *_format_problems(original, fused),
        *unequal,
        *own_problems(original, fused, made),
        *listing,
    ]
    options.on_start("comparing", n_bytes)
    steps = () if problems else meanwhile
    differing, ended = _compare_data(original, fused, ranges, options, steps)
    return Structure(
        (*problems, *_told(original, fused, differing)),
        *counts,
        n_bytes=n_bytes,
        computable=not problems,
        seconds=ended - started,
    )


def _n_layers(made: Sequence[FusedTensor]) -> tuple[int, int, int]:
    """Whose attention is fused, whose experts are fused or stacked, whose ssm_in is split."""
    kinds = [set[str](), set[str](), set[str]()]
    for tensor in made:
        layer, own, suffix = tensor.name.rsplit(".", 2)
        if suffix == "weight":
            at = 2 if isinstance(tensor, OfHeads) else int(own != FORMS[0][0])
            kinds[at].add(layer)
    attention, experts, ssm_in = map(len, kinds)
    return attention, experts, ssm_in


def _unrelated(original: Header, fused: Header, listing: Sequence[str]) -> str | None:
    """That these are no two files of one model, in one line instead of all that follows from it.

    listing: what differs in the lists of tensors; each line begins with a name.
    """
    a, b = original.architecture, fused.architecture
    if a != b:
        return f"two different models: architecture {a!r}, but {b!r} in the fused file"
    n = len({line.partition(": ")[0] for line in listing})
    n_tensors = max(len(original.tensors), len(fused.tensors))
    if not are_most(n, n_tensors):
        return None
    return (
        f"two different models: {n} of {n_tensors} tensors differ in name, type or shape; "
        f"{listing[0]}"
    )


def _told(original: Header, fused: Header, differing: Sequence[tuple[_Range, int]]) -> list[str]:
    """The same of the data: each range with its first byte that differs, or one line for all."""
    told = (_data_problem(original, fused, part, at) for part, at in differing)
    n, n_tensors = len({part.name for part, _ in differing}), len(fused.tensors)
    if not are_most(n, n_tensors):
        return list(told)
    return [f"two different models: {n} of {n_tensors} tensors hold other data; {next(told)}"]


def are_most(n: int, n_tensors: int) -> bool:
    """Of so many tensors; then they are not told one by one."""
    return n > max(n_tensors // 2, 6)


def _layout_problems(fused: Header) -> list[str]:
    problems = misplaced(fused)
    if not problems and (n_bytes := nonzero_padding(fused)):
        problems.append(f"{n_bytes} bytes of padding between the fused file's tensors are not zero")
    return problems


def _format_problems(original: Header, fused: Header) -> list[str]:
    facts = [
        ("version", original.version, fused.version),
        ("byte order", original.byte_order, fused.byte_order),
        ("alignment", original.alignment, fused.alignment),
    ]
    return [f"{what}: {a}, but {b} in the fused file" for what, a, b in facts if a != b]


def _listing_problems(original: Header, fused: Header, made: Sequence[FusedTensor]) -> list[str]:
    """Nothing missing, nothing extra, the order kept: a fused tensor stands where Q stood."""
    stand_for: dict[str, list[str]] = {}
    for tensor in made:
        stand_for.setdefault(tensor.parts[0].name, []).append(tensor.name)
    absorbed = {part.name for tensor in made for part in tensor.parts[1:]}
    left = [tensor.name for tensor in original.tensors if tensor.name not in absorbed]
    expected = [new for name in left for new in stand_for.get(name, [name])]
    present = [tensor.name for tensor in fused.tensors]
    wanted, there = set(expected), set(present)
    problems = [f"{name}: missing in the fused file" for name in expected if name not in there]
    problems += [f"{name}: only in the fused file" for name in present if name not in wanted]
    return problems + order_problems("tensor", expected, present)


def _ranges(
    original: Header, fused: Header, made: Sequence[FusedTensor]
) -> tuple[list[_Range], list[str]]:
    """What to compare, in the order of FUSED; a tensor of another shape or type is a problem."""
    # What is not fused must hold itself.
    wanted = {t.name: FusedTensor(t.name, (t,), shared=True, n_outer=0) for t in original.tensors}
    wanted |= {tensor.name: tensor for tensor in made}
    ranges: list[_Range] = []
    problems: list[str] = []
    for tensor in fused.tensors:
        source = wanted.get(tensor.name)
        if source is None:
            continue  # named as extra already
        misfits = [
            f"{tensor.name}: {what} {has}, but {needed} in the original's {part.name}"
            for part in source.parts
            for what, has, needed in (
                ("type", type_name(tensor.type), type_name(part.type)),
                ("ne", list(tensor.ne), list(source.ne)),
            )
            if has != needed
        ]
        if not misfits and source.parts[0].name == tensor.name:
            misfits = _room_problems(original, fused, source.parts[0], tensor)
        problems += misfits
        if not misfits:
            ranges += _tensor_ranges(tensor, source)
    return ranges, problems


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


def _tensor_ranges(tensor: TensorInfo, source: FusedTensor) -> Iterator[_Range]:
    start = 0
    for part, label, first, in_part in source.pieces():
        # They differ where the type is unknown, by padding: see `_room_problems`.
        n_bytes = min(in_part, tensor.n_bytes)
        unit = "row" if len(part.ne) > 1 else "element"
        n_units = max(1, math.prod(part.ne[1:] or part.ne))
        place = tensor.name if part.name == tensor.name else f"{tensor.name}: {label}"
        before, after = part.data.part(first, n_bytes), tensor.data.part(start, n_bytes)
        unit_bytes = -(-(n_bytes if in_part == part.n_bytes else part.n_bytes) // n_units)
        yield _Range(tensor.name, place, before, after, unit, unit_bytes)
        start += 0 if source.shared else n_bytes


def _compare_data(
    original: Header,
    fused: Header,
    ranges: Sequence[_Range],
    options: VerifyOptions,
    meanwhile: Iterable[object],
) -> tuple[list[tuple[_Range, int]], float]:
    """By threads with two buffers each -> the ranges that differ, and in which byte first; and when
    the last was compared, which may be before `meanwhile` ends.
    """
    first: dict[int, int] = {}  # by range: the first byte that differs
    lock, ended = threading.Lock(), time.perf_counter()
    sources = [*original.sources, *fused.sources]
    block_bytes, threads = pace(sources, BLOCK_BYTES, options.threads)

    def work(blocks: Iterator[tuple[int, int]]) -> None:
        nonlocal ended
        a, b = bytearray(block_bytes), bytearray(block_bytes)
        for at, start in blocks:
            part = ranges[at]
            n_bytes = min(block_bytes, part.n_bytes - start)
            if start < first.get(at, part.n_bytes):
                for segment, buffer in ((part.original, a), (part.fused, b)):
                    view = memoryview(buffer)[:n_bytes]
                    files[segment.source].read_at(view, segment.start + start)
                differs = _first_difference(a, b, n_bytes)
                if differs is not None:
                    with lock:
                        first[at] = min(first.get(at, part.n_bytes), start + differs)
            ended = time.perf_counter()
            options.on_progress(n_bytes)

    blocks = (
        (at, start)
        for at, part in enumerate(ranges)
        for start in range(0, part.n_bytes, block_bytes)
    )
    with opened(sources) as files:
        in_turn(blocks, threads, work, lambda: abort(files), meanwhile)
        for file in files.values():
            file.refuse_changed()
    return [(ranges[at], first[at]) for at in sorted(first)], ended


def _first_difference(a: bytearray, b: bytearray, n_bytes: int) -> int | None:
    # == of two bytearrays is memcmp; of two memoryviews it goes element by element.
    if (a == b) if n_bytes == len(a) else (a[:n_bytes] == b[:n_bytes]):
        return None
    equal, end = 0, n_bytes  # so many are equal; the first that is not comes before the end
    while end - equal > 1:
        middle = (equal + end) // 2
        equal, end = (middle, end) if a[equal:middle] == b[equal:middle] else (equal, middle)
    return equal


def _data_problem(original: Header, fused: Header, part: _Range, at: int) -> str:
    places = []
    for header, segment in ((original, part.original), (fused, part.fused)):
        shard = f" of shard {header.sources.index(segment.source) + 1}" if header.shards else ""
        places.append(f"byte {segment.start + at}{shard}")
    return (
        f"{part.place} differs in {part.unit} {at // part.unit_bytes} ({places[0]} of the "
        f"original, {places[1]} of the fused file)"
    )
