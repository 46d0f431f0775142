"""The command verify."""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Column
from rich.text import Text

import gguf_fuse
from gguf_fuse.choices import MOST_TOKENS
from gguf_fuse.cli import console
from gguf_fuse.cli.console import ms, number, text
from gguf_fuse.cli.layers import ranges
from gguf_fuse.cli.options import AsJson, ComputeThreads, Quiet, existing_file, grouped
from gguf_fuse.cli.outcome import EXIT_NOT_VERIFIED, fail, one_line, print_json
from gguf_fuse.cli.usage import complete_path
from gguf_fuse.machine import COMPUTE_THREADS
from gguf_fuse.models.names import attention_layers, other_layers
from gguf_fuse.planning.fusions import FUSIONS

if TYPE_CHECKING:
    from gguf_fuse.verifying.report import Check, Judgement, LayerReport, Structure, Timing

_FUSED = tuple(fusion.fused for fusion in FUSIONS)

_MOST_PROBLEMS = 20  # more are alike, and JSON has them all


def _count(words: str) -> Any:
    return typer.Option(min=1, max=MOST_TOKENS, help=words)


@dataclass(frozen=True)
class Computing:
    """What is computed with both files, in the order of --help."""

    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to compute: 0,5-7 or all, or 4x for 4 spread evenly; auto is all of a "
            "small model, 4x of a large one. Bytes are compared in all layers.",
            show_default="auto",
        ),
    ] = None
    n_prompt: Annotated[int, _count("Tokens of the prompt.")] = 48
    n_decode: Annotated[int, _count("Decode steps.")] = 4
    n_seqs: Annotated[int, _count("Sequences, of different lengths.")] = 3
    n_kv: Annotated[int, _count("Cells in the cache before decoding.")] = 1000
    threads: ComputeThreads = COMPUTE_THREADS
    seed: Annotated[
        int, typer.Option(min=0, max=sys.maxsize, help="Of the random activations.")
    ] = 0
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Compare the bytes, compute nothing.")
    ] = False
    llama: Annotated[
        bool, typer.Option("--llama", help="Run both in llama.cpp, too: are the answers the same?")
    ] = False
    n_gpu_layers: Annotated[
        int | None,
        typer.Option("-ngl", min=0, help="Layers llama.cpp puts on a GPU.", show_default="all"),
    ] = None

    def options(self, *, timed: bool) -> gguf_fuse.VerifyOptions:
        """Raises BadParameter."""
        from gguf_fuse.verifying.layers import parse_layers

        if self.structure_only and self.layers is not None:
            raise typer.BadParameter("--structure-only computes nothing: leave out --layers")
        try:
            layers = parse_layers(self.layers or "auto")
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--layers") from error
        return gguf_fuse.VerifyOptions(timed=timed, **(vars(self) | {"layers": layers}))


