"""Bytes -> Header.

The parser walks the header and decodes nothing that nobody asks for: a 128k-token vocabulary is
8 MB of strings that are only skipped over. Every count and length is checked against the size of
the file before anything is allocated for it, with Python's unbounded integers.
"""

from __future__ import annotations

import math
import os
import struct
from itertools import zip_longest
from typing import NamedTuple, NoReturn

from gguf_fuse.format.header import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_PAIRS,
    MAX_TENSORS,
    Header,
    Metadata,
    PairSpan,
    TensorInfo,
    align,
)
from gguf_fuse.format.not_gguf import START_BYTES, again, complaint
from gguf_fuse.format.source import GGUFError, OpenSource, Segment, Source, opened
from gguf_fuse.format.types import TYPES, type_name
from gguf_fuse.format.values import INTEGERS, SCALAR_BYTES, ByteOrder, ValueType, struct_prefix

VERSIONS = (2, 3)
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less the zero that ends a name in C
MAX_KEY_BYTES = 65535  # the specification's limit
MAX_ARRAY_DEPTH = 8
# No real file comes near these; they bound the time and memory that a damaged one can take.
MAX_ALIGNMENT = 1 << 24
MAX_ARCHITECTURE = 256  # characters; its keys are looked up for every layer
MAX_ALL_KEYS = 1 << 24  # bytes of all keys together
MAX_STRINGS = 1 << 22  # in arrays of the metadata; the largest vocabularies have half a million
MAX_NESTED_ARRAYS = 1 << 17
# Pairs up to SHORT_PAIR bytes are kept, MAX_KEPT bytes of them; others are read when asked for.
SHORT_PAIR = 4096
MAX_KEPT = 1 << 22

_FIXED_HEADER_BYTES = 24  # magic, version, tensor count, metadata count
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, one byte of key, value type, one byte of value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8  # name length, one byte of name, n_dims, type, offset
# The window grows with what lies behind it: few reads, and not half as much again as needed.
_WINDOW_BYTES, _MOST_WINDOW_BYTES = 1 << 20, 1 << 22

_VALUE_TYPES = {int(value_type): value_type for value_type in ValueType}

