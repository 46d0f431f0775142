"""compare: both files run in llama.cpp for real, and what is made of the samples."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_fuse.cli.compare import _Comparison as Comparison
from gguf_fuse.cli.compare import _parts as parts_of
from gguf_fuse.cli.console import print_parts
from gguf_fuse.format.parser import read_header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.llama import bench
from gguf_fuse.llama.bench import FUSED, OPTIMISED, SEPARATE, BenchTest, Run, Settings
from gguf_fuse.llama.compare import best, rows
from scripts.gpu_gains import MODELS, generation, read_samples
from tests.compare import needs_llama_cpp
from tests.conftest import fused_copy, gguf_fuse

Model = Callable[..., Path]

PROMPT, GENERATION = BenchTest(32, 0), BenchTest(0, 8)
SHORT = ("-p", "8", "-n", "4", "-r", "2", "--threads", "1")
WITHOUT_LLAMA_BENCH = {**os.environ, "PATH": ""}


def printed() -> list[str]:
    """By a real `llama-bench -p 32 -n 8 -r 3 -o jsonl`, of one model and then of another."""
    return Path(__file__).with_name("llama-bench.jsonl").read_text().splitlines()


def a_run(speeds: list[float], backends: str = "CPU") -> Run:
    return Run({PROMPT: tuple(speeds)}, backends, "a processor", "llama.cpp")


def test_what_llama_bench_prints() -> None:
    run = bench.parse(printed()[:2])
    assert run.speeds == {PROMPT: (3087.87, 3050.17), GENERATION: (896.604, 683.981)}
    assert (run.backends, run.device) == ("CPU", "AMD EPYC")
    assert run.version == "llama.cpp b1 (de3ff81)"


def test_two_models_in_one_process_are_refused() -> None:
    with pytest.raises(GGUFError, match="measured pp32 twice in one process"):
        bench.parse(printed())


@pytest.mark.parametrize("lines", [[], ["| model | size |"], ["{}"], ["[1]"]])
def test_other_output_is_one_line(lines: list[str]) -> None:
    with pytest.raises(GGUFError, match="printed no JSON as of -o jsonl"):
        bench.parse(lines)


@pytest.mark.parametrize(
    ("test", "name"),
    [
        (BenchTest(512, 0), "pp512"),
        (BenchTest(0, 128, 16384), "tg128 @ d16384"),
        (BenchTest(4, 8), "pp4+tg8"),
    ],
)
def test_tests_are_called_as_llama_bench_calls_them(test: BenchTest, name: str) -> None:
    assert str(test) == name


def test_the_gains_of_a_gpu() -> None:
    """From the raw samples of an H200, against medians that were taken another way."""
    models = read_samples()
    assert list(models) == list(MODELS)
    found = {}
    for name, runs in models.items():
        gains = [row for row in rows(runs) if row.test == generation(name) and not row.graph_opt]
        (row,) = gains
        assert row.gain.low <= row.gain.ratio <= row.gain.high
        assert row.fused / row.separate == pytest.approx(row.gain.ratio)
        found[name] = round(100 * (row.gain.ratio - 1), 1)
    measured = {"moe": 9.6, "q06b": 11.1, "l1b": 6.3, "q8b": 5.9, "q8mix": 3.0, "q8prom": 6.4}
    measured |= {"g12b": 6.0, "q4bf16": 1.7, "q8d": 5.2}
    assert found == pytest.approx(measured, abs=0.5)  # with the first sample of each process


def test_a_gain_that_is_known() -> None:
    noise = [1.01, 0.99, 1.0]
    before = [a_run([100 * x * y for x in noise]) for y in 3 * noise]
    after = [a_run([110 * x * y for x in noise]) for y in 3 * noise]
    (row,) = rows({SEPARATE: before, FUSED: after})
    assert (row.separate, row.fused) == pytest.approx((100, 110), rel=1e-3)
    assert row.gain.ratio == pytest.approx(1.1)
    assert 1.07 < row.gain.low < 1.1 < row.gain.high < 1.13
    assert row.gain.word == "faster"
    (row,) = rows({SEPARATE: after, FUSED: before})
    assert row.gain.word == "slower"
    (row,) = rows({SEPARATE: before[1:], FUSED: after})
    assert row.gain.word == "too few rounds"


def test_an_incomplete_round_is_left_out() -> None:
    odd = a_run([1.0, 1.0])
    even = [a_run([100.0, 100.0])] * 4
    (row,) = rows({SEPARATE: [*even, odd], FUSED: even, OPTIMISED[0]: [odd]})
    assert (row.separate, row.fused) == (100, 100)


def test_the_best_of_four_ways() -> None:
    speeds = {SEPARATE: 100.0, FUSED: 110.0, OPTIMISED[0]: 105.0, OPTIMISED[1]: 110.1}
    runs = {way: [a_run([x, x + 1, x - 1])] * 9 for way, x in speeds.items()}
    (one,) = best(runs)
    assert (one.way, one.equal) == (OPTIMISED[1], (FUSED,))
    assert str(one.way) == "fused with GGML_CUDA_GRAPH_OPT=1"


@pytest.mark.parametrize("columns", [50, 60, 80, 120])
def test_no_interval_is_broken(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is little room, the speeds are left out: the gain says what they say."""
    monkeypatch.setenv("COLUMNS", str(columns))
    runs = {SEPARATE: [a_run([100.0, 101.0])] * 9, FUSED: [a_run([99.0, 112.0])] * 9}
    print_parts(parts_of(Comparison(Path("in.gguf"), Path("out.gguf"), Settings(), 9, (), runs)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    (row,) = (line for line in lines if line.startswith("pp32"))
    assert re.search(r" \+4\.6 %  [+-]\d+\.\d % to [+-]\d+\.\d %  no", row)
    assert ("100.5" in row) == (columns >= 80)


class Recorder:
    """What is asked of llama.cpp where the backend is another than this machine has."""

    def __init__(self, backends: str) -> None:
        self.backends = backends
        self.asked: list[tuple[str, bool]] = []

    def run(self, model: bench.Header, settings: Settings, graph_opt: bool) -> Run:
        self.asked.append((Path(model.path).name, graph_opt))
        return a_run([1.0], self.backends)


@pytest.mark.parametrize(("backends", "n_ways"), [("CPU", 2), ("CUDA", 4), ("CUDA,BLAS", 4)])
def test_cuda_is_also_run_with_its_own_optimisation(
    model: Model, backends: str, n_ways: int
) -> None:
    original = model()
    fused = fused_copy(original)
    recorder, steps = Recorder(backends), list[int]()
    headers = read_header(original), read_header(fused)
    turns = bench.take_turns(recorder, *headers, Settings(), 2, lambda _, n: steps.append(n))
    ways = [way for way, _ in turns]
    assert ways == [SEPARATE, FUSED, *OPTIMISED][:n_ways] * 2
    names = {False: original.name, True: fused.name}
    assert recorder.asked == [(names[way.fused], way.graph_opt) for way in ways]
    assert steps[-1] == len(ways)


def test_graph_opt_is_in_the_environment_only_where_it_is_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(bench.GRAPH_OPT, "1")  # of the user's own
    assert bench.GRAPH_OPT not in bench._environment(False)
    assert bench._environment(True)[bench.GRAPH_OPT] == "1"


@needs_llama_cpp
def test_a_real_run(model: Model) -> None:
    original = model()
    fused = fused_copy(original)
    command = ("compare", original, fused, *SHORT, "-d", "0,16", "--rounds", 2, "--json")
    done = gguf_fuse(*command, env=WITHOUT_LLAMA_BENCH)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert (answer["rounds"], answer["rounds_done"]) == (2, 2)
    assert answer["version"].startswith("xllamacpp ")
    tests = ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"]
    assert [row["test"] for row in answer["rows"]] == tests
    for row in answer["rows"]:
        assert row["separate"] > 0
        assert row["fused"] / row["separate"] == pytest.approx(row["gain"]["ratio"])
    of_each = {(sample["way"], sample["round"], sample["test"]) for sample in answer["samples"]}
    assert len(of_each) == len(answer["samples"]) == 2 * 2 * len(tests)
    assert {len(sample["samples_ts"]) for sample in answer["samples"]} == {2}


@needs_llama_cpp
def test_a_section_for_a_model_card_and_a_plot(model: Model, tmp_path: Path) -> None:
    original = model()
    fused = fused_copy(original)
    command = ("compare", original, fused, *SHORT, "--rounds", 1, "--markdown")
    done = gguf_fuse(*command, "--plot", tmp_path / "gain.svg", env=WITHOUT_LLAMA_BENCH)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "## Speed in llama.cpp: `in-fused.gguf` against `in.gguf`"
    assert "; xllamacpp " in lines[2]
    options = "-p 8 -n 4 -d 0 -r 2 --rounds 1 --threads 1"
    assert lines[4] == f"    gguf-fuse compare in.gguf in-fused.gguf {options}"
    table = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in table] == ["| test", "| ---", "| pp8", "| tg4"]
    assert {row[-1] for row in table[2:]} == {"too few rounds |"}
    assert lines[-1] == "Too few rounds to conclude: give --rounds 9 or more."
    assert "tg4" in (tmp_path / "gain.svg").read_text()


@needs_llama_cpp
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_an_interruption_shows_what_is_done(model: Model) -> None:
    original = model()
    command = [sys.executable, "-m", "gguf_fuse", "compare", original, fused_copy(original), *SHORT]
    process = subprocess.Popen(
        [*map(str, command), "--rounds", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=WITHOUT_LLAMA_BENCH,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    seen = set[str]()
    while len(seen) < 4:  # the first round is done when the third process runs
        assert process.poll() is None
        seen |= set(children.read_text().split())
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("gguf-fuse: interrupted; ")
    assert err.endswith(" of 500 rounds were done\n")
    assert out.splitlines()[2].split() == [
        "test",
        "separate",
        "fused",
        "gain",
        "95",
        "%",
        "interval",
    ]
    assert "tg4" in out


@needs_llama_cpp
def test_a_file_that_llama_cpp_refuses_is_one_line(model: Model) -> None:
    original = model(architecture="bitnet")
    fused = fused_copy(original, any_architecture=True)
    done = gguf_fuse("compare", original, fused, *SHORT, env=WITHOUT_LLAMA_BENCH)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"gguf-fuse: {fused}: llama.cpp failed: ")
    assert done.stderr.endswith("tensor 'blk.0.attn_q.weight' not found\n")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("/bin/false", "llama-bench failed: no message"),
        ("/bin/true", "printed no JSON"),
        ("/absent", "^/absent: No such file or directory$"),
    ],
)
def test_a_program_that_is_no_llama_bench(packed: Path, program: str, words: str) -> None:
    with pytest.raises(GGUFError, match=words):
        bench.find_runner(Path(program), ()).run(read_header(packed), Settings(), False)


def test_without_llama_cpp_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        GGUFError, match=r"pip install 'gguf-fuse\[llama\]', or put its llama-bench"
    ):
        bench.find_runner(None, ())


def test_options_of_llama_bench_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(GGUFError, match="-ngl is for llama-bench, which is not in PATH"):
        bench.find_runner(None, ["-ngl", "20"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "0", "-n", "0"], "nothing to time"),
        (["-p", "8,x"], "'8,x': write numbers of tokens as 8,512"),
        (["c.gguf"], "c.gguf: two files are compared"),
        (["-q"], "-q leaves nothing to show"),
        (["--json", "--markdown"], "give --json or --markdown, not both"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str) -> None:
    done = gguf_fuse("compare", "a.gguf", "b.gguf", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in " ".join(done.stderr.replace("│", "").split())
