"""ORIGINAL and FUSED -> Report: the bytes, then the numbers, then the time. Prints nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from gguf_fuse.format.header import Header
from gguf_fuse.format.shards import read_model
from gguf_fuse.format.source import AnyPath, GGUFError, opened
from gguf_fuse.models.names import other_layers
from gguf_fuse.planning.plan import Refused
from gguf_fuse.verifying.fused import find_fused
from gguf_fuse.verifying.layers import choose_layers
from gguf_fuse.verifying.llama import judge, require_wheel
from gguf_fuse.verifying.numbers import compare_numbers, time_layer
from gguf_fuse.verifying.report import LayerReport, Report, Structure, VerifyOptions
from gguf_fuse.verifying.structure import compare_structure


def verify(original: AnyPath, fused: AnyPath, options: VerifyOptions | None = None) -> Report:
    """Does FUSED hold what ORIGINAL holds, and compute what it computes? Each may be a shard.

    Structure is exact and of all layers: a fused tensor is Q, K and V end to end, or the gate and
    up of each expert in turn, and all else is the same. Numbers are those of attention, of some
    layers; see `trial`. They are computed where the files differ in nothing but data at most.
    With options.llama, llama.cpp computes with both: see `llama`.

    Raises GGUFError for a file that cannot be read, or is not at the end what it was, for one file
    under both names, a layer that ORIGINAL does not have, or without xllamacpp; Refused for
    adapters and importance matrices.
    """
    options = options or VerifyOptions()
    if options.llama:
        require_wheel()  # before anything long
    before, after = read_model(original), read_model(fused)
    for header in (before, after):
        if not header.is_model:
            raise Refused(
                f"{header.path}: general.type is {header.metadata['general.type']!r}: verify "
                "compares models; unfuse gives the original bytes back, which cmp can compare"
            )
    if before.sources[0].is_same(after.sources[0]):
        raise GGUFError(
            f"{before.path} and {after.path} are the same file, so there is nothing to compare; "
            "give ORIGINAL and FUSED"
        )
    exchanged = bool(find_fused(after, before)[0]) and not find_fused(before, after)[0]
    if exchanged:
        before, after = after, before
    names = [] if options.structure_only else choose_layers(before, options.layers)
    report = Report(before, after, Structure(()), exchanged=exchanged)
    structure, layers = _compare(before, after, names, options)
    report = replace(report, structure=structure)
    if structure.computable and not options.structure_only:
        timing = time_layer(before, after, layers, options) if options.timed else None
        layers += _not_computed(before, options)
        report = replace(report, layers=tuple(layers), timing=timing)
    if options.llama:
        report = replace(report, llama=judge(before, after, options))
    with opened([*before.sources, *after.sources]):
        pass  # a file that is not any more what was compared is not verified
    return report


def _compare(
    original: Header, fused: Header, names: Sequence[str], options: VerifyOptions
) -> tuple[Structure, list[LayerReport]]:
    """Layers are computed while bytes are compared."""
    if options.structure_only:
        return compare_structure(original, fused, options), []
    layers: list[LayerReport] = []
    told = _Told(options)
    half = max(1, options.threads // 2)
    beside = replace(options, on_start=told.layers, on_progress=told.layer)
    computed = map(layers.append, compare_numbers(original, fused, names, beside, half))
    own = replace(
        options,
        threads=options.threads - half + 1,  # the one that computes joins the others later
        on_start=told.all_bytes,
        on_progress=told.bytes,
    )
    return compare_structure(original, fused, own, computed), layers


class _Told:
    """Progress of both, as if it were first that of bytes, then that of the layers."""

    def __init__(self, options: VerifyOptions) -> None:
        self.options = options
        self.bytes_left = self.n_layers = self.layers_done = 0
        self.lock = threading.Lock()

    def all_bytes(self, what: str, n_bytes: int) -> None:
        self.bytes_left = n_bytes
        self.options.on_start(what, n_bytes)

    def bytes(self, n: int) -> None:
        with self.lock:
            self.bytes_left -= n
            self.options.on_progress(n)
            self._turn_to_layers()

    def layers(self, what: str, n_layers: int) -> None:
        with self.lock:
            self.n_layers = n_layers
            self._turn_to_layers()

    def layer(self, n: int) -> None:
        with self.lock:
            self.layers_done += n
            if not self.bytes_left:
                self.options.on_progress(n)

    def _turn_to_layers(self) -> None:
        if self.bytes_left or not self.n_layers:
            return
        self.options.on_start("computing", self.n_layers)
        if self.layers_done:
            self.options.on_progress(self.layers_done)


def _not_computed(original: Header, options: VerifyOptions) -> list[LayerReport]:
    """Layers that nobody chose because they have no attention that is known here."""
    if options.layers.numbers is not None:
        return []
    note = "no Q, K and V of its own, but other attention (MLA, linear) or none: bytes only"
    return [LayerReport(name, {}, note) for name in other_layers(original.tensors)]
