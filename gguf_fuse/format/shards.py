"""A set of shards -> one Header.

The format is that of llama-gguf-split. A shard is called `name-00002-of-00003.gguf` and says the
same in `split.no` (from 0) and `split.count`; `split.tensors.count` is that of the whole model. All
other metadata is in the first shard. Loading begins with that one; the others are found by name.

The merged header has no `split.*` keys: what looks at it sees a model, not how it is cut.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import NoReturn

from gguf_fuse.format.header import MAX_TENSORS, Header
from gguf_fuse.format.layout import refuse_unaccounted
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError, is_address

NUMBER_KEY = "split.no"
COUNT_KEY = "split.count"
TENSORS_COUNT_KEY = "split.tensors.count"
SPLIT_KEYS = (NUMBER_KEY, COUNT_KEY, TENSORS_COUNT_KEY)

MAX_SHARDS = 65535  # split.count is a UINT16; more than MAX_TENSORS

_MOST_MISSING = 8  # that a message lists

_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


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

    def name(self, number: int) -> str:
        """Of another one of the set: a path, or an address if this one is."""
        return f"{self.prefix}{_ending(number, self.count)}"

    def path(self, number: int) -> Path:
        return Path(self.name(number))


def _ending(number: int, count: int) -> str:
    return f"-{number:05d}-of-{count:05d}.gguf"


def read_model(path: str | os.PathLike[str]) -> Header:
    """The header of a file, or of the whole set if the file is a shard.

    Raises GGUFError as `read_header` does, and for a set that is not whole and consistent.
    """
    header = read_header(path)
    count = _count(header)
    if count <= 1:
        return header
    shards = _read_set(header, count)
    return replace(
        shards[0],
        path=header.path,
        metadata=shards[0].metadata.without(SPLIT_KEYS),
        tensors=tuple(chain.from_iterable(shard.tensors for shard in shards)),
        shards=shards,
    )


def _read_set(header: Header, count: int) -> tuple[Header, ...]:
    """All shards of the set that the file belongs to, in order."""
    if count > MAX_SHARDS:
        _fail(header, f"{COUNT_KEY} is {count}, at most {MAX_SHARDS} shards are supported")
    name = ShardName.parse(header.path)
    number = _number(header)
    if name is None or name.count != count:
        refuse_unaccounted(header)  # shards put together with cat: that tells more
        _fail(
            header,
            f"is shard {number} of {count}, so its name must end in {_ending(number, count)}: the "
            "other shards are found by their names",
        )
    others = (i for i in range(1, count + 1) if i != name.number)
    absent = (i for i in others if not is_address(header.path) and not name.path(i).exists())
    missing = list(islice(absent, _MOST_MISSING + 1))
    if missing:
        more = ", ..." if len(missing) > _MOST_MISSING else ""
        _fail(
            header,
            f"missing of {count} shards: {str(missing[:_MOST_MISSING])[1:-1]}{more}; "
            f"there is no {name.name(missing[0])}",
        )
    shards: list[Header] = []
    n_tensors = 0
    for at in range(1, count + 1):
        shards.append(header if at == name.number else read_header(name.name(at)))
        _check_shard(shards[-1], at, count, shards[0])
        n_tensors += len(shards[-1].tensors)
        if n_tensors > MAX_TENSORS:
            _fail(header, f"the shards have more than {MAX_TENSORS} tensors")
    _check_tensors(shards)
    return tuple(shards)


def _count(shard: Header) -> int:
    """How many shards a file says that there are; 0 if it says nothing of shards."""
    told = [key for key in SPLIT_KEYS if key in shard.metadata]
    if not told:
        return 0
    if COUNT_KEY not in told:
        _fail(shard, f"{COUNT_KEY} is missing beside {told[0]}: is this a shard?")
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
    total = first.metadata.get(TENSORS_COUNT_KEY)
    for what, here, there in (
        ("byte order", shard.byte_order, first.byte_order),
        ("GGUF version", shard.version, first.version),
        (TENSORS_COUNT_KEY, shard.metadata.get(TENSORS_COUNT_KEY, total), total),
    ):
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


def _fail(header: Header, problem: str) -> NoReturn:
    raise GGUFError(f"{header.path}: {problem}")
