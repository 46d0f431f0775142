"""ORIGINAL and FUSED -> Report: the bytes, then the numbers, then the time.

Structure is exact and of all layers: a fused tensor is Q, K and V end to end, or the gate and up of
each expert in turn, and all else is the same. Numbers are those of attention, computed in numpy
from each file's own weights, of some layers: the same random activations go through ORIGINAL's
weights and through FUSED's, then through attention as the architecture does it. Both are held
against float64; see `Check` for the limit.

Prints nothing. Axis names are those of `attention`.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gguf_fuse import attention
from gguf_fuse.attention import DEFAULT_THREADS, AttentionParams, Floats, Linear, blas_threads
from gguf_fuse.format.header import GGUFError, Header, read_tensors
from gguf_fuse.format.shards import read_model
from gguf_fuse.machine import free_bytes
from gguf_fuse.measuring.timing import interleaved
from gguf_fuse.models import layer
from gguf_fuse.models.layer import AttentionLayer, Heads, Projections
from gguf_fuse.models.spec import NotModelled
from gguf_fuse.planning import fuse as fusion
from gguf_fuse.planning.plan import Refused
from gguf_fuse.progress import OnProgress, OnStart, ignore_progress, ignore_start
from gguf_fuse.verifying.structure import Structure, compare_structure

FACTOR = 2.0
MAX_LIMIT = 0.1  # a limit above it would let through what is plainly wrong
EPS = float(np.finfo(np.float32).eps)  # 1.2e-7, the rounding of one float32 operation

SMALL_MODEL = 1 << 24  # elements of all Q, K and V: up to here every layer is computed
N_SPREAD = 4  # above it, so many layers

ROW_BLOCK = 1024  # rows of a weight that exist in float64 at one time

_PLAIN = "plain"  # the way whose error sets the limit

Positions: TypeAlias = NDArray[np.int64]
# q, k, v, mask, params -> [n_seqs, n_head, n_tokens, head_dim_v]
Attend = Callable[[Floats, Floats, Floats, Floats | None, AttentionParams], Floats]


@dataclass(frozen=True)
class Choice:
    """Layers by number; or `spread` evenly spaced ones. With neither, it depends on the model."""

    numbers: frozenset[int] | None = None
    spread: int | None = None
    all: bool = False


@dataclass(frozen=True)
class Options:
    """What to compute. n_kv: cells that each cache holds before the first decode step."""

    layers: Choice = Choice()
    n_prompt: int = 48
    n_decode: int = 4
    n_seqs: int = 3
    n_kv: int = 1000
    threads: int = DEFAULT_THREADS
    seed: int = 0
    structure_only: bool = False
    on_start: OnStart = ignore_start
    on_progress: OnProgress = ignore_progress


VerifyOptions = Options


@dataclass(frozen=True, slots=True)
class Check:
    """The largest error of one way to compute, relative to the largest value of the reference.

    limit: FACTOR times the error of the plain way (separate projections, expanded K and V, both
    float32) against the same float64 reference, plus what rounding may cost another order of
    summing, for the plain way may be exact by luck. A sum's rounding grows with the sum of its
    terms' sizes (Higham, "Accuracy and Stability of Numerical Algorithms", section 4.2), by EPS
    each: in projections Σ|x w|, relative to the largest value; in attention Σ|q k| of a score,
    which exp turns into an error relative to its weight, twice: once in its weight, once in their
    sum; to which the rounding of Q, K and V adds. 4 EPS are for the rest.
    """

    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # nan is not


@dataclass(frozen=True)
class LayerReport:
    """Numbers of one layer. note: what was not computed, and why; problem: why nothing could be."""

    layer: str
    checks: Mapping[str, Check]
    note: str | None = None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None and all(check.ok for check in self.checks.values())


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds, in one layer: projections and decode steps of n_seqs tokens."""

    layer: str
    n_tokens: int
    n_kv: int
    ms: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    structure: Structure
    layers: tuple[LayerReport, ...]
    timing: Timing | None

    @property
    def ok(self) -> bool:
        return self.structure.ok and all(report.ok for report in self.layers)


