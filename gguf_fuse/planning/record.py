"""The record of a fusion in a file's metadata: what models, adapters and matrices share of it.

What gguf-fuse did it writes under `gguf_fuse.`: which tensors it made and where their parts stood.
The way back puts them there again, and leaves the record out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from gguf_fuse.format.header import MAX_PAIRS, MAX_TENSORS, Header
from gguf_fuse.format.shards import SPLIT_KEYS
from gguf_fuse.format.source import GGUFError, Segment
from gguf_fuse.format.values import (
    ByteOrder,
    ValueType,
    encode_array_start,
    encode_pair,
    key_of_pair,
)
from gguf_fuse.planning import plan, tensor_extra
from gguf_fuse.planning.fusions import FUSIONS, QKV, fusion_of
from gguf_fuse.planning.tensor_extra import TensorExtra

# Files with Q, K and V alone stay what they were in version 1: earlier releases can unfuse them.
# Version 2 has gate and up of experts, version 3 pairs that were replaced (and either fusion),
# version 4 what llama.cpp's loaders no longer read, or not as well (and all else).
RECORD_VERSIONS = (1, 2, 3, 4)

KEY_PREFIX = "gguf_fuse."  # of the metadata keys that are ours
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
# Pairs that the fused file has otherwise, or not at all: those that name tensors (`tensor_extra`),
# and how the original was cut, if it was one file. Their bytes as they were, end to end; and of
# each its place among the original's pairs and how many bytes it has.
REPLACED_KEY = KEY_PREFIX + "replaced"
REPLACED_AT_KEY = KEY_PREFIX + "replaced_at"
# Pairs that the record, the padding and the keys of shards take, and some to spare.
ROOM = 16


def exists(header: Header) -> bool:
    return any(key.startswith(KEY_PREFIX) for key in header.metadata)


def refuse_twice(header: Header, hint: str = "", layers: tuple[plan.Layer, ...] = ()) -> None:
    """Raises NothingToDo for a file that gguf-fuse has fused."""
    if exists(header):
        problem = f"nothing to fuse: gguf-fuse has fused this file already{hint}"
        raise plan.NothingToDo(header, problem, layers)


def version_of(fused: Iterable[str], replaced: bool) -> int:
    """Of a record of these fused tensors. replaced: whether pairs were."""
    fusions = {fusion_of(name) or QKV for name in fused}
    if not fusions <= set(FUSIONS):
        return 4
    if replaced:
        return 3
    return 1 if fusions <= {QKV} else 2


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
    version(header, known=(1, 3))
    found: list[str] = array(header, TENSORS_KEY, str)
    require_distinct(header, found)
    return found


def require_distinct(header: Header, fused: Sequence[str]) -> None:
    """Raises GGUFError if no tensor is fused, or one twice."""
    if not fused or len(set(fused)) < len(fused):
        damaged(header, f"{TENSORS_KEY} names no tensor, or one twice")


def array(header: Header, key: str, element: type) -> list[Any]:
    """An array of the record. Raises GGUFError if it is not there or does not fit."""
    values = header.metadata.get(key)
    if not isinstance(values, list) or not all(type(value) is element for value in values):
        damaged(header, f"{key} is missing or of the wrong type")
    return values


def groups(header: Header, key: str, n: int, each: int) -> list[tuple[int, ...]]:
    """Of an array of numbers, those of each of the n fused tensors. Raises as `array` does."""
    values = array(header, key, int)
    if len(values) != n * each:
        damaged(header, f"{key} has {len(values)} numbers, not {n * each}")
    return [tuple(values[at : at + each]) for at in range(0, len(values), each)]


class Damaged(GGUFError):
    """A record that does not fit its file."""


def damaged(header: Header, problem: str) -> NoReturn:
    raise Damaged(f"{header.path}: {problem}: the record of the fusion does not fit the file")


# A restored tensor and its position in the restored file; None: where the fused one stands.
Placed = tuple[int | None, plan.PlannedTensor]
Restored = Mapping[str, Sequence[Placed]]  # by the name of the fused tensor


def _put_back(header: Header, restored: Restored) -> tuple[plan.PlannedTensor, ...]:
    """Restored tensors at their places, the others in their order between them.

    Raises GGUFError if the places are none of the restored file, a place or name comes twice, or
    there are more tensors than can be read again.
    """
    placed: dict[int, plan.PlannedTensor] = {}
    others: list[plan.PlannedTensor] = []
    for tensor in header.tensors:
        for at, part in restored.get(tensor.name, [(None, plan.untouched(tensor))]):
            if at is None:
                others.append(part)
            elif at in placed:
                damaged(header, f"{POSITIONS_KEY} has {at} twice")
            else:
                placed[at] = part
    n_tensors = len(placed) + len(others)
    if n_tensors > MAX_TENSORS:
        raise GGUFError(
            f"{header.path}: split it has {n_tensors} tensors; at most {MAX_TENSORS} can be read"
        )
    if not all(0 <= at < n_tensors for at in placed):
        damaged(header, f"positions are not places among {n_tensors} tensors")
    rest = iter(others)
    tensors = tuple(placed.get(at) or next(rest) for at in range(n_tensors))
    twice = [name for name, n in Counter(tensor.name for tensor in tensors).items() if n > 1]
    if twice:
        raise GGUFError(f"{header.path}: tensor {twice[0]!r} stands beside its fused form")
    return tensors


@dataclass(frozen=True, slots=True)
class Replaced:
    """A pair that the fused file has otherwise, or not at all. place: among the original's."""

    place: int
    key: str
    pair: Segment


