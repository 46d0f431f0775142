"""Models of one architecture that differ in what their loaders may or may not find.

One model for each architecture does not show what becomes of tensors and keys that are optional:
blocks for several tokens (nextn), layers that stand for others, head counts and lengths by layer,
indexers, windows, norms' biases. Each is fused here, and llama.cpp's numbers stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader

from tests.conftest import dry, fused_copy, unfused_copy
from tests.edit import edited
from tests.llama_judge import LoadFailed, available, drafts, embeddings, log_probabilities
from tests.models.architectures import HRM_TEXT, LAYOUTS, Layout, Value
from tests.models.extra_layouts import EXTRA

pytestmark = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")

Model = Callable[..., Path]

# Longer than every window and block.
PROMPT = [1, 261, 7, 300, 45, 46, 290, 12, 9, 270, 33] * 4


@dataclass(frozen=True)
class Variant:
    """spec: fields of ModelSpec. judge: arguments of the judge's function."""

    architecture: str
    layout: Layout
    spec: Mapping[str, Any] = field(default_factory=dict)
    judge: Mapping[str, Any] = field(default_factory=dict)
    encodes: bool = False


_NO_FLASH = {"flash_attention": "off"}
_QUANTIZED_CACHE = {"flash_attention": "on", "cache_type": "q8_0"}
_DENSE = "ffn_gate.weight ffn_up.weight ffn_down.weight"
_LLAMA = "attn_norm.weight @qkv attn_output.weight ffn_norm.weight @ffn"
_SANDWICH = (
    "attn_norm.weight @qkv attn_output.weight post_attention_norm.weight "
    "ffn_norm.weight @ffn post_ffw_norm.weight"
)
_TIED = "token_embd.weight output_norm.weight"
_GATED = _LLAMA.replace("@qkv", "@qkv attn_gate.weight").replace("@ffn", _DENSE)
_SHARED = "ffn_gate_shexp.weight ffn_up_shexp.weight ffn_down_shexp.weight"
_SHARED_NE = {
    "ffn_gate_shexp": "n_embd n_ff",
    "ffn_up_shexp": "n_embd n_ff",
    "ffn_down_shexp": "n_ff n_embd",
    "exp_probs_b": "n_expert",
}
# Where a loader wants to know of experts, though every layer is dense.
_NO_EXPERTS: dict[str, Value] = {
    "leading_dense_block_count": 99,
    "expert_feed_forward_length": "=n_ff",
    "expert_gating_func": 2,
    "expert_shared_count": 1,
    "expert_count": 4,
    "expert_used_count": 2,
}


def _foreseeing(layout: Layout, n_layer: int, **keys: Value) -> Layout:
    """With one more layer, which predicts a token more and plays no part otherwise."""
    patterns = layout.layer.split(" | ")
    layers = [patterns[layer % len(patterns)] for layer in range(n_layer)]
    names = ("eh_proj", "enorm", "hnorm", "shared_head_norm")
    if "nextn.shared_head_norm" not in layout.ne:
        names = names[:3]
    extra = " ".join(f"nextn.{name}.weight" for name in names)
    return replace(
        layout,
        layer=" | ".join([*layers, f"{patterns[-1]} {extra}"]),
        n_layer=n_layer + 1,
        ne={
            "nextn.eh_proj": "2*n_embd n_embd",
            "nextn.enorm": "n_embd",
            "nextn.hnorm": "n_embd",
            **layout.ne,
        },
        keys={**layout.keys, "nextn_predict_layers": 1, **keys},
    )


def _with_head_norm(layout: Layout) -> Layout:
    return replace(layout, ne={**layout.ne, "nextn.shared_head_norm": "n_embd"})


