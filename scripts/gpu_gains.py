"""What fusing gained on a GPU: the README's table and picture, from the raw samples.

scripts/data/h200.jsonl has one line per process and test: `llama-bench -ngl 99 -fa 1 -r 5` of
llama.cpp v0.5.0 with CUDA on an NVIDIA H200, both files in turn, random weights in the shapes of
real models.

    python scripts/gpu_gains.py --plot scripts/data/h200.svg
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from gguf_fuse.llama.bench import FUSED, OPTIMISED, SEPARATE, BenchTest, Run, Way
from gguf_fuse.llama.compare import Runs, compare, median
from gguf_fuse.measuring.gain import Gain

SAMPLES = Path(__file__).parent / "data" / "h200.jsonl"

MODELS = {  # as the samples call them
    "moe": "Qwen3-30B-A3B Q4_0",
    "q06b": "Qwen3-0.6B Q8_0",
    "l1b": "Llama-3.2-1B Q4_0",
    "q8b": "Qwen3-8B Q4_0",
    "q8mix": "Qwen3-8B Q4_K, half of the layers fused",
    "q8prom": "Qwen3-8B Q4_K and Q6_K, all fused",
    "g12b": "Gemma-3-12B Q4_0",
    "q4bf16": "Qwen3-4B F16",
    "q8d": "Qwen3-8B Q4_0, 16,384 tokens deep",
}
GENERATION = {"q8d": BenchTest(0, 64, 16384)}
NONE = "\N{EN DASH}"
OTHERS = (BenchTest(8, 0), BenchTest(512, 0))


def read_samples(path: Path = SAMPLES) -> dict[str, Runs]:
    """Of each model: its runs, without the first sample of each, which pays for the start."""
    speeds: dict[tuple[str, Way, int], dict[BenchTest, tuple[float, ...]]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        one = json.loads(line)
        way = Way(one["fused"], bool(one["graph_opt"]))
        test = BenchTest(one["n_prompt"], one["n_gen"], one["depth"])
        speeds[one["model"], way, one["round"]][test] = tuple(one["samples_ts"][1:])
    models: dict[str, dict[Way, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for model, way, number in sorted(speeds):
        run = Run(speeds[model, way, number], "CUDA", "NVIDIA H200", "llama.cpp v0.5.0")
        models[model][way].append(run)
    return {name: models[name] for name in MODELS}


def generation(model: str) -> BenchTest:
    return GENERATION.get(model, BenchTest(0, 128))


def table(models: dict[str, Runs]) -> str:
    """Generation; the last column is the faster fused way against separate with GRAPH_OPT."""
    lines = [
        "| model | separate | fused | gain | 95 % interval | separate, GRAPH_OPT=1 | "
        "fused against that |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, runs in models.items():
        test = generation(model)
        plain = compare(runs[SEPARATE], runs[FUSED], test)
        cells = [f"{median(runs[way], test):.1f}" for way in (SEPARATE, FUSED)]
        cells += [percent(plain.ratio), f"{percent(plain.low)} to {percent(plain.high)}"]
        optimised, fused = (runs.get(way) for way in OPTIMISED)
        if optimised and fused:
            best = max((runs[FUSED], fused), key=lambda way: median(way, test))
            against = compare(optimised, best, test)
            cells += [f"{median(optimised, test):.1f}", percent(against.ratio)]
        else:
            cells += [NONE, NONE]
        name = MODELS[model] + (" (one round)" if len(runs[FUSED]) == 1 else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def other_tests(models: dict[str, Runs]) -> str:
    """Gains of a small batch and of a prompt."""
    lines = ["| model | batch of 8 tokens | prompt of 512 |", "| --- | --- | --- |"]
    for model, runs in models.items():
        known = [test in runs[FUSED][0].speeds for test in OTHERS]
        found = [
            percent(compare(runs[SEPARATE], runs[FUSED], test).ratio) if there else NONE
            for test, there in zip(OTHERS, known, strict=True)
        ]
        if any(known):
            lines.append(f"| {MODELS[model]} | {' | '.join(found)} |")
    return "\n".join(lines)


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def draw(models: dict[str, Runs], path: Path) -> None:
    """Gain of each way over separate, in generation; the interval of fused as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    styles = {
        FUSED: ("o", "#1b7837", "fused"),
        OPTIMISED[0]: ("D", "#777777", "separate, GGML_CUDA_GRAPH_OPT=1"),
        OPTIMISED[1]: ("^", "#7fbf7b", "fused, GGML_CUDA_GRAPH_OPT=1"),
    }
    for way, (marker, colour, label) in styles.items():
        gains = {
            at: compare(runs[SEPARATE], runs[way], generation(model))
            for at, (model, runs) in enumerate(models.items())
            if runs.get(way)
        }
        if way == FUSED:
            ends = [gains_of(gain) for gain in gains.values()]
            axes.hlines(list(gains), *zip(*ends, strict=True), color=colour, linewidth=2)
        x = [100 * (gain.ratio - 1) for gain in gains.values()]
        axes.plot(x, list(gains), marker, color=colour, label=label, markersize=7)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(models)), [MODELS[model] for model in models])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("tokens per second, against separate (%); line: 95 % interval of fused")
    figure.suptitle("Generation in llama.cpp v0.5.0 on an NVIDIA H200, medians of runs in turn")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gguf-fuse"}):
        figure.savefig(path, dpi=200, metadata={"Date": None})


def gains_of(gain: Gain) -> tuple[float, float]:
    return 100 * (gain.low - 1), 100 * (gain.high - 1)


def main(
    plot: Annotated[Path | None, typer.Option(help="Draw the picture, as SVG.")] = None,
) -> None:
    models = read_samples()
    print(f"{table(models)}\n\n{other_tests(models)}")
    if plot is not None:
        draw(models, plot)


if __name__ == "__main__":
    typer.run(main)
