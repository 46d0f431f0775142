"""Metadata of one architecture, as it counts for one layer."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError


def value_of_layer(value: Any, layer: int) -> Any:
    """One value for all layers, or an array with one for each; None where it ends before."""
    if isinstance(value, list):
        return value[layer] if layer < len(value) else None
    return value


def integer(header: Header, key: str, layer: int) -> int | None:
    """An integer as it counts for a layer; None where there is none, or something else."""
    value = value_of_layer(header.metadata.get(key), layer)
    return value if type(value) is int else None


class NotModelled(GGUFError):
    """The file is sound, but this attention is not one that `attention_table` describes."""


class Keys:
    """The metadata that a layer's attention is read from; keys stand without "<architecture>."."""

    def __init__(self, header: Header, index: int) -> None:
        self.header = header
        self.index = index
        self.prefix = f"{header.architecture}."

    def raw(self, key: str) -> Any:
        return self.header.metadata.get(self.prefix + key)

    def number(self, key: str, default: float | None = None, index: int | None = None) -> float:
        """The value for layer `index`, or this layer's.

        Raises GGUFError for what is no number, NotModelled for what is missing without a default.
        """
        raw = self.raw(key)
        if raw is None:
            if default is None:
                self.fail_missing(key)
            return default
        value = value_of_layer(raw, self.index if index is None else index)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            found = "nothing for this layer" if value is None else value
            self.fail(f"metadata key {self.prefix + key!r}: a number is expected, not {found!r}")
        return value

    def integer(self, key: str, default: int | None = None, index: int | None = None) -> int:
        return int(self.number(key, default, index))

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key)
        return default if value is None else bool(value)

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
        key = "rope.dimension_sections"
        value = self.raw(key) or []
        if not isinstance(value, list) or any(type(n) is not int for n in value):
            self.fail(f"metadata key {self.prefix + key!r}: integers are expected, not {value!r}")
        return (*value, 0, 0, 0, 0)[:4]
