"""The table of types against ggml itself, its sources and gguf-py."""

from __future__ import annotations

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_fuse.format.types import BF16, F16, F32, TYPES, blocked, is_known, row_bytes, type_name
from tests.compare import needs_llama_cpp
from tests.llama_judge import ggml_type

# ggml.h (enum ggml_type) and ggml-common.h (QK_* and static_assert(sizeof(block_*))), copied by
# hand in November 2026: id, name, elements and bytes of a block.
SOURCES = """
    0 F32 1 4        1 F16 1 2         2 Q4_0 32 18      3 Q4_1 32 20      6 Q5_0 32 22
    7 Q5_1 32 24     8 Q8_0 32 34      9 Q8_1 32 36      10 Q2_K 256 84    11 Q3_K 256 110
    12 Q4_K 256 144  13 Q5_K 256 176   14 Q6_K 256 210   15 Q8_K 256 292   16 IQ2_XXS 256 66
    17 IQ2_XS 256 74 18 IQ3_XXS 256 98 19 IQ1_S 256 50   20 IQ4_NL 32 18   21 IQ3_S 256 110
    22 IQ2_S 256 82  23 IQ4_XS 256 136 24 I8 1 1         25 I16 1 2        26 I32 1 4
    27 I64 1 8       28 F64 1 8        29 IQ1_M 256 56   30 BF16 1 2       34 TQ1_0 256 54
    35 TQ2_0 256 66  39 MXFP4 32 17    40 NVFP4 64 36    41 Q1_0 128 18    42 Q2_0 64 18
""".split()


def test_as_in_the_sources_of_ggml() -> None:
    rows = zip(*(SOURCES[at::4] for at in range(4)), strict=True)
    assert {int(i): (name, int(n), int(size)) for i, name, n, size in rows} == TYPES


@needs_llama_cpp
@pytest.mark.parametrize("type_id", TYPES)
def test_as_llama_cpp_has_it(type_id: int) -> None:
    name, block, block_bytes = ggml_type(type_id)
    assert (name.upper(), block, block_bytes) == TYPES[type_id]


def test_as_gguf_py_has_it() -> None:
    """gguf-py gives Q8_1 the 40 bytes that it had once, and may be older than the newest types."""
    theirs = {int(t): (t.name, *sizes) for t, sizes in GGML_QUANT_SIZES.items()}
    assert theirs.pop(GGMLQuantizationType.Q8_1) in {("Q8_1", 32, 40), ("Q8_1", 32, 36)}
    assert theirs.items() <= TYPES.items()


def test_questions() -> None:
    names = ["F32", "F16", "BF16", "Q4_0", "type 142"]
    assert [type_name(i) for i in (F32, F16, BF16, 2, 142)] == names
    assert is_known(42) and not is_known(4) and not is_known(142)
    assert blocked(2) and not blocked(F16)
    assert (row_bytes(2, 64), row_bytes(12, 256), row_bytes(F32, 3)) == (36, 144, 12)
