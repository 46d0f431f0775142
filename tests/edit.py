"""Change a model: by gguf-py, the way another tool would, or byte by byte in the file."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def edited(
    source: Path,
    drop: Collection[str] = (),
    put: Mapping[str, Any] | None = None,
    *,
    architecture: str | None = None,
    record: bool = True,
) -> Path:
    """A copy beside `source`. put: arrays by tensor name, in place of one or at the end.

    record=False leaves out what gguf-fuse noted, as if a converter had written the file.
    """
    reader = gguf.GGUFReader(source)
    added = dict(put or {})
    kept = {
        key: field
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and (record or not key.startswith("gguf_fuse."))
    }
    own = str(kept.pop("general.architecture").contents())
    target = source.with_name("edited.gguf")
    writer = gguf.GGUFWriter(target, architecture or own)
    for key, field in kept.items():
        item = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        if tensor.name in added:
            writer.add_tensor(tensor.name, added.pop(tensor.name))
        elif tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in added.items():
        writer.add_tensor(name, array)
    finish(writer)
    return target


def shuffled(source: Path, target: Path, seed: int) -> None:
    """The tensors of `source` in another order, as a llama with hardly any metadata."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_custom_alignment(int(reader.alignment))
    writer.add_block_count(3)
    tensors = list(reader.tensors)
    random.Random(seed).shuffle(tensors)
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    finish(writer)


@contextmanager
def tensors_in(path: Path) -> Iterator[dict[str, Any]]:
    """The data of every tensor by name, as arrays; what is changed in them changes in the file."""
    reader = gguf.GGUFReader(path, "r+")
    yield {tensor.name: tensor.data for tensor in reader.tensors}
    reader.data.flush()  # type: ignore[attr-defined]


@contextmanager
def bytes_of(path: Path) -> Iterator[bytearray]:
    """All bytes of the file; they are written back."""
    data = bytearray(path.read_bytes())
    yield data
    path.write_bytes(data)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)
