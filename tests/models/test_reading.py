"""What `gguf_fuse.models.layer` reads from a file, what it refuses, and batches of sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from gguf_fuse.attention import attend, masks
from gguf_fuse.attention.masks import Window
from gguf_fuse.attention.projections import Linear
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.models import layer
from gguf_fuse.models.dequantize import read_values
from gguf_fuse.models.keys import NotModelled
from gguf_fuse.models.layer import AttentionLayer
from gguf_fuse.planning.unfuse import attention_rows
from tests.attention.cases import join_heads
from tests.conftest import fused_copy
from tests.edit import edited, zeros
from tests.models import random_model
from tests.models.architectures import LAYOUTS
from tests.models.cases import (
    CASES,
    NORM_BIASES,
    SEEN,
    a_case,
    write_case,
)
from tests.models.forward import output, read_output
from tests.models.random_model import ModelSpec


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_one(architecture: str = "llama", **changes: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        return write_case(a_case(architecture, **changes), path)

    return write_one


def _one(path: Path, name: str = "blk.1") -> AttentionLayer:
    return layer.read_layer(read_header(path), name, attention_rows)


def _arrays(one: AttentionLayer) -> dict[str, NDArray[Any]]:
    """Weights and biases; the fused ones as the three that they stand for."""
    linears = {}
    if not one.projections.fused:
        linears.update(zip("qkv", one.projections.linears, strict=True))
    else:
        cuts = np.cumsum(one.projections.rows)[:2]
        (fused,) = one.projections.linears
        for part, weight in zip("qkv", np.split(fused.weight, cuts), strict=True):
            linears[part] = Linear(weight, fused.scale)
        if fused.bias is not None:
            for part, bias in zip("qkv", np.split(fused.bias, cuts), strict=True):
                linears[part] = replace(linears[part], bias=bias)
    arrays = {part: linear.weight for part, linear in linears.items()}
    arrays |= {
        f"{part}.bias": linear.bias for part, linear in linears.items() if linear.bias is not None
    }
    return arrays


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_fused_weights_are_the_separate_ones(name: str, write: Callable[..., Path]) -> None:
    types = {"blk.*": GGMLQuantizationType[name]}
    path = write("qwen2", types=types, n_embd=256, n_head=8)
    one, other = _one(path), _one(fused_copy(path))
    assert not one.projections.fused and other.projections.fused
    assert one.projections.rows == other.projections.rows == one.spec.rows
    expected, found = _arrays(one), _arrays(other)
    assert expected.keys() == found.keys() and len(found) == 6
    for part, array in expected.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, found[part])
    (tensor,) = (t for t in read_header(path).tensors if t.name == "blk.1.attn_k.weight")
    data = tensor.read()
    plain = quants.dequantize(np.frombuffer(data, np.uint8), GGMLQuantizationType[name])
    np.testing.assert_array_equal(expected["k"], plain.reshape(-1, 256))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q6_K"])
def test_big_endian_gives_the_same_values(name: str, write: Callable[..., Path]) -> None:
    types = {"blk.*": GGMLQuantizationType[name]}
    shape = {"types": types, "n_embd": 256, "n_head": 8}
    little, big = (_one(write("gpt-oss", big_endian=big, **shape)) for big in (False, True))
    for part, array in _arrays(little).items():
        np.testing.assert_array_equal(array, _arrays(big)[part])
    assert little.params.sinks is not None and big.params.sinks is not None
    np.testing.assert_array_equal(little.params.sinks, big.params.sinks)


def test_big_endian_blocks_of_words_are_refused(write: Callable[..., Path]) -> None:
    types = {"blk.*": GGMLQuantizationType.IQ2_XS}
    path = write("llama", types=types, n_embd=256, big_endian=True)
    with pytest.raises(GGUFError, match="IQ2_XS is not read from big-endian files"):
        _one(path)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bitnet", "the attention of architecture 'bitnet' is not modelled"),
        ("t5", "the attention of layers 'dec.blk' is not modelled"),
        ("qwen4exp", "the attention of architecture 'qwen4exp' is not modelled"),
    ],
)
def test_what_is_not_modelled_says_so(
    architecture: str, reason: str, write: Callable[..., Path]
) -> None:
    header = read_header(write(architecture))
    name = "blk.1" if architecture != "t5" else "dec.blk.1"
    with pytest.raises(NotModelled, match=reason):
        layer.read_layer(header, name, attention_rows)
    projections = layer.read_projections(header, name, attention_rows)
    assert not projections.fused
    assert projections.rows == tuple(len(linear.weight) for linear in projections.linears)


def test_a_tensor_that_no_rule_explains_is_not_passed_over(write: Callable[..., Path]) -> None:
    with pytest.raises(NotModelled, match=r"attn_sinks\.weight: what it does"):
        _one(write("llama", sinks=True))
    with pytest.raises(NotModelled, match=r"attn_q_norm\.weight: what it does"):
        _one(write("llama", qk_norm=True))


def test_a_tensor_that_must_be_there(write: Callable[..., Path]) -> None:
    with pytest.raises(GGUFError, match=r"blk\.1 has no attn_sinks\.weight"):
        _one(write("gpt-oss", sinks=False))
    with pytest.raises(GGUFError, match=r"blk\.1\.attn_q_norm\.weight is missing"):
        _one(write("qwen3", qk_norm=False))


def test_a_weight_that_must_be_there(write: Callable[..., Path]) -> None:
    path = write("llama")
    with pytest.raises(NotModelled, match=r"\.gguf: blk\.1 has no attn_v\.weight of its own"):
        _one(edited(path, {"blk.1.attn_v.weight"}))
    with pytest.raises(NotModelled, match=r"blk\.1\.attn_q\.weight has 3 dimensions, not 2"):
        _one(edited(path, put={"blk.1.attn_q.weight": zeros(2, 64, 64)}))


@pytest.mark.parametrize("shape", [(), (1,), (63,), (64, 1), (2, 64)])
def test_a_bias_has_one_value_for_each_row(write: Callable[..., Path], shape: Any) -> None:
    path = edited(write("qwen2"), put={"blk.1.attn_q.bias": zeros(*shape)})
    with pytest.raises(NotModelled, match=r"blk\.1\.attn_q\.bias has shape .*, not \(64,\)"):
        _one(path)


def test_trailing_ones_are_no_dimensions(write: Callable[..., Path]) -> None:
    path = write("qwen2")
    plain, header = _one(path), read_header(path)
    added = {
        name: values.reshape(1, *values.shape)
        for name in ("blk.1.attn_q.weight", "blk.1.attn_q.bias")
        if (values := read_values(header, name)) is not None
    }
    linear = _one(edited(path, put=added)).projections.linears[0]
    expected = plain.projections.linears[0]
    assert linear.bias is not None and expected.bias is not None
    assert np.array_equal(linear.weight, expected.weight)
    assert np.array_equal(linear.bias, expected.bias)


def test_whole_rows_are_normed_with_a_bias(write: Callable[..., Path]) -> None:
    """Mpt alone has such norms; llama.cpp fails an assertion on them, so this is by hand."""
    path = write("mpt", layout=NORM_BIASES)
    one, header = _one(path), read_header(path)
    x = np.random.default_rng(1).standard_normal((1, 3, 64), dtype=np.float32)
    q, k, v = one.projections.project(x, one.spec.clamp)  # [1, 3, 64] each
    heads = layer.positioned(one, q, k, v, np.arange(3)[None])
    for part, row, normed in (("q", q, heads.q), ("k", k, heads.k)):
        weight, bias = (
            read_values(header, f"blk.1.attn_{part}_norm.{suffix}") for suffix in ("weight", "bias")
        )
        assert weight is not None and bias is not None and bias.any()
        variance = row.var(axis=-1, keepdims=True) + 1e-5
        expected = (row - row.mean(axis=-1, keepdims=True)) / np.sqrt(variance) * weight + bias
        np.testing.assert_allclose(join_heads(normed), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "nomic-bert"])
def test_encoders_see_what_is_to_come(architecture: str, write: Callable[..., Path]) -> None:
    """And bert's attention knows no positions: tokens in another order give the same."""
    path = write(architecture, layout=LAYOUTS["llama"])
    one, positions = _one(path), np.arange(5)[None]
    weights = read_output(read_header(path), one.spec.name)
    x = np.random.default_rng(1).standard_normal((1, 5, 64), dtype=np.float32)
    plain = _attend(one, weights, x, positions)
    turned = _attend(one, weights, x[:, ::-1], positions)[:, ::-1]
    assert np.allclose(plain, turned, atol=1e-5) == (architecture == "bert")
    x[:, -1] *= -1
    assert np.abs(_attend(one, weights, x, positions) - plain)[:, 0].max() > SEEN


