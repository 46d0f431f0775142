"""Random-weight GGUF files that llama.cpp loads: for tests and benchmarks.

What an architecture's loader asks for is data (`architectures`), the writing is one function. Each
tensor is drawn from its own stream, keyed by seed and name, so that a weight stays the same
whatever else the file holds: a model written fused has the very bytes of the one written
separately, and changing one type leaves the other tensors alone.

Words: `ne` is file order, ne[0] (the row length) first; *shape* is numpy order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

from tests.models.architectures import LAYOUTS, NE, Layout, Value
from tests.models.random_weights import split_name, weight_data
from tests.models.vocabularies import bpe_vocabulary, spm_vocabulary

Scales = Literal["none", "equal", "unequal"]


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
        if self.architecture not in LAYOUTS:
            known = ", ".join(sorted(LAYOUTS))
            raise ValueError(f"unknown architecture {self.architecture!r}; known: {known}")
        if self.key_length is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.key_length and not LAYOUTS[self.architecture].free_head_dim:
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
                for piece in weight_data(name, ne, tensor_type, spec):
                    out.write(piece)
            writer.write_padding(out, out.tell() - start)
    finally:
        writer.close()


def data_bytes(spec: ModelSpec) -> int:
    """Bytes of all tensor data that `write_random_model` would write, without padding."""
    n_bytes = 0
    for tensor in _tensors(spec):
        block, block_bytes = gguf.GGML_QUANT_SIZES[_type_of(tensor, spec)]
        n_bytes += math.prod(tensor.ne) // block * block_bytes
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
        n_head_kv=None if _layout(spec).n_head_kv else n_head // 4,
        n_ff=3 * n_embd,
        key_length=None,
        value_length=None,
    )


# --- what the file holds -----------------------------------------------------------------------


def demo_spec() -> ModelSpec:
    """A small llama whose types are mixed like those of a Q4_K_M file: V is Q6_K in two layers."""
    more_bits = {f"blk.{layer}.attn_v.weight": T.Q6_K for layer in (0, 7)}
    return ModelSpec(
        n_layer=8, n_embd=512, n_head=8, n_head_kv=2, n_ctx=4096, types={"*": T.Q4_K, **more_bits}
    )


def _layout(spec: ModelSpec) -> Layout:
    return LAYOUTS[spec.architecture]


def _n_layer(spec: ModelSpec) -> int:
    return _layout(spec).n_layer if spec.n_layer is None else spec.n_layer


def _head_counts(spec: ModelSpec) -> tuple[int, ...]:
    """n_head_kv by layer, taking turns."""
    if isinstance(spec.n_head_kv, int):
        return (spec.n_head_kv,)
    return spec.n_head_kv or _layout(spec).n_head_kv or (2,)


def _sizes(spec: ModelSpec, layer: int = 0) -> dict[str, int]:
    """The words of `NE` and what they are in this layer."""
    layout = _layout(spec)
    key_length = spec.key_length or spec.n_embd // spec.n_head
    value_length = spec.value_length or int(key_length * layout.value)
    n_rot = spec.n_rot if spec.n_rot is not None else int(key_length * layout.rotary) // 2 * 2
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
        "n_expert": layout.n_expert if spec.n_expert is None else spec.n_expert,
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
    layout = _layout(spec)
    tensors = [_tensor("", name, (name,), spec, 0) for name in layout.outer.split()]
    if spec.rope_freqs:
        tensors.append(_tensor("", "rope_freqs.weight", ("rope_freqs.weight",), spec, 0))
    forms = layout.layer.split(" | ")
    for prefix, extra in layout.prefixes.items():
        for layer in range(_n_layer(spec)):
            for word in f"{forms[layer % len(forms)]} {extra}".split():
                for name, parts in _expand(word, spec):
                    tensors.append(_tensor(f"{prefix}{layer}.", name, parts, spec, layer))
    return tensors


def _expand(word: str, spec: ModelSpec) -> list[tuple[str, tuple[str, ...]]]:
    """The tensors that a word of `Layout.layer` stands for: name and names of the parts."""
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
    layout = _layout(spec)
    suffixes = ["weight"]
    if _or_default(spec.bias, layout.bias):
        suffixes.append("bias")
    tensors: list[tuple[str, tuple[str, ...]]] = []
    if _or_default(spec.fused, layout.fused):
        for suffix in suffixes:
            tensors.append((f"attn_qkv.{suffix}", tuple(f"{part}.{suffix}" for part in _QKV)))
        tensors += [(f"attn_qkv.{end}", (f"attn_q.{end}",)) for end in _scale_suffixes(spec)]
    else:
        suffixes += _scale_suffixes(spec)
        names = [f"{part}.{suffix}" for part in _QKV for suffix in suffixes]
        tensors += [(name, (name,)) for name in names]
    extra = []
    if _or_default(spec.qk_norm, layout.qk_norm):
        extra += ["attn_q_norm.weight", "attn_k_norm.weight"]
    if _or_default(spec.sinks, layout.sinks):
        extra.append("attn_sinks.weight")
    return tensors + [(name, (name,)) for name in extra]


def _scale_suffixes(spec: ModelSpec) -> list[str]:
    rules = {"scale": spec.scales, "input_scale": spec.input_scales}
    return [suffix for suffix, rule in rules.items() if rule != "none"]


def _or_default(wanted: bool | None, default: bool) -> bool:
    return default if wanted is None else wanted


def _tensor(
    prefix: str, name: str, part_names: Sequence[str], spec: ModelSpec, layer: int
) -> _Tensor:
    parts = tuple((prefix + part, _ne(part, spec, layer)) for part in part_names)
    _, first = parts[0]
    rows = sum(ne[-1] for _, ne in parts)
    return _Tensor(prefix + name, (*first[:-1], rows), parts)


def _ne(name: str, spec: ModelSpec, layer: int) -> tuple[int, ...]:
    base, suffix = split_name(name)
    own = _layout(spec).ne
    if suffix.endswith("scale") and name not in own:
        return (1,)
    sizes = _sizes(spec, layer)
    words = own.get(name) or own.get(base) or NE[base]
    ne = tuple(_size(word, sizes) for word in words.split())
    return (ne[1:] or ne) if suffix == "bias" else ne


# Always F32, as the converter leaves them: what is added or multiplied, and the router.
_F32 = ("*norm.weight", "*.ffn_gate_inp.weight", "*.bias", "*scale", "*sinks.weight")


def _type_of(tensor: _Tensor, spec: ModelSpec) -> gguf.GGMLQuantizationType:
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
    shape = tensor.ne[::-1]
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    n_bytes = math.prod(tensor.ne) // block * block_bytes
    # With any dtype but uint8 the writer takes the shape as elements.
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes, raw_dtype=tensor_type)


# --- metadata ----------------------------------------------------------------------------------


def _metadata(spec: ModelSpec) -> dict[str, Value]:
    """All keys in file order, except general.architecture, which the writer puts first."""
    keys: dict[str, Value | None] = {"general.name": spec.name}
    if spec.alignment != 32:
        keys["general.alignment"] = spec.alignment
    for key, value in _architecture_keys(spec).items():
        keys[f"{spec.architecture}.{key}"] = value
    for key, value in _layout(spec).global_keys.items():
        keys[key] = _resolve(value, spec)
    tokenizer = spec.tokenizer or ("bpe" if spec.n_vocab >= 65536 else "spm")
    keys.update(
        bpe_vocabulary(spec.n_vocab) if tokenizer == "bpe" else spm_vocabulary(spec.n_vocab)
    )
    keys.update(spec.metadata)
    return {key: value for key, value in keys.items() if value is not None}


def _architecture_keys(spec: ModelSpec) -> dict[str, Value]:
    layout = _layout(spec)
    sizes = _sizes(spec)
    counts = _head_counts(spec)
    epsilon = "layer_norm_rms_epsilon" if layout.norm == "rms" else "layer_norm_epsilon"
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
        "rope.freq_base": spec.rope_base or layout.rope_base,
        "vocab_size": spec.n_vocab,
    }
    if spec.rope_scaling is not None:
        keys["rope.scaling.type"] = spec.rope_scaling
        keys["rope.scaling.factor"] = spec.rope_factor
        keys["rope.scaling.original_context_length"] = spec.n_ctx_orig
    window = layout.sliding_window if spec.sliding_window is None else spec.sliding_window
    if window:
        keys["attention.sliding_window"] = window
    if sizes["n_expert"]:
        keys["expert_count"] = sizes["n_expert"]
        keys["expert_used_count"] = min(2, sizes["n_expert"])
        keys["expert_feed_forward_length"] = sizes["n_ff"]
    keys.update(layout.keys)
    return {key: _resolve(value, spec) for key, value in keys.items()}


def _resolve(value: Value, spec: ModelSpec) -> Value:
    """A value of `Layout.keys` as it is written."""
    if isinstance(value, str) and value.startswith("="):
        return _size(value[1:], _sizes(spec))
    if isinstance(value, tuple):
        return [value[layer % len(value)] for layer in range(_n_layer(spec))]
    return value


def _add_key(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    """Add a key with the GGUF type that llama.cpp expects of such a value."""
    types = gguf.GGUFValueType
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        unsigned = types.UINT32 if value < 1 << 32 else types.UINT64
        writer.add_key_value(key, value, types.INT32 if value < 0 else unsigned)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_key_value(key, value, types.STRING)
    else:
        # Naming the item type saves the writer a look at each of 280k merges.
        item = types.get_type(value[0])
        writer.add_key_value(key, list(value), types.ARRAY, sub_type=item)
