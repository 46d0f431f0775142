"""Models in several files: a set of shards <-> one Header, and one Plan -> a Plan for each shard.

The format is that of llama-gguf-split. A shard is called `name-00002-of-00003.gguf` and says the
same in `split.no` (from 0) and `split.count`; `split.tensors.count` is that of the whole model. All
other metadata is in the first shard. Loading begins with that one; the others are found by name.

The merged view has no `split.*` keys: what looks at it sees a model, not how it is cut.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import NoReturn

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from gguf_fuse.format.header import (
    ByteOrder,
    GGUFError,
    Header,
    Segment,
    TensorInfo,
    align,
    encode_pair,
    file_start,
    locate,
    read_header,
)
from gguf_fuse.planning.plan import KEY_PREFIX, Plan, PlannedTensor, listed

NUMBER_KEY = "split.no"
COUNT_KEY = "split.count"
TENSORS_COUNT_KEY = "split.tensors.count"
SPLIT_KEYS = (NUMBER_KEY, COUNT_KEY, TENSORS_COUNT_KEY)

# How many tensors each shard had before fusing: K or V may have lain in another shard than Q.
SHARDS_KEY = KEY_PREFIX + "shards"

MAX_SHARDS = 65535  # split.count is a UINT16

_MOST_MISSING = 8  # that a message lists

_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True, slots=True)
class ShardName:
    """A path that ends like `-00002-of-00003.gguf`. number: from 1."""

    prefix: str
    number: int
    count: int

    @classmethod
    def parse(cls, path: str) -> ShardName | None:
        match = _NAME.fullmatch(path)
        return None if match is None else cls(match[1], int(match[2]), int(match[3]))

    def path(self, number: int) -> Path:
        return Path(f"{self.prefix}{_ending(number, self.count)}")


def _ending(number: int, count: int) -> str:
    return f"-{number:05d}-of-{count:05d}.gguf"


# -- reading ------------------------------------------------------------------------------------


def read_model(path: str | os.PathLike[str]) -> Header:
    """The header of a file, or of the whole set if the file is a shard.

    Raises GGUFError as `read_header` does, and for a set that is not whole and consistent.
    """
    header = read_header(path)
    count = _count(header)
    if count <= 1:
        return header
    return _merged(header, _read_set(header, count))


def _read_set(header: Header, count: int) -> tuple[Header, ...]:
    """All shards of the set that the file belongs to, in order."""
    if count > MAX_SHARDS:
        _fail(header, f"{COUNT_KEY} is {count}, at most {MAX_SHARDS} shards are supported")
    name = ShardName.parse(header.path)
    number = _number(header)
    if name is None or name.count != count:
        _fail(
            header,
            f"is shard {number} of {count}, so its name must end in {_ending(number, count)}: the "
            "other shards are found by their names",
        )
    others = (i for i in range(1, count + 1) if i != name.number)
    missing = list(islice((i for i in others if not name.path(i).exists()), _MOST_MISSING + 1))
    if missing:
        more = ", ..." if len(missing) > _MOST_MISSING else ""
        _fail(
            header,
            f"missing of {count} shards: {listed(missing[:_MOST_MISSING])}{more}; "
            f"there is no {name.path(missing[0])}",
        )
    shards: list[Header] = []
    for at in range(1, count + 1):
        shards.append(header if at == name.number else read_header(name.path(at)))
        _check_shard(shards[-1], at, count, shards[0])
    _check_tensors(shards)
    return tuple(shards)


def _count(shard: Header) -> int:
    """How many shards a file says that there are; 0 if it says nothing of shards."""
    if COUNT_KEY not in shard.metadata:
        told = [key for key in SPLIT_KEYS if key in shard.metadata]
        if told:
            _fail(shard, f"{COUNT_KEY} is missing beside {told[0]}: is this a shard?")
        return 0
    count = shard.metadata[COUNT_KEY]
    if type(count) is not int:
        _fail(shard, f"{COUNT_KEY} is no number: is this a shard?")
    return count


def _number(shard: Header) -> int:
    """What a shard says that it is, from 1."""
    number = shard.metadata.get(NUMBER_KEY)
    if type(number) is not int:
        _fail(shard, f"{NUMBER_KEY} is missing or no number: not a shard of this set")
    return number + 1


def _check_shard(shard: Header, number: int, count: int, first: Header) -> None:
    if _count(shard) != count:
        _fail(shard, f"{COUNT_KEY} is {_count(shard)}, not {count}: not a shard of this set")
    if _number(shard) != number:
        _fail(
            shard,
            f"is shard {_number(shard)} of {count} by its {NUMBER_KEY}, shard {number} by its "
            "name: that shard is there twice, or renamed",
        )
    facts: list[tuple[str, object, object]] = [
        ("byte order", shard.byte_order, first.byte_order),
        ("GGUF version", shard.version, first.version),
    ]
    total = shard.metadata.get(TENSORS_COUNT_KEY)
    if number == 1 or total is not None:
        facts.append((TENSORS_COUNT_KEY, total, first.metadata.get(TENSORS_COUNT_KEY)))
    for what, here, there in facts:
        if here != there:
            _fail(shard, f"{what} is {here}, but {there} in {first.path}: not a shard of this set")


def _check_tensors(shards: Sequence[Header]) -> None:
    """Every tensor once, and as many as the shards say."""
    owner: dict[str, Header] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in owner:
                _fail(
                    shard,
                    f"tensor {tensor.name!r} is in {owner[tensor.name].path} too: not a shard of "
                    "this set",
                )
            owner[tensor.name] = shard
    total = shards[0].metadata.get(TENSORS_COUNT_KEY)
    if type(total) is not int:
        _fail(shards[0], f"{TENSORS_COUNT_KEY} is missing or no number")
    if total != len(owner):
        _fail(
            shards[0],
            f"{TENSORS_COUNT_KEY} is {total}, but the {len(shards)} shards hold {len(owner)} "
            "tensors: a shard is damaged or of another model",
        )


def _merged(header: Header, shards: tuple[Header, ...]) -> Header:
    """One model. The path is that of the file that was asked for."""
    first = shards[0]
    tensors = (
        _moved(tensor, file_start(number) + shard.data_start - first.data_start)
        for number, shard in enumerate(shards)
        for tensor in shard.tensors
    )
    return replace(
        first,
        path=header.path,
        metadata=first.metadata.without(SPLIT_KEYS),
        tensors=tuple(tensors),
        shards=shards,
    )


def _moved(tensor: TensorInfo, by: int) -> TensorInfo:
    return replace(tensor, offset=tensor.offset + by)


def _fail(header: Header, problem: str) -> NoReturn:
    raise GGUFError(f"{header.path}: {problem}")


# -- writing ------------------------------------------------------------------------------------


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

    With a limit they are cut anew, and the output is their prefix. Without one, an output that is
    called like a first shard is cut where the source was; any other is one file.

    Raises GGUFError where the name does not fit the source, or the limit.
    """
    name = ShardName.parse(output)
    if max_bytes is not None or max_tensors is not None:
        prefix = output.removesuffix(".gguf") if name is None else name.prefix
        groups = _groups(plan, max_bytes, max_tensors)
        if len(groups) > MAX_SHARDS:
            raise GGUFError(f"{output}: {len(groups)} shards; at most {MAX_SHARDS} are possible")
        parts = _cut(source, plan, groups)
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
    homes = _homes(source, plan)
    parts = []
    for number, shard in enumerate(source.shards):
        pieces = [
            (segment.start, _updated(shard, key, segment, len(plan.tensors)))
            for key, segment in _own_pairs(shard, number)
        ]
        metadata = tuple(piece for _, piece in pieces)
        if number == 0:
            metadata = (*_interleaved(plan.metadata, pieces), *_record(source, plan))
        part = replace(
            plan,
            alignment=shard.alignment,
            n_metadata=len(metadata),
            metadata=metadata,
            tensors=tuple(t for t, home in zip(plan.tensors, homes, strict=True) if home == number),
        )
        parts.append(part)
    return parts


