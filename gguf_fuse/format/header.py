"""The header of a GGUF file, or of a set of shards: everything before the tensors' data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gguf_fuse.format.source import GGUFError, Segment, Source
from gguf_fuse.format.values import (
    SCALAR_BYTES,
    SCALARS,
    ByteOrder,
    ValueType,
    array_elements,
    decode,
    encode_string,
    struct_prefix,
)

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
# No real file comes near these; they bound what a damaged one can cost.
MAX_PAIRS = 1 << 14
MAX_TENSORS = 1 << 15  # the largest models have some 5,000
MAX_DECODED_BYTES = 1 << 23  # of one value that somebody asks for
MAX_DECODED_ELEMENTS = 1 << 20  # of an array; as Python's numbers they take 36 bytes each


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor list.

    ne: dimensions in file order, the row length first. type: ggml type id, known or not. offset:
    bytes from the start of the file's data. data: where it lies; of an unknown type, up to the
    next tensor.
    """

    name: str
    ne: tuple[int, ...]
    type: int
    offset: int
    data: Segment

    @property
    def n_bytes(self) -> int:
        return self.data.n_bytes

    def read(self) -> bytes:
        """The data, of a small tensor. Raises GGUFError as `Source.read` does."""
        return self.data.read()


class PairSpan(NamedTuple):
    """Where a metadata pair lies in the file; value: after key and value type.

    element, length: of an array, else None and 0. raw: the bytes of a short pair, which are kept
    when the header is walked.
    """

    start: int
    value: int
    end: int
    type: ValueType
    element: ValueType | None
    length: int
    raw: bytes | None


class Metadata(Mapping[str, Any]):
    """The metadata pairs. A value is decoded when it is asked for; a long one is read then."""

    def __init__(self, source: Source, spans: dict[str, PairSpan], byte_order: ByteOrder) -> None:
        self._source = source
        self.spans = spans
        self._byte_order = byte_order

    def __getitem__(self, key: str) -> Any:
        """The value. Raises GGUFError if it is larger than MAX_DECODED_BYTES or _ELEMENTS allow."""
        span = self.spans[key]
        if span.length > MAX_DECODED_ELEMENTS:
            raise GGUFError(
                f"{self._source.path}: metadata key {key!r} has {span.length} elements, too many "
                f"to look at (the limit is {MAX_DECODED_ELEMENTS})"
            )
        return decode(self._bytes(key, span.value), span.type, struct_prefix(self._byte_order))[0]

    def of_layer(self, key: str, layer: int) -> Any:
        """One value for all layers, or of an array of numbers this layer's; None behind its end.

        Raises GGUFError as looking up the value does.
        """
        span = self.spans[key]
        if span.element not in SCALARS:
            return self[key]
        if layer >= span.length:
            return None
        size = SCALAR_BYTES[span.element]
        at = (layer - span.length) * size  # from the end
        data = span.raw or self._source.read(span.end + at, size)
        return decode(data, span.element, struct_prefix(self._byte_order), at % len(data))[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)

    def __contains__(self, key: object) -> bool:
        return key in self.spans  # Mapping's own would decode the value

    def without(self, keys: Collection[str]) -> Metadata:
        """The same pairs, less those of the keys."""
        rest = {key: span for key, span in self.spans.items() if key not in keys}
        return Metadata(self._source, rest, self._byte_order)

    @property
    def n_bytes(self) -> int:
        return sum(span.end - span.start for span in self.spans.values())

    def kind(self, key: str) -> str:
        """The type of a value, as messages name it."""
        span = self.spans[key]
        return span.type.name if span.element is None else f"an array of {span.element.name}"

    def segment(self, key: str) -> Segment:
        """Where the pair lies in the file: key, value type and value."""
        span = self.spans[key]
        return Segment(self._source, span.start, span.end - span.start)

    def elements(self, key: str) -> list[bytes] | None:
        """The bytes of each element; None of what is no array, or one of arrays.

        Raises GGUFError as looking up the value does.
        """
        span = self.spans[key]
        if span.element in (None, ValueType.ARRAY):
            return None
        return array_elements(self._bytes(key, span.value), self._byte_order)

    def pair_bytes(self, key: str) -> bytes:
        """The bytes of `segment`. Raises GGUFError as looking up the value does."""
        return self._bytes(key, self.spans[key].start)

    def _bytes(self, key: str, start: int) -> bytes:
        """Those of a pair from `start` on."""
        span = self.spans[key]
        n_bytes = span.end - start
        if n_bytes > MAX_DECODED_BYTES:
            raise GGUFError(
                f"{self._source.path}: metadata key {key!r} takes {n_bytes} bytes, too many to "
                f"look at (the limit is {MAX_DECODED_BYTES})"
            )
        if span.raw is not None:
            return span.raw[-n_bytes:]
        return self._source.read(start, n_bytes)


@dataclass(frozen=True)
class Header:
    """Everything before the tensor data, checked against the size of the file.

    path: the file that was asked for, as messages name it. end: where the tensor list ends;
    data_start: the same, padded; both in bytes from the start of the file. shards: of a model in
    several files, their headers in order.
    """

    path: str
    source: Source
    version: int
    byte_order: ByteOrder
    alignment: int
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]
    end: int
    data_start: int
    shards: tuple[Header, ...] = ()

    @functools.cached_property
    def architecture(self) -> str | None:
        return self.metadata.get("general.architecture")

    @functools.cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    @functools.cached_property
    def position(self) -> dict[str, int]:
        """Of each tensor in the list, by its name."""
        return {tensor.name: at for at, tensor in enumerate(self.tensors)}

    @property
    def is_model(self) -> bool:
        """No LoRA adapter and no importance matrix."""
        return self.metadata.get("general.type") not in ("adapter", "imatrix")

    @property
    def files(self) -> tuple[Header, ...]:
        """The shards, or the one file."""
        return self.shards or (self,)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(file.source for file in self.files)

    @property
    def file_bytes(self) -> int:
        return sum(source.n_bytes for source in self.sources)


def align(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment


def encode_start(version: int, byte_order: ByteOrder, n_tensors: int, n_pairs: int) -> bytes:
    """The fixed header; the metadata pairs follow it."""
    counts = struct.pack(struct_prefix(byte_order) + "IQQ", version, n_tensors, n_pairs)
    return MAGIC + counts


def encode_tensor(
    name: str, ne: tuple[int, ...], type_id: int, offset: int, byte_order: ByteOrder
) -> bytes:
    """An entry of the tensor list; zeros up to the alignment follow the last, then the data."""
    prefix = struct_prefix(byte_order)
    dims = struct.pack(f"{prefix}I{len(ne)}Q", len(ne), *ne)
    return encode_string(name, prefix) + dims + struct.pack(prefix + "IQ", type_id, offset)
