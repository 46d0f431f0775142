"""Metadata of any type and value: what reads it gives a spec, or one line, never another error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_fuse import GGUFError
from gguf_fuse.format.header import TensorInfo
from gguf_fuse.format.parser import read_header
from gguf_fuse.models.attention_table import TABLE
from gguf_fuse.models.spec import read_spec
from gguf_fuse.planning.fuse import examine
from gguf_fuse.planning.unfuse import unfuse
from tests.pack import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    INT32,
    INT64,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Array,
    Pair,
    bare,
    tensor,
)

COUNTS = """
    block_count nextn_predict_layers embedding_length context_length expert_count
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.key_length_swa attention.value_length_swa attention.sliding_window
    attention.sliding_window_pattern attention.shared_kv_layers rope.dimension_count
    rope.dimension_count_swa rope.scaling.original_context_length
""".split()
NUMBERS = """
    attention.layer_norm_rms_epsilon attention.layer_norm_epsilon attention.scale
    attention.temperature_scale attention.max_alibi_bias attention.value_scale attention.clamp_kqv
    attn_logit_softcapping rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.factor
    rope.scaling.alpha rope.scaling.attn_factor rope.scaling.yarn_log_multiplier
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
""".split()
OTHERS = """
    attention.causal rope.scaling.finetuned rope.scaling.type rope.dimension_sections
""".split()
OF_ENCODERS = """
    projector_type vision.projector_type vision.embedding_length vision.attention.head_count
    vision.attention.head_dim
""".split()
# What a sound file says, so that reading goes on to the keys that are wrong.
SOUND: dict[str, tuple[int, Any]] = {
    "block_count": (UINT32, 4),
    "embedding_length": (UINT32, 64),
    "context_length": (UINT32, 64),
    "attention.head_count": (UINT32, 4),
    "attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
    "attention.layer_norm_epsilon": (FLOAT32, 1e-5),
    "attention.sliding_window": (UINT32, 8),
    "rope.dimension_sections": (ARRAY, Array(INT32, [2, 3, 3, 0])),
}

SCALARS = st.one_of(
    st.tuples(st.just(UINT8), st.integers(0, 255)),
    st.tuples(st.just(INT32), st.integers(-(2**31), 2**31 - 1)),
    st.tuples(st.just(INT64), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just(UINT64), st.sampled_from([0, 1, 2, 3, 16, 2**32, 2**64 - 1])),
    st.tuples(st.just(FLOAT32), st.floats(width=32)),
    st.tuples(st.just(FLOAT64), st.floats()),
    st.tuples(st.just(BOOL), st.booleans()),
    st.tuples(st.just(STRING), st.sampled_from(["", "64", "yarn", "linear", "longrope", "none"])),
)


@st.composite
def values(draw: st.DrawFn) -> tuple[int, Any]:
    kind, value = draw(SCALARS)
    length = draw(st.sampled_from([None, None, 0, 1, 4]))
    if length is None:
        return kind, value
    array = Array(kind, [value] * length)
    return ARRAY, array if draw(st.booleans()) else Array(ARRAY, [array])


@settings(max_examples=400, deadline=None)
@given(
    architecture=st.sampled_from(sorted(TABLE)),
    wrong=st.dictionaries(st.sampled_from([*COUNTS, *NUMBERS, *OTHERS]), values(), max_size=4),
)
def test_only_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    architecture: str,
    wrong: dict[str, tuple[int, Any]],
) -> None:
    pairs = [Pair("general.architecture", STRING, architecture)]
    for key, (kind, value) in (SOUND | wrong).items():
        pairs.append(Pair(f"{architecture}.{key}", kind, value))
    path = tmp_path_factory.getbasetemp() / "wrong.gguf"
    path.write_bytes(bare(*pairs).pack())
    try:
        spec = read_spec(read_header(path), "blk.1")
        counts = [spec.n_embd, spec.n_head, spec.n_head_kv, spec.head_dim, spec.head_dim_v]
        counts += spec.rope.sections if spec.rope else ()
        assert all(type(n) is int and n >= 0 for n in counts)
        assert all(map(math.isfinite, (spec.scale, spec.softcap, spec.clamp, spec.norm_eps)))
    except GGUFError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(wrong=st.dictionaries(st.sampled_from(OF_ENCODERS), values(), min_size=1, max_size=3))
def test_encoders(
    tmp_path_factory: pytest.TempPathFactory, wrong: dict[str, tuple[int, Any]]
) -> None:
    pairs = [Pair("general.architecture", STRING, "clip")]
    for key, (kind, value) in ({"projector_type": (STRING, "internvl")} | wrong).items():
        pairs.append(Pair(f"clip.{key}", kind, value))
    check(tmp_path_factory, pairs, "v.blk.0.attn_{}.weight", ["q", "k", "v", "q_norm", "k_norm"])


@settings(max_examples=150, deadline=None)
@given(wrong=st.dictionaries(st.sampled_from(COUNTS), values(), min_size=1, max_size=3))
def test_splitting_by_head_counts(
    tmp_path_factory: pytest.TempPathFactory, wrong: dict[str, tuple[int, Any]]
) -> None:
    """A file that was fused elsewhere: its rows follow from these keys."""
    pairs = [Pair("general.architecture", STRING, "llama")]
    for key, (kind, value) in (SOUND | wrong).items():
        pairs.append(Pair(f"llama.{key}", kind, value))
    check(tmp_path_factory, pairs, "blk.0.attn_{}.weight", ["qkv", "output"])


def check(factory: pytest.TempPathFactory, pairs: list[Pair], name: str, parts: list[str]) -> None:
    path: Path = factory.getbasetemp() / "wrong.gguf"
    tensors = tuple(tensor(name.format(part), (64, 192)) for part in parts)
    path.write_bytes(bare(*pairs, tensors=tensors).pack())
    try:
        header = read_header(path)
        examine(header, TensorInfo.read)
        unfuse(header)
    except GGUFError as error:
        assert str(path) in str(error)
