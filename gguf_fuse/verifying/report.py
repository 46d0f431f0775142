"""What verify is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf_fuse.machine import COMPUTE_THREADS
from gguf_fuse.progress import OnProgress, OnStart, ignore


@dataclass(frozen=True)
class Choice:
    """Layers by number; or at most `spread`, evenly spaced. With neither, the model decides."""

    numbers: frozenset[int] | None = None
    spread: int | None = None


@dataclass(frozen=True)
class VerifyOptions:
    """What to compute. n_kv: cells that each cache holds before the first decode step."""

    layers: Choice = Choice()
    n_prompt: int = 48
    n_decode: int = 4
    n_seqs: int = 3
    n_kv: int = 1000
    threads: int = COMPUTE_THREADS
    seed: int = 0
    structure_only: bool = False
    llama: bool = False  # run both files in llama.cpp, too
    n_gpu_layers: int | None = None  # of llama.cpp; None is its own choice
    on_start: OnStart = ignore
    on_progress: OnProgress = ignore


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
class Structure:
    """Whether the two files hold the same bytes; each problem names its place."""

    problems: tuple[str, ...]
    n_fused: int  # attention layers that are fused in FUSED alone
    n_fused_experts: int  # layers whose experts are
    n_bytes: int  # compared, of one file
    seconds: float

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
    structure: Structure
    layers: tuple[LayerReport, ...]
    timing: Timing | None
    llama: Judgement | None = None

    @property
    def ok(self) -> bool:
        judged = self.llama is None or self.llama.problem is None
        return judged and self.structure.ok and all(report.ok for report in self.layers)
