"""attention.py against float64, against slow code written here, and against seeded faults.

No test has a fixed tolerance: a float32 path may be at most twice as far from float64 as its
plain counterpart, plus a floor of a few roundings of the scores it had to compute.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import threadpoolctl  # type: ignore[import-untyped, unused-ignore]
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gguf_fuse import attention as at
from gguf_fuse.attention import AttentionParams, Floats, Linear, Rope
from tests.conftest import blas_threads

EPS = float(np.finfo(np.float32).eps)
ODD_LENGTHS = (97, 257, 1025)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)


# --- the comparison every test uses ----------------------------------------------------------


def error(got: Floats, reference: Floats) -> float:
    """Largest distance; nan and inf are infinitely far."""
    assert got.shape == reference.shape
    distance = np.abs(got.astype(np.float64) - reference)
    return float(np.max(np.where(np.isfinite(distance), distance, np.inf), initial=0.0))


def assert_as_good(got: Floats, plain: Floats, reference: Floats, floor: float) -> None:
    plain_error = error(plain, reference)
    assert plain_error <= 10 * floor, "the plain path itself is broken"
    assert error(got, reference) <= 2 * plain_error + floor


@dataclass(frozen=True)
class Case:
    """Inputs of one attention call."""

    q: Floats  # [n_seqs, n_head, n_tokens, head_dim]
    k: Floats  # [n_seqs, n_head_kv, n_kv, head_dim]
    v: Floats  # [n_seqs, n_head_kv, n_kv, head_dim_v]
    mask: Floats | None  # [n_seqs, n_tokens, n_kv]
    params: AttentionParams

    @property
    def args(self) -> tuple[Floats, Floats, Floats, Floats | None, AttentionParams]:
        return self.q, self.k, self.v, self.mask, self.params

    @property
    def reference(self) -> Floats:
        return at.reference_attention(*self.args)

    @property
    def floor(self) -> float:
        """What rounding q, k and their products costs: a score that is off by d moves each
        weight by up to 2d, and d is a rounding of the sum of |q_i k_i|."""
        terms = np.abs(at.group_heads(self.q, self.k.shape[1])) @ np.abs(
            self.k[:, :, None].swapaxes(-1, -2)
        )  # [n_seqs, n_head_kv, group, n_tokens, n_kv]
        magnitude = 1 + self.params.scale * float(np.max(terms, initial=0))
        return 4 * EPS * magnitude * float(np.max(np.abs(self.v), initial=0))


def make_case(
    seed: int,
    *,
    n_seqs: int = 2,
    n_head_kv: int = 2,
    group: int = 3,
    n_tokens: int = 1,
    n_kv: int = 257,
    head_dim: int = 16,
    head_dim_v: int = 16,
    top_score: float | None = None,
    sinks: bool = False,
    softcap: float = 0.0,
    max_alibi_bias: float = 0.0,
    lengths: list[int] | None = None,
    window: int | None = None,
) -> Case:
    """Random q, k, v. With lengths: each sequence fills so many cells, and its query tokens are
    its last ones. top_score: the largest |score| that occurs."""
    rng = rng_of(seed)
    n_head = n_head_kv * group
    q = normal(rng, n_seqs, n_head, n_tokens, head_dim)
    k = normal(rng, n_seqs, n_head_kv, n_kv, head_dim)
    v = normal(rng, n_seqs, n_head_kv, n_kv, head_dim_v)
    scale = head_dim**-0.5
    if top_score is not None:
        scores = at.group_heads(q, n_head_kv) @ k[:, :, None].swapaxes(-1, -2)
        q *= np.float32(top_score / (scale * np.abs(scores).max()))
    mask = None
    if lengths is not None:
        k_positions = at.padded_positions(lengths, n_kv)
        q_positions = np.array([[n - n_tokens + i for i in range(n_tokens)] for n in lengths])
        visible = at.see_past(q_positions, k_positions)
        if window is not None:
            visible &= at.see_window(q_positions, k_positions, window)
        mask = at.additive_mask(visible)
        if max_alibi_bias:
            mask = at.alibi_mask(visible, q_positions, k_positions)
    raw_sinks = normal(rng, n_head) * 3 if sinks else None
    return Case(q, k, v, mask, AttentionParams(scale, softcap, max_alibi_bias, raw_sinks))


@st.composite
def cases(draw: st.DrawFn, max_tokens: int = 1, max_kv: int = 1100) -> Case:
    n_seqs = draw(st.sampled_from((2, 1, 3)))
    n_kv = draw(st.one_of(st.sampled_from((1, *ODD_LENGTHS)), st.integers(1, max_kv)))
    masked = draw(st.booleans())
    return make_case(
        draw(st.integers(0, 2**32 - 1)),
        n_seqs=n_seqs,
        n_head_kv=draw(st.sampled_from((2, 1, 3))),
        group=draw(st.sampled_from((1, 2, 3, 4, 5, 6, 8, 17))),  # either side of MAX_GEMV_GROUP
        n_tokens=draw(st.integers(1, max_tokens)),
        n_kv=n_kv,
        head_dim=draw(st.sampled_from((2, 8, 33))),
        head_dim_v=draw(st.sampled_from((1, 8, 20))),
        top_score=draw(st.sampled_from((None, 30.0, 1e3, 1e4))),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from((0.0, 5.0))),
        max_alibi_bias=draw(st.sampled_from((0.0, 8.0))) if masked else 0.0,
        lengths=[n_kv - draw(st.integers(0, n_kv)) for _ in range(n_seqs)] if masked else None,
        window=draw(st.sampled_from((None, 1, 40))),
    )


def cut(n_kv: int, points: list[float]) -> list[tuple[int, int]]:
    """Chunks between any points of 0..1; equal points make empty chunks."""
    edges = [0, *sorted(round(p * n_kv) for p in points), n_kv]
    return list(itertools.pairwise(edges))


# --- split-KV, broadcast, expanded, reference ------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(cases(), st.lists(st.floats(0, 1), max_size=9), st.integers(1, 3), st.booleans())
def test_split_equals_plain_for_any_chunks(
    case: Case, points: list[float], threads: int, in_place: bool
) -> None:
    reference = case.reference
    plain = at.broadcast_attention(*case.args)
    chunks = cut(case.k.shape[2], points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, "_reads_in_place", lambda: in_place)  # as on other processors
        for split in (
            at.split_attention(*case.args, chunks=chunks, n_threads=threads),
            at.split_attention(*case.args, n_threads=threads),
        ):
            assert split.dtype == np.float32
            assert_as_good(split, plain, reference, case.floor)


@settings(max_examples=300, deadline=None)
@given(cases(max_tokens=7, max_kv=300))
def test_broadcast_equals_expanded(case: Case) -> None:
    expanded = at.expanded_attention(*case.args)
    assert_as_good(at.broadcast_attention(*case.args), expanded, case.reference, case.floor)


@pytest.mark.parametrize("n_kv", [1, 511, 512, 513, *ODD_LENGTHS])
@pytest.mark.parametrize(
    ("n_head_kv", "group"), [(1, 8), (2, 4), (2, 7), (6, 1)], ids=["mqa", "gqa4", "gqa7", "mha"]
)
def test_every_path_agrees(n_kv: int, n_head_kv: int, group: int) -> None:
    case = make_case(
        1, n_head_kv=n_head_kv, group=group, n_kv=n_kv, head_dim=64, head_dim_v=48, sinks=True
    )
    plain = at.expanded_attention(*case.args)
    assert plain.shape == (2, n_head_kv * group, 1, 48)
    for got in (at.attention(*case.args), at.split_attention(*case.args, n_threads=2)):
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
    expanded = at.expanded_attention(*case.args)
    for path in (at.broadcast_attention, at.attention):  # n_tokens 1: attention is split
        assert_as_good(path(*case.args), expanded, case.reference, case.floor)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("group", "cells"), [(1, (256, 256)), (4, (256, 256)), (8, (256, 128))])
def test_large_tiles_and_planned_chunks(
    group: int, cells: tuple[int, int], in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real head sizes: several chunks of several tiles, and odd cells at the end."""
    monkeypatch.setattr(at, "_reads_in_place", lambda: in_place)
    case = make_case(2, n_seqs=1, n_kv=6001, head_dim=128, head_dim_v=128, group=group)
    tile = at._tile_cells(group, case.k, case.v)
    assert tile == cells[in_place]
    assert len(at.plan_chunks(6001, tile, 512, 2048, 2)) > 2 and 6001 % tile
    plain = at.broadcast_attention(*case.args)
    assert_as_good(at.split_attention(*case.args, n_threads=2), plain, case.reference, case.floor)


