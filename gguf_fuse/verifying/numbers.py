"""Both files' numbers, layer by layer: read, computed side by side, reported and timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from gguf_fuse.attention.threads import blas_threads
from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.machine import free_bytes
from gguf_fuse.models.keys import NotModelled
from gguf_fuse.models.layer import read_layer, read_projections
from gguf_fuse.planning.plan import Refused
from gguf_fuse.planning.unfuse import attention_rows
from gguf_fuse.verifying.report import LayerReport, Timing, VerifyOptions
from gguf_fuse.verifying.trial import Trial, Weights

_VAGUE = "the original's own numbers are not finite, or too large for float32"


def compare_numbers(
    original: Header, fused: Header, names: Sequence[str], options: VerifyOptions, n_blas: int
) -> Iterator[LayerReport]:
    """A report of each layer. n_blas: threads of BLAS.

    The two must have the same metadata and tensors, but for what is fused. Memory holds the weights
    of one layer of each file at a time. Raises GGUFError where a layer needs more memory than is
    free, where a file cannot be read any more, and for metadata of ORIGINAL that no model has.
    """
    options.on_start("computing", len(names))
    for name in names:
        with blas_threads(n_blas), np.errstate(all="ignore"):
            report = _compare_layer(original, fused, name, options)
        options.on_progress(1)
        yield report


def time_layer(
    original: Header, fused: Header, reports: Sequence[LayerReport], options: VerifyOptions
) -> Timing | None:
    """How long the first layer takes that was computed; on its own, since what else runs counts."""
    name = next((report.layer for report in reports if report.checks), None)
    before = None if name is None else _read(original, name)[0]
    if name is None or before is None:
        return None
    with blas_threads(options.threads), np.errstate(all="ignore"):
        return Trial(before, _read_like(before, fused, name), options).timing(name)


def _compare_layer(
    original: Header, fused: Header, name: str, options: VerifyOptions
) -> LayerReport:
    before, note = _read(original, name)
    if before is None:
        return LayerReport(name, {}, note)
    _require_memory(original, name, before, options)
    found = Trial(before, _read_like(before, fused, name), options).checks()
    checks = {way: check for way, check in found.items() if check is not None}
    notes = [] if note is None else [note]
    if missing := sorted(found.keys() - checks.keys()):
        notes.append(f"not checked: {', '.join(missing)}: {_VAGUE}")
    return LayerReport(name, checks, "; ".join(notes) or None)


def _read(header: Header, name: str) -> tuple[Weights | None, str | None]:
    """ORIGINAL's layer as far as it is modelled, and a note on what is not."""
    try:
        layer = read_layer(header, name, _rows)
        return Weights(layer.projections, layer), None
    except NotModelled as error:
        note = f"attention not modelled, projections only: {_reason(error, header)}"
    try:
        return Weights(read_projections(header, name, _rows), None), note
    except NotModelled as error:
        return None, f"numbers not computed: {_reason(error, header)}"


def _rows(header: Header, name: str) -> Sequence[int]:
    """Of ORIGINAL's layer that is fused already."""
    try:
        return attention_rows(header, name)
    except Refused as error:  # fused by another tool, and its metadata do not tell where
        raise NotModelled(str(error)) from error


def _read_like(before: Weights, header: Header, name: str) -> Weights:
    """FUSED's layer, split where ORIGINAL's rows end: FUSED's own record is not believed."""
    rows = before.projections.rows
    if before.layer is None:
        return Weights(read_projections(header, name, lambda *_: rows), None)
    layer = read_layer(header, name, lambda *_: rows)
    return Weights(layer.projections, layer)


def _reason(error: Exception, header: Header) -> str:
    return str(error).removeprefix(f"{header.path}: ")


def _require_memory(header: Header, name: str, weights: Weights, options: VerifyOptions) -> None:
    """Raises GGUFError: where memory runs out, Linux may kill another process than this one."""
    needed, free = _bytes_needed(weights, options), free_bytes()
    if needed > free:
        raise GGUFError(
            f"{header.path}: {name}: computing takes about {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; lower --n-prompt, --n-seqs or --n-kv"
        )


def _bytes_needed(weights: Weights, options: VerifyOptions) -> int:
    """FUSED's weights, and what grows with the options: activations, caches and their copies,
    scores and masks.
    """
    n_seqs, n_prompt = options.n_seqs, options.n_prompt
    rows, linears = weights.projections.rows, weights.projections.linears
    n_embd: int = linears[0].weight.shape[1]
    needed = sum(linear.weight.nbytes for linear in linears)
    needed += 24 * n_seqs * n_prompt * (n_embd + sum(rows))
    if weights.layer is None:
        return needed
    spec = weights.layer.spec
    # A cell of the caches: two in float32, one in float64; those of one sequence at a time copied
    # out to all heads in float32.
    cell = n_seqs * 16 * (rows[1] + rows[2]) + 4 * spec.n_head * (spec.head_dim + spec.head_dim_v)
    n_cells = max(options.n_kv, n_prompt) + options.n_decode
    return needed + n_cells * cell + (32 + 13 * n_seqs) * n_prompt * n_prompt
