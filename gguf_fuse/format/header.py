"""GGUF: bytes <-> Header. Knows the file format, nothing of fusion.

The reader walks the header and decodes nothing that nobody asks for: a 128k-token vocabulary is
8 MB of strings that are only skipped over. Every count and length is checked against the size of
the file before anything is allocated for it, with Python's unbounded integers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import os
import stat
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

ByteOrder = Literal["little", "big"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_KEY_BYTES = 65535  # the specification's limit; tensor names are held to it as well
MAX_ARRAY_DEPTH = 8
# No real file comes near these; they bound the time that a damaged one can take.
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_STRINGS = 1 << 22  # in arrays of the metadata; the largest vocabularies have half a million
MAX_NESTED_ARRAYS = 1 << 17
MAX_DECODED_BYTES = 1 << 23  # of one value that somebody asks for

_FIXED_HEADER_BYTES = 24  # magic, version, tensor count, metadata count
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, one byte of key, value type, one byte of value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # name length, one byte of name, n_dims, type, offset
_WINDOW_BYTES = 1 << 20

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
_SCALAR_BYTES = {int(kind): struct.calcsize(code) for kind, code in _SCALARS.items()}
_VALUE_TYPES = {int(kind): kind for kind in GGUFValueType}
_INTEGERS = frozenset(kind for kind, code in _SCALARS.items() if code in "BbHhIiQq")
_BLOCKS = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}

# Types of well-known arrays: a wrong one made other readers run past the end of the array.
_ARRAY_TYPES = {
    "tokenizer.ggml.tokens": {GGUFValueType.STRING},
    "tokenizer.ggml.merges": {GGUFValueType.STRING},
    "tokenizer.ggml.scores": {GGUFValueType.FLOAT32, GGUFValueType.INT32},
    "tokenizer.ggml.token_type": {GGUFValueType.INT32, GGUFValueType.UINT32},
}
_PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


# Where a file is split into shards, a position is a number of the file and a byte in it, in one
# integer: whoever only passes it on, or adds to it, needs to know nothing of shards.
_FILE_BITS = 63  # more than any byte's position in a file has


class GGUFError(Exception):
    """A bad input or an I/O failure, as one line for the user: place, value, limit, remedy."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor list.

    ne: dimensions in file order, the row length first.
    type: ggml type id; ids that this gguf-py does not know are allowed.
    offset: bytes from the start of the data.
    n_bytes: size of the data; of an unknown type, up to the next tensor.
    """

    name: str
    ne: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of bytes of a file; start counts from the start of the file, see `locate`."""

    start: int
    n_bytes: int


class _Span(NamedTuple):
    """Where a metadata pair lies in the file; value: after key and value type.

    element, length: of an array, else None and 0.
    """

    start: int
    value: int
    end: int
    type: GGUFValueType
    element: GGUFValueType | None
    length: int


