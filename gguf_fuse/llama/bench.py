"""Speed in llama.cpp: two files in turn, a fresh process each time -> tokens per second."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.llama import process
from gguf_fuse.progress import OnProgress, OnStart, ignore

GRAPH_OPT = "GGML_CUDA_GRAPH_OPT"


@dataclass(frozen=True, order=True)
class BenchTest:
    """A prompt of n_prompt tokens, or n_gen generated ones, after n_depth tokens."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    def __str__(self) -> str:
        """As llama-bench calls it."""
        parts = [f"pp{self.n_prompt}"] * (self.n_prompt > 0) + [f"tg{self.n_gen}"] * (
            self.n_gen > 0
        )
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")


@dataclass(frozen=True)
class Settings:
    """Tests, as llama-bench's -p, -n and -d; samples of each in one process; threads of the CPU."""

    n_prompt: tuple[int, ...] = (8, 512)
    n_gen: tuple[int, ...] = (128,)
    n_depth: tuple[int, ...] = (0,)
    repetitions: int = 3
    threads: int | None = None

    @property
    def tests(self) -> list[BenchTest]:
        alone = [(n, 0) for n in self.n_prompt if n] + [(0, n) for n in self.n_gen if n]
        return [BenchTest(*counts, depth) for depth, counts in product(self.n_depth, alone)]


@dataclass(frozen=True)
class Run:
    """Of one process: tokens per second of each test, sample by sample, and what computed them."""

    speeds: Mapping[BenchTest, tuple[float, ...]]
    backends: str
    device: str
    version: str  # of llama.cpp


class Way(NamedTuple):
    fused: bool
    graph_opt: bool = False

    def __str__(self) -> str:
        name = "fused" if self.fused else "separate"
        return f"{name} with {GRAPH_OPT}=1" if self.graph_opt else name


SEPARATE, FUSED = Way(False), Way(True)
OPTIMISED = [Way(False, True), Way(True, True)]


class Runner(Protocol):
    """What runs llama.cpp. `run` raises GGUFError."""

    def run(self, model: Header, settings: Settings, graph_opt: bool) -> Run: ...


@dataclass(frozen=True)
class LlamaBench:
    """The program `llama-bench`."""

    file: str
    extra: Sequence[str] = ()

    def run(self, model: Header, settings: Settings, graph_opt: bool) -> Run:
        counts = {"-p": settings.n_prompt, "-n": settings.n_gen, "-d": settings.n_depth}
        command = [self.file, *self.extra, "-m", process.first_file(model), "-o", "jsonl"]
        for option, values in counts.items():
            if option != "-d" or any(values):  # older builds have no -d
                command += [option, ",".join(map(str, values)) or "0"]
        command += ["-r", str(settings.repetitions + 1)]
        command += ["-t", str(settings.threads)] if settings.threads else []
        try:
            done = process.run(command, _environment(graph_opt))
        except OSError as error:
            raise GGUFError(f"{self.file}: {error.strerror}") from error
        if done.returncode:
            raise GGUFError(f"{model.path}: llama-bench failed: {process.failure(done)}")
        return parse(done.stdout.splitlines())


@dataclass(frozen=True)
class Wheel:
    """llama.cpp's server, which the wheel `xllamacpp` holds, in a process of its own."""

    def run(self, model: Header, settings: Settings, graph_opt: bool) -> Run:
        tests = settings.tests
        longest = max(test.n_depth + test.n_prompt + test.n_gen for test in tests)
        start = {"path": process.first_file(model), "n_ctx": longest + 256}
        sampling = {"repetitions": settings.repetitions + 1, "n_vocab": process.n_vocab(model)}
        request = {
            "start": {**start, "n_threads": settings.threads or 0},
            "tests": [asdict(test) for test in tests],
            "sampling": sampling,
        }
        try:
            answers = process.ask_wheel(request, _environment(graph_opt))
        except process.LoadFailed as failure:
            raise GGUFError(f"{model.path}: llama.cpp failed: {failure}") from failure
        return _run(answers, f"xllamacpp {importlib.metadata.version('xllamacpp')}")


def find_runner(llama_bench: Path | None, extra: Sequence[str]) -> Runner:
    """The program that is named, or that PATH has, or else the wheel. Raises GGUFError."""
    if llama_bench is not None:
        return LlamaBench(str(llama_bench.absolute()), extra)
    on_path = shutil.which("llama-bench")
    if on_path is not None:
        return LlamaBench(on_path, extra)
    if extra:
        raise GGUFError(
            f"{extra[0]} is for llama-bench, which is not in PATH: name it by --llama-bench FILE"
        )
    if process.available():
        return Wheel()
    raise GGUFError(
        "llama.cpp is needed, and not found: pip install 'gguf-fuse[llama]', or put its "
        "llama-bench into PATH, or name it by --llama-bench FILE"
    )


def take_turns(
    runner: Runner,
    original: Header,
    fused: Header,
    settings: Settings,
    rounds: int,
    on_start: OnStart = ignore,
    on_progress: OnProgress = ignore,
) -> Iterator[tuple[Way, Run]]:
    """Each way once a round, so that a busy moment of the machine meets all of them.

    The ways are the two files; on CUDA also both with GGML_CUDA_GRAPH_OPT=1, which runs Q, K and V
    at the same time where they are separate. Raises GGUFError where llama.cpp does not run a file.
    """
    ways = [SEPARATE, FUSED]
    on_start("llama.cpp", rounds * len(ways))
    for _ in range(rounds):
        for way in ways:  # grows in the first round
            run = runner.run(fused if way.fused else original, settings, way.graph_opt)
            if "CUDA" in run.backends and len(ways) == 2:
                ways += OPTIMISED
                on_start("llama.cpp", rounds * len(ways))
            on_progress(1)
            yield way, run


def parse(lines: Iterable[str]) -> Run:
    """What `llama-bench -o jsonl` printed of one model. Raises GGUFError."""
    try:
        answers = [json.loads(line) for line in lines]
        build = (answers[0]["build_number"], answers[0]["build_commit"])
        return _run(answers, "llama.cpp b{} ({})".format(*build))
    except (ValueError, LookupError, TypeError) as error:
        raise GGUFError(
            f"llama-bench printed no JSON as of -o jsonl, but something else ({error!r}); options "
            "after -- must not change its output"
        ) from error


def _run(answers: Sequence[dict[str, Any]], version: str) -> Run:
    """The first sample of each test pays for what is made on first use: it is left out."""
    speeds: dict[BenchTest, tuple[float, ...]] = {}
    for answer in answers:
        test = BenchTest(answer["n_prompt"], answer["n_gen"], answer.get("n_depth", 0))
        if test in speeds:
            raise GGUFError(
                f"llama-bench measured {test} twice in one process: give options after -- one "
                "value each, and no model"
            )
        speeds[test] = tuple(answer["samples_ts"][1:])
    first = answers[0]
    device = first["gpu_info"] or first["cpu_info"]
    return Run(speeds, first["backends"], device, version)


def _environment(graph_opt: bool) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if name != GRAPH_OPT}
    return others | ({GRAPH_OPT: "1"} if graph_opt else {})