def verify(original: Path, fused: Path, options: Options | None = None) -> Report:
    """Does FUSED hold what ORIGINAL holds, and compute what it computes? Each may be a shard.

    Raises GGUFError for a file that cannot be read, or a layer that ORIGINAL does not have, Refused
    for adapters and importance matrices.
    """
    options = options or Options()
    before, after = read_model(original), read_model(fused)
    for header in (before, after):
        _refuse_other_kinds(header)
    names = [] if options.structure_only else choose_layers(before, options.layers)
    structure = compare_structure(
        before,
        after,
        threads=options.threads,
        on_start=options.on_start,
        on_progress=options.on_progress,
    )
    layers, timing = compare_numbers(before, after, names, options)
    return Report(structure, layers + _not_computed(before, options), timing)


def _refuse_other_kinds(header: Header) -> None:
    if not header.is_model:
        kind = header.metadata["general.type"]
        raise Refused(
            f"{header.path}: general.type is {kind!r}: verify compares models; unfuse gives the "
            "original bytes back, which cmp can compare"
        )


# -- which layers -------------------------------------------------------------------------------


def parse_layers(text: str) -> Choice:
    """ "0,5-7", "all", "4x" (four evenly spaced ones), "auto". Raises ValueError."""
    if text in ("auto", "all"):
        return Choice(all=text == "all")
    if re.fullmatch(r"[1-9]\d{0,5}x", text):
        return Choice(spread=int(text[:-1]))
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{text!r}: write layers as 0,5-7 or all, or 4x for 4 spread evenly")
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return Choice(frozenset(numbers))


def choose_layers(header: Header, choice: Choice) -> list[str]:
    """Names of attention layers. Raises GGUFError for a number that no layer has."""
    scalars = read_tensors(header, fusion.scalar_names(header))
    names = [found.name for found in fusion.examine(header, scalars, any_architecture=True)]
    if choice.numbers is not None:
        by_number = {int(name.rpartition(".")[2]) for name in names}
        if absent := sorted(choice.numbers - by_number):
            raise GGUFError(f"{header.path}: no attention layer {absent[0]}; --layers is wrong")
        return [name for name in names if int(name.rpartition(".")[2]) in choice.numbers]
    if choice.all or (choice.spread is None and _n_elements(header, names) <= SMALL_MODEL):
        return names
    return _evenly(names, choice.spread or N_SPREAD)


def _not_computed(header: Header, options: Options) -> tuple[LayerReport, ...]:
    """Layers that nobody chose because they have no attention that is known here."""
    if options.structure_only or options.layers.numbers is not None:
        return ()
    note = "no Q, K and V of its own, but other attention (MLA, linear) or none: bytes only"
    return tuple(LayerReport(name, {}, note) for name in fusion.other_layers(header.tensors))


def _n_elements(header: Header, names: Sequence[str]) -> int:
    wanted = {f"{name}.attn_{part}.weight" for name in names for part in ("q", "k", "v", "qkv")}
    return sum(math.prod(tensor.ne) for tensor in header.tensors if tensor.name in wanted)


def _evenly(names: Sequence[str], count: int) -> list[str]:
    """The first, the last, and others at even distances between them."""
    if count >= len(names):
        return list(names)
    last = len(names) - 1
    return [names[round(i * last / max(count - 1, 1))] for i in range(count)]


# -- numbers ------------------------------------------------------------------------------------


def compare_numbers(
    original: Header, fused: Header, names: Sequence[str], options: Options
) -> tuple[tuple[LayerReport, ...], Timing | None]:
    """Layer by layer, so that memory holds the weights of one layer of each file."""
    options.on_start("computing", len(names))
    reports: list[LayerReport] = []
    timing: Timing | None = None
    with blas_threads(options.threads), np.errstate(all="ignore"):
        for name in names:
            report, layer_timing = _compare_layer(original, fused, name, options, timing is None)
            reports.append(report)
            timing = timing or layer_timing
            options.on_progress(1)
    return tuple(reports), timing


