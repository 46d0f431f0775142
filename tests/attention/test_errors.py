"""Wrong arguments: the error names the argument, what it should be and what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gguf_fuse.attention.attend import attention
from gguf_fuse.attention.masks import additive_mask, padded_positions
from gguf_fuse.attention.norms import rms_norm
from gguf_fuse.attention.projections import Linear, split_gate, split_heads, split_rows
from gguf_fuse.attention.rope import Rope, apply_rope
from gguf_fuse.attention.shapes import group_heads
from gguf_fuse.attention.softmax import AttentionParams
from gguf_fuse.attention.split import split_attention
from tests.attention.cases import make_case


def bad_attention(**changes: Any) -> Callable[[], object]:
    good = make_case(31, n_kv=600)
    return lambda: attention(*replace(good, **changes).args)


F32 = np.float32
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "q axes": (bad_attention(q=np.zeros((2, 6, 16), F32)), r"q: expected \(n_seqs, heads"),
    "k heads": (bad_attention(k=np.zeros((2, 4, 600, 16), F32)), "k: expected n_head_kv to divide"),
    "k dim": (
        bad_attention(k=np.zeros((2, 2, 600, 8), F32)),
        r"k: expected shape \(2, 2, 600, 16\)",
    ),
    "v cells": (bad_attention(v=np.zeros((2, 2, 599, 16), F32)), r"v: expected shape \(2, 2, 600"),
    "v type": (bad_attention(v=np.zeros((2, 2, 600, 16))), "v: expected float32 like q"),
    "f16": (bad_attention(q=np.zeros((2, 6, 1, 16), np.float16)), "q: expected float32 or float64"),
    "mask": (bad_attention(mask=np.zeros((2, 600), F32)), r"mask: expected shape \(2, 1, 600\)"),
    "sinks": (
        bad_attention(params=AttentionParams(1.0, sinks=np.zeros(2, F32))),
        r"sinks: expected shape \(6,\)",
    ),
    "two tokens": (
        lambda: split_attention(*make_case(0, n_tokens=2).args),
        "expects n_tokens 1, got 2",
    ),
    "threads": (lambda: split_attention(*make_case(0).args, n_threads=0), "at least 1, got 0"),
    "threads of a runtime": (
        lambda: attention(*make_case(0, n_kv=512).args, n_threads=0),
        "at least 1, got 0",
    ),
    "chunk gap": (
        lambda: split_attention(*make_case(0).args, chunks=[(0, 9), (10, 257)]),
        "range from 9 on",
    ),
    "chunk end": (
        lambda: split_attention(*make_case(0).args, chunks=[(0, 9)]),
        "expected to end at n_kv 257, got 9",
    ),
    "weight": (
        lambda: Linear(np.zeros((3, 5), F32)).project(np.zeros((1, 1, 4), F32)),
        r"weight: expected shape \(rows, 4\), got \(3, 5\)",
    ),
    "bias": (
        lambda: Linear(np.zeros((3, 4), F32), bias=np.zeros(4, F32)).project(
            np.zeros((1, 1, 4), F32)
        ),
        r"bias: expected shape \(3,\)",
    ),
    "rows": (
        lambda: split_rows(np.zeros((1, 9), F32), (4, 4, 4)),
        "expected a sum of 9, got 12",
    ),
    "heads": (lambda: split_heads(np.zeros((1, 1, 9), F32), 2), r"2 \* head_dim"),
    "group": (lambda: group_heads(np.zeros((1, 3, 1, 2), F32), 2), "multiple of 2, got 3"),
    "gate": (lambda: split_gate(np.zeros((1, 3), F32)), "even last axis"),
    "norm": (
        lambda: rms_norm(np.zeros((1, 2, 3, 4), F32), np.zeros(3, F32), 1e-6),
        r"weight: expected shape \(4,\) or \(2, 4\), got \(3,\)",
    ),
    "odd n_rot": (lambda: Rope("norm", 5), "n_rot: expected an even number"),
    "factors": (
        lambda: Rope("norm", 4, freq_factors=np.ones(4, F32)),
        r"freq_factors: expected shape \(2,\)",
    ),
    "yarn": (lambda: Rope("norm", 4, ext_factor=1.0), "n_ctx_orig: expected > 0"),
    "sections": (lambda: Rope("mrope", 4), "sections: expected a positive sum"),
    "rope dim": (
        lambda: apply_rope(np.zeros((1, 1, 1, 4), F32), np.zeros((1, 1), int), Rope("norm", 8)),
        "x: expected .* >= 8",
    ),
    "positions": (
        lambda: apply_rope(np.zeros((1, 1, 2, 8), F32), np.zeros((1, 1), int), Rope("norm", 8)),
        r"positions: expected shape \(1, 2\)",
    ),
    "lengths": (lambda: padded_positions([3, 9], 8), "at most 8, got 9"),
    "grid": (
        lambda: additive_mask(np.zeros(3, int), np.zeros((1, 3), int)),
        "positions: expected",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_name_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
