"""Random-weight GGUF files that llama.cpp loads: for tests, the demo and benchmarks.

What an architecture's loader asks for is data (`random_architectures`), the writing is one
function. Each tensor is drawn from its own stream, keyed by seed and name, so that a weight stays
the same whatever else the file holds: a model written fused has the very bytes of the one written
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

from gguf_fuse.random_architectures import LAYOUTS, NE, Layout, Value

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray

Scales = Literal["none", "equal", "unequal"]

# Elements that are drawn afresh; a longer tensor repeats them. A prime number of the largest
# blocks (256), so that no two rows of a usual length come out equal and a swap of rows shows.
TILE_ELEMENTS = 1021 * 256
# Largest piece given to one write call, in bytes.
PIECE_BYTES = 8 << 20


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
        n_head_kv=None if _layout(spec).n_head_kv else n_head // 4,
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
    kinds = layout.layer.split(" | ")
    for prefix, extra in layout.prefixes.items():
        for layer in range(_n_layer(spec)):
            for word in f"{kinds[layer % len(kinds)]} {extra}".split():
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
    kinds = ["weight"]
    if _or_default(spec.bias, layout.bias):
        kinds.append("bias")
    tensors: list[tuple[str, tuple[str, ...]]] = []
    if _or_default(spec.fused, layout.fused):
        for kind in kinds:
            tensors.append((f"attn_qkv.{kind}", tuple(f"{part}.{kind}" for part in _QKV)))
        tensors += [(f"attn_qkv.{kind}", (f"attn_q.{kind}",)) for kind in _scale_kinds(spec)]
    else:
        names = [f"{part}.{kind}" for part in _QKV for kind in kinds + _scale_kinds(spec)]
        tensors += [(name, (name,)) for name in names]
    extra = []
    if _or_default(spec.qk_norm, layout.qk_norm):
        extra += ["attn_q_norm.weight", "attn_k_norm.weight"]
    if _or_default(spec.sinks, layout.sinks):
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
    own = _layout(spec).ne
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
    for key, value in _layout(spec).global_keys.items():
        keys[key] = _resolve(value, spec)
    tokenizer = spec.tokenizer or ("bpe" if spec.n_vocab >= 65536 else "spm")
    keys.update(_bpe_vocabulary(spec) if tokenizer == "bpe" else _spm_vocabulary(spec))
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
