"""What the random models of each architecture hold: a table for `random_model`.

Words: `ne` is file order, ne[0] (the row length) first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# A metadata value; a sequence becomes an array.
Value = bool | int | float | str | Sequence[Any]


@dataclass(frozen=True)
class Layout:
    """What the loader of one architecture reads.

    `layer` lists the tensors of a layer in file order; "|" divides forms of layers that take
    turns. `@qkv` stands for Q, K and V with all that belongs to them (`@qk`: no V), `@ffn` for a
    gated feed-forward, dense or of experts as the spec asks.
    """

    layer: str
    # "rms" or "layer": which epsilon is written.
    norm: str = "rms"
    outer: str = "token_embd.weight output_norm.weight output.weight"
    # Sizes that differ from `NE`.
    ne: Mapping[str, str] = field(default_factory=dict)
    # Extra metadata, without the "<architecture>." in front. A string that begins with "=" is a
    # size in the words of `NE`, a tuple takes turns over the layers.
    keys: Mapping[str, Value] = field(default_factory=dict)
    # The same with nothing in front.
    global_keys: Mapping[str, Value] = field(default_factory=dict)
    bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    # The converter writes it so, and the loader knows nothing else.
    fused: bool = False
    # False where the loader wants n_head * head_dim == n_embd.
    free_head_dim: bool = True
    # By layer, taking turns; (): the spec's number everywhere.
    n_head_kv: tuple[int, ...] = ()
    # value_length / key_length.
    value: float = 1.0
    # n_rot / key_length.
    rotary: float = 1.0
    rope_base: float = 10000.0
    sliding_window: int = 0
    n_layer: int = 2
    n_expert: int = 0
    # What stands in front of "<layer>.", and what more such layers hold: encoder and decoder.
    prefixes: Mapping[str, str] = field(default_factory=lambda: {"blk.": ""})


# ne of every weight that some loader reads, in the words of `random_model._sizes`, numbers and
# products. A bias has ne[1:] of its weight, or the same ne when that is one number.
NE: dict[str, str] = {
    "token_embd": "n_embd n_vocab",
    "output": "n_embd n_vocab",
    "output_norm": "n_embd",
    "rope_freqs": "n_rot/2",
    "attn_norm": "n_embd",
    "attn_q": "n_embd q",
    "attn_k": "n_embd k",
    "attn_v": "n_embd v",
    "attn_output": "o n_embd",
    "attn_q_norm": "key_length",
    "attn_k_norm": "key_length",
    "attn_sinks": "n_head",
    "attn_sub_norm": "n_embd",
    "attn_post_norm": "n_embd",
    "post_attention_norm": "n_embd",
    "ffn_norm": "n_embd",
    "ffn_gate": "n_embd n_ff",
    "ffn_up": "n_embd n_ff",
    "ffn_down": "n_ff n_embd",
    "ffn_sub_norm": "n_ff",
    "post_ffw_norm": "n_embd",
    "token_embd_norm": "n_embd",
    "pre_ffw_norm_2": "n_embd",
    "post_ffw_norm_1": "n_embd",
    "post_ffw_norm_2": "n_embd",
    "layer_output_scale": "1",
    "ffn_gate_inp": "n_embd n_expert",
    "ffn_gate_exps": "n_embd n_ff n_expert",
    "ffn_up_exps": "n_embd n_ff n_expert",
    "ffn_down_exps": "n_ff n_embd n_expert",
}

_LLAMA = "attn_norm.weight @qkv attn_output.weight ffn_norm.weight @ffn"
_TIED = "token_embd.weight output_norm.weight"
_LAYER_NORMS = "output_norm.weight output_norm.bias"
# Gemma 2 and 3: norms on both sides of attention and of the feed-forward.
_GEMMA2 = (
    "attn_norm.weight @qkv attn_output.weight post_attention_norm.weight "
    "ffn_norm.weight @ffn post_ffw_norm.weight"
)
_DENSE = "ffn_gate.weight ffn_up.weight ffn_down.weight"
_GEMMA4 = f"{_GEMMA2.replace('@ffn', _DENSE)} @gemma4_experts"
# Linear attention: 2 heads of 16 for Q and K, 4 for V.
_DELTA_NET = (
    "attn_qkv.weight attn_gate.weight ssm_conv1d.weight ssm_dt.bias ssm_a ssm_beta.weight "
    "ssm_alpha.weight ssm_norm.weight ssm_out.weight"
)
_DELTA_NET_NE = {
    "attn_qkv": "n_embd 128",
    "attn_gate": "n_embd 64",
    "ssm_conv1d": "4 128",
    "ssm_dt": "4",
    "ssm_a": "4",
    "ssm_beta": "n_embd 4",
    "ssm_alpha": "n_embd 4",
    "ssm_norm": "16",
    "ssm_out": "64 n_embd",
}
_DELTA_NET_KEYS: dict[str, Value] = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 64,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
}
# Four streams mixed through a rank of 8.
_HYPER = (
    "hc_attn_norm.weight hc_attn_down.weight hc_attn_up.weight hc_attn_inject.weight "
    "hc_ffn_norm.weight hc_ffn_down.weight hc_ffn_up.weight hc_ffn_inject.weight"
)
_HYPER_NE = {
    f"{place}_{name}": ne
    for place in ("hc_attn", "hc_ffn", "output_hc")
    for name, ne in {
        "norm": "n_embd 4",
        "down": "4*n_embd 8",
        "up": "8 4*n_embd",
        "inject": "4*n_embd 4",
    }.items()
}
_SHARED_EXPERTS = (
    "@ffn ffn_gate_inp_shexp.weight ffn_gate_shexp.weight ffn_up_shexp.weight ffn_down_shexp.weight"
)
_SHARED_EXPERTS_NE = {
    "ffn_gate_inp_shexp": "n_embd",
    "ffn_gate_shexp": "n_embd n_ff",
    "ffn_up_shexp": "n_embd n_ff",
    "ffn_down_shexp": "n_ff n_embd",
}
# Experts and others beside them that no gate weighs.
_PLAIN_SHARED = "@ffn ffn_gate_shexp.weight ffn_up_shexp.weight ffn_down_shexp.weight"
# Q and K of 16 per head, 8 of them turned, made from 32 numbers per token; so are K and V.
_LATENT = (
    "attn_norm.weight attn_q_a.weight attn_q_a_norm.weight attn_q_b.weight attn_kv_a_mqa.weight "
    "attn_kv_a_norm.weight attn_kv_b.weight attn_output.weight ffn_norm.weight"
)
# State spaces as of Mamba 2, for an n_embd of 64: 4 heads of 32, states of 16, one group.
_MAMBA2 = (
    "ssm_in.weight ssm_conv1d.weight ssm_conv1d.bias ssm_dt.bias ssm_a ssm_d ssm_norm.weight "
    "ssm_out.weight"
)
_MAMBA2_NE = {
    "ssm_in": "n_embd 292",
    "ssm_conv1d": "4 160",
    "ssm_dt": "4",
    "ssm_a": "1 4",
    "ssm_d": "1 4",
    "ssm_norm": "128 1",
    "ssm_out": "128 n_embd",
}
_MAMBA2_KEYS: dict[str, Value] = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 128,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 1,
}
# Four streams that are predicted and corrected, a low-rank way past attention, and an embedding
# of 256 for each layer.
_ALTUP = (
    "inp_gate.weight proj.weight post_norm.weight altup_correct_coef.weight "
    "altup_correct_scale.weight altup_predict_coef.weight altup_router.weight "
    "altup_router_norm.weight laurel_l.weight laurel_r.weight laurel_post_norm.weight"
)
_BITNET = (
    "attn_norm.weight @qkv attn_output.weight attn_sub_norm.weight ffn_norm.weight @ffn "
    "ffn_sub_norm.weight"
)

# No Q, K and V as elsewhere; the first layer is dense.
_DEEPSEEK2 = Layout(
    f"{_LATENT} {_DENSE} | {_LATENT} {_PLAIN_SHARED}",
    ne={
        "attn_q_a": "n_embd 32",
        "attn_q_a_norm": "32",
        "attn_q_b": "32 q",
        "attn_kv_a_mqa": "n_embd 40",
        "attn_kv_a_norm": "32",
        "attn_kv_b": "32 24*n_head",
        **_SHARED_EXPERTS_NE,
    },
    rotary=0.5,
    n_head_kv=(4,),
    n_expert=4,
    keys={
        "leading_dense_block_count": 1,
        "attention.q_lora_rank": 32,
        "attention.kv_lora_rank": 32,
        "expert_shared_count": 1,
        "expert_weights_scale": 1.5,
    },
)

LAYOUTS: dict[str, Layout] = {
    "llama": Layout(_LLAMA),
    "mistral3": Layout(_LLAMA),
    "qwen2": Layout(_LLAMA, bias=True, free_head_dim=False),
    "qwen3": Layout(_LLAMA, qk_norm=True),
    "qwen3moe": Layout(_LLAMA, qk_norm=True, n_expert=4),
    "gemma": Layout(_LLAMA, outer=_TIED),
    "gemma2": Layout(
        _GEMMA2,
        outer=_TIED,
        sliding_window=8,
        keys={"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    ),
    # The pattern is 6 unless the file says otherwise: 2 lets two layers show both forms.
    "gemma3": Layout(
        _GEMMA2,
        outer=_TIED,
        qk_norm=True,
        sliding_window=8,
        rope_base=1000000.0,
        keys={"attention.sliding_window_pattern": 2},
    ),
    "gpt-oss": Layout(
        "attn_norm.weight @qkv attn_output.weight attn_output.bias post_attention_norm.weight "
        "ffn_gate_inp.weight ffn_gate_inp.bias ffn_gate_exps.weight ffn_gate_exps.bias "
        "ffn_up_exps.weight ffn_up_exps.bias ffn_down_exps.weight ffn_down_exps.bias",
        bias=True,
        sinks=True,
        sliding_window=8,
        n_expert=4,
    ),
    "phi2": Layout(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight attn_output.bias "
        "ffn_up.weight ffn_up.bias ffn_down.weight ffn_down.bias",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight output.bias",
        bias=True,
        free_head_dim=False,
        rotary=0.5,
    ),
    # Gate and up in one, gate first.
    "phi3": Layout(
        "attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight ffn_down.weight",
        ne={"ffn_up": "n_embd 2*n_ff"},
        free_head_dim=False,
    ),
    "stablelm": Layout(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight ffn_norm.weight ffn_norm.bias "
        "@ffn",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight",
        ne={"attn_q_norm": "key_length n_head", "attn_k_norm": "key_length n_head_kv"},
        free_head_dim=False,
        rotary=0.5,
        keys={"use_parallel_residual": False},
    ),
    "starcoder2": Layout(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight attn_output.bias "
        "ffn_norm.weight ffn_norm.bias ffn_up.weight ffn_up.bias ffn_down.weight ffn_down.bias",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS}",
        bias=True,
        free_head_dim=False,
    ),
    "granite": Layout(
        _LLAMA,
        keys={
            "attention.scale": 0.125,
            "embedding_scale": 4.0,
            "residual_scale": 0.5,
            "logit_scale": 2.0,
        },
    ),
    # Norms after attention and after the feed-forward only; Q and K normed as whole rows.
    "olmo2": Layout(
        "@qkv attn_output.weight post_attention_norm.weight @ffn post_ffw_norm.weight",
        ne={"attn_q_norm": "q", "attn_k_norm": "k"},
        qk_norm=True,
        free_head_dim=False,
    ),
    "command-r": Layout(
        "attn_norm.weight @qkv attn_output.weight @ffn",
        norm="layer",
        outer=_TIED,
        ne={"attn_q_norm": "key_length n_head", "attn_k_norm": "key_length n_head_kv"},
        free_head_dim=False,
        keys={"logit_scale": 0.5},
    ),
    # RoPE is left out in every fourth layer.
    "cohere2": Layout(
        "attn_norm.weight @qkv attn_output.weight @ffn",
        norm="layer",
        outer=_TIED,
        free_head_dim=False,
        sliding_window=8,
        n_layer=4,
        keys={"logit_scale": 0.5},
    ),
    # 40 layers mean ALiBi instead of RoPE, 32 mean RoPE, any other number neither.
    "baichuan": Layout(_LLAMA, free_head_dim=False, n_layer=40),
    "refact": Layout(_LLAMA),
    "internlm2": Layout(_LLAMA, free_head_dim=False),
    "smollm3": Layout(_LLAMA, n_layer=4),
    "glm4": Layout(
        "attn_norm.weight @qkv attn_output.weight post_attention_norm.weight ffn_norm.weight "
        "ffn_up.weight ffn_down.weight post_ffw_norm.weight",
        ne={"ffn_up": "n_embd 2*n_ff"},
        bias=True,
        rotary=0.5,
    ),
    "seed_oss": Layout(
        "attn_norm.weight @qkv attn_output.weight post_attention_norm.weight @ffn", bias=True
    ),
    # LayerNorm without weights; Q, K and V are clamped.
    "olmo": Layout(
        "@qkv attn_output.weight @ffn",
        norm="layer",
        outer="token_embd.weight output.weight",
        free_head_dim=False,
        keys={"attention.clamp_kqv": 1.0},
    ),
    "minicpm": Layout(
        _LLAMA, keys={"embedding_scale": 4.0, "residual_scale": 0.5, "logit_scale": 2.0}
    ),
    "grok": Layout(
        "attn_norm.weight @qkv attn_output.weight attn_output_norm.weight ffn_norm.weight @ffn "
        "post_ffw_norm.weight",
        ne={"attn_output_norm": "n_embd"},
        free_head_dim=False,
        n_expert=4,
    ),
    "hunyuan-dense": Layout(_LLAMA, qk_norm=True),
    "exaone4": Layout(
        "@qkv attn_output.weight post_attention_norm.weight @ffn post_ffw_norm.weight",
        qk_norm=True,
        free_head_dim=False,
    ),
    "nemotron": Layout(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight ffn_norm.weight ffn_norm.bias "
        "ffn_up.weight ffn_down.weight",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight",
        free_head_dim=False,
        rotary=0.5,
    ),
    "arcee": Layout(
        "attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight ffn_down.weight"
    ),
    "apertus": Layout(
        "attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight ffn_down.weight",
        qk_norm=True,
        global_keys={
            "xielu.alpha_n": (0.8,),
            "xielu.alpha_p": (0.8,),
            "xielu.beta": (0.5,),
            "xielu.eps": (-1e-6,),
        },
    ),
    "chatglm": Layout(
        "attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight ffn_down.weight",
        ne={"ffn_up": "n_embd 2*n_ff"},
        bias=True,
        free_head_dim=False,
        rotary=0.5,
    ),
    "xverse": Layout(_LLAMA, free_head_dim=False),
    "ernie4_5": Layout(_LLAMA),
    "orion": Layout(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight ffn_norm.weight ffn_norm.bias "
        "@ffn",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight",
        free_head_dim=False,
    ),
    # Head counts by layer; none for K and V means a single matrix instead of attention.
    "deci": Layout(
        f"{_LLAMA} | {_LLAMA} | attn_norm.weight attn_output.weight ffn_norm.weight @ffn",
        n_head_kv=(2, 4, 0),
        n_layer=3,
    ),
    # V narrower than K, windows given layer by layer.
    "mimo2": Layout(
        _LLAMA,
        sinks=True,
        value=0.5,
        rotary=0.5,
        sliding_window=8,
        n_head_kv=(2, 4),
        keys={
            "attention.sliding_window_pattern": (False, True),
            "expert_feed_forward_length": "=n_ff",
        },
    ),
    # Every second layer is a short convolution and has no Q, K and V.
    "lfm2": Layout(
        "ffn_norm.weight @ffn attn_norm.weight @qkv attn_output.weight | ffn_norm.weight @ffn "
        "attn_norm.weight shortconv.conv.weight shortconv.in_proj.weight shortconv.out_proj.weight",
        outer="token_embd.weight token_embd_norm.weight",
        ne={
            "shortconv.conv": "3 n_embd",
            "shortconv.in_proj": "n_embd 3*n_embd",
            "shortconv.out_proj": "n_embd n_embd",
        },
        qk_norm=True,
        free_head_dim=False,
        n_head_kv=(2, 0),
        keys={"shortconv.l_cache": 3},
    ),
    # Full layers have no V of their own: the raw K projection serves. Experts, if any, stand
    # beside a dense feed-forward.
    "gemma4": Layout(
        f"{_GEMMA4} layer_output_scale.weight | "
        f"{_GEMMA4.replace('@qkv', '@qk')} layer_output_scale.weight",
        ne={"ffn_gate_inp.scale": "n_embd"},
        outer=f"{_TIED} rope_freqs.weight",
        qk_norm=True,
        sliding_window=8,
        keys={
            "attention.sliding_window_pattern": (True, False),
            "attention.key_length_swa": "=key_length",
            "attention.value_length_swa": "=value_length",
            "embedding_length_per_layer_input": 0,
            "attention.shared_kv_layers": 0,
            "rope.freq_base_swa": 5000.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    # Q carries a gate, row by row beside each head; every second layer is recurrent and has an
    # attn_qkv of another layout.
    "qwen35": Layout(
        f"attn_norm.weight {_DELTA_NET} post_attention_norm.weight @ffn | "
        "attn_norm.weight @qkv attn_output.weight post_attention_norm.weight @ffn",
        ne={"attn_q": "n_embd 2*q", **_DELTA_NET_NE},
        qk_norm=True,
        rotary=0.5,
        keys={
            "full_attention_interval": 2,
            "rope.dimension_sections": [2, 1, 1, 0],
            **_DELTA_NET_KEYS,
        },
    ),
    # As qwen35, of experts; qwen3next has ssm_beta and ssm_alpha in one.
    "qwen35moe": Layout(
        f"attn_norm.weight {_DELTA_NET} post_attention_norm.weight {_SHARED_EXPERTS} | "
        f"attn_norm.weight @qkv attn_output.weight post_attention_norm.weight {_SHARED_EXPERTS}",
        ne={"attn_q": "n_embd 2*q", **_DELTA_NET_NE, **_SHARED_EXPERTS_NE},
        qk_norm=True,
        rotary=0.5,
        n_expert=4,
        keys={
            "full_attention_interval": 2,
            "expert_shared_feed_forward_length": "=n_ff",
            "rope.dimension_sections": [2, 1, 1, 0],
            **_DELTA_NET_KEYS,
        },
    ),
    "qwen3next": Layout(
        "attn_norm.weight attn_qkv.weight attn_gate.weight ssm_conv1d.weight ssm_dt.bias ssm_a "
        f"ssm_ba.weight ssm_norm.weight ssm_out.weight post_attention_norm.weight "
        f"{_SHARED_EXPERTS} | "
        f"attn_norm.weight @qkv attn_output.weight post_attention_norm.weight {_SHARED_EXPERTS}",
        ne={
            "attn_q": "n_embd 2*q",
            "ssm_ba": "n_embd 8",
            **_DELTA_NET_NE,
            **_SHARED_EXPERTS_NE,
        },
        qk_norm=True,
        rotary=0.5,
        n_expert=4,
        keys={
            "full_attention_interval": 2,
            "expert_shared_feed_forward_length": "=n_ff",
            **_DELTA_NET_KEYS,
        },
    ),
    # The first layer is dense; RoPE is left out in every fourth layer.
    "cohere2moe": Layout(
        f"attn_norm.weight @qkv attn_output.weight {_DENSE} | "
        "attn_norm.weight @qkv attn_output.weight @ffn | "
        "attn_norm.weight @qkv attn_output.weight @ffn | "
        "attn_norm.weight @qkv attn_output.weight @ffn",
        norm="layer",
        outer=_TIED,
        free_head_dim=False,
        sliding_window=8,
        n_layer=4,
        n_expert=4,
        keys={"logit_scale": 0.5, "leading_dense_block_count": 1},
    ),
    "granite_swa": Layout(
        _LLAMA,
        sinks=True,
        sliding_window=8,
        n_expert=4,
        keys={
            "attention.sliding_window_pattern": (True, False),
            "attention.scale": 0.125,
            "embedding_scale": 4.0,
            "residual_scale": 0.5,
            "logit_scale": 2.0,
        },
    ),
    # The first layer is dense.
    "hy_v3": Layout(
        f"attn_norm.weight @qkv attn_output.weight ffn_norm.weight {_DENSE} | "
        f"attn_norm.weight @qkv attn_output.weight ffn_norm.weight {_PLAIN_SHARED}",
        ne=_SHARED_EXPERTS_NE,
        qk_norm=True,
        n_expert=4,
    ),
    "deepseek2": _DEEPSEEK2,
    "mistral4": _DEEPSEEK2,
    "deepseek2-ocr": Layout(
        f"attn_norm.weight @qkv attn_output.weight ffn_norm.weight {_DENSE} | "
        f"attn_norm.weight @qkv attn_output.weight ffn_norm.weight {_PLAIN_SHARED}",
        ne=_SHARED_EXPERTS_NE,
        free_head_dim=False,
        n_head_kv=(4,),
        n_expert=4,
        keys={"leading_dense_block_count": 1, "expert_shared_count": 1},
    ),
    # Attention and a state space side by side in each layer.
    "falcon-h1": Layout(
        f"attn_norm.weight {_MAMBA2} @qkv attn_output.weight ffn_norm {_DENSE}",
        ne=_MAMBA2_NE,
        keys=_MAMBA2_KEYS,
    ),
    # Every second layer is a state space.
    "granitehybrid": Layout(
        f"attn_norm.weight {_MAMBA2} ffn_norm.weight @ffn | {_LLAMA}",
        ne=_MAMBA2_NE,
        n_head_kv=(0, 2),
        keys={"embedding_scale": 4.0, "residual_scale": 0.5, "logit_scale": 2.0, **_MAMBA2_KEYS},
    ),
    "jamba": Layout(
        "attn_norm.weight ssm_in.weight ssm_conv1d.weight ssm_conv1d.bias ssm_x.weight "
        "ssm_dt_norm.weight ssm_dt.weight ssm_dt.bias ssm_b_norm.weight ssm_c_norm.weight ssm_a "
        f"ssm_d ssm_out.weight ffn_norm.weight @ffn | {_LLAMA}",
        ne={
            "ssm_in": "n_embd 256",
            "ssm_conv1d": "4 128",
            "ssm_x": "128 36",
            "ssm_dt_norm": "4",
            "ssm_dt": "4 128",
            "ssm_b_norm": "16",
            "ssm_c_norm": "16",
            "ssm_a": "16 128",
            "ssm_d": "128",
            "ssm_out": "128 n_embd",
        },
        free_head_dim=False,
        n_head_kv=(0, 2),
        keys={
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 128,
            "ssm.state_size": 16,
            "ssm.time_step_rank": 4,
        },
    ),
    # A layer is a state space, attention or a feed-forward.
    "nemotron_h": Layout(
        f"attn_norm.weight {_MAMBA2} | attn_norm.weight @qkv attn_output.weight | "
        "attn_norm.weight ffn_up.weight ffn_down.weight",
        norm="layer",
        ne=_MAMBA2_NE,
        n_head_kv=(0, 2, 0),
        n_layer=3,
        keys={"feed_forward_length": (0, 0, 128), **_MAMBA2_KEYS},
    ),
    # The layers from the 20th on use the K and V of earlier ones.
    "gemma3n": Layout(
        f"{_GEMMA2} {_ALTUP}",
        outer=f"{_TIED} altup_proj.weight altup_unembd_proj.weight per_layer_token_embd.weight "
        "per_layer_model_proj.weight per_layer_proj_norm.weight",
        ne={
            "altup_proj": "n_embd n_embd 3",
            "altup_unembd_proj": "n_embd n_embd 3",
            "per_layer_token_embd": "256*n_layer n_vocab",
            "per_layer_model_proj": "n_embd 256*n_layer",
            "per_layer_proj_norm": "256",
            "inp_gate": "n_embd 256",
            "proj": "256 n_embd",
            "post_norm": "n_embd",
            "altup_correct_coef": "4 4",
            "altup_correct_scale": "n_embd",
            "altup_predict_coef": "4 16",
            "altup_router": "n_embd 4",
            "altup_router_norm": "n_embd",
            "laurel_l": "n_embd 64",
            "laurel_r": "64 n_embd",
            "laurel_post_norm": "n_embd",
        },
        qk_norm=True,
        sliding_window=8,
        n_layer=22,
        keys={"attention.sliding_window_pattern": 2},
    ),
    # Fused from the start.
    "gptneox": Layout(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight attn_output.bias "
        "ffn_norm.weight ffn_norm.bias ffn_up.weight ffn_up.bias ffn_down.weight ffn_down.bias",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight",
        bias=True,
        fused=True,
        free_head_dim=False,
        rotary=0.5,
        keys={"use_parallel_residual": True},
    ),
    "falcon": Layout(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight ffn_up.weight ffn_down.weight",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight",
        fused=True,
        free_head_dim=False,
    ),
    # From here on: loaders that want Q, K and V separate, or crash on the fused file.
    "bitnet": Layout(_BITNET, outer=_TIED, free_head_dim=False),
    "qwen4exp": Layout(
        f"{_HYPER} {_DELTA_NET} {_SHARED_EXPERTS} | {_HYPER} @qkv attn_output.weight "
        "indexer.q_proj.weight indexer.k_proj.weight indexer.q_norm.weight "
        f"indexer.k_norm.weight {_SHARED_EXPERTS}",
        outer="token_embd.weight output_hc_norm.weight output_hc_down.weight "
        "output_hc_up.weight output.weight",
        ne={
            "attn_q": "n_embd 2*q",
            "indexer.q_proj": "n_embd 4*key_length",
            "indexer.k_proj": "n_embd key_length",
            "indexer.q_norm": "key_length",
            "indexer.k_norm": "key_length",
            **_SHARED_EXPERTS_NE,
            **_HYPER_NE,
            **_DELTA_NET_NE,
        },
        qk_norm=True,
        rotary=0.5,
        n_expert=4,
        keys={
            "full_attention_interval": 2,
            "expert_shared_feed_forward_length": "=n_ff",
            "rope.dimension_sections": [2, 1, 1, 0],
            "hyper_connection.count": 4,
            "hyper_connection.low_rank": 8,
            "attention.indexer.head_count": 4,
            "attention.indexer.key_length": "=key_length",
            "attention.indexer.top_k": 1024,
            "attention.compress_ratios": (4,),
            **_DELTA_NET_KEYS,
        },
    ),
    "t5": Layout(
        "attn_norm.weight @qkv attn_o.weight ffn_norm.weight ffn_up.weight ffn_down.weight",
        outer="token_embd.weight enc.output_norm.weight dec.output_norm.weight output.weight",
        ne={
            "enc.output_norm": "n_embd",
            "dec.output_norm": "n_embd",
            "attn_q": "n_embd k",
            "attn_o": "v n_embd",
            "cross_attn_norm": "n_embd",
            "cross_attn_q": "n_embd k",
            "cross_attn_k": "n_embd k",
            "cross_attn_v": "n_embd v",
            "cross_attn_o": "v n_embd",
            "attn_rel_b": "n_head 8",
        },
        prefixes={
            "enc.blk.": "attn_rel_b.weight",
            "dec.blk.": "attn_rel_b.weight cross_attn_norm.weight cross_attn_q.weight "
            "cross_attn_k.weight cross_attn_v.weight cross_attn_o.weight",
        },
        n_head_kv=(4,),
        keys={"attention.relative_buckets_count": 8, "decoder_start_token_id": 0},
    ),
}

# Not among `LAYOUTS`, of which every one is tried by itself. Two blocks that take turns in six
# layers: a low one twice, a high one, and all that once more.
HRM_TEXT = Layout(
    "@qkv attn_gate.weight attn_output.weight @ffn",
    outer="token_embd.weight hrm.z_l_init output.weight",
    ne={"hrm.z_l_init": "n_embd", "attn_gate": "n_embd q"},
    keys={
        "block_count": 6,
        "hrm.layers_per_stack": 1,
        "hrm.h_cycles": 2,
        "hrm.l_cycles": 2,
    },
)