@pytest.mark.parametrize(
    ("architecture", "in_place"), [("SkylakeX", True), ("Haswell", False), (None, False)]
)
def test_the_kernels_of_blas_are_known_by_name(
    architecture: str | None, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = {"user_api": "blas"} if architecture is None else {"architecture": architecture}
    monkeypatch.setattr(at, "_blas", lambda: SimpleNamespace(info=lambda: [library]))
    assert at._reads_in_place.__wrapped__() is in_place


def plans(most_cells: int) -> st.SearchStrategy[tuple[int, int, int, int, int]]:
    """Arguments of plan_chunks."""
    cells, threads = st.integers(0, most_cells), st.integers(1, 64)
    return st.tuples(
        cells, st.integers(1, 300), st.integers(1, 4000), st.integers(1, 9000), threads
    )


@given(plans(most_cells=5000))
def test_planned_chunks_cover_every_cell_once(plan: tuple[int, int, int, int, int]) -> None:
    n_kv, tile, shortest, longest, _ = plan
    chunks = at.plan_chunks(*plan)
    assert [cell for start, end in chunks for cell in range(start, end)] == list(range(n_kv))
    assert all(0 < end - start <= max(tile, longest) for start, end in chunks)
    least = min(shortest, longest // tile * tile)
    assert all(end - start >= least for start, end in chunks[:-2])  # the last, and the odd cells


@given(plans(most_cells=50000))
def test_threads_that_take_planned_chunks_end_together(
    plan: tuple[int, int, int, int, int],
) -> None:
    _, tile, shortest, _, threads = plan
    ends = [0] * threads  # in cells
    for start, end in at.plan_chunks(*plan):
        ends[ends.index(min(ends))] += end - start  # who is free takes the next
    assert max(ends) - min(ends) <= shortest + 2 * tile  # rounded to tiles, and the odd cells


@pytest.mark.parametrize("path", [at.broadcast_attention, at.split_attention, at.attention])
def test_a_sequence_gives_the_same_alone_and_in_a_batch(path: Callable[..., Floats]) -> None:
    lengths = [700, 1025, 3, 0]
    case = make_case(3, n_seqs=4, n_kv=1025, lengths=lengths, sinks=True)
    batch = path(*case.args)
    for seq, length in enumerate(lengths):
        alone = (case.q[seq : seq + 1], case.k[seq : seq + 1, :, :length])
        reference = at.reference_attention(
            *alone, case.v[seq : seq + 1, :, :length], None, case.params
        )
        assert error(batch[seq : seq + 1], reference) <= case.floor


def test_prefill_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(4, n_tokens=50, n_kv=97, lengths=[97, 60], sinks=True, max_alibi_bias=8)
    plain = at.broadcast_attention(*case.args)
    monkeypatch.setattr(at, "SCORE_BYTES", 7 * 6 * 97 * 4)  # seven tokens at a time
    assert_as_good(at.broadcast_attention(*case.args), plain, case.reference, case.floor)


def test_decode_continues_prefill() -> None:
    """The last token of a causal prompt, and the same token decoded alone."""
    case = make_case(5, n_tokens=97, n_kv=97, lengths=[97, 97])
    last = at.attention(case.q[:, :, -1:], case.k, case.v, None, case.params)
    assert error(last, case.reference[:, :, -1:]) <= case.floor


def test_float64_stays_float64() -> None:
    case = make_case(6, n_kv=600, sinks=True, softcap=5.0)
    q, k, v = (x.astype(np.float64) for x in (case.q, case.k, case.v))
    for path in (at.broadcast_attention, at.split_attention):
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
        slope = at.alibi_slopes(6, 8)[head]
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


# --- nothing visible, sinks, softcap ---------------------------------------------------------


@pytest.mark.parametrize(
    "path", [at.broadcast_attention, at.split_attention, at.expanded_attention]
)
@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_that_sees_nothing_gives_zeros(path: Callable[..., Floats], sinks: bool) -> None:
    case = make_case(8, n_kv=600, lengths=[0, 600], sinks=sinks)
    with np.errstate(all="raise", under="ignore"):
        got = path(*case.args)
    assert np.all(got[0] == 0)
    assert np.all(np.isfinite(got)) and np.any(got[1] != 0)
    assert np.all(case.reference[0] == 0)


@pytest.mark.parametrize("path", [at.broadcast_attention, at.split_attention])
def test_no_cells_at_all_gives_zeros(path: Callable[..., Floats]) -> None:
    case = make_case(8, n_kv=1, sinks=True)
    empty = (case.q, case.k[:, :, :0], case.v[:, :, :0], None, case.params)
    assert np.all(path(*empty) == 0)


def test_a_masked_chunk_carries_minus_infinity() -> None:
    case = make_case(9, n_kv=600, lengths=[100, 600])
    partials = at.split_partials(*case.args, chunks=[(0, 200), (200, 200), (200, 600)])
    for seq, chunk in ((0, 1), (0, 2), (1, 1)):  # masked or empty
        assert np.all(partials.m[seq, chunk] == -np.inf)
        assert np.all(partials.total[seq, chunk] == 0)
        assert np.all(partials.summed[seq, chunk] == 0)
    assert np.all(np.isfinite(partials.m[:, 0])) and np.all(np.isfinite(partials.m[1, 2]))


def test_sinks_take_weight_and_add_nothing() -> None:
    """One cell with score 0 and a sink of ln 3: the cell keeps a quarter."""
    q = np.zeros((1, 2, 1, 4), np.float32)
    k, v = np.ones((1, 1, 1, 4), np.float32), np.ones((1, 1, 1, 4), np.float32)
    sinks = np.log(np.array([3, 1], np.float32))
    for path in (at.broadcast_attention, at.split_attention):
        got = path(q, k, v, None, AttentionParams(1.0, sinks=sinks))
        np.testing.assert_allclose(got[0, :, 0, 0], [0.25, 0.5], rtol=2 * EPS)


def test_softcap_bounds_scores() -> None:
    """Scores of ±1e4 capped at 1 are ±1: weights e / (e + 1/e)."""
    q = np.full((1, 1, 1, 1), 1e4, np.float32)
    k = np.array([1, -1], np.float32).reshape(1, 1, 2, 1)
    v = np.array([1, 0], np.float32).reshape(1, 1, 2, 1)
    for path in (at.broadcast_attention, at.split_attention):
        got = path(q, k, v, None, AttentionParams(1.0, softcap=1.0))
        np.testing.assert_allclose(got.item(), math.e / (math.e + 1 / math.e), rtol=4 * EPS)


# --- seeded faults: the comparison above must see each one -----------------------------------


def must_be_caught(case: Case, wrong: Floats) -> None:
    plain = at.broadcast_attention(*case.args)
    assert_as_good(at.split_attention(*case.args), plain, case.reference, case.floor)
    with pytest.raises(AssertionError):
        assert_as_good(wrong, plain, case.reference, case.floor)


def test_fault_sinks_added_in_every_chunk() -> None:
    case = make_case(10, n_kv=1025, sinks=True)
    assert case.params.sinks is not None
    m, total, summed = at.split_partials(*case.args, chunks=cut(1025, [0.3, 0.6]))
    sinks = case.params.sinks.reshape(m.shape[2:])
    with_sink = np.maximum(m, sinks)
    rescale = np.exp(m - with_sink)
    total = total * rescale + np.exp(sinks - with_sink)
    wrong = at.Partials(with_sink, total, summed * rescale[..., None])
    must_be_caught(case, at.reduce_partials(wrong, None).reshape(case.reference.shape))


def test_fault_sinks_left_out() -> None:
    case = make_case(11, n_kv=1025, sinks=True)
    params = replace(case.params, sinks=None)
    must_be_caught(case, at.split_attention(case.q, case.k, case.v, case.mask, params))


def test_fault_batch_taken_for_one_sequence() -> None:
    """The seed's bug: Q reshaped with a batch axis of 1, so sequences become tokens."""
    case = make_case(12, n_seqs=2, n_kv=1025, lengths=[1025, 600])
    q = case.q.reshape(1, 6, 2, 16)
    mask = None if case.mask is None else case.mask[:1].repeat(2, axis=1)
    wrong = at.broadcast_attention(q, case.k[:1], case.v[:1], mask, case.params)
    must_be_caught(case, wrong.reshape(case.reference.shape))


def test_fault_other_sequence_length() -> None:
    case = make_case(13, n_seqs=2, n_kv=1025, lengths=[1025, 600])
    assert case.mask is not None
    must_be_caught(case, at.split_attention(*case.args[:3], case.mask[::-1], case.params))


def test_fault_one_future_token_visible() -> None:
    case = make_case(14, n_kv=1025, lengths=[700, 900])
    assert case.mask is not None
    mask = case.mask.copy()
    mask[0, 0, 700] = 0
    must_be_caught(case, at.split_attention(*case.args[:3], mask, case.params))


def test_fault_zero_as_maximum_of_a_masked_chunk() -> None:
    """True scores are all near -900, where exp(-900 - 0) is 0 and 0 / 0 is nan."""
    case = make_case(15, n_seqs=1, n_kv=1025, lengths=[600])
    k = np.abs(case.k) + 1
    q = -np.abs(case.q) - 1
    q *= np.float32(900 / np.abs(case.params.scale * (q[0, 0] @ k[0, 0].T)).max())
    case = replace(case, q=q, k=k)
    m, total, summed = at.split_partials(*case.args, chunks=[(0, 600), (600, 1025)])
    assert m[0, 0].max() < -200 and np.all(m[0, 1] == -np.inf)
    wrong = at.Partials(np.where(np.isneginf(m), np.float32(0), m), total, summed)
    must_be_caught(case, at.reduce_partials(wrong, None).reshape(case.reference.shape))


def test_fault_query_heads_on_the_wrong_kv_head() -> None:
    """h % n_head_kv instead of h // group."""
    case = make_case(16, n_kv=1025)
    order = np.arange(6).reshape(3, 2).T.ravel()
    must_be_caught(case, at.split_attention(case.q[:, order], *case.args[1:]))


def test_fault_one_chunk_not_reduced() -> None:
    case = make_case(17, n_kv=1025)
    partials = at.split_partials(*case.args, chunks=cut(1025, [0.5, 0.97]))
    wrong = at.Partials(*(part[:, :2] for part in partials))
    must_be_caught(case, at.reduce_partials(wrong, None).reshape(case.reference.shape))


# --- dispatch, threads, memory ---------------------------------------------------------------


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
        monkeypatch.setattr(at, name, lambda *a, _name=name, **k: taken.append(_name))
    at.attention(*make_case(18, n_tokens=n_tokens, n_kv=n_kv).args)
    assert taken == [path]


def test_blas_has_one_thread_inside_and_its_own_number_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside: list[list[int]] = []
    attend_chunk = at._attend_chunk

    def spy(*args: Any) -> None:
        inside.append(blas_threads())
        attend_chunk(*args)

    monkeypatch.setattr(at, "_attend_chunk", spy)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        at.split_attention(*make_case(19, n_kv=1025).args, n_threads=2)
        assert blas_threads() == before
    assert inside and all(set(threads) == {1} for threads in inside)


THREE_CHUNKS = cut(1025, [0.3, 0.6])


def test_threads_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits in its chunk for the others."""
    meeting, names = threading.Barrier(3, timeout=10), set[str]()
    attend_chunk = at._attend_chunk

    def spy(*args: Any) -> None:
        meeting.wait()
        names.add(threading.current_thread().name)
        attend_chunk(*args)

    monkeypatch.setattr(at, "_attend_chunk", spy)
    case = make_case(18, n_seqs=1, n_kv=1025)
    got = at.split_attention(*case.args, chunks=THREE_CHUNKS, n_threads=3)
    assert len(names) == 3
    assert error(got, case.reference) <= case.floor


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_in_one_helper_alone_reaches_the_caller(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Helpers that do nothing but end, one of them badly; the caller does all the work."""

    submitted = itertools.count()

    def submit(work: Callable[[], None]) -> Future[None]:
        future = Future[None]()
        broken = next(submitted) == number
        future.set_exception(RuntimeError("broken helper") if broken else None)
        return future

    monkeypatch.setattr(at, "_pool", lambda n_workers: SimpleNamespace(submit=submit))
    case = make_case(18, n_seqs=1, n_kv=1025)
    with pytest.raises(RuntimeError, match="broken helper"):
        at.split_attention(*case.args, chunks=THREE_CHUNKS, n_threads=3)


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("broken chunk")

    before = blas_threads()
    monkeypatch.setattr(at, "_attend_chunk", fail)
    with pytest.raises(RuntimeError, match="broken chunk"):
        at.split_attention(*make_case(19, n_kv=1025).args, n_threads=3)
    assert blas_threads() == before


def peak_bytes(work: Callable[[], object]) -> int:
    work()  # pools and caches that stay are not what is measured
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_no_expanded_copy_is_made() -> None:
    case = make_case(20, n_seqs=1, group=8, n_kv=4096, head_dim=128, head_dim_v=128)
    expanded_bytes = 8 * (case.k.nbytes + case.v.nbytes)
    scores_bytes = 16 * 4096 * 4
    assert peak_bytes(lambda: at.expanded_attention(*case.args)) > expanded_bytes
    assert peak_bytes(lambda: at.broadcast_attention(*case.args)) < 2 * scores_bytes
    assert 2 * scores_bytes < case.k.nbytes / 4  # not even one copy of K
    assert peak_bytes(lambda: at.split_attention(*case.args)) < case.k.nbytes / 4


def test_prefill_scores_stay_within_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at, "SCORE_BYTES", 1 << 20)
    case = make_case(21, n_seqs=2, n_tokens=300, n_kv=1025, lengths=[1025, 800])
    peak = peak_bytes(lambda: at.broadcast_attention(*case.args))
    assert peak < (1 << 20) + 3 * case.q.nbytes


@pytest.mark.parametrize("n_kv", [16384, 65536])
def test_split_temporaries_do_not_grow_with_n_kv(n_kv: int) -> None:
    """Beyond partials of n_chunks * n_head * (head_dim_v + 2), only one chunk per thread."""
    case = make_case(22, n_seqs=1, n_kv=n_kv, head_dim=32, head_dim_v=32)
    chunks = [(i, i + 1024) for i in range(0, n_kv, 1024)]
    decode = functools.partial(at.split_attention, *case.args, chunks, 2)
    partials = 2 * len(chunks) * 6 * (32 + 4) * 4  # and their reduction
    assert peak_bytes(decode) - partials < 4 * (1024 * 6 * 4)  # two threads' scores, twice


# --- projections -----------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 70)] * 3),
    st.sampled_from((None, 0.37)),
    st.booleans(),
    st.sampled_from((0.0, 1.5)),
    st.integers(1, 17),
)
def test_fused_projection_equals_separate(
    seed: int,
    rows: tuple[int, int, int],
    scale: float | None,
    with_bias: bool,
    clamp: float,
    n_tokens: int,
) -> None:
    rng = rng_of(seed)
    x = normal(rng, 2, n_tokens, 97)
    weights = [normal(rng, n, 97) / 10 for n in rows]
    biases = [normal(rng, n) if with_bias else None for n in rows]
    separate = [Linear(w, scale, b) for w, b in zip(weights, biases, strict=True)]
    bias = np.concatenate([b for b in biases if b is not None]) if with_bias else None
    fused = Linear(np.concatenate(weights), scale, bias)
    plain = at.project_separate(x, separate[0], separate[1], separate[2], clamp)
    for got, one, w in zip(at.project_fused(x, fused, rows, clamp), plain, separate, strict=True):
        reference = x.astype(np.float64) @ w.weight.astype(np.float64).T
        reference = reference * (1 if scale is None else scale)
        reference = reference + (0 if w.bias is None else w.bias)
        if clamp:
            reference = np.clip(reference, -clamp, clamp)
        floor = 4 * EPS * float(np.max(np.abs(x) @ np.abs(w.weight.T)))
        assert_as_good(got, one, reference, floor)


