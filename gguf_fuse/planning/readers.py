"""Which programs load a file, fused or not: a table, and one look-up.

llama.cpp's rows are those of `loaders`. Ollama runs llama.cpp's server since v0.30.0 and pins a
build of it, so its rows follow. The others have loaders of their own, whose sources were read, not
run; what was not found there is told as unknown. They load what they know under exactly the names
that they ask for, so a fused tensor is either asked for or missed.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gguf_fuse.choices import ReaderName
from gguf_fuse.format.header import Header
from gguf_fuse.planning.fuse import encoder_beside_text, loader_of
from gguf_fuse.planning.fusions import QKV, Fusion
from gguf_fuse.planning.loaders import TRIED, Architecture, Loader, Proof
from gguf_fuse.planning.plan import Layer, Status


class Since(NamedTuple):
    """A version, and where it stands among those of its program."""

    order: int
    version: str


@dataclass(frozen=True, slots=True)
class Takes:
    """The forms of a layer that a program takes; None: not found out.

    since: the first version that takes the fused one, where that was found. misses: what becomes of
    it where the program does not take it.
    """

    separate: bool
    fused: bool | None
    misses: str
    since: Since | None = None
    proof: Proof = "source"


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp itself, or a program that pins its builds: releases, by build."""

    name: str
    source: str
    releases: tuple[Since, ...] = ()
    complete: bool = False

    def takes(self, row: Architecture, fusion: Fusion) -> Takes | None:
        reads = row.reads(fusion)
        if reads.loader is Loader.UNKNOWN:
            return None
        misses = f"llama.cpp {reads.loader.phrase(fusion.words)}"
        separate = reads.loader is not Loader.ALREADY_FUSED
        fused = reads.loader in (Loader.READS_FUSED, Loader.ALREADY_FUSED)
        if not self.releases:
            build = reads.since
            since = Since(build.number, f"build {build}") if build else None
            return Takes(separate, fused, misses, since, reads.proof)
        if reads.loader is not Loader.READS_FUSED:
            return Takes(separate, fused, misses)
        if reads.since is None:
            return Takes(separate, None, misses)
        later = [each for each in self.releases if each.order >= reads.since.number]
        newest = self.releases[-1]
        misses += f" since build {reads.since}; {newest.version} has b{newest.order}, and "
        misses += "newer releases were not read"
        return Takes(separate, bool(later), misses, later[0] if later else None)


def _names(text: str = "") -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True, slots=True)
class Listed:
    """A program with loaders of its own. complete: it refuses all that is in none of the lists.

    separate, fused: the architectures whose Q, K and V it takes so (some are in both). gate_up:
    those whose ffn_gate_up_exps it takes; None: not found out. since: of fused Q, K and V, then of
    gate and up. misses: what it does with a fused tensor ({fused}) that it does not ask for.
    """

    name: str
    source: str
    since: tuple[str, str]
    misses: str
    separate: frozenset[str]
    fused: frozenset[str]
    gate_up: frozenset[str] | None = _names()
    complete: bool = True

    def takes(self, row: Architecture, fusion: Fusion) -> Takes | None:
        if row.name not in self.separate | self.fused:
            return None
        misses = self.misses.format(fused=fusion.fused, part=fusion.parts[0])
        if fusion is QKV:
            fused, since = row.name in self.fused, Since(0, self.since[0])
            return Takes(row.name in self.separate, fused, misses, since)
        known = None if self.gate_up is None else row.name in self.gate_up
        return Takes(True, known, misses, Since(1, self.since[1]))


