"""The values of random weights, and their bytes in every type: quantized, or random blocks.

Each tensor is drawn from its own stream, keyed by seed and name. Words: `ne` is file order, ne[0]
(the row length) first; *shape* is numpy order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tests.models.random_model import ModelSpec

# Elements that are drawn afresh; a longer tensor repeats them. A prime number of the largest
# blocks (256), so that no two rows of a usual length come out equal and a swap of rows shows.
TILE_ELEMENTS = 1021 * 256
# Largest piece given to one write call, in bytes.
PIECE_BYTES = 8 << 20


def weight_data(
    name: str, ne: tuple[int, ...], tensor_type: gguf.GGMLQuantizationType, spec: ModelSpec
) -> Iterator[memoryview]:
    """The bytes of one weight, in pieces. A tile is drawn once and repeated to the full length."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    n = math.prod(ne)
    # A tile is whole blocks; a tensor without a full tile is drawn as it is.
    n_drawn = min(n, TILE_ELEMENTS)
    tile = _encode(_values(name, ne, n_drawn, spec), tensor_type, spec)
    n_bytes = n // block * block_bytes
    repeats = max(1, min(PIECE_BYTES, n_bytes) // len(tile))
    piece = memoryview(tile.tobytes() * repeats)
    for start in range(0, n_bytes, len(piece)):
        yield piece[: n_bytes - start]


def _values(name: str, ne: tuple[int, ...], n: int, spec: ModelSpec) -> NDArray[np.float32]:
    """The first `n` values of a tensor, shape [n]."""
    rng = _stream(name, spec)
    base, suffix = split_name(name)
    if suffix.endswith("scale") and n == 1:
        return _scale(base, suffix, spec)
    noise = rng.standard_normal(n, dtype=np.float32)
    if suffix.endswith("scale"):
        return 1.0 + 0.2 * noise
    if base == "rope_freqs":
        return np.linspace(1.0, 8.0, n, dtype=np.float32)
    if base.endswith(("norm", "norm_1", "norm_2")) and suffix in ("weight", ""):
        return 1.0 + 0.2 * noise
    if base.endswith("sinks"):
        return noise
    if base.endswith("layer_output_scale"):
        return np.ones(n, np.float32)
    if base.endswith("ssm_a"):
        # A decay: negative.
        return -np.abs(noise)
    if suffix == "bias":
        return 0.2 * noise
    # Keeps the length of what it multiplies: scores and logits come out of order 1, so that a
    # wrong row, a wrong position or a missing bias moves every probability.
    return noise * np.float32(ne[0] ** -0.5)


def _stream(name: str, spec: ModelSpec) -> np.random.Generator:
    return np.random.default_rng([spec.seed, zlib.crc32(name.encode())])


def _scale(base: str, suffix: str, spec: ModelSpec) -> NDArray[np.float32]:
    """One scale, shape [1]: by layer alone if all are to be equal."""
    prefix, _, projection = base.rpartition(".")
    rule = spec.scales if suffix == "scale" else spec.input_scales
    key = f"{prefix}.{suffix}" if rule == "equal" else f"{prefix}.{projection}.{suffix}"
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
    types = gguf.GGMLQuantizationType
    if tensor_type == types.F32:
        return _bytes(values, 4, spec)
    if tensor_type == types.F16:
        return _bytes(values.astype(np.float16), 2, spec)
    if tensor_type == types.BF16:
        return _bytes(gguf.quants.quantize(values, tensor_type), 2, spec)
    try:
        data = gguf.quants.quantize(values, tensor_type).view(np.uint8).reshape(-1)
    except NotImplementedError:
        data = _random_blocks(values, tensor_type)
    if spec.big_endian:
        _swap_scales(data, tensor_type)
    return data


def _bytes(values: NDArray[Any], width: int, spec: ModelSpec) -> NDArray[np.uint8]:
    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
    return (data[:, ::-1] if spec.big_endian else data).reshape(-1)


def _random_blocks(
    values: NDArray[np.float32], tensor_type: gguf.GGMLQuantizationType
) -> NDArray[np.uint8]:
    """Blocks of random quants, with scales that give about the spread of `values`.

    The stream comes from the values' own bytes: different weights, different blocks.
    """
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
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    blocks = data.reshape(-1, block_bytes)
    for offset in _F16_SCALES[tensor_type.name]:
        blocks[:, [offset, offset + 1]] = blocks[:, [offset + 1, offset]]


def split_name(name: str) -> tuple[str, str]:
    """A tensor name as base and suffix ("weight", "bias", ...); some have no suffix."""
    base, dot, suffix = name.rpartition(".")
    return (base, suffix) if dot and suffix in _SUFFIXES else (name, "")


_SUFFIXES = ("weight", "bias", "scale", "input_scale")
