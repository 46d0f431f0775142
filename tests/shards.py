"""Models in several files, for tests: cut by gguf-py, or packed by hand.

The package has no say in what a set is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_fuse.api import Result, fuse
from gguf_fuse.format.source import GGUFError
from gguf_fuse.planning.record import SHARDS_KEY
from tests.conftest import FAST
from tests.edit import finish
from tests.pack import INT32, UINT16, File, valid

Model = Callable[..., Path]
Tensors = list[tuple[str, int, bytes]]


def shard_paths(prefix: Path | str, count: int) -> list[Path]:
    return [Path(f"{prefix}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


class Writer(gguf.GGUFWriter):  # type: ignore[misc, unused-ignore]
    """gguf-py's, with the keys in the order of llama-gguf-split."""

    def add_shard_kv_data(self) -> None:
        super().add_shard_kv_data()
        for pairs in self.kv_data:
            if "split.count" in pairs:
                pairs["split.count"] = pairs.pop("split.count")


def cut(path: Path, name: str, sizes: Sequence[int] = (), **limits: int) -> list[Path]:
    """The same model in shards of so many tensors, or within gguf-py's own limits, by gguf-py."""
    reader = gguf.GGUFReader(path)
    cutter = Writer if limits else gguf.GGUFWriter
    writer = cutter(path.with_name(f"{name}.gguf"), "", **limits)  # type: ignore[arg-type]
    writer.kv_data[0].clear()
    writer.data_alignment = reader.alignment
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if sizes:
        flat = list(writer.tensors[0].items())
        ends = np.cumsum(sizes)
        assert ends[-1] == len(flat)
        writer.tensors = [dict(flat[end - n : end]) for n, end in zip(sizes, ends, strict=True)]
    finish(writer)
    return shard_paths(path.with_name(name), len(writer.tensors))


def names_of(path: Path) -> list[str]:
    return [tensor.name for tensor in gguf.GGUFReader(path).tensors]


def read(paths: Sequence[Path]) -> tuple[dict[str, Any], Tensors]:
    """What gguf-py finds: the first file's metadata without what tells of shards, all tensors."""
    readers = [gguf.GGUFReader(path) for path in paths]
    ours = ("GGUF.", "split.", SHARDS_KEY)
    metadata = {
        key: field.contents()
        for key, field in readers[0].fields.items()
        if not key.startswith(ours)
    }
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    return metadata, [(t.name, int(t.tensor_type), t.data.tobytes()) for t in tensors]


def in_three(path: Path, name: str = "in") -> list[Path]:
    n = len(names_of(path))
    return cut(path, name, (5, 7, n - 12))


def between_q_k_and_v(path: Path) -> list[Path]:
    """Shards that end behind each Q and each K of every layer."""
    names = names_of(path)
    ends = [at for at, name in enumerate(names, 1) if name.endswith(("_q.weight", "_k.weight"))]
    ends.append(len(names))
    return cut(path, "in", np.diff([0, *ends]).tolist())


def one_by_one(path: Path) -> list[Path]:
    """A tensor each: where K and V were, nothing is left."""
    return cut(path, "in", split_max_tensors=1)


CUTS: dict[str, Callable[[Path], list[Path]]] = {
    "anywhere": in_three,
    "between Q, K and V": between_q_k_and_v,
    "one by one": one_by_one,
}


def kept(path: Path, name: str, count: int, way: Callable[..., Result] = fuse) -> list[Path]:
    """What `way` writes with the sharding of `path`."""
    paths = shard_paths(path.with_name(name), count)
    way(path, str(paths[0]), options=FAST)
    return paths


def good_set(n_tensors: int = 10) -> list[File]:
    """Three shards of `valid()`, by hand."""
    file = valid()
    groups = (file.tensors[:3], file.tensors[3:6], file.tensors[6:])
    made = []
    for number, tensors in enumerate(groups):
        shard = File([*file.pairs] if number == 0 else [], tensors)
        shard.key("split.no", UINT16, number).key("split.count", UINT16, 3)
        made.append(shard.key("split.tensors.count", INT32, n_tensors))
    return made


def failure(source: Path, output: Path, **options: Any) -> str:
    """The line that fusing ends with."""
    with pytest.raises(GGUFError) as caught:
        fuse(source, str(output), options=replace(FAST, **options))
    text = str(caught.value)
    assert "\n" not in text
    return text