def test_the_window_of_exaone4_32b(write: Callable[..., Path]) -> None:
    """Files that do not name it: 4096 (exaone4.cpp); every fourth layer has none."""
    path = write("exaone4", n_layer=64)
    assert _one(path, "blk.62").spec.window == Window(4096)
    assert _one(path, "blk.63").spec.window is None


def test_a_recurrent_layer_is_no_attention(tmp_path: Path) -> None:
    random_model.write_random_model(tmp_path / "m.gguf", ModelSpec("qwen35"))
    header = read_header(tmp_path / "m.gguf")
    with pytest.raises(NotModelled, match="attn_gate"):
        layer.read_layer(header, "blk.0", attention_rows)
    assert layer.read_layer(header, "blk.1", attention_rows).spec.rules.gated_q


@pytest.mark.parametrize(
    ("architecture", "keys", "error", "reason"),
    [
        ("llama", {"attention.head_count": None}, NotModelled, "head_count' is missing"),
        (
            "llama",
            {"embedding_length": "64"},
            GGUFError,
            "STRING, it must be an integer$",
        ),
        (
            "llama",
            {"attention.head_count_kv": 4},
            NotModelled,
            r"\(64, 32, 32\) rows, the metadata",
        ),
        ("llama", {"attention.head_count_kv": 3}, GGUFError, "4 heads cannot share 3"),
        (
            "llama",
            {"attention.head_count_kv": [2, 4]},
            NotModelled,
            "head_count_kv: unequal layers",
        ),
        ("llama", {"attention.head_count": 0}, NotModelled, "no attention heads"),
        ("llama", {"attention.key_length": -16}, GGUFError, "key_length' is -16, it must be 0 to"),
        ("llama", {"attention.head_count": [4]}, GGUFError, "head_count' has nothing for layer 1"),
        ("llama", {"attention.head_count": True}, GGUFError, "head_count' is BOOL, it must be an"),
        ("llama", {"rope.freq_base": float("nan")}, GGUFError, "freq_base' is nan, it must be fin"),
        ("granite", {"rope.scaling.finetuned": 1}, GGUFError, "finetuned' is .*, it must be BOOL"),
        (
            "qwen35",
            {"rope.dimension_sections": [2.0, 1.0, 1.0, 0.0]},
            GGUFError,
            "sections' is an array of FLOAT32, it must be an array of integers",
        ),
        ("llama", {"rope.dimension_count": 15}, GGUFError, "n_rot: expected an even number"),
        ("llama", {"embedding_length": 32}, NotModelled, r"attn_q.weight has shape \(64, 64\)"),
        ("gemma3", {"attention.sliding_window_pattern": "x"}, GGUFError, "pattern' is STRING, it"),
        (
            "gemma3",
            {"attention.sliding_window_pattern": ["x"]},
            GGUFError,
            "is an array of STRING",
        ),
        (
            "mimo2",
            {"attention.sliding_window_pattern": None},
            NotModelled,
            r"metadata key 'mimo2\.attention\.sliding_window_pattern' is missing",
        ),
        ("qwen35", {"rope.dimension_sections": None}, GGUFError, "sections: expected"),
        ("qwen35", {"rope.dimension_sections": [2.0, 1.0]}, GGUFError, "array of integers"),
        ("llama", {"rope.dimension_count": 32}, GGUFError, "RoPE turns 32 of 16 elements"),
        ("llama", {"rope.freq_base": -1.0}, GGUFError, "freq_base: expected a positive number"),
        ("gemma3", {"attention.key_length_swa": 8}, NotModelled, "key_length_swa: unequal"),
        ("llama", {"rope.scaling.type": "ntk"}, GGUFError, "rope.scaling.type' is 'ntk'"),
        ("gemma4", {"attention.shared_kv_layers": 1}, NotModelled, "from another layer"),
        ("mimo2", {"attention.value_scale": 0.5}, NotModelled, "value_scale"),
        ("llama4", {"attention.sliding_window": 0}, NotModelled, "llama4 without a window"),
        ("llama", {"nextn_predict_layers": 1}, NotModelled, "no layer of the main model"),
    ],
)
def test_metadata_that_cannot_be_right(
    architecture: str,
    keys: dict[str, Any],
    error: type[GGUFError],
    reason: str,
    write: Callable[..., Path],
) -> None:
    with pytest.raises(error, match=reason) as raised:
        _one(write(architecture, keys=keys))
    assert type(raised.value) is error