def _compare_layer(
    original: Header, fused: Header, name: str, options: Options, timed: bool
) -> tuple[LayerReport, Timing | None]:
    try:
        before, note = _read(original, name)
    except GGUFError as error:
        note = f"numbers not computed: {_reason(error, original)}"
        return LayerReport(name, {}, note), None
    _require_memory(original, name, before, options)
    try:
        trial = _Trial(before, _read_like(before, fused, name), options)
        checks = trial.checks()
        notes = (note, _vague(trial.names - checks.keys()))
        report = LayerReport(name, checks, "; ".join(filter(None, notes)) or None)
        return report, trial.timing(name) if timed else None
    except (GGUFError, ValueError) as error:
        # ORIGINAL was read: what fails now is the other file's fault.
        problem = f"the fused file's layer cannot be computed: {_reason(error, fused)}"
        return LayerReport(name, {}, note, problem), None


def _require_memory(header: Header, name: str, weights: _Weights, options: Options) -> None:
    """Raises GGUFError: where memory ends, some systems kill whoever they like."""
    needed, free = _bytes_needed(weights, options), free_bytes()
    if needed > free:
        raise GGUFError(
            f"{header.path}: {name}: computing takes about {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; lower --n-prompt, --n-seqs or --n-kv"
        )


def _bytes_needed(weights: _Weights, options: Options) -> int:
    """What grows with the options: activations, caches and their copies, scores and masks."""
    n_seqs, n_prompt = options.n_seqs, options.n_prompt
    rows = weights.projections.rows
    n_embd: int = _linears(weights.projections)[0].weight.shape[1]
    needed = 24 * n_seqs * n_prompt * (n_embd + sum(rows))
    if weights.attention is None:
        return needed
    spec = weights.attention.spec
    # A cell of the caches: two in float32, one in float64; copied out to all heads in float32.
    cell = 16 * (rows[1] + rows[2]) + 4 * spec.n_head * (spec.head_dim + spec.head_dim_v)
    n_cells = max(options.n_kv, n_prompt) + options.n_decode
    return needed + n_seqs * n_cells * cell + (32 + 13 * n_seqs) * n_prompt * n_prompt


def _vague(missing: Set[str]) -> str | None:
    if not missing:
        return None
    return (
        f"not checked: {', '.join(sorted(missing))}: the original's own numbers are not finite, or "
        "too large for float32"
    )


def _reason(error: Exception, header: Header) -> str:
    return str(error).removeprefix(f"{header.path}: ")


class _Weights(NamedTuple):
    """One layer of one file. attention None: not modelled, so only projections can be computed."""

    projections: Projections
    attention: AttentionLayer | None


def _read(header: Header, name: str) -> tuple[_Weights, str | None]:
    """ORIGINAL's layer, and a note where its attention cannot be computed."""
    try:
        read = layer.read_layer(header, name)
        return _Weights(read.projections, read), None
    except GGUFError as error:
        why = "not modelled" if isinstance(error, NotModelled) else "cannot be computed"
        note = f"attention {why}, projections only: {_reason(error, header)}"
    return _Weights(layer.read_projections(header, name), None), note


def _read_like(before: _Weights, header: Header, name: str) -> _Weights:
    """FUSED's layer, split where ORIGINAL's rows end: FUSED's own record is not believed."""
    read = None if before.attention is None else layer.read_layer(header, name)
    own = layer.read_projections(header, name) if read is None else read.projections
    projections = replace(own, rows=before.projections.rows)
    return _Weights(projections, read and replace(read, projections=projections))


