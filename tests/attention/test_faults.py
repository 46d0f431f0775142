"""Seeded faults: the comparison that the tests of attention use must see each one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gguf_fuse.attention.attend import broadcast_attention
from gguf_fuse.attention.shapes import Floats
from gguf_fuse.attention.split import Partials, reduce_partials, split_attention, split_partials
from tests.attention.cases import Case, assert_as_good, cut, make_case


def must_be_caught(case: Case, wrong: Floats) -> None:
    plain = broadcast_attention(*case.args)
    assert_as_good(split_attention(*case.args), plain, case.reference, case.floor)
    with pytest.raises(AssertionError):
        assert_as_good(wrong, plain, case.reference, case.floor)


def test_fault_sinks_added_in_every_chunk() -> None:
    case = make_case(10, n_kv=1025, sinks=True)
    assert case.params.sinks is not None
    m, total, summed = split_partials(*case.args, chunks=cut(1025, [0.3, 0.6]))
    sinks = case.params.sinks.reshape(m.shape[2:])
    with_sink = np.maximum(m, sinks)
    rescale = np.exp(m - with_sink)
    total = total * rescale + np.exp(sinks - with_sink)
    wrong = Partials(with_sink, total, summed * rescale[..., None])
    must_be_caught(case, reduce_partials(wrong, None).reshape(case.reference.shape))


def test_fault_sinks_left_out() -> None:
    case = make_case(11, n_kv=1025, sinks=True)
    params = replace(case.params, sinks=None)
    must_be_caught(case, split_attention(case.q, case.k, case.v, case.mask, params))


def test_fault_batch_taken_for_one_sequence() -> None:
    """The seed's bug: Q reshaped with a batch axis of 1, so sequences become tokens."""
    case = make_case(12, n_seqs=2, n_kv=1025, lengths=[1025, 600])
    q = case.q.reshape(1, 6, 2, 16)
    mask = None if case.mask is None else case.mask[:1].repeat(2, axis=1)
    wrong = broadcast_attention(q, case.k[:1], case.v[:1], mask, case.params)
    must_be_caught(case, wrong.reshape(case.reference.shape))


def test_fault_other_sequence_length() -> None:
    case = make_case(13, n_seqs=2, n_kv=1025, lengths=[1025, 600])
    assert case.mask is not None
    must_be_caught(case, split_attention(*case.args[:3], case.mask[::-1], case.params))


def test_fault_one_future_token_visible() -> None:
    case = make_case(14, n_kv=1025, lengths=[700, 900])
    assert case.mask is not None
    mask = case.mask.copy()
    mask[0, 0, 700] = 0
    must_be_caught(case, split_attention(*case.args[:3], mask, case.params))


def test_fault_zero_as_maximum_of_a_masked_chunk() -> None:
    """True scores are all near -900, where exp(-900 - 0) is 0 and 0 / 0 is nan."""
    case = make_case(15, n_seqs=1, n_kv=1025, lengths=[600])
    k = np.abs(case.k) + 1
    q = -np.abs(case.q) - 1
    q *= np.float32(900 / np.abs(case.params.scale * (q[0, 0] @ k[0, 0].T)).max())
    case = replace(case, q=q, k=k)
    m, total, summed = split_partials(*case.args, chunks=[(0, 600), (600, 1025)])
    assert m[0, 0].max() < -200 and np.all(m[0, 1] == -np.inf)
    wrong = Partials(np.where(np.isneginf(m), np.float32(0), m), total, summed)
    must_be_caught(case, reduce_partials(wrong, None).reshape(case.reference.shape))


def test_fault_query_heads_on_the_wrong_kv_head() -> None:
    """h % n_head_kv instead of h // group."""
    case = make_case(16, n_kv=1025)
    order = np.arange(6).reshape(3, 2).T.ravel()
    must_be_caught(case, split_attention(case.q[:, order], *case.args[1:]))


def test_fault_one_chunk_not_reduced() -> None:
    case = make_case(17, n_kv=1025)
    partials = split_partials(*case.args, chunks=cut(1025, [0.5, 0.97]))
    wrong = Partials(*(part[:, :2] for part in partials))
    must_be_caught(case, reduce_partials(wrong, None).reshape(case.reference.shape))
