"""ORIGINAL and what llama-quantize made of it: did only the tensors change that should?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from gguf_fuse.format.header import Header
from gguf_fuse.format.types import type_name
from gguf_fuse.planning.recipe import FILE_TYPE_KEY
from gguf_fuse.verifying.report import VerifyOptions
from gguf_fuse.verifying.structure import compare_contents

# Keys that llama-quantize writes anew: at the end, whether they were there or not.
_OWN_KEYS = ("general.quantization_version", FILE_TYPE_KEY)
_MATRIX_KEYS = "quantize.imatrix."


def retyped_problems(original: Header, new: Header, types: Mapping[str, int]) -> list[str]:
    """Tensors of another type than they had, or than `types` gives them; of another shape, too."""
    problems = []
    for name in original.by_name | new.by_name:
        before, after = original.by_name.get(name), new.by_name.get(name)
        if before is None or after is None:
            problems.append(f"{name}: {'new' if before is None else 'missing'}")
        elif (after.type, after.ne) != (types.get(name, before.type), before.ne):
            found, wanted = (type_name(t) for t in (after.type, types.get(name, before.type)))
            problems.append(f"{name}: {found} {list(after.ne)}, not {wanted} {list(before.ne)}")
    return problems


def other_problems(
    original: Header, new: Header, changed: Collection[str], options: VerifyOptions
) -> list[str]:
    """Where all but the changed tensors, and the keys of llama-quantize, are not the same bytes.

    llama-quantize sorts tensors by name. Raises GGUFError as `compare_contents` does.
    """
    kept, still = (_without(header, changed) for header in (original, new))
    return list(compare_contents(kept, still, options).problems)


def _without(header: Header, changed: Collection[str]) -> Header:
    kept = [tensor for tensor in header.tensors if tensor.name not in changed]
    own = [key for key in header.metadata if key in _OWN_KEYS or key.startswith(_MATRIX_KEYS)]
    return replace(
        header,
        tensors=tuple(sorted(kept, key=lambda tensor: tensor.name)),
        metadata=header.metadata.without(own),
    )
