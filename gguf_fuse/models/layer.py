"""One layer of a file: its dequantized weights, and what it computes with them.

`read_projections` and `read_layer` read the tensors of that one layer; `attention_spec` says what
its attention does. The order of steps is that of llama.cpp's graphs, of November 2026:
llama-graph.cpp (build_qkv, build_attn) and src/models/*.cpp. Axis names are those of `attention`.
Shapes are numpy order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguf_fuse.attention import masks, norms
from gguf_fuse.attention.projections import (
    Linear,
    apply_gate,
    join_heads,
    project_fused,
    project_separate,
    split_gate,
    split_heads,
)
from gguf_fuse.attention.rope import apply_rope
from gguf_fuse.attention.shapes import Floats, Ints
from gguf_fuse.attention.softmax import AttentionParams
from gguf_fuse.format.header import GGUFError, Header
from gguf_fuse.models.dequantize import read_values
from gguf_fuse.models.spec import AttentionSpec, NotModelled, Rows, Temperature, read_spec
from gguf_fuse.planning import unfuse as unfusion
from gguf_fuse.planning.fusions import QKV

# --- what a layer is ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Projections:
    """Q, K and V of one layer, as the file has them: three weights, or one and where to split."""

    rows: Rows
    separate: tuple[Linear, Linear, Linear] | None  # [rows of each, n_embd]
    fused: Linear | None  # [q + k + v rows, n_embd]


@dataclass(frozen=True, eq=False, slots=True)
class QkNorm:
    """Weights of the norms of Q and K: [head_dim], [n_head, head_dim] or, whole row, [rows]."""

    q: Floats | None
    k: Floats | None
    q_bias: Floats | None = None
    k_bias: Floats | None = None


@dataclass(frozen=True, eq=False, slots=True)
class AttentionLayer:
    """One layer of one file up to attn_output, float32. params: for `attention.attention`."""

    spec: AttentionSpec
    projections: Projections
    norm: QkNorm | None
    params: AttentionParams


class Heads(NamedTuple):
    """Q, K and V ready for attention, and the gate where Q carries one."""

    q: Floats  # [n_seqs, n_head, n_tokens, head_dim]
    k: Floats  # [n_seqs, n_head_kv, n_tokens, head_dim]
    v: Floats  # [n_seqs, n_head_kv, n_tokens, head_dim_v]
    gate: Floats | None  # [n_seqs, n_head, n_tokens, head_dim]


# --- what a layer computes ---------------------------------------------------------------------


def project(
    projections: Projections, x: Floats, clamp: float = 0.0
) -> tuple[Floats, Floats, Floats]:
    """x [n_seqs, n_tokens, n_embd] -> [n_seqs, n_tokens, rows] of Q, K and V.

    Through one matrix or three, as the file has them; clamp is `AttentionSpec.clamp`
    (llama-graph.cpp, build_qkv). Raises ValueError if x does not fit.
    """
    if projections.fused is not None:
        return project_fused(x, projections.fused, projections.rows, clamp)
    assert projections.separate is not None
    q, k, v = projections.separate
    return project_separate(x, q, k, v, clamp)


def positioned(layer: AttentionLayer, q: Floats, k: Floats, v: Floats, positions: Ints) -> Heads:
    """What `project` gives, [n_seqs, n_tokens, rows] -> heads, normed and rotated.

    positions [n_seqs, n_tokens]; -1 for padding. The order of steps is that of the graphs in
    llama.cpp's src/models. Raises ValueError if shapes do not fit.
    """
    spec = layer.spec
    q, k = _normed(layer, "row", q, k)
    q = split_heads(q, spec.n_head)  # [n_seqs, n_head, n_tokens, head_dim (· 2)]
    k = split_heads(k, spec.n_head_kv)  # [n_seqs, n_head_kv, n_tokens, head_dim]
    v = split_heads(v, spec.n_head_kv)  # [n_seqs, n_head_kv, n_tokens, head_dim_v]
    gate = None
    if spec.gated_q:
        q, gate = split_gate(q)  # [n_seqs, n_head, n_tokens, head_dim] each
    q, k = _normed(layer, "head", q, k)
    if spec.rope is not None:
        q = apply_rope(q, positions, spec.rope)
        k = apply_rope(k, positions, spec.rope)
    q, k = _normed(layer, "rotated head", q, k)
    if spec.v_norm:
        v = norms.rms_norm(v, None, spec.norm_eps)
    if spec.temperature is not None:
        q = q * _temperatures(spec.temperature, positions).astype(q.dtype)
    return Heads(q, k, v, gate)


def mask(spec: AttentionSpec, q_positions: Ints, k_positions: Ints) -> NDArray[np.float32]:
    """Additive mask [n_seqs, n_tokens, n_kv] of this layer; -|distance| in it under ALiBi.

    q_positions [n_seqs, n_tokens], k_positions [n_seqs, n_kv]: -1 for padding. Rules:
    llama_hparams::is_masked_swa; llama-kv-cache.cpp for ALiBi. Raises ValueError if shapes do not
    fit.
    """
    see = masks.see_past if spec.causal else masks.see_filled
    visible = see(q_positions, k_positions)  # [n_seqs, n_tokens, n_kv]
    if spec.window is not None:
        see_near = {"sliding": masks.see_window, "chunked": masks.see_chunk}
        visible &= see_near[spec.window.kind](q_positions, k_positions, spec.window.n_swa)
    if spec.max_alibi_bias > 0:
        return masks.alibi_mask(visible, q_positions, k_positions)
    return masks.additive_mask(visible)


def output(weights: Linear, attended: Floats, gate: Floats | None = None) -> Floats:
    """Attention's result [n_seqs, n_head, n_tokens, head_dim_v] -> [n_seqs, n_tokens, n_embd].

    Times sigmoid(gate) where there is one, joined, through what `read_output` gives, with its
    scale and bias (llama-graph.cpp, build_attn). Raises ValueError if shapes do not fit.
    """
    if gate is not None:
        attended = apply_gate(attended, gate)
    return weights.project(join_heads(attended))  # [n_seqs, n_tokens, n_embd]


def _normed(layer: AttentionLayer, at: str, q: Floats, k: Floats) -> tuple[Floats, Floats]:
    """Q and K normed, if this is where it is done; their shapes stay."""
    rule, norm, eps = layer.spec.norm, layer.norm, layer.spec.norm_eps
    if rule is None or norm is None or rule.at != at:
        return q, k
    if rule.kind == "rms":
        return norms.rms_norm(q, norm.q, eps), norms.rms_norm(k, norm.k, eps)
    return (
        norms.layer_norm(q, norm.q, norm.q_bias, eps),
        norms.layer_norm(k, norm.k, norm.k_bias, eps),
    )


def _temperatures(rule: Temperature, positions: Ints) -> NDArray[np.float64]:
    """positions [n_seqs, n_tokens] -> [n_seqs, 1, n_tokens, 1] (llm_graph_input_attn_temp)."""
    token = np.maximum(positions, 0)  # padding has no temperature
    steps = np.floor((token + rule.offset) / rule.n_tokens)
    temperatures: NDArray[np.float64] = 1 + rule.scale * np.log(steps + 1)
    return temperatures[:, None, :, None]


# --- reading it --------------------------------------------------------------------------------


def read_projections(header: Header, name: str) -> Projections:
    """The weights of Q, K and V of layer `name`, dequantized; of any architecture.

    Of a fused layer, the rows come from the record of the fusion or the head counts. Raises
    NotModelled where the layer does not have all three, GGUFError where they cannot be read, or
    split for certain.
    """
    return _projections(header, name, v_is_k=False)


def read_layer(header: Header, name: str, n_ctx: int | None = None) -> AttentionLayer:
    """Layer `name` of the file, without attn_output, dequantized to float32.

    Reads no other layer's bytes. n_ctx as in `read_spec`. Raises as `read_spec` and
    `read_projections`, GGUFError if the weights do not have the rows that the metadata asks for.
    """
    spec = read_spec(header, name, n_ctx)
    _require_known(header, spec)
    projections = _projections(header, name, v_is_k=spec.v_is_k)
    if projections.rows != spec.rows:
        raise GGUFError(
            f"{header.path}: {name}: Q, K and V have {projections.rows} rows, the metadata asks "
            f"for {spec.rows}"
        )
    sinks = read_values(header, f"{name}.attn_sinks.weight")
    if sinks is None and spec.sinks == "required":
        raise GGUFError(f"{header.path}: {name} has no attn_sinks.weight")
    layer = AttentionLayer(
        spec=spec,
        projections=projections,
        norm=_qk_norm(header, spec),
        params=AttentionParams(spec.scale, spec.softcap, spec.max_alibi_bias, sinks),
    )
    _require_shapes(header, name, _shapes(layer))
    return layer


def read_output(header: Header, spec: AttentionSpec) -> Linear:
    """attn_output of a layer, dequantized to float32: [n_embd, n_head * head_dim_v].

    Apart from `read_layer`, because it is large and nothing before it needs it. Raises NotModelled
    where there is none, GGUFError where it cannot be read or is not of the metadata's shape.
    """
    weights = _linear(header, f"{spec.name}.attn_output")
    if weights is None:
        raise NotModelled(f"{header.path}: {spec.name} has no attn_output.weight")
    if not spec.output_bias:
        weights = replace(weights, bias=None)
    width = spec.n_head * spec.head_dim_v
    _require_shapes(header, spec.name, _linear_shapes("attn_output", weights, spec.n_embd, width))
    return weights


# What an array is called, the array, and the shapes that it may have.
_Shapes: TypeAlias = Iterator[tuple[str, Floats | None, list[tuple[int, ...]]]]


def _require_shapes(header: Header, name: str, found: _Shapes) -> None:
    for place, array, shapes in found:
        if array is not None and array.shape not in shapes:
            raise GGUFError(
                f"{header.path}: {name}.{place} has shape {array.shape}, the metadata asks for "
                f"{shapes[0]}"
            )


def _linear_shapes(place: str, linear: Linear, rows: int, width: int) -> _Shapes:
    yield f"{place}.weight", linear.weight, [(rows, width)]
    yield f"{place}.bias", linear.bias, [(rows,)]


def _shapes(layer: AttentionLayer) -> _Shapes:
    spec, projections = layer.spec, layer.projections
    if projections.fused is not None:
        yield from _linear_shapes(QKV.fused, projections.fused, sum(spec.rows), spec.n_embd)
    elif projections.separate is not None:
        for part, linear, rows in zip(QKV.parts, projections.separate, spec.rows, strict=True):
            yield from _linear_shapes(part, linear, rows, spec.n_embd)
    yield "attn_sinks.weight", layer.params.sinks, [(spec.n_head,)]
    norm, rule = layer.norm, spec.norm
    if norm is None or rule is None:
        return
    for place, weight, bias, n_head in (
        ("attn_q_norm", norm.q, norm.q_bias, spec.n_head),
        ("attn_k_norm", norm.k, norm.k_bias, spec.n_head_kv),
    ):
        per_head: list[tuple[int, ...]] = [(spec.head_dim,), (n_head, spec.head_dim)]
        whole_row: list[tuple[int, ...]] = [(n_head * spec.head_dim,)]
        shapes = whole_row if rule.at == "row" else per_head
        yield f"{place}.weight", weight, shapes
        yield f"{place}.bias", bias, shapes


# What may stand behind "blk.N.attn_" and is either read here or no part of attention proper: the
# norms around it. Anything else could change what attention computes.
_READ = ("q", "k", "v", "qkv", "output")
_KINDS = ("weight", "bias", "scale", "input_scale")
_AROUND = ("norm", "norm_2", "post_norm", "output_norm")


def _require_known(header: Header, spec: AttentionSpec) -> None:
    known = {f"{part}.{kind}" for part in (*_READ, *_AROUND) for kind in _KINDS}
    if spec.norm is not None and spec.norm.weighted:
        known |= {f"{part}_norm.{kind}" for part in "qk" for kind in ("weight", "bias")}
    if spec.sinks != "none":
        known.add("sinks.weight")
    for tensor in header.tensors:
        layer, _, rest = tensor.name.partition(".attn_")
        if layer == spec.name and rest and rest not in known:
            raise NotModelled(
                f"{header.path}: {tensor.name}: what it does to the attention of "
                f"{spec.architecture!r} is not modelled"
            )


def _linear(header: Header, name: str) -> Linear | None:
    """`.input_scale` is loaded by llama.cpp, but no graph uses it."""
    weight = read_values(header, f"{name}.weight")
    scale = read_values(header, f"{name}.scale")
    if weight is None:
        return None
    if weight.ndim != 2:
        raise GGUFError(f"{header.path}: {name}.weight has {weight.ndim} dimensions, not 2")
    one = None if scale is None else float(scale.reshape(-1)[0])
    return Linear(weight, one, read_values(header, f"{name}.bias"))


def _projections(header: Header, name: str, *, v_is_k: bool) -> Projections:
    fused = _linear(header, f"{name}.{QKV.fused}")
    if fused is not None:
        rows = _fused_rows(header, name)
        return Projections(rows, None, _with_separate_biases(header, fused, name))
    found = [_linear(header, f"{name}.{part}") for part in QKV.parts]
    if v_is_k and found[2] is None:
        found[2] = found[1]
    separate = [linear for linear in found if linear is not None]
    if len(separate) < len(found):
        absent = [p for p, linear in zip(QKV.parts, found, strict=True) if linear is None]
        raise NotModelled(f"{header.path}: {name} has no {absent[0]}.weight of its own")
    q, k, v = separate
    return Projections((len(q.weight), len(k.weight), len(v.weight)), (q, k, v), None)


def _with_separate_biases(header: Header, fused: Linear, name: str) -> Linear:
    """All three biases or none beside a fused weight (llama-graph.cpp, build_qkv)."""
    biases = [read_values(header, f"{name}.{part}.bias") for part in QKV.parts]
    present = [bias for bias in biases if bias is not None]
    if fused.bias is not None or len(present) < len(biases):
        return fused
    return replace(fused, bias=np.concatenate(present))


def _fused_rows(header: Header, name: str) -> Rows:
    q, k, v = unfusion.attention_rows(header, name)
    return q, k, v


def _qk_norm(header: Header, spec: AttentionSpec) -> QkNorm | None:
    rule = spec.norm
    if rule is None:
        return None
    if not rule.weighted:
        return QkNorm(None, None)
    names = [f"{spec.name}.attn_{part}_norm" for part in "qk"]
    q, k = (read_values(header, f"{name}.weight") for name in names)
    if q is None and k is None and rule.optional:
        return None
    if q is None or k is None:
        absent = names[0 if q is None else 1]
        raise GGUFError(f"{header.path}: {absent}.weight is missing")
    if rule.kind == "rms":
        return QkNorm(q, k)
    return QkNorm(q, k, *(read_values(header, f"{name}.bias") for name in names))