_LISTED = (
    Listed(
        "ik_llama.cpp",
        "src/llama-load-tensors.cpp of ikawrakow/ik_llama.cpp, commit 8337e4cd3, 15 August 2026",
        ("26 April 2025 (#344; phi2 and phi3 before)", "12 March 2026 (#1408)"),
        "it stops: {part}.weight not found",
        separate=_names(
            """arctic baichuan bailingmoe3 bert bitnet bitnet-25 bitnet-b1.58 cohere2 cohere2_moe
            command-r deci deepseek2 deepseek4 dflash dflash-draft dots1 ernie4_5 ernie4_5-moe gemma
            gemma2 gemma3 gemma4 gemma4-assistant gemma4_mtp glm-dsa glm4 glm4moe gpt-oss granite
            granitemoe grok hunyuan-moe internlm2 jina-bert-v2 laguna llama llama4 mamba mellum
            mimo2 minicpm minimax-m2 minimax-m3 mistral3 mistral4 muse-glimmer olmo openpangu orion
            phi2 plamo qwen2 qwen2moe qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3vl
            qwen3vlmoe refact seed_oss smollm3 stablelm starcoder2 step35 t5 t5encoder xverse"""
        ),
        fused=_names(
            """bailingmoe2 bloom chatglm codeshell dbrx falcon glm4 gpt2 gptneox jais mpt nomic-bert
            openelm phi2 phi3 qwen starcoder"""
        ),
        gate_up=_names(
            """bailingmoe2 bailingmoe3 cohere2_moe dbrx deepseek2 deepseek4 dots1 gemma4 glm4moe
            gpt-oss hunyuan-moe laguna llama4 mellum mimo2 minimax-m2 minimax-m3 mistral4 qwen2moe
            qwen35moe qwen3moe qwen3next qwen3vlmoe step35"""
        ),
    ),
    Listed(
        "vllm",
        "vllm-gguf-plugin 0.0.5, 10 August 2026, weights_adapter/ and weight_utils.py (vLLM itself "
        "gave up GGUF: vllm-project/vllm#39583)",
        ("0.0.1 (May 2026)", ""),
        "it has no name for {fused}, and never sets those weights",
        # By the names that Transformers' model has, so whatever both know; here what the adapter
        # names itself.
        separate=_names(
            """command-r deepseek2 gemma gemma2 gemma3 llama minimax-m2 olmoe qwen2 qwen2moe qwen3
            qwen3moe"""
        ),
        fused=_names("phi3"),
        gate_up=None,
        complete=False,
    ),
    Listed(
        "candle",
        "candle-transformers/src/models/quantized_*.rs of huggingface/candle, commit 2a13b0f3f, 14 "
        "August 2026",
        ("0.5.1 (2024)", ""),
        "it stops: cannot find tensor {part}.weight",
        separate=_names(
            """gemma gemma-embedding gemma2 gemma3 glm4 lfm2 llama qwen2 qwen3 qwen3moe smollm3"""
        ),
        fused=_names("phi2 phi3"),
        complete=False,
    ),
    Listed(
        "mistral.rs",
        "mistralrs-core/src/gguf/ of EricLBuehler/mistral.rs, commit 9e922623f, 22 August 2026",
        ("v0.9.1 (August 2026; phi2 and phi3 before)", "v0.9.1 (August 2026)"),
        "it passes over {fused}, and misses {part}",
        separate=_names(
            """deepseek2 gemma gemma2 gemma3 gemma3n gemma4 glm4 glm4moe gpt-oss granite
            granitehybrid granitemoe hunyuan-dense hunyuan-moe lfm2 lfm2moe llama llama4
            mistral3 muse-glimmer phi2 phi3 phimoe qwen2 qwen2vl qwen3 qwen35 qwen35moe qwen3moe
            qwen3next qwen3vl qwen3vlmoe smollm3 starcoder2"""
        ),
        fused=_names("glm4 phi2 phi3 phimoe"),
        gate_up=_names(
            """deepseek2 gemma4 glm4moe granitehybrid granitemoe hunyuan-moe lfm2moe phimoe
            qwen35moe qwen3moe qwen3next"""
        ),
    ),
    Listed(
        "transformers",
        "modeling_gguf_pytorch_utils.py and integrations/gguf/ of transformers 5.24.0, 21 November "
        "2026",
        ("4.45.0 (2024)", ""),
        "it passes over {fused} and makes those weights random, with no more than a warning "
        "(huggingface/transformers#31844)",
        separate=_names(
            """deci gemma2 gemma3 gemma4 gpt-oss lfm2 llama mamba minimax-m2 nemotron qwen2 qwen2moe
            qwen3 qwen35 qwen35moe qwen3moe stablelm starcoder2 t5 t5encoder"""
        ),
        fused=_names("bloom falcon gpt2 phi3"),
        gate_up=None,
    ),
)
# Ollama's releases whose llama.cpp (LLAMA_CPP_VERSION) is newer than that of the one before.
_OLLAMA = LlamaCpp(
    "ollama",
    "LLAMA_CPP_VERSION of ollama/ollama up to v0.33.0-rc2, commit fb3076099, 21 August 2026, and "
    "gguf_fuse/planning/loaders.py; before v0.30.0 an engine of its own asked for attn_q",
    (
        Since(9452, "v0.30.0 (June 2026)"),
        Since(9888, "v0.31.2 (July 2026)"),
        Since(10069, "v0.32.2 (July 2026)"),
        Since(10488, "v0.32.15 (August 2026)"),
    ),
)
_LLAMA_CPP = LlamaCpp(
    "llama.cpp", f"gguf_fuse/planning/loaders.py, builds of April to {TRIED}: scripts/data/"
)
READERS = {reader.name: reader for reader in (_LLAMA_CPP, _OLLAMA, *_LISTED)}


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether a program loads a file. loads: None where that is not known.

    since: the first version, where the file has fused tensors and that was found. advice: a command
    that makes a file which it loads. proof: "source" means read, not run.
    """

    program: str
    loads: bool | None
    reason: str
    source: str
    proof: Proof = "none"
    since: str | None = None
    advice: str | None = None


def ask(program: ReaderName, header: Header, layers: Sequence[Layer]) -> Answer:
    """Whether `program`, one of READERS, loads a model as it is. layers: all that `examine` finds.

    Told from names alone, of the architecture and the tensors: a program may not know a file's
    types, or its tokenizer.
    """
    reader = READERS[program]

    def unknown(reason: str) -> Answer:
        return Answer(program, None, reason, reader.source)

    if not header.is_model:
        return unknown(f"general.type is {header.metadata['general.type']}, and this is of models")
    if beside := encoder_beside_text(header):
        return unknown(f"an encoder ({beside}) lies beside the text model")
    since: list[Since] = []
    proofs: set[Proof] = set()
    for layer in layers or [_NONE]:
        row = loader_of(header, layer.name)
        takes = reader.takes(row, layer.fusion)
        if takes is None and reader.complete and header.architecture != "clip":
            reason = f"it does not know the architecture {row.name}"
            return Answer(program, False, reason, reader.source, "source")
        if takes is None:
            return unknown(f"{row.name} was not found there")
        is_fused = layer.status is Status.FUSED
        fits = takes.fused if is_fused else takes.separate or layer is _NONE
        if fits is None:
            return unknown(f"fused {layer.fusion.words} of {row.name} were not found there")
        if not fits:
            return _refused(reader, header, layers, layer, takes)
        proofs.add(takes.proof)
        if is_fused and takes.since:
            since.append(takes.since)
    proof: Proof = "source" if "source" in proofs else "measured"
    first = max(since).version if since else None
    return Answer(program, True, "it reads every layer as it is", reader.source, proof, first)


_NONE = Layer("blk.0", Status.SEPARATE, (), ())  # of models without such layers


def _refused(
    reader: LlamaCpp | Listed,
    header: Header,
    layers: Sequence[Layer],
    layer: Layer,
    takes: Takes,
) -> Answer:
    path, words, advice = shlex.quote(header.path), layer.fusion.words, None
    if layer.status is Status.FUSED:
        reason = f"{layer.name} has fused {words}: {takes.misses}"
        if takes.separate:
            advice = f"gguf-fuse unfuse {path} OUT"
    else:
        reason = f"{layer.name} has separate {words}, and it asks for fused ones"
        if all(each.status in (Status.FUSED, Status.FUSABLE) for each in layers):
            advice = f"gguf-fuse fuse {path} OUT"
    return Answer(reader.name, False, reason, reader.source, takes.proof, advice=advice)
