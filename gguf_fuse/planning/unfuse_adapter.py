"""LoRA adapter that gguf-fuse fused -> Plan of the original one; see `lora` and `fuse_adapter`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.source import Segment
from gguf_fuse.format.types import TYPES, is_known, row_bytes
from gguf_fuse.format.values import ValueType
from gguf_fuse.models.dequantize import FLOATS, encode_floats
from gguf_fuse.planning import plan, record
from gguf_fuse.planning.fuse_adapter import examine
from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.lora import (
    A,
    B,
    Block,
    Pair,
    decoded,
    in_pieces,
    in_rows,
    is_scaled,
    place_blocks,
    read_pairs,
    rows_of,
)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One fused pair's record. ranks: 0 for a missing part.

    types, positions, stored: of the A's of Q, K and V, then of their B's.
    """

    name: str
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    types: tuple[int, ...]
    positions: tuple[int, ...]
    stored: tuple[int, ...]


def unfuse(header: Header, read: plan.Read) -> plan.Plan:
    """The plan of the adapter for the separate base: the original one.

    Raises Refused for an adapter that gguf-fuse did not fuse (its rows of Q, K and V are known to
    its base alone), GGUFError where the record does not fit, NothingToDo where nothing is fused.
    """
    recorded = []
    if record.exists(header):
        pairs, recorded = read_pairs(header), _recorded(header)
    elif any(layer.status is plan.Status.FUSED for layer in examine(header, any_architecture=True)):
        raise plan.Refused(
            f"{header.path}: gguf-fuse did not fuse this adapter, so it has no record of the rows "
            "of Q, K and V: it cannot be split for certain"
        )
    for fused in recorded:
        if fused.name not in pairs:
            record.damaged(header, f"{fused.name!r} is recorded, which the adapter does not have")
    restored: dict[str, list[record.Placed]] = {}
    changed = []
    for fused in recorded:
        pair, layer = pairs[fused.name], fused.name.removesuffix(f".{QKV.fused}.weight")
        restored[pair.a.name] = list(_restored(header, pair, fused, read))
        restored[pair.b.name] = []
        changed.append(plan.Layer(layer, plan.Status.FUSED, (pair.types,), fused.rows))
    nothing = f"the adapter changes no {QKV.fused}"
    return record.unfused_plan(header, restored, changed, (), nothing)


def _recorded(header: Header) -> list[_Recorded]:
    names = record.names(header)
    for name in names:
        if not name.endswith(f".{QKV.fused}.weight"):
            record.damaged(header, f"{name!r} is recorded, which is no {QKV.fused}")
    columns = [
        *(record.groups(header, key, len(names), 3) for key in (record.ROWS_KEY, record.RANKS_KEY)),
        *(record.groups(header, key, len(names), 6) for key in record.TENSOR_KEYS),
    ]
    return [_Recorded(*row) for row in zip(names, *columns, strict=True)]


def _restored(
    header: Header, pair: Pair, fused: _Recorded, read: plan.Read
) -> Iterator[record.Placed]:
    if sum(fused.rows) != pair.rows or min(fused.rows) < 1:
        record.damaged(
            header, f"{pair.b.name!r} has {pair.rows} rows, not {plan.listed(fused.rows)}"
        )
    if min(fused.ranks) < 0 or not 0 < sum(fused.ranks) <= pair.rank:
        record.damaged(
            header, f"{pair.a.name!r} has {pair.rank}, not {plan.listed(fused.ranks)} ranks"
        )
    originals = list(_originals(pair, fused, is_scaled(header)))
    for original in originals:
        _check(header, original)
    for original in originals:
        data = tuple(_data(header, original, read))
        tensor = plan.PlannedTensor(original.name, original.ne, original.type, data)
        yield original.position, tensor


@dataclass(frozen=True, slots=True)
class _Original:
    """The A or B of a part, as the record has it; fused: the one that it is in."""

    fused: TensorInfo
    block: Block
    name: str
    ne: tuple[int, int]
    type: int
    position: int
    stored: int

    @property
    def copied(self) -> bool:
        """Whether its bytes are in the fused tensor: rows of A are."""
        return self.fused.name.endswith(A) and self.type == self.fused.type

    @property
    def n_bytes(self) -> int:
        return self.ne[1] * row_bytes(self.type, self.ne[0])


def _originals(pair: Pair, fused: _Recorded, scaled: bool) -> Iterator[_Original]:
    """A and B of each part that was there."""
    blocks = place_blocks(fused.rows, fused.ranks, pair.rank, scaled)
    facts = list(zip(fused.types, fused.positions, fused.stored, strict=True))
    for name, block, of_a, of_b in zip(QKV.parts, blocks, facts[:3], facts[3:], strict=True):
        weight = fused.name.replace(f".{QKV.fused}.", f".{name}.")
        if block.rank:
            yield _Original(pair.a, block, weight + A, (pair.a.ne[0], block.rank), *of_a)
            yield _Original(pair.b, block, weight + B, (block.rank, block.n_rows), *of_b)


def _check(header: Header, original: _Original) -> None:
    fused, of_type = original.fused, f"{record.TYPES_KEY} has {original.type}"
    derivable = original.copied or (original.type in FLOATS and fused.type in FLOATS)
    possible = derivable or original.stored != record.NOT_THERE
    if not (is_known(original.type) and possible):
        record.damaged(header, f"{of_type} for a part of {fused.name!r}")
    if original.ne[0] % TYPES[original.type].block:
        record.damaged(header, f"{of_type} for rows of {original.ne[0]}")


def _stored(header: Header, original: _Original) -> Segment:
    """A range of the metadata: an array of bytes ends its pair."""
    key, start, end = record.ORIGINALS_KEY, original.stored, original.stored + original.n_bytes
    span = header.metadata.spans.get(key)
    if span is None or span.element != ValueType.UINT8 or not 0 <= start <= end <= span.length:
        record.damaged(header, f"{key} does not hold bytes {start} to {end}")
    pair = header.metadata.segment(key)
    return pair.part(pair.n_bytes - span.length + start, original.n_bytes)


def _data(
    header: Header, original: _Original, read: plan.Read
) -> Iterator[Segment | plan.Computed]:
    fused, block = original.fused, original.block
    is_a = fused.name.endswith(A)
    if original.stored != record.NOT_THERE:
        yield _stored(header, original)
        return
    own = rows_of(fused, block.first_rank if is_a else block.first_row, original.ne[1])
    if original.copied:
        yield own.data
        return

    def make_a(piece: TensorInfo) -> bytes:
        return encode_floats(decoded(header, piece, read), original.type, header.byte_order)

    def make_b(rows: TensorInfo) -> bytes:
        values = block.unscaled(decoded(header, rows, read)[:, block.ranks])
        return encode_floats(values, original.type, header.byte_order)

    for piece in in_pieces(own) if is_a else in_rows(own):
        width = piece.ne[0] if is_a else block.rank
        n_bytes = piece.ne[1] * row_bytes(original.type, width)
        yield plan.Computed(n_bytes, partial(make_a if is_a else make_b, piece))
