"""Names of a model's layers and of the tensors of attention, as GGUF has them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gguf_fuse.format.header import TensorInfo

LAYER = r"(?:(?:v|a|enc|dec)\.)?blk\.[0-9]{1,6}"
ATTENTION_PARTS = ("attn_q", "attn_k", "attn_v")
FUSED_ATTENTION = "attn_qkv"


def layer_order(layer: str) -> tuple[str, int]:
    """To sort layers by: encoder and decoder apart, then by number."""
    return layer.split("blk")[0], int(layer.rpartition(".")[2])


def layers_with(names: Iterable[str], parts: Iterable[str]) -> list[str]:
    """The layers that have a weight of one of the parts, in order."""
    pattern = re.compile(rf"({LAYER})\.(?:{'|'.join(parts)})\.weight")
    return sorted({m[1] for name in names if (m := pattern.fullmatch(name))}, key=layer_order)


def attention_layers(tensors: Iterable[TensorInfo]) -> list[str]:
    """The layers that have a Q, K or V of their own, or a fused one, in order."""
    names = {tensor.name for tensor in tensors}
    found = layers_with(names, (*ATTENTION_PARTS, FUSED_ATTENTION))
    return [layer for layer in found if _is_attention(layer, names)]


def other_layers(tensors: Iterable[TensorInfo]) -> list[str]:
    """Layers without Q, K or V of their own: other attention (MLA, linear), or none."""
    tensors = list(tensors)
    found = [re.match(rf"{LAYER}(?=\.)", tensor.name) for tensor in tensors]
    others = {match[0] for match in found if match}.difference(attention_layers(tensors))
    return sorted(others, key=layer_order)


def _is_attention(layer: str, names: set[str]) -> bool:
    """Recurrent layers of qwen3next and qwen35 own an attn_qkv of another layout, no output."""
    if f"{layer}.{FUSED_ATTENTION}.weight" not in names:
        return True
    return f"{layer}.attn_output.weight" in names or f"{layer}.attn_out.weight" in names
