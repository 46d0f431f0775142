"""What the attention of each architecture does: the table, and the words it is written in.

Most of it is data (`TABLE`); a few small functions decide what depends on the number of layers or
on a key. The rules are llama.cpp's, of November 2026: src/llama-model.cpp (load_hparams),
llama-graph.cpp (build_qkv, build_attn) and src/models/*.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from gguf_fuse.models.keys import Keys, NotModelled


@dataclass(frozen=True, slots=True)
class NormRule:
    """How Q and K are normed: by RMSNorm, or LayerNorm, which centres too and may have a bias.

    at: the whole row before it is split into heads, each head before RoPE, or each after it.
    weighted False: no weight. optional: only where the file has the weights.
    """

    formula: Literal["rms", "layer"] = "rms"
    at: Literal["row", "head", "rotated head"] = "head"
    weighted: bool = True
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Temperature:
    """Q times 1 + scale · ln(⌊(position + offset) / n_tokens⌋ + 1), after RoPE."""

    scale: float
    n_tokens: int
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class WindowRule:
    """Which layers have a window, and how RoPE turns in them.

    pattern n: every nth layer sees all (the last of each n, or the first: dense_first), None: the
    file must say; 0: no layer does, whatever it says. n_swa: the window where the file says nothing
    (None: it must say, 0: no windows at all); forced: the window whatever the file says.
    rope, in layers with a window: shared: as in all layers; copied: own base, else the full one,
    own scaling 1/factor; fresh: own base, else 10000, no scaling; plain: the full base, neither
    scaling nor YaRN.
    """

    pattern: int | None
    n_swa: int | None
    rope: Literal["shared", "copied", "fresh", "plain"] = "shared"
    dense_first: bool = False
    forced: int | None = None
    chunked: bool = False

    def size(self, keys: Keys) -> int:
        return self.forced or keys.integer("attention.sliding_window", self.n_swa)

    def covers(self, keys: Keys) -> bool:
        """Whether this layer has a window (llama_model_base::load_swa_pattern, set_swa_pattern)."""
        if not self.size(keys):
            return False
        key = "attention.sliding_window_pattern"
        value = None if self.pattern == 0 else keys.raw(key)
        if isinstance(value, list):
            return keys.index < len(value) and bool(value[keys.index])
        pattern = self.pattern if value is None else int(value)
        if pattern is None:
            keys.fail_missing(key)
        if pattern == 0:
            return True
        place = keys.index % pattern
        return place != 0 if self.dense_first else place < pattern - 1


@dataclass(frozen=True, slots=True)
class Rules:
    """One architecture. Where a field is not set: plain causal attention, scale 1/√head_dim."""

    layout: Literal["none", "norm", "neox", "mrope", "imrope"]
    norm: NormRule | None = None
    # Whether rope_freqs, or the long or short factors, are used.
    factors: bool = False
    window: WindowRule | None = None
    # Whether a layer has RoPE, by index and whether it has a window.
    rotates: Callable[[int, bool], bool] = lambda index, windowed: True
    scale: Callable[[Keys], float] = lambda keys: 1 / math.sqrt(keys.head_dim)
    # 0: none; else where the file says nothing.
    softcap: float = 0.0
    max_alibi_bias: float = 0.0
    # Keys that this architecture reads.
    clamp_key: bool = False
    yarn_keys: bool = False
    alpha_key: bool = False  # rope.scaling.alpha: RoPE's base for a longer context
    # False: an encoder, whose key llama.cpp does not heed (llama_context::encode).
    causal: bool = True
    sinks: Literal["none", "optional", "required"] = "none"
    v_norm: bool = False  # V is normed too, without a weight
    v_is_k: bool = False  # K's projection, before its norm, serves where the file has no V
    gated_q: bool = False  # each head of Q has head_dim query rows, then as many gate rows
    # Whether each layer has its own head counts; without, all have those of layer 0.
    by_layer: bool = False
    # Whether heads in layers with a window have lengths of their own.
    windowed_lengths: bool = False
    temperature: Callable[[Keys], Temperature | None] = lambda keys: None
    # What depends on the number of layers or on a key.
    adapt: Callable[[Rules, Keys], Rules] = lambda rules, keys: rules


def _windowed_only(index: int, windowed: bool) -> bool:
    return windowed


def _not_every_fourth(index: int, windowed: bool = False) -> bool:
    return (index + 1) % 4 != 0


def _gemma_scale(n_layer: int) -> Callable[[Keys], float]:
    """The largest of its models divides by n_embd / n_head (gemma2.cpp, gemma3.cpp)."""

    def scale(keys: Keys) -> float:
        largest = keys.n_layer == n_layer
        return 1 / math.sqrt(keys.n_embd // keys.n_head if largest else keys.head_dim)

    return scale


def _own_scale(keys: Keys) -> float:
    return keys.number("attention.scale", 0.0) or 1 / math.sqrt(keys.head_dim)


def _mistral3_temperature(keys: Keys) -> Temperature | None:
    scale = keys.number("attention.temperature_scale", 0.0)
    return Temperature(scale, keys.n_ctx_orig) if scale else None


def _llama4_temperature(keys: Keys) -> Temperature | None:
    return None if _not_every_fourth(keys.index) else Temperature(0.1, 8192, offset=1.0)


def _granite(rules: Rules, keys: Keys) -> Rules:
    return rules if keys.flag("rope.scaling.finetuned", True) else replace(rules, layout="none")


def _baichuan(rules: Rules, keys: Keys) -> Rules:
    if keys.n_layer == 32:
        return rules
    return replace(rules, layout="none", max_alibi_bias=8.0 if keys.n_layer == 40 else 0.0)


def _mpt(rules: Rules, keys: Keys) -> Rules:
    return replace(rules, max_alibi_bias=keys.number("attention.max_alibi_bias", 0.0))


def _exaone4(rules: Rules, keys: Keys) -> Rules:
    if keys.n_layer != 64:
        return rules
    return replace(rules, window=WindowRule(4, 4096), rotates=_windowed_only)


def _smallthinker(rules: Rules, keys: Keys) -> Rules:
    windows = keys.integer("attention.sliding_window", 0) > 0
    # The graph takes its "every fourth" for "every" in a model of four layers.
    if windows and keys.n_layer != 4:
        return rules
    window = rules.window if windows else None
    return replace(rules, window=window, rotates=lambda index, windowed: True)


def _llama4(rules: Rules, keys: Keys) -> Rules:
    if not keys.integer("attention.sliding_window", 8192):
        raise NotModelled("llama4 without a window")
    # Query and key are normed after RoPE, so only where there is one.
    normed = keys.integer("expert_count", 0) != 128 and _not_every_fourth(keys.index)
    return replace(rules, norm=rules.norm if normed else None)


def _mrope_if_sections(rules: Rules, keys: Keys) -> Rules:
    """llama_hparams::use_mrope; the pairs of mrope are those of neox."""
    return replace(rules, layout="mrope") if min(keys.rope_sections[:2]) > 0 else rules


def _gemma4(rules: Rules, keys: Keys) -> Rules:
    n_own = keys.integer("block_count") - keys.integer("attention.shared_kv_layers", 0)
    if keys.index >= n_own:
        raise NotModelled(f"blk.{keys.index} takes K and V from another layer")
    # rope_freqs only where the layer sees all.
    return replace(rules, factors=rules.window is None or not rules.window.covers(keys))


def _mimo2(rules: Rules, keys: Keys) -> Rules:
    if keys.number("attention.value_scale", 1.0) != 1.0:
        raise NotModelled("mimo2 with attention.value_scale")
    return rules


_HEAD_RMS = NormRule()
_HEAD_LAYER = NormRule("layer", optional=True)
_ROTATED_RMS = NormRule(at="rotated head")
_ROW_RMS = NormRule(at="row")
_ROW_LAYER = NormRule("layer", "row", optional=True)
_NORM = Rules("norm")
_NORM_FACTORS = Rules("norm", factors=True)
_NEOX = Rules("neox")
_NEOX_NORMED = Rules("neox", _HEAD_RMS)

TABLE: dict[str, Rules] = {
    **dict.fromkeys(("llama", "arcee", "minicpm"), _NORM_FACTORS),
    "mistral3": replace(_NORM_FACTORS, yarn_keys=True, temperature=_mistral3_temperature),
    **dict.fromkeys(("qwen2", "qwen2moe", "seed_oss", "orion", "starcoder2", "phi2"), _NEOX),
    **dict.fromkeys(("gemma", "gptneox", "falcon", "nemotron"), _NEOX),
    **dict.fromkeys(("internlm2", "deepseek", "xverse", "chatglm"), _NORM),
    **dict.fromkeys(("ernie4_5", "ernie4_5-moe"), _NORM),
    "exaone": Rules("neox", factors=True),
    "qwen2vl": Rules("mrope"),
    **dict.fromkeys(("qwen3vl", "qwen3vlmoe"), Rules("imrope", _HEAD_RMS)),
    "deci": replace(_NORM_FACTORS, by_layer=True),
    **dict.fromkeys(("qwen3", "qwen3moe", "dots1"), _NEOX_NORMED),
    "apertus": replace(_NEOX_NORMED, factors=True),
    "lfm2": replace(_NEOX_NORMED, by_layer=True, window=WindowRule(0, 0)),
    "lfm2moe": replace(_NEOX_NORMED, by_layer=True),
    "exaone4": replace(_NEOX_NORMED, factors=True, adapt=_exaone4),
    "glm4": replace(_NORM, adapt=_mrope_if_sections),
    "glm4moe": Rules("neox", NormRule(optional=True), adapt=_mrope_if_sections),
    "gemma2": Rules(
        "neox", window=WindowRule(2, 4096, "copied"), scale=_gemma_scale(46), softcap=50.0
    ),
    "gemma3": Rules("neox", _HEAD_RMS, window=WindowRule(6, 0, "fresh"), scale=_gemma_scale(62)),
    "gemma4": Rules(
        "neox",
        _HEAD_RMS,
        window=WindowRule(None, None, "fresh"),
        scale=lambda keys: 1.0,
        by_layer=True,
        windowed_lengths=True,
        v_norm=True,
        v_is_k=True,
        adapt=_gemma4,
    ),
    "phi3": replace(_NEOX, factors=True),
    "gpt-oss": Rules(
        "neox",
        window=WindowRule(2, None, "copied"),
        scale=lambda keys: 1 / math.sqrt(keys.n_rot()),
        sinks="required",
    ),
    "mimo2": Rules(
        "neox",
        window=WindowRule(None, None, "fresh"),
        by_layer=True,
        sinks="optional",
        adapt=_mimo2,
    ),
    "stablelm": Rules("neox", _HEAD_LAYER),
    "command-r": Rules("norm", _HEAD_LAYER),
    "cohere2": Rules("norm", factors=True, window=WindowRule(4, None), rotates=_windowed_only),
    "olmo": Rules("norm", clamp_key=True),
    "olmo2": Rules("neox", _ROW_RMS, window=WindowRule(4, 0, "plain")),
    "olmoe": Rules("neox", _ROW_RMS),
    "smollm3": Rules("norm", rotates=_not_every_fourth),
    "granite": replace(_NORM_FACTORS, scale=_own_scale, adapt=_granite),
    "granitemoe": replace(_NORM_FACTORS, scale=_own_scale),
    "baichuan": replace(_NORM, adapt=_baichuan),
    **dict.fromkeys(("bloom", "refact"), Rules("none", max_alibi_bias=8.0)),
    "mpt": Rules("none", _ROW_LAYER, clamp_key=True, adapt=_mpt),
    "hunyuan-dense": Rules("neox", _ROTATED_RMS, factors=True, alpha_key=True),
    "llama4": Rules(
        "norm",
        replace(_ROTATED_RMS, weighted=False),
        factors=True,
        window=WindowRule(4, 8192, "copied", forced=8192, chunked=True),
        rotates=_not_every_fourth,
        temperature=_llama4_temperature,
        adapt=_llama4,
    ),
    "smallthinker": Rules(
        "neox",
        window=WindowRule(4, 0, "copied", dense_first=True, forced=4096),
        rotates=lambda index, windowed: index % 4 != 0,
        adapt=_smallthinker,
    ),
    **dict.fromkeys(("qwen35", "qwen35moe"), Rules("imrope", _HEAD_RMS, gated_q=True)),
    "qwen3next": replace(_NEOX_NORMED, gated_q=True),
    "bert": Rules("none", causal=False),
    **dict.fromkeys(("nomic-bert", "nomic-bert-moe", "jina-bert-v3"), Rules("neox", causal=False)),
    "jina-bert-v2": Rules("none", _ROW_LAYER, max_alibi_bias=8.0, causal=False),
}
