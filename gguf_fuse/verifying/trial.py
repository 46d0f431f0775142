"""One layer, computed from ORIGINAL's weights, from FUSED's, and in float64 -> errors and times.

Axis names are those of `attention`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from gguf_fuse.attention import attend, masks, split
from gguf_fuse.attention.projections import Linear, Projections, apply_gate, split_rows
from gguf_fuse.attention.shapes import Floats, Ints, group_heads
from gguf_fuse.attention.softmax import AttentionParams
from gguf_fuse.measuring.gain import gain, spread
from gguf_fuse.measuring.timing import interleaved
from gguf_fuse.models import layer
from gguf_fuse.models.layer import AttentionLayer, Heads
from gguf_fuse.verifying.report import Check, Timing, VerifyOptions

FACTOR = 2.0
MAX_LIMIT = 0.1  # a limit above it would let through what is plainly wrong
EPS = float(np.finfo(np.float32).eps)  # 1.2e-7, the rounding of one float32 operation

ROW_BLOCK = 512  # rows of a weight that exist in float64 at one time

POOL = 1 << 20  # random numbers

_PLAIN = "plain"  # the way whose error sets the limit

Projected = tuple[Floats, Floats, Floats]  # Q, K and V, [n_seqs, n_tokens, rows]
Checks = Mapping[str, Check | None]  # by way; None: nothing can be told

# q, k, v, mask, params -> [n_seqs, n_head, n_tokens, head_dim_v]
Attend = Callable[[Floats, Floats, Floats, Floats | None, AttentionParams], Floats]


class Weights(NamedTuple):
    """One layer of one file. layer None: not modelled, so only projections can be computed."""

    projections: Projections
    layer: AttentionLayer | None


class _Path:
    """One way through the layer: weights, attention, a KV cache. exact: all in float64."""

    def __init__(self, weights: Weights, way: Attend, *, exact: bool = False) -> None:
        self.weights, self.way, self.exact = weights, way, exact
        self.caches: list[Floats] = []  # K and V, [n_seqs, n_head_kv, n_cells, dim]; see `allocate`

    @property
    def layer(self) -> AttentionLayer:
        assert self.weights.layer is not None
        return self.weights.layer

    def project(self, x: Floats) -> Projected:
        """x [n_seqs, n_tokens, n_embd] -> [n_seqs, n_tokens, rows] of Q, K and V."""
        projections, read = self.weights
        clamp = 0.0 if read is None else read.spec.clamp
        if not self.exact:
            return projections.project(x, clamp)
        doubles = x.astype(np.float64)  # [n_seqs, n_tokens, n_embd]

        def project(w: Linear) -> Floats:
            return replace(w, weight=w.weight.astype(np.float64)).project(doubles, clamp)

        return _by_row_blocks(projections, project)

    def heads(self, projected: Projected, positions: Ints) -> Heads:
        """At positions [n_seqs, n_tokens], -1 for padding."""
        return layer.positioned(self.layer, *projected, positions)

    def allocate(self, heads: Heads, n_cells: int) -> None:
        """Caches of n_cells whose first cells are the prompt's K and V."""
        self.caches = []
        for part in (heads.k, heads.v):  # [n_seqs, n_head_kv, n_prompt, head_dim or head_dim_v]
            n_seqs, n_head_kv, n_prompt, dim = part.shape
            self.caches.append(np.zeros((n_seqs, n_head_kv, n_cells, dim), part.dtype))
            self.caches[-1][:, :, :n_prompt] = part

    def cached(self, heads: Heads, cells: Sequence[int]) -> Heads:
        """One token of each sequence, stored in its cell -> its Q, with K and V of all cells."""
        for cache, part in zip(self.caches, (heads.k, heads.v), strict=True):
            cache[np.arange(len(cells)), :, cells] = part[:, :, 0]  # [n_seqs, n_head_kv, dim]
        return heads._replace(k=self.caches[0], v=self.caches[1])

    def decode(self, heads: Heads, cells: Sequence[int], way: Attend | None = None) -> Floats:
        """What `cached` gives, for the last filled cells -> [n_seqs, n_head, 1, head_dim_v]."""
        filled = masks.padded_positions([cell + 1 for cell in cells], heads.k.shape[2])
        return self.attend(heads, np.array(cells)[:, None], filled, way)

    def attend(
        self, heads: Heads, q_positions: Ints, k_positions: Ints, way: Attend | None = None
    ) -> Floats:
        """q_positions [n_seqs, n_tokens], k_positions [n_seqs, n_kv]; as in `attention`."""
        seen = layer.mask(self.layer.spec, q_positions, k_positions)  # [n_seqs, n_tokens, n_kv]
        attended = (way or self.way)(heads.q, heads.k, heads.v, seen, self.layer.params)
        return attended if heads.gate is None else apply_gate(attended, heads.gate)

    def largest_score(self, heads: Heads) -> float:
        """Largest scale · Σ|q k| of any query and any cell, masked or not."""
        k = heads.k  # [n_seqs, n_head_kv, n_kv, head_dim]
        rows = group_heads(heads.q, k.shape[1])  # [n_seqs, n_head_kv, group, n_tokens, d]
        largest = 0.0
        for seq, head in itertools.product(range(k.shape[0]), range(k.shape[1])):
            queries = rows[seq, head].reshape(-1, k.shape[3])  # [group * n_tokens, head_dim]
            sums = np.abs(queries) @ np.abs(k[seq, head]).T  # [group * n_tokens, n_kv]
            largest = max(largest, float(np.max(sums)))
        return self.layer.params.scale * largest


