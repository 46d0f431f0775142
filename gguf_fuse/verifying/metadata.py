"""Metadata of ORIGINAL and FUSED, compared, and whether what gguf-fuse wrote there is true."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from gguf_fuse.format.header import Header, Metadata
from gguf_fuse.format.shards import SPLIT_KEYS
from gguf_fuse.format.source import Segment
from gguf_fuse.planning.record import (
    KEY_PREFIX,
    PADDING_KEY,
    POSITIONS_KEY,
    RECORD_KEYS,
    RECORD_VERSIONS,
    ROWS_KEY,
    SHARDS_KEY,
    TENSORS_KEY,
    VERSION_KEY,
)
from gguf_fuse.verifying.fused import FORMS, FusedTensor

MAX_HELD = 4096  # bytes of a metadata pair that is looked at as a whole
LONG_VALUE = 60  # characters of a value that a problem does not show

_OWN_KEYS = frozenset({*RECORD_KEYS, SHARDS_KEY, PADDING_KEY})  # FUSED alone may have them


def compare_metadata(
    original: Header, fused: Header
) -> tuple[dict[str, tuple[Segment, Segment]], list[str]]:
    """Problems; and by key the pairs that are too long to hold, to be compared with the data."""
    if original.byte_order != fused.byte_order:
        return {}, []  # every pair would differ; that problem is named already
    # How a model is cut into files is no part of it.
    before, after = (header.metadata.without(SPLIT_KEYS) for header in (original, fused))
    long_pairs: dict[str, tuple[Segment, Segment]] = {}
    problems = [f"metadata {key}: missing in the fused file" for key in before if key not in after]
    for key in after:
        if key not in before:
            if key not in _OWN_KEYS:
                problems.append(f"metadata {key}: only in the fused file")
            continue
        a, b = before.segment(key), after.segment(key)
        if max(a.n_bytes, b.n_bytes) <= MAX_HELD:
            problems += _compare_pair(before, after, key)
        elif a.n_bytes != b.n_bytes:
            problems.append(f"metadata {key}: {a.n_bytes} bytes, but {b.n_bytes} in the fused file")
        else:
            long_pairs[key] = a, b
    common = [[key for key in keys if key in before and key in after] for keys in (before, after)]
    return long_pairs, problems + order_problems("metadata", *common)


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


def order_problems(what: str, before: Sequence[str], after: Sequence[str]) -> list[str]:
    for old, new in zip(before, after, strict=True):
        if old != new:
            return [f"{what} {new}: stands where {old} should stand: the order differs"]
    return []


def record_problems(original: Header, fused: Header, made: Sequence[FusedTensor]) -> list[str]:
    """Is what gguf-fuse wrote for the way back true? A file without a record is fine."""
    metadata = fused.metadata
    written = [key for key in RECORD_KEYS if key in metadata]
    if all(key in original.metadata for key in written):
        return []
    if len(written) < len(RECORD_KEYS):
        return [
            f"metadata {key}: missing, the record is incomplete"
            for key in RECORD_KEYS
            if key not in written
        ]
    version, names, rows, positions = (metadata[key] for key in RECORD_KEYS)
    if version not in RECORD_VERSIONS:
        known = " and ".join(map(str, RECORD_VERSIONS))
        return [f"metadata {VERSION_KEY}: {version}, this release knows {known}"]
    if not (_is_list(names, str) and _is_list(rows, int) and _is_list(positions, int)):
        return [f"metadata {KEY_PREFIX}*: the record has values of a wrong type"]
    counts = [_n_parts(name) for name in names]
    if version != (1 if set(counts) <= {3} else 2):
        return [f"metadata {VERSION_KEY}: {version}, its tensors are of another version"]
    if not sum(counts) == len(rows) == len(positions) or len(set(names)) < len(names):
        return [f"metadata {KEY_PREFIX}*: the lengths of the record's arrays do not fit"]
    place = {tensor.name: at for at, tensor in enumerate(original.tensors)}
    truth = {
        tensor.name: (tensor.rows, tuple(place[part.name] for part in tensor.parts))
        for tensor in made
    }
    problems = [
        f"metadata {TENSORS_KEY}: {name} is fused but not named"
        for name in truth
        if name not in names
    ]
    for name, end, count in zip(names, itertools.accumulate(counts), counts, strict=True):
        if name not in truth:
            problems.append(f"metadata {TENSORS_KEY}: {name} is named but not fused")
            continue
        told = tuple(rows[end - count : end]), tuple(positions[end - count : end])
        for key, said, true in zip((ROWS_KEY, POSITIONS_KEY), told, truth[name], strict=True):
            if said != true:
                problems.append(f"metadata {key}: {said} for {name}, the original says {true}")
    return problems


def _n_parts(name: str) -> int:
    """How many numbers the record has for a fused tensor."""
    return next((len(parts) for form, parts, _ in FORMS if f".{form}." in name), 3)


def cutting_problems(original: Header, fused: Header) -> list[str]:
    """Does the record say where ORIGINAL was cut into shards?"""
    said = fused.metadata.get(SHARDS_KEY)
    if said is None or SHARDS_KEY in original.metadata:
        return []
    truth = [len(shard.tensors) for shard in original.shards]
    fits = said == truth if truth else _is_list(said, int) and _cuts(said, len(original.tensors))
    return [] if fits else [f"metadata {SHARDS_KEY}: {said}, the original says {truth}"]


def _cuts(counts: Sequence[int], n_tensors: int) -> bool:
    return min(counts, default=0) > 0 and sum(counts) == n_tensors


def padding_problems(original: Header, fused: Header) -> list[str]:
    """It moves the tensors to where they can be cloned, and says nothing."""
    said = fused.metadata.get(PADDING_KEY)
    if said is None or PADDING_KEY in original.metadata or (_is_list(said, int) and not any(said)):
        return []
    return [f"metadata {PADDING_KEY}: not an array of zeros"]


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
