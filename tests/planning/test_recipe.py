"""The recipe for each mix of llama-quantize: which commands, which tensors, how many bytes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGMLQuantizationType as T

from tests.conftest import fused_copy
from tests.edit import edited
from tests.pack import UINT32, lora, save, valid
from tests.quantize import Arguments, parsed, quantizable
from tests.server import Run, assert_one_line
from tests.shards import in_three

Model = Callable[..., Path]

N_LAYER = 4
# What each mix leaves in a model of grouped heads (llama.cpp v0.5.0): its general.file_type, the
# type of Q and K, that of V where it differs, and in how many of four layers it does.
MIXES = {
    "Q5_K_M": (17, "Q5_K", "Q6_K", 2),
    "Q4_K_M": (15, "Q4_K", "Q6_K", 2),
    "Q4_K_S": (14, "Q4_K", "Q5_K", 1),
    "IQ4_NL": (25, "IQ4_NL", "Q5_K", 4),
    "IQ4_XS": (30, "IQ4_XS", "Q5_K", 4),
    "Q3_K_L": (13, "Q3_K", "Q5_K", 4),
    "Q3_K_M": (12, "Q3_K", "Q4_K", 4),
    "IQ3_M": (27, "IQ3_S", "Q4_K", 4),
    "IQ3_XS": (22, "IQ3_XXS", "Q4_K", 4),
    "IQ3_XXS": (23, "IQ2_S", "Q4_K", 4),
    "Q2_K": (10, "Q2_K", "Q4_K", 4),
    "Q2_K_S": (21, "Q2_K", "Q4_K", 4),
    "IQ2_M": (29, "IQ2_S", "Q4_K", 4),
    "IQ2_XS": (20, "IQ2_XS", "Q4_K", 4),
    "IQ2_XXS": (19, "IQ2_XXS", "Q4_K", 4),
    "IQ1_M": (31, "IQ1_M", "Q4_K", 4),
}
WANT_MATRIX = {"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ1_M"}


def of_mix(model: Model, mix: str) -> Path:
    """Other tensors have other types in other layers than the mix gives them: they must stay."""
    number, own, more, n_mixed = MIXES[mix]
    types = {"*": T[own], "output.weight": T.Q6_K, "blk.1.ffn_down.weight": T.Q5_K}
    types |= {f"blk.{layer}.attn_v.weight": T[more] for layer in range(n_mixed)}
    shape = {"n_embd": 256, "n_head": 4, "n_head_kv": 1, "n_ff": 256, "n_layer": N_LAYER}
    return model(**shape, types=types, metadata={"general.file_type": number})


def recipe(run: Run, *arguments: str | Path) -> dict[str, Any]:
    done = run("recipe", *arguments, "--json")
    assert done.code == 0, done.err
    told: dict[str, Any] = json.loads(done.out)
    return told


def quantization(commands: list[str]) -> Arguments:
    program, *words = shlex.split(commands[0])
    assert program == "llama-quantize"
    return parsed(words)


@pytest.mark.parametrize("mix", MIXES)
def test_commands_make_each_mix_fusable_and_change_no_other_tensor(
    model: Model, run: Run, mix: str
) -> None:
    path = of_mix(model, mix)
    before = quantizable(gguf.GGUFReader(path))
    own, more, n_mixed = MIXES[mix][1:]
    told = recipe(run, path)
    assert [layer["layer"] for layer in told["layers"]] == [f"blk.{n}" for n in range(n_mixed)]
    assert told["layers_fusable"] == N_LAYER - n_mixed
    assert told["advice"] == ("raise" if n_mixed == N_LAYER else "leave")
    for way in told["ways"]:
        raised = way["way"] == "raise"
        parts, new = ("qk", more) if raised else ("v", own)
        wanted = {f"blk.{n}.attn_{part}.weight": new for n in range(n_mixed) for part in parts}
        asked = quantization(way["commands"])
        assert asked.requantized(before) == before | wanted
        assert way["tensors"] == wanted
        assert asked.file_type == mix
        assert asked.allow_requantize == (way["way"] != "anew")
        assert asked.source == ("model-F16.gguf" if way["way"] == "anew" else str(path))
        assert way["wants_imatrix"] == ("--imatrix" in asked.options) == (mix in WANT_MATRIX)
        size = sum(n_bytes(name, path, new) - n_bytes(name, path) for name in wanted)
        assert way["bytes"] == size
        assert shlex.split(way["commands"][1])[:3] == ["gguf-fuse", "fuse", asked.target]


def n_bytes(name: str, path: Path, as_type: str | None = None) -> int:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    block, size = gguf.GGML_QUANT_SIZES[T[as_type] if as_type else tensor.tensor_type]
    return int(tensor.n_elements) // block * size


def test_lines_for_people_hold_the_same_commands(model: Model, run: Run) -> None:
    path = of_mix(model, "IQ2_XS")
    shown = run("recipe", path).out
    told = recipe(run, path)
    for way in told["ways"]:
        assert f"\n{way['way']}: " in shown
        for command in way["commands"]:
            assert f"\n{command}\n" in shown
    assert "imatrix.gguf stands for the model's importance matrix" in shown


def test_names_that_a_shell_would_cut(model: Model, run: Run) -> None:
    path = of_mix(model, "Q4_K_M")
    odd = path.rename(path.with_name("it's; a $model.gguf"))
    told = recipe(run, odd, "--imatrix", "-m.gguf")
    asked = quantization(told["ways"][0]["commands"])
    assert asked.source == str(odd)
    assert asked.options["--imatrix"] == "./-m.gguf"


@pytest.mark.parametrize("number", [None, 1, 39, 1 << 20, [15], "Q4_K_M"])
def test_a_file_type_that_llama_quantize_cannot_name_is_kept(
    model: Model, run: Run, number: object
) -> None:
    types = {"*": T.Q4_K, "*attn_v.weight": T.Q6_K}
    path = model(n_embd=256, types=types, metadata={"general.file_type": number})
    asked = quantization(recipe(run, path)["ways"][0]["commands"])
    kept = {"--override-kv": f"general.file_type=int:{number}"} if isinstance(number, int) else {}
    assert (asked.file_type, asked.options) == ("Q4_K", kept)


def test_of_two_types_with_as_many_bits_raise_takes_vs_and_lower_qs(model: Model, run: Run) -> None:
    path = model(n_embd=256, types={"*": T.IQ4_NL, "*attn_v.weight": T.Q4_K})
    ways = {way["way"]: set(way["tensors"].values()) for way in recipe(run, path)["ways"]}
    assert ways == {"raise": {"Q4_K"}, "lower": {"IQ4_NL"}, "anew": {"IQ4_NL"}}


def test_nothing_to_make_fusable(model: Model, run: Run, tmp_path: Path) -> None:
    mixed = {"*": T.Q4_K, "blk.0.attn_v.weight": T.Q6_K}
    fused = fused_copy(model(n_embd=256, types=mixed))
    assert_one_line(run("recipe", fused), "has fused this file already", "unfuse it", code=3)
    assert_one_line(run("recipe", model()), "fuse takes the file as it is", code=3)
    bitnet = model(architecture="bitnet")
    assert_one_line(run("recipe", bitnet), "loader for bitnet needs", code=3)
    biased = model(n_embd=256, types=mixed, n_layer=1, bias=True, architecture="qwen2")
    lacking = edited(biased, drop=["blk.0.attn_k.bias"])
    assert_one_line(run("recipe", lacking), "no attn_k.bias beside", code=3)


def test_what_llama_quantize_does_not_read_is_refused(run: Run, tmp_path: Path) -> None:
    adapter = save(lora(), tmp_path / "lora.gguf")
    assert_one_line(run("recipe", adapter), "general.type is 'adapter'")
    newer = valid().tensor("blk.0.attn_v.weight", type=1).tensor("output_norm.weight", type=142)
    path = save(newer.key("general.file_type", UINT32, 1), tmp_path / "newer.gguf")
    assert_one_line(run("recipe", path), "output_norm.weight", "type 142")


def test_of_shards_llama_quantize_is_given_the_first(model: Model, run: Run) -> None:
    mixed = {"*": T.Q4_K, "*attn_v.weight": T.Q6_K}
    paths = in_three(model(n_embd=256, types=mixed), "cut")
    asked = quantization(recipe(run, paths[1])["ways"][0]["commands"])
    assert asked.source == str(paths[0])
