"""Metadata of one architecture, as it counts for one layer."""

from __future__ import annotations

import math
from typing import Any, Literal, NoReturn, TypeVar

from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.format.values import INTEGERS

_Number = TypeVar("_Number", int, float)

MOST = 2**32 - 1  # of a count: what UINT32 holds
MOST_CHARACTERS = 256  # of a name: it is looked at for every layer


def integer(header: Header, key: str, layer: int) -> int | None:
    """A count as it is for a layer; None where there is none.

    Raises GGUFError for what is no integer, or not 0 to MOST.
    """
    value: int | None = _value(header, key, layer, (int,), "an integer")
    if value is not None and not 0 <= value <= MOST:
        _fail(header, f"metadata key {key!r} is {value}, it must be 0 to {MOST}")
    return value


def string(header: Header, key: str) -> str | None:
    """A name; None where there is none. Raises GGUFError for what is no string, or too long."""
    value: str | None = _value(header, key, 0, (str,), "a string")
    if value is not None and len(value) > MOST_CHARACTERS:
        _fail(header, f"metadata key {key!r} is longer than {MOST_CHARACTERS} characters")
    return value


def _value(header: Header, key: str, layer: int, types: tuple[type, ...], wanted: str) -> Any:
    metadata = header.metadata
    value = metadata.of_layer(key, layer) if key in metadata else None
    if value is not None and type(value) not in types:
        _wrong_type(header, key, wanted)
    return value


def _wrong_type(header: Header, key: str, wanted: str) -> NoReturn:
    _fail(header, f"metadata key {key!r} is {header.metadata.kind(key)}, it must be {wanted}")


def _fail(header: Header, problem: str) -> NoReturn:
    raise GGUFError(f"{header.path}: {problem}")


class NotModelled(GGUFError):
    """The file is sound, but this attention is not one that `attention_table` describes."""


class Keys:
    """The metadata that a layer's attention is read from; keys stand without "<architecture>."."""

    def __init__(self, header: Header, index: int) -> None:
        self.header = header
        self.index = index
        self.prefix = f"{header.architecture}."

    def is_array(self, key: str) -> bool:
        spans = self.header.metadata.spans
        return self.prefix + key in spans and spans[self.prefix + key].element is not None

    def raw(self, key: str) -> Any:
        return self.header.metadata.get(self.prefix + key)

    def number(self, key: str, default: float | None = None) -> float:
        """The value for this layer.

        Raises GGUFError for what is no finite number, NotModelled for what is missing without a
        default.
        """
        value: float | None = _value(
            self.header, self.prefix + key, self.index, (int, float), "a number"
        )
        if value is not None and not math.isfinite(value):
            self.fail(f"metadata key {self.prefix + key!r} is {value}, it must be finite")
        return self._found(key, value, default)

    def integer(self, key: str, default: int | None = None, index: int | None = None) -> int:
        """A count for layer `index`, or this layer's. Raises as the function, or if missing."""
        layer = self.index if index is None else index
        return self._found(key, integer(self.header, self.prefix + key, layer), default)

    def flag(self, key: str, default: bool) -> bool:
        """Raises GGUFError for what is no BOOL."""
        value = _value(self.header, self.prefix + key, self.index, (bool,), "BOOL")
        return default if value is None else bool(value)

    def mark(self, key: str) -> bool:
        """Of an array with a BOOL or an integer for each layer; False behind its end."""
        types = (bool, int)
        return bool(_value(self.header, self.prefix + key, self.index, types, "BOOLs or integers"))

    def string(self, key: str) -> str | None:
        return string(self.header, self.prefix + key)

    def _found(self, key: str, value: _Number | None, default: _Number | None) -> _Number:
        if value is not None:
            return value
        if self.prefix + key in self.header.metadata:
            self.fail(f"metadata key {self.prefix + key!r} has nothing for layer {self.index}")
        if default is None:
            self.fail_missing(key)
        return default

    def fail(self, problem: str) -> NoReturn:
        raise GGUFError(f"{self.header.path}: {problem}")

    def fail_missing(self, key: str) -> NoReturn:
        raise NotModelled(f"{self.header.path}: metadata key {self.prefix + key!r} is missing")

    @property
    def n_layer(self) -> int:
        """Without the layers that only predict further tokens (llama_hparams::n_layer)."""
        return self.integer("block_count") - self.integer("nextn_predict_layers", 0)

    @property
    def n_embd(self) -> int:
        return self.integer("embedding_length")

    @property
    def n_head(self) -> int:
        return self.integer("attention.head_count")

    @property
    def head_dim(self) -> int:
        return self.length("key")

    def length(self, which: Literal["key", "value"], *, windowed: bool = False) -> int:
        """Elements of a head of K or V; windowed: in layers with a window."""
        n_head = self.integer("attention.head_count", index=0)
        default = self.n_embd // n_head if n_head else 0
        full = self.integer(f"attention.{which}_length", default)
        return self.integer(f"attention.{which}_length_swa", full) if windowed else full

    def n_rot(self, *, windowed: bool = False) -> int:
        full = self.integer("rope.dimension_count", self.head_dim)
        return self.integer("rope.dimension_count_swa", full) if windowed else full

    @property
    def n_ctx_orig(self) -> int:
        """Tokens of the context before RoPE was scaled."""
        trained = self.integer("context_length", 0)
        return self.integer("rope.scaling.original_context_length", trained)

    @property
    def rope_sections(self) -> tuple[int, ...]:
        """Four, as llama.cpp has them. Raises GGUFError for what is no array of integers."""
        key = f"{self.prefix}rope.dimension_sections"
        if key not in self.header.metadata:
            return (0, 0, 0, 0)
        if self.header.metadata.spans[key].element not in INTEGERS:
            _wrong_type(self.header, key, "an array of integers")
        return tuple(integer(self.header, key, at) or 0 for at in range(4))