def test_scale_comes_before_bias_and_clamp_after() -> None:
    x = np.array([[[2.0]]], np.float32)
    weight, bias = np.array([[3.0], [-5.0], [1.0]], np.float32), np.ones(3, np.float32)
    got = at.project(x, weight, 0.5, bias, clamp=3.5)
    assert got.tolist() == [[[3.5, -3.5, 2.0]]]  # 2·3·0.5 + 1 = 4, -4, 2
    assert x.item() == 2.0


def test_rows_split_at_offsets_not_thirds() -> None:
    y = np.arange(12, dtype=np.float32).reshape(1, 1, 12)
    q, k, v = at.split_rows(y, (8, 3, 1))
    assert (q.shape[-1], k.tolist(), v.tolist()) == (8, [[[8, 9, 10]]], [[[11]]])
    assert all(np.shares_memory(part, y) for part in (q, k, v))


def test_heads_and_back() -> None:
    y = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)
    heads = at.split_heads(y, 4)
    assert heads.shape == (2, 4, 3, 2) and np.shares_memory(heads, y)
    assert heads[1, 2, 0].tolist() == y[1, 0, 4:6].tolist()  # heads are contiguous rows
    np.testing.assert_array_equal(at.join_heads(heads), y)


def test_packed_gate() -> None:
    q_and_gate = normal(rng_of(23), 1, 2, 3, 8)  # [n_seqs, n_head, n_tokens, 2 * head_dim]
    q, gate = at.split_gate(q_and_gate)
    np.testing.assert_array_equal(np.concatenate([q, gate], axis=-1), q_and_gate)
    want = q / (1 + np.exp(-gate.astype(np.float64)))
    np.testing.assert_allclose(at.apply_gate(q, gate), want, rtol=8 * EPS, atol=EPS)
    with np.errstate(all="raise"):
        assert at.apply_gate(q[:, :, :, :1], np.full((1, 2, 3, 1), -1e4, np.float32)).max() == 0