class Metadata(Mapping[str, Any]):
    """The metadata pairs. A value is read from the file and decoded when it is asked for."""

    def __init__(
        self, path: str, stamp: Stamp, spans: dict[str, _Span], byte_order: ByteOrder
    ) -> None:
        self._path = path
        self._stamp = stamp
        self._spans = spans
        self._byte_order = byte_order
        self._prefix = _struct_prefix(byte_order)

    def __getitem__(self, key: str) -> Any:
        """The value. Raises GGUFError if it takes more than MAX_DECODED_BYTES."""
        span = self._spans[key]
        data = self._read(key, span.value, span.end)
        return self._decode(data, span.type, 0)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, key: object) -> bool:
        return key in self._spans  # Mapping's own would decode the value

    def without(self, keys: Collection[str]) -> Metadata:
        """The same pairs, less those of the keys."""
        rest = {key: span for key, span in self._spans.items() if key not in keys}
        return Metadata(self._path, self._stamp, rest, self._byte_order)

    @property
    def n_bytes(self) -> int:
        return sum(span.end - span.start for span in self._spans.values())

    def segment(self, key: str) -> Segment:
        """Where the pair lies in the file: key, value type and value."""
        span = self._spans[key]
        return Segment(span.start, span.end - span.start)

    def pair_bytes(self, key: str) -> bytes:
        """The bytes of `segment`. Raises GGUFError as looking up the value does."""
        span = self._spans[key]
        return self._read(key, span.start, span.end)

    def value_type(self, key: str) -> GGUFValueType:
        return self._spans[key].type

    def array_head(self, key: str) -> tuple[GGUFValueType, int] | None:
        """Element type and length of an array value; None for a scalar."""
        span = self._spans[key]
        return None if span.element is None else (span.element, span.length)

    def _read(self, key: str, start: int, end: int) -> bytes:
        if end - start > MAX_DECODED_BYTES:
            raise GGUFError(
                f"{self._path}: metadata key {key!r} takes {end - start} bytes, too many to look "
                f"at (the limit is {MAX_DECODED_BYTES})"
            )
        return _read_range(self._path, self._stamp, start, end - start)

    def _decode(self, data: bytes, kind: GGUFValueType, at: int) -> tuple[Any, int]:
        if kind == GGUFValueType.STRING:
            start = at + 8
            end = start + struct.unpack_from(self._prefix + "Q", data, at)[0]
            return data[start:end].decode("utf-8", "replace"), end
        if kind != GGUFValueType.ARRAY:
            code = self._prefix + _SCALARS[kind]
            return struct.unpack_from(code, data, at)[0], at + _SCALAR_BYTES[kind]
        element_id, length = struct.unpack_from(self._prefix + "IQ", data, at)
        element, at = _VALUE_TYPES[element_id], at + 12
        if element in _SCALARS:
            values = struct.unpack_from(f"{self._prefix}{length}{_SCALARS[element]}", data, at)
            return list(values), at + length * _SCALAR_BYTES[element]
        items = []
        for _ in range(length):
            item, at = self._decode(data, element, at)
            items.append(item)
        return items, at


class Stamp(NamedTuple):
    """What tells that a file is still the one that was read; mtime in nanoseconds."""

    device: int
    inode: int
    n_bytes: int
    mtime: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Header:
    """Everything before the tensor data, checked against the size of the file.

    path: the file, as messages name it. data_start: bytes from the start of the file.
    shards: of a model in several files, their headers in order; positions are as `locate` has them.
    """

    path: str
    version: int
    byte_order: ByteOrder
    alignment: int
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]
    data_start: int
    stamp: Stamp
    shards: tuple[Header, ...] = ()

    @functools.cached_property
    def architecture(self) -> str | None:
        return self.metadata.get("general.architecture")

    @property
    def is_model(self) -> bool:
        """No LoRA adapter and no importance matrix."""
        return self.metadata.get("general.type") not in ("adapter", "imatrix")

    @property
    def is_canonical(self) -> bool:
        """Laid out as llama.cpp and gguf-py write: tensors as they are listed, nothing after.

        Only such a file comes back bit for bit; of others all values do. What lies in the padding
        between tensors is not looked at.
        """
        return all(file._is_canonical_file for file in self.files)

    @property
    def _is_canonical_file(self) -> bool:
        end = 0
        for tensor in self.tensors:
            if tensor.offset != end:
                return False
            end = align(end + tensor.n_bytes, self.alignment)
        return self.data_start + end == self.stamp.n_bytes

    @property
    def files(self) -> tuple[Header, ...]:
        """What positions refer to: the shards, or the one file."""
        return self.shards or (self,)

    @property
    def file_bytes(self) -> int:
        return sum(file.stamp.n_bytes for file in self.files)


def locate(position: int) -> tuple[int, int]:
    """The number of the file, and the byte in it. In a model of one file it is always file 0."""
    return position >> _FILE_BITS, position & ((1 << _FILE_BITS) - 1)


