"""LoRA adapters for separate Q, K and V -> an adapter for the fused weight, and back.

An adapter adds scale * B @ A to a weight, A: ne = [row length, rank], B: ne = [rank, rows]. For
attn_qkv the three A's are stacked along the rank and B is block-diagonal, so that the product has
Q's rows, then K's, then V's; a part that the adapter leaves alone has rows of zeros.

llama.cpp's scale is alpha / rank, with B's own rank (or 1, where alpha is 0). The rank R of the
fused pair is larger than a part's rank r, so the part's block of B is multiplied by R / r. R is
chosen, with a few rows of zeros in A if need be, so that every R / r is a power of two: then no
bit of a mantissa changes, and the way back is exact. Ranks whose ratios are no powers of two
(8 beside 6) have no such R: B is rounded to float32 once.

Types stay as they are where they hold the new values exactly (F16 may overflow) and the parts
agree; else the fused tensor is F32. An original that does not follow exactly from the fused
tensor (rounded, or quantized) is recorded whole, so `unfuse` always gives the very bytes back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import itemgetter
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from gguf_fuse.format.header import (
    GGUFError,
    Header,
    Segment,
    TensorInfo,
    encode_pair,
    row_bytes,
    type_name,
)
from gguf_fuse.models.dequantize import F32, FLOATS, decode_floats, dequantized, encode_floats
from gguf_fuse.planning import record
from gguf_fuse.planning.base import KEPT_SEPARATE
from gguf_fuse.planning.fuse import loader_of, refuse_loader
from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.loaders import Loader
from gguf_fuse.planning.plan import (
    KEY_PREFIX,
    Computed,
    Layer,
    NothingToDo,
    Plan,
    PlannedTensor,
    Refused,
    Status,
    data_of,
    listed,
    summary,
    untouched,
)
from gguf_fuse.planning.record import POSITIONS_KEY, ROWS_KEY

ALPHA_KEY = "adapter.lora.alpha"
RANKS_KEY = KEY_PREFIX + "ranks"
TYPES_KEY = KEY_PREFIX + "types"
STORED_KEY = KEY_PREFIX + "stored"
ORIGINALS_KEY = KEY_PREFIX + "originals"

_A, _B = ".lora_a", ".lora_b"
_WEIGHT = re.compile(r"((?:(?:enc|dec)\.)?blk\.[0-9]{1,6})\.attn_(?:q|k|v|qkv)\.weight")
_NONE = -1  # in the record: a part that the adapter does not have, or an original not stored

Read = Callable[[TensorInfo], bytes]
Rows = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Pair:
    """What an adapter adds to one weight. a: ne = [row length, rank]; b: ne = [rank, rows]."""

    a: TensorInfo
    b: TensorInfo

    @property
    def rank(self) -> int:
        return self.a.ne[1]

    @property
    def rows(self) -> int:
        return self.b.ne[1]


@dataclass(frozen=True, slots=True)
class _Block:
    """Where a part lies in the fused B, [rows, rank], and what its values are multiplied by.

    The factor is numerator / denominator.
    """

    first_row: int
    n_rows: int
    first_rank: int
    rank: int
    numerator: int
    denominator: int

    def of(self, fused: NDArray[Any]) -> NDArray[Any]:
        ranks = slice(self.first_rank, self.first_rank + self.rank)
        return fused[self.first_row : self.first_row + self.n_rows, ranks]

    def scaled(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return values.astype(np.float64) * self.numerator / self.denominator

    def unscaled(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            product = values.astype(np.float64) * self.denominator / self.numerator
            return product.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Fusion:
    """One layer to fuse. pairs, blocks: of Q, K and V; None where the adapter has none.

    stored: parts, in the order A of Q, K, V, then B of Q, K, V, that the record must hold whole.
    """

    layer: str
    pairs: tuple[Pair | None, ...]
    blocks: tuple[_Block | None, ...]
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

    rows: of Q, K and V in the layers that the base has fused, as `base.base_rows` gives them;
    without them, rows of a part that the adapter leaves alone follow from its other layers.

    Raises GGUFError for pairs that llama.cpp could not load, Refused for adapters that are no LoRA.
    """
    kind = header.metadata.get("adapter.type")
    if kind != "lora":
        raise Refused(f"{header.path}: adapter.type is {kind!r}: only LoRA adapters can be fused")
    pairs = _pairs(header)
    known = _known_rows(pairs)
    names = {match[1] for name in pairs if (match := _WEIGHT.fullmatch(name))}
    ordered = sorted(names, key=lambda n: (n.split("blk")[0], int(n.rsplit(".", 1)[1])))
    layers = (_decide(header, layer, pairs, rows, known) for layer in ordered)
    return tuple(_obey_loader(header, layer, any_architecture) for layer in layers)


