"""LoRA adapter for separate Q, K and V -> Plan of the adapter for the fused weight; see `lora`.

Types stay as they are where they hold the new values exactly (F16 may overflow) and the parts
agree; else the fused tensor is F32. An original that does not follow exactly from the fused
tensor (rounded, or quantized) is recorded whole, so `unfuse` always gives the very bytes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import itemgetter
from typing import NoReturn

import numpy as np

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.source import GGUFError, Segment
from gguf_fuse.format.types import F32, row_bytes
from gguf_fuse.format.values import ValueType, encode_pair
from gguf_fuse.models.dequantize import FLOATS, decode_floats, encode_floats
from gguf_fuse.models.names import layer_order
from gguf_fuse.planning import lora, record
from gguf_fuse.planning.fuse import loader_of, obey_loader, refuse_loader
from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.lora import A, B, Block, Pair, decoded
from gguf_fuse.planning.plan import (
    KEPT_SEPARATE,
    Computed,
    Layer,
    NothingToDo,
    Plan,
    PlannedTensor,
    Read,
    Refused,
    Rows,
    Status,
    listed,
    summary,
    untouched,
)


@dataclass(frozen=True, slots=True)
class _FusedPair:
    """One layer to fuse. pairs, blocks: of Q, K and V; None where the adapter has none.

    stored: parts, in the order A of Q, K, V, then B of Q, K, V, that the record must hold whole.
    """

    layer: str
    pairs: tuple[Pair | None, ...]
    blocks: tuple[Block | None, ...]
    rows: tuple[int, ...]
    rank: int
    a_type: int
    b_type: int
    stored: tuple[bool, ...]

    @property
    def parts(self) -> tuple[TensorInfo | None, ...]:
        a = (pair.a if pair else None for pair in self.pairs)
        b = (pair.b if pair else None for pair in self.pairs)
        return (*a, *b)

    @property
    def name(self) -> str:
        return f"{self.layer}.{QKV.fused}.weight"


# -- what an adapter holds ----------------------------------------------------------------------


def examine(
    header: Header, *, rows: Rows | None = None, any_architecture: bool = False
) -> tuple[Layer, ...]:
    """Every layer whose Q, K, V or fused weight the adapter changes, in order.

    rows: of Q, K and V in the layers that the base has fused, as `unfuse.base_rows` gives them;
    without them, rows of a part that the adapter leaves alone follow from its other layers.

    Raises GGUFError for pairs that llama.cpp could not load, Refused for adapters that are no LoRA.
    """
    adapter_type = header.metadata.get("adapter.type")
    if adapter_type != "lora":
        raise Refused(
            f"{header.path}: adapter.type is {adapter_type!r}: only LoRA adapters can be fused"
        )
    pairs = lora.read_pairs(header)
    known = lora.known_rows(pairs)
    names = {match[1] for name in pairs if (match := lora.WEIGHT.fullmatch(name))}
    layers = (_decide(header, name, pairs, rows, known) for name in sorted(names, key=layer_order))
    return tuple(
        obey_loader(layer, loader_of(header, layer.name), any_architecture) for layer in layers
    )


def _decide(
    header: Header,
    layer: str,
    pairs: Mapping[str, Pair],
    base: Rows | None,
    known: Mapping[str, int],
) -> Layer:
    fused = pairs.get(f"{layer}.{QKV.fused}.weight")
    parts = {part: pairs.get(f"{layer}.{part}.weight") for part in QKV.parts}
    found = [pair for pair in parts.values() if pair is not None]
    if fused is not None and not found:
        return Layer(layer, Status.FUSED, (fused.types,), (fused.rows,))
    types, rows = tuple(pair.types for pair in found), tuple(pair.rows for pair in found)
    if fused is not None:
        return Layer(layer, Status.MISMATCH, types, rows, f"{QKV.fused} is there already")
    lengths = [pair.a.ne[0] for pair in found]
    if len(set(lengths)) > 1:
        raise GGUFError(f"{header.path}: {layer}: row lengths differ: {listed(lengths)}")
    if base is not None and layer not in base:
        return Layer(layer, Status.SEPARATE, types, rows, KEPT_SEPARATE)
    expected = dict(zip(QKV.parts, base[layer], strict=True)) if base else known
    for part, pair in parts.items():
        if pair is not None and base and pair.rows != expected[part]:
            raise GGUFError(
                f"{header.path}: {layer}.{part} has {pair.rows} rows, {expected[part]} in the base"
            )
    unknown = [part for part, pair in parts.items() if not pair and part not in expected]
    if unknown:
        reason = f"the adapter does not tell how many rows {' and '.join(unknown)} has"
        return Layer(layer, Status.INCOMPLETE, types, rows, reason)
    whole = tuple(pair.rows if pair else expected[part] for part, pair in parts.items())
    return Layer(layer, Status.FUSABLE, types, whole)


# -- fuse ---------------------------------------------------------------------------------------


def fuse(
    header: Header, read: Read, *, rows: Rows | None = None, any_architecture: bool = False
) -> Plan:
    """The plan of the adapter for the fused base.

    read: the data of a tensor. rows: as for `examine`.

    Raises Refused where rows of a missing part are not known or the base would not read the
    result, NothingToDo where no layer can be fused, GGUFError as `examine` does.
    """
    record.refuse_twice(header)
    layers = examine(header, rows=rows, any_architecture=any_architecture)
    unknown = [layer for layer in layers if layer.status is Status.INCOMPLETE]
    if unknown:
        raise Refused(f"{header.path}: {summary(unknown)}; --base MODEL.gguf tells")
    fusable = [layer for layer in layers if layer.status is Status.FUSABLE]
    if not fusable:
        _raise_nothing_to_fuse(header, layers)
    pairs, scaled = lora.read_pairs(header), lora.is_scaled(header)
    fused = [_fused_pair(header, layer, pairs, scaled, read) for layer in fusable]
    record_pairs = _encode_record(header, fused, read)
    tensors = _fused_tensors(header, fused, read)
    return record.fused_plan(header, record_pairs, tensors, layers, fusable)


def _raise_nothing_to_fuse(header: Header, layers: tuple[Layer, ...]) -> NoReturn:
    for layer in layers:
        if layer.status is Status.SEPARATE and layer.reason != KEPT_SEPARATE:
            refuse_loader(header, loader_of(header, layer.name))
    reason = summary(layers) if layers else "the adapter changes no attn_q, attn_k or attn_v"
    raise NothingToDo(header, f"nothing to fuse: {reason}", layers)


def _fused_pair(
    header: Header, layer: Layer, pairs: Mapping[str, Pair], scaled: bool, read: Read
) -> _FusedPair:
    parts = tuple(pairs.get(f"{layer.name}.{part}.weight") for part in QKV.parts)
    found = [pair for pair in parts if pair is not None]
    ranks = [pair.rank for pair in found]
    rank = lora.fused_rank(ranks) if scaled else sum(ranks)
    own_ranks = [pair.rank if pair else None for pair in parts]
    blocks = lora.place_blocks(layer.rows, own_ranks, rank, scaled)
    a_types = {pair.a.type for pair in found}
    a_type = a_types.pop() if len(a_types) == 1 else F32
    b_type, b_stored = _choose_b(header, parts, blocks, read)
    a_stored = [
        pair is not None and not _comes_back(header, pair.a, a_type, read) for pair in parts
    ]
    stored = (*a_stored, *b_stored)
    return _FusedPair(layer.name, parts, blocks, layer.rows, rank, a_type, b_type, stored)


def _choose_b(
    header: Header,
    pairs: Sequence[Pair | None],
    blocks: Sequence[Block | None],
    read: Read,
) -> tuple[int, list[bool]]:
    """The type of the fused B, and of Q, K and V whether the original must be recorded."""
    types = {pair.b.type for pair in pairs if pair}
    own = types.pop() if len(types) == 1 else F32
    for type_id in dict.fromkeys((own, F32)):
        tried = (
            _try_b(header, pair.b, block, type_id, read) if pair and block else (True, True)
            for pair, block in zip(pairs, blocks, strict=True)
        )
        stored = [not comes_back for fits, comes_back in takewhile(itemgetter(0), tried)]
        if len(stored) == len(pairs):
            return type_id, stored
    pair, block = pairs[len(stored)], blocks[len(stored)]  # the first that does not fit
    assert pair and block
    raise Refused(
        f"{header.path}: {pair.b.name!r}: times {block.numerator}/{block.denominator} "
        "overflows float32"
    )


def _try_b(
    header: Header, tensor: TensorInfo, block: Block, type_id: int, read: Read
) -> tuple[bool, bool]:
    """Whether B, multiplied, fits the type, and whether the original follows from it exactly.

    F32 fits if nothing overflows; other types only if they hold every value exactly.
    """
    if type_id not in FLOATS:
        return False, False
    order = header.byte_order
    data = read(tensor)
    values = decoded(header, tensor, data)
    scaled = block.scaled(values)
    held = decode_floats(encode_floats(scaled, type_id, order), type_id, order)
    held = held.reshape(values.shape)
    if type_id == F32:
        fits = np.array_equal(np.isfinite(held), np.isfinite(values))
    else:
        fits = np.array_equal(held, scaled, equal_nan=True)
    back = tensor.type in FLOATS and encode_floats(block.unscaled(held), tensor.type, order) == data
    return fits, back


def _comes_back(header: Header, tensor: TensorInfo, type_id: int, read: Read) -> bool:
    """Whether a tensor follows exactly from its values in another type."""
    if tensor.type == type_id:
        return True
    if tensor.type not in FLOATS:
        return False
    data = read(tensor)
    there = encode_floats(decoded(header, tensor, data), type_id, header.byte_order)
    values = decode_floats(there, type_id, header.byte_order)
    return encode_floats(values, tensor.type, header.byte_order) == data


def _fused_tensors(
    header: Header, fused: Sequence[_FusedPair], read: Read
) -> Iterator[PlannedTensor]:
    planned: dict[str, PlannedTensor | None] = {}
    for pair in fused:
        parts = [part for part in pair.parts if part is not None]
        planned.update({part.name: None for part in parts})
        planned[parts[0].name] = _fused_a(header, pair, read)
        planned[parts[len(parts) // 2].name] = _fused_b(header, pair, read)
    for tensor in header.tensors:
        if tensor.name not in planned:
            yield untouched(tensor)
        elif (made := planned[tensor.name]) is not None:
            yield made


def _fused_a(header: Header, fused: _FusedPair, read: Read) -> PlannedTensor:
    """Q's rows, K's, V's, then zeros up to the rank: copied, unless the types differ."""
    pairs = [pair for pair in fused.pairs if pair is not None]
    width = pairs[0].a.ne[0]
    pieces: list[Segment | Computed] = []
    for pair in pairs:
        if pair.a.type == fused.a_type:
            pieces.append(pair.a.data)
        else:
            n_bytes = pair.rank * row_bytes(fused.a_type, width)
            pieces.append(Computed(n_bytes, _converter(header, pair.a, fused.a_type, read)))
    n_zeros = (fused.rank - sum(pair.rank for pair in pairs)) * row_bytes(fused.a_type, width)
    if n_zeros:
        pieces.append(Computed(n_zeros, lambda: bytes(n_zeros)))
    return PlannedTensor(fused.name + A, (width, fused.rank), fused.a_type, tuple(pieces))