class _Path:
    """One way through the layer: weights, and a KV cache in the way's precision."""

    def __init__(self, weights: _Weights, *, exact: bool = False) -> None:
        self.weights = weights
        self.exact = exact
        self.dtype = np.dtype(np.float64 if exact else np.float32)
        self.k = self.v = np.zeros((0, 0, 0, 0), self.dtype)  # see `allocate`

    @property
    def layer(self) -> AttentionLayer:
        assert self.weights.attention is not None
        return self.weights.attention

    def project(self, x: Floats) -> tuple[Floats, Floats, Floats]:
        """x [n_seqs, n_tokens, n_embd] -> [n_seqs, n_tokens, rows] of Q, K and V."""
        read = self.weights.attention
        clamp = 0.0 if read is None else read.spec.clamp
        if self.exact:
            return _project_exactly(self.weights.projections, x, clamp)
        return layer.project(self.weights.projections, x, clamp)

    def heads(self, x: Floats, positions: Positions) -> Heads:
        """x [n_seqs, n_tokens, n_embd] at positions [n_seqs, n_tokens], -1 for padding."""
        return layer.positioned(self.layer, *self.project(x), positions)

    def allocate(self, heads: Heads, n_cells: int) -> None:
        """A cache of n_cells whose first cells are the prompt's K and V."""
        n_seqs, n_head_kv, n_prompt, _ = heads.k.shape
        self.k, self.v = (
            np.zeros((n_seqs, n_head_kv, n_cells, part.shape[3]), self.dtype)
            for part in (heads.k, heads.v)
        )  # [n_seqs, n_head_kv, n_cells, head_dim], [..., head_dim_v]
        self.k[:, :, :n_prompt], self.v[:, :, :n_prompt] = heads.k, heads.v

    def store(self, heads: Heads, cells: Sequence[int]) -> None:
        """One token of each sequence goes into a cell of its own."""
        for seq, cell in enumerate(cells):
            self.k[seq, :, cell] = heads.k[seq, :, 0]  # [n_head_kv, head_dim]
            self.v[seq, :, cell] = heads.v[seq, :, 0]  # [n_head_kv, head_dim_v]

    def decode(self, way: Attend, heads: Heads, cells: Sequence[int]) -> Floats:
        """One token of each sequence, its last cell -> [n_seqs, n_head, 1, head_dim_v]."""
        filled = attention.padded_positions([cell + 1 for cell in cells], self.k.shape[2])
        return self.attend(way, heads, self.k, self.v, np.array(cells)[:, None], filled)

    def attend(
        self,
        way: Attend,
        heads: Heads,
        k: Floats,
        v: Floats,
        q_positions: Positions,
        k_positions: Positions,
    ) -> Floats:
        """q_positions [n_seqs, n_tokens], k_positions [n_seqs, n_kv]; as in `attention`."""
        seen = layer.mask(self.layer.spec, q_positions, k_positions)  # [n_seqs, n_tokens, n_kv]
        attended = way(heads.q, k, v, seen, self.layer.params)
        return attended if heads.gate is None else attention.apply_gate(attended, heads.gate)

    def largest_score(self, heads: Heads, k: Floats) -> float:
        """Largest scale · Σ|q k| of any query and any cell of k, masked or not."""
        rows = attention.group_heads(heads.q, k.shape[1])  # [n_seqs, n_head_kv, group, n_tokens, d]
        largest = 0.0
        for seq, head in itertools.product(range(k.shape[0]), range(k.shape[1])):
            queries = rows[seq, head].reshape(-1, k.shape[3])  # [group * n_tokens, head_dim]
            sums = np.abs(queries) @ np.abs(k[seq, head]).T  # [group * n_tokens, n_kv]
            largest = max(largest, float(np.max(sums)))
        return self.layer.params.scale * largest


def _project_exactly(
    projections: Projections, x: Floats, clamp: float
) -> tuple[Floats, Floats, Floats]:
    """In float64, some rows at a time: a whole weight in float64 would double the memory."""
    doubles = x.astype(np.float64)  # [n_seqs, n_tokens, n_embd]
    outputs = [
        attention.project(doubles, part.weight, part.scale, part.bias, clamp)
        for linear in _linears(projections)
        for part in _row_blocks(linear)
    ]
    joined = np.concatenate(outputs, axis=-1)  # [n_seqs, n_tokens, q + k + v rows]
    return attention.split_rows(joined, projections.rows)


