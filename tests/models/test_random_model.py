"""The generator of random models: what it writes is what was asked for, and llama.cpp takes it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.compare import needs_llama_cpp, sha256
from tests.edit import finish
from tests.llama_judge import LoadFailed, log_probabilities, rewrite_with_llama_cpp
from tests.models.architectures import LAYOUTS
from tests.models.random_model import (
    ModelSpec,
    data_bytes,
    spec_of_size,
    write_random_model,
)

# The generator changes seldom, and whatever breaks it breaks other tests too.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MAKE_MODEL = ROOT / "scripts" / "make_model.py"
# Bytes, words, and more of them than any default window.
PROMPT = [1, 5, 9, 77, 200, 300, 44, 12, 13, 260, 280, 31]
# Loaders that want Q, K and V in one, apart, and an encoder first.
ONLY_FUSED = {"gptneox", "falcon"}
ONLY_SEPARATE = {"bitnet", "qwen4exp", "t5"}
GATED = {"qwen35", "qwen35moe", "qwen3next", "qwen4exp"}
NO_QKV = {"deepseek2", "mistral4"}


def write(path: Path, architecture: str = "llama", **options: Any) -> Path:
    write_random_model(path, ModelSpec(architecture, **options))
    return path


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


# --- shapes, types, data -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(set(LAYOUTS) - NO_QKV))
def test_projections_have_the_shapes_that_the_metadata_says(
    architecture: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.gguf", architecture, fused=False)
    reader = gguf.GGUFReader(path)
    field = {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in reader.fields.items()
    }
    assert field["general.architecture"] == architecture
    counts = field["attention.head_count_kv"]
    seen = 0
    for tensor in reader.tensors:
        assert tensor.tensor_type == Type.F32
        layer, _, name = tensor.name.partition(".attn_")
        if name not in ("q.weight", "k.weight", "v.weight"):
            continue
        n_head_kv = counts[int(layer.split(".")[-1])] if isinstance(counts, list) else counts
        rows = {
            "q.weight": field["attention.head_count"]
            * field["attention.key_length"]
            * (2 if architecture in GATED else 1),
            "k.weight": n_head_kv * field["attention.key_length"],
            "v.weight": n_head_kv * field["attention.value_length"],
        }[name]
        assert tensor.shape.tolist() == [field["embedding_length"], rows], tensor.name
        seen += 1
    assert seen >= 3


def test_grouped_query_with_a_head_length_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "qwen3", n_head=6, n_head_kv=3, n_embd=96, key_length=32)
    shape = {name: tensor.shape.tolist() for name, tensor in tensors(path).items()}
    assert shape["blk.0.attn_q.weight"] == [96, 192]
    assert shape["blk.0.attn_k.weight"] == shape["blk.0.attn_v.weight"] == [96, 96]
    assert shape["blk.0.attn_output.weight"] == [192, 96]
    assert shape["blk.0.attn_q_norm.weight"] == [32]


def test_head_counts_may_differ_by_layer(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "deci", n_head_kv=(1, 4), n_layer=2)
    reader = gguf.GGUFReader(path)
    assert reader.fields["deci.attention.head_count_kv"].contents() == [1, 4]
    shape = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shape["blk.0.attn_k.weight"] == [64, 16]
    assert shape["blk.1.attn_k.weight"] == [64, 64]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_every_matrix_has_the_type_and_every_vector_is_f32(name: str, tmp_path: Path) -> None:
    n_embd = 256 if name.endswith("_K") else 64
    path = write(
        tmp_path / "model.gguf", "gpt-oss", n_embd=n_embd, scales="equal", types={"*": Type[name]}
    )
    for tensor in tensors(path).values():
        matrix = tensor.name.endswith(".weight") and len(tensor.shape) > 1
        router = tensor.name.endswith("ffn_gate_inp.weight")
        assert tensor.tensor_type == (Type[name] if matrix and not router else Type.F32)


def test_the_last_pattern_that_matches_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path / "model.gguf",
        n_embd=256,
        types={"*": Type.F16, "blk.*": Type.Q4_K, "blk.1.attn_v.weight": Type.Q6_K},
    )
    types = {name: tensor.tensor_type for name, tensor in tensors(path).items()}
    assert types["token_embd.weight"] == types["output.weight"] == Type.F16
    assert types["blk.1.attn_q.weight"] == types["blk.0.attn_v.weight"] == Type.Q4_K
    assert types["blk.1.attn_v.weight"] == Type.Q6_K
    assert types["blk.1.attn_norm.weight"] == Type.F32


# Those of gguf-py whose blocks have scales; older versions know fewer.
BLOCK_TYPES = re.findall(
    r"\w+",
    """Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS
    IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4""",
)


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if hasattr(Type, name)])
def test_blocks_of_any_type_have_the_spread_of_weights(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", n_embd=256, n_layer=1, types={"*": Type[name]})
    for tensor in tensors(path).values():
        if tensor.tensor_type != Type.F32:
            spread = float(np.std(values(tensor))) * np.sqrt(int(tensor.shape[0]))
            assert 0.8 < spread < 1.25, tensor.name


def test_a_type_whose_blocks_do_not_divide_the_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"token_embd\.weight: rows of 64 .* Q4_K blocks of 256"):
        write(tmp_path / "model.gguf", types={"*": Type.Q4_K})


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0", "Q4_K"])
def test_a_fused_model_has_the_bytes_of_the_separate_one(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_embd": 256, "bias": True, "types": {"*": Type[name]}}
    separate = tensors(write(tmp_path / "separate.gguf", **options))
    fused = tensors(write(tmp_path / "fused.gguf", **options, fused=True))
    for layer in ("blk.0", "blk.1"):
        for suffix in ("weight", "bias"):
            parts = [
                separate.pop(f"{layer}.attn_{part}.{suffix}").data.tobytes()
                for part in ("q", "k", "v")
            ]
            assert fused.pop(f"{layer}.attn_qkv.{suffix}").data.tobytes() == b"".join(parts)
    assert list(separate) == list(fused)
    for tensor_name, tensor in separate.items():
        assert np.array_equal(tensor.data, fused[tensor_name].data)


@pytest.mark.parametrize(("rule", "n_different"), [("equal", 1), ("unequal", 3)])
def test_scales_are_equal_or_not(rule: str, n_different: int, tmp_path: Path) -> None:
    found = tensors(write(tmp_path / "model.gguf", scales=rule, input_scales=rule))
    for suffix in ("scale", "input_scale"):
        names = [f"blk.0.attn_{part}.{suffix}" for part in ("q", "k", "v")]
        assert len({found[name].data.tobytes() for name in names}) == n_different


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_tensors_are_aligned(alignment: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", n_embd=48, alignment=alignment)
    reader = gguf.GGUFReader(path)
    assert reader.alignment == alignment
    assert all(tensor.data_offset % alignment == 0 for tensor in reader.tensors)
    assert path.stat().st_size % alignment == 0


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K"])
def test_big_endian_holds_the_same_numbers(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_embd": 256, "n_layer": 1, "types": {"*": Type[name]}}
    little = tensors(write(tmp_path / "little.gguf", **options))
    reader = gguf.GGUFReader(write(tmp_path / "big.gguf", **options, big_endian=True))
    assert reader.endianess == gguf.GGUFEndian.BIG
    field = reader.fields["llama.embedding_length"]
    assert field.contents() == 256
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        twin = np.array(little[tensor.name].data)
        if tensor.tensor_type in (Type.F32, Type.F16):
            assert np.array_equal(data, twin)
        elif tensor.tensor_type == Type.BF16:
            assert np.array_equal(data.view(">u2"), twin.view("<u2"))
        else:
            # Scales alone are turned round: most bytes of a block are quants.
            assert 0 < np.mean(data != twin) < 0.07


# --- determinism, memory, sizes ----------------------------------------------------------------


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    one, same, other = (
        sha256(write(tmp_path / f"{n}.gguf", "qwen2", seed=seed, types={"*": Type.Q8_0}))
        for n, seed in enumerate([7, 7, 8])
    )
    assert one == same != other


def test_one_type_changed_leaves_the_other_tensors_alone(tmp_path: Path) -> None:
    plain = tensors(write(tmp_path / "plain.gguf"))
    mixed = tensors(write(tmp_path / "mixed.gguf", types={"*attn_v*": Type.Q8_0}))
    for name, tensor in plain.items():
        if "attn_v" not in name:
            assert np.array_equal(tensor.data, mixed[name].data)


def test_no_two_rows_near_each_other_are_alike(tmp_path: Path) -> None:
    """Long tensors repeat a tile: a swap of rows must show all the same."""
    path = write(tmp_path / "model.gguf", n_layer=1, n_embd=1024, n_head=16, n_head_kv=4)
    rows = tensors(path)["blk.0.attn_q.weight"].data
    assert len(np.unique(rows[:1021], axis=0)) == 1021


def test_memory_stays_small_for_a_large_model(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads the peak from /proc")  # ru_maxrss would count the parent's too
    program = (
        "import sys, gguf\n"
        "from tests.models.random_model import ModelSpec, spec_of_size, write_random_model\n"
        "types = {'*': gguf.GGMLQuantizationType.F16}\n"
        "write_random_model(sys.argv[1], spec_of_size(ModelSpec(types=types), 300_000_000))\n"
        "print(*(line for line in open('/proc/self/status') if 'VmHWM' in line))\n"
    )
    path = tmp_path / "large.gguf"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert path.stat().st_size > 250_000_000
    assert int(done.stdout.split()[1]) * 1024 < 150_000_000


@pytest.mark.parametrize("n_bytes", [30_000_000, 300_000_000, 2_500_000_000])
def test_a_size_is_met_nearly(n_bytes: int) -> None:
    spec = spec_of_size(ModelSpec(types={"*": Type.F16}), n_bytes)
    assert 0.9 < data_bytes(spec) / n_bytes < 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "nonsense"}, "unknown architecture 'nonsense'"),
        ({"n_head": 4, "n_head_kv": 3}, "4 heads cannot share 3 K/V heads"),
        ({"n_embd": 65}, "no multiple of n_head"),
        ({"alignment": 24}, "no power of two"),
        ({"architecture": "qwen2", "key_length": 32}, "computes its head length"),
    ],
)
def test_a_spec_that_means_nothing_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec(**options)


def test_metadata_can_be_added_replaced_and_left_out(tmp_path: Path) -> None:
    extra = {
        "llama.rope.freq_base": 500000.0,
        "general.name": None,
        "x.negative": -1,
        "x.large": 1 << 40,
        "x.flags": [True, False],
    }
    fields = gguf.GGUFReader(write(tmp_path / "model.gguf", metadata=extra)).fields
    assert fields["llama.rope.freq_base"].contents() == 500000.0
    assert "general.name" not in fields
    assert fields["x.negative"].contents() == -1
    assert fields["x.large"].contents() == 1 << 40
    assert fields["x.flags"].contents() == [True, False]


# --- llama.cpp as the judge --------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("architecture", sorted(set(LAYOUTS) - ONLY_FUSED - {"t5"}))
def test_llama_cpp_loads_it(architecture: str, tmp_path: Path) -> None:
    path = write(tmp_path / "separate.gguf", architecture)
    rows = log_probabilities(path, PROMPT, n_predict=2)
    assert rows.shape == (3, 320)
    assert np.isfinite(rows).all()
    assert np.allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    # Neither flat nor one-sided: an error in attention would show.
    assert 0.2 < rows.std() < 2
    if architecture not in ONLY_SEPARATE:
        fused = write(tmp_path / "fused.gguf", architecture, fused=True)
        assert np.array_equal(log_probabilities(fused, PROMPT, n_predict=2), rows)


@needs_llama_cpp
@pytest.mark.parametrize("architecture", sorted(ONLY_FUSED))
def test_llama_cpp_loads_what_is_fused_from_the_start(architecture: str, tmp_path: Path) -> None:
    rows = log_probabilities(write(tmp_path / "model.gguf", architecture), PROMPT, n_predict=1)
    assert rows.shape == (2, 320)
    assert np.isfinite(rows).all()


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ["bitnet", "t5"])
def test_llama_cpp_refuses_the_fused_form(architecture: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", architecture, fused=True)
    with pytest.raises(LoadFailed, match=r"tensor '.*attn_q\.weight' not found") as refusal:
        log_probabilities(path, PROMPT)
    assert refusal.value.signal is None


@needs_llama_cpp
def test_a_crash_is_a_result(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "qwen4exp", fused=True)
    with pytest.raises(LoadFailed) as crash:
        log_probabilities(path, PROMPT)
    assert crash.value.signal in ("SIGSEGV", "SIGBUS", "SIGABRT")


@needs_llama_cpp
@pytest.mark.parametrize(
    "options",
    [
        {"n_head_kv": 1},
        {"n_head_kv": 4},
        {"key_length": 32},
        {"n_expert": 4},
        {"bias": True},
        {"rope_scaling": "linear"},
        {"rope_scaling": "yarn"},
        {"rope_freqs": True},
        {"scales": "equal"},
        {"scales": "unequal"},
        {"alignment": 4096},
        {"architecture": "stablelm", "qk_norm": True},
        {"architecture": "mimo2", "sinks": False},
        {"architecture": "baichuan", "n_layer": 32},
        {"n_embd": 256, "types": {"*": Type.Q4_K, "blk.1.attn_v.weight": Type.Q6_K}},
        {"types": {"*": Type.Q4_0}},
        {"types": {"*": Type.BF16}},
        {"n_vocab": 2048, "tokenizer": "bpe"},
    ],
    ids=str,
)
def test_llama_cpp_loads_variants(options: dict[str, Any], tmp_path: Path) -> None:
    rows = log_probabilities(write(tmp_path / "model.gguf", **options), PROMPT, n_predict=1)
    assert rows.shape == (2, options.get("n_vocab", 320))
    assert np.isfinite(rows).all()


@needs_llama_cpp
def test_a_large_vocabulary_is_a_real_one(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", n_vocab=128256, n_embd=32, n_layer=1, n_head=2)
    assert log_probabilities(path, [128000, 500, 900], n_predict=0).shape == (1, 128256)
    spec = ModelSpec(n_vocab=128256, n_embd=32, n_layer=1, n_head=2)
    header = path.stat().st_size - data_bytes(spec)
    assert 6_000_000 < header < 10_000_000


@needs_llama_cpp
def test_rows_are_prefixes_then_the_prompt_then_decoded_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    exact: dict[str, Any] = {"cache_type": "f32", "flash_attention": "off"}
    greedy = log_probabilities(path, PROMPT, n_predict=2, **exact)
    next_tokens = [int(row.argmax()) for row in greedy[:2]]
    prompt = [*PROMPT, *next_tokens]
    n = len(PROMPT)
    prefixes = log_probabilities(path, prompt, prefixes=[n, n + 1], n_predict=0, **exact)
    # Decoding on the cache and prefilling the whole give the same up to rounding.
    assert np.allclose(greedy, prefixes, atol=1e-4)
    given = log_probabilities(path, PROMPT, continuation=next_tokens, **exact)
    assert np.array_equal(given, greedy)


@needs_llama_cpp
def test_a_lora_adapter_changes_the_separate_model_and_is_refused_by_the_fused(
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "lora.gguf"
    writer = gguf.GGUFWriter(adapter, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(1)
    for layer in range(2):
        name = f"blk.{layer}.attn_q.weight.lora_"
        writer.add_tensor(name + "a", rng.standard_normal((4, 64), dtype=np.float32))
        writer.add_tensor(name + "b", rng.standard_normal((64, 4), dtype=np.float32))
    finish(writer)
    separate = write(tmp_path / "separate.gguf")
    plain = log_probabilities(separate, PROMPT, n_predict=0)
    adapted = log_probabilities(separate, PROMPT, n_predict=0, lora=adapter)
    assert np.abs(plain - adapted).max() > 0.1
    fused = write(tmp_path / "fused.gguf", fused=True)
    with pytest.raises(LoadFailed, match="does not exist in base model"):
        log_probabilities(fused, PROMPT, n_predict=0, lora=adapter)


@needs_llama_cpp
def test_llama_cpp_refuses_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(LoadFailed):
        log_probabilities(path, PROMPT)
    with pytest.raises(LoadFailed, match="cannot read"):
        rewrite_with_llama_cpp(path, tmp_path / "copy.gguf")


@needs_llama_cpp
@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_llama_cpp_would_write_the_same_bytes(alignment: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "qwen3", alignment=alignment, types={"*": Type.Q8_0})
    rewrite_with_llama_cpp(path, tmp_path / "copy.gguf")
    assert sha256(path) == sha256(tmp_path / "copy.gguf")


# --- the script --------------------------------------------------------------------------------


def make_model(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(MAKE_MODEL), *arguments], capture_output=True, text=True, check=False
    )


def test_the_script_writes_what_its_options_say(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    options = (
        "-a qwen2 --layers 3 --embd 256 --heads 8 --kv-heads 2 --type Q4_K "
        "--type blk.1.attn_v.*=q6_k --scales unequal --alignment 64 --seed 5"
    )
    done = make_model(str(out), *options.split())
    assert done.returncode == 0, done.stderr
    spec = ModelSpec(
        "qwen2",
        n_layer=3,
        n_embd=256,
        n_head=8,
        n_head_kv=2,
        types={"*": Type.Q4_K, "blk.1.attn_v.*": Type.Q6_K},
        scales="unequal",
        alignment=64,
        seed=5,
    )
    write_random_model(tmp_path / "twin.gguf", spec)
    assert sha256(out) == sha256(tmp_path / "twin.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "twin.gguf"]


def test_the_script_replaces_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    out.write_text("precious")
    refused = make_model(str(out))
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    assert out.read_text() == "precious"
    assert make_model(str(out), "--force").returncode == 0
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-a", "nonsense"], "nonsense"),
        (["--type", "Q99"], "unknown type 'Q99'"),
        (["--type", "Q4_K"], "do not divide into Q4_K"),
        (["--type", "blk.9.*=Q8_0"], "blk.9.*: no tensor has such a name"),
        (["--size", "big"], "write it as 300M"),
    ],
)
def test_the_script_names_wrong_usage(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = make_model(str(tmp_path / "model.gguf"), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
