"""Random-weight GGUF files that llama.cpp loads: for tests, the demo and benchmarks.

What an architecture's loader asks for is data (`ARCHITECTURES`), the writing is one function.
Each tensor is drawn from its own stream, keyed by seed and name, so that a weight stays the same
whatever else the file holds: a model written fused has the very bytes of the one written
separately, and changing one type leaves the other tensors alone.

Words: `ne` is file order, ne[0] (the row length) first; *shape* is numpy order.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray

# A metadata value; a sequence becomes an array.
Value = bool | int | float | str | Sequence[Any]
Scales = Literal["none", "equal", "unequal"]

# Elements that are drawn afresh; a longer tensor repeats them. A prime number of the largest
# blocks (256), so that no two rows of a usual length come out equal and a swap of rows shows.
TILE_ELEMENTS = 1021 * 256
# Largest piece given to one write call, in bytes.
PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Architecture:
    """What the loader of one architecture reads.

    `layer` lists the tensors of a layer in file order; "|" divides kinds of layers that take
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


# ne of every weight that some loader reads, in the words of `_sizes`, numbers and products. A bias
# has ne[1:] of its weight, or the same ne when that is one number.
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

# No Q, K and V of the usual kind; the first layer is dense.
_DEEPSEEK2 = Architecture(
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

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_LLAMA),
    "mistral3": Architecture(_LLAMA),
    "qwen2": Architecture(_LLAMA, bias=True, free_head_dim=False),
    "qwen3": Architecture(_LLAMA, qk_norm=True),
    "qwen3moe": Architecture(_LLAMA, qk_norm=True, n_expert=4),
    "gemma": Architecture(_LLAMA, outer=_TIED),
    "gemma2": Architecture(
        _GEMMA2,
        outer=_TIED,
        sliding_window=8,
        keys={"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    ),
    # The pattern is 6 unless the file says otherwise: 2 lets two layers show both kinds.
    "gemma3": Architecture(
        _GEMMA2,
        outer=_TIED,
        qk_norm=True,
        sliding_window=8,
        rope_base=1000000.0,
        keys={"attention.sliding_window_pattern": 2},
    ),
    "gpt-oss": Architecture(
        "attn_norm.weight @qkv attn_output.weight attn_output.bias post_attention_norm.weight "
        "ffn_gate_inp.weight ffn_gate_inp.bias ffn_gate_exps.weight ffn_gate_exps.bias "
        "ffn_up_exps.weight ffn_up_exps.bias ffn_down_exps.weight ffn_down_exps.bias",
        bias=True,
        sinks=True,
        sliding_window=8,
        n_expert=4,
    ),
    "phi2": Architecture(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight attn_output.bias "
        "ffn_up.weight ffn_up.bias ffn_down.weight ffn_down.bias",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight output.bias",
        bias=True,
        free_head_dim=False,
        rotary=0.5,
    ),
    # Gate and up in one, gate first.
    "phi3": Architecture(
        "attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight ffn_down.weight",
        ne={"ffn_up": "n_embd 2*n_ff"},
        free_head_dim=False,
    ),
    "stablelm": Architecture(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight ffn_norm.weight ffn_norm.bias "
        "@ffn",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight",
        ne={"attn_q_norm": "key_length n_head", "attn_k_norm": "key_length n_head_kv"},
        free_head_dim=False,
        rotary=0.5,
        keys={"use_parallel_residual": False},
    ),
    "starcoder2": Architecture(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight attn_output.bias "
        "ffn_norm.weight ffn_norm.bias ffn_up.weight ffn_up.bias ffn_down.weight ffn_down.bias",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS}",
        bias=True,
        free_head_dim=False,
    ),
    "granite": Architecture(
        _LLAMA,
        keys={
            "attention.scale": 0.125,
            "embedding_scale": 4.0,
            "residual_scale": 0.5,
            "logit_scale": 2.0,
        },
    ),
    # Norms after attention and after the feed-forward only; Q and K normed as whole rows.
    "olmo2": Architecture(
        "@qkv attn_output.weight post_attention_norm.weight @ffn post_ffw_norm.weight",
        ne={"attn_q_norm": "q", "attn_k_norm": "k"},
        qk_norm=True,
        free_head_dim=False,
    ),
    "command-r": Architecture(
        "attn_norm.weight @qkv attn_output.weight @ffn",
        norm="layer",
        outer=_TIED,
        ne={"attn_q_norm": "key_length n_head", "attn_k_norm": "key_length n_head_kv"},
        free_head_dim=False,
        keys={"logit_scale": 0.5},
    ),
    # RoPE is left out in every fourth layer.
    "cohere2": Architecture(
        "attn_norm.weight @qkv attn_output.weight @ffn",
        norm="layer",
        outer=_TIED,
        free_head_dim=False,
        sliding_window=8,
        n_layer=4,
        keys={"logit_scale": 0.5},
    ),
    # 40 layers mean ALiBi instead of RoPE, 32 mean RoPE, any other number neither.
    "baichuan": Architecture(_LLAMA, free_head_dim=False, n_layer=40),
    "refact": Architecture(_LLAMA),
    "internlm2": Architecture(_LLAMA, free_head_dim=False),
    "smollm3": Architecture(_LLAMA, n_layer=4),
    "glm4": Architecture(
        "attn_norm.weight @qkv attn_output.weight post_attention_norm.weight ffn_norm.weight "
        "ffn_up.weight ffn_down.weight post_ffw_norm.weight",
        ne={"ffn_up": "n_embd 2*n_ff"},
        bias=True,
        rotary=0.5,
    ),
    "seed_oss": Architecture(
        "attn_norm.weight @qkv attn_output.weight post_attention_norm.weight @ffn", bias=True
    ),
    # LayerNorm without weights; Q, K and V are clamped.
    "olmo": Architecture(
        "@qkv attn_output.weight @ffn",
        norm="layer",
        outer="token_embd.weight output.weight",
        free_head_dim=False,
        keys={"attention.clamp_kqv": 1.0},
    ),
    "minicpm": Architecture(
        _LLAMA, keys={"embedding_scale": 4.0, "residual_scale": 0.5, "logit_scale": 2.0}
    ),
    "hunyuan-dense": Architecture(_LLAMA, qk_norm=True),
    "exaone4": Architecture(
        "@qkv attn_output.weight post_attention_norm.weight @ffn post_ffw_norm.weight",
        qk_norm=True,
        free_head_dim=False,
    ),
    "nemotron": Architecture(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight ffn_norm.weight ffn_norm.bias "
        "ffn_up.weight ffn_down.weight",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight",
        free_head_dim=False,
        rotary=0.5,
    ),
    "arcee": Architecture(
        "attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight ffn_down.weight"
    ),
    "apertus": Architecture(
        "attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight ffn_down.weight",
        qk_norm=True,
        global_keys={
            "xielu.alpha_n": (0.8,),
            "xielu.alpha_p": (0.8,),
            "xielu.beta": (0.5,),
            "xielu.eps": (-1e-6,),
        },
    ),
    "chatglm": Architecture(
        "attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight ffn_down.weight",
        ne={"ffn_up": "n_embd 2*n_ff"},
        bias=True,
        free_head_dim=False,
        rotary=0.5,
    ),
    "xverse": Architecture(_LLAMA, free_head_dim=False),
    "ernie4_5": Architecture(_LLAMA),
    "orion": Architecture(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight ffn_norm.weight ffn_norm.bias "
        "@ffn",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight",
        free_head_dim=False,
    ),
    # Head counts by layer; none for K and V means a single matrix instead of attention.
    "deci": Architecture(
        f"{_LLAMA} | {_LLAMA} | attn_norm.weight attn_output.weight ffn_norm.weight @ffn",
        n_head_kv=(2, 4, 0),
        n_layer=3,
    ),
    # V narrower than K, windows given layer by layer.
    "mimo2": Architecture(
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
    "lfm2": Architecture(
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
    "gemma4": Architecture(
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
    "qwen35": Architecture(
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
    "qwen35moe": Architecture(
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
    "qwen3next": Architecture(
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
    "cohere2moe": Architecture(
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
    "granite_swa": Architecture(
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
    "hy_v3": Architecture(
        f"attn_norm.weight @qkv attn_output.weight ffn_norm.weight {_DENSE} | "
        f"attn_norm.weight @qkv attn_output.weight ffn_norm.weight {_PLAIN_SHARED}",
        ne=_SHARED_EXPERTS_NE,
        qk_norm=True,
        n_expert=4,
    ),
    "deepseek2": _DEEPSEEK2,
    "mistral4": _DEEPSEEK2,
    "deepseek2-ocr": Architecture(
        f"attn_norm.weight @qkv attn_output.weight ffn_norm.weight {_DENSE} | "
        f"attn_norm.weight @qkv attn_output.weight ffn_norm.weight {_PLAIN_SHARED}",
        ne=_SHARED_EXPERTS_NE,
        free_head_dim=False,
        n_head_kv=(4,),
        n_expert=4,
        keys={"leading_dense_block_count": 1, "expert_shared_count": 1},
    ),
    # Attention and a state space side by side in each layer.
    "falcon-h1": Architecture(
        f"attn_norm.weight {_MAMBA2} @qkv attn_output.weight ffn_norm {_DENSE}",
        ne=_MAMBA2_NE,
        keys=_MAMBA2_KEYS,
    ),
    # Every second layer is a state space.
    "granitehybrid": Architecture(
        f"attn_norm.weight {_MAMBA2} ffn_norm.weight @ffn | {_LLAMA}",
        ne=_MAMBA2_NE,
        n_head_kv=(0, 2),
        keys={"embedding_scale": 4.0, "residual_scale": 0.5, "logit_scale": 2.0, **_MAMBA2_KEYS},
    ),
    "jamba": Architecture(
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
    "nemotron_h": Architecture(
        f"attn_norm.weight {_MAMBA2} | attn_norm.weight @qkv attn_output.weight | "
        "attn_norm.weight ffn_up.weight ffn_down.weight",
        norm="layer",
        ne=_MAMBA2_NE,
        n_head_kv=(0, 2, 0),
        n_layer=3,
        keys={"feed_forward_length": (0, 0, 128), **_MAMBA2_KEYS},
    ),
    # The layers from the 20th on use the K and V of earlier ones.
    "gemma3n": Architecture(
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
    "gptneox": Architecture(
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
    "falcon": Architecture(
        "attn_norm.weight attn_norm.bias @qkv attn_output.weight ffn_up.weight ffn_down.weight",
        norm="layer",
        outer=f"token_embd.weight {_LAYER_NORMS} output.weight",
        fused=True,
        free_head_dim=False,
    ),
    # From here on: loaders that want Q, K and V separate, or crash on the fused file.
    "bitnet": Architecture(_BITNET, outer=_TIED, free_head_dim=False),
    "qwen4exp": Architecture(
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
    "t5": Architecture(
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


@dataclass(frozen=True)
class ModelSpec:
    """What to write. None means: as the architecture has it.

    Sizes count elements. `types` maps glob patterns over tensor names to GGML types, the last
    pattern that matches wins; norms, biases, sinks, scales and the router stay F32 whatever it
    says, as in files of the converter.
    """

    architecture: str = "llama"
    n_layer: int | None = None
    n_embd: int = 64
    n_head: int = 4
    # One number, or several that take turns over the layers (0: no attention there).
    n_head_kv: int | tuple[int, ...] | None = None
    key_length: int | None = None
    value_length: int | None = None
    n_ff: int | None = None
    n_vocab: int = 320
    n_ctx: int = 512
    n_expert: int | None = None
    types: Mapping[str, gguf.GGMLQuantizationType] = field(default_factory=dict)
    bias: bool | None = None
    qk_norm: bool | None = None
    sinks: bool | None = None
    scales: Scales = "none"
    input_scales: Scales = "none"
    # Write attn_qkv instead of attn_q, attn_k, attn_v.
    fused: bool | None = None
    alignment: int = 32
    seed: int = 1
    rope_base: float | None = None
    # How many of a head's elements RoPE turns.
    n_rot: int | None = None
    rope_scaling: Literal["none", "linear", "yarn"] | None = None
    rope_factor: float = 4.0
    # Context length before scaling, in tokens.
    n_ctx_orig: int = 128
    rope_freqs: bool = False
    # Tokens; 0 leaves the key out.
    sliding_window: int | None = None
    tokenizer: Literal["spm", "bpe"] | None = None
    big_endian: bool = False
    # Full key names; they replace what the generator would write, None leaves a key out.
    metadata: Mapping[str, Value | None] = field(default_factory=dict)
    name: str = "random"

    def __post_init__(self) -> None:
        """Check what would give a file that no loader could mean.

        Raises ValueError.
        """
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise ValueError(f"unknown architecture {self.architecture!r}; known: {known}")
        if self.key_length is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.key_length and not ARCHITECTURES[self.architecture].free_head_dim:
            raise ValueError(f"{self.architecture} computes its head length, n_embd / n_head")
        for n_head_kv in _head_counts(self):
            if n_head_kv and self.n_head % n_head_kv:
                raise ValueError(f"{self.n_head} heads cannot share {n_head_kv} K/V heads")
        if self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise ValueError(f"alignment {self.alignment} is no power of two")


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: its data is that of `parts`, one after the other."""

    name: str
    ne: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]


def write_random_model(path: Path | str, spec: ModelSpec) -> None:
    """Write the model that `spec` describes to `path`, replacing what is there.

    Deterministic: the same spec gives the same bytes. Memory grows with the vocabulary only (about
    200 MB for 128k tokens with their merges), not with the tensors.

    Raises ValueError where a type's block does not divide a row, OSError as open and write do.
    """
    import gguf

    order = gguf.GGUFEndian.BIG if spec.big_endian else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, spec.architecture, endianess=order)
    writer.data_alignment = spec.alignment
    for key, value in _metadata(spec).items():
        _add_key(writer, key, value)
    tensors = [(tensor, _type_of(tensor, spec)) for tensor in _tensors(spec)]
    for tensor, tensor_type in tensors:
        _add_info(writer, tensor, tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]
    try:
        writer.write_padding(out, out.tell())
        for tensor, tensor_type in tensors:
            start = out.tell()
            for name, ne in tensor.parts:
                for piece in _data(name, ne, tensor_type, spec):
                    out.write(piece)
            writer.write_padding(out, out.tell() - start)
    finally:
        writer.close()


def data_bytes(spec: ModelSpec) -> int:
    """Bytes of all tensor data that `write_random_model` would write, without padding."""
    import gguf

    n_bytes = 0
    for tensor in _tensors(spec):
        block, block_bytes = gguf.GGML_QUANT_SIZES[_type_of(tensor, spec)]
        n_bytes += _count(tensor.ne) // block * block_bytes
    return n_bytes


def unmatched_patterns(spec: ModelSpec) -> list[str]:
    """The patterns of `spec.types` that no tensor's name matches."""
    names = [tensor.name for tensor in _tensors(spec)]
    return [
        pattern for pattern in spec.types if not any(fnmatchcase(name, pattern) for name in names)
    ]


def spec_of_size(spec: ModelSpec, n_bytes: int) -> ModelSpec:
    """`spec` with a shape as of a real model that comes near `n_bytes` of tensor data.

    Heads of 64, four of them to a K/V head, n_ff = 3 n_embd; the narrowest such model that needs
    32 layers at most, from about 2 MB on.
    """
    for n_embd in (256, 512, 1024, 2048, 4096, 8192):
        one, two = (data_bytes(_shaped(spec, n_embd, n_layer)) for n_layer in (1, 2))
        n_layer = max(1, round((n_bytes - 2 * one + two) / (two - one)))
        if n_layer <= 32:
            break
    return _shaped(spec, n_embd, n_layer)


def _shaped(spec: ModelSpec, n_embd: int, n_layer: int) -> ModelSpec:
    n_head = n_embd // 64
    return replace(
        spec,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        # An architecture's own pattern over the layers stays.
        n_head_kv=None if _architecture(spec).n_head_kv else n_head // 4,
        n_ff=3 * n_embd,
        key_length=None,
        value_length=None,
    )


# --- what the file holds -----------------------------------------------------------------------


def demo_spec() -> ModelSpec:
    """A small llama whose types are mixed like those of a Q4_K_M file: V is Q6_K in two layers."""
    from gguf import GGMLQuantizationType as T

    more_bits = {f"blk.{layer}.attn_v.weight": T.Q6_K for layer in (0, 7)}
    return ModelSpec(
        n_layer=8, n_embd=512, n_head=8, n_head_kv=2, n_ctx=4096, types={"*": T.Q4_K, **more_bits}
    )


def _architecture(spec: ModelSpec) -> Architecture:
    return ARCHITECTURES[spec.architecture]


def _n_layer(spec: ModelSpec) -> int:
    return _architecture(spec).n_layer if spec.n_layer is None else spec.n_layer


def _head_counts(spec: ModelSpec) -> tuple[int, ...]:
    """n_head_kv by layer, taking turns."""
    if isinstance(spec.n_head_kv, int):
        return (spec.n_head_kv,)
    return spec.n_head_kv or _architecture(spec).n_head_kv or (2,)


def _sizes(spec: ModelSpec, layer: int = 0) -> dict[str, int]:
    """The words of `NE` and what they are in this layer."""
    arch = _architecture(spec)
    key_length = spec.key_length or spec.n_embd // spec.n_head
    value_length = spec.value_length or int(key_length * arch.value)
    n_rot = spec.n_rot if spec.n_rot is not None else int(key_length * arch.rotary) // 2 * 2
    counts = _head_counts(spec)
    n_head_kv = counts[layer % len(counts)]
    return {
        "n_embd": spec.n_embd,
        "n_vocab": spec.n_vocab,
        "n_layer": _n_layer(spec),
        "n_head": spec.n_head,
        "n_head_kv": n_head_kv,
        "key_length": key_length,
        "value_length": value_length,
        "q": spec.n_head * key_length,
        "k": n_head_kv * key_length,
        "v": n_head_kv * value_length,
        "o": spec.n_head * value_length,
        "n_ff": spec.n_ff or 2 * spec.n_embd,
        "n_expert": arch.n_expert if spec.n_expert is None else spec.n_expert,
        "n_rot": n_rot,
        "n_rot/2": n_rot // 2,
    }


def _size(words: str, sizes: Mapping[str, int]) -> int:
    """The value of a word, a number or a product such as 2*n_ff."""
    product = 1
    for word in words.split("*"):
        product *= int(word) if word.isdigit() else sizes[word]
    return product


def _tensors(spec: ModelSpec) -> list[_Tensor]:
    """All tensors in file order."""
    arch = _architecture(spec)
    tensors = [_tensor("", name, (name,), spec, 0) for name in arch.outer.split()]
    if spec.rope_freqs:
        tensors.append(_tensor("", "rope_freqs.weight", ("rope_freqs.weight",), spec, 0))
    kinds = arch.layer.split(" | ")
    for prefix, extra in arch.prefixes.items():
        for layer in range(_n_layer(spec)):
            for word in f"{kinds[layer % len(kinds)]} {extra}".split():
                for name, parts in _expand(word, spec):
                    tensors.append(_tensor(f"{prefix}{layer}.", name, parts, spec, layer))
    return tensors


def _expand(word: str, spec: ModelSpec) -> list[tuple[str, tuple[str, ...]]]:
    """The tensors that a word of `Architecture.layer` stands for: name and names of the parts."""
    if word == "@qkv":
        return _qkv(spec)
    if word == "@qk":
        separate = _qkv(replace(spec, fused=False))
        return [(name, parts) for name, parts in separate if not name.startswith("attn_v.")]
    names = [word]
    if word == "@gemma4_experts":
        names = _GEMMA4_EXPERTS.split() if _sizes(spec)["n_expert"] else []
    elif word == "@ffn" and _sizes(spec)["n_expert"]:
        names = [f"ffn_{name}.weight" for name in ("gate_inp", "gate_exps", "up_exps", "down_exps")]
    elif word == "@ffn":
        names = [f"ffn_{name}.weight" for name in ("gate", "up", "down")]
    return [(name, (name,)) for name in names]


_GEMMA4_EXPERTS = (
    "ffn_gate_inp.weight ffn_gate_inp.scale pre_ffw_norm_2.weight post_ffw_norm_1.weight "
    "post_ffw_norm_2.weight ffn_gate_exps.weight ffn_up_exps.weight ffn_down_exps.weight"
)
_QKV = ("attn_q", "attn_k", "attn_v")


def _qkv(spec: ModelSpec) -> list[tuple[str, tuple[str, ...]]]:
    """Q, K and V, or the one tensor made of them, and what belongs to them."""
    arch = _architecture(spec)
    kinds = ["weight"]
    if _or_default(spec.bias, arch.bias):
        kinds.append("bias")
    tensors: list[tuple[str, tuple[str, ...]]] = []
    if _or_default(spec.fused, arch.fused):
        for kind in kinds:
            tensors.append((f"attn_qkv.{kind}", tuple(f"{part}.{kind}" for part in _QKV)))
        tensors += [(f"attn_qkv.{kind}", (f"attn_q.{kind}",)) for kind in _scale_kinds(spec)]
    else:
        names = [f"{part}.{kind}" for part in _QKV for kind in kinds + _scale_kinds(spec)]
        tensors += [(name, (name,)) for name in names]
    extra = []
    if _or_default(spec.qk_norm, arch.qk_norm):
        extra += ["attn_q_norm.weight", "attn_k_norm.weight"]
    if _or_default(spec.sinks, arch.sinks):
        extra.append("attn_sinks.weight")
    return tensors + [(name, (name,)) for name in extra]


def _scale_kinds(spec: ModelSpec) -> list[str]:
    rules = {"scale": spec.scales, "input_scale": spec.input_scales}
    return [kind for kind, rule in rules.items() if rule != "none"]


def _or_default(wanted: bool | None, default: bool) -> bool:
    return default if wanted is None else wanted


def _tensor(
    prefix: str, name: str, part_names: Sequence[str], spec: ModelSpec, layer: int
) -> _Tensor:
    parts = tuple((prefix + part, _ne(part, spec, layer)) for part in part_names)
    _, first = parts[0]
    rows = sum(ne[-1] for _, ne in parts)
    return _Tensor(prefix + name, (*first[:-1], rows), parts)


def _split(name: str) -> tuple[str, str]:
    """A tensor name as base and kind ("weight", "bias", "scale"); some have no kind."""
    base, dot, kind = name.rpartition(".")
    return (base, kind) if dot and kind in _KINDS else (name, "")


_KINDS = ("weight", "bias", "scale", "input_scale")


def _ne(name: str, spec: ModelSpec, layer: int) -> tuple[int, ...]:
    base, kind = _split(name)
    own = _architecture(spec).ne
    if kind.endswith("scale") and name not in own:
        return (1,)
    sizes = _sizes(spec, layer)
    words = own.get(name) or own.get(base) or NE[base]
    ne = tuple(_size(word, sizes) for word in words.split())
    return (ne[1:] or ne) if kind == "bias" else ne


# Always F32, as the converter leaves them: what is added or multiplied, and the router.
_F32 = ("*norm.weight", "*.ffn_gate_inp.weight", "*.bias", "*scale", "*sinks.weight")


def _type_of(tensor: _Tensor, spec: ModelSpec) -> gguf.GGMLQuantizationType:
    import gguf

    tensor_type = gguf.GGMLQuantizationType.F32
    if len(tensor.ne) == 1 or any(fnmatchcase(tensor.name, pattern) for pattern in _F32):
        return tensor_type
    for pattern, wanted in spec.types.items():
        if fnmatchcase(tensor.name, pattern):
            tensor_type = wanted
    block, _ = gguf.GGML_QUANT_SIZES[tensor_type]
    if tensor.ne[0] % block:
        raise ValueError(
            f"{tensor.name}: rows of {tensor.ne[0]} do not divide into {tensor_type.name} "
            f"blocks of {block}"
        )
    return tensor_type


def _add_info(
    writer: gguf.GGUFWriter, tensor: _Tensor, tensor_type: gguf.GGMLQuantizationType
) -> None:
    import gguf
    import numpy as np

    shape = tensor.ne[::-1]
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    n_bytes = _count(tensor.ne) // block * block_bytes
    # With any dtype but uint8 the writer takes the shape as elements.
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes, raw_dtype=tensor_type)


def _count(ne: Sequence[int]) -> int:
    n = 1
    for size in ne:
        n *= size
    return n


# --- metadata ----------------------------------------------------------------------------------


def _metadata(spec: ModelSpec) -> dict[str, Value]:
    """All keys in file order, except general.architecture, which the writer puts first."""
    keys: dict[str, Value | None] = {"general.name": spec.name}
    if spec.alignment != 32:
        keys["general.alignment"] = spec.alignment
    for key, value in _architecture_keys(spec).items():
        keys[f"{spec.architecture}.{key}"] = value
    for key, value in _architecture(spec).global_keys.items():
        keys[key] = _resolve(value, spec)
    tokenizer = spec.tokenizer or ("bpe" if spec.n_vocab >= 65536 else "spm")
    keys.update(_bpe_vocabulary(spec) if tokenizer == "bpe" else _spm_vocabulary(spec))
    keys.update(spec.metadata)
    return {key: value for key, value in keys.items() if value is not None}


def _architecture_keys(spec: ModelSpec) -> dict[str, Value]:
    arch = _architecture(spec)
    sizes = _sizes(spec)
    counts = _head_counts(spec)
    epsilon = "layer_norm_rms_epsilon" if arch.norm == "rms" else "layer_norm_epsilon"
    keys: dict[str, Value] = {
        "context_length": spec.n_ctx,
        "embedding_length": spec.n_embd,
        "block_count": _n_layer(spec),
        "feed_forward_length": sizes["n_ff"],
        "attention.head_count": spec.n_head,
        "attention.head_count_kv": counts[0] if len(counts) == 1 else counts,
        "attention.key_length": sizes["key_length"],
        "attention.value_length": sizes["value_length"],
        f"attention.{epsilon}": 1e-5,
        "rope.dimension_count": sizes["n_rot"],
        "rope.freq_base": spec.rope_base or arch.rope_base,
        "vocab_size": spec.n_vocab,
    }
    if spec.rope_scaling is not None:
        keys["rope.scaling.type"] = spec.rope_scaling
        keys["rope.scaling.factor"] = spec.rope_factor
        keys["rope.scaling.original_context_length"] = spec.n_ctx_orig
    window = arch.sliding_window if spec.sliding_window is None else spec.sliding_window
    if window:
        keys["attention.sliding_window"] = window
    if sizes["n_expert"]:
        keys["expert_count"] = sizes["n_expert"]
        keys["expert_used_count"] = min(2, sizes["n_expert"])
        keys["expert_feed_forward_length"] = sizes["n_ff"]
    keys.update(arch.keys)
    return {key: _resolve(value, spec) for key, value in keys.items()}


def _resolve(value: Value, spec: ModelSpec) -> Value:
    """A value of `Architecture.keys` as it is written."""
    if isinstance(value, str) and value.startswith("="):
        return _size(value[1:], _sizes(spec))
    if isinstance(value, tuple):
        return [value[layer % len(value)] for layer in range(_n_layer(spec))]
    return value


def _add_key(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    """Add a key with the GGUF type that llama.cpp expects of such a value."""
    import gguf

    kinds = gguf.GGUFValueType
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        kind = kinds.INT32 if value < 0 else kinds.UINT32 if value < 1 << 32 else kinds.UINT64
        writer.add_key_value(key, value, kind)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_key_value(key, value, kinds.STRING)
    else:
        # Naming the item type saves the writer a look at each of 280k merges.
        item = kinds.get_type(value[0])
        writer.add_key_value(key, list(value), kinds.ARRAY, sub_type=item)


# Token types as in llama.cpp: 1 normal, 2 unknown, 3 control, 6 byte.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def _spm_vocabulary(spec: ModelSpec) -> dict[str, Value]:
    """A SentencePiece vocabulary: three specials, 256 bytes, then words of syllables."""
    if spec.n_vocab < 259:
        raise ValueError(f"n_vocab {spec.n_vocab}: this vocabulary needs 259 at least")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += _words(spec.n_vocab - len(tokens), "\u2581")
    types = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256]
    types += [_NORMAL] * (spec.n_vocab - len(types))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(spec.n_vocab)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _bpe_vocabulary(spec: ModelSpec) -> dict[str, Value]:
    """A byte-pair vocabulary as of Llama 3: 256 bytes, words, 256 specials, all merges."""
    if spec.n_vocab < 1024:
        raise ValueError(f"n_vocab {spec.n_vocab}: this vocabulary needs 1024 at least")
    words = _words(spec.n_vocab - 512, "\u0120")
    tokens = _byte_symbols() + words
    bos = len(tokens)
    tokens += ["<|begin_of_text|>", "<|end_of_text|>"]
    tokens += [f"<|reserved_special_token_{i}|>" for i in range(254)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_NORMAL] * bos + [_CONTROL] * 256,
        "tokenizer.ggml.merges": _merges(words),
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": bos + 1,
    }


def _byte_symbols() -> list[str]:
    """The printable stand-ins for the 256 bytes that byte-level BPE uses."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _words(count: int, space: str) -> list[str]:
    """`count` different words of two-letter syllables, shorter ones first.

    Some begin with `space`. All words of one length come before any of the next, so that nearly
    every half of a word is a word too, and merges are as many per token as in real vocabularies.
    """
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    starts = syllables[:40] + [space + s[0] for s in syllables[::5]]
    words: list[str] = []
    tails = [""]
    while len(words) < count:
        longer = [head + tail for tail in tails for head in starts]
        words += longer[: count - len(words)]
        tails = [head + tail for tail in tails for head in syllables[:30]]
    return words


def _merges(words: Sequence[str]) -> list[str]:
    """Every way to join two words, or bytes, into a third one."""
    known = {*words, *_byte_symbols()}
    return [
        f"{word[:cut]} {word[cut:]}"
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in known and word[cut:] in known
    ]


# --- data --------------------------------------------------------------------------------------


def _data(
    name: str, ne: tuple[int, ...], tensor_type: gguf.GGMLQuantizationType, spec: ModelSpec
) -> Iterator[memoryview]:
    """The bytes of one weight, in pieces. A tile is drawn once and repeated to the full length."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    count = _count(ne)
    # A tile is whole blocks; a tensor without a full tile is drawn as it is.
    n_drawn = min(count, TILE_ELEMENTS)
    tile = _encode(_values(name, ne, n_drawn, spec), tensor_type, spec)
    n_bytes = count // block * block_bytes
    repeats = max(1, min(PIECE_BYTES, n_bytes) // len(tile))
    piece = memoryview(tile.tobytes() * repeats)
    for start in range(0, n_bytes, len(piece)):
        yield piece[: n_bytes - start]


def _values(name: str, ne: tuple[int, ...], n: int, spec: ModelSpec) -> NDArray[np.float32]:
    """The first `n` values of a tensor, shape [n]."""
    import numpy as np

    rng = _stream(name, spec)
    base, kind = _split(name)
    if kind.endswith("scale") and n == 1:
        return _scale(base, kind, spec)
    noise = rng.standard_normal(n, dtype=np.float32)
    if kind.endswith("scale"):
        return 1.0 + 0.2 * noise
    if base == "rope_freqs":
        return np.linspace(1.0, 8.0, n, dtype=np.float32)
    if base.endswith(("norm", "norm_1", "norm_2")) and kind in ("weight", ""):
        return 1.0 + 0.2 * noise
    if base.endswith("sinks"):
        return noise
    if base.endswith("layer_output_scale"):
        return np.ones(n, np.float32)
    if base.endswith("ssm_a"):
        # A decay: negative.
        return -np.abs(noise)
    if kind == "bias":
        return 0.2 * noise
    # Keeps the length of what it multiplies: scores and logits come out of order 1, so that a
    # wrong row, a wrong position or a missing bias moves every probability.
    return noise * np.float32(ne[0] ** -0.5)


def _stream(name: str, spec: ModelSpec) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng([spec.seed, zlib.crc32(name.encode())])


def _scale(base: str, kind: str, spec: ModelSpec) -> NDArray[np.float32]:
    """One scale, shape [1]: by layer alone if all are to be equal."""
    import numpy as np

    prefix, _, projection = base.rpartition(".")
    rule = spec.scales if kind == "scale" else spec.input_scales
    key = f"{prefix}.{kind}" if rule == "equal" else f"{prefix}.{projection}.{kind}"
    return _stream(key, spec).uniform(0.5, 1.5, 1).astype(np.float32)


# Block types: byte offset of each float16 scale -> its weight. One that is not 1 belongs to the
# minimum, which is subtracted (or added, where negative): it puts the middle of the values at zero.
# Types without such scales are set apart in `_set_scales`.
_F16_SCALES: dict[str, dict[int, float]] = {
    "Q4_0": {0: 1},
    "Q4_1": {0: 1, 2: -7.5},
    "Q5_0": {0: 1},
    "Q5_1": {0: 1, 2: -15.5},
    "Q8_0": {0: 1},
    "Q2_K": {80: 1, 82: 1.5},
    "Q3_K": {108: 1},
    "Q4_K": {0: 1, 2: 7.5},
    "Q5_K": {0: 1, 2: 15.5},
    "Q6_K": {208: 1},
    "IQ2_XXS": {0: 1},
    "IQ2_XS": {0: 1},
    "IQ2_S": {0: 1},
    "IQ3_XXS": {0: 1},
    "IQ3_S": {0: 1},
    "IQ1_S": {0: 1},
    "IQ1_M": {},
    "IQ4_NL": {0: 1},
    "IQ4_XS": {0: 1},
    "TQ1_0": {52: 1},
    "TQ2_0": {64: 1},
    "MXFP4": {},
    "NVFP4": {},
}


def _encode(
    values: NDArray[np.float32], tensor_type: gguf.GGMLQuantizationType, spec: ModelSpec
) -> NDArray[np.uint8]:
    """Values as the bytes of a type, quantized or, where gguf-py cannot, as random blocks."""
    import gguf
    import numpy as np

    kinds = gguf.GGMLQuantizationType
    if tensor_type == kinds.F32:
        return _bytes(values, 4, spec)
    if tensor_type == kinds.F16:
        return _bytes(values.astype(np.float16), 2, spec)
    if tensor_type == kinds.BF16:
        return _bytes(gguf.quants.quantize(values, tensor_type), 2, spec)
    try:
        data = gguf.quants.quantize(values, tensor_type).view(np.uint8).reshape(-1)
    except NotImplementedError:
        data = _random_blocks(values, tensor_type)
    if spec.big_endian:
        _swap_scales(data, tensor_type)
    return data


def _bytes(values: NDArray[Any], width: int, spec: ModelSpec) -> NDArray[np.uint8]:
    import numpy as np

    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
    return (data[:, ::-1] if spec.big_endian else data).reshape(-1)


def _random_blocks(
    values: NDArray[np.float32], tensor_type: gguf.GGMLQuantizationType
) -> NDArray[np.uint8]:
    """Blocks of random quants, with scales that give about the spread of `values`.

    The stream comes from the values' own bytes: different weights, different blocks.
    """
    import gguf
    import numpy as np

    if tensor_type.name not in _F16_SCALES:
        raise ValueError(f"no way is known to make {tensor_type.name} blocks")
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    rng = np.random.default_rng(zlib.crc32(values.tobytes()))
    n_blocks = values.size // block
    data = rng.integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
    spread = float(np.sqrt(np.mean(np.square(values))))
    jitter = rng.uniform(0.5, 1.5, n_blocks)
    # Values are linear in the scales: measure the spread for 1/4, then set the scale for it.
    _set_scales(data, tensor_type, np.full(n_blocks, 1 / 4))
    sample = gguf.quants.dequantize(data[:64].reshape(-1), tensor_type)
    unit = 4 * float(np.sqrt(np.mean(np.square(sample, dtype=np.float64))))
    _set_scales(data, tensor_type, jitter * spread / unit)
    return data.reshape(-1)


def _set_scales(
    data: NDArray[np.uint8], tensor_type: gguf.GGMLQuantizationType, scale: NDArray[np.float64]
) -> None:
    """Put `scale`, shape [n_blocks], into blocks, shape [n_blocks, block_bytes]."""
    import numpy as np

    for offset, weight in _F16_SCALES[tensor_type.name].items():
        halves = (scale * weight).astype("<f2")
        data[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    if tensor_type.name == "IQ1_M":
        # Its float16 lies in the top four bits of four 16-bit words, lowest bits first.
        halves = scale.astype("<f2").view("<u2")
        for word in range(4):
            nibble = ((halves >> (4 * word)) & 15).astype(np.uint8)
            at = 48 + 2 * word + 1
            data[:, at] = (data[:, at] & 15) | (nibble << 4)
    elif tensor_type.name == "MXFP4":
        # An exponent in powers of two, biased by 127.
        data[:, 0] = np.clip(np.round(np.log2(scale)) + 127, 1, 254).astype(np.uint8)
    elif tensor_type.name == "NVFP4":
        # Four 8-bit floats: 4 bits of exponent, biased by 7, then 3 bits of fraction.
        data[:, :4] = np.clip(np.round(8 * (np.log2(scale[:, None]) + 7)), 1, 112)


def _swap_scales(data: NDArray[np.uint8], tensor_type: gguf.GGMLQuantizationType) -> None:
    """Turn the float16 scales in blocks to the other byte order, in place."""
    import gguf

    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    blocks = data.reshape(-1, block_bytes)
    for offset in _F16_SCALES[tensor_type.name]:
        blocks[:, [offset, offset + 1]] = blocks[:, [offset + 1, offset]]
