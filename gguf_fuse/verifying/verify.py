"""ORIGINAL and FUSED -> Report: the bytes, then the numbers, then the time. Prints nothing."""

from __future__ import annotations

import os

from gguf_fuse.format.shards import read_model
from gguf_fuse.models.names import other_layers
from gguf_fuse.planning.plan import Refused
from gguf_fuse.verifying.layers import choose_layers
from gguf_fuse.verifying.numbers import compare_numbers
from gguf_fuse.verifying.report import LayerReport, Report, VerifyOptions
from gguf_fuse.verifying.structure import compare_structure


def verify(
    original: str | os.PathLike[str],
    fused: str | os.PathLike[str],
    options: VerifyOptions | None = None,
) -> Report:
    """Does FUSED hold what ORIGINAL holds, and compute what it computes? Each may be a shard.

    Structure is exact and of all layers: a fused tensor is Q, K and V end to end, or the gate and
    up of each expert in turn, and all else is the same. Numbers are those of attention, of some
    layers; see `trial`.

    Raises GGUFError for a file that cannot be read, or a layer that ORIGINAL does not have, Refused
    for adapters and importance matrices.
    """
    options = options or VerifyOptions()
    before, after = read_model(original), read_model(fused)
    for header in (before, after):
        if not header.is_model:
            raise Refused(
                f"{header.path}: general.type is {header.metadata['general.type']!r}: verify "
                "compares models; unfuse gives the original bytes back, which cmp can compare"
            )
    names: list[str] = []
    others: list[str] = []  # that nobody chose because they have no attention that is known here
    if not options.structure_only:
        names = choose_layers(before, options.layers)
        others = other_layers(before.tensors) if options.layers.numbers is None else []
    structure = compare_structure(before, after, options)
    layers, timing = compare_numbers(before, after, names, options)
    note = "no Q, K and V of its own, but other attention (MLA, linear) or none: bytes only"
    not_computed = [LayerReport(name, {}, note) for name in others]
    return Report(structure, (*layers, *not_computed), timing)
