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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gguf.constants import GGUFValueType

from gguf_fuse.fusion import PADDING_KEY, Plan
from gguf_fuse.gguf_file import TensorInfo, align, encode_header, encode_pair


@dataclass(frozen=True, slots=True)
class Copy:
    """A range of bytes of the source and where it goes; starts count from the files' starts."""

    source: int
    target: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The whole new file: the header's bytes, then data in rising order, zeros between.

    clones: ranges that the file system can share with the source. copies: the rest.
    """

    header: bytes
    copies: tuple[Copy, ...]
    clones: tuple[Copy, ...]
    n_bytes: int

    @property
    def n_copied(self) -> int:
        return sum(copy.n_bytes for copy in self.copies)

    @property
    def n_cloned(self) -> int:
        return sum(clone.n_bytes for clone in self.clones)


def place(plan: Plan, clone_block: int | None = None) -> Placement:
    """Give every tensor its offset: the running sum of sizes, each padded to the alignment.

    clone_block: the size of the blocks that source and target can share; None: they cannot.
    """
    infos, end = _offsets(plan)
    copies = _merged(_moves(plan, infos))  # targets count from the start of the data
    header = _header(plan, infos, None)
    if clone_block and plan.may_pad:
        wanted = _best_start(copies, clone_block)
        header = _padded_header(plan, infos, wanted, clone_block)
    moved = [Copy(copy.source, len(header) + copy.target, copy.n_bytes) for copy in copies]
    n_bytes = len(header) + end
    if not clone_block:
        return Placement(header, tuple(moved), (), n_bytes)
    clones = [clone for copy in moved for clone in _interior(copy, clone_block)]
    edges = [edge for copy in moved for edge in _edges(copy, clone_block)]
    return Placement(header, tuple(edges), tuple(clones), n_bytes)


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
            yield Copy(segment.start, target, segment.n_bytes)
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


def _header(plan: Plan, infos: Iterable[TensorInfo], n_padding: int | None) -> bytes:
    pairs = [plan.metadata_bytes]
    if n_padding is not None:
        zeros = [0] * n_padding
        pairs.append(encode_pair(PADDING_KEY, GGUFValueType.UINT8, zeros, plan.byte_order))
    metadata = (plan.n_metadata + len(pairs) - 1, b"".join(pairs))
    return encode_header(plan.version, plan.byte_order, plan.alignment, metadata, infos)


def _padded_header(plan: Plan, infos: list[TensorInfo], wanted: int, block: int) -> bytes:
    """A header whose length is `wanted` modulo the block."""
    unpadded = _header(plan, infos, None)
    if len(unpadded) % block == wanted:
        return unpadded
    least = len(_header(plan, infos, 0))
    return _header(plan, infos, (wanted - least) % block)


def _best_start(copies: Iterable[Copy], block: int) -> int:
    """The start of the data, modulo the block, that lets the most bytes be cloned."""
    gain: Counter[int] = Counter()
    for copy in copies:
        start = (copy.source - copy.target) % block
        moved = Copy(copy.source, start + copy.target, copy.n_bytes)
        gain[start] += sum(clone.n_bytes for clone in _interior(moved, block))
    return max(gain, key=lambda start: gain[start], default=0)


# -- cloning ------------------------------------------------------------------------------------


def _interior(copy: Copy, block: int) -> list[Copy]:
    """The whole blocks of a range, if its source and its target lie alike."""
    if (copy.source - copy.target) % block:
        return []
    first = align(copy.source, block)
    last = (copy.source + copy.n_bytes) // block * block
    if first >= last:
        return []
    return [Copy(first, copy.target + first - copy.source, last - first)]


def _edges(copy: Copy, block: int) -> list[Copy]:
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
