"""gguf-fuse: one attn_qkv tensor in place of separate Q, K and V, in GGUF files that exist.

What the commands do, importable:

    import gguf_fuse

    result = gguf_fuse.fuse("in.gguf", "out.gguf")
    report = gguf_fuse.verify("in.gguf", "out.gguf")

Functions raise `GGUFError` with the line that the command would print; `NothingToDo` and `Refused`
are special cases of it. Nothing is loaded before it is used: `import gguf_fuse` costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # for type checkers it is true; typing itself takes a while to load

__version__ = "0.1.0"

_PUBLIC = {  # by the module that has them
    "api": "Altered Options Result fuse recipe requantize_and_fuse unfuse",
    "format.source": "GGUFError",
    "inspection": "Inspection inspect",
    "planning.fusions": "EXPERTS GATE_UP QKV SSM_IN",
    "planning.plan": "NothingToDo Refused",
    "planning.recipe": "Recipe Way",
    "verifying.manifest": "ManifestReport verify_manifest",
    "verifying.report": "Report VerifyOptions",
    "verifying.verify": "verify",
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = ["EXPERTS", "GATE_UP", "QKV", "SSM_IN", "Altered", "GGUFError", "Inspection"]
__all__ += ["ManifestReport", "NothingToDo", "Options", "Recipe", "Refused", "Report", "Result"]
__all__ += ["VerifyOptions", "Way", "fuse", "inspect", "recipe", "requantize_and_fuse", "unfuse"]
__all__ += ["verify", "verify_manifest"]

if TYPE_CHECKING:
    from typing import Any

    # For type checkers, which do not read the table; a test compares the two.
    from gguf_fuse.api import (
        Altered,
        Options,
        Result,
        fuse,
        recipe,
        requantize_and_fuse,
        unfuse,
    )
    from gguf_fuse.format.source import GGUFError
    from gguf_fuse.inspection import Inspection, inspect
    from gguf_fuse.planning.fusions import EXPERTS, GATE_UP, QKV, SSM_IN
    from gguf_fuse.planning.plan import NothingToDo, Refused
    from gguf_fuse.planning.recipe import Recipe, Way
    from gguf_fuse.verifying.manifest import ManifestReport, verify_manifest
    from gguf_fuse.verifying.report import Report, VerifyOptions
    from gguf_fuse.verifying.verify import verify


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gguf_fuse' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gguf_fuse.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    hidden = [name for name in globals() if name.startswith("_")]
    return [*hidden, *__all__]
