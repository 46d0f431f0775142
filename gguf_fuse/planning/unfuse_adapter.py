"""LoRA adapter that gguf-fuse fused -> Plan of the original one; see `lora` and `fuse_adapter`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gguf_fuse.format.header import Header
from gguf_fuse.format.source import Segment
from gguf_fuse.format.types import TYPES, is_known, row_bytes
from gguf_fuse.format.values import ValueType
from gguf_fuse.models.dequantize import FLOATS, encode_floats
from gguf_fuse.planning import record
from gguf_fuse.planning.fuse_adapter import examine
from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.lora import A, B, Block, Pair, decoded, is_scaled, place_blocks, read_pairs
from gguf_fuse.planning.plan import (
    Computed,
    Layer,
    NothingToDo,
    Plan,
    PlannedTensor,
    Read,
    Refused,
    Status,
    listed,
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


def unfuse(header: Header, read: Read) -> Plan:
    """The plan of the adapter for the separate base: the original one.

    Raises Refused for an adapter that gguf-fuse did not fuse (its rows of Q, K and V are known to
    its base alone), GGUFError where the record does not fit, NothingToDo where nothing is fused.
    """
    if not record.exists(header):
        if any(layer.status is Status.FUSED for layer in examine(header, any_architecture=True)):
            raise Refused(
                f"{header.path}: gguf-fuse did not fuse this adapter, so it has no record of the "
                "rows of Q, K and V: it cannot be split for certain"
            )
        raise NothingToDo(header, f"nothing to unfuse: the adapter changes no {QKV.fused}")
    pairs, recorded = read_pairs(header), _recorded(header)
    for fused in recorded:
        if fused.name not in pairs:
            record.damaged(header, f"{fused.name!r} is recorded, which the adapter does not have")
    restored: dict[str, list[record.Placed]] = {}
    for fused in recorded:
        restored[fused.name + A] = list(_restored(header, pairs[fused.name], fused, read))
        restored[fused.name + B] = []
    changed = [
        Layer(
            fused.name.removesuffix(f".{QKV.fused}.weight"),
            Status.FUSED,
            (pairs[fused.name].types,),
            fused.rows,
        )
        for fused in recorded
    ]
    return record.unfused_plan(header, restored, changed)


def _recorded(header: Header) -> list[_Recorded]:
    names = record.names(header)
    for name in names:
        if not name.endswith(f".{QKV.fused}.weight"):
            record.damaged(header, f"{name!r} is recorded, which is no {QKV.fused}")

    def numbers(key: str, each: int) -> Iterator[tuple[int, ...]]:
        values = record.array(header, key, int, each * len(names))
        return (tuple(values[at : at + each]) for at in range(0, len(values), each))

    columns = (
        (record.ROWS_KEY, 3),
        (record.RANKS_KEY, 3),
        (record.TYPES_KEY, 6),
        (record.POSITIONS_KEY, 6),
        (record.STORED_KEY, 6),
    )
    found = [numbers(key, each) for key, each in columns]
    return [_Recorded(*row) for row in zip(names, *found, strict=True)]


def _restored(header: Header, pair: Pair, fused: _Recorded, read: Read) -> Iterator[record.Placed]:
    _check_recorded(header, pair, fused)
    ranks = [rank or None for rank in fused.ranks]
    blocks = place_blocks(fused.rows, ranks, pair.rank, is_scaled(header))
    for index, name in enumerate(QKV.parts):
        block = blocks[index]
        if block is None:
            continue
        weight = fused.name.replace(f".{QKV.fused}.", f".{name}.")
        shapes = ((A, (pair.a.ne[0], block.rank)), (B, (block.rank, block.n_rows)))
        for column, (end, ne) in zip((index, index + len(QKV.parts)), shapes, strict=True):
            type_id = fused.types[column]
            n_bytes = ne[1] * row_bytes(type_id, ne[0])
            if fused.stored[column] != record.NOT_THERE:
                piece: Segment | Computed = _stored(header, fused.stored[column], n_bytes)
            else:
                piece = _derived(header, pair, end, block, type_id, n_bytes, read)
            yield fused.positions[column], PlannedTensor(weight + end, ne, type_id, (piece,))


def _check_recorded(header: Header, pair: Pair, fused: _Recorded) -> None:
    if sum(fused.rows) != pair.rows or min(fused.rows) < 1:
        record.damaged(header, f"{pair.b.name!r} has {pair.rows} rows, not {listed(fused.rows)}")
    if min(fused.ranks) < 0 or not 0 < sum(fused.ranks) <= pair.rank:
        record.damaged(header, f"{pair.a.name!r} has {pair.rank}, not {listed(fused.ranks)} ranks")
    for index, rank in enumerate(fused.ranks):
        for column, tensor in ((index, pair.a), (index + len(QKV.parts), pair.b)):
            type_id = fused.types[column]
            derivable = type_id in FLOATS and tensor.type in FLOATS
            copied = column == index and type_id == tensor.type
            possible = derivable or copied or fused.stored[column] != record.NOT_THERE
            if rank and not (is_known(type_id) and possible):
                record.damaged(
                    header, f"{record.TYPES_KEY} has {type_id} for a part of {tensor.name!r}"
                )
            width = pair.a.ne[0] if column == index else rank
            if rank and width % TYPES[type_id].block:
                record.damaged(header, f"{record.TYPES_KEY} has {type_id} for rows of {width}")


def _stored(header: Header, offset: int, n_bytes: int) -> Segment:
    """A range of the metadata: an array of bytes ends its pair."""
    head = (
        header.metadata.array_head(record.ORIGINALS_KEY)
        if record.ORIGINALS_KEY in header.metadata
        else None
    )
    if head is None or head[0] != ValueType.UINT8 or not 0 <= offset <= head[1] - n_bytes:
        record.damaged(
            header, f"{record.ORIGINALS_KEY} does not hold bytes {offset} to {offset + n_bytes}"
        )
    pair = header.metadata.segment(record.ORIGINALS_KEY)
    return pair.part(pair.n_bytes - head[1] + offset, n_bytes)


def _derived(
    header: Header, pair: Pair, end: str, block: Block, type_id: int, n_bytes: int, read: Read
) -> Segment | Computed:
    if end == A and type_id == pair.a.type:
        above = block.first_rank * row_bytes(type_id, pair.a.ne[0])  # rows of the parts before
        return pair.a.data.part(above, n_bytes)

    def make() -> bytes:
        if end == A:
            values = decoded(header, pair.a, read(pair.a))
            values = values[block.first_rank : block.first_rank + block.rank]
        else:
            values = block.unscaled(block.of(decoded(header, pair.b, read(pair.b))))
        return encode_floats(values, type_id, header.byte_order)

    return Computed(n_bytes, make)