def file_start(number: int) -> int:
    """The position of a file's first byte: `locate` gives the number back.

    A multiple of any block size, and no range runs from one file into the next.
    """
    return number << _FILE_BITS


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a GGUF file.

    Raises GGUFError for anything that is not a whole, consistent GGUF of version 2 or 3.
    """
    source = Path(path)
    try:
        if not stat.S_ISREG(source.stat().st_mode):
            raise GGUFError(f"{source}: not a regular file; give the path of a GGUF file")
        with source.open("rb", buffering=0) as file:
            return _Parser(file.fileno(), str(source)).header()
    except OSError as error:
        hint = "; a pipe cannot be read, give a file" if str(source) == "-" else ""
        raise GGUFError(f"{source}: {error.strerror}{hint}") from error


def read_tensors(header: Header, names: Iterable[str]) -> dict[str, bytes]:
    """The data of a few small tensors, by name. Raises GGUFError if it cannot be read."""
    wanted = {tensor.name: tensor for tensor in header.tensors}
    return {name: read_tensor(header, wanted[name]) for name in names}


def read_tensor(header: Header, tensor: TensorInfo) -> bytes:
    """The data of one of the header's tensors. Raises GGUFError if it cannot be read."""
    number, start = locate(header.data_start + tensor.offset)
    file = header.files[number]
    return _read_range(file.path, file.stamp, start, tensor.n_bytes)


def _read_range(path: str, stamp: Stamp, start: int, n_bytes: int) -> bytes:
    try:
        # Buffered: a single read() of the system ends at 2 GiB.
        with Path(path).open("rb") as file:
            file.seek(start)
            data = file.read(n_bytes)
            unchanged = Stamp.of(os.fstat(file.fileno())) == stamp
    except OSError as error:
        raise GGUFError(f"{path}: {error.strerror}") from error
    if not unchanged or len(data) < n_bytes:
        raise GGUFError(f"{path}: changed while it was read; run again when it is at rest")
    return data