def _obey_loader(header: Header, layer: Layer, any_architecture: bool) -> Layer:
    row = loader_of(header, layer.name)
    if any_architecture or row.qkv.loader is Loader.READS_FUSED or layer.status is Status.FUSED:
        return layer
    reason = f"llama.cpp's loader for {row.name} {row.qkv.loader.phrase()}"
    return replace(layer, status=Status.SEPARATE, reason=reason)


def _pairs(header: Header) -> dict[str, Pair]:
    """By the name of the weight; checked for those of attention layers."""
    tensors = {tensor.name: tensor for tensor in header.tensors}
    pairs = {}
    for tensor in header.tensors:
        for end, other in ((_A, _B), (_B, _A)):
            name = tensor.name.removesuffix(end)
            if not tensor.name.endswith(end) or not _WEIGHT.fullmatch(name):
                continue
            if name + other not in tensors:
                raise GGUFError(f"{header.path}: {tensor.name!r} has no {other[1:]} beside it")
            pairs[name] = Pair(tensors[name + _A], tensors[name + _B])
    for pair in pairs.values():
        _check_pair(header, pair)
    return pairs


def _check_pair(header: Header, pair: Pair) -> None:
    for tensor in (pair.a, pair.b):
        if len(tensor.ne) != 2:
            n_dims = len(tensor.ne)
            raise GGUFError(f"{header.path}: {tensor.name!r} has {n_dims} dimensions, not 2")
        if row_bytes(tensor.type, 0) is None:
            raise Refused(
                f"{header.path}: {tensor.name!r} is of {type_name(tensor.type)}, which this "
                "gguf-py does not know; a newer one may"
            )
    if pair.a.ne[1] != pair.b.ne[0]:
        raise GGUFError(
            f"{header.path}: {pair.a.name!r} has rank {pair.a.ne[1]}, {pair.b.name!r} has rank "
            f"{pair.b.ne[0]}"
        )


def _known_rows(pairs: Mapping[str, Pair]) -> dict[str, int]:
    """Rows of attn_q, attn_k and attn_v, where all layers of the adapter that have one agree."""
    found: dict[str, set[int]] = {}
    for name, pair in pairs.items():
        found.setdefault(name.split(".")[-2], set()).add(pair.rows)
    return {part: numbers.pop() for part, numbers in found.items() if len(numbers) == 1}


def _decide(
    header: Header,
    layer: str,
    pairs: Mapping[str, Pair],
    base: Rows | None,
    known: Mapping[str, int],
) -> Layer:
    fused = pairs.get(f"{layer}.{QKV.fused}.weight")
    parts = [pairs.get(f"{layer}.{part}.weight") for part in QKV.parts]
    found = [pair for pair in parts if pair is not None]
    types = tuple(_types(pair) for pair in found)
    if fused is not None and not found:
        return Layer(layer, Status.FUSED, (_types(fused),), (fused.rows,))
    if fused is not None:
        rows = tuple(pair.rows for pair in found)
        return Layer(layer, Status.MISMATCH, types, rows, f"{QKV.fused} is there already")
    lengths = [pair.a.ne[0] for pair in found]
    if len(set(lengths)) > 1:
        raise GGUFError(f"{header.path}: {layer}: row lengths differ: {listed(lengths)}")
    if base is not None and layer not in base:
        rows = tuple(pair.rows for pair in found)
        return Layer(layer, Status.SEPARATE, types, rows, KEPT_SEPARATE)
    expected: Mapping[str, int] = dict(zip(QKV.parts, base[layer], strict=True)) if base else known
    for part, pair in zip(QKV.parts, parts, strict=True):
        if pair is not None and base and pair.rows != expected[part]:
            raise GGUFError(
                f"{header.path}: {layer}.{part} has {pair.rows} rows, {expected[part]} in the base"
            )
    unknown = [
        part
        for part, pair in zip(QKV.parts, parts, strict=True)
        if not pair and part not in expected
    ]
    if unknown:
        rows = tuple(pair.rows for pair in found)
        reason = f"the adapter does not tell how many rows {' and '.join(unknown)} has"
        return Layer(layer, Status.INCOMPLETE, types, rows, reason)
    whole = tuple(
        pair.rows if pair else expected[part] for part, pair in zip(QKV.parts, parts, strict=True)
    )
    return Layer(layer, Status.FUSABLE, types, whole)


