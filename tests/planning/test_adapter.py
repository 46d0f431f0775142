"""LoRA adapters: one for the fused base does in llama.cpp what the original does on its own base.

Adapters are written with gguf-py, as convert_lora_to_gguf.py does. Log-probabilities of fused and
separate agree within float rounding, and `unfuse` gives the original file, byte for byte.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse.planning.lora import fused_rank
from gguf_fuse.planning.plan import NothingToDo, Refused
from tests.compare import PROMPT, needs_llama_cpp, sha256
from tests.conftest import fused_copy, unfused_copy
from tests.edit import edited, finish, zeros
from tests.llama_judge import LoadFailed, log_probabilities
from tests.server import Run

Model = Callable[..., Path]
Make = Callable[..., Path]

N_EMBD, ROWS = 64, {"q": 64, "k": 32, "v": 32}
BASE = {"n_embd": N_EMBD, "n_head": 4, "n_head_kv": 2, "n_layer": 2}

TYPES = {"F32": T.F32, "F16": T.F16, "BF16": T.BF16}


@pytest.fixture
def lora(tmp_path: Path) -> Make:
    """Write an adapter: lora(ranks={"q": 4, "k": 4, "v": 4}, type=T.F16, alpha=8.0, ...)."""

    def make(
        name: str = "lora.gguf",
        *,
        ranks: Mapping[str, int] | None = None,
        layers: Mapping[int, Mapping[str, int]] | None = None,
        type: T = T.F32,
        types: Mapping[str, T] | None = None,
        alpha: float | None = 8.0,
        output: bool = True,
        size: float = 0.3,
        big_endian: bool = False,
        architecture: str = "llama",
    ) -> Path:
        endian = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
        writer = gguf.GGUFWriter(tmp_path / name, architecture, endianess=endian)
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        if alpha is not None:
            writer.add_float32("adapter.lora.alpha", alpha)
        rng = np.random.default_rng(1)
        same = {"q": 4, "k": 4, "v": 4} if ranks is None else ranks
        for layer, own in (layers or {0: same, 1: same}).items():
            pairs = [(part, ROWS[part], rank) for part, rank in own.items()]
            pairs += [("output", N_EMBD, 6)] if output else []
            for part, n_rows, rank in pairs:
                weight = f"blk.{layer}.attn_{part}.weight"
                for end, shape in (("a", (rank, N_EMBD)), ("b", (n_rows, rank))):
                    values = size * rng.standard_normal(shape, dtype=np.float32)
                    chosen = (types or {}).get(f"{part}.{end}", type)
                    data = gguf.quants.quantize(values, chosen)
                    if big_endian and chosen == T.BF16:  # bytes to gguf-py, which leaves them
                        data = data.view(np.uint16).byteswap().view(np.uint8)
                    if big_endian and chosen == T.Q8_0:  # the float16 before each 32 bytes
                        blocks = data.reshape(-1, 34)
                        blocks[:, :2] = blocks[:, 1::-1]
                    writer.add_tensor(f"{weight}.lora_{end}", data, raw_dtype=chosen)
        finish(writer)
        return tmp_path / name

    return make


def values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor's values, as float64."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        .reshape(tensor.shape[::-1])
        .astype(np.float64)
        for tensor in gguf.GGUFReader(path).tensors
    }


def delta(tensors: Mapping[str, Any], weight: str, alpha: float) -> np.ndarray[Any, Any]:
    """What llama.cpp adds to a weight: [rows, row length]."""
    a, b = tensors[f"{weight}.lora_a"], tensors[f"{weight}.lora_b"]
    return (alpha / b.shape[1] if alpha else 1.0) * (b @ a)


def assert_same_delta(original: Path, fused: Path, rtol: float, alpha: float = 8.0) -> None:
    before, after = values(original), values(fused)
    for layer in (0, 1):
        parts = []
        for part, n_rows in ROWS.items():
            weight = f"blk.{layer}.attn_{part}.weight"
            there = f"{weight}.lora_a" in before
            parts.append(delta(before, weight, alpha) if there else np.zeros((n_rows, N_EMBD)))
            assert f"{weight}.lora_a" not in after
        expected = np.concatenate(parts)
        found = delta(after, f"blk.{layer}.attn_qkv.weight", alpha)
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


QV = {"q": 4, "v": 4}
CASES: dict[str, dict[str, Any]] = {
    "all three": {},
    "without K": {"ranks": QV},
    "Q alone": {"ranks": {"q": 4}},
    "V alone": {"ranks": {"v": 2}},
    "different ranks": {"ranks": {"q": 8, "k": 2, "v": 4}},
    "ranks of 8 and 6": {"ranks": {"q": 8, "k": 6, "v": 5}},
    "no alpha": {"alpha": None},
    "alpha 0": {"alpha": 0.0, "ranks": {"q": 8, "k": 6, "v": 5}},
    "layers differ": {"layers": {0: {"k": 4, "v": 2, "q": 4}, 1: {"v": 3}}},
    "one layer": {"layers": {1: {"k": 4, "q": 2}}},
}


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("type_", ["F32", "F16"])
def test_log_probabilities_agree(
    model: Model, lora: Make, type_: str, case: dict[str, Any]
) -> None:
    separate, adapter = model(types={"*": TYPES[type_]}, **BASE), lora(type=TYPES[type_], **case)
    fused = fused_copy(separate)
    exact: dict[str, Any] = {"cache_type": "f32", "flash_attention": "off"}
    plain = log_probabilities(separate, PROMPT, **exact)
    with pytest.raises(LoadFailed, match="does not exist in base model"):
        log_probabilities(fused, PROMPT, lora=adapter)
    greedy = plain.argmax(axis=1)[:-1].tolist()
    exact["continuation"] = greedy
    before = log_probabilities(separate, PROMPT, lora=adapter, **exact)
    after = log_probabilities(fused, PROMPT, lora=fused_copy(adapter, base=separate), **exact)
    assert np.abs(plain - before).max() > 0.1
    # Measured: equal bit for bit where factors are powers of two, else 7e-6 at most for F32. Where
    # an F16 B becomes F32, llama.cpp no longer rounds what it multiplies to F16: up to 1.3e-2.
    odd = case.get("ranks", {}).get("k") == 6 and case.get("alpha", 8.0)
    np.testing.assert_allclose(after, before, atol=3e-2 if odd and type_ == "F16" else 5e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
def test_way_back(
    model: Model, lora: Make, case: dict[str, Any], type_: str, big_endian: bool
) -> None:
    base, adapter = model(**BASE), lora(type=TYPES[type_], big_endian=big_endian, **case)
    fused = fused_copy(adapter, base=base)
    assert sha256(unfused_copy(fused)) == sha256(adapter)
    if not big_endian and "layers" not in case:
        exact = case.get("ranks", {}).get("k") != 6
        alpha = 8.0 if case.get("alpha", 8.0) else 0.0
        assert_same_delta(adapter, fused, 1e-13 if exact else 1e-6, alpha)


def types_of(path: Path) -> dict[str, T]:
    return {t.name.split(".", 2)[2]: t.tensor_type for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("type_", TYPES.values(), ids=TYPES.keys())
def test_types_are_kept(lora: Make, type_: T) -> None:
    types = types_of(fused_copy(lora(type=type_)))
    assert types["attn_qkv.weight.lora_a"] == types["attn_qkv.weight.lora_b"] == type_


@pytest.mark.parametrize(
    ("case", "a", "b"),
    [
        ({"type": T.F16, "size": 12000.0}, T.F16, T.F32),  # times 4 overflows F16
        ({"type": T.F16, "ranks": {"q": 8, "k": 6, "v": 6}}, T.F16, T.F32),  # not a power of two
        ({"types": {"k.a": T.F16, "v.b": T.BF16}}, T.F32, T.F32),
        ({"type": T.F16, "types": {"v.a": T.BF16}}, T.F32, T.F16),
        ({"type": T.F16, "types": {"q.a": T.Q8_0, "k.a": T.Q8_0, "v.a": T.Q8_0}}, T.Q8_0, T.F16),
        ({"type": T.F16, "types": {"q.a": T.Q8_0}}, T.F32, T.F16),
        ({"type": T.Q8_0, "ranks": {"q": 32, "k": 32, "v": 64}, "output": False}, T.Q8_0, T.F32),
    ],
)
def test_types_that_become_f32_and_the_way_back(
    lora: Make, case: dict[str, Any], a: T, b: T
) -> None:
    adapter = lora(**case)
    fused = fused_copy(adapter)
    types = types_of(fused)
    assert (types["attn_qkv.weight.lora_a"], types["attn_qkv.weight.lora_b"]) == (a, b)
    assert_same_delta(adapter, fused, 1e-6)
    assert sha256(unfused_copy(fused)) == sha256(adapter)


@pytest.mark.parametrize(
    "case",
    [
        {"type": T.F16, "types": {"q.a": T.Q8_0}},
        {"type": T.Q8_0, "ranks": {"q": 32, "k": 32, "v": 64}, "output": False},
    ],
    ids=["A", "B"],
)
def test_big_endian_blocks_are_joined(lora: Make, case: dict[str, Any]) -> None:
    """Q8_0 becomes F32, with the values that a little-endian adapter gets."""
    little, big = (lora(f"{big}.gguf", big_endian=big, **case) for big in (False, True))
    fused = fused_copy(big)
    expected = gguf.GGUFReader(fused_copy(little)).tensors
    joined = [t for t in expected if "qkv" in t.name and t.tensor_type == T.F32]
    assert len(joined) == 2  # A or B of two layers
    found = {t.name: t.data for t in gguf.GGUFReader(fused).tensors}
    for tensor in joined:
        np.testing.assert_array_equal(found[tensor.name], tensor.data)
        assert np.abs(tensor.data).max() > 0.1
    assert sha256(unfused_copy(fused)) == sha256(big)


@pytest.mark.parametrize(
    ("ranks", "rank"),
    [([4], 4), ([4, 4], 8), ([4, 4, 4], 16), ([8, 2, 4], 16), ([6, 3], 12), ([8, 6], 14)],
)
def test_rank(ranks: list[int], rank: int) -> None:
    assert fused_rank(ranks) == rank


def test_what_is_not_attention_is_copied(lora: Make) -> None:
    adapter = lora()
    before, after = gguf.GGUFReader(adapter), gguf.GGUFReader(fused_copy(adapter))
    kept = {t.name: bytes(t.data) for t in after.tensors if "attn_qkv" not in t.name}
    assert kept == {t.name: bytes(t.data) for t in before.tensors if "attn_output" in t.name}
    for key, field in before.fields.items():
        if not key.startswith("GGUF."):
            assert after.fields[key].contents() == field.contents()


def test_verify_is_not_what_comes_next(lora: Make, tmp_path: Path, run: Run) -> None:
    """It compares models: the command would fail."""
    done = run("fuse", lora(), tmp_path / "out.gguf")
    assert done.code == 0
    assert "next:" not in done.out


def test_fused_layers_of_the_base_alone_are_fused(model: Model, lora: Make) -> None:
    """A layer whose types differ stays separate in the base, so in the adapter too."""
    separate = model(types={"*": T.F32, "blk.1.attn_v.weight": T.F16}, **BASE)
    adapter = lora()
    for base in (separate, fused_copy(separate)):
        fused = fused_copy(adapter, base=base)
        names = set(values(fused))
        assert "blk.0.attn_qkv.weight.lora_a" in names
        assert {f"blk.1.attn_{part}.weight.lora_b" for part in "qkv"} < names
        back = unfused_copy(fused)
        assert sha256(back) == sha256(adapter)
        fused.unlink()
        back.unlink()


@needs_llama_cpp
def test_partly_fused_base_in_llama_cpp(model: Model, lora: Make) -> None:
    separate = model(types={"*": T.F32, "blk.1.attn_v.weight": T.F16}, **BASE)
    fused, adapter = fused_copy(separate), lora(ranks=QV)
    before = log_probabilities(separate, PROMPT, lora=adapter, n_predict=0)
    after = log_probabilities(fused, PROMPT, lora=fused_copy(adapter, base=fused), n_predict=0)
    np.testing.assert_allclose(after, before, atol=5e-5)


def test_rows_of_a_missing_part_follow_from_other_layers(lora: Make) -> None:
    adapter = lora(layers={0: {"q": 4, "v": 4}, 1: {"k": 4, "q": 2, "v": 2}})
    fused = fused_copy(adapter)
    assert_same_delta(adapter, fused, 1e-13)


def test_json(lora: Make, tmp_path: Path, run: Run) -> None:
    adapter = lora(type=T.F16)
    done = run("fuse", adapter, tmp_path / "out.gguf", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["architecture"] == "llama"
    assert (answer["layers_fused"], answer["layers_skipped"]) == (2, 0)
    assert (answer["tensors_in"], answer["tensors_out"]) == (16, 8)
    first = {"layer": "blk.0", "status": "fused", "reason": None}
    assert answer["layers"][0] == first | {"types": ["F16"] * 3, "rows": [64, 32, 32]}
    inspected = json.loads(run("inspect", adapter, "--json").out)
    assert [layer["status"] for layer in inspected["layers"]] == ["fusable"] * 2
    inspected = json.loads(run("inspect", tmp_path / "out.gguf", "--json").out)
    assert [layer["status"] for layer in inspected["layers"]] == ["fused"] * 2


def test_inspect_says_why_a_loader_keeps_it_separate(lora: Make, run: Run) -> None:
    adapter = lora(architecture="bitnet")
    layers = json.loads(run("inspect", adapter, "--json").out)["layers"]
    reason = "llama.cpp's loader for bitnet needs separate Q, K and V"
    assert [(layer["status"], layer["reason"]) for layer in layers] == [("separate", reason)] * 2


def test_a_fused_pair_beside_separate_ones_stays(lora: Make) -> None:
    adapter = edited(
        lora(),
        put={
            "blk.0.attn_qkv.weight.lora_a": zeros(4, N_EMBD),
            "blk.0.attn_qkv.weight.lora_b": zeros(128, 4),
        },
    )
    with pytest.raises(Refused, match=r"edited\.gguf: blk\.0: attn_qkv is there already"):
        fused_copy(adapter, on_mismatch="error")
    fused = fused_copy(adapter)
    assert {"blk.0.attn_q.weight.lora_a", "blk.1.attn_qkv.weight.lora_a"} < set(values(fused))
    assert sha256(unfused_copy(fused)) == sha256(adapter)


def test_nothing_to_unfuse(lora: Make) -> None:
    words = r"lora\.gguf: nothing to unfuse: the adapter changes no attn_qkv"
    with pytest.raises(NothingToDo, match=words):
        unfused_copy(lora())


def test_values_that_would_overflow_are_refused(lora: Make) -> None:
    words = r"lora\.gguf: 'blk\.0\.attn_q\.weight\.lora_b': times 16/4 overflows float32"
    with pytest.raises(Refused, match=words):
        fused_copy(lora(size=5e37))


def test_pipe(lora: Make, tmp_path: Path, run: Run) -> None:
    adapter = lora()
    assert run("fuse", adapter, tmp_path / "out.gguf").code == 0
    with (tmp_path / "piped.gguf").open("wb") as pipe:
        command = [sys.executable, "-m", "gguf_fuse", "fuse", str(adapter), "-"]
        subprocess.run(command, stdout=pipe, check=True)
    assert (tmp_path / "piped.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_left_over_keys_of_a_cut_come_back(lora: Make) -> None:
    adapter = lora()
    merged = adapter.with_name("merged.gguf")
    writer = gguf.GGUFWriter(merged, "llama")
    writer.add_uint16("split.count", 0)
    reader = gguf.GGUFReader(adapter)
    for key in ("general.type", "adapter.type"):
        writer.add_string(key, reader.fields[key].contents())
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    finish(writer)
    fused = fused_copy(merged)
    assert "split.count" not in gguf.GGUFReader(fused).fields
    assert sha256(unfused_copy(fused)) == sha256(merged)
