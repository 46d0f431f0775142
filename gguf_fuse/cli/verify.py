"""The command verify."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Column
from rich.text import Text

import gguf_fuse
from gguf_fuse.cli import console
from gguf_fuse.cli.console import ms, number, text
from gguf_fuse.cli.layers import ranges
from gguf_fuse.cli.options import AsJson, ComputeThreads, Quiet, existing_file
from gguf_fuse.machine import COMPUTE_THREADS

if TYPE_CHECKING:
    from gguf_fuse.verifying.report import Check, LayerReport, Structure, Timing

_MOST = 1 << 24  # tokens, cells or sequences: more is a slip of the keyboard
_MOST_PROBLEMS = 20  # more are alike, and JSON has them all


def _count(words: str) -> Any:
    return typer.Option(min=1, max=_MOST, help=words)


def verify(
    original: Annotated[Path, existing_file("ORIGINAL", "The file before.")],
    fused: Annotated[Path, existing_file("FUSED", "The file after.")],
    layers: Annotated[
        str,
        typer.Option(
            help="Layers to compute: 0,5-7 or all, or 4x for 4 spread evenly; auto is all of a "
            "small model, 4x of a large one. Bytes are compared in all layers."
        ),
    ] = "auto",
    n_prompt: Annotated[int, _count("Tokens of the prompt.")] = 48,
    n_decode: Annotated[int, _count("Decode steps.")] = 4,
    n_seqs: Annotated[int, _count("Sequences, of different lengths.")] = 3,
    n_kv: Annotated[int, _count("Cells in the cache before decoding.")] = 1000,
    threads: ComputeThreads = COMPUTE_THREADS,
    seed: Annotated[int, typer.Option(min=0, help="Of the random activations.")] = 0,
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Compare the bytes, compute nothing.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove that FUSED holds what ORIGINAL holds and computes what it computes."""
    from gguf_fuse.verifying.layers import parse_layers

    try:
        choice = parse_layers(layers)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layers") from error
    with console.progress_bar(quiet) as bar:
        options = gguf_fuse.VerifyOptions(
            layers=choice,
            n_prompt=n_prompt,
            n_decode=n_decode,
            n_seqs=n_seqs,
            n_kv=n_kv,
            threads=threads,
            seed=seed,
            structure_only=structure_only,
            on_start=bar.start,
            on_progress=bar.advance,
        )
        report = gguf_fuse.verify(original, fused, options)
    if as_json:
        console.print_json(_json(report))
    elif not quiet:
        console.print_parts(_parts(report))
    if not report.ok:
        problems = [*report.structure.problems, *_number_problems(report)]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        console.fail(f"verification failed: {problems[0]}{more}", console.EXIT_NOT_VERIFIED)


def _json(report: gguf_fuse.Report) -> dict[str, Any]:
    structure, timing = report.structure, report.timing
    times: dict[str, Any] = {}
    if timing is not None:
        times = {"layer": timing.layer, "n_tokens": timing.n_tokens, "n_kv": timing.n_kv}
        times |= {f"{name}_ms": round(value, 4) for name, value in timing.ms.items()}
    return {
        "ok": report.ok,
        "structure": {"ok": structure.ok, "problems": list(structure.problems)},
        "layers": [_layer_json(layer) for layer in report.layers],
        "timing": times | {"structure_s": round(structure.seconds, 3)},
    }


def _layer_json(layer: LayerReport) -> dict[str, Any]:
    checks = {
        name: {"error": _finite(check.error), "limit": _finite(check.limit), "ok": check.ok}
        for name, check in layer.checks.items()
    }
    remark = layer.problem or layer.note
    note = {"note": remark} if remark else {}
    return {"layer": layer.layer, "ok": layer.ok, "checks": checks} | note


