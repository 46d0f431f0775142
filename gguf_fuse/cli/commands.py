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
        "model-Q4_0.gguf model-Q4_0-fused.gguf",
    ),
    "unfuse": _Entry(
        "Write IN to OUT with all that was fused separate again: the very bytes as before.",
        "model-Q4_0-fused.gguf model-Q4_0.gguf",
    ),
    "inspect": _Entry(
        "Show what IN holds and what fusing would do to it. Reads headers only.", "model-Q4_0.gguf"
    ),
    "recipe": _Entry(
        "Show the commands that make Q, K and V of mixed types fusable, or run them.",
        "model-Q4_K_M.gguf",
    ),
    "verify": _Entry(
        "Prove that FUSED holds what ORIGINAL holds and computes what it computes.",
        "model-Q4_0.gguf model-Q4_0-fused.gguf",
    ),
    "bench": _Entry(
        "Time projections, separate and fused, and the ways to decode. Weights are random.",
        "model-Q4_0.gguf --plot decode.png",
    ),
    "batch": _Entry(
        "Fuse many files into DIR; run it again, and only what is new or failed is done.",
        "models/ --out fused/",
    ),
    "compare": _Entry(
        "Time ORIGINAL and FUSED in llama.cpp, in turn, each time in a fresh process.",
        "model-Q4_0.gguf model-Q4_0-fused.gguf -p 512 -n 128",
    ),
    "demo": _Entry(
        "Make a small model with random weights, fuse it, verify it, and take it back.",
        "--keep demo-files",
    ),
}
