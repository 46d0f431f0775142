"""Models whose attention `gguf_fuse.models` computes, and how near to llama.cpp it must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gguf_fuse.format.parser import read_header
from tests.models import random_model
from tests.models.architectures import LAYOUTS, Layout, Value
from tests.models.extra_layouts import (
    ENCODERS,
    EXTRA,
    FACTORS,
    OUTPUT_BIAS,
    ROW_NORMS,
    SEPARATE_BIASES,
)
from tests.models.random_model import ModelSpec

EXACT = 5e-5
GELU = 1e-3
SEEN = 1e-2

N_PROMPT, N_DECODE = 40, 4  # windows are 8


@dataclass(frozen=True)
class Case:
    """A model, and how near to llama.cpp it must be. spec: fields of ModelSpec.

    silent: ends of names of matrices that are written as zeros. Linear attention is no part of
    this, so recurrent layers give nothing.
    """

    architecture: str
    spec: Mapping[str, Any]
    limit: float = EXACT
    # What to write it as, if not as `LAYOUTS` has it.
    layout: Layout | None = None
    n_prompt: int = N_PROMPT
    n_ctx: int = 512
    silent: tuple[str, ...] = (".ssm_out.weight",)

    @property
    def encodes(self) -> bool:
        return self.architecture in ENCODERS


def a_case(
    architecture: str,
    *,
    limit: float = EXACT,
    layout: Layout | None = None,
    n_prompt: int = N_PROMPT,
    n_ctx: int = 512,
    feed_forward: bool = True,
    keys: Mapping[str, Value | None] | None = None,
    **spec: Any,
) -> Case:
    """keys: metadata, without the "<architecture>." in front.

    Without a feed-forward, a GELU's table does not blur what attention does.
    """
    spec["metadata"] = {f"{architecture}.{key}": value for key, value in (keys or {}).items()}
    spec["n_ctx"] = n_ctx
    layout = layout or EXTRA.get(architecture)
    silent: tuple[str, ...] = (".ssm_out.weight",)
    if not feed_forward:
        silent += (".ffn_down.weight", ".ffn_down_exps.weight")
    return Case(architecture, spec, limit, layout, n_prompt, n_ctx, silent)


# For thousands of tokens: one file, and as few scores as there can be.
_ONE_HEAD: dict[str, Any] = {"fused": True, "n_embd": 16, "n_head": 1, "n_head_kv": 1}
_YARN: dict[str, Any] = {"rope_scaling": "yarn"}
_YARN_KEYS: dict[str, Value] = {
    "rope.scaling.yarn_log_multiplier": 0.7,
    "rope.scaling.yarn_beta_fast": 1.5,
    "rope.scaling.yarn_beta_slow": 0.5,
}
NORM_BIASES = replace(
    EXTRA["mpt"],
    layer=EXTRA["mpt"].layer.replace(
        "@qkv",
        "@qkv attn_q_norm.weight attn_q_norm.bias attn_k_norm.weight attn_k_norm.bias",
    ),
    ne=ROW_NORMS,
    n_head_kv=(4,),
)

_PLAIN = """
    llama mistral3 qwen2 qwen3 qwen3moe gpt-oss phi3 stablelm granite olmo2 command-r cohere2
    baichuan refact internlm2 smollm3 glm4 seed_oss olmo minicpm hunyuan-dense exaone4 nemotron
    arcee apertus chatglm xverse ernie4_5 orion deci mimo2 lfm2
    olmoe smallthinker llama4 glm4moe dots1 deepseek exaone ernie4_5-moe granitemoe lfm2moe
    qwen2moe qwen2vl qwen3vl qwen3vlmoe qwen35 qwen35moe qwen3next
    nomic-bert""".split()
_WITH_GELU = """
    gemma gemma2 gemma3 gemma4 phi2 starcoder2 gptneox falcon bloom mpt
    bert nomic-bert-moe jina-bert-v2 jina-bert-v3""".split()

CASES: dict[str, Case] = {
    # As `random_model` has them; then those that are only here.
    **{name: a_case(name) for name in _PLAIN},
    # One layer, so that the table blurs as little as it can; two where layers differ.
    **{name: a_case(name, limit=GELU, n_layer=1) for name in _WITH_GELU},
    **{name: a_case(name, limit=GELU) for name in ("gemma2", "gemma4", "nomic-bert-moe")},
    **{f"{name}, attention": a_case(name, feed_forward=False) for name in _WITH_GELU},
    "bert, its key not heeded": a_case("bert", feed_forward=False, keys={"attention.causal": True}),
    # Head counts and lengths.
    "multi-query": a_case("llama", n_head_kv=1),
    "all heads": a_case("llama", n_head_kv=4),
    "long heads": a_case("qwen3", key_length=32),
    "six heads, ALiBi": a_case("refact", n_embd=96, n_head=6, n_head_kv=3),
    # RoPE.
    "rope_freqs": a_case("llama", rope_freqs=True),
    **{
        f"rope_freqs, {name}": a_case(name, rope_freqs=True)
        for name in "mistral3 granite minicpm arcee apertus deci exaone exaone4 llama4".split()
    },
    "linear": a_case("qwen2", rope_scaling="linear"),
    "no scaling": a_case("qwen2", rope_scaling="none"),
    "old key of linear": a_case("llama", keys={"rope.scale_linear": 3.0}),
    "base": a_case("qwen3", rope_base=1000000.0),
    "yarn": a_case("llama", **_YARN),
    "yarn, neox": a_case("qwen2", **_YARN, keys={"rope.scaling.attn_factor": 1.3}),
    "yarn, factor < 1": a_case("qwen2", **_YARN, rope_factor=0.5),
    "yarn, all keys": a_case("mistral3", **_YARN, keys=_YARN_KEYS),
    "yarn, keys that llama does not read": a_case("llama", **_YARN, keys=_YARN_KEYS),
    "yarn, partial": a_case("nemotron", **_YARN),
    "yarn, windows": a_case("gpt-oss", **_YARN),
    "temperature": a_case(
        "mistral3", **_YARN, n_ctx_orig=16, keys={"attention.temperature_scale": 0.5}
    ),
    "alpha": a_case("hunyuan-dense", keys={"rope.scaling.alpha": 4.0}),
    "mrope": a_case("glm4", n_rot=16, keys={"rope.dimension_sections": [2, 2, 2, 2]}),
    "granite without RoPE": a_case("granite", keys={"rope.scaling.finetuned": False}),
    "granite, scale 0": a_case("granite", keys={"attention.scale": 0.0}),
    "short factors": a_case("phi3", layout=FACTORS, n_ctx_orig=512, rope_scaling="linear"),
    "long factors": a_case("phi3", layout=FACTORS, n_ctx_orig=128, rope_scaling="linear"),
    "baichuan 32": a_case("baichuan", n_layer=32),
    "baichuan 2": a_case("baichuan", n_layer=2),
    # Norms.
    "stablelm, norms": a_case("stablelm", qk_norm=True),
    "command-r 64": a_case("command-r", n_layer=64, qk_norm=True),
    "glm4moe without norms": a_case("glm4moe", qk_norm=False),
    "llama4, 128 experts": a_case("llama4", keys={"expert_count": 128}),
    # Scores.
    "mpt without ALiBi": a_case("mpt", feed_forward=False, keys={"attention.max_alibi_bias": None}),
    "future": a_case("llama", keys={"attention.causal": False}),
    # Windows.
    "llama4, window's base": a_case(
        "llama4", rope_scaling="none", keys={"rope.freq_base_swa": 500.0}
    ),
    # Its chunks and its temperature change at 8192 tokens, whatever the file says.
    # So far out, ggml's float32 powers of RoPE's base cost more than elsewhere: 2e-5.
    "llama4, second chunk": a_case(
        "llama4",
        limit=2e-4,
        **_ONE_HEAD,
        sliding_window=8,
        n_prompt=8190,
        n_ctx=8448,
    ),
    "gemma2, window of 4096": a_case(
        "gemma2",
        feed_forward=False,
        **_ONE_HEAD,
        keys={"attention.sliding_window": None},
        n_prompt=4096,
        n_ctx=4352,
    ),
    "gemma2 46": a_case("gemma2", feed_forward=False, n_layer=46, key_length=32),
    "gemma2, window's base": a_case(
        "gemma2", feed_forward=False, rope_scaling="linear", keys={"rope.freq_base_swa": 500.0}
    ),
    "gemma2, windows of type none": a_case("gemma2", feed_forward=False, rope_scaling="none"),
    "gemma3, scaled": a_case("gemma3", feed_forward=False, rope_scaling="linear"),
    "gemma3, yarn": a_case("gemma3", feed_forward=False, **_YARN),
    "gemma3, window's base": a_case(
        "gemma3", feed_forward=False, keys={"rope.freq_base_swa": 500.0}
    ),
    "gemma3, pattern of 6": a_case(
        "gemma3", feed_forward=False, n_layer=7, keys={"attention.sliding_window_pattern": None}
    ),
    "gemma3 without windows": a_case("gemma3", feed_forward=False, sliding_window=0),
    "gemma3, flags": a_case(
        "gemma3",
        feed_forward=False,
        n_layer=3,
        keys={"attention.sliding_window_pattern": [True, False, True]},
    ),
    "olmo2, windows": a_case("olmo2", **_YARN, n_layer=4, sliding_window=8),
    "olmo2, yarn without windows": a_case("olmo2", **_YARN, n_layer=4),
    "exaone4 64": a_case("exaone4", n_layer=64, sliding_window=8),
    "lfm2, windows": a_case("lfm2", sliding_window=8),
    "gemma3 62": a_case("gemma3", feed_forward=False, n_layer=62, key_length=32),
    "smallthinker, windows": a_case(
        "smallthinker", n_layer=5, sliding_window=8, rope_scaling="linear"
    ),
    "smallthinker 4": a_case("smallthinker", n_layer=4, sliding_window=8),
    # Projections.
    "bias": a_case("llama", bias=True),
    "ernie4_5, output bias": a_case("ernie4_5", layout=OUTPUT_BIAS),
    "refact, output bias": a_case("refact", layout=OUTPUT_BIAS),
    "separate biases of fused weights": a_case("qwen2", layout=SEPARATE_BIASES),
    "scales": a_case("llama", scales="equal"),
    "no scales fused": a_case("llama", scales="unequal"),
    # One query over 512 cells and more runs split.
    "split": a_case("llama", rope_freqs=True, n_head_kv=1, n_prompt=530, n_ctx=1024),
    "split, sinks": a_case("gpt-oss", n_prompt=530, n_ctx=1024, sliding_window=520),
}


def write_case(case: Case, path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        if case.layout is not None:
            patch.setitem(LAYOUTS, case.architecture, case.layout)
        random_model.write_random_model(path, ModelSpec(case.architecture, **case.spec))
    header = read_header(path)
    with path.open("r+b") as file:
        for tensor in header.tensors:
            if tensor.name.endswith(case.silent):
                file.seek(header.data_start + tensor.offset)
                file.write(bytes(tensor.n_bytes))
    return path
