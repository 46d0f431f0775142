"""Which programs load a file, as `inspect --for` tells it: told of real files, fused and not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from gguf_fuse import inspect
from gguf_fuse.choices import ReaderName
from gguf_fuse.planning.fusions import GATE_UP
from gguf_fuse.planning.loaders import ARCHITECTURES
from gguf_fuse.planning.readers import READERS, Answer, Listed, ask
from tests.conftest import fused_copy, gguf_fuse
from tests.pack import lora, save

Model = Callable[..., Path]

# Architectures of ik_llama.cpp alone.
IK_ALONE = {"bitnet-25", "bitnet-b1.58", "cohere2_moe", "dflash-draft", "gemma4_mtp", "openpangu"}
LISTED = [reader for reader in READERS.values() if isinstance(reader, Listed)]


def answer(program: str, path: Path) -> Answer:
    found = inspect(path)
    return ask(program, found.header, found.layers)  # type: ignore[arg-type]


def who(path: Path, loads: bool | None = True) -> str:
    """Programs that load it; or that do not, or of which nobody knows."""
    return " ".join(name for name in READERS if answer(name, path).loads is loads)


ALL_BUT_LLAMA_CPP = "ik_llama.cpp vllm candle mistral.rs transformers"


def test_a_separate_llama_is_read_by_all_and_fused_by_llama_cpp(model: Model) -> None:
    original = model()
    assert who(original) == f"llama.cpp ollama {ALL_BUT_LLAMA_CPP}"
    fused = fused_copy(original)
    assert who(fused) == "llama.cpp ollama"
    assert who(fused, False) == ALL_BUT_LLAMA_CPP


@pytest.mark.parametrize(
    ("architecture", "fused_for"),
    [
        ("phi2", "llama.cpp ollama ik_llama.cpp candle mistral.rs"),
        ("glm4", "llama.cpp ollama ik_llama.cpp mistral.rs"),
        ("phi3", "llama.cpp ollama ik_llama.cpp vllm candle mistral.rs transformers"),
        ("qwen35", "llama.cpp"),  # Ollama's build is older than the first that reads it
        ("bitnet", ""),
        ("qwen4exp", ""),
    ],
)
def test_who_reads_fused(model: Model, architecture: str, fused_for: str) -> None:
    assert who(fused_copy(model(architecture=architecture), any_architecture=True)) == fused_for


def test_separate_where_only_fused_is_known(model: Model) -> None:
    told = answer("candle", model(architecture="phi3"))
    assert told.loads is False
    assert "asks for fused" in told.reason


@pytest.mark.parametrize("program", ["ik_llama.cpp", "candle", "transformers"])
@pytest.mark.parametrize("architecture", ["qwen3", "phi3"])
def test_the_advice_makes_a_file_that_loads(
    model: Model, tmp_path: Path, program: str, architecture: str
) -> None:
    path = model(architecture=architecture)
    path = fused_copy(path) if architecture == "qwen3" else path
    told = answer(program, path)
    assert told.loads is False and told.advice
    out = tmp_path / "advised.gguf"
    assert gguf_fuse(*shlex.split(told.advice)[1:-1], out).returncode == 0
    assert answer(program, out).loads is True


def test_experts(model: Model) -> None:
    original = model(architecture="qwen35moe", n_expert=4)
    assert "llama.cpp" in who(original).split()
    fused = fused_copy(original, fusions=(GATE_UP,))
    assert who(fused) == "llama.cpp ollama ik_llama.cpp mistral.rs"
    assert "transformers" in who(fused, None).split()
    assert "b8672" in str(answer("llama.cpp", fused).since)


def test_what_is_not_known(model: Model, tmp_path: Path) -> None:
    assert who(save(lora(), tmp_path / "lora.gguf"), None).split() == list(READERS)
    of_tomorrow = model(metadata={"general.architecture": "of-tomorrow"})
    assert who(of_tomorrow, None) == "llama.cpp ollama vllm candle"
    assert who(of_tomorrow) == ""


def test_every_program_can_be_asked_of() -> None:
    assert list(READERS) == list(get_args(ReaderName))


@pytest.mark.parametrize("reader", LISTED, ids=lambda reader: reader.name)
def test_lists_are_of_architectures_that_there_are(reader: Listed) -> None:
    known = reader.separate | reader.fused
    assert known <= ARCHITECTURES.keys() | (IK_ALONE if reader.name == "ik_llama.cpp" else set())
    assert (reader.gate_up or set()) <= known


def test_on_the_command_line(model: Model) -> None:
    fused = fused_copy(model())
    shown = gguf_fuse("inspect", fused, "--for", "ik_llama.cpp").stdout
    assert "ik_llama.cpp no: blk.0 has fused Q, K and V" in shown
    assert f"gguf-fuse unfuse {fused} OUT" in shown
    assert "read, not run: " in shown and "commit 8337e4cd3" in shown
    told = json.loads(gguf_fuse("inspect", fused, "--for", "all", "--json").stdout)["readers"]
    assert [each["program"] for each in told if each["loads"]] == ["llama.cpp", "ollama"]
    assert told[0]["since"] == "build b8929 (April 2026)" and told[0]["proof"] == "measured"
    assert gguf_fuse("inspect", fused, "--for", "nobody").returncode == 2
