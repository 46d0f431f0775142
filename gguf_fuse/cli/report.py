"""Results as tables for people and as objects for machines. Prints nothing."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gguf_fuse.api import Inspection, Result
from gguf_fuse.format.header import Header
from gguf_fuse.format.types import type_name
from gguf_fuse.planning.fusions import FUSIONS, GATE_UP, QKV
from gguf_fuse.planning.loaders import FIRST_BUILD, Architecture, Loader, Proof
from gguf_fuse.planning.plan import Layer, Plan, Status

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from gguf_fuse.measuring.bench import Bench, DecodeRow, ProjectionRow
    from gguf_fuse.verifying.report import Check, LayerReport, Report, Timing
    from gguf_fuse.verifying.structure import Structure

_INSPECT_STATUS = {
    Status.FUSABLE: "fusable",
    Status.FUSED: "fused",
    Status.MISMATCH: "not fusable",
    Status.INCOMPLETE: "not fusable",
    Status.SEPARATE: "separate",
}
_INSPECT_LOADER = {
    Loader.READS_FUSED: "reads fused",
    Loader.ALREADY_FUSED: "reads fused",
    Loader.NEEDS_SEPARATE: "needs separate",
    Loader.CRASHES: "needs separate",
    Loader.NO_ATTENTION: "unknown",
    Loader.UNKNOWN: "unknown",
}


def one_line(text: str, most: int = 1000) -> str:
    """Fit for a terminal, whatever a damaged file put into a name; what is too long is cut."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 3 :]}"


def _text(content: str = "", style: str = "") -> Text:
    return Text(one_line(content), style)


# -- for machines -------------------------------------------------------------------------------


def result_json(result: Result) -> dict[str, Any]:
    plan = result.plan
    return _rewrite_json(
        result.source, result.output, plan.changed, plan.skipped, len(plan.tensors)
    ) | {
        "files": [str(path) for path in result.files],
        "bytes_copied": result.written.n_copied,
        "bytes_cloned": result.written.n_cloned,
        "seconds": round(result.seconds, 3),
    }


def nothing_json(source: Header, layers: Sequence[Layer]) -> dict[str, Any]:
    """What `result_json` says where nothing was written."""
    return _rewrite_json(source, None, (), layers, len(source.tensors)) | {
        "files": [],
        "bytes_copied": 0,
        "bytes_cloned": 0,
        "seconds": 0.0,
    }


def _rewrite_json(
    source: Header,
    output: str | None,
    changed: Sequence[Layer],
    skipped: Sequence[Layer],
    n_tensors: int,
) -> dict[str, Any]:
    found = [(layer, "fused") for layer in changed]
    found += [(layer, "skipped") for layer in skipped]
    return {
        "input": source.path,
        "output": output,
        "architecture": source.architecture,
        "layers": [_layer_json(*entry) for entry in sorted(found, key=_layer_order)],
        "fused": len(changed),
        "skipped": len(skipped),
        "tensors_in": len(source.tensors),
        "tensors_out": n_tensors,
    }


def inspect_json(found: Inspection) -> dict[str, Any]:
    header = found.header
    return {
        "file": header.path,
        "version": header.version,
        "byte_order": header.byte_order,
        "alignment": header.alignment,
        "architecture": header.architecture,
        "name": header.metadata.get("general.name"),
        "n_tensors": len(header.tensors),
        "n_metadata": len(header.metadata),
        "file_bytes": header.file_bytes,
        "layers": [_layer_json(layer, _INSPECT_STATUS[layer.status]) for layer in found.layers],
        "loader": _INSPECT_LOADER[found.loader.qkv.loader],
    }


def verify_json(report: Report) -> dict[str, Any]:
    layers = []
    for layer in report.layers:
        checks = {
            name: {"error": _finite(check.error), "limit": _finite(check.limit), "ok": check.ok}
            for name, check in layer.checks.items()
        }
        remark = layer.problem or layer.note
        note = {"note": remark} if remark else {}
        layers.append({"layer": layer.layer, "ok": layer.ok, "checks": checks} | note)
    structure = report.structure
    return {
        "ok": report.ok,
        "structure": {"ok": structure.ok, "problems": list(structure.problems)},
        "layers": layers,
        "timing": _timing_json(report.timing) | {"structure_s": round(structure.seconds, 3)},
    }


