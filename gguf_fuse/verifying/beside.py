"""Bytes and numbers, at the same time: reading waits for the disk, computing for the processor."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from gguf_fuse.format.header import Header
from gguf_fuse.verifying.numbers import compare_numbers, time_layer
from gguf_fuse.verifying.report import LayerReport, Structure, Timing, VerifyOptions
from gguf_fuse.verifying.structure import compare_structure


def compare(
    original: Header, fused: Header, names: Sequence[str], options: VerifyOptions
) -> tuple[Structure, tuple[LayerReport, ...], Timing | None]:
    """What `compare_structure` and `compare_numbers` say; and, where asked for, how long one layer
    takes, on its own after that.

    Numbers are computed where the files differ in nothing but data at most. Raises GGUFError as
    those do.
    """
    layers: list[LayerReport] = []
    told = _Told(options)
    half = max(1, options.threads // 2)
    beside = replace(options, on_start=told.layers, on_progress=told.layer)
    computed = map(layers.append, compare_numbers(original, fused, names, beside, half))
    own = replace(
        options,
        threads=options.threads + (options.threads > 1),  # so many read while this one computes
        on_start=told.all_bytes,
        on_progress=told.bytes,
    )
    structure = compare_structure(original, fused, own, computed)
    timing = time_layer(original, fused, layers, options) if options.timed else None
    return structure, tuple(layers), timing


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