def _own_pairs(shard: Header, number: int) -> Iterator[tuple[str, Segment]]:
    """What a shard has beside the model's metadata; of that, the first has all."""
    for key in shard.metadata:
        if (number > 0 or key in SPLIT_KEYS) and not key.startswith(KEY_PREFIX):
            segment = shard.metadata.segment(key)
            yield key, Segment(file_start(number) + segment.start, segment.n_bytes)


def _updated(shard: Header, key: str, segment: Segment, n_tensors: int) -> Segment | bytes:
    if key != TENSORS_COUNT_KEY:
        return segment
    return encode_pair(key, GGUFValueType.INT32, n_tensors, shard.byte_order)


def _interleaved(
    metadata: Iterable[Segment | bytes], added: Sequence[tuple[int, Segment | bytes]]
) -> Iterator[Segment | bytes]:
    """The model's pairs, and the added ones where they stood in the source."""
    rest = list(added)
    for piece in metadata:
        while rest and (isinstance(piece, bytes) or rest[0][0] < piece.start):
            yield rest.pop(0)[1]
        yield piece
    yield from (piece for _, piece in rest)


def _record(source: Header, plan: Plan) -> list[bytes]:
    if not plan.may_pad:  # the way back: nothing of ours may be added
        return []
    counts = [len(shard.tensors) for shard in source.shards]
    return [encode_pair(SHARDS_KEY, GGUFValueType.UINT32, counts, plan.byte_order)]


