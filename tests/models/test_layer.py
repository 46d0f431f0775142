"""`gguf_fuse.models.layer` computes the attention that llama.cpp computes.

A whole forward pass on top of it (`forward`) gives the log-probabilities that llama.cpp gives, with
its KV cache in float32: a prompt longer than every window, then single tokens, from the file as it
is and from the fused one. How near that really is: 6e-6, and 1e-5 over 64 layers, which is
float32's rounding. Of an encoder it is the embeddings of all tokens, from one batch and relative to
their size. `EXACT` leaves room for other processors. Where the feed-forward is a GELU it is
6e-4: llama.cpp looks that up in a float16 table, where a last bit can become a whole step. There
`GELU` counts, and once more `EXACT` without the feed-forward. The smallest of the seeded faults
moves the probabilities by 2e-2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_fuse import api as rewrite
from gguf_fuse.attention.masks import Window
from gguf_fuse.attention.rope import Rope
from gguf_fuse.format.source import GGUFError
from gguf_fuse.models.attention_table import TABLE
from gguf_fuse.models.layer import AttentionLayer
from gguf_fuse.planning.plan import NothingToDo
from tests import llama_judge
from tests.conftest import fused_copy
from tests.models import forward
from tests.models.cases import (
    CASES,
    N_DECODE,
    N_PROMPT,
    SEEN,
    Case,
    a_case,
    write_case,
)
from tests.models.extra_layouts import (
    JINA_NORMED,
)

needs_llama_cpp = pytest.mark.skipif(
    not llama_judge.available(), reason="xllamacpp is not installed: nothing to compare with"
)


@dataclass(frozen=True)
class Judged:
    """Files of one case, and what llama.cpp computes of each; fused None: it cannot be.

    rows: log-probabilities after the prompt and after each token; or an encoder's embeddings of
    the prompt.
    """

    case: Case
    original: Path
    fused: Path | None
    tokens: list[int]
    continuation: list[int]
    rows: Mapping[Path, NDArray[np.float32]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Judged]]:
    """Writes, fuses and judges a case once; both files at the same time."""

    @functools.cache
    def judge(name: str) -> Judged:
        case = CASES[name]
        directory = tmp_path_factory.mktemp("model")
        original = write_case(case, directory / "original.gguf")
        fused = _fuse(original, directory / "fused.gguf")
        rng = np.random.default_rng(7)
        tokens = [int(token) for token in rng.integers(3, 259, case.n_prompt + N_DECODE)]
        tokens[0] = ord("A") + 3  # no part of a character: the judge asks once, not twice
        prompt, continuation = tokens[: case.n_prompt], tokens[case.n_prompt :]
        paths = [path for path in (original, fused) if path is not None]
        rows = judges.map(lambda path: _judge(case, path, prompt, continuation), paths)
        by_path = dict(zip(paths, rows, strict=True))
        return Judged(case, original, fused, prompt, continuation, by_path)

    with ThreadPoolExecutor(2) as judges:
        yield judge


def _judge(
    case: Case, path: Path, prompt: list[int], continuation: list[int]
) -> NDArray[np.float32]:
    if case.encodes:
        return llama_judge.embeddings(path, prompt, flash_attention="off", n_ctx=case.n_ctx)
    return llama_judge.log_probabilities(
        path,
        prompt,
        continuation=continuation,
        cache_type="f32",
        flash_attention="off",
        n_ctx=case.n_ctx,
    )


def _fuse(source: Path, target: Path) -> Path | None:
    try:
        rewrite.fuse(source, str(target), options=rewrite.Options(sync=False))
    except GGUFError as error:
        assert "already fused" in str(error) or "scales differ" in str(error)
        return None
    return target


def _error(
    judged: Judged,
    path: Path,
    change: Callable[[AttentionLayer], AttentionLayer] = lambda one: one,
) -> float:
    """Largest difference of any log-probability, or of any embedding relative to its size."""
    theirs = judged.rows[path]
    if judged.case.encodes:
        ours = forward.embeddings(path, judged.tokens, change=change)
        size = np.sqrt(np.mean(np.square(theirs), axis=1, keepdims=True))  # [n_tokens, 1]
    else:
        ours = forward.log_probabilities(path, judged.tokens, judged.continuation, change=change)
        size = np.ones((1, 1), np.float32)
    assert ours.shape == theirs.shape
    return float((np.abs(ours - theirs) / size).max())


# --- agreement with llama.cpp ------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_llama_cpp(name: str, judged: Callable[[str], Judged]) -> None:
    case, files = CASES[name], judged(name)
    assert _error(files, files.original) <= case.limit
    if files.fused is not None:
        assert _error(files, files.fused) <= case.limit


@needs_llama_cpp
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.encodes])
def test_identical_embeddings_of_a_fused_file(name: str, judged: Callable[[str], Judged]) -> None:
    files = judged(name)
    assert files.fused is not None
    np.testing.assert_array_equal(files.rows[files.original], files.rows[files.fused])


@needs_llama_cpp
def test_whole_rows_normed_in_an_encoder(tmp_path: Path) -> None:
    """llama.cpp does that beside separate Q, K and V, and aborts beside fused ones: left alone."""
    case = a_case("jina-bert-v2", layout=JINA_NORMED, feed_forward=False)
    path, tokens = write_case(case, tmp_path / "original.gguf"), list(range(3, 3 + N_PROMPT))
    files = Judged(case, path, None, tokens, [], {path: _judge(case, path, tokens, [])})
    assert _error(files, path) <= case.limit
    assert _error(files, path, _without_norms) > SEEN
    with pytest.raises(NothingToDo, match="aborts on attn_q_norm beside attn_qkv"):
        fused_copy(path)
    fused = write_case(replace(case, spec={**case.spec, "fused": True}), tmp_path / "fused.gguf")
    with pytest.raises(llama_judge.LoadFailed) as caught:
        _judge(case, fused, tokens, [])
    assert caught.value.signal == "SIGABRT"


def test_every_modelled_architecture_is_compared() -> None:
    assert {case.architecture for case in CASES.values()} == TABLE.keys()


# --- seeded faults -----------------------------------------------------------------------------


def _spec(**changes: Any) -> Callable[[AttentionLayer], AttentionLayer]:
    return lambda one: replace(one, spec=replace(one.spec, **changes))


def _rules(**changes: Any) -> Callable[[AttentionLayer], AttentionLayer]:
    return lambda one: replace(
        one, spec=replace(one.spec, rules=replace(one.spec.rules, **changes))
    )


def _rope(**changes: Any) -> Callable[[AttentionLayer], AttentionLayer]:
    def change(one: AttentionLayer) -> AttentionLayer:
        if one.spec.rope is None:
            return one
        return replace(one, spec=replace(one.spec, rope=replace(one.spec.rope, **changes)))

    return change


def _params(**changes: Any) -> Callable[[AttentionLayer], AttentionLayer]:
    return lambda one: replace(one, params=replace(one.params, **changes))


def _window(n_swa: int) -> Callable[[AttentionLayer], AttentionLayer]:
    def change(one: AttentionLayer) -> AttentionLayer:
        if one.spec.window is None:
            return one
        return replace(one, spec=replace(one.spec, window=Window(n_swa)))

    return change


def _other_layers_windowed(one: AttentionLayer) -> AttentionLayer:
    window = None if one.spec.window else Window(8)
    return replace(one, spec=replace(one.spec, window=window))


def _norm(**changes: Any) -> Callable[[AttentionLayer], AttentionLayer]:
    def change(one: AttentionLayer) -> AttentionLayer:
        assert one.spec.rules.norm is not None
        return _rules(norm=replace(one.spec.rules.norm, **changes))(one)

    return change


def _without_norms(one: AttentionLayer) -> AttentionLayer:
    return replace(one, norms=None)


def _without_biases(one: AttentionLayer) -> AttentionLayer:
    q, k, v = (replace(linear, bias=None) for linear in one.projections.linears)
    return replace(one, projections=replace(one.projections, linears=(q, k, v)))


def _swapped(one: AttentionLayer) -> AttentionLayer:
    q, k, v = one.projections.linears
    return replace(one, projections=replace(one.projections, linears=(q, v, k)))


def _always_rotated(one: AttentionLayer) -> AttentionLayer:
    rope = one.spec.rope or Rope("norm", one.spec.head_dim)
    return replace(one, spec=replace(one.spec, rope=rope))


FAULTS: dict[str, tuple[str, Callable[[AttentionLayer], AttentionLayer]]] = {
    "rope_freqs dropped": ("rope_freqs", _rope(freq_factors=None)),
    "rope_freqs dropped, split": ("split", _rope(freq_factors=None)),
    "neox for norm": ("llama", _rope(layout="neox")),
    "norm for neox": ("qwen2", _rope(layout="norm")),
    "all of the head turned": ("phi2", _rope(n_rot=16)),
    "another base": ("base", _rope(freq_base=10000.0)),
    "linear scaling ignored": ("linear", _rope(freq_scale=1.0)),
    "yarn as linear": ("yarn", _rope(ext_factor=0.0, attn_factor=1.0)),
    "yarn's factor not cancelled": ("yarn, factor < 1", _rope(attn_factor=1.0)),
    "yarn's own factor": ("yarn, neox", _rope(attn_factor=1.0)),
    "yarn's betas": ("yarn, all keys", _rope(beta_fast=32.0, beta_slow=1.0)),
    "window's base": ("gemma2, window's base", _rope(freq_base=10000.0)),
    "no RoPE": ("internlm2", _spec(rope=None)),
    "RoPE in every layer": ("smollm3", _always_rotated),
    "RoPE in layers without a window": ("cohere2", _always_rotated),
    "no temperature": ("temperature", _spec(temperature=None)),
    "window ignored": ("gemma2", _spec(window=None)),
    "window longer by one": ("gemma3", _window(9)),
    "window shorter by one": ("gpt-oss", _window(7)),
    "windows in the other layers": ("gpt-oss", _other_layers_windowed),
    "no softcap": ("gemma2", _params(softcap=0.0)),
    "sinks ignored": ("gpt-oss", _params(sinks=None)),
    "sinks ignored, split": ("split, sinks", _params(sinks=None)),
    "another scale": ("granite", _params(scale=0.25)),
    "no ALiBi": ("refact", _rules(max_alibi_bias=0.0)),
    "ALiBi of another number of heads": ("six heads, ALiBi", _params(max_alibi_bias=4.0)),
    "no clamp": ("olmo", _spec(clamp=0.0)),
    "Q and K not normed": ("qwen3", _without_norms),
    "whole rows not normed": ("olmo2", _without_norms),
    "normed before RoPE": ("hunyuan-dense", _norm(at="head")),
    "normed after RoPE": ("qwen3", _norm(at="rotated head")),
    "no bias": ("qwen2", _without_biases),
    "K and V swapped": ("llama", _swapped),
    "future tokens seen": ("llama", _spec(causal=False)),
    "future tokens hidden": ("bert", _spec(causal=True)),
    "no RoPE in an encoder": ("nomic-bert", _spec(rope=None)),
    "no ALiBi in an encoder": ("jina-bert-v2", _rules(max_alibi_bias=0.0)),
}


@needs_llama_cpp
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str, judged: Callable[[str], Judged]) -> None:
    name, change = FAULTS[fault]
    files = judged(name)
    assert _error(files, files.original, change) > SEEN


@needs_llama_cpp
def test_an_output_without_its_bias_shows(
    judged: Callable[[str], Judged], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = judged("gpt-oss")
    monkeypatch.setattr(forward, "WITHOUT_OUTPUT_BIAS", ("gpt-oss",))
    assert _error(files, files.original) > SEEN