def _largest_sums(projections: Projections, x: Floats) -> list[float]:
    """Of Q, K and V: the largest scale · Σ|x w| of any token and row."""
    sizes = np.abs(x).reshape(-1, x.shape[2])  # [n_seqs * n_tokens, n_embd]

    def sums(w: Linear) -> Floats:
        scale = 1.0 if w.scale is None else abs(w.scale)
        return sizes @ np.abs(w.weight).T * scale  # [n_seqs * n_tokens, rows]

    return [float(np.max(part)) for part in _by_row_blocks(projections, sums)]


def _by_row_blocks(projections: Projections, compute: Callable[[Linear], Floats]) -> Projected:
    """compute -> [..., rows], joined, of Q, K and V.

    Some rows at a time: a whole weight in float64 would double the memory.
    """
    outputs = []
    for linear in projections.linears:
        for start in range(0, len(linear.weight), ROW_BLOCK):
            rows = slice(start, start + ROW_BLOCK)
            bias = None if linear.bias is None else linear.bias[rows]
            outputs.append(compute(Linear(linear.weight[rows], linear.scale, bias)))
    joined = np.concatenate(outputs, axis=-1)  # [..., q + k + v rows]
    return split_rows(joined, projections.rows)


class _Gauge:
    """Errors of several ways against float64, over all steps.

    A limit is FACTOR times the error of the plain way (separate projections, expanded K and V, both
    float32) against the same reference, plus what rounding may cost another order of summing, for
    the plain way may be exact by luck. A sum's rounding grows with the sum of its terms' sizes
    (Higham, "Accuracy and Stability of Numerical Algorithms", section 4.2), by EPS each: in
    projections Σ|x w|, relative to the largest value; in attention Σ|q k| of a score, which exp
    turns into an error relative to its weight, twice: once in its weight, once in their sum; to
    which the rounding of Q, K and V adds. 4 EPS are for the rest.
    """

    def __init__(self) -> None:
        self.top = 0.0
        self.rounding = 0.0  # in EPS
        self.errors: dict[str, float] = {}

    def add(self, exact: Floats, ways: Mapping[str, Floats], rounding: float) -> None:
        # numpy's maximum keeps a nan, Python's may drop it.
        self.top = float(np.maximum(self.top, np.max(np.abs(exact), initial=0.0)))
        self.rounding = max(self.rounding, rounding)
        for name, result in ways.items():
            error = np.max(np.abs(result - exact), initial=0.0)
            self.errors[name] = float(np.maximum(self.errors.get(name, 0.0), error))

    def checks(self) -> Checks:
        """Of all ways but the plain one; of none where that one is not finite, or too far off to
        tell right from wrong.
        """
        unit = self.top or 1.0
        limit = FACTOR * self.errors[_PLAIN] / unit + EPS * (4 + self.rounding)
        sound = limit <= MAX_LIMIT  # nan is not
        others = {name: error for name, error in self.errors.items() if name != _PLAIN}
        return {n: Check(error / unit, limit) if sound else None for n, error in others.items()}