def _homes(source: Header, plan: Plan) -> list[int]:
    """For each tensor, the shard that it goes to: as recorded, else where its data begins."""
    counts = source.metadata.get(SHARDS_KEY)
    if isinstance(counts, list) and len(counts) == len(source.shards):
        if any(type(n) is not int or n < 0 for n in counts) or sum(counts) != len(plan.tensors):
            _fail(source, f"{SHARDS_KEY} does not fit {len(plan.tensors)} tensors")
        return list(chain.from_iterable(repeat(i, n) for i, n in enumerate(counts)))
    homes, home = [], 0
    for tensor in plan.tensors:
        home = max(home, _first_file(tensor))
        homes.append(home)
    return homes


def _first_file(tensor: PlannedTensor) -> int:
    first = tensor.segments[0]
    return locate(first.start)[0] if isinstance(first, Segment) else 0


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


def _cut(source: Header, plan: Plan, groups: Sequence[Sequence[PlannedTensor]]) -> list[Plan]:
    """As llama-gguf-split does: all metadata in the first shard, tensors from there on."""
    stale = {
        source.metadata.segment(key) for key in SPLIT_KEYS if key in source.metadata
    }  # of a file that was merged before
    first = tuple(piece for piece in plan.metadata if piece not in stale)
    others = _alignment(plan)
    parts = []
    for number, group in enumerate(groups):
        own = _split_pairs(number, len(groups), len(plan.tensors), plan.byte_order)
        metadata = (*(others if number else first), *own)
        parts.append(
            replace(plan, n_metadata=len(metadata), metadata=metadata, tensors=tuple(group))
        )
    return parts


def _alignment(plan: Plan) -> list[bytes]:
    """Every file tells its own alignment, unless it is the usual one."""
    if plan.alignment == GGUF_DEFAULT_ALIGNMENT:
        return []
    kind = GGUFValueType.UINT32
    return [encode_pair("general.alignment", kind, plan.alignment, plan.byte_order)]


def _split_pairs(number: int, count: int, n_tensors: int, order: ByteOrder) -> list[bytes]:
    """In the order of llama-gguf-split, so that the shards are its very bytes."""
    return [
        encode_pair(NUMBER_KEY, GGUFValueType.UINT16, number, order),
        encode_pair(TENSORS_COUNT_KEY, GGUFValueType.INT32, n_tensors, order),
        encode_pair(COUNT_KEY, GGUFValueType.UINT16, count, order),
    ]
