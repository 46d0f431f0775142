"""The model that an adapter or an importance matrix is for: which of its layers are fused."""

from __future__ import annotations

from gguf_fuse.format.header import Header
from gguf_fuse.planning import unfuse
from gguf_fuse.planning.fuse import examine, require_model
from gguf_fuse.planning.fusions import QKV
from gguf_fuse.planning.plan import Read, Status

KEPT_SEPARATE = "the base has no attn_qkv there"

Rows = dict[str, tuple[int, ...]]  # of Q, K and V, by the layer's name


def base_rows(header: Header, read: Read, *, any_architecture: bool = False) -> Rows:
    """Rows of Q, K and V of every layer that is fused in the model.

    A model without any fused layer counts as what `fuse` would make of it. read: as for `examine`.

    Raises Refused for what is no model or cannot be split for certain, GGUFError for a record that
    does not fit.
    """
    require_model(header)
    layers = examine(header, read, any_architecture=any_architecture)
    if any(layer.status is Status.FUSED for layer in layers):
        layers = unfuse.unfuse(header, any_architecture=True).changed
    else:
        layers = tuple(layer for layer in layers if layer.status is Status.FUSABLE)
    return {layer.name: layer.rows for layer in layers if layer.fusion is QKV}