def _types(pair: Pair) -> str:
    a, b = type_name(pair.a.type), type_name(pair.b.type)
    return a if a == b else f"{a}/{b}"


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
    pairs, scaled = _pairs(header), _alpha(header) != 0
    fusions = [_fusion(header, layer, pairs, scaled, read) for layer in fusable]
    record_pairs = _encode_record(header, fusions, read)
    tensors = _fused_tensors(header, fusions, read)
    return record.fused_plan(header, record_pairs, tensors, layers, fusable)


def _raise_nothing_to_fuse(header: Header, layers: tuple[Layer, ...]) -> NoReturn:
    for layer in layers:
        if layer.status is Status.SEPARATE and layer.reason != KEPT_SEPARATE:
            refuse_loader(header, loader_of(header, layer.name))
    reason = summary(layers) if layers else "the adapter changes no attn_q, attn_k or attn_v"
    raise NothingToDo(header, f"nothing to fuse: {reason}", layers)


def _alpha(header: Header) -> float:
    if ALPHA_KEY not in header.metadata:
        return 0.0
    if header.metadata.value_type(ALPHA_KEY) != GGUFValueType.FLOAT32:
        raise GGUFError(f"{header.path}: {ALPHA_KEY} is no float32")
    alpha: float = header.metadata[ALPHA_KEY]
    return alpha


