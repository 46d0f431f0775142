"""Tensors of a file -> their values as float32, in either byte order; plain floats also back.

Shapes are numpy order: `ne` reversed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.types import BF16, F16, F32, type_name
from gguf_fuse.format.values import ByteOrder
from gguf_fuse.models.keys import NotModelled

_WORDS = {F32: "f4", F16: "f2", BF16: "u2"}
FLOATS = tuple(_WORDS)

# Where a block holds 16-bit floats; all else in it is bytes. Types whose blocks hold other words
# are not read from big-endian files. The maker of random models has a table of its own, so that
# its files test this one.
_HALVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "MXFP4": (),
}


def read_values(header: Header, name: str) -> NDArray[np.float32] | None:
    """The values of one tensor; None where the file does not have it.

    Raises GGUFError if it cannot be read, and as `dequantized`.
    """
    tensor = next((tensor for tensor in header.tensors if tensor.name == name), None)
    if tensor is None:
        return None
    return dequantized(header, tensor, tensor.data.read())


def dequantized(header: Header, tensor: TensorInfo, data: bytes) -> NDArray[np.float32]:
    """The values of a tensor of this file, from its bytes.

    Raises NotModelled for a type that gguf-py cannot dequantize, or whose blocks are not read from
    big-endian files.
    """
    shape = tensor.ne[::-1]
    if tensor.type in FLOATS:
        return decode_floats(data, tensor.type, header.byte_order).reshape(shape)
    place = f"{header.path}: tensor {tensor.name!r}"
    if tensor.type in GGML_QUANT_SIZES:
        known = GGMLQuantizationType(tensor.type)
        blocks = np.frombuffer(data, np.uint8)
        if header.byte_order == "big":
            if known.name not in _HALVES:
                raise NotModelled(f"{place}: {known.name} is not read from big-endian files")
            blocks = blocks.reshape(-1, GGML_QUANT_SIZES[known][1]).copy()  # [n_blocks, bytes]
            for at in _HALVES[known.name]:
                blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
        with contextlib.suppress(NotImplementedError):
            # By rows: gguf-py then takes a few at a time, and needs less memory on the way.
            values: NDArray[np.float32] = quants.dequantize(blocks.reshape(*shape[:-1], -1), known)
            return values
    raise NotModelled(f"{place}: gguf-py cannot dequantize {type_name(tensor.type)}")


def decode_floats(data: bytes, float_type: int, order: ByteOrder) -> NDArray[np.float32]:
    """Values of F32, F16 or BF16 words, flat."""
    words = np.frombuffer(data, _dtype(float_type, order))
    if float_type == BF16:
        return (words.astype(np.uint32) << 16).view(np.float32)
    return words.astype(np.float32)


def encode_floats(values: NDArray[Any], float_type: int, order: ByteOrder) -> bytes:
    """The other way; rounds to the nearest, BF16 towards zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        if float_type == BF16:
            values = np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16
        return values.astype(_dtype(float_type, order)).tobytes()


def _dtype(float_type: int, order: ByteOrder) -> str:
    return ("<" if order == "little" else ">") + _WORDS[float_type]
