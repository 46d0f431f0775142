"""Split-KV decode: any chunks give the same, and how chunks are planned."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_fuse.attention import split
from gguf_fuse.attention.attend import broadcast_attention
from gguf_fuse.attention.shapes import Sizes
from gguf_fuse.attention.split import plan_chunks, split_attention, split_partials
from tests.attention.cases import Case, assert_as_good, cases, cut, make_case, peak_bytes


@settings(max_examples=400, deadline=None)
@given(cases(), st.lists(st.floats(0, 1), max_size=9), st.integers(1, 3), st.booleans())
def test_split_equals_plain_for_any_chunks(
    case: Case, points: list[float], threads: int, in_place: bool
) -> None:
    reference = case.reference
    plain = broadcast_attention(*case.args)
    chunks = cut(case.k.shape[2], points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_reads_in_place", lambda: in_place)  # as on other processors
        for decoded in (
            split_attention(*case.args, chunks=chunks, n_threads=threads),
            split_attention(*case.args, n_threads=threads),
        ):
            assert decoded.dtype == np.float32
            assert_as_good(decoded, plain, reference, case.floor)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("group", "cells"), [(1, (256, 256)), (4, (256, 256)), (8, (256, 128))])
def test_large_tiles_and_planned_chunks(
    group: int, cells: tuple[int, int], in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real head sizes: several chunks of several tiles, and odd cells at the end."""
    monkeypatch.setattr(split, "_reads_in_place", lambda: in_place)
    case = make_case(2, n_seqs=1, n_kv=6001, head_dim=128, head_dim_v=128, group=group)
    tile = split._tile_cells(group, case.k, case.v)
    assert tile == cells[in_place]
    assert 6001 > 4096 > tile and 6001 % tile  # two threads' chunks of several tiles, odd cells
    plain = broadcast_attention(*case.args)
    assert_as_good(split_attention(*case.args, n_threads=2), plain, case.reference, case.floor)


@pytest.mark.parametrize(
    ("architecture", "in_place"), [("SkylakeX", True), ("Haswell", False), (None, False)]
)
def test_the_kernels_of_blas_are_known_by_name(
    architecture: str | None, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = {"user_api": "blas"} if architecture is None else {"architecture": architecture}
    monkeypatch.setattr(split, "blas", lambda: SimpleNamespace(info=lambda: [library]))
    assert split._reads_in_place.__wrapped__() is in_place


# Arguments of plan_chunks: cells, of a tile, longest chunk, threads.
PLANS = st.tuples(
    st.integers(0, 5000), st.integers(1, 300), st.integers(1, 9000), st.integers(1, 64)
)


@given(PLANS)
def test_planned_chunks_cover_every_cell_once(plan: tuple[int, int, int, int]) -> None:
    n_kv, tile, longest, _ = plan
    chunks = plan_chunks(*plan)
    assert [cell for start, end in chunks for cell in range(start, end)] == list(range(n_kv))
    assert all(0 < end - start <= max(tile, longest) for start, end in chunks)


@given(PLANS)
def test_threads_have_equal_chunks_and_no_more_than_they_need(
    plan: tuple[int, int, int, int],
) -> None:
    n_kv, tile, longest, threads = plan
    sizes = [end - start for start, end in plan_chunks(*plan) if (end - start) % tile == 0]
    assert all(size // tile - sizes[0] // tile in (-1, 0, 1) for size in sizes)
    assert len(sizes) == n_kv // tile or len(sizes) % threads == 0
    fewer = len(sizes) - threads
    assert fewer <= 0 or -(-(n_kv // tile) // fewer) * tile > longest


@pytest.mark.parametrize(
    ("n_kv", "useful"), [(512, 1), (2048, 2), (8192, 4), (32768, 8), (131072, 16)]
)
def test_more_threads_than_the_work_is_worth_are_left_alone(n_kv: int, useful: int) -> None:
    """The counts that were fastest of 1 to 16 threads, on 16 cores."""
    sizes = Sizes(
        n_seqs=1,
        n_head=32,
        n_head_kv=8,
        group=4,
        n_tokens=1,
        n_kv=n_kv,
        head_dim=128,
        head_dim_v=128,
    )
    for threads in (1, 2, 4, 8, 16, 64):
        assert split._useful_threads(sizes, threads) == min(threads, useful)


def test_a_masked_chunk_carries_minus_infinity() -> None:
    case = make_case(9, n_kv=600, lengths=[100, 600])
    partials = split_partials(*case.args, chunks=[(0, 200), (200, 200), (200, 600)])
    for seq, chunk in ((0, 1), (0, 2), (1, 1)):  # masked or empty
        assert np.all(partials.m[seq, chunk] == -np.inf)
        assert np.all(partials.total[seq, chunk] == 0)
        assert np.all(partials.summed[seq, chunk] == 0)
    assert np.all(np.isfinite(partials.m[:, 0])) and np.all(np.isfinite(partials.m[1, 2]))


@pytest.mark.parametrize("n_kv", [16384, 65536])
def test_split_temporaries_do_not_grow_with_n_kv(n_kv: int) -> None:
    """Beyond partials of n_chunks * n_head * (head_dim_v + 2), only one chunk per thread."""
    case = make_case(22, n_seqs=1, n_kv=n_kv, head_dim=32, head_dim_v=32)
    chunks = [(i, i + 1024) for i in range(0, n_kv, 1024)]
    decode = functools.partial(split_attention, *case.args, chunks, 2)
    partials = 2 * len(chunks) * 6 * (32 + 4) * 4  # and their reduction
    assert peak_bytes(decode) - partials < 4 * (1024 * 6 * 4)  # two threads' scores, twice