# --- several sequences at once -----------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", ["gemma3, attention", "refact", "temperature", "cohere2", "qwen35"]
)
def test_sequences_of_different_length_do_not_meet(architecture: str, tmp_path: Path) -> None:
    """A batch with padding gives each sequence what it gets alone."""
    path = write_case(CASES[architecture], tmp_path / "m.gguf")
    one = _one(path)
    weights = read_output(read_header(path), one.spec.name)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 20, one.spec.n_embd), dtype=np.float32)
    lengths = (20, 1, 13)
    together = _attend(one, weights, x, masks.padded_positions(lengths, 20))
    assert np.isfinite(together).all()  # padding too
    for seq, length in enumerate(lengths):
        alone = _attend(one, weights, x[seq : seq + 1, :length], np.arange(length)[None])
        np.testing.assert_allclose(together[seq, :length], alone[0], rtol=0, atol=2e-6)


def _attend(
    one: AttentionLayer, weights: Linear, x: NDArray[Any], positions: NDArray[np.int64]
) -> NDArray[Any]:
    q, k, v = one.projections.project(x, one.spec.clamp)
    heads = layer.positioned(one, q, k, v, positions)
    mask = layer.mask(one.spec, positions, positions)
    attended = attend.attention(heads.q, heads.k, heads.v, mask, one.params)
    return output(weights, attended, heads.gate)