_STEP35 = Layout(
    _GATED,
    ne={"attn_gate": "n_embd n_head"},
    qk_norm=True,
    sliding_window=8,
    keys={
        "attention.sliding_window_pattern": (True, False),
        "expert_feed_forward_length": "=n_ff",
        "rope.freq_base_swa": 5000.0,
    },
)
_CHAMELEON = Layout(
    _LLAMA.replace("@qkv", "@qkv attn_q_norm.bias attn_k_norm.bias"),
    ne={
        "attn_q_norm": "key_length n_head",
        "attn_k_norm": "key_length n_head_kv",
        # The first number of a bias is left out.
        "attn_q_norm.bias": "1 key_length n_head",
        "attn_k_norm.bias": "1 key_length n_head_kv",
    },
    qk_norm=True,
    free_head_dim=False,
)
_INDEXER = "indexer.q_proj.weight indexer.k_proj.weight indexer.q_norm.weight indexer.k_norm.weight"
_MINIMAX_M3 = Layout(
    f"{_LLAMA.replace('@ffn', _DENSE)} | {_LLAMA} exp_probs_b.bias {_SHARED} {_INDEXER}",
    ne={
        "indexer.q_proj": "n_embd 32",
        "indexer.k_proj": "n_embd 16",
        "indexer.q_norm": "16",
        "indexer.k_norm": "16",
        **_SHARED_NE,
    },
    qk_norm=True,
    n_expert=4,
    keys={
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "attention.indexer.head_count": 2,
        "attention.indexer.key_length": 16,
        "attention.indexer.top_k": 16,
        "attention.indexer.block_size": 8,
        "attention.indexer.local_blocks": 1,
    },
)
_LAGUNA = Layout(
    _GATED,
    ne={"attn_gate": "n_embd n_head"},
    qk_norm=True,
    sliding_window=8,
    keys={**_NO_EXPERTS, "attention.sliding_window_pattern": (False, True)},
)
_EXAONE_MOE = Layout(
    _LLAMA.replace("@ffn", _DENSE), qk_norm=True, n_layer=4, sliding_window=8, keys=_NO_EXPERTS
)
# Its layer for further tokens must have experts.
_GLM4MOE_LAYER = EXTRA["glm4moe"].layer
_GLM4MOE = replace(
    EXTRA["glm4moe"],
    layer=f"{_GLM4MOE_LAYER.replace('@ffn', _DENSE)} | {_GLM4MOE_LAYER} exp_probs_b.bias {_SHARED}",
    ne={**EXTRA["glm4moe"].ne, **_SHARED_NE},
    n_expert=4,
    keys={**EXTRA["glm4moe"].keys, "leading_dense_block_count": 1, "expert_shared_count": 1},
)
_GEMMA4 = LAYOUTS["gemma4"]
# Full layers with 4 heads of 16, for K and V too; the others with 4 of 8, 2 for K and V.
_GEMMA4_TWO_LENGTHS = replace(
    _GEMMA4,
    layer=_GEMMA4.layer.split(" | ")[0],
    ne={
        **_GEMMA4.ne,
        "attn_q": "n_embd 16*n_head_kv",
        "attn_k": "n_embd 4*n_head_kv*n_head_kv",
        "attn_v": "n_embd 4*n_head_kv*n_head_kv",
        "attn_output": "16*n_head_kv n_embd",
        "attn_q_norm": "4*n_head_kv",
        "attn_k_norm": "4*n_head_kv",
    },
    n_head_kv=(4, 2),
    n_layer=4,
    keys={
        **_GEMMA4.keys,
        "attention.sliding_window_pattern": (False, True),
        "attention.key_length_swa": 8,
        "attention.value_length_swa": 8,
        "rope.dimension_count_swa": 8,
    },
)
_MIMO2 = LAYOUTS["mimo2"]
_MIMO2_SCALED = replace(_MIMO2, keys={**_MIMO2.keys, "attention.value_scale": 0.5})
_LATENT = (
    "attn_norm.weight attn_kv_a_norm.weight attn_q.weight attn_kv_a_mqa.weight attn_k_b.weight "
    f"attn_v_b.weight attn_output.weight ffn_norm.weight {_DENSE}"
)
# Linear attention, and Q alone where K and V come from fewer numbers.
_KIMI = Layout(
    "attn_norm.weight ssm_conv1d_q.weight ssm_conv1d_k.weight ssm_conv1d_v.weight @qkv "
    "ssm_f_a.weight ssm_f_b.weight ssm_beta.weight ssm_a ssm_dt.bias ssm_g_a.weight "
    f"ssm_g_b.weight ssm_norm.weight attn_output.weight ffn_norm.weight {_DENSE} | {_LATENT}",
    ne={
        **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "n_embd 64"),
        **dict.fromkeys(("ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v"), "4 1 64"),
        "attn_output": "64 n_embd",
        "attn_kv_a_norm": "16",
        "attn_kv_a_mqa": "n_embd 24",
        "attn_k_b": "8 16 4",
        "attn_v_b": "16 16 4",
        "ssm_f_a": "n_embd 16",
        "ssm_f_b": "16 64",
        "ssm_g_a": "n_embd 16",
        "ssm_g_b": "16 64",
        "ssm_beta": "n_embd 4",
        "ssm_a": "1 4",
        "ssm_dt": "64",
        "ssm_norm": "16",
    },
    n_head_kv=(0, 1),
    n_layer=4,
    keys={
        "attention.key_length_mla": 16,
        "attention.value_length_mla": 16,
        "attention.kv_lora_rank": 16,
        "ssm.conv_kernel": 4,
        "kda.head_dim": 16,
        **_NO_EXPERTS,
    },
)
_KIMI_SPEC = {"key_length": 24, "value_length": 16, "n_rot": 8}
_ENCODER = Layout(_LLAMA, outer=_TIED, free_head_dim=False)
_GEMMA_ENCODER = Layout(
    _SANDWICH,
    outer=_TIED,
    qk_norm=True,
    sliding_window=8,
    keys={"attention.sliding_window_pattern": 2},
)

