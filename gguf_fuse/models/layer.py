"""One layer of a file: its dequantized weights, and what it computes with them.

`read_projections` and `read_layer` read the tensors of that one layer; its `spec` says what its
attention does. The order of steps is that of llama.cpp's graphs, of November 2026:
llama-graph.cpp (build_qkv, build_attn) and src/models/*.cpp. Axis names are those of `attention`.
Shapes are numpy order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.models.attention_table import NotModelled, Temperature
from gguf_fuse.models.dequantize import read_values
from gguf_fuse.models.names import ATTENTION_PARTS, FUSED_ATTENTION
from gguf_fuse.models.spec import AttentionSpec, Rows, read_spec

# Tells where a layer's fused weight is split: its rows of Q, K and V. Raises GGUFError.
FusedRows: TypeAlias = Callable[[Header, str], Sequence[int]]


@dataclass(frozen=True, eq=False, slots=True)
class Projections:
    """Q, K and V of one layer, as the file has them: three weights, or one and where to split."""

    rows: Rows
    linears: tuple[Linear, ...]  # [rows of each, n_embd], or one [q + k + v rows, n_embd]

    @property
    def fused(self) -> bool:
        return len(self.linears) == 1


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


def project(
    projections: Projections, x: Floats, clamp: float = 0.0
) -> tuple[Floats, Floats, Floats]:
    """x [n_seqs, n_tokens, n_embd] -> [n_seqs, n_tokens, rows] of Q, K and V.

    Through one matrix or three, as the file has them; clamp is `AttentionSpec.clamp`
    (llama-graph.cpp, build_qkv). Raises ValueError if x does not fit.
    """
    if projections.fused:
        return project_fused(x, projections.linears[0], projections.rows, clamp)
    q, k, v = projections.linears
    return project_separate(x, q, k, v, clamp)


def positioned(layer: AttentionLayer, q: Floats, k: Floats, v: Floats, positions: Ints) -> Heads:
    """What `project` gives, [n_seqs, n_tokens, rows] -> heads, normed and rotated.

    positions [n_seqs, n_tokens]; -1 for padding. Raises ValueError if shapes do not fit.
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
        see_near = masks.see_chunk if spec.window.chunked else masks.see_window
        visible &= see_near(q_positions, k_positions, spec.window.n_swa)
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
    joined = join_heads(attended)  # [n_seqs, n_tokens, n_head * head_dim_v]
    return weights.project(joined)