# --- norms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", ["shared", "own", "none"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_per_head_against_loops(kind: str, per_head: str) -> None:
    rng = rng_of(24)
    x = normal(rng, 2, 3, 5, 33) * 4 + 1  # [n_seqs, n_head, n_tokens, head_dim]
    weight = {"shared": normal(rng, 33), "own": normal(rng, 3, 33), "none": None}[per_head]
    bias = None if weight is None else weight + 1
    eps = 1e-5
    got = at.rms_norm(x, weight, eps) if kind == "rms" else at.layer_norm(x, weight, bias, eps)
    assert got.dtype == np.float32
    for seq, head, token in np.ndindex(2, 3, 5):
        row = [float(value) for value in x[seq, head, token]]
        mean = 0.0 if kind == "rms" else math.fsum(row) / 33
        centred = [value - mean for value in row]
        root = math.sqrt(math.fsum(value * value for value in centred) / 33 + eps)
        want = np.array([value / root for value in centred])
        if weight is not None:
            own = weight[head] if weight.ndim == 2 else weight
            want = want * own + (0 if kind == "rms" else own + 1)
        np.testing.assert_allclose(got[seq, head, token], want, rtol=16 * EPS, atol=16 * EPS)


def test_norm_of_a_whole_row_is_not_per_head() -> None:
    rng = rng_of(25)
    y, weight = normal(rng, 2, 5, 12), normal(rng, 12)  # [n_seqs, n_tokens, rows], [rows]
    y[..., :4] *= 10
    whole = at.split_heads(at.rms_norm(y, weight, 1e-6), 3)
    per_head = at.rms_norm(at.split_heads(y, 3), weight.reshape(3, 4), 1e-6)
    root = np.sqrt(np.mean(y.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(at.join_heads(whole), y / root * weight, rtol=16 * EPS)
    assert np.abs(whole - per_head).max() > 0.1


# --- RoPE ------------------------------------------------------------------------------------


def slow_rope(x: Floats, positions: NDArray[np.int64], rope: Rope) -> Floats:
    """Element by element, as the kernel is written: theta by repeated multiplication."""
    y = x.astype(np.float64)
    for seq, head, token in np.ndindex(*x.shape[:3]):
        theta_scale = rope.freq_base ** (-2.0 / rope.n_rot)
        theta_base = float(positions[seq, token])
        for j in range(rope.n_rot // 2):
            extrapolated = theta_base
            if rope.freq_factors is not None:
                extrapolated /= float(rope.freq_factors[j])
            theta, m = rope.freq_scale * extrapolated, rope.attn_factor
            if rope.ext_factor:
                edges = [
                    rope.n_rot
                    * math.log(rope.n_ctx_orig / (beta * 2 * math.pi))
                    / (2 * math.log(rope.freq_base))
                    for beta in (rope.beta_fast, rope.beta_slow)
                ]
                low, high = max(0, math.floor(edges[0])), min(rope.n_rot - 1, math.ceil(edges[1]))
                mix = rope.ext_factor * (1 - min(1, max(0, (j - low) / max(0.001, high - low))))
                theta = theta * (1 - mix) + extrapolated * mix
                m *= 1 + 0.1 * math.log(1 / rope.freq_scale)
            low_index, high_index = (2 * j, 2 * j + 1)
            if rope.layout != "norm":
                low_index, high_index = j, j + rope.n_rot // 2
            a, b = float(x[seq, head, token, low_index]), float(x[seq, head, token, high_index])
            y[seq, head, token, low_index] = m * (a * math.cos(theta) - b * math.sin(theta))
            y[seq, head, token, high_index] = m * (a * math.sin(theta) + b * math.cos(theta))
            theta_base *= theta_scale
    return y


FACTORS = np.linspace(1, 8, 6, dtype=np.float32)
YARN = {"freq_scale": 0.25, "ext_factor": 1.0, "n_ctx_orig": 512}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"freq_scale": 0.25},
    "factors": {"freq_factors": FACTORS},
    "yarn": {**YARN, "attn_factor": 0.9},
    "yarn with factors": {**YARN, "freq_factors": FACTORS, "beta_fast": 16.0},
    "attn_factor alone": {"attn_factor": 1.19},
}


@pytest.mark.parametrize("options", ROPES.values(), ids=ROPES.keys())
@pytest.mark.parametrize("layout", ["norm", "neox"])
@pytest.mark.parametrize("head_dim", [12, 17])
def test_rope_against_the_slow_one(layout: Any, options: dict[str, Any], head_dim: int) -> None:
    rope = Rope(layout, n_rot=12, freq_base=1000.0, **options)
    x = normal(rng_of(26), 2, 3, 4, head_dim)  # head_dim 17: partial rotation
    positions = np.array([[0, 1, 2, 3], [97, 257, 1025, 4000]])  # sequences of different length
    got = at.apply_rope(x, positions, rope)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, slow_rope(x, positions, rope), rtol=0, atol=16 * EPS)
    np.testing.assert_array_equal(got[..., 12:], x[..., 12:])  # copied, not scaled by m


