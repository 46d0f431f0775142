"""Write a GGUF model with random weights that llama.cpp loads."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from random_models import (
    LAYOUTS,
    ModelSpec,
    data_bytes,
    spec_of_size,
    unmatched_patterns,
    write_random_model,
)

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_EXAMPLES = """
Examples:

  make_model.py tiny.gguf

  make_model.py mixed.gguf --embd 256 -t Q4_K -t 'blk.1.attn_v.*=Q6_K'

  make_model.py big.gguf --type F16 --size 2.5G --vocab 128256
"""


class ScaleRule(str, Enum):
    """How the three scales of a layer relate."""

    none = "none"
    equal = "equal"
    unequal = "unequal"


class Tokenizer(str, Enum):
    """Which vocabulary."""

    spm = "spm"
    bpe = "bpe"


class RopeScaling(str, Enum):
    """How positions are stretched."""

    none = "none"
    linear = "linear"
    yarn = "yarn"


def main(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    architecture: Annotated[
        str, typer.Option("--architecture", "-a", help=f"One of: {', '.join(LAYOUTS)}.")
    ] = "llama",
    size: Annotated[
        str | None,
        typer.Option(help="Choose layers and width for about this size: 300M, 2.5G."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers.")] = None,
    embd: Annotated[int, typer.Option(min=1, help="Embedding length; K-quants want 256.")] = 64,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 4,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="K/V heads.")] = None,
    key_length: Annotated[int | None, typer.Option(min=1, help="Length of a K head.")] = None,
    value_length: Annotated[int | None, typer.Option(min=1, help="Length of a V head.")] = None,
    ff: Annotated[int | None, typer.Option(min=1, help="Feed-forward length.")] = None,
    vocab: Annotated[int, typer.Option(help="Tokens; 128256 is a real vocabulary's size.")] = 320,
    tokenizer: Annotated[
        Tokenizer | None,
        typer.Option(help="Which vocabulary; bpe from 65536 tokens on."),
    ] = None,
    experts: Annotated[int | None, typer.Option(min=0, help="Experts.")] = None,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            "-t",
            metavar="[PATTERN=]TYPE",
            help="Type of the tensors whose names match, or of all; the last match wins.",
        ),
    ] = None,
    bias: Annotated[
        bool | None,
        typer.Option("--bias/--no-bias", help="Biases of Q, K and V."),
    ] = None,
    qk_norm: Annotated[
        bool | None,
        typer.Option("--qk-norm/--no-qk-norm", help="Norms of Q and K."),
    ] = None,
    sinks: Annotated[
        bool | None,
        typer.Option("--sinks/--no-sinks", help="Attention sinks."),
    ] = None,
    scales: Annotated[ScaleRule, typer.Option(help="Scales of Q, K and V.")] = ScaleRule.none,
    fused: Annotated[
        bool | None,
        typer.Option("--fused/--separate", help="One attn_qkv, or Q, K and V."),
    ] = None,
    rope_scaling: Annotated[
        RopeScaling | None,
        typer.Option(help="RoPE scaling, by a factor of 4."),
    ] = None,
    rope_freqs: Annotated[bool, typer.Option("--rope-freqs", help="RoPE factors.")] = False,
    window: Annotated[int | None, typer.Option(min=0, help="Sliding window.")] = None,
    alignment: Annotated[int, typer.Option(help="Alignment of tensor data, in bytes.")] = 32,
    big_endian: Annotated[bool, typer.Option("--big-endian", help="Byte order.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same file.")] = 1,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace OUT.")] = False,
) -> None:
    """Write a GGUF model with random weights that llama.cpp loads.

    What is left out is as the architecture has it.
    """
    if out.exists() and not force:
        typer.echo(f"{out} exists; --force replaces it", err=True)
        raise typer.Exit(1)
    try:
        spec = ModelSpec(
            architecture,
            n_layer=layers,
            n_embd=embd,
            n_head=heads,
            n_head_kv=kv_heads,
            key_length=key_length,
            value_length=value_length,
            n_ff=ff,
            n_vocab=vocab,
            n_expert=experts,
            types=dict(_parse_type(text) for text in types or []),
            bias=bias,
            qk_norm=qk_norm,
            sinks=sinks,
            scales=scales.value,
            fused=fused,
            rope_scaling=None if rope_scaling is None else rope_scaling.value,
            rope_freqs=rope_freqs,
            sliding_window=window,
            tokenizer=None if tokenizer is None else tokenizer.value,
            alignment=alignment,
            big_endian=big_endian,
            seed=seed,
        )
        if size is not None:
            spec = spec_of_size(spec, _parse_size(size))
        for pattern in unmatched_patterns(spec):  # a slip of the pen
            raise ValueError(f"{pattern}: no tensor has such a name")
        n_bytes = data_bytes(spec)
        _write(out, spec)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        typer.echo(f"{out}: {error.strerror or error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{out}: {architecture}, {n_bytes / 1e6:.1f} MB of tensor data")


def _write(out: Path, spec: ModelSpec) -> None:
    """Write beside `out` first, so that no half file ever stands under its name."""
    part = out.with_name(out.name + ".part")
    try:
        write_random_model(part, spec)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def _parse_type(text: str) -> tuple[str, GGMLQuantizationType]:
    """ "PATTERN=TYPE" or "TYPE" as pattern and type. Raises ValueError."""
    from gguf import GGMLQuantizationType

    pattern, equals, name = text.rpartition("=")
    try:
        return (pattern if equals else "*", GGMLQuantizationType[name.upper()])
    except KeyError:
        known = ", ".join(type_.name for type_ in GGMLQuantizationType)
        raise ValueError(f"unknown type {name!r}; known: {known}") from None


def _parse_size(text: str) -> int:
    """ "2.5G" as bytes; K, M and G are powers of 1000. Raises ValueError."""
    match = re.fullmatch(r"([0-9.]+)([KMG]?)B?", text.upper())
    if not match:
        raise ValueError(f"size {text!r}: write it as 300M or 2.5G")
    return int(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]])


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command(epilog=_EXAMPLES)(main)

if __name__ == "__main__":
    app()