def align(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment


def type_name(type_id: int) -> str:
    """Q4_0, F16, ...; "type 142" for an id that gguf-py does not know."""
    if type_id in _BLOCKS:
        return GGMLQuantizationType(type_id).name
    return f"type {type_id}"


def row_bytes(type_id: int, n_elements: int) -> int | None:
    """Bytes of a row of n_elements (a multiple of the block); None for an unknown type."""
    if type_id not in _BLOCKS:
        return None
    block, block_bytes = _BLOCKS[type_id]
    return n_elements // block * block_bytes


def encode_pair(
    key: str,
    kind: GGUFValueType,
    value: int | str | bytes | Sequence[int | str],
    byte_order: ByteOrder,
) -> bytes:
    """One metadata pair as bytes; a list value becomes an array of elements of the given kind.

    bytes are an array of UINT8.
    """
    prefix = _struct_prefix(byte_order)
    if isinstance(value, (int, str)):
        head = struct.pack(prefix + "I", kind)
        return _encode_string(key, prefix) + head + _encode_value(kind, value, prefix)
    head = struct.pack(prefix + "IIQ", GGUFValueType.ARRAY, kind, len(value))
    if not isinstance(value, bytes):
        value = b"".join(_encode_value(kind, item, prefix) for item in value)
    return _encode_string(key, prefix) + head + value


def encode_start(version: int, byte_order: ByteOrder, n_tensors: int, n_pairs: int) -> bytes:
    """The fixed header; the metadata pairs follow it."""
    counts = struct.pack(_struct_prefix(byte_order) + "IQQ", version, n_tensors, n_pairs)
    return MAGIC + counts


def encode_tensors(tensors: Iterable[TensorInfo], byte_order: ByteOrder) -> bytes:
    """The tensor list; zeros up to the alignment follow it, then the data."""
    prefix = _struct_prefix(byte_order)
    return b"".join(_encode_tensor(tensor, prefix) for tensor in tensors)


def _encode_tensor(tensor: TensorInfo, prefix: str) -> bytes:
    n_dims = len(tensor.ne)
    dims = struct.pack(f"{prefix}I{n_dims}Q", n_dims, *tensor.ne)
    place = struct.pack(prefix + "IQ", tensor.type, tensor.offset)
    return _encode_string(tensor.name, prefix) + dims + place


def _encode_value(kind: GGUFValueType, value: int | str, prefix: str) -> bytes:
    if isinstance(value, str):
        return _encode_string(value, prefix)
    return struct.pack(prefix + _SCALARS[kind], value)


def _encode_string(text: str, prefix: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack(prefix + "Q", len(data)) + data


def _struct_prefix(byte_order: ByteOrder) -> str:
    return "<" if byte_order == "little" else ">"


class _Parser:
    """Walks the header once, front to back, over a window of the file that moves along.

    What is only skipped is not read: memory does not grow with the header.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.stamp = Stamp.of(os.fstat(fd))
        self.file_bytes = self.stamp.n_bytes
        self.window = b""
        self.window_start = 0
        self.at = 0
        self.place = "the fixed header"
        self.byte_order: ByteOrder = "little"
        self.n_strings = 0
        self.n_arrays = 0

    def header(self) -> Header:
        version = self._version()
        n_tensors, n_pairs = self._unpack(self.u64), self._unpack(self.u64)
        self._check_count(n_pairs, _MIN_PAIR_BYTES, "metadata pairs", MAX_PAIRS)
        self._check_count(n_tensors, _MIN_TENSOR_BYTES, "tensors", MAX_TENSORS)
        metadata = self._metadata(n_pairs)
        alignment = self._alignment(metadata)
        self._check_known_keys(metadata)
        entries = self._tensor_entries(n_tensors)
        data_start = align(self.at, alignment)
        tensors = self._tensors(entries, data_start, alignment)
        return Header(
            path=self.name,
            version=version,
            byte_order=self.byte_order,
            alignment=alignment,
            metadata=metadata,
            tensors=tensors,
            data_start=data_start,
            stamp=self.stamp,
        )

    # -- fixed header -------------------------------------------------------------------------

    def _version(self) -> int:
        if self.file_bytes == 0:
            self.fail("not a GGUF file: it is empty; download or copy it again")
        start = os.read(self.fd, _FIXED_HEADER_BYTES)
        if start.startswith(b"version https://git-lfs"):
            self.fail("not a GGUF file but a Git LFS pointer to one; run git lfs pull")
        if not start.startswith(MAGIC):
            self.fail(f"not a GGUF file: it begins with {start[:4]!r} instead of {MAGIC!r}")
        self._skip(len(MAGIC))
        raw = self._take(4)
        # A version is a small number: swapped, its low half is zero.
        if raw[:2] == b"\0\0" and raw != b"\0\0\0\0":
            self.byte_order = "big"
        prefix = _struct_prefix(self.byte_order)
        self.u32, self.u64 = struct.Struct(prefix + "I"), struct.Struct(prefix + "Q")
        version = int.from_bytes(raw, self.byte_order)
        if version == 1:
            self.fail("GGUF version 1 is not supported; convert the model again with llama.cpp")
        if version not in VERSIONS:
            self.fail(f"GGUF version {version} is not supported, only versions 2 and 3")
        return version

    def _check_count(self, count: int, least_bytes: int, what: str, most: int) -> None:
        left = self.file_bytes - self.at
        if count * least_bytes > left:
            self.fail(
                f"the header says {count} {what}, more than the {left} bytes after it can hold: "
                "the file is truncated or damaged; download or copy it again"
            )
        if count > most:
            self.fail(f"the header says {count} {what}; at most {most} are supported")

    # -- metadata -----------------------------------------------------------------------------

    def _metadata(self, n_pairs: int) -> Metadata:
        spans: dict[str, _Span] = {}
        for index in range(n_pairs):
            start = self.at
            self.place = f"metadata pair {index + 1} of {n_pairs}"
            key = self._name("key")
            if key in spans:
                self.fail(f"metadata key {key!r} appears twice")
            self.place = f"metadata key {key!r}"
            kind = self._value_type()
            value = self.at
            element, length = self._skip_value(kind)
            spans[key] = _Span(start, value, self.at, kind, element, length)
        return Metadata(self.name, self.stamp, spans, self.byte_order)

    def _value_type(self) -> GGUFValueType:
        kind = self._unpack(self.u32)
        if kind not in _VALUE_TYPES:
            self.fail(f"{self.place} has value type {kind}; the highest known is 12")
        return _VALUE_TYPES[kind]

    def _skip_value(self, kind: GGUFValueType) -> tuple[GGUFValueType | None, int]:
        """Element type and length, if it is an array."""
        if kind == GGUFValueType.ARRAY:
            return self._skip_array(1)
        if kind == GGUFValueType.STRING:
            self._skip_strings(1)
        else:
            self._skip(_SCALAR_BYTES[kind])
        return None, 0

    def _skip_array(self, depth: int) -> tuple[GGUFValueType, int]:
        if depth > MAX_ARRAY_DEPTH:
            self.fail(f"{self.place} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        element = self._value_type()
        length = self._unpack(self.u64)
        what = f"elements in {self.place}"
        if element == GGUFValueType.STRING:
            self._check_count(length, 8, what, MAX_STRINGS - self.n_strings)
            self.n_strings += length
            self._skip_strings(length)
        elif element == GGUFValueType.ARRAY:
            self._check_count(length, 12, what, MAX_NESTED_ARRAYS - self.n_arrays)
            self.n_arrays += length
            for _ in range(length):
                self._skip_array(depth + 1)
        else:
            n_bytes = _SCALAR_BYTES[element]
            self._check_count(length, n_bytes, what, self.file_bytes)
            self._skip(length * n_bytes)
        return element, length

    def _skip_strings(self, count: int) -> None:
        """The hot loop: a vocabulary has some 400,000 strings, tokens and merges together."""
        unpack, window, start = self.u64.unpack_from, self.window, self.window_start
        at, last = self.at - start, len(window) - 8
        for _ in range(count):
            if at > last:
                self._load(start + at, 8)
                window, at, start = self.window, 0, self.window_start
                last = len(window) - 8
            at += 8 + unpack(window, at)[0]
        self.at = start
        self._skip(at)

    def _alignment(self, metadata: Metadata) -> int:
        key = "general.alignment"
        if key not in metadata:
            return GGUF_DEFAULT_ALIGNMENT
        if metadata.value_type(key) != GGUFValueType.UINT32:
            self._wrong_type(metadata, key, "UINT32")
        alignment = int(metadata[key])
        if alignment == 0 or alignment & (alignment - 1):
            self.fail(f"{key} is {alignment}, not a power of two")
        if alignment > self.file_bytes:
            self.fail(f"{key} is {alignment}, more than the file's {self.file_bytes} bytes")
        return alignment

    def _check_known_keys(self, metadata: Metadata) -> None:
        key = "general.architecture"
        if key in metadata and metadata.value_type(key) != GGUFValueType.STRING:
            self._wrong_type(metadata, key, "STRING")
        block_count = f"{metadata.get(key)}.block_count"
        if block_count in metadata and metadata.value_type(block_count) not in _INTEGERS:
            self._wrong_type(metadata, block_count, "an integer")
        for key, kinds in _ARRAY_TYPES.items():
            head = metadata.array_head(key) if key in metadata else None
            if key in metadata and (head is None or head[0] not in kinds):
                names = " or ".join(sorted(kind.name for kind in kinds))
                self._wrong_type(metadata, key, f"an array of {names}")
        self._check_vocabulary(metadata)

    def _check_vocabulary(self, metadata: Metadata) -> None:
        if "tokenizer.ggml.tokens" not in metadata:
            return
        n_vocab = (metadata.array_head("tokenizer.ggml.tokens") or (0, 0))[1]
        for key in _PER_TOKEN:
            length = (metadata.array_head(key) or (0, 0))[1] if key in metadata else n_vocab
            if length < n_vocab:
                self.fail(
                    f"{key} has {length} elements for {n_vocab} tokens: readers run past its end"
                )

    def _wrong_type(self, metadata: Metadata, key: str, wanted: str) -> NoReturn:
        head = metadata.array_head(key)
        found = metadata.value_type(key).name
        if head is not None:
            found = f"an array of {head[0].name}"
        self.fail(f"metadata key {key!r} is {found}, it must be {wanted}")

    # -- tensors ------------------------------------------------------------------------------

    def _tensor_entries(self, n_tensors: int) -> list[tuple[str, tuple[int, ...], int, int]]:
        """(name, ne, type, offset) of every tensor, as the file lists them."""
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for index in range(n_tensors):
            self.place = f"tensor {index + 1} of {n_tensors}"
            name = self._name("name")
            if name in entries:
                self.fail(f"tensor {name!r} appears twice")
            self.place = f"tensor {name!r}"
            n_dims = self._unpack(self.u32)
            if n_dims > MAX_DIMS:
                self.fail(f"{self.place} has {n_dims} dimensions; at most {MAX_DIMS} are allowed")
            ne = tuple(self._unpack(self.u64) for _ in range(n_dims))
            if 0 in ne:
                self.fail(f"{self.place} has a dimension of 0: {list(ne)}")
            entries[name] = (name, ne, self._unpack(self.u32), self._unpack(self.u64))
        return list(entries.values())

    def _tensors(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int
    ) -> tuple[TensorInfo, ...]:
        data_bytes = max(self.file_bytes - data_start, 0)
        for name, _, _, offset in entries:
            if offset % alignment:
                self.fail(
                    f"tensor {name!r} lies at offset {offset}, not a multiple of the alignment "
                    f"{alignment}"
                )
        by_offset = sorted(entries, key=lambda entry: entry[3])
        tensors = {}
        for index, (name, ne, kind, offset) in enumerate(by_offset):
            after = by_offset[index + 1] if index + 1 < len(by_offset) else None
            limit = data_bytes if after is None else after[3]
            n_bytes = self._n_bytes(name, ne, kind, max(limit - offset, 0))
            end = data_start + offset + n_bytes
            if end > self.file_bytes and n_bytes:
                self.fail(
                    f"tensor {name!r} ends at byte {end}, the file at byte {self.file_bytes}: it "
                    "is truncated or damaged; download or copy it again"
                )
            if after is not None and offset + max(n_bytes, 1) > limit:
                self.fail(
                    f"tensor {name!r} ({n_bytes} bytes at offset {offset}) overlaps {after[0]!r} "
                    f"at offset {limit}"
                )
            if n_bytes == 0:
                self.fail(f"tensor {name!r} of the unknown {type_name(kind)} has no data")
            tensors[name] = TensorInfo(name, ne, kind, offset, n_bytes)
        return tuple(tensors[entry[0]] for entry in entries)

    def _n_bytes(self, name: str, ne: tuple[int, ...], kind: int, room: int) -> int:
        if kind not in _BLOCKS:
            return room
        n_elements, row = 1, ne[0] if ne else 1
        for n in ne:
            n_elements *= n
        block, block_bytes = _BLOCKS[kind]
        if row % block:
            self.fail(
                f"tensor {name!r} has rows of {row} elements, not a multiple of the {block} of a "
                f"{type_name(kind)} block"
            )
        return n_elements // block * block_bytes

    # -- bytes --------------------------------------------------------------------------------

    def _name(self, what: str) -> str:
        length = self._unpack(self.u64)
        if length == 0:
            self.fail(f"{self.place} has an empty {what}")
        if length > MAX_KEY_BYTES:
            self.fail(
                f"the {what} of {self.place} is {length} bytes long; at most {MAX_KEY_BYTES} are "
                "allowed"
            )
        data = self._take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"the {what} of {self.place} is not UTF-8: {data[:32]!r}")

    def _unpack(self, layout: struct.Struct) -> int:
        value: int = layout.unpack(self._take(layout.size))[0]
        return value

    def _take(self, n_bytes: int) -> bytes:
        start = self.at - self.window_start
        if start + n_bytes > len(self.window):
            self._load(self.at, n_bytes)
            start = 0
        self.at += n_bytes
        return self.window[start : start + n_bytes]

    def _skip(self, n_bytes: int) -> None:
        if self.at + n_bytes > self.file_bytes:
            self._truncated(self.at + n_bytes)
        self.at += n_bytes

    def _load(self, start: int, n_bytes: int) -> None:
        """Move the window to where the walk goes on, over n_bytes at least."""
        if start + n_bytes > self.file_bytes:
            self._truncated(start + n_bytes)
        os.lseek(self.fd, start, os.SEEK_SET)
        self.window = os.read(self.fd, max(n_bytes, _WINDOW_BYTES))
        self.window_start = start
        if len(self.window) < n_bytes:
            self._truncated(start + n_bytes)

    def _truncated(self, end: int) -> NoReturn:
        self.fail(
            f"{self.place} runs to byte {end}, the file ends at byte {self.file_bytes}: it is "
            "truncated or damaged; download or copy it again"
        )

    def fail(self, problem: str) -> NoReturn:
        raise GGUFError(f"{self.name}: {problem}")