@pytest.mark.parametrize("layout", ["norm", "neox"])
def test_rope_keeps_length_and_depends_on_distance_only(layout: Any) -> None:
    rope = Rope(layout, n_rot=16)
    q, k = rng_of(27).standard_normal((2, 1, 1, 1, 16))

    def turned(x: Floats, position: int) -> Floats:
        return at.apply_rope(x, np.array([[position]]), rope).ravel()

    np.testing.assert_array_equal(turned(q, 0), q.ravel())
    assert math.isclose(np.linalg.norm(turned(q, 1025)), np.linalg.norm(q), rel_tol=1e-12)
    near, far = turned(q, 40) @ turned(k, 33), turned(q, 1040) @ turned(k, 1033)
    assert math.isclose(near, far, rel_tol=1e-9)
    assert not math.isclose(near, turned(q, 40) @ turned(k, 34), rel_tol=1e-3)


def test_layouts_are_permutations_of_each_other() -> None:
    x = normal(rng_of(28), 1, 2, 3, 8)
    positions = np.array([[5, 6, 7]])
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # norm's pairs, as neox wants them
    norm = at.apply_rope(x, positions, Rope("norm", 8))
    neox = at.apply_rope(x[..., order], positions, Rope("neox", 8))
    np.testing.assert_array_equal(norm[..., order], neox)