def replaced(original: Header, changed: Container[str]) -> list[Replaced]:
    """The pairs that go into the record. changed: keys that the fused file has otherwise.

    How a file is cut holds for that one alone: what it says of it is left out of the next.
    """
    return [
        Replaced(place, key, original.metadata.segment(key))
        for place, key in enumerate(original.metadata)
        if key in changed or key in SPLIT_KEYS
    ]


def restored(header: Header) -> list[Replaced]:
    """The pairs that the record has whole. Raises GGUFError where it does not fit."""
    if REPLACED_KEY not in header.metadata and REPLACED_AT_KEY not in header.metadata:
        return []
    data, numbers = array(header, REPLACED_KEY, int), array(header, REPLACED_AT_KEY, int)
    span, found, at = header.metadata.spans[REPLACED_KEY], list[Replaced](), 0
    whole = header.metadata.segment(REPLACED_KEY)
    first = whole.n_bytes - len(data)
    if min(numbers, default=0) < 0:
        damaged(header, f"{REPLACED_AT_KEY} has {min(numbers)}")
    for place, n_bytes in zip(numbers[::2], numbers[1::2], strict=False):
        try:
            key = key_of_pair(bytes(data[at : at + n_bytes]), header.byte_order)
        except ValueError:
            damaged(header, f"{REPLACED_KEY} has no pair at byte {at}")
        if not (key in SPLIT_KEYS or key.startswith(tensor_extra.PREFIX)):
            damaged(header, f"{REPLACED_KEY} has {key!r}, which is never replaced")
        found.append(Replaced(place, key, whole.part(first + at, n_bytes)))
        at += n_bytes
    if len({one.key for one in found}) < len(found):
        damaged(header, f"{REPLACED_KEY} has a key twice")
    if span.element != ValueType.UINT8 or at != len(data) or len(numbers) % 2:
        damaged(header, f"{REPLACED_KEY} and {REPLACED_AT_KEY} are of different lengths")
    return found


# An array of the record: of numbers, or of bytes as they lie in the source.
Pair = tuple[str, ValueType, Sequence[int] | Sequence[Segment]]