def _timing_json(timing: Timing | None) -> dict[str, Any]:
    if timing is None:
        return {}
    return {"layer": timing.layer, "n_tokens": timing.n_tokens, "n_kv": timing.n_kv} | {
        f"{name}_ms": round(ms, 4) for name, ms in timing.ms.items()
    }


def _finite(number: float) -> float | None:
    """JSON has no nan."""
    return number if math.isfinite(number) else None


def bench_json(result: Bench) -> dict[str, Any]:
    return {
        "source": result.source,
        "shape": asdict(result.shape),
        "threads": result.threads,
        "projection": [asdict(row) for row in result.projection],
        "decode": [asdict(row) for row in result.decode],
        "left_out": list(result.left_out),
    }


def _layer_json(layer: Layer, status: str) -> dict[str, Any]:
    reason = layer.reason
    if status == "skipped" and layer.status is Status.FUSED:
        reason = "already fused"
    return {
        "layer": layer.label,
        "status": status,
        "reason": reason,
        "types": list(layer.types),
        "rows": list(layer.rows),
    }


def _layer_order(entry: tuple[Layer, str]) -> tuple[str, int, int]:
    layer, _ = entry
    prefix, _, number = layer.name.rpartition(".")
    return prefix, int(number), FUSIONS.index(layer.fusion)


# -- for people ---------------------------------------------------------------------------------


def fuse_table(plan: Plan) -> Table:
    rows = [(layer, _text(f"fused into {layer.fusion.fused}", "green")) for layer in plan.changed]
    rows += [(layer, _text(f"left: {_of(layer)}{_why(layer)}", "yellow")) for layer in plan.skipped]
    return _layer_table(rows)


def unfuse_table(plan: Plan) -> Table:
    rows = [
        (layer, _text(f"split into {', '.join(layer.fusion.parts)}", "green"))
        for layer in plan.changed
    ]
    return _layer_table(rows)


def inspect_table(layers: Sequence[Layer]) -> Table:
    styles = {Status.FUSABLE: "green", Status.FUSED: "cyan"}
    return _layer_table(
        (
            layer,
            _text(
                _of(layer)
                + _INSPECT_STATUS[layer.status]
                + (f": {layer.reason}" if layer.reason else ""),
                styles.get(layer.status, "yellow"),
            ),
        )
        for layer in layers
    )


def _of(layer: Layer) -> str:
    """What a line is about, where it is not attention."""
    return "" if layer.fusion is QKV else f"{layer.fusion.fused}: "


def _why(layer: Layer) -> str:
    return layer.reason or "already fused"


def _layer_table(rows: Iterable[tuple[Layer, Text]]) -> Table:
    """One line for all layers that are alike: 80 identical ones help nobody."""
    alike: dict[tuple[Any, ...], tuple[list[str], Text]] = {}
    for layer, result in rows:
        key = (layer.fusion.fused, layer.types, layer.rows, result.plain)
        alike.setdefault(key, ([], result))[0].append(layer.name)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layers", overflow="fold")
    table.add_column("#", justify="right")
    table.add_column("type")
    table.add_column("rows")
    table.add_column("result", overflow="fold")
    for (_, types, n_rows, _), (names, result) in alike.items():
        # Types that differ are in the result's reason.
        kind = types[0] if len(set(types)) == 1 else "mixed"
        cells = (kind, " + ".join(map(str, n_rows)))
        table.add_row(_ranges(names), str(len(names)), *cells, result)
    return table


def _ranges(names: Sequence[str]) -> str:
    """ "blk.0-5, 7" for blk.0 ... blk.5 and blk.7."""
    by_prefix: dict[str, list[int]] = {}
    for name in names:
        prefix, _, number = name.rpartition(".")
        by_prefix.setdefault(prefix, []).append(int(number))
    return "; ".join(f"{prefix}.{_runs(sorted(n))}" for prefix, n in by_prefix.items())