def test_mrope_in_text_is_neox_but_for_the_fourth_section() -> None:
    x = normal(rng_of(29), 1, 2, 3, 16)
    positions = np.array([[5, 6, 7]])
    neox = at.apply_rope(x, positions, Rope("neox", 16))
    # imrope: the pairs take t, h, w in turn, each while j < 3 · its section; else the fourth.
    mrope = (Rope("mrope", 16, sections=(2, 2, 2, 2)), [6, 7])
    imrope = (Rope("imrope", 16, sections=(3, 1, 2, 2)), [4, 7])
    for rope, still in (mrope, imrope):
        got = at.apply_rope(x, positions, rope)
        both = [*still, *(j + 8 for j in still)]
        rest = [i for i in range(16) if i not in both]
        np.testing.assert_array_equal(got[..., both], x[..., both])
        np.testing.assert_array_equal(got[..., rest], neox[..., rest])


@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
def test_context_counts_the_yarn_factor_once(factor: float) -> None:
    rope_multiplies_by = 1 + 0.1 * math.log(factor)
    net = at.context_attn_factor(1 / factor, 1.0) * rope_multiplies_by
    assert math.isclose(net, 1 + 0.1 * math.log(factor))
    net = at.context_attn_factor(1 / factor, 1.0, yarn_log_mul=1.0) * rope_multiplies_by
    assert math.isclose(net, 1.0)
    assert at.context_attn_factor(1 / factor, 0.0, 1.5) == 1.5
    assert math.isclose(
        at.context_attn_factor(1 / factor, 1.0, 1.5), 1.5 * at.context_attn_factor(1 / factor, 1.0)
    )