def _finite(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None


def _parts(report: gguf_fuse.Report) -> Iterator[RenderableType]:
    """For people: bytes, numbers, time, and what is wrong."""
    yield from _structure_lines(report.structure)
    if report.layers:
        yield from _number_parts(report)
        if report.timing is not None:
            yield from _timing_lines(report.timing)


def _structure_lines(structure: Structure) -> Iterator[Text]:
    layers, n_experts = _n_layers(structure.n_fused, "fused layer"), structure.n_fused_experts
    layers += f" of attention, {n_experts} of experts" if n_experts else ""
    speed = decimal(int(structure.n_bytes / max(structure.seconds, 1e-9)))
    yield _mark(structure.ok).append(
        f" structure: {layers}; {decimal(structure.n_bytes)} of tensors compared in "
        f"{structure.seconds:.2f} s ({speed}/s)"
    )
    problems = structure.problems
    yield from (text(f"  {problem}", "red") for problem in problems[:_MOST_PROBLEMS])
    if len(problems) > _MOST_PROBLEMS:
        yield text(f"  and {len(problems) - _MOST_PROBLEMS} more (--json has all)", "red")


def _n_layers(n: int, words: str = "layer") -> str:
    return f"{n} {words}{'' if n == 1 else 's'}"


def _mark(ok: bool) -> Text:
    return text("ok", "green") if ok else text("FAILED", "bold red")


def _number_parts(report: gguf_fuse.Report) -> Iterator[RenderableType]:
    ok = all(layer.ok for layer in report.layers)
    partly = ok and any(layer.note for layer in report.layers)
    mark = text("PARTLY", "yellow") if partly else _mark(ok)
    computed = [layer for layer in report.layers if layer.checks]
    yield mark.append(_numbers_line(computed, len(report.layers) - len(computed)))
    if computed:
        yield text()
        yield _checks_table(computed)
        yield text()
    yield from (text(line, "red") for line in _number_problems(report))
    notes: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.note:  # each note once, with the layers that it is about
            notes.setdefault(layer.note, []).append(layer.layer)
    yield from (text(f"{ranges(names)}: {note}", "yellow") for note, names in notes.items())


def _numbers_line(computed: Sequence[LayerReport], n_left: int) -> str:
    """How many layers the table below is about, and how many it is not about."""
    n_partly = sum(layer.note is not None for layer in computed)
    line = f" numbers: {_n_layers(len(computed))} computed"
    line += f", {n_partly} of them without attention" if n_partly else ""
    line += f", {n_left} not" if n_left else ""
    return f"{line}; largest errors against float64" if computed else line


def _checks_table(layers: Sequence[LayerReport]) -> console.Fitting:
    """All checks of each layer; the narrow one has only the check that is nearest to its limit."""
    names = list(dict.fromkeys(name for layer in layers for name in layer.checks))
    short = [name.replace("projection", "project").replace("_", "\n") for name in names]
    checks = [number(title, min_width=7) for title in short]
    columns = [Column("layer", no_wrap=True), *checks, number("of\nlimit", min_width=5)]
    wide, narrow = list[list[Any]](), list[list[Any]]()
    for layer in layers:
        worst, check = max(layer.checks.items(), key=lambda item: _of_limit(item[1]))
        used = _of_limit(check)
        share = text(f"{used:.0%}") if used <= 1 else text("over", "bold red")
        wide.append([layer.layer, *(_error(layer.checks.get(name)) for name in names), share])
        narrow.append([layer.layer, worst, _error(check), share])
    titles = [Column(title, overflow="fold") for title in ("layer", "worst check")]
    titles += [number(title, overflow="fold") for title in ("error", "of limit")]
    return console.Fitting(console.table(columns, wide), console.table(titles, narrow))


def _error(check: Check | None) -> Text:
    return text(f"{check.error:.1e}", "" if check.ok else "bold red") if check else text("-")


def _of_limit(check: Check) -> float:
    return check.error / check.limit if math.isfinite(check.error) else math.inf


def _number_problems(report: gguf_fuse.Report) -> Iterator[str]:
    for layer in report.layers:
        if layer.problem:
            yield f"{layer.layer}: {layer.problem}"
        for name, check in layer.checks.items():
            if not check.ok:
                yield f"{layer.layer}: {name}: error {check.error:.2e}, limit {check.limit:.2e}"


def _timing_lines(timing: Timing) -> Iterator[Text]:
    tokens = "1 token" if timing.n_tokens == 1 else f"{timing.n_tokens} tokens"
    times = {name: f"{ms(value)} ms" for name, value in timing.ms.items()}
    yield text(
        f"time in {timing.layer}, {tokens} at once: projections {times['separate']} separate, "
        f"{times['fused']} fused"
    )
    if "split" in times:
        yield text(
            f"decode over {timing.n_kv} cells: {times['expand']} expanded, {times['broadcast']} "
            f"broadcast, {times['split']} split"
        )