def _largest_sums(projections: Projections, x: Floats) -> list[float]:
    """Of Q, K and V: the largest scale · Σ|x w| of any token and row."""
    sizes = np.abs(x)  # [n_seqs, n_tokens, n_embd]
    sums = [
        sizes @ np.abs(part.weight).T * abs(1.0 if part.scale is None else part.scale)
        for linear in _linears(projections)
        for part in _row_blocks(linear)
    ]
    joined = np.concatenate(sums, axis=-1)  # [n_seqs, n_tokens, q + k + v rows]
    return [float(np.max(part)) for part in attention.split_rows(joined, projections.rows)]


def _linears(projections: Projections) -> tuple[Linear, ...]:
    if projections.separate is not None:
        return projections.separate
    assert projections.fused is not None
    return (projections.fused,)


def _row_blocks(linear: Linear) -> Iterator[Linear]:
    for start in range(0, len(linear.weight), ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        bias = None if linear.bias is None else linear.bias[rows]
        yield Linear(linear.weight[rows], linear.scale, bias)


class _Gauge:
    """Errors against float64, over all steps; the plain way's error sets the limit."""

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

    def checks(self) -> dict[str, Check]:
        """None where the plain way is not finite, or too far off to tell right from wrong."""
        unit = self.top or 1.0
        floor = EPS * (4 + self.rounding)
        limit = FACTOR * self.errors[_PLAIN] / unit + floor
        if not limit <= MAX_LIMIT:  # or nan
            return {}
        return {
            name: Check(error / unit, limit)
            for name, error in self.errors.items()
            if name != _PLAIN
        }


class _Trial:
    """The same random activations through ORIGINAL's weights, through FUSED's, and in float64.

    Sequences have different lengths. After the prompt each cache is filled with random K and V up
    to its length, as if many tokens had gone by: projecting those would cost far more than all
    else and show nothing new.
    """

    def __init__(self, original: _Weights, fused: _Weights, options: Options) -> None:
        self.plain, self.fused = _Path(original), _Path(fused)
        self.exact = _Path(original, exact=True)
        self.options = options
        self.random = np.random.default_rng(options.seed)
        self.prompts = _lengths(options.n_prompt, options.n_seqs)
        self.contexts = _lengths(max(options.n_kv, options.n_prompt), options.n_seqs)
        self.n_embd = _linears(original.projections)[0].weight.shape[1]
        self.projected = 0.0  # rounding of Q, K and V, in EPS; set by `check_projection`

    @property
    def paths(self) -> tuple[_Path, _Path, _Path]:
        return self.plain, self.fused, self.exact

    def activations(self, n_tokens: int) -> Floats:
        """[n_seqs, n_tokens, n_embd], as after a norm."""
        shape = (self.options.n_seqs, n_tokens, self.n_embd)
        return self.random.standard_normal(shape, dtype=np.float32)

    @property
    def names(self) -> set[str]:
        """Of all checks that there can be."""
        if self.plain.weights.attention is None:
            return {"projection"}
        return {"projection", "prefill", *(f"decode_{way}" for way in self.decodes())}

    def checks(self) -> dict[str, Check]:
        x = self.activations(self.options.n_prompt)
        checks = self.check_projection(x)
        if self.plain.weights.attention is not None:
            checks |= self.check_prefill(x) | self.check_decode()
        return checks

    def check_projection(self, x: Floats) -> dict[str, Check]:
        """The worst of Q, K and V, each relative to its own size; none if one of them has none."""
        checks: list[Check] = []
        sums = _largest_sums(self.plain.weights.projections, x)
        projected = zip(*(path.project(x) for path in self.paths), sums, strict=True)
        for plain, fused, exact, largest in projected:
            gauge = _Gauge()
            rounding = largest / (float(np.max(np.abs(exact))) or 1.0)
            self.projected = max(self.projected, rounding)
            gauge.add(exact, {_PLAIN: plain, "projection": fused}, rounding)
            checks += gauge.checks().values()
        if len(checks) < len(sums):
            return {}
        worst = max(checks, key=lambda check: (not check.ok, check.error / check.limit))
        return {"projection": worst}

    def check_prefill(self, x: Floats) -> dict[str, Check]:
        positions = attention.padded_positions(self.prompts, x.shape[1])  # [n_seqs, n_tokens]
        heads = [path.heads(x, positions) for path in self.paths]
        self.fill_caches(heads)
        ways = (attention.expanded_attention, attention.attention, _reference)
        plain, fused, exact = (
            path.attend(way, own, own.k, own.v, positions, positions)
            for path, own, way in zip(self.paths, heads, ways, strict=True)
        )
        gauge = _Gauge()
        rounding = self.projected + 2 * self.exact.largest_score(heads[2], heads[2].k)
        gauge.add(exact, {_PLAIN: plain, "prefill": fused}, rounding)
        return gauge.checks()

    def fill_caches(self, heads: Sequence[Heads]) -> None:
        n_cells = max(self.contexts) + self.options.n_decode
        for path, own in zip(self.paths, heads, strict=True):
            path.allocate(own, n_cells)
        for seq, (prompt, context) in enumerate(zip(self.prompts, self.contexts, strict=True)):
            for cache in ("k", "v"):
                known = getattr(self.plain, cache)[seq, :, :prompt]  # [n_head_kv, prompt, dim]
                size = np.float32(np.sqrt(np.mean(np.square(known, dtype=np.float64))))
                shape = (known.shape[0], context - prompt, known.shape[2])
                filling = size * self.random.standard_normal(shape, dtype=np.float32)
                for path in self.paths:
                    getattr(path, cache)[seq, :, prompt:context] = filling

    def check_decode(self) -> dict[str, Check]:
        gauge = _Gauge()
        for step in range(self.options.n_decode):
            cells = [context + step for context in self.contexts]
            heads = self.decode_heads(cells)
            for path, own in zip(self.paths, heads, strict=True):
                path.store(own, cells)
            plain, fused, exact = heads
            ways = {_PLAIN: self.plain.decode(attention.expanded_attention, plain, cells)}
            for name, way in self.decodes().items():
                ways[f"decode_{name}"] = self.fused.decode(way, fused, cells)
            rounding = self.projected + 2 * self.exact.largest_score(exact, self.exact.k)
            gauge.add(self.exact.decode(_reference, exact, cells), ways, rounding)
        return gauge.checks()

    def decode_heads(self, cells: Sequence[int]) -> list[Heads]:
        """One new token of each sequence, at the position of its cell, by every path."""
        x, positions = self.activations(1), np.array(cells)[:, None]  # [n_seqs, 1]
        return [path.heads(x, positions) for path in self.paths]

    def decodes(self) -> dict[str, Attend]:
        split = functools.partial(attention.split_attention, n_threads=self.options.threads)
        return {
            "expand": attention.expanded_attention,
            "broadcast": attention.broadcast_attention,
            "split": split,
        }

    def timing(self, name: str) -> Timing:
        """One token of each sequence through the projections, and the last decode step again."""
        x = self.activations(1)
        ways: dict[str, Callable[[], object]] = {
            "separate": functools.partial(self.plain.project, x),
            "fused": functools.partial(self.fused.project, x),
        }
        if self.plain.weights.attention is not None:
            cells = [context + self.options.n_decode - 1 for context in self.contexts]
            heads = self.decode_heads(cells)[1]
            for decode, way in self.decodes().items():
                ways[decode] = functools.partial(self.fused.decode, way, heads, cells)
        return Timing(name, self.options.n_seqs, max(self.contexts), interleaved(ways, 0.5))


def _reference(
    q: Floats, k: Floats, v: Floats, mask: Floats | None, params: AttentionParams
) -> Floats:
    return attention.reference_attention(q, k, v, mask, params)


def _lengths(longest: int, n_seqs: int) -> list[int]:
    """Sequences of different length: from `longest` down to about half of it."""
    return [max(1, longest - seq * longest // (2 * n_seqs)) for seq in range(n_seqs)]
