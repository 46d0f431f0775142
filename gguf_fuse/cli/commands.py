"""The commands, as --help lists them: none of them is imported for that."""

from __future__ import annotations

from typing import NamedTuple


class _Entry(NamedTuple):
    """A command as --help lists it: the first line of its own help, and an example of it."""

    summary: str
    example: str


# Each is a function of that name in the module of that name: only the one that is called is loaded.
COMMANDS = {
    "fuse": _Entry(
        "Write IN to OUT with Q, K and V of each layer as one attn_qkv tensor.",
        "model.gguf fused.gguf",
    ),
    "unfuse": _Entry(
        "Write IN to OUT with all that was fused separate again: the very bytes as before.",
        "fused.gguf model.gguf",
    ),
    "inspect": _Entry(
        "Show what IN holds and what fusing would do to it. Reads headers only.", "model.gguf"
    ),
    "recipe": _Entry(
        "Show the commands that make Q, K and V of mixed types fusable, or run them.",
        "model-Q4_K_M.gguf",
    ),
    "verify": _Entry(
        "Prove that FUSED holds what ORIGINAL holds and computes what it computes.",
        "model.gguf fused.gguf",
    ),
    "bench": _Entry(
        "Time projections, separate and fused, and the ways to decode. Weights are random.",
        "model.gguf --plot decode.png",
    ),
    "batch": _Entry(
        "Fuse many files into DIR; run it again, and only what is new or failed is done.",
        "models/ --out fused/",
    ),
    "compare": _Entry(
        "Time ORIGINAL and FUSED in llama.cpp, in turn, each time in a fresh process.",
        "model.gguf fused.gguf -p 512",
    ),
    "demo": _Entry(
        "Make a small model with random weights, fuse it, verify it, and take it back.",
        "--keep demo-files",
    ),
}
