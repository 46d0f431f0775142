"""Metadata that names tensors, which must follow when tensors get other names.

`general.tensor_extra.name` lists tensors, and each `general.tensor_extra.*` array beside it has a
value for each. So far there is `prec_a4` (BOOL: whether 4-bit activations will do), which
llama.cpp's converter writes for NVFP4 models and `llama_prec_policy::load` reads (llama-model.cpp):
it looks tensors up by name, passes over names that it does not find, and takes a tensor without a
name for one whose value is true. Of another array nobody knows what no name would mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gguf_fuse.format.header import Header
from gguf_fuse.format.values import (
    ValueType,
    decode,
    encode_array_start,
    encode_string,
    struct_prefix,
)
from gguf_fuse.planning.plan import Join

PREFIX = "general.tensor_extra."
NAME_KEY = PREFIX + "name"
_UNNAMED = {PREFIX + "prec_a4": b"\1"}


@dataclass(frozen=True, slots=True)
class TensorExtra:
    """The arrays of one file; of each element its bytes.

    values: by key. places: of each name, where the arrays have it. fault: why they tell nothing.
    """

    header: Header
    names: list[bytes]
    values: dict[str, list[bytes]]
    places: dict[bytes, list[int]]
    fault: str | None = None

    @classmethod
    def of(cls, header: Header) -> TensorExtra:
        """Empty where the file has none. Raises GGUFError for more than can be looked at."""
        if NAME_KEY not in header.metadata:
            return cls(header, [], {}, {})
        names = header.metadata.elements(NAME_KEY)
        if names is None or header.metadata.spans[NAME_KEY].element != ValueType.STRING:
            return cls(header, [], {}, {}, f"{NAME_KEY} is no array of strings")
        columns = {}
        for key in header.metadata:
            if key == NAME_KEY or not key.startswith(PREFIX):
                continue
            values = header.metadata.elements(key)
            if values is None or len(values) != len(names):
                fault = f"{key} is no array of {len(names)} values, as {NAME_KEY} has names"
                return cls(header, [], {}, {}, fault)
            columns[key] = values
        places: dict[bytes, list[int]] = {}
        for at, name in enumerate(names):
            places.setdefault(name, []).append(at)
        return cls(header, names, columns, places)

    def why_not_joined(self, joins: Iterable[Join]) -> str | None:
        """Why the names of a layer's parts cannot become that of the fused tensor."""
        if self.fault:
            return self.fault
        for join in joins:
            found = [self.places.get(self._encoded(part.name), []) for part in join.parts]
            if not any(found):
                continue
            for name in join.names:
                if self._encoded(name) in self.places:
                    return f"{NAME_KEY} names {name} already"
            if any(len(places) > 1 for places in found):
                return f"{NAME_KEY} names a part of {join.name} twice"
            for key, column in self.values.items():
                values = [column[at[0]] if at else _UNNAMED.get(key) for at in found]
                if len(set(values)) > 1:
                    shown = ", ".join(self._shown(key, value) for value in values)
                    return f"values of {key} differ: {shown}"
        return None

    def renamed(self, names: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
        """The pairs after tensors got other names; none where no name changes.

        names: by the old one, the new ones. A new name stands where the first tensor that got it
        was named, and has that one's values.
        """
        new_names = {
            self._encoded(old): [self._encoded(name) for name in new] for old, new in names.items()
        }
        if new_names.keys().isdisjoint(self.places):
            return {}
        rows: dict[bytes | int, tuple[bytes, int]] = {}  # by new name; others by their place
        for at, old in enumerate(self.names):
            if old not in new_names:
                rows[at] = old, at
            for name in new_names.get(old, ()):
                rows.setdefault(name, (name, at))
        columns = {NAME_KEY: [name for name, _ in rows.values()]}
        for key, column in self.values.items():
            columns[key] = [column[at] for _, at in rows.values()]
        order = self.header.byte_order
        return {
            key: encode_array_start(key, self._element(key), len(rows), order) + b"".join(column)
            for key, column in columns.items()
        }

    def _encoded(self, name: str) -> bytes:
        return encode_string(name, struct_prefix(self.header.byte_order))

    def _element(self, key: str) -> ValueType:
        element = self.header.metadata.spans[key].element
        assert element is not None  # `of` has looked
        return element

    def _shown(self, key: str, value: bytes | None) -> str:
        if value is None:
            return "none"
        decoded = decode(value, self._element(key), struct_prefix(self.header.byte_order))[0]
        return str(decoded).lower() if isinstance(decoded, bool) else str(decoded)
