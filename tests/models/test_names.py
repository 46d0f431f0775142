"""What layers are called and which have attention; one value for all layers, or one for each."""

from __future__ import annotations

from gguf_fuse.format.header import TensorInfo
from gguf_fuse.models.names import attention_layers, layer_order, layers_with_weights, other_layers


def _tensors(*names: str) -> list[TensorInfo]:
    return [TensorInfo(name, (32, 1), 0, 0, 128) for name in names]


def test_layers_are_in_the_order_of_their_numbers() -> None:
    layers = ["v.blk.1", "blk.10", "dec.blk.0", "blk.9", "blk.0"]
    assert sorted(layers, key=layer_order) == ["blk.0", "blk.9", "blk.10", "dec.blk.0", "v.blk.1"]


def test_which_layers_have_attention() -> None:
    tensors = _tensors(
        "blk.10.attn_v.weight",
        "blk.2.attn_qkv.weight",
        "blk.2.attn_output.weight",
        "blk.1.attn_qkv.weight",  # recurrent: no output
        "blk.0.attn_q.weight",
        "blk.3.attn_q.bias",
        "blk.4.ffn_up.weight",
        "mm.0.weight",
    )
    assert attention_layers(tensors) == ["blk.0", "blk.2", "blk.10"]
    assert other_layers(tensors) == ["blk.1", "blk.3", "blk.4"]
    assert layers_with_weights(tensors, ["ffn_up"]) == ["blk.4"]
