"""Plain attention: the same by every path, against float64 and against slow code written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from gguf_fuse.attention import attend
from gguf_fuse.attention.attend import (
    attention,
    broadcast_attention,
    expanded_attention,
    reference_attention,
)
from gguf_fuse.attention.masks import alibi_slopes
from gguf_fuse.attention.shapes import Floats
from gguf_fuse.attention.softmax import AttentionParams
from gguf_fuse.attention.split import split_attention
from tests.attention.cases import (
    EPS,
    ODD_LENGTHS,
    Case,
    assert_as_good,
    cases,
    error,
    make_case,
    peak_bytes,
)


@settings(max_examples=300, deadline=None)
@given(cases(max_tokens=7, max_kv=300))
def test_broadcast_equals_expanded(case: Case) -> None:
    expanded = expanded_attention(*case.args)
    assert_as_good(broadcast_attention(*case.args), expanded, case.reference, case.floor)


@pytest.mark.parametrize("n_kv", [1, 511, 512, 513, *ODD_LENGTHS])
@pytest.mark.parametrize(
    ("n_head_kv", "group"), [(1, 8), (2, 4), (2, 7), (6, 1)], ids=["mqa", "gqa4", "gqa7", "mha"]
)
def test_every_path_agrees(n_kv: int, n_head_kv: int, group: int) -> None:
    case = make_case(
        1, n_head_kv=n_head_kv, group=group, n_kv=n_kv, head_dim=64, head_dim_v=48, sinks=True
    )
    plain = expanded_attention(*case.args)
    assert plain.shape == (2, n_head_kv * group, 1, 48)
    for got in (attention(*case.args), split_attention(*case.args, n_threads=2)):
        assert_as_good(got, plain, case.reference, case.floor)


FEATURES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 70},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 2.0},
    "alibi": {"max_alibi_bias": 8.0},
    "all": {"window": 300, "sinks": True, "softcap": 2.0, "max_alibi_bias": 8.0},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize(("n_head_kv", "group"), [(1, 6), (2, 3), (3, 5), (4, 1)])
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_every_feature_in_every_path(
    n_tokens: int, n_head_kv: int, group: int, features: dict[str, Any]
) -> None:
    case = make_case(
        33,
        n_head_kv=n_head_kv,
        group=group,
        n_tokens=n_tokens,
        n_kv=1025,
        lengths=[1025, 700],
        **features,
    )
    expanded = expanded_attention(*case.args)
    for path in (broadcast_attention, attention):  # n_tokens 1: attention is split
        assert_as_good(path(*case.args), expanded, case.reference, case.floor)


@pytest.mark.parametrize("path", [broadcast_attention, split_attention, attention])
def test_a_sequence_gives_the_same_alone_and_in_a_batch(path: Callable[..., Floats]) -> None:
    lengths = [700, 1025, 3, 0]
    case = make_case(3, n_seqs=4, n_kv=1025, lengths=lengths, sinks=True)
    batch = path(*case.args)
    for seq, length in enumerate(lengths):
        alone = (case.q[seq : seq + 1], case.k[seq : seq + 1, :, :length])
        reference = reference_attention(
            *alone, case.v[seq : seq + 1, :, :length], None, case.params
        )
        assert error(batch[seq : seq + 1], reference) <= case.floor


def test_prefill_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(4, n_tokens=50, n_kv=97, lengths=[97, 60], sinks=True, max_alibi_bias=8)
    plain = broadcast_attention(*case.args)
    monkeypatch.setattr(attend, "SCORE_BYTES", 7 * 6 * 97 * 4)  # seven tokens at a time
    assert_as_good(broadcast_attention(*case.args), plain, case.reference, case.floor)


def test_decode_continues_prefill() -> None:
    """The last token of a causal prompt, and the same token decoded alone."""
    case = make_case(5, n_tokens=97, n_kv=97, lengths=[97, 97])
    last = attention(case.q[:, :, -1:], case.k, case.v, None, case.params)
    assert error(last, case.reference[:, :, -1:]) <= case.floor


def test_float64_stays_float64() -> None:
    case = make_case(6, n_kv=600, sinks=True, softcap=5.0)
    q, k, v = (x.astype(np.float64) for x in (case.q, case.k, case.v))
    for path in (broadcast_attention, split_attention):
        got = path(q, k, v, None, case.params)
        assert got.dtype == np.float64
        assert error(got, case.reference) < 1e-13


def test_reference_against_scalar_loops() -> None:
    """The judge itself, against the formula written with Python floats."""
    case = make_case(
        7, n_seqs=2, n_tokens=3, n_kv=9, lengths=[9, 5], sinks=True, softcap=2.0, max_alibi_bias=8
    )
    assert case.mask is not None and case.params.sinks is not None
    got = case.reference
    for seq, head, token in np.ndindex(2, 6, 3):
        q = case.q[seq, head, token]
        k, v = case.k[seq, head // 3], case.v[seq, head // 3]
        slope = alibi_slopes(6, 8)[head]
        total = math.exp(float(case.params.sinks[head]))
        weighted = np.zeros(16)
        for cell in range(9):
            if case.mask[seq, token, cell] == -np.inf:
                continue
            dot = math.fsum(float(a) * float(b) for a, b in zip(q, k[cell], strict=True))
            score = 2.0 * math.tanh(case.params.scale * dot / 2.0)
            weight = math.exp(score + slope * float(case.mask[seq, token, cell]))
            total += weight
            weighted += weight * v[cell].astype(np.float64)
        np.testing.assert_allclose(got[seq, head, token], weighted / total, rtol=1e-12)


@pytest.mark.parametrize("path", [broadcast_attention, split_attention, expanded_attention])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_sees_nothing_gives_zeros(path: Callable[..., Floats], sinks: bool) -> None:
    case = make_case(8, n_kv=600, lengths=[0, 600], sinks=sinks)
    with np.errstate(all="raise", under="ignore"):
        got = path(*case.args)
    assert np.all(got[0] == 0)
    assert np.all(np.isfinite(got)) and np.any(got[1] != 0)
    assert np.all(case.reference[0] == 0)


@pytest.mark.parametrize("path", [broadcast_attention, split_attention])
def test_no_cells_at_all_gives_zeros(path: Callable[..., Floats]) -> None:
    case = make_case(8, n_kv=1, sinks=True)
    empty = (case.q, case.k[:, :, :0], case.v[:, :, :0], None, case.params)
    assert np.all(path(*empty) == 0)


def test_sinks_take_weight_and_add_nothing() -> None:
    """One cell with score 0 and a sink of ln 3: the cell keeps a quarter."""
    q = np.zeros((1, 2, 1, 4), np.float32)
    k, v = np.ones((1, 1, 1, 4), np.float32), np.ones((1, 1, 1, 4), np.float32)
    sinks = np.log(np.array([3, 1], np.float32))
    for path in (broadcast_attention, split_attention):
        got = path(q, k, v, None, AttentionParams(1.0, sinks=sinks))
        np.testing.assert_allclose(got[0, :, 0, 0], [0.25, 0.5], rtol=2 * EPS)


def test_softcap_bounds_scores() -> None:
    """Scores of ±1e4 capped at 1 are ±1: weights e / (e + 1/e)."""
    q = np.full((1, 1, 1, 1), 1e4, np.float32)
    k = np.array([1, -1], np.float32).reshape(1, 1, 2, 1)
    v = np.array([1, 0], np.float32).reshape(1, 1, 2, 1)
    for path in (broadcast_attention, split_attention):
        got = path(q, k, v, None, AttentionParams(1.0, softcap=1.0))
        np.testing.assert_allclose(got.item(), math.e / (math.e + 1 / math.e), rtol=4 * EPS)


def test_a_window_skips_what_it_does_not_see() -> None:
    case = make_case(30, n_kv=4000, lengths=[4000, 3000], window=100)
    near = (case.q, case.k[:, :, -2000:], case.v[:, :, -2000:])
    assert case.mask is not None
    want = reference_attention(*near, case.mask[:, :, -2000:], case.params)
    assert error(attention(*case.args), want) <= case.floor


@pytest.mark.parametrize(
    ("n_tokens", "n_kv", "path"),
    [
        (1, 512, "split_attention"),  # llama.cpp's number
        (1, 511, "broadcast_attention"),
        (2, 512, "broadcast_attention"),
    ],
)
def test_split_is_for_one_token_and_many_cells(
    n_tokens: int, n_kv: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    for name in ("split_attention", "broadcast_attention"):
        monkeypatch.setattr(attend, name, lambda *a, _name=name, **k: taken.append(_name))
    attention(*make_case(18, n_tokens=n_tokens, n_kv=n_kv).args)
    assert taken == [path]


def test_no_expanded_copy_is_made() -> None:
    case = make_case(20, n_seqs=1, group=8, n_kv=4096, head_dim=128, head_dim_v=128)
    expanded_bytes = 8 * (case.k.nbytes + case.v.nbytes)
    scores_bytes = 16 * 4096 * 4
    assert peak_bytes(lambda: expanded_attention(*case.args)) > expanded_bytes
    assert peak_bytes(lambda: broadcast_attention(*case.args)) < 2 * scores_bytes
    assert 2 * scores_bytes < case.k.nbytes / 4  # not even one copy of K
    assert peak_bytes(lambda: split_attention(*case.args)) < case.k.nbytes / 4


def test_prefill_scores_stay_within_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "SCORE_BYTES", 1 << 20)
    case = make_case(21, n_seqs=2, n_tokens=300, n_kv=1025, lengths=[1025, 800])
    peak = peak_bytes(lambda: broadcast_attention(*case.args))
    assert peak < (1 << 20) + 3 * case.q.nbytes
