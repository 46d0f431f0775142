"""Plan -> Placement: every byte of the new file gets its place. Pure, like the plan.

Where the file system can share blocks between files (reflink), a range can be cloned instead of
copied if it lies at the same position modulo the block in both files. Offsets within the data
are fixed by the format (the running sum of padded sizes); only the start of the data can move, by
a metadata key that is nothing but padding. So the padding is chosen that lets the most bytes be
cloned: a tensor whose size is no multiple of the block shifts everything behind it, and the ranges
that were shifted alike share one good padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gguf.constants import GGUFValueType

from gguf_fuse.format.header import (
    Segment,
    TensorInfo,
    align,
    encode_pair,
    encode_start,
    encode_tensors,
)
from gguf_fuse.planning.plan import KEY_PREFIX, Computed, Plan

PADDING_KEY = KEY_PREFIX + "padding"  # an array of zero bytes
MAX_PADDING = 1 << 20  # of larger blocks, what would be saved is not worth the header


@dataclass(frozen=True, slots=True)
class Copy:
    """A range of bytes of the source and where it goes; starts count from the files' starts."""

    source: int
    target: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The whole new file; where nothing is said, there are zeros.

    literals: new bytes and where they go, in that order. copies: ranges of the source. clones:
    ranges that the file system can share with the source. data_start, n_bytes: of the new file.
    """

    literals: tuple[tuple[int, bytes | Computed], ...]
    copies: tuple[Copy, ...]
    clones: tuple[Copy, ...]
    data_start: int
    n_bytes: int

    @property
    def n_cloned(self) -> int:
        return sum(clone.n_bytes for clone in self.clones)


def place(plan: Plan, clone_block: int | None = None) -> Placement:
    """Give every tensor its offset: the running sum of sizes, each padded to the alignment.

    clone_block: the size of the blocks that source and target can share; None: they cannot.
    """
    infos, data_bytes = _offsets(plan)
    moves = list(_moves(plan, infos))  # targets count from the start of the data
    n_padding = None
    if clone_block and clone_block <= MAX_PADDING and plan.may_pad:
        start = _best_start(plan, moves, clone_block)
        n_padding = None if start is None else _padding(plan, infos, start, clone_block)
    literals, header_copies, header_end = _lay(_header(plan, infos, n_padding))
    data_start = align(header_end, plan.alignment)
    data = [Copy(move.source, data_start + move.target, move.n_bytes) for move in moves]
    copies = _merged([*header_copies, *data])
    clones = [clone for copy in copies for clone in _interior(copy, clone_block)]
    edges = [edge for copy in copies for edge in _edges(copy, clone_block)]
    computed = [(data_start + at, piece) for at, piece in _computed(plan, infos)]
    return Placement(
        (*literals, *computed), tuple(edges), tuple(clones), data_start, data_start + data_bytes
    )


def _offsets(plan: Plan) -> tuple[list[TensorInfo], int]:
    infos, offset = [], 0
    for tensor in plan.tensors:
        infos.append(TensorInfo(tensor.name, tensor.ne, tensor.type, offset, tensor.n_bytes))
        offset = align(offset + tensor.n_bytes, plan.alignment)
    return infos, offset


def _moves(plan: Plan, infos: Iterable[TensorInfo]) -> Iterator[Copy]:
    for tensor, info in zip(plan.tensors, infos, strict=True):
        target = info.offset
        for segment in tensor.segments:
            if isinstance(segment, Segment):
                yield Copy(segment.start, target, segment.n_bytes)
            target += segment.n_bytes


def _computed(plan: Plan, infos: Iterable[TensorInfo]) -> Iterator[tuple[int, Computed]]:
    for tensor, info in zip(plan.tensors, infos, strict=True):
        target = info.offset
        for segment in tensor.segments:
            if isinstance(segment, Computed):
                yield target, segment
            target += segment.n_bytes


def _merged(copies: Iterable[Copy]) -> list[Copy]:
    """Copies that go on in both files become one."""
    merged: list[Copy] = []
    for copy in copies:
        last = merged[-1] if merged else Copy(0, 0, 0)
        if (last.source + last.n_bytes, last.target + last.n_bytes) == (copy.source, copy.target):
            merged[-1:] = [Copy(last.source, last.target, last.n_bytes + copy.n_bytes)]
        else:
            merged.append(copy)
    return merged


# -- the header ---------------------------------------------------------------------------------


def _header(
    plan: Plan, infos: Sequence[TensorInfo], n_padding: int | None
) -> list[Segment | bytes]:
    pairs = list(plan.metadata)
    if n_padding is not None:
        zeros = bytes(n_padding)
        pairs.append(encode_pair(PADDING_KEY, GGUFValueType.UINT8, zeros, plan.byte_order))
    n_pairs = plan.n_metadata + (n_padding is not None)
    start = encode_start(plan.version, plan.byte_order, len(infos), n_pairs)
    return [start, *pairs, encode_tensors(infos, plan.byte_order)]


def _lay(
    pieces: Iterable[Segment | bytes],
) -> tuple[list[tuple[int, bytes]], list[Copy], int]:
    """Literals and copies, one after the other, and where the last one ends."""
    literals: list[tuple[int, bytes]] = []
    copies: list[Copy] = []
    at = 0
    for piece in pieces:
        if isinstance(piece, bytes):
            literals.append((at, piece))
            at += len(piece)
        else:
            copies.append(Copy(piece.start, at, piece.n_bytes))
            at += piece.n_bytes
    return literals, copies, at


def _padding(plan: Plan, infos: Sequence[TensorInfo], wanted: int, block: int) -> int | None:
    """How many zero bytes move the start of the data to `wanted` modulo the block."""
    if align(_lay(_header(plan, infos, None))[2], plan.alignment) % block == wanted:
        return None
    return (wanted - _lay(_header(plan, infos, 0))[2]) % max(block, plan.alignment)


def _best_start(plan: Plan, moves: Iterable[Copy], block: int) -> int | None:
    """The start of the data, modulo the block, that lets the most bytes be cloned, if any does."""
    gain: Counter[int] = Counter()
    for move in _merged(moves):
        start = (move.source - move.target) % block
        if start % min(plan.alignment, block) == 0:
            moved = Copy(move.source, start + move.target, move.n_bytes)
            gain[start] += sum(clone.n_bytes for clone in _interior(moved, block))
    return max(+gain, key=lambda start: gain[start], default=None)


# -- cloning ------------------------------------------------------------------------------------


def _interior(copy: Copy, block: int | None) -> list[Copy]:
    """The whole blocks of a range, if its source and its target lie alike."""
    if not block or (copy.source - copy.target) % block:
        return []
    first = align(copy.source, block)
    last = (copy.source + copy.n_bytes) // block * block
    if first >= last:
        return []
    return [Copy(first, copy.target + first - copy.source, last - first)]


def _edges(copy: Copy, block: int | None) -> list[Copy]:
    """What `_interior` leaves of a range."""
    inside = _interior(copy, block)
    if not inside:
        return [copy]
    head = inside[0].source - copy.source
    tail_at = head + inside[0].n_bytes
    parts = [
        Copy(copy.source, copy.target, head),
        Copy(copy.source + tail_at, copy.target + tail_at, copy.n_bytes - tail_at),
    ]
    return [part for part in parts if part.n_bytes]