def fused_rank(ranks: Sequence[int]) -> int:
    """The smallest rank that holds them all and is each one times a power of two.

    Their sum, where there is none.
    """
    odd = {rank // (rank & -rank) for rank in ranks}
    total = sum(ranks)
    if len(odd) > 1:
        return total
    rank = odd.pop()
    while rank < total:
        rank *= 2
    return rank


def _fusion(
    header: Header, layer: Layer, pairs: Mapping[str, Pair], scaled: bool, read: Read
) -> _Fusion:
    parts = tuple(pairs.get(f"{layer.name}.{part}.weight") for part in QKV.parts)
    found = [pair for pair in parts if pair is not None]
    ranks = [pair.rank for pair in found]
    rank = fused_rank(ranks) if scaled else sum(ranks)
    blocks = _blocks(layer.rows, [pair.rank if pair else None for pair in parts], rank, scaled)
    a_types = {pair.a.type for pair in found}
    a_type = a_types.pop() if len(a_types) == 1 else F32
    b_type, b_stored = _choose_b(header, parts, blocks, read)
    a_stored = [
        pair is not None and not _comes_back(header, pair.a, a_type, read) for pair in parts
    ]
    stored = (*a_stored, *b_stored)
    return _Fusion(layer.name, parts, blocks, layer.rows, rank, a_type, b_type, stored)


def _blocks(
    rows: Sequence[int], ranks: Sequence[int | None], rank: int, scaled: bool
) -> tuple[_Block | None, ...]:
    blocks: list[_Block | None] = []
    first_row = first_rank = 0
    for n_rows, own in zip(rows, ranks, strict=True):
        if own is None:
            blocks.append(None)
        else:
            factor = (rank, own) if scaled else (1, 1)
            blocks.append(_Block(first_row, n_rows, first_rank, own, *factor))
            first_rank += own
        first_row += n_rows
    return tuple(blocks)


def _choose_b(
    header: Header,
    pairs: Sequence[Pair | None],
    blocks: Sequence[_Block | None],
    read: Read,
) -> tuple[int, list[bool]]:
    """The type of the fused B, and of Q, K and V whether the original must be recorded."""
    types = {pair.b.type for pair in pairs if pair}
    own = types.pop() if len(types) == 1 else F32
    for kind in dict.fromkeys((own, F32)):
        tried = (
            _try_b(header, pair.b, block, kind, read) if pair and block else (True, True)
            for pair, block in zip(pairs, blocks, strict=True)
        )
        stored = [not comes_back for fits, comes_back in takewhile(itemgetter(0), tried)]
        if len(stored) == len(pairs):
            return kind, stored
    pair, block = pairs[len(stored)], blocks[len(stored)]  # the first that does not fit
    assert pair and block
    raise Refused(
        f"{header.path}: {pair.b.name!r}: times {block.numerator}/{block.denominator} "
        "overflows float32"
    )


def _try_b(
    header: Header, tensor: TensorInfo, block: _Block, kind: int, read: Read
) -> tuple[bool, bool]:
    """Whether B, multiplied, fits the type, and whether the original follows from it exactly.

    F32 fits if nothing overflows; other types only if they hold every value exactly.
    """
    if kind not in FLOATS:
        return False, False
    order = header.byte_order
    data = read(tensor)
    values = _decode(header, tensor, data)
    scaled = block.scaled(values)
    held = decode_floats(encode_floats(scaled, kind, order), kind, order).reshape(values.shape)
    if kind == F32:
        fits = np.array_equal(np.isfinite(held), np.isfinite(values))
    else:
        fits = np.array_equal(held, scaled, equal_nan=True)
    back = tensor.type in FLOATS and encode_floats(block.unscaled(held), tensor.type, order) == data
    return fits, back


def _comes_back(header: Header, tensor: TensorInfo, kind: int, read: Read) -> bool:
    """Whether a tensor follows exactly from its values in another type."""
    if tensor.type == kind:
        return True
    if tensor.type not in FLOATS:
        return False
    data = read(tensor)
    there = encode_floats(_decode(header, tensor, data), kind, header.byte_order)
    values = decode_floats(there, kind, header.byte_order)
    return encode_floats(values, tensor.type, header.byte_order) == data


def _fused_tensors(
    header: Header, fusions: Sequence[_Fusion], read: Read
) -> Iterator[PlannedTensor]:
    planned: dict[str, PlannedTensor | None] = {}
    for fusion in fusions:
        parts = [part for part in fusion.parts if part is not None]
        planned.update({part.name: None for part in parts})
        planned[parts[0].name] = _fused_a(header, fusion, read)
        planned[parts[len(parts) // 2].name] = _fused_b(header, fusion, read)
    for tensor in header.tensors:
        if tensor.name not in planned:
            yield untouched(header, tensor)
        elif (fused := planned[tensor.name]) is not None:
            yield fused


def _fused_a(header: Header, fusion: _Fusion, read: Read) -> PlannedTensor:
    """Q's rows, K's, V's, then zeros up to the rank: copied, unless the types differ."""
    pieces: list[Segment | Computed] = []
    n_ranks = 0
    for pair in fusion.pairs:
        if pair is None:
            continue
        n_ranks += pair.rank
        width = pair.a.ne[0]
        if pair.a.type == fusion.a_type:
            pieces.append(data_of(header, pair.a))
        else:
            n_bytes = pair.a.ne[1] * _n_bytes(fusion.a_type, width)
            pieces.append(Computed(n_bytes, _converter(header, pair.a, fusion.a_type, read)))
    n_zeros = (fusion.rank - n_ranks) * _n_bytes(fusion.a_type, width)
    if n_zeros:
        pieces.append(Computed(n_zeros, lambda: bytes(n_zeros)))
    ne = (width, fusion.rank)
    return PlannedTensor(fusion.name + _A, ne, fusion.a_type, tuple(pieces))


def _converter(header: Header, tensor: TensorInfo, kind: int, read: Read) -> Callable[[], bytes]:
    return lambda: encode_floats(_decode(header, tensor, read(tensor)), kind, header.byte_order)


def _fused_b(header: Header, fusion: _Fusion, read: Read) -> PlannedTensor:
    def make() -> bytes:
        fused = np.zeros((sum(fusion.rows), fusion.rank), np.float32)
        for pair, block in zip(fusion.pairs, fusion.blocks, strict=True):
            if pair is not None and block is not None:
                block.of(fused)[:] = block.scaled(_decode(header, pair.b, read(pair.b)))
        return encode_floats(fused, fusion.b_type, header.byte_order)

    ne = (fusion.rank, sum(fusion.rows))
    n_bytes = ne[1] * _n_bytes(fusion.b_type, ne[0])
    return PlannedTensor(fusion.name + _B, ne, fusion.b_type, (Computed(n_bytes, make),))


def _encode_record(header: Header, fusions: Sequence[_Fusion], read: Read) -> list[bytes]:
    order, kinds = header.byte_order, GGUFValueType
    position = {tensor.name: at for at, tensor in enumerate(header.tensors)}
    types, positions, stored, originals = [], [], [], bytearray()
    for fusion in fusions:
        for part, whole in zip(fusion.parts, fusion.stored, strict=True):
            types.append(_NONE if part is None else part.type)
            positions.append(_NONE if part is None else position[part.name])
            stored.append(len(originals) if part and whole else _NONE)
            if part and whole:
                originals += read(part)
    rows = [n for fusion in fusions for n in fusion.rows]
    ranks = [pair.rank if pair else 0 for fusion in fusions for pair in fusion.pairs]
    pairs = record.start(header, [fusion.name for fusion in fusions])
    pairs += [
        encode_pair(ROWS_KEY, kinds.UINT64, rows, order),
        encode_pair(RANKS_KEY, kinds.UINT64, ranks, order),
        encode_pair(TYPES_KEY, kinds.INT64, types, order),
        encode_pair(POSITIONS_KEY, kinds.INT64, positions, order),
        encode_pair(STORED_KEY, kinds.INT64, stored, order),
    ]
    if originals:
        empty = encode_pair(ORIGINALS_KEY, kinds.UINT8, [], order)  # its length ends it
        pairs.append(empty[:-8] + len(originals).to_bytes(8, order) + originals)
    return pairs


# -- unfuse -------------------------------------------------------------------------------------


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
    pairs, fusions = _pairs(header), _recorded(header)
    for fusion in fusions:
        if fusion.name not in pairs:
            record.damaged(header, f"{fusion.name!r} is recorded, which the adapter does not have")
    placed: dict[int, PlannedTensor] = {}
    for fusion in fusions:
        for at, part in _restored(header, pairs[fusion.name], fusion, read):
            if at in placed:
                record.damaged(header, f"{POSITIONS_KEY} has {at} twice")
            placed[at] = part
    gone = {fusion.name + end for fusion in fusions for end in (_A, _B)}
    rest = [untouched(header, tensor) for tensor in header.tensors if tensor.name not in gone]
    changed = [
        Layer(
            fusion.name.removesuffix(f".{QKV.fused}.weight"),
            Status.FUSED,
            (_types(pairs[fusion.name]),),
            fusion.rows,
        )
        for fusion in fusions
    ]
    return record.unfused_plan(header, record.put_back(header, placed, rest), changed)


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


def _recorded(header: Header) -> list[_Recorded]:
    names = record.names(header)
    for name in names:
        if not name.endswith(f".{QKV.fused}.weight"):
            record.damaged(header, f"{name!r} is recorded, which is no {QKV.fused}")

    def numbers(key: str, each: int) -> Iterator[tuple[int, ...]]:
        values = record.array(header, key, int, each * len(names))
        return (tuple(values[at : at + each]) for at in range(0, len(values), each))

    return [
        _Recorded(*columns)
        for columns in zip(
            names,
            numbers(ROWS_KEY, 3),
            numbers(RANKS_KEY, 3),
            numbers(TYPES_KEY, 6),
            numbers(POSITIONS_KEY, 6),
            numbers(STORED_KEY, 6),
            strict=True,
        )
    ]


def _restored(
    header: Header, pair: Pair, fusion: _Recorded, read: Read
) -> Iterator[tuple[int, PlannedTensor]]:
    """Positions and tensors of the parts."""
    _check_recorded(header, pair, fusion)
    ranks = [rank or None for rank in fusion.ranks]
    blocks = _blocks(fusion.rows, ranks, pair.rank, _alpha(header) != 0)
    for index, name in enumerate(QKV.parts):
        block = blocks[index]
        if block is None:
            continue
        weight = fusion.name.replace(f".{QKV.fused}.", f".{name}.")
        shapes = ((_A, (pair.a.ne[0], block.rank)), (_B, (block.rank, block.n_rows)))
        for column, (end, ne) in zip((index, index + len(QKV.parts)), shapes, strict=True):
            kind = fusion.types[column]
            n_bytes = ne[1] * _n_bytes(kind, ne[0])
            if fusion.stored[column] != _NONE:
                piece: Segment | Computed = _stored(header, fusion.stored[column], n_bytes)
            else:
                piece = _derived(header, pair, end, block, kind, n_bytes, read)
            yield fusion.positions[column], PlannedTensor(weight + end, ne, kind, (piece,))


def _check_recorded(header: Header, pair: Pair, fusion: _Recorded) -> None:
    if sum(fusion.rows) != pair.rows or min(fusion.rows) < 1:
        record.damaged(header, f"{pair.b.name!r} has {pair.rows} rows, not {listed(fusion.rows)}")
    if min(fusion.ranks) < 0 or not 0 < sum(fusion.ranks) <= pair.rank:
        record.damaged(header, f"{pair.a.name!r} has {pair.rank}, not {listed(fusion.ranks)} ranks")
    for index, rank in enumerate(fusion.ranks):
        for column, tensor in ((index, pair.a), (index + len(QKV.parts), pair.b)):
            kind = fusion.types[column]
            known = row_bytes(kind, 0) is not None
            derivable = kind in FLOATS and tensor.type in FLOATS
            copied = column == index and kind == tensor.type
            if rank and not (known and (derivable or copied or fusion.stored[column] != _NONE)):
                record.damaged(header, f"{TYPES_KEY} has {kind} for a part of {tensor.name!r}")
            width = pair.a.ne[0] if column == index else rank
            if rank and width % GGML_QUANT_SIZES[GGMLQuantizationType(kind)][0]:
                record.damaged(header, f"{TYPES_KEY} has {kind} for rows of {width}")


def _stored(header: Header, offset: int, n_bytes: int) -> Segment:
    """A range of the metadata: an array of bytes ends its pair."""
    head = header.metadata.array_head(ORIGINALS_KEY) if ORIGINALS_KEY in header.metadata else None
    if head is None or head[0] != GGUFValueType.UINT8 or not 0 <= offset <= head[1] - n_bytes:
        record.damaged(
            header, f"{ORIGINALS_KEY} does not hold bytes {offset} to {offset + n_bytes}"
        )
    pair = header.metadata.segment(ORIGINALS_KEY)
    return Segment(pair.start + pair.n_bytes - head[1] + offset, n_bytes)


def _derived(
    header: Header, pair: Pair, end: str, block: _Block, kind: int, n_bytes: int, read: Read
) -> Segment | Computed:
    if end == _A and kind == pair.a.type:
        above = block.first_rank * _n_bytes(kind, pair.a.ne[0])  # rows of the parts before
        return Segment(data_of(header, pair.a).start + above, n_bytes)

    def make() -> bytes:
        if end == _A:
            values = _decode(header, pair.a, read(pair.a))
            values = values[block.first_rank : block.first_rank + block.rank]
        else:
            values = block.unscaled(block.of(_decode(header, pair.b, read(pair.b))))
        return encode_floats(values, kind, header.byte_order)

    return Computed(n_bytes, make)


# -- numbers ------------------------------------------------------------------------------------


def _n_bytes(kind: int, n_elements: int) -> int:
    n_bytes = row_bytes(kind, n_elements)
    assert n_bytes is not None, "types are checked before"
    return n_bytes


def _decode(header: Header, tensor: TensorInfo, data: bytes) -> NDArray[np.float32]:
    """Values of a tensor, [ne[1], ne[0]]. Raises Refused for types that cannot be decoded."""
    try:
        return dequantized(header, tensor, data)
    except GGUFError:
        raise Refused(
            f"{header.path}: {tensor.name!r} is of {type_name(tensor.type)}, which cannot be "
            "joined with others; convert the adapter to F16"
        ) from None
