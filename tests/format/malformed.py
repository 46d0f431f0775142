"""Malformed files, one maker each, and what the error line must contain: a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.pack import (
    ARRAY,
    FLOAT32,
    INT,
    INT32,
    LONG,
    Q4_0,
    Q6_K,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Array,
    Content,
    K,
    Pair,
    Q,
    Sparse,
    Tensor,
    V,
    bare,
    head_of,
    tensor,
    valid,
)


@dataclass(frozen=True)
class Case:
    name: str
    words: tuple[str, ...]
    make: Callable[[], Content]


CASES: list[Case] = []


def evil(*words: str) -> Callable[[Callable[[], Content]], None]:
    """Registers a maker of a malformed file, and what its error line must contain."""

    def register(make: Callable[[], Content]) -> None:
        CASES.append(Case(make.__name__, words, make))

    return register


# the first bytes


@evil("not a GGUF file")
def empty_file() -> Content:
    return b""


@evil("truncated", "4")
def four_bytes() -> Content:
    return b"GGUF"


@evil("not a GGUF file")
def three_bytes() -> Content:
    return b"GGU"


@evil("not a GGUF file", "zip", "convert_hf_to_gguf.py")
def a_zip_file() -> Content:
    return b"PK\3\4" + bytes(100)


@evil("not a GGUF file", "git lfs pull")
def a_git_lfs_pointer() -> Content:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 42\n"


@evil("not a GGUF file", "FUGG")
def magic_backwards() -> Content:
    return b"FUGG" + valid().pack()[4:]


@evil("not a GGUF file", r"\x1b")
def magic_is_a_terminal_escape() -> Content:
    return b"\x1b[2J" + valid().pack()[4:]


@evil("version 0")
def version_0() -> Content:
    return replace(valid(), version=0)


@evil("version 1", "not supported")
def version_1() -> Content:
    return replace(valid(), version=1)


@evil("version 99")
def version_99() -> Content:
    return replace(valid(), version=99)


@evil("version 4294967295")
def version_all_ones() -> Content:
    return replace(valid(), version=2**32 - 1)


@evil("version 1")
def version_1_with_an_empty_string_24_bytes() -> Content:  # ollama#17033
    return replace(bare(), version=1).pack()[:24].ljust(24, b"\0")


@evil("metadata pairs", "more than")
def only_the_version_is_swapped() -> Content:
    data = valid().pack()
    return data[:4] + data[7:3:-1] + data[8:]


@evil("not supported")
def swapped_garbage() -> Content:
    data = valid().pack()
    return data[:4] + b"".join(data[i : i + 4][::-1] for i in range(4, len(data), 4))[1:]


# counts and lengths


@evil(str(2**63), "tensors")
def tensor_count_2_63() -> Content:
    return replace(valid(), n_tensors=2**63)


@evil(str(2**64 - 1), "tensors")
def tensor_count_minus_1() -> Content:
    return replace(valid(), n_tensors=2**64 - 1)


@evil(str(2**63), "metadata pairs")
def metadata_count_2_63() -> Content:
    return replace(valid(), n_pairs=2**63)


@evil("tensor")
def one_tensor_too_many() -> Content:
    return replace(valid(), n_tensors=11)


@evil("tensor 1 of 10")
def one_pair_too_many() -> Content:
    return replace(valid(), n_pairs=9)


@evil("'tokenizer.ggml.scores'", "9 dimensions")
def one_pair_too_few() -> Content:
    return replace(valid(), n_pairs=7)


@evil("metadata pair 1 of 8", str(2**63))
def key_length_2_63() -> Content:
    file = valid()
    file.pairs[0] = replace(file.pairs[0], key_length=2**63)
    return file


@evil("metadata pair 1 of 1", "65536")
def key_of_64_kib() -> Content:
    return bare(Pair("k" * 65536, UINT8, 1))


@evil("empty key")
def empty_key() -> Content:
    return valid().key("", UINT8, 1)


@evil("'llama.block_count'", "twice")
def duplicate_key() -> Content:
    return valid().key("llama.block_count", UINT32, 3, old="general.name")


@evil("key", "UTF-8", r"\xff")
def key_is_not_utf8() -> Content:
    file = valid()
    file.pairs.append(Pair(b"general.\xff\xfe", UINT8, 1))
    return file


@evil("'general.name'", "13")
def unknown_type_of_value() -> Content:
    return valid().key("general.name", 13, b"abc")


@evil("'general.name'", str(2**32 - 1))
def type_of_value_all_ones() -> Content:
    return valid().key("general.name", 2**32 - 1, b"abc")


@evil("'general.name'")
def string_length_2_63() -> Content:  # L19003, ggml#1516
    return valid().key("general.name", STRING, LONG.pack(2**63) + b"abc")


@evil("'general.name'")
def string_length_wraps_back() -> Content:
    return valid().key("general.name", STRING, LONG.pack(2**64 - 16) + b"abc")


@evil("'general.name'")
def string_length_one_more_than_the_file() -> Content:
    return valid().key("general.name", STRING, LONG.pack(1 << 16) + b"abc")


# arrays


@evil("'k'", str(2**63))
def array_length_2_63_in_a_tiny_file() -> Content:  # L27188
    return bare(Pair("k", ARRAY, Array(UINT8, length=2**63)))


@evil("'k'", str(2**63))
def string_array_length_2_63() -> Content:
    return bare(Pair("k", ARRAY, Array(STRING, length=2**63)))


@evil("'k'", str(2**61))
def array_length_times_size_wraps_to_0() -> Content:
    return bare(Pair("k", ARRAY, Array(UINT64, length=2**61)))


@evil("'k'", "13")
def unknown_type_of_element() -> Content:
    return bare(Pair("k", ARRAY, Array(13, length=1)))


@evil("'k'")
def array_longer_than_the_file() -> Content:
    return bare(Pair("k", ARRAY, Array(FLOAT32, [1.0], length=4)))


@evil("'k'", "nests arrays")
def arrays_9_deep() -> Content:
    value = Array(UINT8, [1])
    for _ in range(8):
        value = Array(ARRAY, [value])
    return bare(Pair("k", ARRAY, value))


@evil("'k'", "nests arrays")
def arrays_100000_deep() -> Content:
    level = INT.pack(ARRAY) + LONG.pack(1)
    return bare(Pair("k", ARRAY, level * 100_000))


@evil("'k'", str(2**63))
def array_of_2_63_arrays() -> Content:
    return bare(Pair("k", ARRAY, Array(ARRAY, length=2**63)))


@evil("'k'", "truncated")
def array_of_100000_arrays_and_one_more() -> Content:
    return bare(Pair("k", ARRAY, Array(ARRAY, [Array(UINT8)] * 100_000, length=100_001)))


@evil("'k'", "truncated")
def arrays_7_deep_and_5_wide() -> Content:
    value = Array(STRING, [""])
    for _ in range(6):
        value = Array(ARRAY, [value] * 5)
    return bare(Pair("k", ARRAY, value)).pack()[:-1]


@evil("'k'", str(2**63))
def huge_array_inside_an_array() -> Content:
    return bare(Pair("k", ARRAY, Array(ARRAY, [Array(STRING, length=2**63)])))


@evil("'k'", "truncated")
def a_million_empty_strings_and_one_more() -> Content:
    value = INT.pack(STRING) + LONG.pack(10**6 + 1) + bytes(8 * 10**6)
    return bare(Pair("k", ARRAY, value + bytes(7)))


# known keys


@evil("general.alignment", "0")
def alignment_0() -> Content:  # CVE-2025-0317
    return valid().key("general.alignment", UINT32, 0)


@evil("general.alignment", "33", "power of two")
def alignment_33() -> Content:
    return valid().key("general.alignment", UINT32, 33)


@evil("general.alignment", str(2**30))
def alignment_2_30() -> Content:
    return valid().key("general.alignment", UINT32, 2**30)


@evil("general.alignment", str(2**28), f"at most {2**24}")
def alignment_of_256_mb_in_a_file_as_long() -> Content:
    return head_of(valid().key("general.alignment", UINT32, 2**28), 2**29)


@evil("general.alignment", str(2**31))
def alignment_2_31() -> Content:
    return valid().key("general.alignment", UINT32, 2**31)


@evil("general.alignment", "UINT64", "UINT32")
def alignment_of_64_bits() -> Content:  # L26318
    return valid().key("general.alignment", UINT64, 32)


@evil("general.alignment", "STRING", "UINT32")
def alignment_is_a_string() -> Content:
    return valid().key("general.alignment", STRING, "32")


@evil("general.alignment", "array of UINT32")
def alignment_is_an_array() -> Content:
    return valid().key("general.alignment", ARRAY, Array(UINT32, [32]))


@evil("'llama.block_count'", "STRING", "integer")
def block_count_is_a_string() -> Content:  # CVE-2024-8063
    return valid().key("llama.block_count", STRING, "2")


@evil("'llama.block_count'", "FLOAT32", "integer")
def block_count_is_a_float() -> Content:
    return valid().key("llama.block_count", FLOAT32, 2.0)


@evil("'llama.block_count'", "array of UINT32", "integer")
def block_count_is_an_array() -> Content:
    return valid().key("llama.block_count", ARRAY, Array(UINT32, [2]))


@evil("'general.architecture'", "UINT32", "STRING")
def architecture_is_a_number() -> Content:
    return valid().key("general.architecture", UINT32, 1)


@evil("'general.architecture'", "array of STRING", "must be STRING")
def architecture_is_an_array() -> Content:
    return valid().key("general.architecture", ARRAY, Array(STRING, ["llama"]))


@evil("tokenizer.ggml.scores", "UINT8", "FLOAT32")
def scores_are_bytes() -> Content:  # L26690
    return valid().key("tokenizer.ggml.scores", ARRAY, Array(UINT8, [1, 2, 3]))


@evil("tokenizer.ggml.scores", "2", "3")
def scores_shorter_than_tokens() -> Content:
    return valid().key("tokenizer.ggml.scores", ARRAY, Array(FLOAT32, [0.0, 1.0]))


@evil("tokenizer.ggml.scores", "FLOAT32", "array")
def scores_are_one_number() -> Content:
    return valid().key("tokenizer.ggml.scores", FLOAT32, 1.0)


@evil("tokenizer.ggml.token_type", "2", "3")
def token_types_shorter_than_tokens() -> Content:
    return valid().key("tokenizer.ggml.token_type", ARRAY, Array(INT32, [1, 1]))


@evil("tokenizer.ggml.token_type", "UINT8", "INT32")
def token_types_are_bytes() -> Content:
    return valid().key("tokenizer.ggml.token_type", ARRAY, Array(UINT8, [1, 1, 1]))


@evil("tokenizer.ggml.tokens", "UINT32", "STRING")
def tokens_are_numbers() -> Content:
    return valid().key("tokenizer.ggml.tokens", ARRAY, Array(UINT32, [1, 2, 3]))


@evil("tokenizer.ggml.tokens", "STRING", "array")
def tokens_are_one_string() -> Content:
    return valid().key("tokenizer.ggml.tokens", STRING, "abc")


@evil("tokenizer.ggml.merges", "UINT8", "STRING")
def merges_are_bytes() -> Content:
    return valid().key("tokenizer.ggml.merges", ARRAY, Array(UINT8, [1]))


@evil("tokenizer.ggml.tokens", "truncated")
def a_token_longer_than_the_file() -> Content:  # CVE-2025-49847
    tokens = LONG.pack(2**31 + 8) + b"<s>"
    value = INT.pack(STRING) + LONG.pack(3) + tokens
    return valid().key("tokenizer.ggml.tokens", ARRAY, value)


# tensors


@evil("tensor 1 of 10", "empty name")
def empty_tensor_name() -> Content:
    return valid().tensor("token_embd.weight", name="")


@evil("tensor 1 of 10", str(2**63))
def tensor_name_length_2_63() -> Content:
    return valid().tensor("token_embd.weight", name_length=2**63)


@evil("tensor 3 of 10", "UTF-8", r"\xff")
def tensor_name_is_not_utf8() -> Content:
    return valid().tensor(K, name=b"blk.0.attn_\xff.weight")


@evil("tensor 3 of 10", "UTF-8")
def tensor_name_is_a_surrogate() -> Content:
    return valid().tensor(K, name=b"blk.0.\xed\xa0\x80")


@evil(repr(Q), "twice")
def duplicate_tensor() -> Content:
    return valid().tensor(V, name=Q)


@evil(repr(Q), "5 dimensions", "4")
def five_dimensions() -> Content:  # ggml#709
    return valid().tensor(Q, ne=(32, 32, 1, 1, 1))


@evil(repr(Q), str(2**32 - 1))
def dimension_count_all_ones() -> Content:
    return valid().tensor(Q, n_dims=2**32 - 1)


@evil(repr(Q), "truncated")
def dimension_2_63() -> Content:
    return valid().tensor(Q, ne=(2**63, 2))


@evil(repr(Q))
def dimensions_wrap_to_0() -> Content:  # CVE-2026-33298
    return valid().tensor(Q, ne=(2**32, 2**32))


@evil(repr(Q))
def dimensions_wrap_to_the_true_size() -> Content:  # CVE-2025-53630: mod 2**64 this is 4096 bytes
    return valid().tensor(Q, ne=(32, 2**59 + 32))


@evil(repr(Q))
def four_dimensions_all_ones() -> Content:  # CVE-2026-27940
    return valid().tensor(Q, ne=(2**64 - 1,) * 4)


@evil(repr(Q), "33", "32", "Q4_0")
def row_is_no_multiple_of_the_block() -> Content:
    return valid().tensor(Q, ne=(33, 32), type=Q4_0)


@evil(repr(Q), "32", "256", "Q6_K")
def row_is_shorter_than_the_block() -> Content:
    return valid().tensor(Q, type=Q6_K)


@evil("'output_norm.weight'", "truncated")
def tensor_ends_beyond_the_file() -> Content:  # CVE-2026-7482
    return valid().tensor("output_norm.weight", ne=(4096,))


@evil("'output_norm.weight'", str(1 << 20), "truncated")
def tensor_begins_beyond_the_file() -> Content:
    return Sparse(valid().tensor("output_norm.weight", offset=1 << 20).pack(), 1 << 20)


@evil("'output_norm.weight'")
def offset_2_63() -> Content:
    return valid().tensor("output_norm.weight", offset=2**63)


@evil("'output_norm.weight'")
def offset_wraps_back() -> Content:
    return valid().tensor("output_norm.weight", offset=2**64 - 32)


@evil(repr(K), "offset 4488", "alignment 32")
def offset_is_unaligned() -> Content:
    return valid().tensor(K, offset=4480 + 8)


@evil("offset 16", "alignment 32")
def laid_out_for_alignment_16_without_the_key() -> Content:  # ollama#18130
    tensors = (tensor("a.weight", (4,)), tensor("b.weight", (4,)))
    return replace(bare(tensors=tensors), alignment=16).pack() + bytes(64)


@evil("overlaps", "offset 384")
def two_tensors_at_one_place() -> Content:
    return valid().tensor(K, offset=384)


@evil(repr(Q), "overlaps", "offset 4480")
def tensors_overlap_by_one_row() -> Content:
    return valid().tensor(Q, ne=(32, 33))


@evil("overlaps")
def whole_tensor_inside_another() -> Content:
    return valid().tensor("blk.1.attn_output.weight", offset=0)


@evil("overlaps")
def two_tensors_of_unknown_type_at_one_place() -> Content:
    return valid().tensor(Q, type=999, offset=4480).tensor(K, type=999)


@evil("'b.weight'")
def unknown_type_with_no_data_at_the_end() -> Content:
    ghost = Tensor("b.weight", (32,), 999, b"")
    return bare(tensors=(tensor("a.weight", (32,)), ghost))


# what a terminal would obey


EVIL_NAME = "x\n\x1b[31m[red]\r\x07\x9b\u2028\u202e\u200b\0[/]"


@evil(r"x\n\x1b[31m[red]\r\x07\x9b\u2028\u202e\u200b\x00[/]", "5 dimensions")
def tensor_name_with_terminal_escapes() -> Content:
    return valid().tensor(Q, name=EVIL_NAME, n_dims=5)


@evil(r"x\n\x1b[31m[red]\r\x07\x9b\u2028\u202e\u200b\x00[/]", "13")
def key_with_terminal_escapes() -> Content:
    return valid().key(EVIL_NAME, 13, b"")


@evil("tensor 2 of 10", "60000 bytes", "at most 63")
def tensor_name_of_60000_bytes() -> Content:
    return valid().tensor(Q, name="blk." * 15000)


@evil("tensor 2 of 10", "64 bytes", "at most 63")
def tensor_name_of_64_bytes() -> Content:
    return valid().tensor(Q, name="x" * 64)


@evil("13")
def key_of_60000_bytes() -> Content:
    return valid().key("key." * 15000, 13, b"")


# large headers

NOTHING = Pair("", UINT8, 0)


@evil()
def array_of_600_mb_then_nothing() -> Content:
    return head_of(bare(Pair("k", ARRAY, Array(UINT8, length=600 << 20)), NOTHING), 700 << 20)


@evil()
def array_of_40_million_empty_strings_then_nothing() -> Content:
    return head_of(bare(Pair("k", ARRAY, Array(STRING, length=40 << 20)), NOTHING), 400 << 20)


@evil()
def a_million_empty_arrays() -> Content:
    value = INT.pack(ARRAY) + LONG.pack(10**6) + bytes(12 * 10**6)
    return bare(Pair("k", ARRAY, value), Pair("end", 99, b""))


@evil()
def keys_without_end() -> Content:
    pairs = b"".join(LONG.pack(8) + b"%08d" % i + b"\0\0\0\0\1" for i in range(700_000))
    return replace(bare(), n_pairs=700_001).pack() + pairs


@evil()
def tensors_without_end() -> Content:
    infos = b"".join(
        LONG.pack(8) + b"%08d" % i + bytes(8) + LONG.pack(32 * i) for i in range(700_000)
    )
    return replace(bare(), n_tensors=700_000).pack() + infos