def _normed(layer: AttentionLayer, at: str, q: Floats, k: Floats) -> tuple[Floats, Floats]:
    """Q and K normed, if this is where it is done; their shapes stay."""
    rule, eps = layer.spec.norm, layer.spec.norm_eps
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
    NotModelled where the layer does not have all three, GGUFError where they cannot be read, and
    as fused_rows does.
    """
    fused = _linear(header, f"{name}.{FUSED_ATTENTION}")
    if fused is not None:
        q_rows, k_rows, v_rows = fused_rows(header, name)
        fused = _with_separate_biases(header, fused, name)
        return Projections((q_rows, k_rows, v_rows), (fused,))
    found = [_linear(header, f"{name}.{part}") for part in ATTENTION_PARTS]
    if v_is_k and found[2] is None:
        found[2] = found[1]
    q, k, v = found
    if q is None or k is None or v is None:
        absent = ATTENTION_PARTS[found.index(None)]
        raise NotModelled(f"{header.path}: {name} has no {absent}.weight of its own")
    return Projections((len(q.weight), len(k.weight), len(v.weight)), (q, k, v))


def read_layer(
    header: Header, name: str, fused_rows: FusedRows, n_ctx: int | None = None
) -> AttentionLayer:
    """Layer `name` of the file, without attn_output, dequantized to float32.

    Reads no other layer's bytes. n_ctx as in `read_spec`. Raises as `read_spec` and
    `read_projections`, GGUFError if the weights do not have the rows that the metadata asks for.
    """
    spec = read_spec(header, name, n_ctx)
    _require_known(header, spec)
    projections = read_projections(header, name, fused_rows, v_is_k=spec.v_is_k)
    if projections.rows != spec.rows:
        raise GGUFError(
            f"{header.path}: {name}: Q, K and V have {projections.rows} rows, the metadata asks "
            f"for {spec.rows}"
        )
    sinks = read_values(header, f"{name}.attn_sinks.weight")
    if sinks is None and spec.sinks == "required":
        raise GGUFError(f"{header.path}: {name} has no attn_sinks.weight")
    params = AttentionParams(spec.scale, spec.softcap, spec.max_alibi_bias, sinks)
    layer = AttentionLayer(spec, projections, _norms(header, spec), params)
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
_Shapes: TypeAlias = Iterator[tuple[str, Floats | None, Sequence[tuple[int, ...]]]]


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
    fused = projections.fused
    parts = (FUSED_ATTENTION,) if fused else ATTENTION_PARTS
    all_rows = (sum(spec.rows),) if fused else spec.rows
    for part, linear, rows in zip(parts, projections.linears, all_rows, strict=True):
        yield from _linear_shapes(part, linear, rows, spec.n_embd)
    yield "attn_sinks.weight", layer.params.sinks, [(spec.n_head,)]
    n_heads = (spec.n_head, spec.n_head_kv)
    for part, norm, n_head in zip("qk", layer.norms or (), n_heads, strict=False):
        shapes = [(spec.head_dim,), (n_head, spec.head_dim)]
        if spec.norm is not None and spec.norm.at == "row":
            shapes = [(n_head * spec.head_dim,)]
        yield f"attn_{part}_norm.weight", norm.weight, shapes
        yield f"attn_{part}_norm.bias", norm.bias, shapes


# What may stand behind "blk.N.attn_" and is either read here or no part of attention proper: the
# norms around it. Anything else could change what attention computes.
_READ = ("q", "k", "v", "qkv", "output")
_AROUND = ("norm", "norm_2", "post_norm", "output_norm")
_SUFFIXES = ("weight", "bias", "scale", "input_scale")


def _require_known(header: Header, spec: AttentionSpec) -> None:
    known = {f"{part}.{suffix}" for part in (*_READ, *_AROUND) for suffix in _SUFFIXES}
    if spec.norm is not None and spec.norm.weighted:
        known |= {f"{part}_norm.{suffix}" for part in "qk" for suffix in ("weight", "bias")}
    if spec.sinks != "none":
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
    if weight.ndim != 2:
        raise GGUFError(f"{header.path}: {name}.weight has {weight.ndim} dimensions, not 2")
    one = None if scale is None else float(scale.reshape(-1)[0])
    return Linear(weight, one, read_values(header, f"{name}.bias"))


def _with_separate_biases(header: Header, fused: Linear, name: str) -> Linear:
    """All three biases or none beside a fused weight (llama-graph.cpp, build_qkv)."""
    biases = [read_values(header, f"{name}.{part}.bias") for part in ATTENTION_PARTS]
    present = [bias for bias in biases if bias is not None]
    if fused.bias is not None or len(present) < len(biases):
        return fused
    return replace(fused, bias=np.concatenate(present))


def _norms(header: Header, spec: AttentionSpec) -> tuple[Norm, Norm] | None:
    rule = spec.norm
    if rule is None or not rule.weighted:
        return None if rule is None else (Norm(), Norm())
    names = [f"{spec.name}.attn_{part}_norm" for part in "qk"]
    q, k = (read_values(header, f"{name}.weight") for name in names)
    if q is None and k is None and rule.optional:
        return None
    if q is None or k is None:
        absent = names[0 if q is None else 1]
        raise GGUFError(f"{header.path}: {absent}.weight is missing")
    if rule.formula == "rms":
        return Norm(q), Norm(k)
    q_bias, k_bias = (read_values(header, f"{name}.bias") for name in names)
    return Norm(q, q_bias), Norm(k, k_bias)