_TOKENS = "tokenizer.ggml.tokens"
# Types of well-known arrays: a wrong one made other readers run past the end of the array.
_ARRAY_TYPES = {
    _TOKENS: {ValueType.STRING},
    "tokenizer.ggml.merges": {ValueType.STRING},
    "tokenizer.ggml.scores": {ValueType.FLOAT32, ValueType.INT32},
    "tokenizer.ggml.token_type": {ValueType.INT32, ValueType.UINT32},
}
_PER_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of one GGUF file.

    Raises GGUFError for anything that is not a whole, consistent GGUF of version 2 or 3.
    """
    return header_of(Source.find(path))


def header_of(source: Source) -> Header:
    """The same of a file that was found before."""
    with opened([source]) as files:
        return _Parser(files[source]).header()


class _Entry(NamedTuple):
    """What the tensor list says of one tensor."""

    name: str
    ne: tuple[int, ...]
    type: int
    offset: int


class _Parser:
    """Walks the header once, front to back, over a window of the file that moves along.

    What is only skipped is not read: memory does not grow with the header.
    """

    def __init__(self, file: OpenSource) -> None:
        self.file = file
        self.source = file.source
        self.file_bytes = file.source.n_bytes
        self.window = b""
        self.window_start = 0
        self.at = 0
        self.place = "the fixed header"
        self.byte_order: ByteOrder = "little"
        self.n_strings = self.n_arrays = self.n_kept = 0

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
        return Header(
            path=self.source.path,
            source=self.source,
            version=version,
            byte_order=self.byte_order,
            alignment=alignment,
            end=self.at,
            metadata=metadata,
            tensors=self._tensors(entries, data_start, alignment),
            data_start=data_start,
        )

    def _version(self) -> int:
        start = self.file.read(0, min(START_BYTES, self.file_bytes))
        if not start.startswith(MAGIC):
            self.fail(complaint(self.source.path, start))
        self._skip(len(MAGIC))
        raw = self._take(4)
        # A version is a small number: swapped, its low half is zero.
        if raw[:2] == b"\0\0" and raw != b"\0\0\0\0":
            self.byte_order = "big"
        prefix = struct_prefix(self.byte_order)
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
            self._fail_cut(
                f"the header says {count} {what}, more than the {left} bytes after it can hold"
            )
        if count > most:
            self.fail(f"the header says {count} {what}; at most {most} are supported")

    def _metadata(self, n_pairs: int) -> Metadata:
        spans: dict[str, PairSpan] = {}
        n_key_bytes = 0
        for index in range(n_pairs):
            start = self.at
            self.place = f"metadata pair {index + 1} of {n_pairs}"
            key = self._name("key", MAX_KEY_BYTES)
            if key in spans:
                self.fail(f"metadata key {key!r} appears twice")
            n_key_bytes += self.at - start - 8
            if n_key_bytes > MAX_ALL_KEYS:
                self.fail(f"metadata keys of more than {MAX_ALL_KEYS} bytes are not supported")
            self.place = f"metadata key {key!r}"
            value_type = self._value_type()
            value, element, length = self.at, None, 0
            if value_type == ValueType.ARRAY:
                element, length = self._skip_array(1)
            elif value_type == ValueType.STRING:
                self._skip_strings(1)
            else:
                self._skip(SCALAR_BYTES[value_type])
            raw = self._kept(start)
            spans[key] = PairSpan(start, value, self.at, value_type, element, length, raw)
        return Metadata(self.source, spans, self.byte_order)

    def _kept(self, start: int) -> bytes | None:
        """The bytes from there to here, if they are few."""
        n_bytes, begin = self.at - start, start - self.window_start
        if n_bytes > SHORT_PAIR or self.n_kept + n_bytes > MAX_KEPT:
            return None
        self.n_kept += n_bytes
        if begin >= 0 and begin + n_bytes <= len(self.window):
            return self.window[begin : begin + n_bytes]
        return self.file.read(start, n_bytes)

    def _value_type(self) -> ValueType:
        number = self._unpack(self.u32)
        if number not in _VALUE_TYPES:
            self.fail(f"{self.place} has value type {number}; the highest known is 12")
        return _VALUE_TYPES[number]

    def _skip_array(self, depth: int) -> tuple[ValueType, int]:
        """Element type and length."""
        if depth > MAX_ARRAY_DEPTH:
            self.fail(f"{self.place} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        element, length = self._value_type(), self._unpack(self.u64)
        what = f"elements in {self.place}"
        if element == ValueType.STRING:
            self._check_count(length, 8, what, MAX_STRINGS - self.n_strings)
            self.n_strings += length
            self._skip_strings(length)
        elif element == ValueType.ARRAY:
            self._check_count(length, 12, what, MAX_NESTED_ARRAYS - self.n_arrays)
            self.n_arrays += length
            for _ in range(length):
                self._skip_array(depth + 1)
        else:
            self._check_count(length, SCALAR_BYTES[element], what, self.file_bytes)
            self._skip(length * SCALAR_BYTES[element])
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
            return DEFAULT_ALIGNMENT
        if metadata.spans[key].type != ValueType.UINT32:
            self._wrong_type(metadata, key, "UINT32")
        alignment = int(metadata[key])
        if alignment == 0 or alignment & (alignment - 1):
            self.fail(f"{key} is {alignment}, not a power of two")
        if alignment > min(self.file_bytes, MAX_ALIGNMENT):
            most = f"more than the file's {self.file_bytes} bytes"
            if alignment <= self.file_bytes:
                most = f"at most {MAX_ALIGNMENT} is supported"
            self.fail(f"{key} is {alignment}, {most}")
        return alignment

    def _check_known_keys(self, metadata: Metadata) -> None:
        spans, key = metadata.spans, "general.architecture"
        if key in spans and spans[key].type != ValueType.STRING:
            self._wrong_type(metadata, key, "STRING")
        architecture = metadata.get(key)
        n = len(architecture or "")
        if n > MAX_ARCHITECTURE:
            self.fail(f"{key} has {n} characters; at most {MAX_ARCHITECTURE} are allowed")
        key = f"{architecture}.block_count"
        if key in spans and spans[key].type not in INTEGERS:
            self._wrong_type(metadata, key, "an integer")
        for key, elements in _ARRAY_TYPES.items():
            if key in spans and spans[key].element not in elements:
                names = " or ".join(sorted(element.name for element in elements))
                self._wrong_type(metadata, key, f"an array of {names}")
        n_vocab = spans[_TOKENS].length if _TOKENS in spans else 0
        for key in _PER_TOKEN:
            n = spans[key].length if key in spans else n_vocab
            if n < n_vocab:
                self.fail(f"{key} has {n} elements for {n_vocab} tokens: readers run past its end")

    def _wrong_type(self, metadata: Metadata, key: str, wanted: str) -> NoReturn:
        self.fail(f"metadata key {key!r} is {metadata.kind(key)}, it must be {wanted}")

    def _tensor_entries(self, n_tensors: int) -> list[_Entry]:
        """Of every tensor, as the file lists them."""
        entries: dict[str, _Entry] = {}
        for index in range(n_tensors):
            self.place = f"tensor {index + 1} of {n_tensors}"
            name = self._name("name", MAX_NAME_BYTES)
            if name in entries:
                self.fail(f"tensor {name!r} appears twice")
            self.place = f"tensor {name!r}"
            n_dims = self._unpack(self.u32)
            if n_dims > MAX_DIMS:
                self.fail(f"{self.place} has {n_dims} dimensions; at most {MAX_DIMS} are allowed")
            ne = tuple(self._unpack(self.u64) for _ in range(n_dims))
            entries[name] = _Entry(name, ne, self._unpack(self.u32), self._unpack(self.u64))
        return list(entries.values())

    def _tensors(
        self, entries: list[_Entry], data_start: int, alignment: int
    ) -> tuple[TensorInfo, ...]:
        for name, _, _, offset in entries:
            if offset % alignment:
                self.fail(
                    f"tensor {name!r} lies at offset {offset}, not a multiple of the alignment "
                    f"{alignment}"
                )
        sizes = self._sizes(entries, data_start)
        return tuple(
            TensorInfo(*entry, Segment(self.source, data_start + entry.offset, sizes[entry.name]))
            for entry in entries
        )

    def _sizes(self, entries: list[_Entry], data_start: int) -> dict[str, int]:
        """Bytes of every tensor's data, by name; one without elements lies in nobody's way."""
        sizes = {entry.name: 0 for entry in entries}
        filled = [entry for entry in entries if 0 not in entry.ne]
        filled.sort(key=lambda entry: entry.offset)
        for entry, after in zip_longest(filled, filled[1:]):
            sizes[entry.name] = self._placed_bytes(entry, after, data_start)
        return sizes

    def _placed_bytes(self, entry: _Entry, after: _Entry | None, data_start: int) -> int:
        """Size of a tensor's data, which must fit before the next tensor and the file's end."""
        name, _, type_id, offset = entry
        limit = max(self.file_bytes - data_start, 0) if after is None else after.offset
        n_bytes = self._n_bytes(entry, max(limit - offset, 0))
        end = data_start + offset + n_bytes
        if end > self.file_bytes and n_bytes:
            self._fail_cut(
                f"tensor {name!r} of {type_name(type_id)} ends at byte {end}, the file at byte "
                f"{self.file_bytes}"
            )
        if after is not None and offset + max(n_bytes, 1) > limit:
            self.fail(
                f"tensor {name!r} ({n_bytes} bytes of {type_name(type_id)} at offset {offset}) "
                f"overlaps {after.name!r} at offset {limit}"
            )
        if n_bytes == 0:
            self.fail(f"tensor {name!r} of the unknown {type_name(type_id)} has no data")
        return n_bytes

    def _n_bytes(self, entry: _Entry, room: int) -> int:
        if entry.type not in TYPES:
            return room
        row = entry.ne[0] if entry.ne else 1
        name, block, block_bytes = TYPES[entry.type]
        if row % block:
            self.fail(
                f"tensor {entry.name!r} has rows of {row} elements, not a multiple of the {block} "
                f"of a {name} block"
            )
        return math.prod(entry.ne) // block * block_bytes

    def _name(self, what: str, most: int) -> str:
        length = self._unpack(self.u64)
        if length == 0:
            self.fail(f"{self.place} has an empty {what}")
        if length > most:
            self.fail(
                f"the {what} of {self.place} is {length} bytes long; at most {most} are allowed"
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
        self._check_end(self.at + n_bytes)
        self.at += n_bytes

    def _load(self, start: int, n_bytes: int) -> None:
        """Move the window to where the walk goes on, over n_bytes at least."""
        self._check_end(start + n_bytes)
        wanted = max(n_bytes, _WINDOW_BYTES, min(start // 2, _MOST_WINDOW_BYTES))
        n_bytes = min(wanted, self.file_bytes - start)
        self.window, self.window_start = self.file.read(start, n_bytes), start

    def _check_end(self, end: int) -> None:
        if end > self.file_bytes:
            self._fail_cut(f"{self.place} runs to byte {end}, the file to byte {self.file_bytes}")

    def _fail_cut(self, problem: str) -> NoReturn:
        self.fail(f"{problem}: it is truncated or damaged; {again(self.source.path)}")

    def fail(self, problem: str) -> NoReturn:
        raise GGUFError(f"{self.source.path}: {problem}")
