"""llama.cpp is the judge: fused and unfused files give identical log-probabilities in it.

Where its graph and ours could differ, identical means every float32 of the whole vocabulary after
the prompt and after each decoded token. Each load runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from tests.compare import PROMPT, assert_judged_equal, needs_llama_cpp
from tests.conftest import fused_copy
from tests.edit import bytes_of
from tests.llama_judge import LoadFailed, log_probabilities

pytestmark = needs_llama_cpp

Model = Callable[..., Path]


# What each one stands for.
WELL_KNOWN: dict[str, dict[str, Any]] = {
    "llama": {"n_head": 8, "n_head_kv": 2},
    "qwen2": {"n_head_kv": 2},  # biases
    "qwen3": {"n_head_kv": 2},  # Q/K norms
    "gemma2": {"n_head_kv": 2},  # soft caps, sliding window
    "gpt-oss": {},  # sinks, mixture of experts
    "phi3": {},
    "phi2": {},
    "gemma3": {},
    "stablelm": {},
    "starcoder2": {},
    "olmo2": {},
    "granite": {},
    "qwen35": {},  # Q with a gate, recurrent layers between
}
# Convolutions of recurrent layers are F32 in every file.
F32_ALWAYS = {"*.ssm_*": T.F32}
TYPES = {"F32": T.F32, "F16": T.F16, "Q8_0": T.Q8_0, "Q4_0": T.Q4_0}

OTHERS = """apertus arcee baichuan chatglm cohere2 command-r deci ernie4_5 exaone4 gemma gemma4 glm4
    hunyuan-dense internlm2 lfm2 mimo2 minicpm mistral3 nemotron olmo orion qwen3moe refact seed_oss
    smollm3 xverse""".split()


@pytest.mark.slow
@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("architecture", WELL_KNOWN)
def test_identical_log_probabilities(model: Model, architecture: str, type_: str) -> None:
    spec = {"architecture": architecture, **WELL_KNOWN[architecture]}
    original = model(types={"*": TYPES[type_], **F32_ALWAYS}, **spec)
    assert_judged_equal(original, fused_copy(original))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", OTHERS)
def test_identical_log_probabilities_of_more_architectures(model: Model, architecture: str) -> None:
    original = model(architecture=architecture)
    assert_judged_equal(original, fused_copy(original))


def test_identical_log_probabilities_of_mixed_types(model: Model) -> None:
    types = {"*": T.Q4_K, "blk.1.attn_v.weight": T.Q6_K}
    original = model(n_layer=3, n_embd=256, types=types)
    assert_judged_equal(original, fused_copy(original))


def test_identical_log_probabilities_with_equal_scales(model: Model) -> None:
    original = model(scales="equal")
    assert_judged_equal(original, fused_copy(original))


def test_the_judge_sees_one_changed_weight(model: Model) -> None:
    original = model(types={"*": T.F16})
    fused = fused_copy(original)
    with bytes_of(fused) as data:
        data[-2000] ^= 0x40
    before, after = log_probabilities(original, PROMPT), log_probabilities(fused, PROMPT)
    assert not np.array_equal(before, after)


@pytest.mark.parametrize(("architecture", "crash"), [("bitnet", None), ("qwen4exp", "SIGSEGV")])
def test_refused_architectures_do_not_load_fused(
    model: Model, architecture: str, crash: str | None
) -> None:
    """What the refusal keeps people from: bitnet's loader says no, qwen4exp's crashes."""
    original = model(architecture=architecture)
    assert np.isfinite(log_probabilities(original, PROMPT)).all()
    fused = fused_copy(original, any_architecture=True)
    with pytest.raises(LoadFailed) as caught:
        log_probabilities(fused, PROMPT)
    assert caught.value.signal == crash