def _encoded(pair: Pair, byte_order: ByteOrder) -> plan.Pieces:
    key, element, values = pair
    segments = [value for value in values if isinstance(value, Segment)]
    if segments:
        n_bytes = sum(segment.n_bytes for segment in segments)
        return encode_array_start(key, element, n_bytes, byte_order), *segments
    numbers = [value for value in values if isinstance(value, int)]
    return (encode_pair(key, element, numbers, byte_order),)


def fused_plan(
    header: Header,
    layers: Sequence[plan.Layer],
    tensors: Iterable[plan.PlannedTensor],
    fused: Sequence[str],
    *pairs: Pair,
) -> plan.Plan:
    """The plan of the fused file: the fusable ones of the layers are fused.

    fused: names of the new tensors. pairs: what the record has beside them.

    Raises Refused where the file would have more pairs than can be read again.
    """
    if len(header.metadata) > MAX_PAIRS - ROOM:
        raise plan.Refused(
            f"{header.path}: {len(header.metadata)} metadata pairs leave no room for ours; "
            f"{MAX_PAIRS - ROOM} would"
        )
    order = header.byte_order
    joins = [join for layer in layers for join in layer.joins]
    names = {part.name: join.names for join in joins for part in join.parts}
    renamed = TensorExtra.of(header).renamed(names)
    past = replaced(header, renamed)
    if past:
        at = [number for one in past for number in (one.place, one.pair.n_bytes)]
        pairs += ((REPLACED_KEY, ValueType.UINT8, [one.pair for one in past]),)
        pairs += ((REPLACED_AT_KEY, ValueType.UINT64, at),)
    version = version_of(fused, bool(past))
    metadata: dict[str, plan.Pieces] = {
        key: (renamed.get(key) or header.metadata.segment(key),)
        for key in header.metadata
        if key not in SPLIT_KEYS
    }
    metadata[VERSION_KEY] = (encode_pair(VERSION_KEY, ValueType.UINT32, version, order),)
    metadata[TENSORS_KEY] = (encode_pair(TENSORS_KEY, ValueType.STRING, fused, order),)
    metadata |= {pair[0]: _encoded(pair, order) for pair in pairs}
    changed = tuple(layer for layer in layers if layer.status is plan.Status.FUSABLE)
    skipped = tuple(layer for layer in layers if layer.status is not plan.Status.FUSABLE)
    layout = header.version, order, header.alignment
    return plan.Plan(*layout, metadata, tuple(tensors), changed, skipped, may_add_keys=True)


def unfused_plan(
    header: Header,
    parts: Restored,
    changed: Sequence[plan.Layer],
    skipped: Sequence[plan.Layer],
    nothing: str,
) -> plan.Plan:
    """The plan of the restored file: without the record. Raises GGUFError as `_put_back` does.

    Raises NothingToDo where nothing is to be restored; nothing: why.
    """
    if not parts:
        raise plan.NothingToDo(header, f"nothing to unfuse: {nothing}", tuple(skipped))
    layout, tensors = (header.version, header.byte_order), _put_back(header, parts)
    metadata = _restored_metadata(header, parts)
    return plan.Plan(
        *layout, header.alignment, metadata, tensors, tuple(changed), tuple(skipped), False
    )


def _restored_metadata(header: Header, parts: Restored) -> dict[str, plan.Pieces]:
    """The original's pairs at their places; of a file without a record, with the new names."""
    past = restored(header)
    renamed: dict[str, bytes] = {}
    if not exists(header):
        names = {name: [part.name for _, part in placed] for name, placed in parts.items()}
        renamed = TensorExtra.of(header).renamed(names)
    gone = {one.key for one in past}
    pairs: list[tuple[str, plan.Pieces]] = [
        (key, (renamed.get(key) or header.metadata.segment(key),))
        for key in header.metadata
        if not key.startswith(KEY_PREFIX) and key not in gone
    ]
    for one in sorted(past, key=lambda one: one.place):
        if one.place > len(pairs):
            damaged(header, f"{REPLACED_AT_KEY} has {one.place}, past the last pair")
        pairs.insert(one.place, (one.key, (one.pair,)))
    return dict(pairs)