# --- masks -----------------------------------------------------------------------------------


def test_masks_say_who_sees_whom() -> None:
    q_positions = np.array([[4, 5], [1, 2]])
    k_positions = at.padded_positions([6, 3], 7)
    assert k_positions.tolist() == [[0, 1, 2, 3, 4, 5, -1], [0, 1, 2, -1, -1, -1, -1]]

    def seen(visible: NDArray[np.bool_]) -> list[list[list[int]]]:
        return [[np.flatnonzero(row).tolist() for row in rows] for rows in visible]

    past = at.see_past(q_positions, k_positions)
    assert seen(past) == [[[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]], [[0, 1], [0, 1, 2]]]
    window = past & at.see_window(q_positions, k_positions, 2)
    assert seen(window) == [[[3, 4], [4, 5]], [[0, 1], [1, 2]]]
    chunk = past & at.see_chunk(q_positions, k_positions, 4)
    assert seen(chunk) == [[[4], [4, 5]], [[0, 1], [0, 1, 2]]]
    everything = at.see_filled(q_positions, k_positions)
    assert seen(everything) == [[[0, 1, 2, 3, 4, 5]] * 2, [[0, 1, 2]] * 2]


def test_masks_as_numbers() -> None:
    q_positions, k_positions = np.array([[2]]), np.array([[0, 1, 2, 3, -1]])
    visible = at.see_past(q_positions, k_positions)
    inf = np.inf
    assert at.additive_mask(visible).tolist() == [[[0, 0, 0, -inf, -inf]]]
    assert at.alibi_mask(visible, q_positions, k_positions).tolist() == [[[-2, -1, 0, -inf, -inf]]]
    visible = at.see_filled(q_positions, k_positions)
    assert at.alibi_mask(visible, q_positions, k_positions)[0, 0, 3] == -1  # both directions


def test_a_window_skips_what_it_does_not_see() -> None:
    case = make_case(30, n_kv=4000, lengths=[4000, 3000], window=100)
    near = (case.q, case.k[:, :, -2000:], case.v[:, :, -2000:])
    assert case.mask is not None
    want = at.reference_attention(*near, case.mask[:, :, -2000:], case.params)
    assert error(at.attention(*case.args), want) <= case.floor


