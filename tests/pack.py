"""GGUF files packed by hand with struct alone: neither the package nor gguf-py had a say in them.

A file is a list of named fields, so that a test can cut it before and inside every one of them.
Whatever a file can lie about is a parameter: counts, lengths, types, dimensions, offsets.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Name = str | bytes  # bytes: what is no UTF-8
Fields = list[tuple[str, bytes]]

# Types of metadata values, in the order of their ids.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL = range(8)
STRING, ARRAY, UINT64, INT64, FLOAT64 = range(8, 13)
_CODES = dict(enumerate("BbHhIif?__Qqd"))

# Types of tensors.
F32, F16, Q4_0, Q8_0, Q4_K, Q6_K = 0, 1, 2, 8, 12, 14
_BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34), Q4_K: (256, 144)}
_BLOCKS[Q6_K] = (256, 210)

# Names in `valid()`, and how those of an adapter's tensors end.
Q, K, V = (f"blk.0.attn_{part}.weight" for part in "qkv")
QKV = "blk.0.attn_qkv.weight"
A, B = ".lora_a", ".lora_b"

LONG, INT = struct.Struct("<Q"), struct.Struct("<I")


@dataclass(frozen=True)
class Array:
    """An array value; `length` is what the file says, the number of items if it is honest."""

    value_type: int
    items: Sequence[Any] = ()
    length: int | None = None


@dataclass(frozen=True)
class Pair:
    """A metadata pair; a value given as bytes is written as it is."""

    key: Name
    value_type: int
    value: Any
    key_length: int | None = None


@dataclass(frozen=True)
class Tensor:
    """`data` is written in the order of the list, wherever `offset` says that it lies."""

    name: Name
    ne: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None
    name_length: int | None = None


@dataclass
class File:
    pairs: list[Pair]
    tensors: list[Tensor]
    version: int = 3
    order: Literal["<", ">"] = "<"
    alignment: int = 32
    n_tensors: int | None = None
    n_pairs: int | None = None

    def key(self, key: str, value_type: int, value: Any, old: str | None = None) -> File:
        """Put the pair in place of the one named `old` (default: of the same name), or append."""
        names = [pair.key for pair in self.pairs]
        at = names.index(old or key) if (old or key) in names else len(names)
        self.pairs[at : at + 1] = [Pair(key, value_type, value)]
        return self

    def tensor(self, old: str, **changes: Any) -> File:
        """Change what the file says of one tensor."""
        at = [tensor.name for tensor in self.tensors].index(old)
        self.tensors[at] = replace(self.tensors[at], **changes)
        return self

    def fields(self) -> Fields:
        fields = [
            ("magic", b"GGUF"),
            ("version", self._int("I", self.version)),
            ("tensor count", self._int("Q", _or(self.n_tensors, len(self.tensors)))),
            ("metadata count", self._int("Q", _or(self.n_pairs, len(self.pairs)))),
        ]
        for pair in self.pairs:
            fields += self._string(f"key {pair.key!r}", pair.key, pair.key_length)
            fields += [(f"type of {pair.key!r}", self._int("I", pair.value_type))]
            fields += self._value(f"value of {pair.key!r}", pair.value_type, pair.value)
        offset = 0
        for tensor in self.tensors:
            fields += self._info(tensor, offset)
            offset += -(-len(tensor.data) // self.alignment) * self.alignment
        header = sum(len(data) for _, data in fields)
        fields += [("header padding", bytes(-header % self.alignment))]
        for tensor in self.tensors:
            fields += [(f"data of {tensor.name!r}", tensor.data)]
            fields += [(f"padding of {tensor.name!r}", bytes(-len(tensor.data) % self.alignment))]
        return [(name, data) for name, data in fields if data]

    def pack(self) -> bytes:
        return b"".join(data for _, data in self.fields())

    def _int(self, code: str, value: int) -> bytes:
        return struct.pack(self.order + code, value)

    def _string(self, what: str, text: Name, length: int | None = None) -> Fields:
        data = text.encode() if isinstance(text, str) else text
        return [(f"length of {what}", self._int("Q", _or(length, len(data)))), (what, data)]

    def _value(self, what: str, value_type: int, value: Any) -> Fields:
        if isinstance(value, bytes):
            return [(what, value)]
        if value_type == STRING:
            return self._string(what, value)
        if value_type != ARRAY:
            return [(what, struct.pack(self.order + _CODES[value_type], value))]
        length = _or(value.length, len(value.items))
        fields = [(f"element type of {what}", self._int("I", value.value_type))]
        fields += [(f"array length of {what}", self._int("Q", length))]
        for item in value.items:
            fields += self._value(what, value.value_type, item)
        return fields

    def _info(self, tensor: Tensor, offset: int) -> Fields:
        fields = self._string(f"name {tensor.name!r}", tensor.name, tensor.name_length)
        fields += [("number of dimensions", self._int("I", _or(tensor.n_dims, len(tensor.ne))))]
        fields += [("dimension", self._int("Q", n)) for n in tensor.ne]
        fields += [("type", self._int("I", tensor.type))]
        return [*fields, ("offset", self._int("Q", _or(tensor.offset, offset)))]


def tensor(name: str, ne: tuple[int, ...], type: int = F32) -> Tensor:
    """An honest tensor; its data depends on its name and repeats only after 251 bytes."""
    block, block_bytes = _BLOCKS[type]
    n_bytes = block_bytes
    for n in ne:
        n_bytes *= n
    n_bytes //= block
    start = sum(name.encode()) % 251
    tile = bytes((start + i) % 251 for i in range(251))
    return Tensor(name, ne, type, (tile * (n_bytes // 251 + 1))[:n_bytes])


def valid(type: int = F32, n_layers: int = 2, n_embd: int = 32) -> File:
    """A small llama: 4 heads, 2 of them for K and V."""
    pairs = [
        Pair("general.architecture", STRING, "llama"),
        Pair("general.name", STRING, "tiny"),
        Pair("llama.block_count", UINT32, n_layers),
        Pair("llama.embedding_length", UINT32, n_embd),
        Pair("llama.attention.head_count", UINT32, 4),
        Pair("llama.attention.head_count_kv", UINT32, 2),
        Pair("tokenizer.ggml.tokens", ARRAY, Array(STRING, ["<s>", "a", "\u00e9"])),
        Pair("tokenizer.ggml.scores", ARRAY, Array(FLOAT32, [0.0, -1.0, -2.0])),
    ]
    tensors = [tensor("token_embd.weight", (n_embd, 3))]
    for layer in range(n_layers):
        for part, rows in (("q", n_embd), ("k", n_embd // 2), ("v", n_embd // 2)):
            tensors += [tensor(f"blk.{layer}.attn_{part}.weight", (n_embd, rows), type)]
        tensors += [tensor(f"blk.{layer}.attn_output.weight", (n_embd, n_embd), type)]
    return File(pairs, [*tensors, tensor("output_norm.weight", (n_embd + 1,))])


def fused(file: File) -> File:
    """The file that gguf-fuse should make of `valid()`, record and all."""
    ends = ("_q.weight", "_k.weight", "_v.weight")
    parts = [part for part in file.tensors if str(part.name).endswith(ends)]
    positions = [file.tensors.index(part) for part in parts]
    names, tensors = [], list(file.tensors)
    for q, k, v in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        names += [str(q.name).replace("attn_q.", "attn_qkv.")]
        rows = q.ne[1] + k.ne[1] + v.ne[1]
        data = q.data + k.data + v.data
        tensors[tensors.index(q)] = replace(q, name=names[-1], ne=(q.ne[0], rows), data=data)
        tensors = [t for t in tensors if t not in (k, v)]
    record = [
        Pair("gguf_fuse.version", UINT32, 1),
        Pair("gguf_fuse.tensors", ARRAY, Array(STRING, names)),
        Pair("gguf_fuse.rows", ARRAY, Array(UINT64, [part.ne[1] for part in parts])),
        Pair("gguf_fuse.positions", ARRAY, Array(UINT64, positions)),
    ]
    return replace(file, pairs=[*file.pairs, *record], tensors=tensors)


@dataclass(frozen=True)
class Sparse:
    """A file with a hole of zeros after its first bytes: large, but takes no room on the disk."""

    head: bytes
    n_bytes: int


Content = bytes | File | Sparse


def save(content: Content, path: Path) -> Path:
    if isinstance(content, Sparse):
        path.write_bytes(content.head)
        os.truncate(path, content.n_bytes)
    else:
        path.write_bytes(content.pack() if isinstance(content, File) else content)
    return path


def bare(*pairs: Pair, tensors: tuple[Tensor, ...] = ()) -> File:
    """Without tensors nothing is behind the header, no padding either."""
    return File(list(pairs), list(tensors), alignment=32 if tensors else 1)


def head_of(file: File, n_bytes: int) -> Sparse:
    """The file made `n_bytes` long by zeros that take no room."""
    return Sparse(file.pack(), n_bytes)


def unrecorded() -> File:
    """Fused by someone else: without our record."""
    file = fused(valid())
    return replace(file, pairs=file.pairs[:-4])


def lacking(file: File, *names: str) -> File:
    """The same file without some of its tensors."""
    file.tensors = [tensor for tensor in file.tensors if tensor.name not in names]
    return file


def lora(type: int = F32, rank: int = 4) -> File:
    """An adapter for `valid()`: Q, K and V of two layers."""
    pairs = [
        Pair("general.type", STRING, "adapter"),
        Pair("general.architecture", STRING, "llama"),
        Pair("adapter.type", STRING, "lora"),
        Pair("adapter.lora.alpha", FLOAT32, 8.0),
    ]
    tensors = []
    for layer in range(2):
        for part, rows in (("q", 32), ("k", 16), ("v", 16)):
            name = f"blk.{layer}.attn_{part}.weight"
            # Zeros: random bytes may be infinite.
            tensors += [Tensor(name + A, (32, rank), type, bytes(4 * 32 * rank))]
            tensors += [Tensor(name + B, (rank, rows), type, bytes(4 * rank * rows))]
    return File(pairs, tensors)


def matrix(*names: str) -> File:
    """An importance matrix with an entry of zeros for each name."""
    pairs = [Pair("general.type", STRING, "imatrix")]
    tensors = []
    for name in names:
        tensors += [Tensor(f"{name}.in_sum2", (32,), F32, bytes(128))]
        tensors += [Tensor(f"{name}.counts", (1,), F32, bytes(4))]
    return File(pairs, tensors)


def deep(depth: int) -> Array:
    """Arrays inside each other; the innermost one holds a number."""
    value = Array(UINT8, [1])
    for _ in range(depth - 1):
        value = Array(ARRAY, [value])
    return value


def _or(lie: int | None, truth: int) -> int:
    return truth if lie is None else lie
