"""verify --llama: llama.cpp itself judges the two files, for real, each in its own process."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse import GGUFError, Report, VerifyOptions, verify
from gguf_fuse.verifying.llama import compared
from tests.compare import needs_llama_cpp
from tests.conftest import fused_copy, gguf_fuse
from tests.verifying.faults import Contents, Fault, swap_k_and_v

Model = Callable[..., Path]

ARCHITECTURES = "llama qwen2 qwen3 gemma3 gpt-oss phi3 olmo2 granite qwen3moe qwen35".split()


def judged(original: Path, fused: Path) -> Report:
    return verify(original, fused, VerifyOptions(structure_only=True, llama=True, threads=1))


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_files_are_identical_in_llama_cpp(model: Model, architecture: str) -> None:
    original = model(architecture=architecture)
    report = judged(original, fused_copy(original))
    assert report.ok
    assert report.llama is not None
    assert (report.llama.problem, report.llama.difference, report.llama.limit) == (None, 0, 0)


def exchange_two_rows(contents: Contents) -> None:
    rows = contents.rows("blk.1.attn_qkv.weight")
    contents.set_rows("blk.1.attn_qkv.weight", [rows[1], rows[0], *rows[2:]])


@needs_llama_cpp
@pytest.mark.parametrize("fault", [swap_k_and_v, exchange_two_rows])
def test_a_fault_makes_other_probabilities(model: Model, fault: Fault) -> None:
    original = model(architecture="qwen2", types={"*": T.F16})
    contents = Contents.of(fused_copy(original))
    fault(contents)
    done = gguf_fuse("verify", original, contents.write(), "--structure-only", "--llama")
    assert done.returncode == 4
    line = "llama.cpp computes other log-probabilities from the fused file: they differ by up to "
    assert line in done.stdout
    assert "limit 0; first after the prompt" in done.stdout
    assert "blk.1.attn_qkv.weight: " in done.stderr


@needs_llama_cpp
@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("bitnet", "llama.cpp does not run the fused file: .*'blk.0.attn_q.weight' not found"),
        ("qwen4exp", "llama.cpp crashes on the fused file: SIGSEGV"),
    ],
)
def test_a_loader_that_refuses_or_crashes_is_a_result(
    model: Model, architecture: str, words: str
) -> None:
    original = model(architecture=architecture)
    fused = fused_copy(original, any_architecture=True)
    done = gguf_fuse("verify", original, fused, "--structure-only", "--llama")
    assert done.returncode == 4
    assert re.match(f"gguf-fuse: verification failed: {words}", done.stderr)


@needs_llama_cpp
def test_an_original_that_llama_cpp_does_not_run_is_no_verdict(model: Model) -> None:
    fused = fused_copy(model(architecture="bitnet"), any_architecture=True)
    with pytest.raises(GGUFError, match="does not run the original itself"):
        judged(fused, shutil.copy(fused, fused.with_name("copy.gguf")))


def test_without_the_wheel_it_says_how_to_get_it(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GGUFError, match=r"--llama needs xllamacpp.* 'gguf-fuse\[llama\]'"):
        judged(packed, packed)


def test_a_gpu_may_differ_as_much_as_the_limit_says() -> None:
    before = np.log([[0.5, 0.5], [0.25, 0.75]])
    after = before + np.array([[0.0, 0.0], [0.0, 0.125]])
    assert compared(before, after, 0.125, "a GPU").problem is None
    problem = compared(before, after, 0.1, "a GPU").problem
    assert problem is not None
    assert problem.endswith("differ by up to 0.12, limit 0.1; first after 1 generated token")


def test_values_that_are_no_numbers_must_be_in_the_same_places() -> None:
    before = np.array([[0.0, -np.inf]])
    assert compared(before, before.copy(), 0.0, "a CPU").problem is None
    for value in (np.nan, -1.0):
        assert compared(before, np.array([[0.0, value]]), 0.5, "a CPU").problem is not None


def test_other_numbers_of_tokens_are_a_problem() -> None:
    problem = compared(np.zeros((5, 3)), np.zeros((5, 4)), 0.0, "a CPU").problem
    assert problem == "llama.cpp gives probabilities of 3 tokens, but 4 in the fused file"
