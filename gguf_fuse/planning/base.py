"""The model that an adapter or an importance matrix is for: which of its layers are fused."""

from __future__ import annotations

from collections.abc import Mapping

from gguf_fuse.format.header import Header
from gguf_fuse.planning import unfuse as unfusion
from gguf_fuse.planning.fuse import examine, refuse_other_kinds
from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.plan import Status

KEPT_SEPARATE = "the base has no attn_qkv there"


def base_rows(
    header: Header, scalars: Mapping[str, bytes], *, any_architecture: bool = False
) -> dict[str, tuple[int, ...]]:
    """Rows of Q, K and V of every layer that is fused in the model, by the layer's name.

    A model without any fused layer counts as what `fusion.fuse` would make of it; scalars: the
    bytes of the tensors that `fusion.scalar_names` asks for.

    Raises Refused for what is no model or cannot be split for certain, GGUFError for a record that
    does not fit.
    """
    refuse_other_kinds(header)
    layers = examine(header, scalars, any_architecture=any_architecture)
    if any(layer.status is Status.FUSED for layer in layers):
        layers = unfusion.unfuse(header, any_architecture=True).changed
    else:
        layers = tuple(layer for layer in layers if layer.status is Status.FUSABLE)
    return {layer.name: layer.rows for layer in layers if layer.kind is QKV}
