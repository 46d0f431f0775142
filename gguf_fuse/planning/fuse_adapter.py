"""LoRA adapter for separate Q, K and V -> Plan of the adapter for the fused weight; see `lora`.

Types stay as they are where they hold the new values exactly (F16 may overflow) and the parts
agree; else the fused tensor is F32. An original that does not follow exactly from the fused
tensor (rounded, or quantized) is recorded whole, so `unfuse` always gives the very bytes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.source import GGUFError, Segment
from gguf_fuse.format.types import F32, row_bytes
from gguf_fuse.format.values import ValueType
from gguf_fuse.models.dequantize import FLOATS, decode_floats, encode_floats
from gguf_fuse.models.names import layer_order
from gguf_fuse.planning import lora, plan, record
from gguf_fuse.planning.fuse import obey_loader, require_fusable
from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.lora import A, B, Block, Pair, decoded, in_pieces


@dataclass(frozen=True, slots=True)
class _FusedLayer:
    """One layer to fuse.

    parts: A of Q, K and V, then B of Q, K and V; None where the adapter has none. a, b: the new
    pair. stored: names of the parts that the record must hold whole.
    """

    parts: tuple[TensorInfo | None, ...]
    rows: tuple[int, ...]
    a: plan.PlannedTensor
    b: plan.PlannedTensor
    stored: set[str]


def examine(
    header: Header, *, rows: plan.Rows | None = None, any_architecture: bool = False
) -> tuple[plan.Layer, ...]:
    """Every layer whose Q, K, V or fused weight the adapter changes, in order.

    rows: of Q, K and V in the layers that the base has fused, as `unfuse.base_rows` gives them;
    without them, rows of a part that the adapter leaves alone follow from its other layers.

    Raises GGUFError for pairs that llama.cpp could not load, Refused for adapters that are no LoRA.
    """
    adapter_type = header.metadata.get("adapter.type")
    if adapter_type != "lora":
        raise plan.Refused(
            f"{header.path}: adapter.type is {adapter_type!r}: only LoRA adapters can be fused"
        )
    pairs = lora.read_pairs(header)
    known = lora.known_rows(pairs)
    base = {name: dict(zip(QKV.parts, own, strict=True)) for name, own in (rows or {}).items()}
    names = {match[1] for name in pairs if (match := lora.WEIGHT.fullmatch(name))}
    layers = [
        _decide(header, name, pairs, known if rows is None else base.get(name))
        for name in sorted(names, key=layer_order)
    ]
    return tuple(obey_loader(header, layer, any_architecture) for layer in layers)


def _decide(
    header: Header, name: str, pairs: Mapping[str, Pair], known: Mapping[str, int] | None
) -> plan.Layer:
    """known: rows of Q, K and V, as far as they are; None: the base has the layer separate."""
    fused = pairs.get(f"{name}.{QKV.fused}.weight")
    found = {part: pair for part in QKV.parts if (pair := pairs.get(f"{name}.{part}.weight"))}
    if fused is not None and not found:
        return plan.Layer(name, plan.Status.FUSED, (fused.types,), (fused.rows,))
    own = {part: pair.rows for part, pair in found.items()}
    types, rows = tuple(pair.types for pair in found.values()), tuple(own.values())
    if fused is not None:
        return plan.Layer(name, plan.Status.MISMATCH, types, rows, f"{QKV.fused} is there already")
    lengths = [pair.a.ne[0] for pair in found.values()]
    if len(set(lengths)) > 1:
        raise GGUFError(f"{header.path}: {name}: row lengths differ: {plan.listed(lengths)}")
    if known is None:
        return plan.Layer(name, plan.Status.SEPARATE, types, rows, plan.KEPT_SEPARATE)
    unknown = [part for part in QKV.parts if part not in {*known, *own}]
    if unknown:
        reason = f"the adapter does not tell how many rows {' and '.join(unknown)} has"
        return plan.Layer(name, plan.Status.INCOMPLETE, types, rows, reason)
    rows = tuple(own.get(part) or known[part] for part in QKV.parts)
    return plan.Layer(name, plan.Status.FUSABLE, types, rows)


def fuse(
    header: Header,
    read: plan.Read,
    *,
    rows: plan.Rows | None = None,
    any_architecture: bool = False,
) -> plan.Plan:
    """The plan of the adapter for the fused base.

    read: a range of the file. rows: as for `examine`.

    Raises Refused where rows of a missing part are not known or the base would not read the
    result, NothingToDo where no layer can be fused, GGUFError as `examine` does.
    """
    record.refuse_twice(header)
    layers = examine(header, rows=rows, any_architecture=any_architecture)
    plan.refuse_any(header, layers, plan.Status.INCOMPLETE, "; --base MODEL.gguf tells")
    require_fusable(header, layers, "the adapter changes no attn_q, attn_k or attn_v")
    fusable = (layer for layer in layers if layer.status is plan.Status.FUSABLE)
    fused = [_fused_layer(header, layer, read) for layer in fusable]
    names, arrays = [made.b.name.removesuffix(B) for made in fused], _record(header, fused)
    return record.fused_plan(header, layers, _fused_tensors(header, fused), names, *arrays)


def _fused_layer(header: Header, layer: plan.Layer, read: plan.Read) -> _FusedLayer:
    a_parts, b_parts = (
        [header.by_name.get(f"{layer.name}.{part}.weight{end}") for part in QKV.parts]
        for end in (A, B)
    )
    own_ranks = [part.ne[1] if part else 0 for part in a_parts]
    ranks, scaled = [rank for rank in own_ranks if rank], lora.is_scaled(header)
    rank = lora.fused_rank(ranks) if scaled else sum(ranks)
    blocks = lora.place_blocks(layer.rows, own_ranks, rank, scaled)
    placed = list(zip(b_parts, blocks, strict=True))
    name = f"{layer.name}.{QKV.fused}.weight"
    b, b_stored = _fused_b(header, name + B, placed, (rank, sum(layer.rows)), read)
    a, a_stored = _fused_a(header, name + A, [part for part in a_parts if part], rank, read)
    return _FusedLayer((*a_parts, *b_parts), layer.rows, a, b, a_stored | b_stored)


def _common_type(parts: Iterable[TensorInfo]) -> int:
    types = {part.type for part in parts}
    return types.pop() if len(types) == 1 else F32


def _fused_a(
    header: Header, name: str, parts: Sequence[TensorInfo], rank: int, read: plan.Read
) -> tuple[plan.PlannedTensor, set[str]]:
    """Q's rows, K's, V's, then zeros up to the rank: copied, unless the types differ.

    And the names of the parts whose original must be recorded.
    """
    width, type_id = parts[0].ne[0], _common_type(parts)
    row, stored = row_bytes(type_id, width), set()
    pieces: list[Segment | plan.Computed] = []
    for part in parts:
        if part.type == type_id:
            pieces.append(part.data)
            continue
        for piece in in_pieces(part):
            make = partial(_converted, header, piece, type_id, read)
            pieces.append(plan.Computed(piece.ne[1] * row_bytes(type_id, piece.ne[0]), make))
        if part.type not in FLOATS or not _held(header, part, type_id, read)[1]:
            stored.add(part.name)
    n_zeros = (rank - sum(part.ne[1] for part in parts)) * row
    for at in range(0, n_zeros, plan.READ_BYTES):
        n_bytes = min(plan.READ_BYTES, n_zeros - at)
        pieces.append(plan.Computed(n_bytes, partial(bytes, n_bytes)))
    return plan.PlannedTensor(name, (width, rank), type_id, tuple(pieces)), stored


def _converted(header: Header, piece: TensorInfo, type_id: int, read: plan.Read) -> bytes:
    return encode_floats(decoded(header, piece, read), type_id, header.byte_order)


def _fused_b(
    header: Header,
    name: str,
    parts: Sequence[tuple[TensorInfo | None, Block]],
    ne: tuple[int, int],
    read: plan.Read,
) -> tuple[plan.PlannedTensor, set[str]]:
    """Blocks on the diagonal; and the names of the parts whose original must be recorded."""
    there = [(part, block) for part, block in parts if part is not None]
    type_id, stored = _choose_b(header, there, read)
    row = row_bytes(type_id, ne[0])

    def make(part: TensorInfo | None, block: Block, n_rows: int) -> bytes:
        b = np.zeros((n_rows, ne[0]), np.float32)
        if part is not None:
            b[:, block.ranks] = block.scaled(decoded(header, part, read))
        return encode_floats(b, type_id, header.byte_order)

    pieces, most = [], max(1, lora.VALUES // ne[0])
    for part, block in parts:
        for first in range(0, block.n_rows, most):
            n_rows = min(most, block.n_rows - first)
            own = part and lora.rows_of(part, first, n_rows)
            pieces.append(plan.Computed(n_rows * row, partial(make, own, block, n_rows)))
    return plan.PlannedTensor(name, ne, type_id, tuple(pieces)), stored


def _choose_b(
    header: Header, parts: Sequence[tuple[TensorInfo, Block]], read: plan.Read
) -> tuple[int, set[str]]:
    """The type of the fused B, and the names of the parts whose original must be recorded."""
    for type_id in dict.fromkeys((_common_type(part for part, _ in parts), F32)):
        stored = set()
        for part, block in parts:
            fits, comes_back = _held(header, part, type_id, read, block)
            if not fits:
                break
            if not comes_back:
                stored.add(part.name)
        else:
            return type_id, stored
    factor = f"{block.numerator}/{block.denominator}"
    raise plan.Refused(f"{header.path}: {part.name!r}: times {factor} overflows float32")


def _held(
    header: Header, part: TensorInfo, type_id: int, read: plan.Read, block: Block | None = None
) -> tuple[bool, bool]:
    """Whether a part, multiplied as its block says, fits the type, and the way back is exact.

    F32 fits if nothing overflows; other types only if they hold every value exactly.
    """
    if type_id not in FLOATS:
        return False, False
    order, comes_back = header.byte_order, part.type in FLOATS
    for piece in in_pieces(part):
        values = decoded(header, piece, read)
        scaled: NDArray[Any] = block.scaled(values) if block else values
        held = decode_floats(encode_floats(scaled, type_id, order), type_id, order)
        held = held.reshape(values.shape)
        if type_id == F32:
            fits = np.array_equal(np.isfinite(held), np.isfinite(values))
        else:
            fits = np.array_equal(held, scaled, equal_nan=True)
        if not fits:
            return False, False
        if comes_back:
            back = block.unscaled(held) if block else held
            comes_back = encode_floats(back, part.type, order) == read(piece.data)
    return True, comes_back


def _fused_tensors(header: Header, fused: Sequence[_FusedLayer]) -> Iterator[plan.PlannedTensor]:
    planned: dict[str, plan.PlannedTensor | None] = {}
    for made in fused:
        parts = [part for part in made.parts if part is not None]
        planned.update({part.name: None for part in parts})
        planned[parts[0].name] = made.a
        planned[parts[len(parts) // 2].name] = made.b
    for tensor in header.tensors:
        if tensor.name not in planned:
            yield plan.untouched(tensor)
        elif (new := planned[tensor.name]) is not None:
            yield new


def _record(header: Header, fused: Sequence[_FusedLayer]) -> Iterator[record.Pair]:
    types, positions, stored, originals, n_bytes = [], [], [], list[Segment](), 0
    for made in fused:
        for part in made.parts:
            types.append(part.type if part else record.NOT_THERE)
            positions.append(header.position[part.name] if part else record.NOT_THERE)
            if part is None or part.name not in made.stored:
                stored.append(record.NOT_THERE)
                continue
            stored.append(n_bytes)
            originals.append(part.data)
            n_bytes += part.n_bytes
    yield record.ROWS_KEY, ValueType.UINT64, [n for made in fused for n in made.rows]
    ranks = [a.ne[1] if a else 0 for made in fused for a in made.parts[: len(QKV.parts)]]
    yield record.RANKS_KEY, ValueType.UINT64, ranks
    yield record.TYPES_KEY, ValueType.INT64, types
    yield record.POSITIONS_KEY, ValueType.INT64, positions
    yield record.STORED_KEY, ValueType.INT64, stored
    if originals:
        yield record.ORIGINALS_KEY, ValueType.UINT8, originals
