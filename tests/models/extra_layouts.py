"""Layouts of architectures that `architectures` does not have, or has otherwise.

With experts, these have dense layers only where they can: it is the attention that counts here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tests.models.architectures import LAYOUTS, Layout, Value

_LLAMA = LAYOUTS["llama"]
_NORMED = replace(_LLAMA, qk_norm=True)
FACTORS = replace(
    LAYOUTS["phi3"],
    outer="rope_factors_long.weight rope_factors_short.weight "
    "token_embd.weight output_norm.weight output.weight",
    ne={
        "ffn_up": "n_embd 2*n_ff",
        "rope_factors_long": "n_rot/2",
        "rope_factors_short": "n_rot/2",
    },
)
_BLOOM = replace(LAYOUTS["starcoder2"], free_head_dim=False, fused=True)
OUTPUT_BIAS = replace(_LLAMA, layer=_LLAMA.layer.replace("@qkv", "@qkv attn_output.bias"))
ROW_NORMS = {"attn_q_norm": "q", "attn_k_norm": "k"}
SEPARATE_BIASES = replace(
    LAYOUTS["qwen2"],
    layer=_LLAMA.layer.replace("@qkv", "attn_qkv.weight attn_q.bias attn_k.bias attn_v.bias"),
    ne={"attn_qkv": "n_embd 128"},
)
_DENSE: dict[str, Value] = {
    "expert_feed_forward_length": "=n_ff",
    "expert_shared_count": 1,
    "expert_count": 4,
}


def _with_shared_expert(name: str, ne: Mapping[str, str] | None = None) -> Layout:
    one = LAYOUTS[name]
    tensors = ("ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
    shared = " ".join(["@ffn", *(f"{tensor}.weight" for tensor in tensors)])
    sizes = ("n_embd", "n_embd n_ff", "n_embd n_ff", "n_ff n_embd")
    return replace(
        one,
        layer=one.layer.replace("@ffn", shared),
        ne={**one.ne, **dict(zip(tensors, sizes, strict=True)), **(ne or {})},
        keys={**one.keys, "expert_shared_feed_forward_length": "=n_ff"},
    )


_BERT_FFN = "ffn_up.weight ffn_up.bias ffn_down.weight ffn_down.bias"
_BERT = Layout(
    layer="@qkv attn_output.weight attn_output.bias attn_output_norm.weight attn_output_norm.bias "
    f"{_BERT_FFN} layer_output_norm.weight layer_output_norm.bias",
    norm="layer",
    outer="token_embd.weight token_types.weight token_embd_norm.weight token_embd_norm.bias",
    ne={
        "token_types": "n_embd 2",
        "position_embd": "n_embd 512",
        "attn_output_norm": "n_embd",
        "attn_norm_2": "n_embd",
        "layer_output_norm": "n_embd",
        **ROW_NORMS,
    },
    keys={"attention.causal": False},
    global_keys={"tokenizer.ggml.token_type_count": 2},
    bias=True,
    free_head_dim=False,
    n_head_kv=(4,),
)
_EXPERTS = "ffn_gate_inp.weight ffn_up_exps.weight ffn_down_exps.weight"
# Without next tokens: what counts is what they make of the given ones.
ENCODERS: dict[str, Layout] = {
    "bert": replace(_BERT, outer=f"{_BERT.outer} position_embd.weight"),
    "nomic-bert": replace(_BERT, layer=_BERT.layer.replace(_BERT_FFN, "@ffn"), bias=False),
    # A layer with experts follows one without.
    "nomic-bert-moe": replace(
        _BERT,
        layer=f"{_BERT.layer} | {_BERT.layer.replace(_BERT_FFN, _EXPERTS)}",
        keys={**_BERT.keys, "moe_every_n_layers": 2},
        n_expert=4,
    ),
    "jina-bert-v2": replace(_BERT, layer=_BERT.layer.replace(_BERT_FFN, "@ffn ffn_down.bias")),
    "jina-bert-v3": _BERT,
}
JINA_NORMED = replace(
    ENCODERS["jina-bert-v2"],
    layer=f"{ENCODERS['jina-bert-v2'].layer} attn_norm_2.weight attn_norm_2.bias "
    "attn_q_norm.weight attn_q_norm.bias attn_k_norm.weight attn_k_norm.bias",
)


EXTRA: dict[str, Layout] = {
    **ENCODERS,
    "bloom": replace(
        _BLOOM,
        outer="token_embd.weight token_embd_norm.weight token_embd_norm.bias "
        "output_norm.weight output_norm.bias",
    ),
    "mpt": replace(
        _BLOOM,
        bias=False,
        layer="attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight "
        "ffn_down.weight",
        outer="token_embd.weight output_norm.weight",
        keys={"attention.clamp_kqv": 1.0, "attention.max_alibi_bias": 8.0},
    ),
    "olmoe": replace(_NORMED, ne=ROW_NORMS, n_expert=4, free_head_dim=False, n_head_kv=(4,)),
    "smallthinker": replace(_LLAMA, n_expert=4, n_layer=5, keys={"expert_gating_func": 1}),
    "llama4": replace(
        _LLAMA,
        n_layer=4,
        keys={**_DENSE, "interleave_moe_layer_step": 99, "expert_used_count": 1},
    ),
    "glm4moe": replace(
        _NORMED,
        layer="attn_norm.weight @qkv attn_output.weight post_attention_norm.weight @ffn",
        bias=True,
        rotary=0.5,
        keys={**_DENSE, "leading_dense_block_count": 2, "expert_used_count": 1},
    ),
    "dots1": replace(
        _NORMED,
        n_head_kv=(4,),
        keys={**_DENSE, "leading_dense_block_count": 2, "expert_used_count": 1},
    ),
    "exaone": _LLAMA,
    "ernie4_5-moe": replace(
        _LLAMA,
        keys={
            **_DENSE,
            "leading_dense_block_count": 2,
            "interleave_moe_layer_step": 1,
            "expert_used_count": 1,
        },
    ),
    "granitemoe": replace(LAYOUTS["granite"], n_expert=4),
    "lfm2moe": replace(
        LAYOUTS["lfm2"],
        keys={
            **LAYOUTS["lfm2"].keys,
            **_DENSE,
            "leading_dense_block_count": 2,
            "expert_used_count": 1,
            "expert_gating_func": 2,
        },
    ),
    # llama.cpp does not read qwen2vl's epsilon and takes 0.
    "qwen2vl": replace(
        LAYOUTS["qwen2"],
        keys={
            "rope.dimension_sections": [2, 2, 2, 2],
            "attention.layer_norm_rms_epsilon": 0.0,
        },
    ),
    "qwen3vl": replace(_NORMED, keys={"rope.dimension_sections": [3, 3, 2, 0]}),
    "qwen3vlmoe": replace(_NORMED, keys={"rope.dimension_sections": [3, 3, 1, 1]}, n_expert=4),
    "qwen2moe": replace(_with_shared_expert("qwen2"), n_expert=4),
    "qwen3next": replace(
        _with_shared_expert("qwen35", {"ssm_ba": "n_embd 8"}),
        layer=_with_shared_expert("qwen35").layer.replace(
            "ssm_beta.weight ssm_alpha.weight", "ssm_ba.weight"
        ),
        n_expert=4,
    ),
    "qwen35moe": replace(_with_shared_expert("qwen35"), n_expert=4),
    "deepseek": replace(
        _LLAMA, keys={**_DENSE, "leading_dense_block_count": 2, "expert_used_count": 1}
    ),
}
