"""GGUF files packed by hand with struct alone: neither the package nor gguf-py had a say in them.

A file is a list of named fields, so that a test can cut it before and inside every one of them.
Whatever a file can lie about is a parameter: counts, lengths, kinds, dimensions, offsets.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Name = str | bytes  # bytes: what is no UTF-8
Fields = list[tuple[str, bytes]]

# Kinds of metadata values, in the order of their ids.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL = range(8)
STRING, ARRAY, UINT64, INT64, FLOAT64 = range(8, 13)
_CODES = dict(enumerate("BbHhIif?__Qqd"))

# Types of tensors.
F32, F16, Q4_0, Q8_0, Q4_K, Q6_K = 0, 1, 2, 8, 12, 14
_BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34), Q4_K: (256, 144)}
_BLOCKS[Q6_K] = (256, 210)


@dataclass(frozen=True)
class Array:
    """An array value; `length` is what the file says, the number of items if it is honest."""

    kind: int
    items: Sequence[Any] = ()
    length: int | None = None


@dataclass(frozen=True)
class Pair:
    """A metadata pair; a value given as bytes is written as it is."""

    key: Name
    kind: int
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

    def key(self, key: str, kind: int, value: Any, old: str | None = None) -> File:
        """Put the pair in place of the one named `old` (default: of the same name), or append."""
        names = [pair.key for pair in self.pairs]
        at = names.index(old or key) if (old or key) in names else len(names)
        self.pairs[at : at + 1] = [Pair(key, kind, value)]
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
            fields += [(f"kind of {pair.key!r}", self._int("I", pair.kind))]
            fields += self._value(f"value of {pair.key!r}", pair.kind, pair.value)
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

    def _value(self, what: str, kind: int, value: Any) -> Fields:
        if isinstance(value, bytes):
            return [(what, value)]
        if kind == STRING:
            return self._string(what, value)
        if kind != ARRAY:
            return [(what, struct.pack(self.order + _CODES[kind], value))]
        length = _or(value.length, len(value.items))
        fields = [(f"element kind of {what}", self._int("I", value.kind))]
        fields += [(f"array length of {what}", self._int("Q", length))]
        for item in value.items:
            fields += self._value(what, value.kind, item)
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


def _or(lie: int | None, truth: int) -> int:
    return truth if lie is None else lie
