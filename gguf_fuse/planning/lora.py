"""LoRA adapters: what they hold, and how separate Q, K and V relate to the fused weight.

An adapter adds scale * B @ A to a weight, A: ne = [row length, rank], B: ne = [rank, rows]. For
attn_qkv the three A's are stacked along the rank and B is block-diagonal, so that the product has
Q's rows, then K's, then V's; a part that the adapter leaves alone has rows of zeros.

llama.cpp's scale is alpha / rank, with B's own rank (or 1, where alpha is 0). The rank R of the
fused pair is larger than a part's rank r, so the part's block of B is multiplied by R / r. R is
chosen, with a few rows of zeros in A if need be, so that every R / r is a power of two: then no
bit of a mantissa changes, and the way back is exact. Ranks whose ratios are no powers of two
(8 beside 6) have no such R: B is rounded to float32 once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.source import GGUFError
from gguf_fuse.format.types import is_known, row_bytes, type_name
from gguf_fuse.format.values import ValueType
from gguf_fuse.models.dequantize import dequantized
from gguf_fuse.planning.plan import READ_BYTES, Read, Refused

ALPHA_KEY = "adapter.lora.alpha"

A, B = ".lora_a", ".lora_b"
VALUES = READ_BYTES // 4  # that are computed at once; whole blocks of any type
WEIGHT = re.compile(r"((?:(?:enc|dec)\.)?blk\.[0-9]{1,6})\.attn_(?:q|k|v|qkv)\.weight")


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

    @property
    def types(self) -> str:
        a, b = type_name(self.a.type), type_name(self.b.type)
        return a if a == b else f"{a}/{b}"


@dataclass(frozen=True, slots=True)
class Block:
    """Where a part lies in the fused B, [rows, rank], and what its values are multiplied by.

    The factor is numerator / denominator.
    """

    first_row: int
    n_rows: int
    first_rank: int
    rank: int
    numerator: int
    denominator: int

    @property
    def ranks(self) -> slice:
        return slice(self.first_rank, self.first_rank + self.rank)

    def scaled(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return values.astype(np.float64) * self.numerator / self.denominator

    def unscaled(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):
            product = values.astype(np.float64) * self.denominator / self.numerator
            return product.astype(np.float32)


def read_pairs(header: Header) -> dict[str, Pair]:
    """By the name of the weight, of Q, K, V and fused ones.

    Raises GGUFError for pairs that llama.cpp could not load, Refused for a type that is not known.
    """
    tensors, pairs = header.by_name, {}
    for tensor in header.tensors:
        for end, other in ((A, B), (B, A)):
            name = tensor.name.removesuffix(end)
            if not tensor.name.endswith(end) or not WEIGHT.fullmatch(name):
                continue
            if name + other not in tensors:
                raise GGUFError(f"{header.path}: {tensor.name!r} has no {other[1:]} beside it")
            pairs[name] = Pair(tensors[name + A], tensors[name + B])
    for pair in pairs.values():
        _check_pair(header, pair)
    return pairs


def _check_pair(header: Header, pair: Pair) -> None:
    for tensor in (pair.a, pair.b):
        if (n_dims := len(tensor.ne)) != 2:
            raise GGUFError(f"{header.path}: {tensor.name!r} has {n_dims} dimensions, not 2")
        if 0 in tensor.ne:
            raise GGUFError(f"{header.path}: {tensor.name!r} has no elements: {list(tensor.ne)}")
        if not is_known(tensor.type):
            raise Refused(
                f"{header.path}: {tensor.name!r} is of {type_name(tensor.type)}, which this "
                "gguf-py does not know; a newer one may"
            )
    if pair.a.ne[1] != pair.b.ne[0]:
        raise GGUFError(
            f"{header.path}: {pair.a.name!r} has rank {pair.a.ne[1]}, {pair.b.name!r} has rank "
            f"{pair.b.ne[0]}"
        )


def is_scaled(header: Header) -> bool:
    """Whether llama.cpp divides by the rank: it does not where alpha is 0, or not there."""
    if ALPHA_KEY not in header.metadata:
        return False
    if header.metadata.spans[ALPHA_KEY].type != ValueType.FLOAT32:
        raise GGUFError(f"{header.path}: {ALPHA_KEY} is no float32")
    return bool(header.metadata[ALPHA_KEY] != 0)


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


def place_blocks(
    rows: Sequence[int], ranks: Sequence[int], rank: int, scaled: bool
) -> tuple[Block, ...]:
    """Of Q, K and V in the fused B. ranks: 0 for a part that is not there. rank: the fused one."""
    ends = zip(rows, accumulate(rows), ranks, accumulate(ranks), strict=True)
    return tuple(
        Block(end - n_rows, n_rows, rank_end - own, own, *((rank, own) if scaled else (1, 1)))
        for n_rows, end, own, rank_end in ends
    )


def known_rows(pairs: Mapping[str, Pair]) -> dict[str, int]:
    """Rows of attn_q, attn_k and attn_v, where all layers of the adapter that have one agree."""
    found: dict[str, set[int]] = {}
    for name, pair in pairs.items():
        found.setdefault(name.split(".")[-2], set()).add(pair.rows)
    return {part: numbers.pop() for part, numbers in found.items() if len(numbers) == 1}


def in_rows(tensor: TensorInfo) -> Iterator[TensorInfo]:
    """A matrix in pieces of whole rows, so small that memory does not grow with the adapter."""
    most = max(1, VALUES // tensor.ne[0])
    for first in range(0, tensor.ne[1], most):
        yield rows_of(tensor, first, min(most, tensor.ne[1] - first))


def in_pieces(tensor: TensorInfo) -> Iterator[TensorInfo]:
    """The same; where a row is longer than that, in pieces of a row."""
    for rows in in_rows(tensor):
        if rows.ne[0] <= VALUES:
            yield rows
            continue
        for first in range(0, rows.ne[0], VALUES):
            n = min(VALUES, rows.ne[0] - first)
            start, n_bytes = (row_bytes(rows.type, count) for count in (first, n))
            yield replace(rows, ne=(n, 1), data=rows.data.part(start, n_bytes))


def rows_of(tensor: TensorInfo, first: int, n_rows: int) -> TensorInfo:
    """Some rows of a matrix."""
    row = tensor.n_bytes // tensor.ne[1]
    data = tensor.data.part(first * row, n_rows * row)
    return replace(tensor, ne=(tensor.ne[0], n_rows), data=data)


def decoded(header: Header, tensor: TensorInfo, read: Read) -> NDArray[np.float32]:
    """Values of a matrix, or of a block of it, [ne[1], ne[0]].

    Raises Refused for types that cannot be decoded.
    """
    try:
        return dequantized(header, tensor, read(tensor.data))
    except GGUFError:
        raise Refused(
            f"{header.path}: {tensor.name!r} is of {type_name(tensor.type)}, which cannot be "
            "joined with others; convert the adapter to F16"
        ) from None
