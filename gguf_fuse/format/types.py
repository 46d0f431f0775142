"""ggml's tensor types: name, elements of a block, bytes of a block.

The numbers are those of ggml.h and the block structs of ggml-common.h (November 2026). The tool has
a table of its own because gguf-py's is wrong for Q8_1 (40 bytes, ggml: 36), older than the newest
types, and takes a tenth of a second to import.
"""

from __future__ import annotations

from typing import NamedTuple


class BlockType(NamedTuple):
    name: str
    block: int  # elements
    block_bytes: int


TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 36),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
    42: BlockType("Q2_0", 64, 18),
}

F32, F16, BF16 = 0, 1, 30


def is_known(type_id: int) -> bool:
    return type_id in TYPES


def blocked(type_id: int) -> bool:
    """Whether the elements of a known type come in blocks, so that a row may end inside one."""
    return TYPES[type_id].block > 1


def type_name(type_id: int) -> str:
    """Q4_0, F16, ...; "type 142" for an id that is not known."""
    return TYPES[type_id].name if type_id in TYPES else f"type {type_id}"


def row_bytes(type_id: int, n_elements: int) -> int:
    """Bytes of n_elements (a multiple of the block) of a known type."""
    _, block, block_bytes = TYPES[type_id]
    return n_elements // block * block_bytes
