"""Values of the metadata: their types, and Python's values from bytes and as bytes.

Numbers of the value types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal

ByteOrder = Literal["little", "big"]


class ValueType(IntEnum):
    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


# By the type's number, the code of `struct`; strings and arrays have none.
_CODES = "BbHhIif?__Qqd"
SCALARS = {t: _CODES[t] for t in ValueType if _CODES[t] != "_"}
SCALAR_BYTES = {int(t): struct.calcsize(code) for t, code in SCALARS.items()}
INTEGERS = frozenset(t for t, code in SCALARS.items() if code in "BbHhIiQq")


def struct_prefix(byte_order: ByteOrder) -> str:
    return "<" if byte_order == "little" else ">"


def decode(data: bytes, value_type: ValueType, prefix: str, at: int = 0) -> tuple[Any, int]:
    """The value that begins at a byte of the data, and the byte after it; data was checked."""
    if value_type == ValueType.STRING:
        start = at + 8
        end = start + struct.unpack_from(prefix + "Q", data, at)[0]
        return data[start:end].decode("utf-8", "replace"), end
    if value_type != ValueType.ARRAY:
        value = struct.unpack_from(prefix + SCALARS[value_type], data, at)[0]
        return value, at + SCALAR_BYTES[value_type]
    element_id, length = struct.unpack_from(prefix + "IQ", data, at)
    element, at = ValueType(element_id), at + 12
    if element in SCALARS:
        values = struct.unpack_from(f"{prefix}{length}{SCALARS[element]}", data, at)
        return list(values), at + length * SCALAR_BYTES[element]
    items = []
    for _ in range(length):
        item, at = decode(data, element, prefix, at)
        items.append(item)
    return items, at


def encode_pair(
    key: str,
    value_type: ValueType,
    value: int | str | bytes | Sequence[int | str],
    byte_order: ByteOrder,
) -> bytes:
    """One metadata pair as bytes; a list becomes an array of elements of the given type.

    bytes are an array of UINT8.
    """
    prefix = struct_prefix(byte_order)
    if isinstance(value, (int, str)):
        head = struct.pack(prefix + "I", value_type)
        return encode_string(key, prefix) + head + _encode(value_type, value, prefix)
    start = encode_array_start(key, value_type, len(value), byte_order)
    if not isinstance(value, bytes):
        value = b"".join(_encode(value_type, item, prefix) for item in value)
    return start + value


def encode_array_start(key: str, element: ValueType, length: int, byte_order: ByteOrder) -> bytes:
    """A metadata pair whose value is an array, up to the first element."""
    prefix = struct_prefix(byte_order)
    return encode_string(key, prefix) + struct.pack(
        prefix + "IIQ", ValueType.ARRAY, element, length
    )


def array_elements(data: bytes, byte_order: ByteOrder) -> list[bytes]:
    """Of an array of scalars or strings that begins with the data: each element's bytes."""
    prefix = struct_prefix(byte_order)
    element, length = struct.unpack_from(prefix + "IQ", data)
    if element in SCALAR_BYTES:
        size = SCALAR_BYTES[element]
        return [data[12 + at * size : 12 + (at + 1) * size] for at in range(length)]
    elements, at = [], 12
    for _ in range(length):
        end = at + 8 + struct.unpack_from(prefix + "Q", data, at)[0]
        elements.append(data[at:end])
        at = end
    return elements


def key_of_pair(data: bytes, byte_order: ByteOrder) -> str:
    """The key of a metadata pair. Raises ValueError where the data is not one pair, and no more."""
    prefix = struct_prefix(byte_order)
    try:
        at = 8 + struct.unpack_from(prefix + "Q", data)[0]
        key, value_type = data[8:at].decode(), struct.unpack_from(prefix + "I", data, at)[0]
        end = decode(data, ValueType(value_type), prefix, at + 4)[1]
    except (struct.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if end != len(data):
        raise ValueError(f"a pair of {end} bytes in {len(data)}")
    return key


def encode_string(text: str, prefix: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack(prefix + "Q", len(data)) + data


def _encode(value_type: ValueType, value: int | str, prefix: str) -> bytes:
    if isinstance(value, str):
        return encode_string(value, prefix)
    return struct.pack(prefix + SCALARS[value_type], value)
