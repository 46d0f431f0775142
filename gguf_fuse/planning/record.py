"""The record of a fusion in a file's metadata: what models, adapters and matrices share of it.

What gguf-fuse did it writes under `gguf_fuse.`: which tensors it made and where their parts stood.
The way back puts them there again, and leaves the record out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from gguf_fuse.format.header import MAX_PAIRS, Header
from gguf_fuse.format.source import GGUFError, Segment
from gguf_fuse.format.values import ValueType, encode_pair
from gguf_fuse.planning.fusions import GATE_UP, fusion_of
from gguf_fuse.planning.plan import (
    KEY_PREFIX,
    Layer,
    NothingToDo,
    Plan,
    PlannedTensor,
    Refused,
    untouched,
)

# Files with Q, K and V alone stay what they were in version 1: earlier releases can unfuse them.
RECORD_VERSIONS = (1, 2)

VERSION_KEY = KEY_PREFIX + "version"
TENSORS_KEY = KEY_PREFIX + "tensors"
ROWS_KEY = KEY_PREFIX + "rows"
POSITIONS_KEY = KEY_PREFIX + "positions"
RECORD_KEYS = (VERSION_KEY, TENSORS_KEY, ROWS_KEY, POSITIONS_KEY)  # of a model
# How many tensors each shard had before fusing: K or V may have lain in another shard than Q.
SHARDS_KEY = KEY_PREFIX + "shards"
PADDING_KEY = KEY_PREFIX + "padding"  # zeros that move the data to where it can be cloned
# Of adapters. NOT_THERE: a part that the adapter does not have, or an original not stored.
RANKS_KEY = KEY_PREFIX + "ranks"
TYPES_KEY = KEY_PREFIX + "types"
STORED_KEY = KEY_PREFIX + "stored"
ORIGINALS_KEY = KEY_PREFIX + "originals"
TENSOR_KEYS = (TYPES_KEY, POSITIONS_KEY, STORED_KEY)  # a number for each A, then each B
NOT_THERE = -1
# Pairs that the record, the padding and the keys of shards take, and some to spare.
ROOM = 16


def exists(header: Header) -> bool:
    return any(key.startswith(KEY_PREFIX) for key in header.metadata)


def start(header: Header, fused: Sequence[str]) -> list[bytes]:
    """The pairs that every record begins with. fused: names of tensors."""
    order = header.byte_order
    return [
        encode_pair(VERSION_KEY, ValueType.UINT32, version_of(fused), order),
        encode_pair(TENSORS_KEY, ValueType.STRING, list(fused), order),
    ]


def version_of(fused: Iterable[str]) -> int:
    """Of a record of these fused tensors."""
    return 2 if any(fusion_of(name) is GATE_UP for name in fused) else 1


def version(header: Header, known: Sequence[int]) -> object:
    """One of the known ones. Raises GGUFError where the record is of another release."""
    found = header.metadata.get(VERSION_KEY)
    if found not in known:
        releases = " and ".join(map(str, known))
        damaged(header, f"{VERSION_KEY} is {found}, this release knows {releases}")
    return found


def names(header: Header) -> list[str]:
    """The fused tensors of an adapter or a matrix. Raises GGUFError for a record that is damaged
    or of another release; version 2 is for models alone.
    """
    version(header, known=RECORD_VERSIONS[:1])
    found: list[str] = array(header, TENSORS_KEY, str)
    require_distinct(header, found)
    return found


def require_distinct(header: Header, fused: Sequence[str]) -> None:
    """Raises GGUFError if no tensor is fused, or one twice."""
    if not fused or len(set(fused)) < len(fused):
        damaged(header, f"{TENSORS_KEY} names no tensor, or one twice")


def array(header: Header, key: str, element: type, length: int | None = None) -> list[Any]:
    """An array of the record. Raises GGUFError if it is not there or does not fit."""
    values = header.metadata.get(key)
    if not isinstance(values, list) or not all(type(value) is element for value in values):
        damaged(header, f"{key} is missing or of the wrong type")
    if length is not None and len(values) != length:
        damaged(header, f"{key} has {len(values)} numbers, not {length}")
    return values


def damaged(header: Header, problem: str) -> NoReturn:
    raise GGUFError(f"{header.path}: {problem}: the record of the fusion does not fit the file")


# A restored tensor and its position in the restored file; None: where the fused one stands.
Placed = tuple[int | None, PlannedTensor]
Restored = Mapping[str, Sequence[Placed]]  # by the name of the fused tensor


def _put_back(header: Header, restored: Restored) -> tuple[PlannedTensor, ...]:
    """Restored tensors at their places, the others in their order between them.

    Raises GGUFError if the places are none of the restored file, or a place or name comes twice.
    """
    placed: dict[int, PlannedTensor] = {}
    others: list[PlannedTensor] = []
    for tensor in header.tensors:
        for at, part in restored.get(tensor.name, [(None, untouched(tensor))]):
            if at is None:
                others.append(part)
            elif at in placed:
                damaged(header, f"{POSITIONS_KEY} has {at} twice")
            else:
                placed[at] = part
    n_tensors = len(placed) + len(others)
    if not all(0 <= at < n_tensors for at in placed):
        damaged(header, f"positions are not places among {n_tensors} tensors")
    rest = iter(others)
    tensors = tuple(placed.get(at) or next(rest) for at in range(n_tensors))
    twice = [name for name, n in Counter(tensor.name for tensor in tensors).items() if n > 1]
    if twice:
        raise GGUFError(f"{header.path}: tensor {twice[0]!r} stands beside its fused form")
    return tensors


def fused_plan(
    header: Header,
    pairs: Sequence[bytes],
    tensors: Iterable[PlannedTensor],
    layers: Sequence[Layer],
    changed: Sequence[Layer],
) -> Plan:
    """The plan of the fused file. pairs: the record. changed: those of `layers` it fuses.

    Raises Refused where the file would have more pairs than can be read again.
    """
    if len(header.metadata) > MAX_PAIRS - ROOM:
        raise Refused(
            f"{header.path}: {len(header.metadata)} metadata pairs leave no room for ours; "
            f"{MAX_PAIRS - ROOM} would"
        )
    own: list[Segment | bytes] = [header.metadata.segment(key) for key in header.metadata]
    taken = {layer.label for layer in changed}
    skipped = [layer for layer in layers if layer.label not in taken]
    return _plan(header, [*own, *pairs], tensors, changed, skipped, may_add_keys=True)


def unfused_plan(header: Header, restored: Restored, changed: Sequence[Layer]) -> Plan:
    """The plan of the restored file: without the record. Raises GGUFError as `_put_back` does."""
    kept = [key for key in header.metadata if not key.startswith(KEY_PREFIX)]
    metadata = [header.metadata.segment(key) for key in kept]
    return _plan(header, metadata, _put_back(header, restored), changed, (), may_add_keys=False)


def _plan(
    header: Header,
    metadata: Sequence[Segment | bytes],
    tensors: Iterable[PlannedTensor],
    changed: Sequence[Layer],
    skipped: Sequence[Layer],
    *,
    may_add_keys: bool,
) -> Plan:
    layout = header.version, header.byte_order, header.alignment
    layers = tuple(changed), tuple(skipped)
    return Plan(*layout, tuple(metadata), tuple(tensors), *layers, may_add_keys)


def refuse_twice(header: Header) -> None:
    """Raises NothingToDo for a file that gguf-fuse has fused."""
    if exists(header):
        raise NothingToDo(header, "nothing to fuse: gguf-fuse has fused this file already")