VARIANTS: dict[str, Variant] = {
    # Layers for more tokens: skipped, or kept for speculation.
    **{
        f"{name}, foreseeing": Variant(name, _foreseeing(layout, n_layer))
        for name, layout, n_layer in (
            ("exaone4", LAYOUTS["exaone4"], 2),
            ("exaone-moe", _EXAONE_MOE, 4),
            ("glm4", LAYOUTS["glm4"], 2),
            ("glm4moe", _GLM4MOE, 1),
            ("cohere2moe", LAYOUTS["cohere2moe"], 4),
            ("hy_v3", _with_head_norm(LAYOUTS["hy_v3"]), 2),
            ("mimo2", _MIMO2, 2),
            ("qwen35", _with_head_norm(LAYOUTS["qwen35"]), 2),
            ("qwen35moe", _with_head_norm(LAYOUTS["qwen35moe"]), 2),
            ("qwen3next", _with_head_norm(LAYOUTS["qwen3next"]), 2),
        )
    },
    "step35": Variant("step35", _STEP35),
    "step35, bare": Variant("step35", replace(_STEP35, layer=_LLAMA, qk_norm=False)),
    "step35, biases, narrow V": Variant(
        "step35", replace(_STEP35, value=0.5), {"bias": True, "n_head_kv": (2, 4)}
    ),
    "step35, foreseeing": Variant(
        "step35",
        _foreseeing(_STEP35, 2, **{"attention.sliding_window_pattern": (True, False, False)}),
    ),
    # It never predicts 8192 of its tokens.
    "chameleon": Variant("chameleon", _CHAMELEON, {"n_vocab": 8300}),
    "chameleon, no biases of norms": Variant(
        "chameleon",
        replace(_CHAMELEON, layer=_LLAMA, keys={"swin_norm": True}),
        {"n_vocab": 8300, "bias": True},
    ),
    "eurobert": Variant("eurobert", _ENCODER, encodes=True),
    "eurobert, biases": Variant("eurobert", _ENCODER, {"bias": True}, _NO_FLASH, encodes=True),
    "gemma-embedding": Variant("gemma-embedding", _GEMMA_ENCODER, encodes=True),
    "llama-embed": Variant("llama-embed", Layout(_LLAMA), encodes=True),
    "llama-embed, biases": Variant(
        "llama-embed", Layout(_LLAMA), {"bias": True}, _NO_FLASH, encodes=True
    ),
    "minimax-m3, sparse": Variant("minimax-m3", _MINIMAX_M3),
    "minimax-m3, dense": Variant("minimax-m3", _MINIMAX_M3, {"bias": True}, _NO_FLASH),
    # Heads, lengths and gates by layer.
    "laguna": Variant("laguna", _LAGUNA, {"n_head_kv": (2, 4)}),
    "laguna, a gate for each element": Variant(
        "laguna", replace(_LAGUNA, ne={"attn_gate": "n_embd q"}), {"sliding_window": 0}
    ),
    "gemma4, two lengths": Variant("gemma4", _GEMMA4_TWO_LENGTHS),
    "gemma4, two lengths, no flash": Variant("gemma4", _GEMMA4_TWO_LENGTHS, judge=_NO_FLASH),
    "kimi-linear": Variant("kimi-linear", _KIMI, _KIMI_SPEC),
    "kimi-linear, biases": Variant("kimi-linear", _KIMI, {**_KIMI_SPEC, "bias": True}),
    # Layers that stand for others.
    "nanbeige": Variant("nanbeige", Layout(_LLAMA, keys={"num_loops": 3})),
    "nanbeige, scales": Variant(
        "nanbeige",
        Layout(_LLAMA, keys={"num_loops": 2}),
        {"scales": "equal", "types": {"blk.1.attn_v.weight": T.F16}},
    ),
    "hrm_text": Variant("hrm_text", HRM_TEXT, {"bias": True}),
    "hrm_text, mixed": Variant("hrm_text", HRM_TEXT, {"types": {"blk.1.attn_v.weight": T.F16}}),
    "mimo2, a scale of V": Variant("mimo2", _MIMO2_SCALED, {"bias": True}),
    "mimo2, a scale of V, no flash": Variant("mimo2", _MIMO2_SCALED, judge=_NO_FLASH),
    # A quantized cache turns Q, K and V, which may be views of the fused result.
    "refact, quantized cache": Variant(
        "refact", LAYOUTS["refact"], {"n_embd": 256}, _QUANTIZED_CACHE
    ),
    "granite without RoPE, quantized cache": Variant(
        "granite",
        LAYOUTS["granite"],
        {"n_embd": 256, "metadata": {"granite.rope.scaling.finetuned": False}},
        _QUANTIZED_CACHE,
    ),
    "stablelm, norms, quantized cache": Variant(
        "stablelm",
        LAYOUTS["stablelm"],
        {"n_embd": 256, "qk_norm": True, "bias": True},
        _QUANTIZED_CACHE,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_identical_numbers(model: Model, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    variant = VARIANTS[name]
    monkeypatch.setitem(LAYOUTS, variant.architecture, variant.layout)
    original = model(architecture=variant.architecture, **variant.spec)
    fused = fused_copy(original)
    judge = embeddings if variant.encodes else log_probabilities
    extra = {} if variant.encodes else {"prefixes": [1, 2], "n_predict": 2}
    before, after = (judge(path, PROMPT, **extra, **variant.judge) for path in (original, fused))
    assert np.isfinite(before).all()
    assert len(np.unique(before)) > 100
    np.testing.assert_array_equal(before, after)


# -- layers for further tokens (MTP), drafting ----------------------------------------------------

DRAFTING = ("cohere2moe", "glm4moe", "hy_v3", "qwen35", "qwen35moe", "qwen3next", "step35")


def foreseeing(model: Model, monkeypatch: pytest.MonkeyPatch, architecture: str) -> Path:
    variant = VARIANTS[f"{architecture}, foreseeing"]
    monkeypatch.setitem(LAYOUTS, architecture, variant.layout)
    return model(architecture=architecture, **variant.spec)


@pytest.mark.parametrize("architecture", DRAFTING)
def test_identical_drafts(model: Model, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    original = foreseeing(model, monkeypatch, architecture)
    fused = fused_copy(original)
    last = max(layer.name for layer in dry(original).plan.changed)
    assert f"{last}.nextn.eh_proj.weight" in {t.name for t in GGUFReader(original).tensors}
    before = drafts(original, PROMPT)
    assert len(set(before)) > 50
    assert drafts(fused, PROMPT) == before


def test_mimo2_drafts_only_when_it_is_fused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    original = foreseeing(model, monkeypatch, "mimo2")
    with pytest.raises(LoadFailed, match="MIMO2 MTP requires fused attn_qkv"):
        drafts(original, PROMPT)
    fused = fused_copy(original)
    before = drafts(fused, PROMPT)
    assert len(set(before)) > 50
    # As the converter writes it, without a record: the last layer stays fused.
    back = unfused_copy(edited(fused, record=False))
    assert [t.name for t in GGUFReader(back).tensors if "attn_qkv" in t.name] == [
        "blk.2.attn_qkv.weight"
    ]
    assert drafts(back, PROMPT) == before
