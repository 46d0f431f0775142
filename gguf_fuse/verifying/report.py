"""What verify is asked, and what it answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf_fuse.choices import MOST_THREADS, MOST_TOKENS, require_count
from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.machine import COMPUTE_THREADS
from gguf_fuse.progress import OnProgress, OnStart, ignore

if TYPE_CHECKING:
    from gguf_fuse.measuring.gain import Gain, Spread


@dataclass(frozen=True)
class Choice:
    """Layers by number; or at most `spread`, evenly spaced. With neither, the model decides."""

    numbers: frozenset[int] | None = None
    spread: int | None = None

    def __post_init__(self) -> None:
        for number in self.numbers or ():
            require_count("layers", number, MOST_TOKENS, least=0)
        if self.spread is not None:
            require_count("layers", self.spread, sys.maxsize)


@dataclass(frozen=True)
class VerifyOptions:
    """What to compute. n_kv: cells that each cache holds before the first decode step. timed:
    whether one layer is timed, too, which takes half a second.

    Raises GGUFError for a value that cannot be.
    """

    layers: Choice = Choice()
    n_prompt: int = 48
    n_decode: int = 4
    n_seqs: int = 3
    n_kv: int = 1000
    threads: int = COMPUTE_THREADS
    seed: int = 0
    structure_only: bool = False
    timed: bool = True
    llama: bool = False  # run both files in llama.cpp, too
    n_gpu_layers: int | None = None  # of llama.cpp; None is its own choice
    on_start: OnStart = ignore
    on_progress: OnProgress = ignore

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Choice):
            raise GGUFError(f"layers is {self.layers!r}; it must be a Choice")
        for option in ("n_prompt", "n_decode", "n_seqs", "n_kv"):
            require_count(option, getattr(self, option), MOST_TOKENS)
        require_count("threads", self.threads, MOST_THREADS)
        require_count("seed", self.seed, sys.maxsize, least=0)
        if self.n_gpu_layers is not None:
            require_count("n_gpu_layers", self.n_gpu_layers, MOST_TOKENS, least=0)


@dataclass(frozen=True, slots=True)
class Check:
    """The largest error of one way to compute, relative to the largest value of the reference."""

    error: float
    limit: float  # see `trial._Gauge`

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # nan is not


@dataclass(frozen=True)
class LayerReport:
    """Numbers of one layer. note: what was not computed, and why."""

    layer: str
    checks: Mapping[str, Check]
    note: str | None = None

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks.values())


@dataclass(frozen=True)
class Timing:
    """Milliseconds, in one layer: projections and decode steps of n_seqs tokens.

    gain: of fused projections, over separate ones.
    """

    layer: str
    n_tokens: int
    n_kv: int
    ms: Mapping[str, Spread]
    gain: Gain


@dataclass(frozen=True)
class Structure:
    """Whether the two files hold the same bytes; each problem names its place.

    computable: no other problems than in the data of tensors, so both can be computed. notes: what
    is wrong with ORIGINAL's own layout.
    """

    problems: tuple[str, ...]
    n_fused: int = 0  # attention layers that are fused in FUSED alone
    n_fused_experts: int = 0  # layers whose experts are, or are stacked
    n_split_ssm_in: int = 0  # layers whose ssm_in is
    n_bytes: int = 0  # compared, of one file
    seconds: float = 0.0
    computable: bool = False
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Judgement:
    """What llama.cpp makes of the two files. difference: the largest of two log-probabilities."""

    device: str
    problem: str | None
    difference: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Report:
    """exchanged: FUSED was given first, ORIGINAL second."""

    original: Header
    fused: Header
    structure: Structure
    layers: tuple[LayerReport, ...] = ()
    timing: Timing | None = None
    llama: Judgement | None = None
    exchanged: bool = False

    @property
    def ok(self) -> bool:
        judged = self.llama is None or self.llama.problem is None
        return judged and self.structure.ok and all(report.ok for report in self.layers)
