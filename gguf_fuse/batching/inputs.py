"""What a user names -> the files of a batch, each with the name of its output."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from gguf_fuse.format.shards import ShardName
from gguf_fuse.format.source import GGUFError, expand, is_address
from gguf_fuse.writing.temporary import TEMPORARY_MARK

ENDING = ".gguf"
DEFAULT_NAME = "{name}-fused"


@dataclass(frozen=True)
class Found:
    """An input, and its output under the output folder."""

    input: str
    output: str


def find(inputs: Iterable[str], folder: Path, pattern: str = DEFAULT_NAME) -> list[Found]:
    """Files, folders (everything in them that is called .gguf), globs, addresses, and repositories
    of a hub (hf:owner/repo); shards as one input.

    A name that nothing is found by stays, so that its failure is told like any other.

    Raises GGUFError where two inputs would become one output, ValueError where the pattern has no
    {name}.
    """
    if "{name}" not in pattern or "/" in pattern or os.sep in pattern:
        raise ValueError(f"a file name with {{name}} in it, as in {DEFAULT_NAME}")
    found: dict[str, Found] = {}
    for path, below in _paths(inputs, folder.resolve()):
        name = _output_name(path.rpartition("/")[2], pattern)
        one = Found(path, str(folder.resolve() / below / name))
        other = found.setdefault(one.output, one)
        if other.input != one.input:
            raise GGUFError(
                f"{one.input} and {other.input} would both become {one.output}; do them one by "
                "one, or into folders of their own"
            )
    return list(found.values())


def _paths(inputs: Iterable[str], output_folder: Path) -> Iterator[tuple[str, Path]]:
    """Addresses, or absolute paths; and the folder of each below the one that was named."""
    for name in chain.from_iterable(map(expand, inputs)):
        if is_address(name):
            yield _first_shard(name), Path()
            continue
        for path in map(Path.absolute, _matches(Path(name))):
            if not path.is_dir():
                yield _first_shard(str(path)), Path()
                continue
            for inside in sorted(path.rglob(f"*{ENDING}")):
                ours = output_folder != path and output_folder in inside.resolve().parents
                if not ours and TEMPORARY_MARK not in inside.name:
                    yield _first_shard(str(inside)), inside.relative_to(path).parent


def _matches(named: Path) -> list[Path]:
    """What a glob finds; any other name as it is, whether it is there or not."""
    if os.path.lexists(named):
        return [named]
    found = Path(named.anchor).glob(str(named.relative_to(named.anchor)))
    return sorted(found) or [named]


def _first_shard(path: str) -> str:
    name = ShardName.parse(path)
    return path if name is None else name.name(1)


def _output_name(name: str, pattern: str) -> str:
    """Shards keep their numbers."""
    shard = ShardName.parse(name)
    if shard is None:
        return pattern.format(name=name.removesuffix(ENDING)) + ENDING
    return ShardName(pattern.format(name=shard.prefix), 1, shard.count).name(1)
