"""How tensors of a layer are called: which layers have attention of their own, and their order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf_fuse.format.header import TensorInfo

ATTENTION_PARTS = ("attn_q", "attn_k", "attn_v")
FUSED_ATTENTION = "attn_qkv"

LAYER = r"(?:(?:v|a|enc|dec)\.)?blk\.[0-9]{1,6}"  # a regular expression
# Of encoders in llama.cpp's mmproj files (clip-impl.h), and in Ollama's (s: SAM). No text model of
# llama.cpp has such tensors (llama-arch.cpp).
ENCODER_PREFIXES = ("v.", "a.", "mm.", "s.", "audio.", "vision.")
_LAYER_OF_TENSOR = re.compile(rf"({LAYER})\.")


def layer_order(layer: str) -> tuple[str, int]:
    """The key to sort layers by: what stands before "blk", then the number."""
    prefix, _, number = layer.rpartition("blk.")
    return prefix, int(number)


def layers_with_weights(tensors: Iterable[TensorInfo], names: Sequence[str]) -> list[str]:
    """Layers that have the weight of at least one of these ("attn_q"), each once, in order."""
    weights = {f"{name}.weight" for name in names}
    found = {
        match[1]
        for tensor in tensors
        if (match := _LAYER_OF_TENSOR.match(tensor.name)) and tensor.name[match.end() :] in weights
    }
    return sorted(found, key=layer_order)


def attention_layers(tensors: Sequence[TensorInfo]) -> list[str]:
    """Layers with Q, K or V of their own, or one weight for all three, in order.

    Recurrent layers of qwen3next and qwen35 have an attn_qkv of another layout, and no output.
    """
    names = {tensor.name for tensor in tensors}
    outputs = ("attn_output.weight", "attn_out.weight")
    return [
        layer
        for layer in layers_with_weights(tensors, (*ATTENTION_PARTS, FUSED_ATTENTION))
        if f"{layer}.{FUSED_ATTENTION}.weight" not in names
        or any(f"{layer}.{output}" in names for output in outputs)
    ]


def other_layers(tensors: Sequence[TensorInfo]) -> list[str]:
    """Layers without Q, K or V of their own: other attention (MLA, linear), or none."""
    found = {match[1] for tensor in tensors if (match := _LAYER_OF_TENSOR.match(tensor.name))}
    return sorted(found.difference(attention_layers(tensors)), key=layer_order)