class Trial:
    """The same random activations through ORIGINAL's weights, through FUSED's, and in float64.

    Sequences have different lengths. After the prompt each cache is filled with random K and V up
    to its length, as if many tokens had gone by: projecting those would cost far more than all
    else and show nothing new.
    """

    def __init__(self, original: Weights, fused: Weights, options: VerifyOptions) -> None:
        self.plain = _Path(original, attend.expanded_attention)
        self.fused = _Path(fused, attend.attention)
        self.exact = _Path(original, attend.reference_attention, exact=True)
        self.paths = (self.plain, self.fused, self.exact)
        self.decodes: dict[str, Attend] = {
            "expand": attend.expanded_attention,
            "broadcast": attend.broadcast_attention,
            "split": functools.partial(split.split_attention, n_threads=options.threads),
        }
        self.options = options
        self.random = np.random.default_rng(options.seed)
        self.prompts = _lengths(options.n_prompt, options.n_seqs)
        self.positions = masks.padded_positions(self.prompts, options.n_prompt)
        self.contexts = _lengths(max(options.n_kv, options.n_prompt), options.n_seqs)
        self.n_embd = original.projections.linears[0].weight.shape[1]
        self.modelled = original.layer is not None
        self.projected = 0.0  # rounding of Q, K and V, in EPS; set by `check_projection`

    def activations(self, n_tokens: int) -> Floats:
        """[n_seqs, n_tokens, n_embd], as after a norm."""
        shape = (self.options.n_seqs, n_tokens, self.n_embd)
        return self.random.standard_normal(shape, dtype=np.float32)

    def checks(self) -> Checks:
        n_prompt, n_decode = self.options.n_prompt, self.options.n_decode * self.modelled
        x = self.activations(n_prompt + n_decode)  # the prompt, then a token for each decode step
        exact = self.exact.project(x)  # all at once: float64 weights take long to make

        def projected(start: int, end: int) -> list[Projected]:
            """Of these tokens, by every path."""
            q, k, v = (part[:, start:end] for part in exact)
            tokens = x[:, start:end]
            return [self.plain.project(tokens), self.fused.project(tokens), (q, k, v)]

        prompt = projected(0, n_prompt)
        checks = self.check_projection(x[:, :n_prompt], prompt)
        if not self.modelled:
            return checks
        steps = (projected(at, at + 1) for at in range(n_prompt, n_prompt + n_decode))
        return {**checks, **self.check_prefill(prompt), **self.check_decode(steps)}

    def check_projection(self, x: Floats, prompt: Sequence[Projected]) -> Checks:
        """The worst of Q, K and V, each relative to its own size; none if one of them has none."""
        checks: list[Check] = []
        sums = _largest_sums(self.plain.weights.projections, x)
        for plain, fused, exact, largest in zip(*prompt, sums, strict=True):
            gauge = _Gauge()
            rounding = largest / (float(np.max(np.abs(exact))) or 1.0)
            self.projected = max(self.projected, rounding)
            gauge.add(exact, {_PLAIN: plain, "projection": fused}, rounding)
            checks += filter(None, gauge.checks().values())
        if len(checks) < len(sums):
            return {"projection": None}
        worst = max(checks, key=lambda check: (not check.ok, check.error / check.limit))
        return {"projection": worst}

    def check_prefill(self, prompt: Sequence[Projected]) -> Checks:
        at = self.positions
        heads = [path.heads(own, at) for path, own in zip(self.paths, prompt, strict=True)]
        self.fill_caches(self.paths, heads)
        plain, fused, exact = (
            path.attend(own, at, at) for path, own in zip(self.paths, heads, strict=True)
        )
        gauge = _Gauge()
        rounding = self.projected + 2 * self.exact.largest_score(heads[2])
        gauge.add(exact, {_PLAIN: plain, "prefill": fused}, rounding)
        return gauge.checks()

    def fill_caches(self, paths: Sequence[_Path], heads: Sequence[Heads]) -> None:
        """heads: of the prompt, one for each path."""
        n_cells = max(self.contexts) + self.options.n_decode
        for path, own in zip(paths, heads, strict=True):
            path.allocate(own, n_cells)
        for seq, (prompt, context) in enumerate(zip(self.prompts, self.contexts, strict=True)):
            for caches in zip(*(path.caches for path in paths), strict=True):  # of K, then V
                known = caches[0][seq, :, :prompt]  # [n_head_kv, prompt, dim]
                size = np.float32(np.sqrt(np.mean(np.square(known, dtype=np.float64))))
                shape = (known.shape[0], context - prompt, known.shape[2])
                start = self.random.integers(POOL // 2)
                pool = _pool(self.options.seed)[start:]
                filling = size * np.resize(pool, shape)  # [n_head_kv, ..., dim]
                for cache in caches:
                    cache[seq, :, prompt:context] = filling

    def check_decode(self, steps: Iterable[Sequence[Projected]]) -> Checks:
        """steps: of one new token of each sequence, at the position of its cell."""
        gauge = _Gauge()
        for step, projected in enumerate(steps):
            cells = [context + step for context in self.contexts]
            plain, fused, exact = (
                path.cached(path.heads(own, np.array(cells)[:, None]), cells)
                for path, own in zip(self.paths, projected, strict=True)
            )
            ways = {_PLAIN: self.plain.decode(plain, cells)}
            for name, way in self.decodes.items():
                ways[f"decode_{name}"] = self.fused.decode(fused, cells, way)
            rounding = self.projected + 2 * self.exact.largest_score(exact)
            gauge.add(self.exact.decode(exact, cells), ways, rounding)
        return gauge.checks()

    def timing(self, name: str) -> Timing:
        """One token of each sequence through the projections, and one decode step."""
        x = self.activations(1)
        ways: dict[str, Callable[[], object]] = {
            "separate": functools.partial(self.plain.project, x),
            "fused": functools.partial(self.fused.project, x),
        }
        if self.modelled:
            prompt = self.fused.project(self.activations(self.options.n_prompt))
            self.fill_caches([self.fused], [self.fused.heads(prompt, self.positions)])
            cells = self.contexts
            heads = self.fused.heads(self.fused.project(x), np.array(cells)[:, None])
            heads = self.fused.cached(heads, cells)
            for decode, way in self.decodes.items():
                ways[decode] = functools.partial(self.fused.decode, heads, cells, way)
        times = interleaved(ways, 0.5)
        ms = {way: spread(taken) for way, taken in times.items()}
        gained = gain(times["separate"], times["fused"])
        return Timing(name, self.options.n_seqs, max(self.contexts), ms, gained)


@functools.cache
def _pool(seed: int) -> Floats:
    """Cells are filled from it: to draw each anew would take as long as to attend to it."""
    return np.random.default_rng((seed, 1)).standard_normal(POOL, dtype=np.float32)  # flat


def _lengths(longest: int, n_seqs: int) -> list[int]:
    """Sequences of different length: from `longest` down to about half of it."""
    return [max(1, longest - seq * longest // (2 * n_seqs)) for seq in range(n_seqs)]
