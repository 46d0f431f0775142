"""IN -> Inspection. Beside `api`, as it needs nothing of what writes files."""

from __future__ import annotations

from dataclasses import dataclass

from gguf_fuse.format.header import Header
from gguf_fuse.format.shards import read_model
from gguf_fuse.format.source import AnyPath, Segment
from gguf_fuse.planning import fuse as fusing
from gguf_fuse.planning.fusions import ALL, SSM_IN
from gguf_fuse.planning.loaders import Architecture, Loader
from gguf_fuse.planning.plan import Layer


@dataclass(frozen=True)
class Inspection:
    """What a file holds: its layers, and what llama.cpp's loader for it reads."""

    header: Header
    layers: tuple[Layer, ...]
    loader: Architecture


def inspect(source: AnyPath) -> Inspection:
    """What `source` holds and what fusing would do to it. Raises GGUFError."""
    header = read_model(source)
    layers = _examine(header)
    name = layers[0].name if layers else "blk.0"
    return Inspection(header, layers, fusing.loader_of(header, name))


def _examine(header: Header) -> tuple[Layer, ...]:
    """Each layer of a model, an adapter or a matrix, for all fusions."""
    general_type = header.metadata.get("general.type")
    if general_type == "adapter":
        from gguf_fuse.planning import fuse_adapter

        return fuse_adapter.examine(header)
    if general_type == "imatrix":
        from gguf_fuse.planning import imatrix

        return imatrix.examine(header, Segment.read)
    reads = fusing.loader_of(header).reads(SSM_IN).loader  # others' ssm_in is another layout
    fusions = [one for one in ALL if one is not SSM_IN or reads is Loader.READS_FUSED]
    return fusing.examine(header, Segment.read, fusions=fusions)
