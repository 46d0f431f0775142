"""Metadata of ORIGINAL and FUSED, compared, and whether what gguf-fuse wrote there is true."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from gguf_fuse.format.header import Header, Metadata
from gguf_fuse.format.shards import SPLIT_KEYS
from gguf_fuse.format.source import Segment
from gguf_fuse.planning import record
from gguf_fuse.planning.tensor_extra import TensorExtra
from gguf_fuse.verifying.fused import FORMS, FusedTensor, OfHeads, Stacked

MAX_HELD = 4096  # bytes of a metadata pair that is looked at as a whole
LONG_VALUE = 60  # characters of a value that a problem does not show

_OWN_KEYS = frozenset(
    {
        *record.RECORD_KEYS,
        record.SHARDS_KEY,
        record.PADDING_KEY,
        record.REPLACED_KEY,
        record.REPLACED_AT_KEY,
    }
)  # FUSED alone may have them


def compare_metadata(
    original: Header, fused: Header, made: Sequence[FusedTensor]
) -> tuple[dict[str, tuple[Segment, Segment]], list[str]]:
    """Problems; and by key the pairs that are too long to hold, to be compared with the data.

    made: what is fused, so that pairs which name tensors name these.
    """
    if original.byte_order != fused.byte_order:
        return {}, []  # every pair would differ; that problem is named already
    # How a model is cut into files is no part of it.
    before, after = (header.metadata.without(SPLIT_KEYS) for header in (original, fused))
    long_pairs: dict[str, tuple[Segment, Segment]] = {}
    problems = [f"metadata {key}: missing in the fused file" for key in before if key not in after]
    renamed = TensorExtra.of(original).renamed(_new_names(made))
    for key in after:
        if key not in before:
            if key not in _OWN_KEYS:
                problems.append(f"metadata {key}: only in the fused file")
            continue
        if key in renamed:
            if after.pair_bytes(key) != renamed[key]:
                problems.append(f"metadata {key}: does not follow the names of the fused tensors")
            continue
        a, b = before.segment(key), after.segment(key)
        if max(a.n_bytes, b.n_bytes) <= MAX_HELD:
            problems += _compare_pair(before, after, key)
        elif a.n_bytes != b.n_bytes:
            problems.append(f"metadata {key}: {a.n_bytes} bytes, but {b.n_bytes} in the fused file")
        else:
            long_pairs[key] = a, b
    return long_pairs, problems + order_problems("metadata", before, after)


def _new_names(made: Sequence[FusedTensor]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for tensor in made:
        for part in tensor.parts:
            names.setdefault(part.name, []).append(tensor.name)
    return names


def _compare_pair(before: Metadata, after: Metadata, key: str) -> list[str]:
    """As bytes: a value that only decodes to the same is not the same."""
    if before.pair_bytes(key) == after.pair_bytes(key):
        return []
    a, b = repr(before[key]), repr(after[key])
    if a == b:
        a, b = (f"of type {metadata.spans[key].type.name}" for metadata in (before, after))
    if len(a) > LONG_VALUE or len(b) > LONG_VALUE:
        return [f"metadata {key}: the value differs in the fused file"]
    return [f"metadata {key}: {a}, but {b} in the fused file"]


def order_problems(what: str, before: Iterable[str], after: Iterable[str]) -> list[str]:
    """The first name, of those that both have, that stands elsewhere."""
    wanted, there = dict.fromkeys(before), dict.fromkeys(after)
    expected = (name for name in wanted if name in there)
    for old, new in zip(expected, (name for name in there if name in wanted), strict=True):
        if old != new:
            return [f"{what} {new}: stands where {old} should stand: the order differs"]
    return []


def own_problems(original: Header, fused: Header, made: Sequence[FusedTensor]) -> list[str]:
    """Is what gguf-fuse wrote true? What ORIGINAL has too is compared as all metadata is."""
    own = fused.metadata.without(original.metadata)
    problems: list[str] = []
    if any(key in own for key in record.RECORD_KEYS):
        problems += _record_problems(original, fused.metadata, made)
    if record.REPLACED_KEY in own or record.REPLACED_AT_KEY in own:
        problems += _replaced_problems(original, fused, made)
    cuts, truth = own.get(record.SHARDS_KEY), [len(shard.tensors) for shard in original.shards]
    if cuts is not None and cuts != truth and (truth or not _could_be_cuts(cuts, original)):
        problems.append(f"metadata {record.SHARDS_KEY}: {cuts}, the original says {truth}")
    # Padding moves the tensors to where they can be cloned, and says nothing.
    padding = own.get(record.PADDING_KEY, [])
    if not _is_list(padding, int) or any(padding):
        problems.append(f"metadata {record.PADDING_KEY}: not an array of zeros")
    return problems


def _record_problems(original: Header, pairs: Metadata, made: Sequence[FusedTensor]) -> list[str]:
    """Is what gguf-fuse wrote for the way back true?"""
    if absent := [key for key in record.RECORD_KEYS if key not in pairs]:
        return [f"metadata {key}: missing, the record is incomplete" for key in absent]
    version, names, rows, positions = (pairs[key] for key in record.RECORD_KEYS)
    if version not in record.RECORD_VERSIONS:
        known = " and ".join(map(str, record.RECORD_VERSIONS))
        return [f"metadata {record.VERSION_KEY}: {version}, this release knows {known}"]
    if not (_is_list(names, str) and _is_list(rows, int) and _is_list(positions, int)):
        return [f"metadata {record.KEY_PREFIX}*: the record has values of a wrong type"]
    place = {tensor.name: at for at, tensor in enumerate(original.tensors)}
    truth = {
        t.name: (t.rows, tuple(place[part.name] for part in t.parts)) for t in made if t.recorded
    }
    # How many numbers it has for each tensor.
    counts = [tuple(map(len, truth.get(name) or _numbers_of(name))) for name in names]
    if version != _version(names, made, record.REPLACED_KEY in pairs):
        return [f"metadata {record.VERSION_KEY}: {version}, its tensors are of another version"]
    lengths = tuple(sum(column) for column in zip(*counts, strict=True)) or (0, 0)
    if lengths != (len(rows), len(positions)) or len(set(names)) < len(names):
        return [f"metadata {record.KEY_PREFIX}*: the lengths of the record's arrays do not fit"]
    unnamed = [name for name in truth if name not in names]
    problems = [f"metadata {record.TENSORS_KEY}: {name} is fused but not named" for name in unnamed]
    left_rows, left_positions = iter(rows), iter(positions)
    for name, (n_rows, n_positions) in zip(names, counts, strict=True):
        told = tuple(islice(left_rows, n_rows)), tuple(islice(left_positions, n_positions))
        if name not in truth:
            problems.append(f"metadata {record.TENSORS_KEY}: {name} is named but not fused")
            continue
        keys = record.ROWS_KEY, record.POSITIONS_KEY
        for key, said, true in zip(keys, told, truth[name], strict=True):
            if said != true:
                problems.append(f"metadata {key}: {said} for {name}, the original says {true}")
    return problems


def _numbers_of(name: str) -> tuple[Sequence[str], Sequence[str]]:
    """Of a tensor that is not fused: as many as if it were."""
    parts = next((parts for form, parts, _ in FORMS if f".{form}." in name), FORMS[0][1])
    return parts, parts


def _version(names: Sequence[str], made: Sequence[FusedTensor], replaced: bool) -> int:
    """That the record must have."""
    if any(isinstance(tensor, Stacked | OfHeads) for tensor in made):
        return 4
    if replaced:
        return 3
    return 2 if any(f".{FORMS[1][0]}." in name for name in names) else 1


def _replaced_problems(original: Header, fused: Header, made: Sequence[FusedTensor]) -> list[str]:
    """Are the pairs that were replaced recorded as ORIGINAL has them?"""
    changed = TensorExtra.of(original).renamed(_new_names(made))
    try:
        told, true = record.restored(fused), record.replaced(original, changed)
    except record.Damaged as damage:
        return [f"metadata {record.REPLACED_KEY}: {damage}"]
    splits = [{one.key for one in pairs if one.key in SPLIT_KEYS} for pairs in (told, true)]
    cut_alike = splits[0] == splits[1]  # else ORIGINAL is not the very file, and has other places
    facts = [
        [
            (cut_alike and one.place, one.pair.read())
            for one in pairs
            if cut_alike or one.key not in SPLIT_KEYS
        ]
        for pairs in (told, true)
    ]
    if facts[0] == facts[1]:
        return []
    return [f"metadata {record.REPLACED_KEY}: not the pairs that the original has"]


def _could_be_cuts(counts: Any, original: Header) -> bool:
    """Of ORIGINAL, that is one file now: how it was cut before, nobody knows."""
    n_tensors = len(original.tensors)
    return _is_list(counts, int) and min(counts, default=0) > 0 and sum(counts) == n_tensors


def _is_list(value: Any, item: type) -> bool:
    return isinstance(value, list) and all(type(x) is item for x in value)
