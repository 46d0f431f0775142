"""Metadata of a model -> what the attention of one layer does.

`read_spec` reads metadata by the rules of `attention_table`, and RoPE's factors. What the table
does not model raises NotModelled: never a silent guess. RoPE scaling is that of llama-context.cpp
(the constructor), of November 2026. Axis names are those of `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gguf_fuse.attention.masks import Window
from gguf_fuse.attention.projections import Rows
from gguf_fuse.attention.rope import Rope, context_attn_factor
from gguf_fuse.attention.shapes import Floats
from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.models.attention_table import TABLE, Rules, Temperature, WindowRule
from gguf_fuse.models.dequantize import read_values
from gguf_fuse.models.keys import Keys, NotModelled


@dataclass(frozen=True, eq=False, slots=True)
class AttentionSpec:
    """The attention of one layer, as the metadata (and RoPE's factors) say.

    rules: of its architecture, for this layer. scale: of the scores, before softcap. window None:
    sees all of the past. rope None: none in this layer. softcap, clamp: 0 is off. norm_eps is that
    of all norms.
    """

    name: str
    rules: Rules
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    head_dim_v: int
    scale: float
    rope: Rope | None
    window: Window | None
    causal: bool
    softcap: float
    clamp: float
    norm_eps: float
    temperature: Temperature | None

    @property
    def rows(self) -> Rows:
        """Rows of the weights of Q, K and V."""
        queries = 2 if self.rules.gated_q else 1
        k, v = self.n_head_kv * self.head_dim, self.n_head_kv * self.head_dim_v
        return queries * self.n_head * self.head_dim, k, v


def read_spec(header: Header, name: str) -> AttentionSpec:
    """The attention of layer `name` ("blk.3") as llama.cpp sets it up for the trained context.

    Raises NotModelled where the table has no such attention, GGUFError where a key is missing or
    of the wrong type.
    """
    try:
        return _spec(*_rules_of(header, name), name)
    except (ValueError, TypeError, ArithmeticError) as error:
        # Numbers that no model has: no heads, an odd rotation, a negative length.
        raise GGUFError(f"{header.path}: {name}: the metadata of attention: {error}") from error


def _rules_of(header: Header, name: str) -> tuple[Rules, Keys]:
    architecture = header.architecture
    prefix, _, number = name.rpartition(".")
    if prefix != "blk" or not number.isdigit() or architecture not in TABLE:
        what = f"architecture {architecture!r}" if prefix == "blk" else f"layers {prefix!r}"
        raise NotModelled(f"{header.path}: the attention of {what} is not modelled")
    keys = Keys(header, int(number))
    if keys.index >= keys.n_layer:
        raise NotModelled(f"{header.path}: {name} is no layer of the main model")
    rules = TABLE[architecture]
    try:
        return rules.adapt(rules, keys), keys
    except NotModelled as error:
        raise NotModelled(f"{header.path}: {error}: its attention is not modelled") from error


def _spec(rules: Rules, keys: Keys, name: str) -> AttentionSpec:
    window = rules.window if rules.window is not None and rules.window.covers(keys) else None
    _require_uniform(rules, keys)
    own_length = window is not None and rules.windowed_lengths
    rotates = rules.layout != "none" and rules.rotates(keys.index, window is not None)
    layer_norm = rules.norm is not None and rules.norm.formula == "layer"
    eps_key = f"attention.layer_norm_{'' if layer_norm else 'rms_'}epsilon"
    spec = AttentionSpec(
        name=name,
        rules=rules,
        n_embd=keys.n_embd,
        n_head=keys.n_head,
        n_head_kv=keys.integer("attention.head_count_kv", keys.n_head),
        head_dim=keys.length("key", windowed=own_length),
        head_dim_v=keys.length("value", windowed=own_length),
        scale=rules.scale(keys),
        rope=_rope(rules, keys, window) if rotates else None,
        window=Window(window.size(keys), window.chunked) if window is not None else None,
        causal=rules.causal and keys.flag("attention.causal", True),
        softcap=keys.number("attn_logit_softcapping", rules.softcap) if rules.softcap else 0.0,
        clamp=keys.number("attention.clamp_kqv", 0.0) if rules.clamp_key else 0.0,
        norm_eps=keys.number(eps_key) if rules.norm is not None or rules.v_norm else 0.0,
        temperature=rules.temperature(keys),
    )
    if spec.n_head < 1 or spec.n_head_kv < 1:
        raise NotModelled(f"{keys.header.path}: {name} has no attention heads")
    if spec.n_head % spec.n_head_kv:
        keys.fail(f"{name}: {spec.n_head} heads cannot share {spec.n_head_kv} K and V heads")
    if spec.rope is not None and spec.rope.n_rot > spec.head_dim:
        keys.fail(f"{name}: RoPE turns {spec.rope.n_rot} of {spec.head_dim} elements of a head")
    return spec


def _require_uniform(rules: Rules, keys: Keys) -> None:
    """Most graphs size every layer as the first: a file that says otherwise does not run so."""
    differing = []
    if not rules.by_layer:
        for key in ("attention.head_count", "attention.head_count_kv"):
            value = keys.raw(key)
            if isinstance(value, list) and len(set(value)) > 1:
                differing.append(key)
    if not rules.windowed_lengths:
        lengths = {
            "attention.key_length": keys.length("key"),
            "attention.value_length": keys.length("value"),
            "rope.dimension_count": keys.n_rot(),
        }
        for key, full in lengths.items():
            if keys.raw(f"{key}_swa") not in (None, full):
                differing.append(f"{key}_swa")
    if differing:
        raise NotModelled(
            f"{keys.header.path}: {keys.prefix}{differing[0]}: unequal layers, which llama.cpp's "
            f"graph of {keys.header.architecture!r} does not heed"
        )


def _rope(rules: Rules, keys: Keys, window: WindowRule | None) -> Rope:
    """window: of this layer. llama_model_base::load_hparams, then llama_context's constructor."""
    assert rules.layout != "none"
    scaling = str(keys.raw("rope.scaling.type") or "linear")
    if scaling not in ("none", "linear", "yarn", "longrope"):
        keys.fail(f"metadata key '{keys.prefix}rope.scaling.type' is {scaling!r}")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    trained_scale = 1 / factor if factor else 1.0
    freq_scale = 1.0 if scaling == "none" else trained_scale
    ext_factor = 1.0 if scaling == "yarn" else 0.0

    def yarn(key: str, default: float) -> float:
        return keys.number(f"rope.scaling.yarn_{key}", default) if rules.yarn_keys else default

    attn_factor = keys.number("rope.scaling.attn_factor", 1.0)
    log_multiplier = yarn("log_multiplier", 0.0)
    rope = Rope(
        layout=rules.layout,
        n_rot=keys.n_rot(windowed=window is not None and rules.windowed_lengths),
        freq_base=_freq_base(rules, keys),
        freq_scale=freq_scale,
        ext_factor=ext_factor,
        attn_factor=context_attn_factor(freq_scale, ext_factor, attn_factor, log_multiplier),
        beta_fast=yarn("beta_fast", 32.0),
        beta_slow=yarn("beta_slow", 1.0),
        n_ctx_orig=keys.n_ctx_orig,
        freq_factors=_freq_factors(keys) if rules.factors else None,
        sections=keys.rope_sections,
    )
    if window is None or window.rope == "shared":
        return rope
    own_base = keys.number("rope.freq_base_swa", 0.0)
    if window.rope == "copied":
        return replace(rope, freq_base=own_base or rope.freq_base, freq_scale=trained_scale)
    if window.rope == "fresh":
        return replace(rope, freq_base=own_base or 10000.0, freq_scale=1.0)
    return replace(rope, freq_scale=1.0, ext_factor=0.0, attn_factor=1.0)


def _freq_base(rules: Rules, keys: Keys) -> float:
    base = keys.number("rope.freq_base", 10000.0)
    alpha = keys.number("rope.scaling.alpha", 0.0) if rules.alpha_key else 0.0
    if alpha <= 0:
        return base
    return float(base * alpha ** (keys.head_dim / (keys.head_dim - 2)))


def _freq_factors(keys: Keys) -> Floats | None:
    """llama_model::get_rope_factors -> [n_rot / 2]."""
    factors = read_values(keys.header, "rope_freqs.weight")
    if factors is None:
        length = "long" if keys.integer("context_length", 0) > keys.n_ctx_orig else "short"
        factors = read_values(keys.header, f"rope_factors_{length}.weight")
    return factors
