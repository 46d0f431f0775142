"""gguf-fuse: one attn_qkv tensor in place of separate Q, K and V, in GGUF files that exist.

What the commands do, importable:

    import gguf_fuse

    result = gguf_fuse.fuse("in.gguf", "out.gguf")
    report = gguf_fuse.verify("in.gguf", "out.gguf")

Functions raise `GGUFError` with the line that the command would print; `NothingToDo` and `Refused`
are kinds of it. Nothing is loaded before it is used: `import gguf_fuse` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gguf_fuse.api import Inspection, Options, Result, fuse, inspect, unfuse
    from gguf_fuse.format.source import GGUFError
    from gguf_fuse.planning.plan import NothingToDo, Refused
    from gguf_fuse.verifying.report import Report, VerifyOptions
    from gguf_fuse.verifying.verify import verify

__all__ = [
    "GGUFError",
    "Inspection",
    "NothingToDo",
    "Options",
    "Refused",
    "Report",
    "Result",
    "VerifyOptions",
    "fuse",
    "inspect",
    "unfuse",
    "verify",
]

_HOMES = {
    "GGUFError": ("format.header", "GGUFError"),
    "Inspection": ("api", "Inspection"),
    "NothingToDo": ("planning.plan", "NothingToDo"),
    "Options": ("api", "Options"),
    "Refused": ("planning.plan", "Refused"),
    "Report": ("verifying.report", "Report"),
    "Result": ("api", "Result"),
    "VerifyOptions": ("verifying.report", "VerifyOptions"),
    "fuse": ("api", "fuse"),
    "inspect": ("api", "inspect"),
    "unfuse": ("api", "unfuse"),
    "verify": ("verifying.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gguf_fuse' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(f"gguf_fuse.{module}"), attribute)
