"""One Plan -> the plan of each file: a set of shards is kept, merged, or cut anew.

The format of shards is that of `format.shards`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from gguf_fuse.format.header import DEFAULT_ALIGNMENT, Header, align
from gguf_fuse.format.shards import (
    COUNT_KEY,
    NUMBER_KEY,
    SPLIT_KEYS,
    TENSORS_COUNT_KEY,
    ShardName,
)
from gguf_fuse.format.source import GGUFError, Segment
from gguf_fuse.format.values import ValueType, encode_pair
from gguf_fuse.planning.plan import Pieces, Plan, PlannedTensor
from gguf_fuse.planning.record import KEY_PREFIX, SHARDS_KEY

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_size(text: str) -> int:
    """ "4G", "500M", "1K" or bytes; a unit is a thousand of the one below. Raises ValueError."""
    match = re.fullmatch(r"([1-9][0-9]{0,14})([KMG]?)", text)
    if match is None:
        raise ValueError(f"{text!r}: write a size as 4G, 500M, 100K or a number of bytes")
    return int(match[1]) * _UNITS[match[2]]


def divide(
    source: Header,
    plan: Plan,
    output: str,
    *,
    max_bytes: int | None = None,
    max_tensors: int | None = None,
) -> list[tuple[Path, Plan]]:
    """The files that the output is to be, and the plan of each.

    With a limit they are cut anew, and the output is their prefix; where all is within it, the one
    file is called a shard, but says nothing of it. Without one, an output that is
    called like a first shard is cut where the source was; any other is one file.

    Raises GGUFError where the name does not fit the source, or the limit.
    """
    name = ShardName.parse(output)
    if max_bytes is not None or max_tensors is not None:
        prefix = output.removesuffix(".gguf") if name is None else name.prefix
        groups = _groups(plan, max_bytes, max_tensors)
        parts = _cut(plan, groups) if len(groups) > 1 else [plan]  # one shard is no set
    elif name is None or (name.count == 1 and not source.shards):
        return [(Path(output), plan)]
    else:
        _check_name(source, output, name)
        prefix, parts = name.prefix, _cut_alike(source, plan)
    new = ShardName(prefix, 1, len(parts))
    return [(new.path(number), part) for number, part in enumerate(parts, 1)]


def _check_name(source: Header, output: str, name: ShardName) -> None:
    has = f"has {len(source.shards)} shards" if source.shards else "is one file"
    if name.count != len(source.files):
        raise GGUFError(
            f"{output}: is called shard {name.number} of {name.count}, but {source.path} {has}; "
            "--split-max-size or --split-max-tensors cuts anew, a plain name makes one file"
        )
    if name.number != 1:
        raise GGUFError(f"{output}: name the first shard, {name.path(1)}, to write them all")


def _cut_alike(source: Header, plan: Plan) -> list[Plan]:
    """Every shard keeps its own metadata, with the new count of tensors."""
    parts: list[Plan] = []
    for shard, tensors in zip(source.shards, _groups_alike(source, plan), strict=True):
        own = _own_pairs(shard, len(plan.tensors), first=not parts)
        metadata = dict(own)
        if not parts:
            # Those of the model, with the shard's own where they stood in the source.
            model = dict(plan.metadata)
            metadata = {
                key: own[key] if key in own else model[key]
                for key in shard.metadata
                if key in own or key in model
            }
            metadata |= {key: pair for key, pair in model.items() if key not in metadata}
            if plan.may_add_keys:  # not on the way back
                counts = [len(shard.tensors) for shard in source.shards]
                new = encode_pair(SHARDS_KEY, ValueType.UINT32, counts, plan.byte_order)
                metadata[SHARDS_KEY] = (new,)
        parts.append(
            replace(plan, alignment=shard.alignment, metadata=metadata, tensors=tuple(tensors))
        )
    return parts


def _own_pairs(shard: Header, n_tensors: int, *, first: bool) -> dict[str, Pieces]:
    """What a shard has beside the model's metadata, of which the first has all."""
    pairs: dict[str, Pieces] = {}
    for key in shard.metadata:
        if key.startswith(KEY_PREFIX) or (first and key not in SPLIT_KEYS):
            continue
        pairs[key] = (shard.metadata.segment(key),)
        if key == TENSORS_COUNT_KEY:
            pairs[key] = (encode_pair(key, ValueType.INT32, n_tensors, shard.byte_order),)
    return pairs


def _groups_alike(source: Header, plan: Plan) -> list[list[PlannedTensor]]:
    """The tensors of each shard: as recorded, else each where its data begins."""
    counts = source.metadata.get(SHARDS_KEY)
    if isinstance(counts, list) and len(counts) == len(source.shards):
        if any(type(n) is not int or n < 0 for n in counts) or sum(counts) != len(plan.tensors):
            raise GGUFError(f"{source.path}: {SHARDS_KEY} does not fit {len(plan.tensors)} tensors")
        rest = iter(plan.tensors)
        return [list(islice(rest, n)) for n in counts]
    number = {shard.source: at for at, shard in enumerate(source.shards)}
    groups: list[list[PlannedTensor]] = [[] for _ in source.shards]
    home = 0
    for tensor in plan.tensors:
        first = tensor.segments[0]
        home = max(home, number[first.source] if isinstance(first, Segment) else 0)
        groups[home].append(tensor)
    return groups


def _groups(
    plan: Plan, max_bytes: int | None, max_tensors: int | None
) -> list[list[PlannedTensor]]:
    """The tensors of each shard, in order."""
    groups: list[list[PlannedTensor]] = [[]]
    n_bytes = 0
    for tensor in plan.tensors:
        size = align(tensor.n_bytes, plan.alignment)
        full = max_bytes is not None and n_bytes + size > max_bytes
        if groups[-1] and (full or len(groups[-1]) == max_tensors):
            groups.append([])
            n_bytes = 0
        groups[-1].append(tensor)
        n_bytes += size
    return groups


def _cut(plan: Plan, groups: Sequence[Sequence[PlannedTensor]]) -> list[Plan]:
    """As llama-gguf-split does: all metadata in the first shard, tensors from there on."""
    order = plan.byte_order
    # A file that was merged before has keys of its own cut.
    first = {key: pair for key, pair in plan.metadata.items() if key not in SPLIT_KEYS}
    others: dict[str, Pieces] = {}  # every file tells its own alignment, unless it is the usual one
    if plan.alignment != DEFAULT_ALIGNMENT:
        key = "general.alignment"
        others[key] = (encode_pair(key, ValueType.UINT32, plan.alignment, order),)
    parts = []
    for number, group in enumerate(groups):
        own = (  # in this order, so that the shards are the very bytes of llama-gguf-split
            (NUMBER_KEY, ValueType.UINT16, number),
            (TENSORS_COUNT_KEY, ValueType.INT32, len(plan.tensors)),
            (COUNT_KEY, ValueType.UINT16, len(groups)),
        )
        metadata = dict(others if number else first)
        metadata |= {key: (encode_pair(key, kind, value, order),) for key, kind, value in own}
        parts.append(replace(plan, metadata=metadata, tensors=tuple(group)))
    return parts
