"""Metadata of a model -> what the attention of one layer does.

What an architecture's attention does is data (`_TABLE`); a few small functions decide what hangs
on the number of layers or on a key. `read_spec` reads metadata, and RoPE's factors. What the table
does not model raises NotModelled: never a silent guess.

The rules are llama.cpp's, of November 2026: src/llama-model.cpp (load_hparams), llama-context.cpp
(the constructor, for RoPE scaling), llama-graph.cpp (build_qkv, build_attn) and src/models/*.cpp.
Axis names are those of `attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypeAlias

from gguf_fuse.attention.rope import Rope, context_attn_factor
from gguf_fuse.attention.shapes import Floats
from gguf_fuse.format.header import GGUFError, Header
from gguf_fuse.models.dequantize import read_values

Rows: TypeAlias = tuple[int, int, int]  # of Q, K and V
Sinks: TypeAlias = Literal["none", "optional", "required"]


class NotModelled(GGUFError):
    """The file is sound, but this attention is not one that the table describes."""


# --- what attention does -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Window:
    """Which cells a query sees: the last n_swa ("sliding"), or those of its chunk of n_swa."""

    n_swa: int
    kind: Literal["sliding", "chunked"] = "sliding"


@dataclass(frozen=True, slots=True)
class NormRule:
    """How Q and K are normed.

    at: the whole row before it is split into heads, each head before RoPE, or each after it.
    weighted False: no weight. optional: only where the file has the weights.
    """

    kind: Literal["rms", "layer"] = "rms"
    at: Literal["row", "head", "rotated head"] = "head"
    weighted: bool = True
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Temperature:
    """Q times 1 + scale · ln(⌊(position + offset) / n_tokens⌋ + 1), after RoPE."""

    scale: float
    n_tokens: int
    offset: float = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class AttentionSpec:
    """The attention of one layer, as the metadata (and RoPE's factors) say.

    scale: of the scores, before softcap. window None: sees all of the past. rope None: none in
    this layer. softcap, max_alibi_bias, clamp: 0 is off. gated_q: each head of Q has head_dim
    query rows, then as many gate rows. v_norm: V is normed too, without a weight. v_is_k: where the
    file has no V, K's projection serves (before its norm). norm_eps counts for all norms.
    """

    name: str
    index: int
    architecture: str
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    head_dim_v: int
    scale: float
    rope: Rope | None = None
    window: Window | None = None
    causal: bool = True
    softcap: float = 0.0
    max_alibi_bias: float = 0.0
    clamp: float = 0.0
    norm: NormRule | None = None
    norm_eps: float = 0.0
    v_norm: bool = False
    v_is_k: bool = False
    temperature: Temperature | None = None
    gated_q: bool = False
    sinks: Sinks = "none"
    output_bias: bool = True

    @property
    def rows(self) -> Rows:
        """Rows of the weights of Q, K and V."""
        queries = 2 if self.gated_q else 1
        k, v = self.n_head_kv * self.head_dim, self.n_head_kv * self.head_dim_v
        return queries * self.n_head * self.head_dim, k, v


# --- the table of architectures ----------------------------------------------------------------


def _everywhere(index: int, windowed: bool) -> bool:
    return True


def _windowed_only(index: int, windowed: bool) -> bool:
    return windowed


def _not_every_fourth(index: int, windowed: bool) -> bool:
    return (index + 1) % 4 != 0


def _not_first_of_four(index: int, windowed: bool) -> bool:
    return index % 4 != 0


@dataclass(frozen=True, slots=True)
class _WindowRule:
    """Which layers have a window, and how RoPE turns in them.

    pattern n: every nth layer sees all (the last of each n, or the first: dense_first), None: the
    file must say; 0: no layer does. n_swa: what counts if the file says nothing (None: it must,
    0: no windows at all); forced: what counts whatever the file says.
    rope, in layers with a window: shared: as in all layers; copied: own base, else the full one,
    own scaling 1/factor; fresh: own base, else 10000, no scaling; plain: the full base, neither
    scaling nor YaRN.
    """

    pattern: int | None
    n_swa: int | None
    rope: Literal["shared", "copied", "fresh", "plain"] = "shared"
    dense_first: bool = False
    pattern_key: bool = True
    forced: int | None = None
    kind: Literal["sliding", "chunked"] = "sliding"


@dataclass(frozen=True, slots=True)
class _Rules:
    """One architecture. Where a field is not set: plain causal attention, scale 1/√head_dim."""

    layout: Literal["none", "norm", "neox", "mrope", "imrope"]
    norm: NormRule | None = None
    # rope_freqs, or the long or short factors, count.
    factors: bool = False
    window: _WindowRule | None = None
    # Whether a layer has RoPE, by index and whether it has a window.
    rotates: Callable[[int, bool], bool] = _everywhere
    scale: Callable[[_Keys], float] = lambda keys: 1 / math.sqrt(keys.head_dim)
    # 0: none. The number counts where the file says nothing.
    softcap: float = 0.0
    max_alibi_bias: float = 0.0
    # Keys that this architecture reads.
    alibi_key: bool = False
    clamp_key: bool = False
    yarn_keys: bool = False
    # False: an encoder, whose key llama.cpp does not heed (llama_context::encode).
    causal: bool = True
    sinks: Sinks = "none"
    v_norm: bool = False
    v_is_k: bool = False
    gated_q: bool = False
    # Whose head counts count: each layer's, or layer 0's. The same for lengths: those of layers
    # with a window, or always the full ones.
    by_layer: bool = False
    windowed_lengths: bool = False
    temperature: Callable[[_Keys], Temperature | None] = lambda keys: None
    output_bias: bool = True
    # What hangs on the number of layers or on a key.
    adapt: Callable[[_Rules, _Keys], _Rules] = lambda rules, keys: rules


class _Keys:
    """The metadata of one architecture, for one layer."""

    def __init__(self, header: Header, index: int) -> None:
        self.header = header
        self.index = index
        self.prefix = f"{header.architecture}."

    def has(self, key: str) -> bool:
        return self.prefix + key in self.header.metadata

    def raw(self, key: str) -> Any:
        return self.header.metadata.get(self.prefix + key)

    def number(self, key: str, default: float | None = None, index: int | None = None) -> float:
        """One number for all layers, or the layer's from an array. Raises GGUFError."""
        value = self.raw(key)
        if isinstance(value, list):
            at = self.index if index is None else index
            value = value[at] if at < len(value) else "nothing for this layer"
        if value is None:
            if default is None:
                self.fail(f"metadata key {self.prefix + key!r} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(f"metadata key {self.prefix + key!r}: a number is expected, not {value!r}")
        return value

    def integer(self, key: str, default: int | None = None, index: int | None = None) -> int:
        return int(self.number(key, default, index))

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key)
        return default if value is None else bool(value)

    def fail(self, problem: str) -> NoReturn:
        raise GGUFError(f"{self.header.path}: {problem}")

    @property
    def n_layer(self) -> int:
        """Without the layers that only predict further tokens (llama_hparams::n_layer)."""
        return self.integer("block_count") - self.integer("nextn_predict_layers", 0)

    @property
    def n_embd(self) -> int:
        return self.integer("embedding_length")

    @property
    def n_head(self) -> int:
        return self.integer("attention.head_count")

    @property
    def head_dim(self) -> int:
        return self.length("key")

    def length(self, which: Literal["key", "value"], *, windowed: bool = False) -> int:
        n_head = self.integer("attention.head_count", index=0)
        default = self.n_embd // n_head if n_head else 0
        full = self.integer(f"attention.{which}_length", default)
        return self.integer(f"attention.{which}_length_swa", full) if windowed else full

    def n_rot(self, *, windowed: bool = False) -> int:
        full = self.integer("rope.dimension_count", self.length("key"))
        return self.integer("rope.dimension_count_swa", full) if windowed else full


def _gemma_scale(n_layer: int) -> Callable[[_Keys], float]:
    """The largest model of its kind divides by n_embd / n_head (gemma2.cpp, gemma3.cpp)."""

    def scale(keys: _Keys) -> float:
        largest = keys.n_layer == n_layer
        return 1 / math.sqrt(keys.n_embd // keys.n_head if largest else keys.head_dim)

    return scale


def _own_scale(keys: _Keys) -> float:
    return keys.number("attention.scale", 0.0) or 1 / math.sqrt(keys.head_dim)


def _scale_by_n_rot(keys: _Keys) -> float:
    return 1 / math.sqrt(keys.n_rot())


def _mistral3_temperature(keys: _Keys) -> Temperature | None:
    scale = keys.number("attention.temperature_scale", 0.0)
    return Temperature(scale, _n_ctx_orig(keys)) if scale else None


def _llama4_temperature(keys: _Keys) -> Temperature | None:
    every_fourth = not _not_every_fourth(keys.index, False)
    return Temperature(0.1, 8192, offset=1.0) if every_fourth else None


def _granite(rules: _Rules, keys: _Keys) -> _Rules:
    return rules if keys.flag("rope.scaling.finetuned", True) else replace(rules, layout="none")


def _baichuan(rules: _Rules, keys: _Keys) -> _Rules:
    if keys.n_layer == 32:
        return rules
    return replace(rules, layout="none", max_alibi_bias=8.0 if keys.n_layer == 40 else 0.0)


def _exaone4(rules: _Rules, keys: _Keys) -> _Rules:
    if keys.n_layer != 64:
        return rules
    return replace(rules, window=_WindowRule(4, 4096), rotates=_windowed_only)


def _smallthinker(rules: _Rules, keys: _Keys) -> _Rules:
    windows = keys.integer("attention.sliding_window", 0) > 0
    # The graph takes its "every fourth" for "every" in a model of four layers.
    if windows and keys.n_layer != 4:
        return rules
    return replace(rules, window=rules.window if windows else None, rotates=_everywhere)


def _llama4(rules: _Rules, keys: _Keys) -> _Rules:
    if keys.has("attention.sliding_window") and not keys.integer("attention.sliding_window"):
        raise NotModelled("llama4 without a window")
    # Query and key are normed after RoPE, so only where there is one.
    normed = keys.integer("expert_count", 0) != 128 and _not_every_fourth(keys.index, False)
    return replace(rules, norm=rules.norm if normed else None)


def _mrope_if_sections(rules: _Rules, keys: _Keys) -> _Rules:
    """llama_hparams::use_mrope; the pairs of mrope are those of neox."""
    return replace(rules, layout="mrope") if min(_sections(keys)[:2]) > 0 else rules


def _gemma4(rules: _Rules, keys: _Keys) -> _Rules:
    n_own = keys.integer("block_count") - keys.integer("attention.shared_kv_layers", 0)
    if keys.index >= n_own:
        raise NotModelled(f"blk.{keys.index} takes K and V from another layer")
    # rope_freqs only where the layer sees all.
    return replace(rules, factors=not _is_windowed(rules.window, keys))


def _mimo2(rules: _Rules, keys: _Keys) -> _Rules:
    if keys.number("attention.value_scale", 1.0) != 1.0:
        raise NotModelled("mimo2 with attention.value_scale")
    return rules


_HEAD_RMS = NormRule()
_HEAD_LAYER = NormRule("layer", optional=True)
_ROTATED_RMS = NormRule(at="rotated head")
_ROW_RMS = NormRule(at="row")
_NORM = _Rules("norm")
_NORM_FACTORS = _Rules("norm", factors=True)
_NEOX = _Rules("neox")
_NEOX_NORMED = _Rules("neox", _HEAD_RMS)

_TABLE: dict[str, _Rules] = {
    "llama": _NORM_FACTORS,
    "mistral3": replace(_NORM_FACTORS, yarn_keys=True, temperature=_mistral3_temperature),
    **dict.fromkeys(("qwen2", "qwen2moe", "seed_oss", "orion", "starcoder2", "phi2"), _NEOX),
    **dict.fromkeys(("gemma", "gptneox", "falcon", "nemotron"), _NEOX),
    **dict.fromkeys(("internlm2", "deepseek", "xverse", "chatglm"), _NORM),
    **dict.fromkeys(("ernie4_5", "ernie4_5-moe"), _Rules("norm", output_bias=False)),
    "exaone": _Rules("neox", factors=True),
    "qwen2vl": _Rules("mrope"),
    **dict.fromkeys(("qwen3vl", "qwen3vlmoe"), _Rules("imrope", _HEAD_RMS)),
    "arcee": _NORM_FACTORS,
    "deci": replace(_NORM_FACTORS, by_layer=True),
    **dict.fromkeys(("qwen3", "qwen3moe", "dots1"), _NEOX_NORMED),
    "apertus": replace(_NEOX_NORMED, factors=True),
    "lfm2": replace(_NEOX_NORMED, by_layer=True, window=_WindowRule(0, 0, pattern_key=False)),
    "lfm2moe": replace(_NEOX_NORMED, by_layer=True),
    "exaone4": replace(_NEOX_NORMED, factors=True, adapt=_exaone4),
    "glm4": replace(_NORM, adapt=_mrope_if_sections),
    "glm4moe": _Rules("neox", NormRule(optional=True), adapt=_mrope_if_sections),
    "gemma2": _Rules(
        "neox", window=_WindowRule(2, 4096, "copied"), scale=_gemma_scale(46), softcap=50.0
    ),
    "gemma3": _Rules("neox", _HEAD_RMS, window=_WindowRule(6, 0, "fresh"), scale=_gemma_scale(62)),
    "gemma4": _Rules(
        "neox",
        _HEAD_RMS,
        window=_WindowRule(None, None, "fresh"),
        scale=lambda keys: 1.0,
        by_layer=True,
        windowed_lengths=True,
        v_norm=True,
        v_is_k=True,
        adapt=_gemma4,
    ),
    "phi3": replace(_NEOX, factors=True),
    "gpt-oss": _Rules(
        "neox", window=_WindowRule(2, None, "copied"), scale=_scale_by_n_rot, sinks="required"
    ),
    "mimo2": _Rules(
        "neox",
        window=_WindowRule(None, None, "fresh"),
        by_layer=True,
        sinks="optional",
        adapt=_mimo2,
    ),
    "stablelm": _Rules("neox", _HEAD_LAYER),
    "command-r": _Rules("norm", _HEAD_LAYER),
    "cohere2": _Rules("norm", factors=True, window=_WindowRule(4, None), rotates=_windowed_only),
    "olmo": _Rules("norm", clamp_key=True),
    "olmo2": _Rules("neox", _ROW_RMS, window=_WindowRule(4, 0, "plain")),
    "olmoe": _Rules("neox", _ROW_RMS),
    "smollm3": _Rules("norm", rotates=_not_every_fourth),
    "granite": replace(_NORM_FACTORS, scale=_own_scale, adapt=_granite),
    "granitemoe": replace(_NORM_FACTORS, scale=_own_scale),
    "minicpm": _NORM_FACTORS,
    "baichuan": replace(_NORM, adapt=_baichuan),
    "bloom": _Rules("none", max_alibi_bias=8.0),
    "refact": _Rules("none", max_alibi_bias=8.0, output_bias=False),
    "mpt": _Rules("none", NormRule("layer", "row", optional=True), alibi_key=True, clamp_key=True),
    "hunyuan-dense": _Rules("neox", _ROTATED_RMS, factors=True),
    "llama4": _Rules(
        "norm",
        replace(_ROTATED_RMS, weighted=False),
        factors=True,
        window=_WindowRule(4, 8192, forced=8192, kind="chunked", rope="copied"),
        rotates=_not_every_fourth,
        temperature=_llama4_temperature,
        adapt=_llama4,
    ),
    "smallthinker": _Rules(
        "neox",
        window=_WindowRule(4, 0, "copied", dense_first=True, forced=4096),
        rotates=_not_first_of_four,
        adapt=_smallthinker,
    ),
    **dict.fromkeys(("qwen35", "qwen35moe"), _Rules("imrope", _HEAD_RMS, gated_q=True)),
    "qwen3next": replace(_NEOX_NORMED, gated_q=True),
    "bert": _Rules("none", causal=False),
    **dict.fromkeys(("nomic-bert", "nomic-bert-moe", "jina-bert-v3"), _Rules("neox", causal=False)),
    "jina-bert-v2": _Rules(
        "none", NormRule("layer", "row", optional=True), max_alibi_bias=8.0, causal=False
    ),
}


# --- metadata -> AttentionSpec -----------------------------------------------------------------


def read_spec(header: Header, name: str, n_ctx: int | None = None) -> AttentionSpec:
    """The attention of layer `name` ("blk.3") as llama.cpp sets it up.

    n_ctx: the context that is run, in tokens (None: what the model was trained for); it decides
    between long and short RoPE factors and nothing else.

    Raises NotModelled where the table has no such attention, GGUFError where a key is missing or
    of the wrong type.
    """
    rules, keys = _rules_of(header, name)
    try:
        return _spec(rules, keys, name, n_ctx)
    except (ValueError, TypeError, ArithmeticError) as error:
        # Numbers that no model has: no heads, an odd rotation, a negative length.
        raise GGUFError(f"{header.path}: {name}: the metadata of attention: {error}") from error


def _spec(rules: _Rules, keys: _Keys, name: str, n_ctx: int | None) -> AttentionSpec:
    header = keys.header
    windowed = _is_windowed(rules.window, keys)
    _require_uniform(rules, keys)
    own_length = windowed and rules.windowed_lengths
    rotates = rules.layout != "none" and rules.rotates(keys.index, windowed)
    spec = AttentionSpec(
        name=name,
        index=keys.index,
        architecture=str(header.architecture),
        n_embd=keys.n_embd,
        n_head=keys.n_head,
        n_head_kv=keys.integer("attention.head_count_kv", keys.n_head),
        head_dim=keys.length("key", windowed=own_length),
        head_dim_v=keys.length("value", windowed=own_length),
        scale=rules.scale(keys),
        rope=_rope(rules, keys, windowed, n_ctx) if rotates else None,
        window=_window(rules.window, keys) if windowed else None,
        causal=rules.causal and keys.flag("attention.causal", True),
        softcap=keys.number("attn_logit_softcapping", rules.softcap) if rules.softcap else 0.0,
        max_alibi_bias=(
            keys.number("attention.max_alibi_bias", 0.0)
            if rules.alibi_key
            else rules.max_alibi_bias
        ),
        clamp=keys.number("attention.clamp_kqv", 0.0) if rules.clamp_key else 0.0,
        norm=rules.norm,
        norm_eps=_norm_eps(rules, keys),
        v_norm=rules.v_norm,
        v_is_k=rules.v_is_k,
        temperature=rules.temperature(keys),
        gated_q=rules.gated_q,
        sinks=rules.sinks,
        output_bias=rules.output_bias,
    )
    if spec.n_head < 1 or spec.n_head_kv < 1:
        raise NotModelled(f"{header.path}: {name} has no attention heads")
    if spec.n_head % spec.n_head_kv:
        keys.fail(f"{name}: {spec.n_head} heads cannot share {spec.n_head_kv} K and V heads")
    return spec


def _rules_of(header: Header, name: str) -> tuple[_Rules, _Keys]:
    architecture = header.architecture
    prefix, _, number = name.rpartition(".")
    if prefix != "blk" or not number.isdigit() or architecture not in _TABLE:
        what = f"architecture {architecture!r}" if prefix == "blk" else f"layers {prefix!r}"
        raise NotModelled(f"{header.path}: the attention of {what} is not modelled")
    keys = _Keys(header, int(number))
    if keys.index >= keys.n_layer:
        raise NotModelled(f"{header.path}: {name} is no layer of the main model")
    rules = _TABLE[architecture]
    try:
        return rules.adapt(rules, keys), keys
    except NotModelled as error:
        raise NotModelled(f"{header.path}: {error}: its attention is not modelled") from error


def _require_uniform(rules: _Rules, keys: _Keys) -> None:
    """Most graphs size every layer as the first: a file that says otherwise does not run so."""
    counts = ("attention.head_count", "attention.head_count_kv")
    lengths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    differing = []
    if not rules.by_layer:
        values = [(key, keys.raw(key)) for key in counts]
        differing += [key for key, v in values if isinstance(v, list) and len(set(v)) > 1]
    if not rules.windowed_lengths:
        own = [(key, keys.raw(f"{key}_swa")) for key in lengths]
        full = (keys.length("key"), keys.length("value"), keys.n_rot())
        differing += [
            f"{key}_swa" for (key, v), n in zip(own, full, strict=True) if v not in (None, n)
        ]
    if differing:
        raise NotModelled(
            f"{keys.header.path}: {keys.prefix}{differing[0]}: unequal layers, which llama.cpp's "
            f"graph of {keys.header.architecture!r} does not heed"
        )


def _is_windowed(rule: _WindowRule | None, keys: _Keys) -> bool:
    """llama_model_base::load_swa_pattern and llama_hparams::set_swa_pattern."""
    if rule is None or not _n_swa(rule, keys):
        return False
    value = keys.raw("attention.sliding_window_pattern") if rule.pattern_key else None
    if isinstance(value, list):
        return keys.index < len(value) and bool(value[keys.index])
    pattern = rule.pattern if value is None else int(value)
    if pattern is None:
        keys.fail(f"metadata key '{keys.prefix}attention.sliding_window_pattern' is missing")
    if pattern == 0:
        return True
    place = keys.index % pattern
    return place != 0 if rule.dense_first else place < pattern - 1


def _n_swa(rule: _WindowRule, keys: _Keys) -> int:
    return rule.forced or keys.integer("attention.sliding_window", rule.n_swa)


def _window(rule: _WindowRule | None, keys: _Keys) -> Window:
    assert rule is not None
    return Window(_n_swa(rule, keys), rule.kind)


def _norm_eps(rules: _Rules, keys: _Keys) -> float:
    if rules.norm is None and not rules.v_norm:
        return 0.0
    kind = "layer_norm_epsilon" if rules.norm and rules.norm.kind == "layer" else None
    return keys.number(f"attention.{kind or 'layer_norm_rms_epsilon'}")


def _n_ctx_orig(keys: _Keys) -> int:
    return keys.integer("rope.scaling.original_context_length", keys.integer("context_length", 0))


def _sections(keys: _Keys) -> tuple[int, int, int, int]:
    value = keys.raw("rope.dimension_sections")
    sections = [*value, 0, 0, 0, 0][:4] if isinstance(value, list) else [0, 0, 0, 0]
    return sections[0], sections[1], sections[2], sections[3]


def _rope(rules: _Rules, keys: _Keys, windowed: bool, n_ctx: int | None) -> Rope:
    """llama_model_base::load_hparams, then the constructor of llama_context."""
    assert rules.layout != "none"
    scaling = str(keys.raw("rope.scaling.type") or "linear")
    if scaling not in ("none", "linear", "yarn", "longrope"):
        keys.fail(f"metadata key '{keys.prefix}rope.scaling.type' is {scaling!r}")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    trained_scale = 1 / factor if factor else 1.0
    freq_scale = 1.0 if scaling == "none" else trained_scale
    ext_factor = 1.0 if scaling == "yarn" else 0.0
    rope = Rope(
        layout=rules.layout,
        n_rot=keys.n_rot(windowed=windowed and rules.windowed_lengths),
        freq_base=_freq_base(keys),
        freq_scale=freq_scale,
        ext_factor=ext_factor,
        attn_factor=context_attn_factor(
            freq_scale,
            ext_factor,
            keys.number("rope.scaling.attn_factor", 1.0),
            keys.number("rope.scaling.yarn_log_multiplier", 0.0) if rules.yarn_keys else 0.0,
        ),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0) if rules.yarn_keys else 32.0,
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0) if rules.yarn_keys else 1.0,
        n_ctx_orig=_n_ctx_orig(keys),
        freq_factors=_freq_factors(keys, n_ctx) if rules.factors else None,
        sections=_sections(keys),
    )
    if not windowed or rules.window is None or rules.window.rope == "shared":
        return rope
    own_base = keys.number("rope.freq_base_swa", 0.0)
    if rules.window.rope == "copied":
        return replace(rope, freq_base=own_base or rope.freq_base, freq_scale=trained_scale)
    if rules.window.rope == "fresh":
        return replace(rope, freq_base=own_base or 10000.0, freq_scale=1.0)
    return replace(rope, freq_scale=1.0, ext_factor=0.0, attn_factor=1.0)


def _freq_base(keys: _Keys) -> float:
    base = keys.number("rope.freq_base", 10000.0)
    alpha = keys.number("rope.scaling.alpha", 0.0)
    if keys.header.architecture != "hunyuan-dense" or alpha <= 0:
        return base
    head_dim = keys.length("key")
    return float(base * alpha ** (head_dim / (head_dim - 2)))


def _freq_factors(keys: _Keys, n_ctx: int | None) -> Floats | None:
    """llama_model::get_rope_factors -> [n_rot / 2]."""
    if n_ctx is None:
        n_ctx = keys.integer("context_length", 0)
    length = "long" if n_ctx > _n_ctx_orig(keys) else "short"
    factors = read_values(keys.header, "rope_freqs.weight")
    if factors is None:
        factors = read_values(keys.header, f"rope_factors_{length}.weight")
    return factors