def _converter(header: Header, tensor: TensorInfo, type_id: int, read: Read) -> Callable[[], bytes]:
    return lambda: encode_floats(decoded(header, tensor, read(tensor)), type_id, header.byte_order)


def _fused_b(header: Header, fused: _FusedPair, read: Read) -> PlannedTensor:
    def make() -> bytes:
        b = np.zeros((sum(fused.rows), fused.rank), np.float32)
        for pair, block in zip(fused.pairs, fused.blocks, strict=True):
            if pair is not None and block is not None:
                block.of(b)[:] = block.scaled(decoded(header, pair.b, read(pair.b)))
        return encode_floats(b, fused.b_type, header.byte_order)

    ne = (fused.rank, sum(fused.rows))
    n_bytes = ne[1] * row_bytes(fused.b_type, ne[0])
    return PlannedTensor(fused.name + B, ne, fused.b_type, (Computed(n_bytes, make),))


def _encode_record(header: Header, fused: Sequence[_FusedPair], read: Read) -> list[bytes]:
    order = header.byte_order
    types, positions, stored, originals = [], [], [], bytearray()
    for made in fused:
        for part, whole in zip(made.parts, made.stored, strict=True):
            types.append(record.NOT_THERE if part is None else part.type)
            positions.append(record.NOT_THERE if part is None else header.position[part.name])
            stored.append(len(originals) if part and whole else record.NOT_THERE)
            if part and whole:
                originals += read(part)
    rows = [n for made in fused for n in made.rows]
    ranks = [pair.rank if pair else 0 for made in fused for pair in made.pairs]
    pairs = record.start(header, [made.name for made in fused])
    pairs += [
        encode_pair(record.ROWS_KEY, ValueType.UINT64, rows, order),
        encode_pair(record.RANKS_KEY, ValueType.UINT64, ranks, order),
        encode_pair(record.TYPES_KEY, ValueType.INT64, types, order),
        encode_pair(record.POSITIONS_KEY, ValueType.INT64, positions, order),
        encode_pair(record.STORED_KEY, ValueType.INT64, stored, order),
    ]
    if originals:
        pairs.append(encode_pair(record.ORIGINALS_KEY, ValueType.UINT8, bytes(originals), order))
    return pairs
