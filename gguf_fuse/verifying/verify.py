"""ORIGINAL and FUSED -> Report: the bytes, then the numbers, then the time. Prints nothing."""

from __future__ import annotations

from dataclasses import replace

from gguf_fuse.format.header import Header
from gguf_fuse.format.shards import read_model
from gguf_fuse.format.source import AnyPath, GGUFError, opened
from gguf_fuse.models.names import other_layers
from gguf_fuse.planning.plan import Refused
from gguf_fuse.verifying.fused import find_fused
from gguf_fuse.verifying.layers import choose_layers
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
        from gguf_fuse.verifying.llama import judge, require_wheel

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
    if options.structure_only:
        report = replace(report, structure=compare_structure(before, after, options))
    else:
        # numpy and gguf-py: comparing bytes needs neither, and takes less time than to load them.
        from gguf_fuse.verifying.beside import compare

        structure, layers, timing = compare(before, after, names, options)
        if structure.computable:
            layers = (*layers, *_not_computed(before, options))
        report = replace(report, structure=structure, layers=layers, timing=timing)
    if options.llama:
        report = replace(report, llama=judge(before, after, options))
    with opened([*before.sources, *after.sources]):
        pass  # a file that is not any more what was compared is not verified
    return report


def _not_computed(original: Header, options: VerifyOptions) -> list[LayerReport]:
    """Layers that nobody chose because they have no attention that is known here."""
    if options.layers.numbers is not None:
        return []
    note = "no Q, K and V of its own, but other attention (MLA, linear) or none: bytes only"
    return [LayerReport(name, {}, note) for name in other_layers(original.tensors)]
