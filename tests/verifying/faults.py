"""A fused file taken apart, a fault put in, and written again; and how verify is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as T

from gguf_fuse.format.header import align, encode_start, encode_tensor
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.values import ValueType, encode_pair
from gguf_fuse.verifying.report import Report, VerifyOptions
from gguf_fuse.verifying.structure import compare_structure
from gguf_fuse.verifying.verify import verify

QUICK = VerifyOptions(n_prompt=9, n_decode=2, n_seqs=2, n_kv=70, threads=2)
CHECKS = {"projection", "prefill", "decode_expand", "decode_broadcast", "decode_split"}


@dataclass
class Contents:
    """A file taken apart, to be changed and written again."""

    path: Path
    pairs: dict[str, bytes]
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]]  # ne, type, data

    @classmethod
    def of(cls, path: Path) -> Contents:
        header = read_header(path)
        return cls(
            path,
            {key: header.metadata.pair_bytes(key) for key in header.metadata},
            {tensor.name: (tensor.ne, tensor.type, tensor.read()) for tensor in header.tensors},
        )

    def write(self) -> Path:
        header = read_header(self.path)
        order, infos, body = header.byte_order, bytearray(), bytearray()
        for name, (ne, tensor_type, data) in self.tensors.items():
            infos += encode_tensor(name, ne, tensor_type, len(body), order)
            body += data.ljust(align(len(data), header.alignment), b"\0")
        head = encode_start(header.version, order, len(self.tensors), len(self.pairs))
        head += b"".join(self.pairs.values()) + infos
        self.path.write_bytes(head.ljust(align(len(head), header.alignment), b"\0") + body)
        return self.path

    def rows(self, name: str) -> list[bytes]:
        ne, _, data = self.tensors[name]
        n_bytes = len(data) // ne[-1]
        return [data[at : at + n_bytes] for at in range(0, len(data), n_bytes)]

    def set_rows(self, name: str, rows: list[bytes]) -> None:
        ne, tensor_type, _ = self.tensors[name]
        self.tensors[name] = ((*ne[:-1], len(rows)), tensor_type, b"".join(rows))

    def pair(self, key: str, value_type: ValueType, value: Any) -> None:
        self.pairs[key] = encode_pair(key, value_type, value, "little")


Fault = Callable[[Contents], None]


def check(original: Path, fused: Path, **changes: Any) -> Report:
    return verify(original, fused, VerifyOptions(**{**QUICK.__dict__, **changes}))


def problems(original: Path, fused: Path) -> list[str]:
    return list(compare_structure(read_header(original), read_header(fused), QUICK).problems)


def swap_k_and_v(c: Contents) -> None:
    rows = c.rows("blk.1.attn_qkv.weight")
    c.set_rows("blk.1.attn_qkv.weight", rows[:64] + rows[96:] + rows[64:96])


def swap_two_heads(c: Contents) -> None:
    rows = c.rows("blk.1.attn_qkv.weight")
    c.set_rows("blk.1.attn_qkv.weight", rows[16:32] + rows[:16] + rows[32:])


def drop_the_bias(c: Contents) -> None:
    del c.tensors["blk.1.attn_qkv.bias"]


def change_the_bias(c: Contents) -> None:
    rows = c.rows("blk.1.attn_qkv.bias")
    c.set_rows("blk.1.attn_qkv.bias", [*rows[:70], np.float32(0.5).tobytes(), *rows[71:]])


def take_the_q_of_another_layer(c: Contents) -> None:
    rows = c.rows("blk.1.attn_qkv.weight")
    c.set_rows("blk.1.attn_qkv.weight", c.rows("blk.0.attn_qkv.weight")[:64] + rows[64:])


def lose_a_row(c: Contents) -> None:
    c.set_rows("blk.1.attn_qkv.weight", c.rows("blk.1.attn_qkv.weight")[:-1])


def change_the_scale(c: Contents) -> None:
    ne, tensor_type, data = c.tensors["blk.1.attn_qkv.scale"]
    scale = np.frombuffer(data, np.float32) * np.float32(1.001)
    c.tensors["blk.1.attn_qkv.scale"] = (ne, tensor_type, scale.tobytes())


def change_the_sinks(c: Contents) -> None:
    ne, tensor_type, data = c.tensors["blk.1.attn_sinks.weight"]
    c.tensors["blk.1.attn_sinks.weight"] = (ne, tensor_type, data[4:] + data[:4])


def change_a_k_norm(c: Contents) -> None:
    ne, tensor_type, data = c.tensors["blk.1.attn_k_norm.weight"]
    c.tensors["blk.1.attn_k_norm.weight"] = (ne, tensor_type, data[4:] + data[:4])


def leave_a_tensor_out(c: Contents) -> None:
    del c.tensors["blk.1.ffn_up.weight"]


def add_a_tensor(c: Contents) -> None:
    c.tensors["blk.1.attn_k.weight"] = ((64, 2), T.F32, bytes(512))


def reorder_tensors(c: Contents) -> None:
    c.tensors["output_norm.weight"] = c.tensors.pop("output_norm.weight")


def change_a_value(c: Contents) -> None:
    key = f"{read_header(c.path).architecture}.rope.freq_base"
    c.pair(key, ValueType.FLOAT32, 500000)


def change_a_long_value(c: Contents) -> None:
    c.pair("general.name", ValueType.STRING, "x" * 61)


def change_a_value_type(c: Contents) -> None:
    key = f"{read_header(c.path).architecture}.block_count"
    c.pair(key, ValueType.UINT64, 2)


def change_a_token(c: Contents) -> None:
    c.pairs["tokenizer.ggml.tokens"] = c.pairs["tokenizer.ggml.tokens"][:-1] + b"~"


def lose_a_token(c: Contents) -> None:
    tokens = read_header(c.path).metadata["tokenizer.ggml.tokens"]
    c.pair("tokenizer.ggml.tokens", ValueType.STRING, tokens[:-1])


def remove_a_key(c: Contents) -> None:
    del c.pairs["general.name"]


def add_a_key(c: Contents) -> None:
    c.pair("general.author", ValueType.STRING, "nobody")


def pad_with_something(c: Contents) -> None:
    c.pair("gguf_fuse.padding", ValueType.UINT8, [0, 0, 1])


def pad_with_text(c: Contents) -> None:
    c.pair("gguf_fuse.padding", ValueType.STRING, "")


def cut_into_less_than_nothing(c: Contents) -> None:
    c.pair("gguf_fuse.shards", ValueType.INT32, [-1, 34])  # of 33 tensors


def add_an_unknown_key_of_our_own(c: Contents) -> None:
    c.pair("gguf_fuse.future", ValueType.UINT32, 1)


def reorder_keys(c: Contents) -> None:
    c.pairs = {"general.name": c.pairs["general.name"], **c.pairs}


def record_other_rows(c: Contents) -> None:
    rows = read_header(c.path).metadata["gguf_fuse.rows"]
    c.pair("gguf_fuse.rows", ValueType.UINT64, [rows[0] - 16, rows[1] + 16, *rows[2:]])


def record_other_positions(c: Contents) -> None:
    at = read_header(c.path).metadata["gguf_fuse.positions"]
    c.pair("gguf_fuse.positions", ValueType.UINT64, [at[1], at[0], *at[2:]])


def record_too_little(c: Contents) -> None:
    metadata = read_header(c.path).metadata
    names = metadata["gguf_fuse.tensors"][:-1]
    c.pair("gguf_fuse.tensors", ValueType.STRING, names)
    for key in ("gguf_fuse.rows", "gguf_fuse.positions"):
        c.pair(key, ValueType.UINT64, metadata[key][:-3])


def record_another_version(c: Contents) -> None:
    c.pair("gguf_fuse.version", ValueType.UINT32, 99)


def record_without_rows(c: Contents) -> None:
    del c.pairs["gguf_fuse.rows"]


def record_rows_as_text(c: Contents) -> None:
    c.pair("gguf_fuse.rows", ValueType.STRING, "64, 32, 32")


def record_fewer_rows(c: Contents) -> None:
    rows = read_header(c.path).metadata["gguf_fuse.rows"]
    c.pair("gguf_fuse.rows", ValueType.UINT64, rows[:-3])


def record_the_first_layer_alone(c: Contents) -> None:
    metadata = read_header(c.path).metadata
    names = [name for name in metadata["gguf_fuse.tensors"] if name.startswith("blk.0.")]
    c.pair("gguf_fuse.tensors", ValueType.STRING, names)
    for key in ("gguf_fuse.rows", "gguf_fuse.positions"):
        c.pair(key, ValueType.UINT64, metadata[key][: 3 * len(names)])