@grouped
def verify(
    original: Annotated[
        str, existing_file("ORIGINAL", "The file before; left out with --manifest.")
    ],
    fused: Annotated[str | None, existing_file("FUSED", "The file after.")] = None,
    manifest: Annotated[
        str | None,
        typer.Option(
            "--manifest",
            metavar="FILE",
            help="Compare FUSED with the SHA-256s that fuse or unfuse --manifest wrote to FILE; "
            "compute nothing.",
            autocompletion=complete_path,
        ),
    ] = None,
    *,
    what: Computing,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Every check and its limit, and the time taken.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove that FUSED holds what ORIGINAL holds and computes what it computes.

    With --manifest, that it is what was written: then ORIGINAL is not needed.
    """
    if manifest is not None:
        if fused is not None:
            raise typer.BadParameter("--manifest proves FUSED alone: leave out ORIGINAL")
        if what.layers is not None or what.llama:
            raise typer.BadParameter("--manifest computes nothing: leave out --layers and --llama")
        with console.progress_bar(quiet, of_bytes=True) as bar:
            by_hash = gguf_fuse.VerifyOptions(
                threads=what.threads, on_start=bar.start, on_progress=bar.advance
            )
            found = gguf_fuse.verify_manifest(manifest, original, by_hash)
        return _tell(found, verbose, as_json, quiet)
    if fused is None:
        raise typer.BadParameter("FUSED is missing: gguf-fuse verify [OPTIONS] ORIGINAL FUSED")
    options = what.options(timed=verbose or as_json)
    with console.progress_bar(quiet) as bar:
        shown = replace(options, on_start=bar.start, on_progress=bar.advance)
        report = gguf_fuse.verify(original, fused, shown)
    if report.exchanged:
        words = f"{original} is the fused file, {fused} the original: verified that way round"
        print(f"gguf-fuse: {one_line(words)}", file=sys.stderr)
    if as_json:
        print_json(_json(report))
    elif not quiet:
        console.print_parts(_parts(report, verbose))
    if not report.ok:
        fail(_failure(report), EXIT_NOT_VERIFIED)
    if not (as_json or quiet):
        _print_sentence(_verdict(report))


def _tell(found: gguf_fuse.ManifestReport, verbose: bool, as_json: bool, quiet: bool) -> None:
    """What verifying by a manifest found."""
    if as_json:
        print_json(_manifest_json(found))
    elif not quiet:
        console.print_parts([*_hashed_parts(found, verbose), *_problem_parts(found.problems)])
    if not found.ok:
        fail(_failed(found.problems, f"do not use {found.fused}"), EXIT_NOT_VERIFIED)
    if not (as_json or quiet):
        _print_sentence(
            f"Identical: {found.n_tensors} tensors and all else, byte for byte, to what "
            f"{found.manifest} tells. Safe to use {found.fused}."
        )


def _hashed_parts(found: gguf_fuse.ManifestReport, verbose: bool) -> Iterator[RenderableType]:
    if verbose:
        speed = decimal(int(found.n_bytes / max(found.seconds, 1e-9)))
        yield _mark(found.ok).append(
            f" SHA-256: {decimal(found.n_bytes)} hashed in {found.seconds:.2f} s ({speed}/s)"
        )
        yield text()


def _manifest_json(found: gguf_fuse.ManifestReport) -> dict[str, Any]:
    return {
        "ok": found.ok,
        "manifest": found.manifest,
        "fused": found.fused,
        "tensors_out": found.n_tensors,
        "bytes_hashed": found.n_bytes,
        "structure": {"ok": found.ok, "problems": list(found.problems), "notes": []},
        "seconds": round(found.seconds, 3),
    }


def _json(report: gguf_fuse.Report) -> dict[str, Any]:
    structure, timing = report.structure, report.timing
    times: dict[str, Any] = {}
    if timing is not None:
        times = {"layer": timing.layer, "n_tokens": timing.n_tokens, "n_kv": timing.n_kv}
        times |= {f"{name}_ms": round(taken.median, 4) for name, taken in timing.ms.items()}
        times["fused_is"] = timing.gain.word
    return {
        "ok": report.ok,
        "original": report.original.path,
        "fused": report.fused.path,
        "exchanged": report.exchanged,
        "tensors_in": len(report.original.tensors),
        "tensors_out": len(report.fused.tensors),
        "bytes_compared": structure.n_bytes,
        "layers_fused": structure.n_fused,
        "layers_fused_experts": structure.n_fused_experts,
        "layers_split_ssm_in": structure.n_split_ssm_in,
        "structure": {
            "ok": structure.ok,
            "problems": list(structure.problems),
            "notes": list(structure.notes),
        },
        "layers": [_layer_json(layer) for layer in report.layers],
        "llama": report.llama and _llama_json(report.llama),
        "timing": times | {"structure_s": round(structure.seconds, 3)},
    }


def _layer_json(layer: LayerReport) -> dict[str, Any]:
    checks = {
        name: {"error": _finite(check.error), "limit": _finite(check.limit), "ok": check.ok}
        for name, check in layer.checks.items()
    }
    note = {"note": layer.note} if layer.note else {}
    return {"layer": layer.layer, "ok": layer.ok, "checks": checks} | note


def _llama_json(llama: Judgement) -> dict[str, Any]:
    difference = None if llama.difference is None else _finite(llama.difference)
    return {"ok": llama.problem is None, **asdict(llama), "difference": difference}


def _finite(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None


def _parts(report: gguf_fuse.Report, verbose: bool) -> Iterator[RenderableType]:
    """What comes before the verdict: details, what to know, and what is wrong."""
    if verbose:
        yield _structure_line(report.structure)
        yield from _number_parts(report)
        if report.timing is not None:
            yield from _timing_lines(report.timing)
        yield text()
    yield from (text(note, "yellow") for note in report.structure.notes)
    notes: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.note:  # each note once, with the layers that it is about
            notes.setdefault(layer.note, []).append(layer.layer)
    yield from (text(f"{ranges(names)}: {note}", "yellow") for note, names in notes.items())
    yield from _problem_parts(_problems(report))


def _problem_parts(problems: Sequence[str]) -> Iterator[RenderableType]:
    if len(problems) > 1:  # a single one is told at the end
        yield from (text(problem, "red") for problem in problems[:_MOST_PROBLEMS])
    if len(problems) > _MOST_PROBLEMS:
        yield text(f"and {len(problems) - _MOST_PROBLEMS} more (--json has all)", "red")


def _print_sentence(verdict: str) -> None:
    """In a pipe that is one line, however long the name."""
    out, sentence = console.printer(), one_line(verdict)
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        sentence = textwrap.fill(sentence, out.width, break_on_hyphens=False)
    print(sentence)


def _verdict(report: gguf_fuse.Report) -> str:
    """In one sentence."""
    original, fused = report.original, report.fused
    sentence = f"Identical: {len(original.tensors)} tensors and all metadata, byte for byte"
    parts = [sentence, *_fused_in(report), *_computed(report), *_judged(report.llama)]
    return f"{'; '.join(parts)}. Safe to use {fused.path}."


def _fused_in(report: gguf_fuse.Report) -> list[str]:
    """What is fused, where it is not that which was expected."""
    counts = report.structure
    if counts.n_fused or counts.n_fused_experts or counts.n_split_ssm_in:
        return []
    made = any(f".{name}." in t.name for t in report.fused.tensors for name in _FUSED)
    return ["both are fused alike" if made else "neither is fused"]


def _computed(report: gguf_fuse.Report) -> list[str]:
    """How far the numbers go, which the bytes already settle."""
    if not report.layers:
        return ["attention not computed"]
    whole = [layer for layer in report.layers if layer.checks and not layer.note]
    n_partly = sum(bool(layer.checks) for layer in report.layers) - len(whole)
    tensors = report.original.tensors
    n_layers = len(attention_layers(tensors)) + len(other_layers(tensors))
    partly = any(layer.note for layer in report.layers)
    line = "attention computed PARTLY," if partly else "attention computed"
    line += f" in {len(whole) or 'none'} of {n_layers} layers"
    line += f" (projections alone in {n_partly})" if n_partly else ""
    checks = [check for layer in report.layers for check in layer.checks.values()]
    if checks:
        worst = max(checks, key=lambda check: check.error)
        line += f", largest error {worst.error:.1e} of a limit of {worst.limit:.1e}"
    return [line]


def _judged(llama: Judgement | None) -> list[str]:
    if llama is None:
        return []
    if llama.difference == 0:
        return [f"identical log-probabilities in llama.cpp on {llama.device}"]
    return [
        f"log-probabilities in llama.cpp on {llama.device} differ by up to {llama.difference:.2g}, "
        f"limit {llama.limit:.2g}: twice what the batch size makes in the original"
    ]


def _failure(report: gguf_fuse.Report) -> str:
    (advice,) = _fused_in(report) or [f"do not use {report.fused.path}"]
    return _failed(_problems(report), advice)


def _failed(problems: Sequence[str], advice: str) -> str:
    first, *others = problems
    more = f" (and {len(others)} more)" if others else ""
    return f"verification failed: {first}{more}; {advice}"


def _problems(report: gguf_fuse.Report) -> list[str]:
    return [
        *report.structure.problems,
        *(
            f"{layer.layer}: {name}: error {check.error:.2e}, limit {check.limit:.2e}"
            for layer in report.layers
            for name, check in layer.checks.items()
            if not check.ok
        ),
        *([report.llama.problem] if report.llama and report.llama.problem else []),
    ]


def _structure_line(structure: Structure) -> Text:
    layers, n_experts = _n_layers(structure.n_fused, "fused layer"), structure.n_fused_experts
    layers += f" of attention, {n_experts} of experts" if n_experts else ""
    layers += f", {structure.n_split_ssm_in} of ssm_in" if structure.n_split_ssm_in else ""
    speed = decimal(int(structure.n_bytes / max(structure.seconds, 1e-9)))
    return _mark(structure.ok).append(
        f" structure: {layers}; {decimal(structure.n_bytes)} of tensors compared in "
        f"{structure.seconds:.2f} s ({speed}/s)"
    )


def _n_layers(n: int, words: str = "layer") -> str:
    return f"{n} {words}{'' if n == 1 else 's'}"


def _mark(ok: bool) -> Text:
    return text("ok", "green") if ok else text("FAILED", "bold red")


def _number_parts(report: gguf_fuse.Report) -> Iterator[RenderableType]:
    if not report.layers:
        return
    ok = all(layer.ok for layer in report.layers)
    partly = ok and any(layer.note for layer in report.layers)
    mark = text("PARTLY", "yellow") if partly else _mark(ok)
    computed = [layer for layer in report.layers if layer.checks]
    yield mark.append(_numbers_line(computed, len(report.layers) - len(computed)))
    if computed:
        yield text()
        yield _checks_table(computed)
        yield text()


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


def _timing_lines(timing: Timing) -> Iterator[Text]:
    tokens = "1 token" if timing.n_tokens == 1 else f"{timing.n_tokens} tokens"
    times = {
        name: f"{ms(taken.median)} ms ({ms(taken.low)} to {ms(taken.high)})"
        for name, taken in timing.ms.items()
    }
    word = timing.gain.word
    yield text(
        f"time in {timing.layer}, {tokens} at once: projections {times['separate']} separate, "
        f"{times['fused']} fused: {word}; medians, and the middle half in brackets"
    )
    if "split" in times:
        yield text(
            f"decode over {timing.n_kv} cells: {times['expand']} expanded, {times['broadcast']} "
            f"broadcast, {times['split']} split"
        )
