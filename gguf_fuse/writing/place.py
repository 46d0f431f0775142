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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from gguf_fuse.format.header import align, encode_start, encode_tensor
from gguf_fuse.format.source import Segment, Source
from gguf_fuse.format.values import ValueType, encode_pair
from gguf_fuse.planning.plan import Computed, Plan, PlannedTensor
from gguf_fuse.planning.record import PADDING_KEY

MAX_PADDING = 1 << 20  # of larger blocks, what would be saved is not worth the header


class Copy(NamedTuple):
    """A range of bytes of a source and where it goes; both count from the files' starts."""

    source: Source
    start: int
    target: int
    n_bytes: int

    @property
    def ends(self) -> tuple[int, int]:
        """In the source, and in the new file."""
        return self.start + self.n_bytes, self.target + self.n_bytes

    def part(self, at: int, n_bytes: int) -> Copy:
        """n_bytes of it; `at` counts from its own start."""
        return Copy(self.source, self.start + at, self.target + at, n_bytes)

    def moved(self, by: int) -> Copy:
        return self._replace(target=self.target + by)


@dataclass(frozen=True, slots=True)
class Placement:
    """The whole new file; where nothing is said, there are zeros.

    literals: new bytes and where they go, in that order. copies: ranges of the source. clones:
    ranges that the file system can share with the source. data_start, n_bytes: of the new file.
    tensors: and where the data of each begins.
    """

    literals: tuple[tuple[int, bytes | Computed], ...]
    copies: tuple[Copy, ...]
    clones: tuple[Copy, ...]
    data_start: int
    n_bytes: int
    tensors: tuple[tuple[PlannedTensor, int], ...]

    @property
    def n_cloned(self) -> int:
        return sum(clone.n_bytes for clone in self.clones)


def place(plan: Plan, clone_block: int | None = None) -> Placement:
    """Give every tensor its offset: the running sum of sizes, each padded to the alignment.

    clone_block: the size of the blocks that source and target can share; None: they cannot.
    """
    offsets: list[int] = []
    computed: list[tuple[int, bytes | Computed]] = []
    moves: list[Copy] = []
    data_bytes = 0
    for tensor in plan.tensors:  # places count from the start of the data until that is known
        offsets.append(data_bytes)
        made, copies, end = _lay(tensor.segments, data_bytes)
        computed += made
        moves += copies
        data_bytes = align(end, plan.alignment)
    moves = _merged(moves)
    n_padding = None
    if clone_block and clone_block <= MAX_PADDING and plan.may_add_keys:
        start = _best_start(plan, moves, clone_block)
        n_padding = None if start is None else _padding(plan, offsets, start, clone_block)
    literals, header_copies, header_end = _lay(_header(plan, offsets, n_padding))
    data_start = align(header_end, plan.alignment)
    clones: list[Copy] = []
    edges: list[Copy] = []
    for copy in _merged([*header_copies, *(move.moved(data_start) for move in moves)]):
        inside, outside = _divided(copy, clone_block)
        clones += inside
        edges += outside
    literals += [(data_start + at, made) for at, made in computed]
    starts = (data_start + offset for offset in offsets)
    return Placement(
        tuple(literals),
        tuple(edges),
        tuple(clones),
        data_start,
        data_start + data_bytes,
        tuple(zip(plan.tensors, starts, strict=True)),
    )


def _merged(copies: Iterable[Copy]) -> list[Copy]:
    """Copies that go on in both files become one."""
    merged: list[Copy] = []
    for copy in copies:
        if merged and copy.source == merged[-1].source and copy[1:3] == merged[-1].ends:
            merged[-1] = merged[-1]._replace(n_bytes=merged[-1].n_bytes + copy.n_bytes)
        else:
            merged.append(copy)
    return merged


def _header(plan: Plan, offsets: Sequence[int], n_padding: int | None) -> list[Segment | bytes]:
    pairs = dict(plan.metadata)
    if n_padding is not None:
        padding = encode_pair(PADDING_KEY, ValueType.UINT8, bytes(n_padding), plan.byte_order)
        pairs[PADDING_KEY] = (padding,)
    start = encode_start(plan.version, plan.byte_order, len(plan.tensors), len(pairs))
    tensors = b"".join(
        encode_tensor(tensor.name, tensor.ne, tensor.type, offset, plan.byte_order)
        for tensor, offset in zip(plan.tensors, offsets, strict=True)
    )
    return [start, *chain.from_iterable(pairs.values()), tensors]


def _lay(
    pieces: Iterable[Segment | bytes | Computed], at: int = 0
) -> tuple[list[tuple[int, bytes | Computed]], list[Copy], int]:
    """Literals and copies, one after the other from `at` on, and where the last one ends."""
    literals: list[tuple[int, bytes | Computed]] = []
    copies: list[Copy] = []
    for piece in pieces:
        if isinstance(piece, Segment):
            copies.append(Copy(piece.source, piece.start, at, piece.n_bytes))
        else:
            literals.append((at, piece))
        at += len(piece) if isinstance(piece, bytes) else piece.n_bytes
    return literals, copies, at


def _padding(plan: Plan, offsets: Sequence[int], wanted: int, block: int) -> int | None:
    """How many zero bytes move the start of the data to `wanted` modulo the block."""
    if align(_lay(_header(plan, offsets, None))[2], plan.alignment) % block == wanted:
        return None
    return (wanted - _lay(_header(plan, offsets, 0))[2]) % max(block, plan.alignment)


def _best_start(plan: Plan, moves: Iterable[Copy], block: int) -> int | None:
    """The start of the data, modulo the block, that lets the most bytes be cloned, if any does."""
    gain: Counter[int] = Counter()
    for move in moves:
        start = (move.start - move.target) % block
        if start % min(plan.alignment, block) == 0:
            gain[start] += sum(clone.n_bytes for clone in _divided(move.moved(start), block)[0])
    return max(+gain, key=lambda start: gain[start], default=None)


def _divided(copy: Copy, block: int | None) -> tuple[list[Copy], list[Copy]]:
    """The whole blocks of a range, if its start and its target lie alike; and what is left."""
    if not block or (copy.start - copy.target) % block:
        return [], [copy]
    head = -copy.start % block
    end = head + (copy.n_bytes - head) // block * block
    if end <= head:
        return [], [copy]
    edges = copy.part(0, head), copy.part(end, copy.n_bytes - end)
    return [copy.part(head, end - head)], [edge for edge in edges if edge.n_bytes]
