"""What is fused, what is left and why; the fused data; the way back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_fuse.api import fuse
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import Segment
from gguf_fuse.planning import fuse as fusion
from gguf_fuse.planning.plan import NothingToDo, Refused, Status
from tests import llama_judge, pack
from tests.compare import assert_fused, assert_judged_equal, metadata, needs_llama_cpp, sha256
from tests.conftest import dry, fused_copy, unfused_copy
from tests.edit import edited, shuffled, zeros
from tests.models.random_model import ModelSpec, write_random_model

Model = Callable[..., Path]

SPECS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"n_head": 8, "n_head_kv": 2},
    "unequal K and V": {"n_head": 8, "n_head_kv": 2, "key_length": 32, "value_length": 16},
    "biases": {"architecture": "qwen2"},
    "norms": {"architecture": "qwen3"},
    "sinks and experts": {"architecture": "gpt-oss"},
    "equal scales": {"scales": "equal", "input_scales": "equal"},
    "odd alignment": {"alignment": 64, "n_embd": 96},
    "small alignment": {"alignment": 8, "n_embd": 36, "n_head": 3, "n_head_kv": 1},
    "big endian": {"big_endian": True},
    "Q8_0": {"types": {"*": T.Q8_0}},
    "Q4_0": {"types": {"*": T.Q4_0}},
    "Q6_K": {"types": {"*": T.Q6_K}, "n_embd": 256},
    "IQ4_XS": {"types": {"*": T.IQ4_XS}, "n_embd": 256},
    "recurrent layers": {"architecture": "qwen35"},
    "layers without V": {"architecture": "gemma4"},
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_fuse_and_way_back(model: Model, spec: dict[str, Any]) -> None:
    original = model(**spec)
    fused = fused_copy(original)
    assert_fused(original, fused)
    assert sha256(unfused_copy(fused)) == sha256(original)


@needs_llama_cpp
def test_way_back_of_a_file_that_llama_cpp_wrote(model: Model, tmp_path: Path) -> None:
    written = tmp_path / "llama.cpp.gguf"
    llama_judge.rewrite_with_llama_cpp(model(architecture="qwen2", n_head_kv=2), written)
    fused = fused_copy(written)
    assert_fused(written, fused)
    assert sha256(unfused_copy(fused)) == sha256(written)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_order_of_tensors_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("order")
    n_kv = data.draw(st.sampled_from([1, 2, 4]))
    spec = ModelSpec(
        architecture=data.draw(st.sampled_from(["llama", "qwen2", "qwen3"])),
        n_head=4,
        n_head_kv=n_kv,
        n_layer=data.draw(st.integers(1, 3)),
        types={"*": data.draw(st.sampled_from([T.F32, T.F16, T.Q8_0, T.Q5_0]))},
        alignment=data.draw(st.sampled_from([8, 32, 256])),
        n_vocab=262,
    )
    write_random_model(folder / "model.gguf", spec)
    mixed = folder / "shuffled.gguf"
    seed = data.draw(st.integers(0, 2**32))
    shuffled(folder / "model.gguf", mixed, seed)
    fused = fused_copy(mixed)
    assert_fused(mixed, fused)
    assert sha256(unfused_copy(fused)) == sha256(mixed)


# -- layers that are left ------------------------------------------------------------------------

MIXED = {"*": T.Q4_K, "blk.1.attn_v.weight": T.Q6_K}


def test_mixed_types_are_skipped_with_the_reason(model: Model) -> None:
    original = model(n_layer=3, n_embd=256, types=MIXED)
    result = dry(original)
    assert [layer.name for layer in result.plan.changed] == ["blk.0", "blk.2"]
    (skipped,) = result.plan.skipped
    assert (skipped.name, skipped.reason) == ("blk.1", "types differ: Q4_K, Q4_K, Q6_K")
    fused = fused_copy(original)
    assert_fused(original, fused)
    assert sha256(unfused_copy(fused)) == sha256(original)


def test_types_of_one_size_are_not_one_type(model: Model) -> None:
    """Q4_0 and Q4_K both take 144 bytes per 256 elements."""
    types = {"*": T.Q4_K, "blk.0.attn_k.weight": T.Q4_0}
    result = dry(model(n_embd=256, types=types))
    assert [layer.name for layer in result.plan.changed] == ["blk.1"]
    assert result.plan.skipped[0].reason == "types differ: Q4_K, Q4_0, Q4_K"


def test_on_mismatch_error_writes_nothing(model: Model, tmp_path: Path) -> None:
    original = model(n_embd=256, types=MIXED)
    output = tmp_path / "out.gguf"
    with pytest.raises(Refused, match=r"blk\.1: types differ: Q4_K, Q4_K, Q6_K"):
        fuse(original, str(output), on_mismatch="error")
    assert not output.exists()


def test_nothing_to_fuse(model: Model, tmp_path: Path) -> None:
    original = model(n_layer=2, n_embd=256, types={"*": T.Q4_K, "*.attn_v.weight": T.Q6_K})
    with pytest.raises(NothingToDo, match="2 layers: types differ: Q4_K, Q4_K, Q6_K") as caught:
        fuse(original, str(tmp_path / "out.gguf"))
    assert [layer.status for layer in caught.value.layers] == [Status.MISMATCH] * 2
    assert list(tmp_path.iterdir()) == [original]


def test_on_mismatch_error_comes_before_nothing_to_fuse(model: Model) -> None:
    original = model(n_embd=256, types={"*": T.Q4_K, "*.attn_v.weight": T.Q6_K})
    with pytest.raises(Refused, match="2 layers: types differ"):
        dry(original, on_mismatch="error")


def with_ones(path: Path, n: int) -> Path:
    """The same file with n trailing ones in the dimensions of Q, K and V."""
    header = read_header(path)
    parts = [t for t in header.tensors if ".attn_qkv" not in t.name and ".attn_" in t.name]
    arrays = {t.name: np.frombuffer(t.read(), np.float32) for t in parts}
    shapes = {t.name: (1,) * n + t.ne[::-1] for t in parts}
    return edited(path, put={name: arrays[name].reshape(shapes[name]) for name in arrays})


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_trailing_ones_are_nothing(model: Model, n: int, architecture: str) -> None:
    """As in ggml; the fused weight (and bias) has them too, so that they come back."""
    original = with_ones(model(architecture=architecture, n_layer=2), n)
    header = read_header(original)
    assert header.by_name["blk.0.attn_k.weight"].ne[2:] == (1,) * n
    assert reasons(original) == [None, None]
    fused = fused_copy(original)
    by_name = read_header(fused).by_name
    assert by_name["blk.0.attn_qkv.weight"].ne[2:] == (1,) * n
    if architecture == "qwen2":
        assert by_name["blk.0.attn_qkv.bias"].ne[1:] == (1,) * n
    assert sha256(unfused_copy(fused)) == sha256(original)
    if llama_judge.available():
        assert_judged_equal(original, fused)


def reasons(path: Path) -> list[str | None]:
    header = read_header(path)
    layers = fusion.examine(header, Segment.read)
    return [layer.reason for layer in layers]


LEFT: dict[str, tuple[set[str], dict[str, Any], str]] = {
    "one bias": (
        {"blk.0.attn_k.bias", "blk.0.attn_v.bias"},
        {},
        "no attn_k.bias, attn_v.bias beside the other bias",
    ),
    "two biases": ({"blk.0.attn_q.bias"}, {}, "no attn_q.bias beside the other bias"),
    "bias types": (
        set(),
        {"blk.0.attn_k.bias": zeros(64, dtype=np.float16)},
        "bias types differ: F32, F16, F32",
    ),
    "bias length": (
        set(),
        {"blk.0.attn_k.bias": zeros(63)},
        "biases of 64, 63, 64 elements for 64, 64, 64 rows",
    ),
    "a trailing one": (
        set(),
        {"blk.0.attn_k.bias": zeros(1, 64)},
        "bias dimensions differ: [64], [64, 1], [64]",
    ),
    "biases that are no vectors": (
        set(),
        {f"blk.0.attn_{part}.bias": zeros(2, 64) for part in "qkv"},
        "blk.0.attn_q.bias has 2 dimensions, not 1",
    ),
    "a bias without dimensions": (
        set(),
        {"blk.0.attn_k.bias": zeros()},
        "blk.0.attn_k.bias has 0 dimensions, not 1",
    ),
    "no elements": (
        set(),
        {"blk.0.attn_v.weight": zeros(0, 64), "blk.0.attn_v.bias": zeros(0)},
        "blk.0.attn_v.weight has no elements",
    ),
    "no V": ({"blk.0.attn_v.weight"}, {}, "no attn_v.weight"),
    "row lengths": (
        set(),
        {"blk.0.attn_k.weight": zeros(64, 32)},
        "row lengths differ: 64, 32, 64",
    ),
    "dimensions": (
        set(),
        {"blk.0.attn_v.weight": zeros(2, 64, 64)},
        "blk.0.attn_v.weight has 3 dimensions, not 2",
    ),
    "fused beside separate": (
        set(),
        {"blk.0.attn_qkv.weight": zeros(192, 64)},
        "attn_qkv.weight is there already",
    ),
    "a clamp of Q": (
        set(),
        {"blk.0.attn_q.input_max": zeros(1)},
        "attn_q.input_max would have no place beside attn_qkv",
    ),
    "one scale": (
        set(),
        {"blk.0.attn_v.scale": zeros(1)},
        "no attn_q.scale, attn_k.scale beside the other scale",
    ),
    "scales of other dimensions": (
        set(),
        {
            "blk.0.attn_q.scale": zeros(1),
            "blk.0.attn_k.scale": zeros(1, 1),
            "blk.0.attn_v.scale": zeros(1),
        },
        "scales have different dimensions",
    ),
    "scales of two elements": (
        set(),
        {f"blk.0.attn_{part}.scale": zeros(2) for part in "qkv"},
        "blk.0.attn_q.scale is not one float32",
    ),
}


@pytest.mark.parametrize(("drop", "put", "reason"), LEFT.values(), ids=LEFT.keys())
def test_layer_is_left_with_the_reason(
    model: Model, drop: set[str], put: dict[str, Any], reason: str
) -> None:
    original = edited(model(architecture="qwen2", n_head_kv=4), drop, put)
    assert reasons(original) == [reason, None]
    fused = fused_copy(original)
    assert_fused(original, fused)
    assert sha256(unfused_copy(fused)) == sha256(original)


def test_biases_in_blocks_are_left(tmp_path: Path) -> None:
    file, path = pack.valid(n_embd=64), tmp_path / "in.gguf"
    for part, rows in (("q", 64), ("k", 32), ("v", 32)):
        file.tensors.append(pack.tensor(f"blk.0.attn_{part}.bias", (rows,), pack.Q4_0))
    path.write_bytes(file.pack())
    assert reasons(path) == ["biases of Q4_0 come in blocks", None]


@pytest.mark.parametrize("scales", ["scales", "input_scales"])
def test_unequal_scales_are_left(model: Model, scales: str) -> None:
    name = scales.removesuffix("s")
    assert reasons(model(**{scales: "unequal"})) == [f"{name}s differ: a fused tensor has one"] * 2


@pytest.mark.parametrize("name", ["mimo2", "gemma3n", "hrm_text", "kimi-linear"])
def test_traps_of_the_loaders(model: Model, name: str) -> None:
    """Their fused paths apply no scale, or lose one: with scales they stay as they are."""
    keys = {"general.architecture": name}
    assert (
        reasons(model(scales="equal", metadata=keys))
        == [f"llama.cpp's loader for {name} applies no fused scale"] * 2
    )
    assert reasons(model(metadata=keys)) == [None, None]


def test_gemma4_adds_no_fused_bias(model: Model) -> None:
    path = model(bias=True, metadata={"general.architecture": "gemma4"})
    assert reasons(path) == ["llama.cpp's loader for gemma4 adds no fused bias"] * 2


# -- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bitnet", "needs separate"),
        ("qwen4exp", "crashes"),
        ("t5", "needs separate"),
        ("llama-of-tomorrow", "not known"),
    ],
)
def test_architecture_is_refused(model: Model, tmp_path: Path, name: str, words: str) -> None:
    known = name in ("bitnet", "qwen4exp", "t5")
    path = model(architecture=name) if known else model(metadata={"general.architecture": name})
    with pytest.raises(Refused, match=f"{name}.*{words}.*--any-architecture"):
        fuse(path, str(tmp_path / "out.gguf"))
    assert not (tmp_path / "out.gguf").exists()
    fused = fused_copy(path, any_architecture=True)
    assert_fused(path, fused)
    assert sha256(unfused_copy(fused)) == sha256(path)


@pytest.mark.parametrize("name", ["gptneox", "falcon"])
def test_already_fused(model: Model, name: str) -> None:
    path = model(architecture=name)
    with pytest.raises(NothingToDo, match="already fused"):
        dry(path)
    with pytest.raises(Refused, match="always has fused Q, K and V"):
        unfused_copy(path)


def test_fused_twice(model: Model) -> None:
    with pytest.raises(NothingToDo, match="gguf-fuse has fused this file already"):
        dry(fused_copy(model()))


# -- the way back without a record ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["grouped", "unequal K and V", "biases", "norms", "equal scales"])
def test_file_of_the_converter_is_split_by_its_head_counts(model: Model, name: str) -> None:
    separate = gguf.GGUFReader(model("separate.gguf", **SPECS[name]))
    fused = model("fused.gguf", **SPECS[name], fused=True)
    split = gguf.GGUFReader(unfused_copy(fused))
    assert metadata(separate) == metadata(split)
    expected = {tensor.name: tensor for tensor in separate.tensors}
    for tensor in split.tensors:
        np.testing.assert_array_equal(tensor.data, expected.pop(tensor.name).data)
    assert not expected


def test_rows_that_head_counts_do_not_explain_are_refused(model: Model) -> None:
    fused = model(fused=True, metadata={"llama.attention.head_count_kv": 3})
    with pytest.raises(Refused, match=r"128 rows, which the head counts .* do not explain"):
        unfused_copy(fused)


def test_nothing_to_unfuse(model: Model) -> None:
    with pytest.raises(NothingToDo, match="no attention layer has attn_qkv"):
        unfused_copy(model())


def test_recurrent_attn_qkv_is_no_attention(model: Model) -> None:
    """qwen35's recurrent layers own an attn_qkv of another layout: it stays in one piece."""
    fused = fused_copy(model(architecture="qwen35"))
    names = {tensor.name for tensor in gguf.GGUFReader(unfused_copy(fused)).tensors}
    assert any(".attn_qkv." in name for name in names)
    assert any(".attn_q." in name for name in names)
