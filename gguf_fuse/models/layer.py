"""One layer of a file: its dequantized weights, and what it computes with them.

`read_projections` and `read_layer` read the tensors of that one layer; its `spec` says what its
attention does. The order of steps is that of llama.cpp's graphs, of November 2026:
llama-graph.cpp (build_qkv, build_attn) and src/models/*.cpp. Axis names are those of `attention`.
Shapes are numpy order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguf_fuse.attention import masks, norms
from gguf_fuse.attention.projections import Linear, Projections, split_gate, split_heads
from gguf_fuse.attention.rope import apply_rope
from gguf_fuse.attention.shapes import Floats, Ints
from gguf_fuse.attention.softmax import AttentionParams
from gguf_fuse.format.header import Header
from gguf_fuse.models.attention_table import Temperature
from gguf_fuse.models.dequantize import read_values
from gguf_fuse.models.keys import NotModelled
from gguf_fuse.models.names import ATTENTION_PARTS, FUSED_ATTENTION
from gguf_fuse.models.spec import AttentionSpec, read_spec

# Tells where a layer's fused weight is split: its rows of Q, K and V. Raises GGUFError.
FusedRows: TypeAlias = Callable[[Header, str], Sequence[int]]


class Norm(NamedTuple):
    """Of Q or K: [head_dim], [n_head, head_dim] or, of a whole row, [rows]; None: without."""

    weight: Floats | None = None
    bias: Floats | None = None


@dataclass(frozen=True, eq=False, slots=True)
class AttentionLayer:
    """One layer of one file up to attn_output, float32. params: for `attention.attention`."""

    spec: AttentionSpec
    projections: Projections
    norms: tuple[Norm, Norm] | None  # of Q and K
    params: AttentionParams


class Heads(NamedTuple):
    """Q, K and V ready for attention, and the gate where Q carries one."""

    q: Floats  # [n_seqs, n_head, n_tokens, head_dim]
    k: Floats  # [n_seqs, n_head_kv, n_tokens, head_dim]
    v: Floats  # [n_seqs, n_head_kv, n_tokens, head_dim_v]
    gate: Floats | None  # [n_seqs, n_head, n_tokens, head_dim]


# --- what a layer computes ---------------------------------------------------------------------


def positioned(layer: AttentionLayer, q: Floats, k: Floats, v: Floats, positions: Ints) -> Heads:
    """What `Projections.project` gives, [n_seqs, n_tokens, rows] -> heads, normed and rotated.

    positions [n_seqs, n_tokens]; -1 for padding. Raises ValueError if shapes do not fit.
    """
    spec = layer.spec
    q, k = _normed(layer, "row", q, k)
    q = split_heads(q, spec.n_head)  # [n_seqs, n_head, n_tokens, head_dim (· 2)]
    k = split_heads(k, spec.n_head_kv)  # [n_seqs, n_head_kv, n_tokens, head_dim]
    v = split_heads(v, spec.n_head_kv)  # [n_seqs, n_head_kv, n_tokens, head_dim_v]
    gate = None
    if spec.rules.gated_q:
        q, gate = split_gate(q)  # [n_seqs, n_head, n_tokens, head_dim] each
    q, k = _normed(layer, "head", q, k)
    if spec.rope is not None:
        q = apply_rope(q, positions, spec.rope)
        k = apply_rope(k, positions, spec.rope)
    q, k = _normed(layer, "rotated head", q, k)
    if spec.rules.v_norm:
        v = norms.rms_norm(v, None, spec.norm_eps)
    if spec.temperature is not None:
        q = q * _temperatures(spec.temperature, positions).astype(q.dtype)
    return Heads(q, k, v, gate)


def mask(spec: AttentionSpec, q_positions: Ints, k_positions: Ints) -> NDArray[np.float32]:
    """That of this layer; shapes and errors as in `masks.additive_mask`."""
    alibi = spec.rules.max_alibi_bias > 0
    return masks.additive_mask(
        q_positions, k_positions, causal=spec.causal, window=spec.window, alibi=alibi
    )


def _normed(layer: AttentionLayer, at: str, q: Floats, k: Floats) -> tuple[Floats, Floats]:
    """Q and K normed, if this is where it is done; their shapes stay."""
    rule, eps = layer.spec.rules.norm, layer.spec.norm_eps
    if rule is None or layer.norms is None or rule.at != at:
        return q, k
    of_q, of_k = layer.norms
    if rule.formula == "rms":
        return norms.rms_norm(q, of_q.weight, eps), norms.rms_norm(k, of_k.weight, eps)
    return norms.layer_norm(q, *of_q, eps), norms.layer_norm(k, *of_k, eps)


def _temperatures(rule: Temperature, positions: Ints) -> NDArray[np.float64]:
    """positions [n_seqs, n_tokens] -> [n_seqs, 1, n_tokens, 1] (llm_graph_input_attn_temp)."""
    token = np.maximum(positions, 0)  # padding has no temperature
    steps = np.floor((token + rule.offset) / rule.n_tokens)
    temperatures: NDArray[np.float64] = 1 + rule.scale * np.log(steps + 1)
    return temperatures[:, None, :, None]


# --- reading it --------------------------------------------------------------------------------


def read_projections(
    header: Header, name: str, fused_rows: FusedRows, *, v_is_k: bool = False
) -> Projections:
    """The weights of Q, K and V of layer `name`, dequantized to float32; of any architecture.

    fused_rows is asked where the layer is fused. v_is_k: K stands in where V is missing. Raises
    NotModelled where the layer does not have all three in the shapes that llama.cpp knows,
    GGUFError where they cannot be read, and as fused_rows does.
    """
    fused = _linear(header, f"{name}.{FUSED_ATTENTION}")
    if fused is not None:
        q_rows, k_rows, v_rows = fused_rows(header, name)
        biases = [
            _bias(header, f"{name}.{part}", n_rows)
            for part, n_rows in zip(ATTENTION_PARTS, (q_rows, k_rows, v_rows), strict=True)
        ]
        present = [bias for bias in biases if bias is not None]
        # Beside a fused weight all three or none (llama-graph.cpp, build_qkv).
        if fused.bias is None and len(present) == len(biases):
            fused = replace(fused, bias=np.concatenate(present))
        return Projections((q_rows, k_rows, v_rows), (fused,))
    found = [_linear(header, f"{name}.{part}") for part in ATTENTION_PARTS]
    if v_is_k and found[2] is None:
        found[2] = found[1]
    q, k, v = found
    if q is None or k is None or v is None:
        absent = ATTENTION_PARTS[found.index(None)]
        raise NotModelled(f"{header.path}: {name} has no {absent}.weight of its own")
    return Projections((len(q.weight), len(k.weight), len(v.weight)), (q, k, v))


def read_layer(header: Header, name: str, fused_rows: FusedRows) -> AttentionLayer:
    """Layer `name` of the file, without attn_output, dequantized to float32.

    Reads no other layer's bytes. Raises as `read_spec` and `read_projections`, NotModelled if the
    weights do not have the shapes that the metadata asks for.
    """
    spec = read_spec(header, name)
    _require_known(header, spec)
    projections = read_projections(header, name, fused_rows, v_is_k=spec.rules.v_is_k)
    if projections.rows != spec.rows:
        raise NotModelled(
            f"{header.path}: {name}: Q, K and V have {projections.rows} rows, the metadata asks "
            f"for {spec.rows}"
        )
    sinks = read_values(header, f"{name}.attn_sinks.weight")
    if sinks is None and spec.rules.sinks == "required":
        raise NotModelled(f"{header.path}: {name} has no attn_sinks.weight")
    params = AttentionParams(spec.scale, spec.softcap, spec.rules.max_alibi_bias, sinks)
    layer = AttentionLayer(spec, projections, _norms(header, spec), params)
    _require_shapes(header, layer)
    return layer


def _require_shapes(header: Header, layer: AttentionLayer) -> None:
    def expect(place: str, array: Floats | None, *shapes: tuple[int, ...]) -> None:
        if array is not None and array.shape not in shapes:
            raise NotModelled(
                f"{header.path}: {spec.name}.{place} has shape {array.shape}, the metadata asks "
                f"for {shapes[0]}"
            )

    spec, projections = layer.spec, layer.projections
    parts = (FUSED_ATTENTION,) if projections.fused else ATTENTION_PARTS
    all_rows = (sum(spec.rows),) if projections.fused else spec.rows
    for part, linear, rows in zip(parts, projections.linears, all_rows, strict=True):
        expect(f"{part}.weight", linear.weight, (rows, spec.n_embd))
    expect("attn_sinks.weight", layer.params.sinks, (spec.n_head,))
    n_heads = (spec.n_head, spec.n_head_kv)
    for part, norm, n_head in zip("qk", layer.norms or (), n_heads, strict=False):
        shapes = [(spec.head_dim,), (n_head, spec.head_dim)]
        if spec.rules.norm is not None and spec.rules.norm.at == "row":
            shapes = [(n_head * spec.head_dim,)]
        expect(f"attn_{part}_norm.weight", norm.weight, *shapes)
        expect(f"attn_{part}_norm.bias", norm.bias, *shapes)


# What may stand behind "blk.N.attn_" whatever the rules: projections, and the norms around
# attention. Anything else could change what attention computes.
_PARTS = ("q", "k", "v", "qkv", "output", "norm", "norm_2", "post_norm", "output_norm")
_SUFFIXES = ("weight", "bias", "scale", "input_scale")


def _require_known(header: Header, spec: AttentionSpec) -> None:
    known = {f"{part}.{suffix}" for part in _PARTS for suffix in _SUFFIXES}
    if spec.rules.norm is not None and spec.rules.norm.weighted:
        known |= {f"{part}_norm.{suffix}" for part in "qk" for suffix in ("weight", "bias")}
    if spec.rules.sinks != "none":
        known.add("sinks.weight")
    for tensor in header.tensors:
        layer, _, rest = tensor.name.partition(".attn_")
        if layer == spec.name and rest and rest not in known:
            raise NotModelled(
                f"{header.path}: {tensor.name}: what it does to the attention of "
                f"{header.architecture!r} is not modelled"
            )


def _linear(header: Header, name: str) -> Linear | None:
    """`.input_scale` is loaded by llama.cpp, but no graph uses it."""
    weight = read_values(header, f"{name}.weight")
    scale = read_values(header, f"{name}.scale")
    if weight is None:
        return None
    n_rows, n_embd = (1, 1, *weight.shape)[-2:]
    if weight.size != n_rows * n_embd:
        raise NotModelled(f"{header.path}: {name}.weight has {weight.ndim} dimensions, not 2")
    if scale is not None and scale.size != 1:
        raise NotModelled(f"{header.path}: {name}.scale has {scale.size} values, not 1")
    one = None if scale is None else float(scale.reshape(1)[0])
    return Linear(weight.reshape(n_rows, n_embd), one, _bias(header, name, n_rows))


def _bias(header: Header, name: str, n_rows: int) -> Floats | None:
    bias = read_values(header, f"{name}.bias")
    if bias is not None and (bias.size != n_rows or bias.shape[-1:] != (n_rows,)):
        raise NotModelled(f"{header.path}: {name}.bias has shape {bias.shape}, not {(n_rows,)}")
    return None if bias is None else bias.reshape(n_rows)


def _norms(header: Header, spec: AttentionSpec) -> tuple[Norm, Norm] | None:
    rule = spec.rules.norm
    if rule is None or not rule.weighted:
        return None if rule is None else (Norm(), Norm())
    suffixes = ("weight",) if rule.formula == "rms" else ("weight", "bias")
    places = [f"{spec.name}.attn_{part}_norm" for part in "qk"]
    q, k = (Norm(*(read_values(header, f"{at}.{end}") for end in suffixes)) for at in places)
    if q.weight is None and k.weight is None and rule.optional:
        return None
    if q.weight is None or k.weight is None:
        absent = places[0 if q.weight is None else 1]
        raise NotModelled(f"{header.path}: {absent}.weight is missing")
    return q, k
