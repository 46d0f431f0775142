"""Values of the metadata that hold for a layer."""

from __future__ import annotations

from gguf_fuse.format.header import Header


def integer(header: Header, key: str, layer: int) -> int | None:
    """A value that is one number for all layers, or an array with one for each."""
    value = header.metadata.get(key)
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    return value if type(value) is int else None