def _runs(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def result_line(result: Result, verb: str, dry_run: bool) -> str:
    plan, n_bytes = result.plan, result.n_bytes
    done = f"would be {verb}" if dry_run else verb
    line = f"{_counts(plan)} {done}, {len(result.source.tensors)} tensors -> {len(plan.tensors)}"
    if dry_run:
        return f"{line}; {decimal(n_bytes)} would be written{_shards(result)}"
    speed = decimal(int(n_bytes / max(result.seconds, 1e-9)))
    line = f"{line}; {decimal(n_bytes)} in {result.seconds:.2f} s ({speed}/s)"
    if result.written.n_cloned:
        cloned, copied = decimal(result.written.n_cloned), decimal(result.written.n_copied)
        line += f", {cloned} of them cloned, {copied} copied"
    return line + _shards(result)


def _shards(result: Result) -> str:
    n = len(result.outputs)
    return f"; {n} shards: {result.outputs[0].path} and on" if n > 1 else ""


def _counts(plan: Plan) -> str:
    """ "6 of 8 attention layers", and of the layers with experts, where there are any."""
    counts = []
    for kind in FUSIONS:
        changed, skipped = (
            sum(layer.fusion is kind for layer in layers) for layers in (plan.changed, plan.skipped)
        )
        if changed or skipped:
            what = "attention layers" if kind is QKV else "layers of experts"
            counts.append(f"{changed} of {changed + skipped} {what}")
    return " and ".join(counts)


def notes(result: Result) -> list[Text]:
    """What to know of a fused file, and what to run next."""
    lines = []
    if not result.source.is_canonical:
        lines.append(
            _text(
                "unfuse will give back every tensor and key, but not this file bit for bit: it is "
                "not laid out as llama.cpp writes files",
                "yellow",
            )
        )
    if result.files and result.source.is_model:
        paths = [result.source.path, str(result.files[0])]
        dashes = ["--"] if any(path.startswith("-") for path in paths) else []
        lines.append(_text(f"next: {shlex.join(['gguf-fuse', 'verify', *dashes, *paths])}"))
    return lines


def file_lines(found: Inspection) -> list[tuple[str, str]]:
    """What `inspect` says of the file as a whole."""
    header, row = found.header, found.loader
    counts: dict[str, int] = {}
    for tensor in header.tensors:
        counts[type_name(tensor.type)] = counts.get(type_name(tensor.type), 0) + 1
    types = ", ".join(f"{n} {name}" for name, n in sorted(counts.items(), key=lambda c: -c[1]))
    size = decimal(header.file_bytes)
    if header.shards:
        size = f"one of {len(header.shards)} shards, {size} together"
    lines = [
        ("file", f"{header.path} ({size})"),
        (
            "format",
            f"GGUF v{header.version}, {header.byte_order} endian, alignment {header.alignment}",
        ),
        ("architecture", str(header.architecture or "-")),
        ("name", str(header.metadata.get("general.name", "-"))),
        ("metadata", f"{len(header.metadata)} keys, {decimal(header.metadata.n_bytes)}"),
        ("tensors", f"{len(header.tensors)}: {types}"),
        ("loader", _loader_line(row)),
    ]
    if any(layer.fusion is GATE_UP for layer in found.layers):
        lines.append(("", _experts_line(row)))
    return lines


def _loader_line(row: Architecture) -> str:
    reads = row.qkv
    since = f" since build {FIRST_BUILD}" if reads.loader is Loader.READS_FUSED else ""
    return f"llama.cpp {reads.loader.phrase()}{since} ({_proof(reads.proof)})"


def _experts_line(row: Architecture) -> str:
    reads = row.gate_up
    return f"llama.cpp {reads.loader.phrase(GATE_UP.words)} ({_proof(reads.proof)})"


def _proof(source: Proof) -> str:
    return {
        "measured": "measured: a model was fused and loaded",
        "source": "by its source code",
        "none": "it is not in the table",
    }[source]


# -- verify -------------------------------------------------------------------------------------

_MOST_PROBLEMS = 20  # more are alike, and JSON has them all
_CHECK_TITLES = {
    "projection": "project",
    "decode_expand": "decode\nexpand",
    "decode_broadcast": "decode\nbroadcast",
    "decode_split": "decode\nsplit",
}


@dataclass(frozen=True)
class _Fitting:
    """The wide table where there is room for it: a column that is cut off would mislead."""

    wide: Table
    narrow: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wanted = console.measure(self.wide, options=options.update(max_width=1000)).maximum
        yield self.wide if wanted <= options.max_width else self.narrow


def verify_parts(report: Report) -> Iterator[RenderableType]:
    """What `verify` says: bytes, numbers, time, and what is wrong."""
    structure, mark = report.structure, _mark(report.structure.ok)
    speed = decimal(int(structure.n_bytes / max(structure.seconds, 1e-9)))
    yield mark.append(
        f" structure: {_fused_layers(structure)}; {decimal(structure.n_bytes)} of tensors "
        f"compared in {structure.seconds:.2f} s ({speed}/s)"
    )
    yield from (_text(f"  {problem}", "red") for problem in structure.problems[:_MOST_PROBLEMS])
    if len(structure.problems) > _MOST_PROBLEMS:
        yield _text(
            f"  and {len(structure.problems) - _MOST_PROBLEMS} more (--json has all)", "red"
        )
    if not report.layers:
        return
    mark = _mark(all(layer.ok for layer in report.layers))
    if mark.plain == "ok" and any(layer.note for layer in report.layers):
        mark = _text("PARTLY", "yellow")
    computed = [layer for layer in report.layers if layer.checks]
    yield mark.append(_numbers_line(computed, len(report.layers) - len(computed)))
    if computed:
        yield _text()
        yield _Fitting(_checks_table(computed), _worst_table(computed))
        yield _text()
    yield from (_text(line, "red") for line in _number_problems(report))
    notes: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.note:
            notes.setdefault(layer.note, []).append(layer.layer)
    yield from (_text(f"{_ranges(names)}: {note}", "yellow") for note, names in notes.items())
    if report.timing is not None:
        yield from _timing_lines(report.timing)


def _numbers_line(computed: Sequence[LayerReport], n_left: int) -> str:
    """How many layers the table below is about, and how many it is not about."""
    n_partly = sum(layer.note is not None for layer in computed)
    line = f" numbers: {_n_layers(len(computed))} computed"
    line += f", {n_partly} of them without attention" if n_partly else ""
    line += f", {n_left} not" if n_left else ""
    return f"{line}; largest errors against float64" if computed else line


def _n_layers(n: int, words: str = "layer") -> str:
    return f"{n} {words}{'' if n == 1 else 's'}"


def _fused_layers(structure: Structure) -> str:
    n_experts = structure.n_fused_experts
    line = _n_layers(structure.n_fused, "fused layer")
    return f"{line} of attention, {n_experts} of experts" if n_experts else line


def _mark(ok: bool) -> Text:
    return _text("ok", "green") if ok else _text("FAILED", "bold red")


def _checks_table(layers: Sequence[LayerReport]) -> Table:
    names = list(dict.fromkeys(name for layer in layers for name in layer.checks))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layer", no_wrap=True)
    for name in names:
        table.add_column(_CHECK_TITLES.get(name, name), justify="right", min_width=7)
    table.add_column("of\nlimit", justify="right", min_width=5)
    for layer in layers:
        cells = [_error(layer.checks.get(name)) for name in names]
        worst = max(map(_of_limit, layer.checks.values()))
        table.add_row(layer.layer, *cells, _share(worst))
    return table


def _worst_table(layers: Sequence[LayerReport]) -> Table:
    """Of each layer the check that is nearest to its limit."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("layer", "worst check"):
        table.add_column(title, overflow="fold")
    for title in ("error", "of limit"):
        table.add_column(title, justify="right", overflow="fold")
    for layer in layers:
        name, check = max(layer.checks.items(), key=lambda item: _of_limit(item[1]))
        table.add_row(layer.layer, name, _error(check), _share(_of_limit(check)))
    return table


def _error(check: Check | None) -> Text:
    if check is None:
        return _text("-")
    return _text(f"{check.error:.1e}", "" if check.ok else "bold red")


def _of_limit(check: Check) -> float:
    return check.error / check.limit if math.isfinite(check.error) else math.inf


def _share(share: float) -> Text:
    return _text(f"{share:.0%}") if share <= 1 else _text("over", "bold red")


def _number_problems(report: Report) -> Iterator[str]:
    for layer in report.layers:
        if layer.problem:
            yield f"{layer.layer}: {layer.problem}"
        for name, check in layer.checks.items():
            if not check.ok:
                yield f"{layer.layer}: {name}: error {check.error:.2e}, limit {check.limit:.2e}"


def verify_failure(report: Report) -> str:
    """One line: the first problem, and how many more there are."""
    problems = [*report.structure.problems, *_number_problems(report)]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"verification failed: {problems[0]}{more}"


def _timing_lines(timing: Timing) -> Iterator[Text]:
    tokens = "1 token" if timing.n_tokens == 1 else f"{timing.n_tokens} tokens"
    ms = {name: f"{_ms(value)} ms" for name, value in timing.ms.items()}
    yield _text(
        f"time in {timing.layer}, {tokens} at once: projections {ms['separate']} separate, "
        f"{ms['fused']} fused"
    )
    if "split" in ms:
        yield _text(
            f"decode over {timing.n_kv} cells: {ms['expand']} expanded, {ms['broadcast']} "
            f"broadcast, {ms['split']} split"
        )


# -- bench --------------------------------------------------------------------------------------

_NO_GAIN = 0.05  # a difference in time below this is noise


def bench_parts(result: Bench) -> Iterator[RenderableType]:
    shape = result.shape
    yield _text(
        f"{result.source}: n_embd {shape.n_embd}, {shape.n_head} heads, {shape.n_head_kv} KV "
        f"heads, {shape.head_dim} wide; threads: {result.threads}; medians in ms",
    )
    yield _text()
    yield _bench_table(
        ("n_tokens", "separate", "fused", "gain"),
        (
            (str(row.n_tokens), _ms(row.separate_ms), _ms(row.fused_ms), f"{_gain(row):+.0%}")
            for row in result.projection
        ),
    )
    yield _text(projection_verdict(result.projection))
    yield _text()
    yield _Fitting(_decode_table(result.decode), _narrow_decode_table(result.decode))
    yield _text("of reading: the speed of split, where 100% is K and V merely read once")
    if result.left_out:
        left_out = ", ".join(map(str, result.left_out))
        yield _text(f"left out, not enough free memory: n_kv {left_out}", "yellow")


def _decode_table(rows: Iterable[DecodeRow]) -> Table:
    return _bench_table(
        ("n_kv", "expand", "broadcast", "split", "K, V\nread", "expand\n/ split", "of\nreading"),
        (
            (
                str(row.n_kv),
                *map(_ms, (row.expand_ms, row.broadcast_ms, row.split_ms, row.stream_ms)),
                f"{row.expand_ms / row.split_ms:.1f} x",
                _of_reading(row),
            )
            for row in rows
        ),
    )


def _narrow_decode_table(rows: Iterable[DecodeRow]) -> Table:
    return _bench_table(
        ("n_kv", "expand", "split", "of\nreading"),
        ((str(row.n_kv), _ms(row.expand_ms), _ms(row.split_ms), _of_reading(row)) for row in rows),
    )


def _of_reading(row: DecodeRow) -> str:
    return f"{row.stream_ms / row.split_ms:.0%}"


def _bench_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _gain(row: ProjectionRow) -> float:
    return row.separate_ms / row.fused_ms - 1


def projection_verdict(rows: Sequence[ProjectionRow]) -> str:
    """What the measurement says of fusing, and no more than that."""
    faster = [str(row.n_tokens) for row in rows if _gain(row) > _NO_GAIN]
    slower = [str(row.n_tokens) for row in rows if _gain(row) < -_NO_GAIN]
    equal = [str(row.n_tokens) for row in rows if abs(_gain(row)) <= _NO_GAIN]
    parts = [
        f"{what} at n_tokens {', '.join(counts)}"
        for what, counts in (
            ("gains", faster),
            (f"gains nothing (within {_NO_GAIN:.0%})", equal),
            ("costs", slower),
        )
        if counts
    ]
    return f"here, in numpy, fusing {'; '.join(parts)}" if parts else ""