def test_alibi_slopes() -> None:
    assert at.alibi_slopes(8, 8).tolist() == [2.0**-i for i in range(1, 9)]
    # Not a power of two: 8 as above, then every other slope of 16 heads (ALiBi's own rule).
    sixteen = at.alibi_slopes(16, 8)
    assert at.alibi_slopes(12, 8).tolist() == [*at.alibi_slopes(8, 8), *sixteen[:8:2]]
    assert at.alibi_slopes(5, 0).tolist() == [1] * 5
    assert at.alibi_slopes(1, 8).tolist() == [2.0**-8]


# --- wrong arguments -------------------------------------------------------------------------


def bad_attention(**changes: Any) -> Callable[[], object]:
    good = make_case(31, n_kv=600)
    return lambda: at.attention(*replace(good, **changes).args)


F32 = np.float32
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "q axes": (bad_attention(q=np.zeros((2, 6, 16), F32)), r"q: expected \(n_seqs, heads"),
    "k heads": (bad_attention(k=np.zeros((2, 4, 600, 16), F32)), "k: expected n_head_kv to divide"),
    "k dim": (
        bad_attention(k=np.zeros((2, 2, 600, 8), F32)),
        r"k: expected shape \(2, 2, 600, 16\)",
    ),
    "v cells": (bad_attention(v=np.zeros((2, 2, 599, 16), F32)), r"v: expected shape \(2, 2, 600"),
    "v type": (bad_attention(v=np.zeros((2, 2, 600, 16))), "v: expected float32 like q"),
    "f16": (bad_attention(q=np.zeros((2, 6, 1, 16), np.float16)), "q: expected float32 or float64"),
    "mask": (bad_attention(mask=np.zeros((2, 600), F32)), r"mask: expected shape \(2, 1, 600\)"),
    "sinks": (
        bad_attention(params=AttentionParams(1.0, sinks=np.zeros(2, F32))),
        r"sinks: expected shape \(6,\)",
    ),
    "two tokens": (
        lambda: at.split_attention(*make_case(0, n_tokens=2).args),
        "expects n_tokens 1, got 2",
    ),
    "threads": (lambda: at.split_attention(*make_case(0).args, n_threads=0), "at least 1, got 0"),
    "threads of a runtime": (
        lambda: at.attention(*make_case(0, n_kv=512).args, n_threads=0),
        "at least 1, got 0",
    ),
    "chunk gap": (
        lambda: at.split_attention(*make_case(0).args, chunks=[(0, 9), (10, 257)]),
        "range from 9 on",
    ),
    "chunk end": (
        lambda: at.split_attention(*make_case(0).args, chunks=[(0, 9)]),
        "expected to end at n_kv 257, got 9",
    ),
    "weight": (
        lambda: at.project(np.zeros((1, 1, 4), F32), np.zeros((3, 5), F32)),
        r"weight: expected shape \(rows, 4\), got \(3, 5\)",
    ),
    "bias": (
        lambda: at.project(np.zeros((1, 1, 4), F32), np.zeros((3, 4), F32), bias=np.zeros(4, F32)),
        r"bias: expected shape \(3,\)",
    ),
    "rows": (
        lambda: at.split_rows(np.zeros((1, 9), F32), (4, 4, 4)),
        "expected a sum of 9, got 12",
    ),
    "heads": (lambda: at.split_heads(np.zeros((1, 1, 9), F32), 2), r"2 \* head_dim"),
    "join": (lambda: at.join_heads(np.zeros((1, 9), F32)), "x: expected"),
    "group": (lambda: at.group_heads(np.zeros((1, 3, 1, 2), F32), 2), "multiple of 2, got 3"),
    "gate": (lambda: at.split_gate(np.zeros((1, 3), F32)), "even last axis"),
    "norm": (
        lambda: at.rms_norm(np.zeros((1, 2, 3, 4), F32), np.zeros(3, F32), 1e-6),
        r"weight: expected shape \(4,\) or \(2, 4\), got \(3,\)",
    ),
    "odd n_rot": (lambda: Rope("norm", 5), "n_rot: expected an even number"),
    "factors": (
        lambda: Rope("norm", 4, freq_factors=np.ones(4, F32)),
        r"freq_factors: expected shape \(2,\)",
    ),
    "yarn": (lambda: Rope("norm", 4, ext_factor=1.0), "n_ctx_orig: expected > 0"),
    "sections": (lambda: Rope("mrope", 4), "sections: expected a positive sum"),
    "rope dim": (
        lambda: at.apply_rope(np.zeros((1, 1, 1, 4), F32), np.zeros((1, 1), int), Rope("norm", 8)),
        "x: expected .* >= 8",
    ),
    "positions": (
        lambda: at.apply_rope(np.zeros((1, 1, 2, 8), F32), np.zeros((1, 1), int), Rope("norm", 8)),
        r"positions: expected shape \(1, 2\)",
    ),
    "lengths": (lambda: at.padded_positions([3, 9], 8), "at most 8, got 9"),
    "grid": (lambda: at.see_past(np.zeros(3, int), np.zeros((1, 3), int)), "positions: expected"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_errors_name_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
