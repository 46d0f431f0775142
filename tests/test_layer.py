"""`gguf_fuse.models.layer` computes the attention that llama.cpp computes.

A whole forward pass on top of it (`forward`) gives the log-probabilities that llama.cpp gives, with
its KV cache in float32: a prompt longer than every window, then single tokens, from the file as it
is and from the fused one. How near that really is: 6e-6, and 1e-5 over 64 layers, which is
float32's rounding. Of an encoder it is the embeddings of all tokens, from one batch and relative to
their size. `EXACT` leaves room for other processors. Where the feed-forward is a GELU it is
6e-4: llama.cpp looks that up in a float16 table, where a last bit can become a whole step. There
`GELU` counts, and once more `EXACT` without the feed-forward. The smallest of the seeded faults
moves the probabilities by 2e-2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from gguf_fuse import api as rewrite
from gguf_fuse import attention
from gguf_fuse.attention import Linear
from gguf_fuse.format.header import GGUFError, read_header, read_tensors
from gguf_fuse.models import layer
from gguf_fuse.models import spec as attention_spec
from gguf_fuse.models.dequantize import read_values
from gguf_fuse.models.layer import AttentionLayer
from gguf_fuse.models.spec import NotModelled, Window
from gguf_fuse.planning.plan import NothingToDo
from tests import forward, llama_judge
from tests.conftest import fused_copy
from tests.edit import edited, zeros
from tests.models import random_model
from tests.models.architectures import LAYOUTS, Layout, Value
from tests.models.random_model import ModelSpec

EXACT = 5e-5
GELU = 1e-3
SEEN = 1e-2

N_PROMPT, N_DECODE = 40, 4  # windows are 8

needs_llama_cpp = pytest.mark.skipif(
    not llama_judge.available(), reason="xllamacpp is not installed: nothing to compare with"
)

# --- models ------------------------------------------------------------------------------------

_LLAMA = LAYOUTS["llama"]
_NORMED = replace(_LLAMA, qk_norm=True)
_FACTORS = replace(
    LAYOUTS["phi3"],
    outer="rope_factors_long.weight rope_factors_short.weight "
    "token_embd.weight output_norm.weight output.weight",
    ne={
        "ffn_up": "n_embd 2*n_ff",
        "rope_factors_long": "n_rot/2",
        "rope_factors_short": "n_rot/2",
    },
)
_BLOOM = replace(LAYOUTS["starcoder2"], free_head_dim=False, fused=True)
_OUTPUT_BIAS = replace(_LLAMA, layer=_LLAMA.layer.replace("@qkv", "@qkv attn_output.bias"))
_ROW_NORMS = {"attn_q_norm": "q", "attn_k_norm": "k"}
_SEPARATE_BIASES = replace(
    LAYOUTS["qwen2"],
    layer=_LLAMA.layer.replace("@qkv", "attn_qkv.weight attn_q.bias attn_k.bias attn_v.bias"),
    ne={"attn_qkv": "n_embd 128"},
)
_DENSE: dict[str, Value] = {
    "expert_feed_forward_length": "=n_ff",
    "expert_shared_count": 1,
    "expert_count": 4,
}


def _with_shared_expert(name: str, ne: Mapping[str, str] | None = None) -> Layout:
    one = LAYOUTS[name]
    tensors = ("ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
    shared = " ".join(["@ffn", *(f"{tensor}.weight" for tensor in tensors)])
    sizes = ("n_embd", "n_embd n_ff", "n_embd n_ff", "n_ff n_embd")
    return replace(
        one,
        layer=one.layer.replace("@ffn", shared),
        ne={**one.ne, **dict(zip(tensors, sizes, strict=True)), **(ne or {})},
        keys={**one.keys, "expert_shared_feed_forward_length": "=n_ff"},
    )


_BERT_FFN = "ffn_up.weight ffn_up.bias ffn_down.weight ffn_down.bias"
_BERT = Layout(
    layer="@qkv attn_output.weight attn_output.bias attn_output_norm.weight attn_output_norm.bias "
    f"{_BERT_FFN} layer_output_norm.weight layer_output_norm.bias",
    norm="layer",
    outer="token_embd.weight token_types.weight token_embd_norm.weight token_embd_norm.bias",
    ne={
        "token_types": "n_embd 2",
        "position_embd": "n_embd 512",
        "attn_output_norm": "n_embd",
        "attn_norm_2": "n_embd",
        "layer_output_norm": "n_embd",
        **_ROW_NORMS,
    },
    keys={"attention.causal": False},
    global_keys={"tokenizer.ggml.token_type_count": 2},
    bias=True,
    free_head_dim=False,
    n_head_kv=(4,),
)
_EXPERTS = "ffn_gate_inp.weight ffn_up_exps.weight ffn_down_exps.weight"
# Without next tokens: what counts is what they make of the given ones.
ENCODERS: dict[str, Layout] = {
    "bert": replace(_BERT, outer=f"{_BERT.outer} position_embd.weight"),
    "nomic-bert": replace(_BERT, layer=_BERT.layer.replace(_BERT_FFN, "@ffn"), bias=False),
    # A layer with experts follows one without.
    "nomic-bert-moe": replace(
        _BERT,
        layer=f"{_BERT.layer} | {_BERT.layer.replace(_BERT_FFN, _EXPERTS)}",
        keys={**_BERT.keys, "moe_every_n_layers": 2},
        n_expert=4,
    ),
    "jina-bert-v2": replace(_BERT, layer=_BERT.layer.replace(_BERT_FFN, "@ffn ffn_down.bias")),
    "jina-bert-v3": _BERT,
}
_JINA_NORMED = replace(
    ENCODERS["jina-bert-v2"],
    layer=f"{ENCODERS['jina-bert-v2'].layer} attn_norm_2.weight attn_norm_2.bias "
    "attn_q_norm.weight attn_q_norm.bias attn_k_norm.weight attn_k_norm.bias",
)

# Architectures and kinds of layers that `LAYOUTS` does not have; MoE ones with dense layers
# only, since it is the attention that counts here.
EXTRA: dict[str, Layout] = {
    **ENCODERS,
    "bloom": replace(
        _BLOOM,
        outer="token_embd.weight token_embd_norm.weight token_embd_norm.bias "
        "output_norm.weight output_norm.bias",
    ),
    "mpt": replace(
        _BLOOM,
        bias=False,
        layer="attn_norm.weight @qkv attn_output.weight ffn_norm.weight ffn_up.weight "
        "ffn_down.weight",
        outer="token_embd.weight output_norm.weight",
        keys={"attention.clamp_kqv": 1.0, "attention.max_alibi_bias": 8.0},
    ),
    "olmoe": replace(_NORMED, ne=_ROW_NORMS, n_expert=4, free_head_dim=False, n_head_kv=(4,)),
    "smallthinker": replace(_LLAMA, n_expert=4, n_layer=5, keys={"expert_gating_func": 1}),
    "llama4": replace(
        _LLAMA,
        n_layer=4,
        keys={**_DENSE, "interleave_moe_layer_step": 99, "expert_used_count": 1},
    ),
    "glm4moe": replace(
        _NORMED,
        layer="attn_norm.weight @qkv attn_output.weight post_attention_norm.weight @ffn",
        bias=True,
        rotary=0.5,
        keys={**_DENSE, "leading_dense_block_count": 2, "expert_used_count": 1},
    ),
    "dots1": replace(
        _NORMED,
        n_head_kv=(4,),
        keys={**_DENSE, "leading_dense_block_count": 2, "expert_used_count": 1},
    ),
    "exaone": _LLAMA,
    "ernie4_5-moe": replace(
        _LLAMA,
        keys={
            **_DENSE,
            "leading_dense_block_count": 2,
            "interleave_moe_layer_step": 1,
            "expert_used_count": 1,
        },
    ),
    "granitemoe": replace(LAYOUTS["granite"], n_expert=4),
    "lfm2moe": replace(
        LAYOUTS["lfm2"],
        keys={
            **LAYOUTS["lfm2"].keys,
            **_DENSE,
            "leading_dense_block_count": 2,
            "expert_used_count": 1,
            "expert_gating_func": 2,
        },
    ),
    # llama.cpp does not read qwen2vl's epsilon and takes 0.
    "qwen2vl": replace(
        LAYOUTS["qwen2"],
        keys={
            "rope.dimension_sections": [2, 2, 2, 2],
            "attention.layer_norm_rms_epsilon": 0.0,
        },
    ),
    "qwen3vl": replace(_NORMED, keys={"rope.dimension_sections": [3, 3, 2, 0]}),
    "qwen3vlmoe": replace(_NORMED, keys={"rope.dimension_sections": [3, 3, 1, 1]}, n_expert=4),
    "qwen2moe": replace(_with_shared_expert("qwen2"), n_expert=4),
    "qwen3next": replace(
        _with_shared_expert("qwen35", {"ssm_ba": "n_embd 8"}),
        layer=_with_shared_expert("qwen35").layer.replace(
            "ssm_beta.weight ssm_alpha.weight", "ssm_ba.weight"
        ),
        n_expert=4,
    ),
    "qwen35moe": replace(_with_shared_expert("qwen35"), n_expert=4),
    "deepseek": replace(
        _LLAMA, keys={**_DENSE, "leading_dense_block_count": 2, "expert_used_count": 1}
    ),
}


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


def _case(
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


_YARN: dict[str, Any] = {"rope_scaling": "yarn"}
_YARN_KEYS: dict[str, Value] = {
    "rope.scaling.yarn_log_multiplier": 0.7,
    "rope.scaling.yarn_beta_fast": 1.5,
    "rope.scaling.yarn_beta_slow": 0.5,
}
_NORM_BIASES = replace(
    EXTRA["mpt"],
    layer=EXTRA["mpt"].layer.replace(
        "@qkv",
        "@qkv attn_q_norm.weight attn_q_norm.bias attn_k_norm.weight attn_k_norm.bias",
    ),
    ne=_ROW_NORMS,
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
    **{name: _case(name) for name in _PLAIN},
    # One layer, so that the table blurs as little as it can; two where both kinds must be there.
    **{name: _case(name, limit=GELU, n_layer=1) for name in _WITH_GELU},
    **{name: _case(name, limit=GELU) for name in ("gemma2", "gemma4", "nomic-bert-moe")},
    **{f"{name}, attention": _case(name, feed_forward=False) for name in _WITH_GELU},
    "bert, its key not heeded": _case("bert", feed_forward=False, keys={"attention.causal": True}),
    # Head counts and lengths.
    "multi-query": _case("llama", n_head_kv=1),
    "all heads": _case("llama", n_head_kv=4),
    "long heads": _case("qwen3", key_length=32),
    "six heads, ALiBi": _case("refact", n_embd=96, n_head=6, n_head_kv=3),
    # RoPE.
    "rope_freqs": _case("llama", rope_freqs=True),
    **{
        f"rope_freqs, {name}": _case(name, rope_freqs=True)
        for name in "mistral3 granite minicpm arcee apertus deci exaone exaone4 llama4".split()
    },
    "linear": _case("qwen2", rope_scaling="linear"),
    "no scaling": _case("qwen2", rope_scaling="none"),
    "old key of linear": _case("llama", keys={"rope.scale_linear": 3.0}),
    "base": _case("qwen3", rope_base=1000000.0),
    "yarn": _case("llama", **_YARN),
    "yarn, neox": _case("qwen2", **_YARN, keys={"rope.scaling.attn_factor": 1.3}),
    "yarn, factor < 1": _case("qwen2", **_YARN, rope_factor=0.5),
    "yarn, all keys": _case("mistral3", **_YARN, keys=_YARN_KEYS),
    "yarn, keys that llama does not read": _case("llama", **_YARN, keys=_YARN_KEYS),
    "yarn, partial": _case("nemotron", **_YARN),
    "yarn, windows": _case("gpt-oss", **_YARN),
    "temperature": _case(
        "mistral3", **_YARN, n_ctx_orig=16, keys={"attention.temperature_scale": 0.5}
    ),
    "alpha": _case("hunyuan-dense", keys={"rope.scaling.alpha": 4.0}),
    "mrope": _case("glm4", n_rot=16, keys={"rope.dimension_sections": [2, 2, 2, 2]}),
    "granite without RoPE": _case("granite", keys={"rope.scaling.finetuned": False}),
    "granite, scale 0": _case("granite", keys={"attention.scale": 0.0}),
    "short factors": _case("phi3", layout=_FACTORS, n_ctx_orig=512, rope_scaling="linear"),
    "long factors": _case("phi3", layout=_FACTORS, n_ctx_orig=128, rope_scaling="linear"),
    "baichuan 32": _case("baichuan", n_layer=32),
    "baichuan 2": _case("baichuan", n_layer=2),
    # Norms.
    "stablelm, norms": _case("stablelm", qk_norm=True),
    "command-r 64": _case("command-r", n_layer=64, qk_norm=True),
    "glm4moe without norms": _case("glm4moe", qk_norm=False),
    "llama4, 128 experts": _case("llama4", keys={"expert_count": 128}),
    # Scores.
    "mpt without ALiBi": _case("mpt", feed_forward=False, keys={"attention.max_alibi_bias": None}),
    "future": _case("llama", keys={"attention.causal": False}),
    # Windows.
    "llama4, window's base": _case(
        "llama4", rope_scaling="none", keys={"rope.freq_base_swa": 500.0}
    ),
    # Its chunks and its temperature change at 8192 tokens, whatever the file says.
    # So far out, ggml's float32 powers of RoPE's base cost more than elsewhere: 2e-5.
    "llama4, second chunk": _case(
        "llama4",
        limit=2e-4,
        fused=True,
        n_embd=32,
        n_head=2,
        n_head_kv=1,
        sliding_window=8,
        n_prompt=8190,
        n_ctx=8448,
    ),
    "gemma2, window of 4096": _case(
        "gemma2",
        feed_forward=False,
        fused=True,
        keys={"attention.sliding_window": None},
        n_prompt=4096,
        n_ctx=4352,
    ),
    "gemma2 46": _case("gemma2", feed_forward=False, n_layer=46, key_length=32),
    "gemma2, window's base": _case(
        "gemma2", feed_forward=False, rope_scaling="linear", keys={"rope.freq_base_swa": 500.0}
    ),
    "gemma2, windows of type none": _case("gemma2", feed_forward=False, rope_scaling="none"),
    "gemma3, scaled": _case("gemma3", feed_forward=False, rope_scaling="linear"),
    "gemma3, yarn": _case("gemma3", feed_forward=False, **_YARN),
    "gemma3, window's base": _case(
        "gemma3", feed_forward=False, keys={"rope.freq_base_swa": 500.0}
    ),
    "gemma3, pattern of 6": _case(
        "gemma3", feed_forward=False, n_layer=7, keys={"attention.sliding_window_pattern": None}
    ),
    "gemma3 without windows": _case("gemma3", feed_forward=False, sliding_window=0),
    "gemma3, flags": _case(
        "gemma3",
        feed_forward=False,
        n_layer=3,
        keys={"attention.sliding_window_pattern": [True, False, True]},
    ),
    "olmo2, windows": _case("olmo2", **_YARN, n_layer=4, sliding_window=8),
    "olmo2, yarn without windows": _case("olmo2", **_YARN, n_layer=4),
    "exaone4 64": _case("exaone4", n_layer=64, sliding_window=8),
    "lfm2, windows": _case("lfm2", sliding_window=8),
    "gemma3 62": _case("gemma3", feed_forward=False, n_layer=62, key_length=32),
    "smallthinker, windows": _case(
        "smallthinker", n_layer=5, sliding_window=8, rope_scaling="linear"
    ),
    "smallthinker 4": _case("smallthinker", n_layer=4, sliding_window=8),
    # Projections.
    "bias": _case("llama", bias=True),
    "ernie4_5, output bias": _case("ernie4_5", layout=_OUTPUT_BIAS),
    "refact, output bias": _case("refact", layout=_OUTPUT_BIAS),
    "separate biases of fused weights": _case("qwen2", layout=_SEPARATE_BIASES),
    "scales": _case("llama", scales="equal"),
    "no scales fused": _case("llama", scales="unequal"),
    # One query over 512 cells and more runs split.
    "split": _case("llama", rope_freqs=True, n_head_kv=1, n_prompt=530, n_ctx=1024),
    "split, sinks": _case("gpt-oss", n_prompt=530, n_ctx=1024, sliding_window=520),
}


@dataclass(frozen=True)
class Judged:
    """Files of one case, and what llama.cpp computes of each; fused None: it cannot be.

    rows: log-probabilities after the prompt and after each token; or an encoder's embeddings of
    the prompt.
    """

    case: Case
    original: Path
    fused: Path | None
    tokens: list[int]
    continuation: list[int]
    rows: Mapping[Path, NDArray[np.float32]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Judged]]:
    """Writes, fuses and judges a case once; both files at the same time."""

    @functools.cache
    def judge(name: str) -> Judged:
        case = CASES[name]
        directory = tmp_path_factory.mktemp("model")
        original = _write(case, directory / "original.gguf")
        fused = _fuse(original, directory / "fused.gguf")
        rng = np.random.default_rng(7)
        tokens = [int(token) for token in rng.integers(3, 259, case.n_prompt + N_DECODE)]
        prompt, continuation = tokens[: case.n_prompt], tokens[case.n_prompt :]
        paths = [path for path in (original, fused) if path is not None]
        rows = judges.map(lambda path: _judge(case, path, prompt, continuation), paths)
        by_path = dict(zip(paths, rows, strict=True))
        return Judged(case, original, fused, prompt, continuation, by_path)

    with ThreadPoolExecutor(2) as judges:
        yield judge


def _judge(
    case: Case, path: Path, prompt: list[int], continuation: list[int]
) -> NDArray[np.float32]:
    if case.encodes:
        return llama_judge.embeddings(path, prompt, flash_attention="off", n_ctx=case.n_ctx)
    return llama_judge.log_probabilities(
        path,
        prompt,
        continuation=continuation,
        cache_type="f32",
        flash_attention="off",
        n_ctx=case.n_ctx,
    )


def _write(case: Case, path: Path) -> Path:
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


def _fuse(source: Path, target: Path) -> Path | None:
    try:
        rewrite.fuse(source, str(target), options=rewrite.Options(sync=False))
    except GGUFError as error:
        assert "already fused" in str(error) or "scales differ" in str(error)
        return None
    return target


def _error(
    judged: Judged,
    path: Path,
    change: Callable[[AttentionLayer], AttentionLayer] = lambda one: one,
) -> float:
    """Largest difference of any log-probability, or of any embedding relative to its size."""
    n_ctx, theirs = judged.case.n_ctx, judged.rows[path]
    if judged.case.encodes:
        ours = forward.embeddings(path, judged.tokens, n_ctx=n_ctx, change=change)
        size = np.sqrt(np.mean(np.square(theirs), axis=1, keepdims=True))  # [n_tokens, 1]
    else:
        ours = forward.log_probabilities(
            path, judged.tokens, judged.continuation, n_ctx=n_ctx, change=change
        )
        size = np.ones((1, 1), np.float32)
    assert ours.shape == theirs.shape
    return float((np.abs(ours - theirs) / size).max())


# --- agreement with llama.cpp ------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_llama_cpp(name: str, judged: Callable[[str], Judged]) -> None:
    case, files = CASES[name], judged(name)
    assert _error(files, files.original) <= case.limit
    if files.fused is not None:
        assert _error(files, files.fused) <= case.limit


@needs_llama_cpp
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.encodes])
def test_identical_embeddings_of_a_fused_file(name: str, judged: Callable[[str], Judged]) -> None:
    files = judged(name)
    assert files.fused is not None
    np.testing.assert_array_equal(files.rows[files.original], files.rows[files.fused])


@needs_llama_cpp
def test_whole_rows_normed_in_an_encoder(tmp_path: Path) -> None:
    """llama.cpp does that beside separate Q, K and V, and aborts beside fused ones: left alone."""
    case = _case("jina-bert-v2", layout=_JINA_NORMED, feed_forward=False)
    path, tokens = _write(case, tmp_path / "original.gguf"), list(range(3, 3 + N_PROMPT))
    files = Judged(case, path, None, tokens, [], {path: _judge(case, path, tokens, [])})
    assert _error(files, path) <= case.limit
    assert _error(files, path, _without_norms) > SEEN
    with pytest.raises(NothingToDo, match="aborts on attn_q_norm beside attn_qkv"):
        fused_copy(path)
    fused = _write(replace(case, spec={**case.spec, "fused": True}), tmp_path / "fused.gguf")
    with pytest.raises(llama_judge.LoadFailed) as caught:
        _judge(case, fused, tokens, [])
    assert caught.value.signal == "SIGABRT"


def test_every_modelled_architecture_is_compared() -> None:
    assert {case.architecture for case in CASES.values()} == attention_spec._TABLE.keys()


# --- seeded faults -----------------------------------------------------------------------------


def _spec(**changes: Any) -> Callable[[AttentionLayer], AttentionLayer]:
    return lambda one: replace(one, spec=replace(one.spec, **changes))


def _rope(**changes: Any) -> Callable[[AttentionLayer], AttentionLayer]:
    def change(one: AttentionLayer) -> AttentionLayer:
        if one.spec.rope is None:
            return one
        return replace(one, spec=replace(one.spec, rope=replace(one.spec.rope, **changes)))

    return change


def _params(**changes: Any) -> Callable[[AttentionLayer], AttentionLayer]:
    return lambda one: replace(one, params=replace(one.params, **changes))


def _window(n_swa: int) -> Callable[[AttentionLayer], AttentionLayer]:
    def change(one: AttentionLayer) -> AttentionLayer:
        if one.spec.window is None:
            return one
        return replace(one, spec=replace(one.spec, window=Window(n_swa)))

    return change


def _other_layers_windowed(one: AttentionLayer) -> AttentionLayer:
    window = None if one.spec.window else Window(8)
    return replace(one, spec=replace(one.spec, window=window))


def _norm(**changes: Any) -> Callable[[AttentionLayer], AttentionLayer]:
    def change(one: AttentionLayer) -> AttentionLayer:
        assert one.spec.norm is not None
        return replace(one, spec=replace(one.spec, norm=replace(one.spec.norm, **changes)))

    return change


def _without_norms(one: AttentionLayer) -> AttentionLayer:
    return replace(one, norm=None)


def _without_biases(one: AttentionLayer) -> AttentionLayer:
    assert one.projections.separate is not None
    q, k, v = (replace(linear, bias=None) for linear in one.projections.separate)
    return replace(one, projections=replace(one.projections, separate=(q, k, v)))


def _swapped(one: AttentionLayer) -> AttentionLayer:
    assert one.projections.separate is not None
    q, k, v = one.projections.separate
    return replace(one, projections=replace(one.projections, separate=(q, v, k)))


def _always_rotated(one: AttentionLayer) -> AttentionLayer:
    rope = one.spec.rope or attention.Rope("norm", one.spec.head_dim)
    return replace(one, spec=replace(one.spec, rope=rope))


FAULTS: dict[str, tuple[str, Callable[[AttentionLayer], AttentionLayer]]] = {
    "rope_freqs dropped": ("rope_freqs", _rope(freq_factors=None)),
    "rope_freqs dropped, split": ("split", _rope(freq_factors=None)),
    "neox for norm": ("llama", _rope(layout="neox")),
    "norm for neox": ("qwen2", _rope(layout="norm")),
    "all of the head turned": ("phi2", _rope(n_rot=16)),
    "another base": ("base", _rope(freq_base=10000.0)),
    "linear scaling ignored": ("linear", _rope(freq_scale=1.0)),
    "yarn as linear": ("yarn", _rope(ext_factor=0.0, attn_factor=1.0)),
    "yarn's factor not cancelled": ("yarn, factor < 1", _rope(attn_factor=1.0)),
    "yarn's own factor": ("yarn, neox", _rope(attn_factor=1.0)),
    "yarn's betas": ("yarn, all keys", _rope(beta_fast=32.0, beta_slow=1.0)),
    "window's base": ("gemma2, window's base", _rope(freq_base=10000.0)),
    "no RoPE": ("internlm2", _spec(rope=None)),
    "RoPE in every layer": ("smollm3", _always_rotated),
    "RoPE in layers without a window": ("cohere2", _always_rotated),
    "no temperature": ("temperature", _spec(temperature=None)),
    "window ignored": ("gemma2", _spec(window=None)),
    "window longer by one": ("gemma3", _window(9)),
    "window shorter by one": ("gpt-oss", _window(7)),
    "windows in the other layers": ("gpt-oss", _other_layers_windowed),
    "no softcap": ("gemma2", _params(softcap=0.0)),
    "sinks ignored": ("gpt-oss", _params(sinks=None)),
    "sinks ignored, split": ("split, sinks", _params(sinks=None)),
    "another scale": ("granite", _params(scale=0.25)),
    "no ALiBi": ("refact", _spec(max_alibi_bias=0.0)),
    "ALiBi of another number of heads": ("six heads, ALiBi", _params(max_alibi_bias=4.0)),
    "no clamp": ("olmo", _spec(clamp=0.0)),
    "Q and K not normed": ("qwen3", _without_norms),
    "whole rows not normed": ("olmo2", _without_norms),
    "normed before RoPE": ("hunyuan-dense", _norm(at="head")),
    "normed after RoPE": ("qwen3", _norm(at="rotated head")),
    "no bias": ("qwen2", _without_biases),
    "no output bias": ("gpt-oss", _spec(output_bias=False)),
    "K and V swapped": ("llama", _swapped),
    "future tokens seen": ("llama", _spec(causal=False)),
    "future tokens hidden": ("bert", _spec(causal=True)),
    "no RoPE in an encoder": ("nomic-bert", _spec(rope=None)),
    "no ALiBi in an encoder": ("jina-bert-v2", _spec(max_alibi_bias=0.0)),
}


@needs_llama_cpp
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str, judged: Callable[[str], Judged]) -> None:
    name, change = FAULTS[fault]
    files = judged(name)
    assert _error(files, files.original, change) > SEEN


# --- reading -----------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_one(architecture: str = "llama", **changes: Any) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        return _write(_case(architecture, **changes), path)

    return write_one


def _one(path: Path, name: str = "blk.1") -> AttentionLayer:
    return layer.read_layer(read_header(path), name)


def _arrays(one: AttentionLayer) -> dict[str, NDArray[Any]]:
    """Weights and biases; the fused ones as the three that they stand for."""
    linears = {}
    if one.projections.separate is not None:
        linears.update(zip("qkv", one.projections.separate, strict=True))
    else:
        assert one.projections.fused is not None
        cuts = np.cumsum(one.projections.rows)[:2]
        fused = one.projections.fused
        for part, weight in zip("qkv", np.split(fused.weight, cuts), strict=True):
            linears[part] = Linear(weight, fused.scale)
        if fused.bias is not None:
            for part, bias in zip("qkv", np.split(fused.bias, cuts), strict=True):
                linears[part] = replace(linears[part], bias=bias)
    arrays = {part: linear.weight for part, linear in linears.items()}
    arrays |= {
        f"{part}.bias": linear.bias for part, linear in linears.items() if linear.bias is not None
    }
    return arrays


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_fused_weights_are_the_separate_ones(
    kind: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    types = {"blk.*": GGMLQuantizationType[kind]}
    path = write("qwen2", types=types, n_embd=256, n_head=8)
    fused = _fuse(path, tmp_path / "fused.gguf")
    assert fused is not None
    one, other = _one(path), _one(fused)
    assert one.projections.fused is None and other.projections.separate is None
    assert one.projections.rows == other.projections.rows == one.spec.rows
    expected, found = _arrays(one), _arrays(other)
    assert expected.keys() == found.keys() and len(found) == 6
    for part, array in expected.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, found[part])
    (data,) = read_tensors(read_header(path), ["blk.1.attn_k.weight"]).values()
    plain = quants.dequantize(np.frombuffer(data, np.uint8), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(expected["k"], plain.reshape(-1, 256))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q6_K"])
def test_big_endian_gives_the_same_values(kind: str, write: Callable[..., Path]) -> None:
    types = {"blk.*": GGMLQuantizationType[kind]}
    shape = {"types": types, "n_embd": 256, "n_head": 8}
    little, big = (_one(write("gpt-oss", big_endian=big, **shape)) for big in (False, True))
    for part, array in _arrays(little).items():
        np.testing.assert_array_equal(array, _arrays(big)[part])
    assert little.params.sinks is not None and big.params.sinks is not None
    np.testing.assert_array_equal(little.params.sinks, big.params.sinks)


def test_big_endian_blocks_of_words_are_refused(write: Callable[..., Path]) -> None:
    types = {"blk.*": GGMLQuantizationType.IQ2_XS}
    path = write("llama", types=types, n_embd=256, big_endian=True)
    with pytest.raises(GGUFError, match="IQ2_XS is not read from big-endian files"):
        _one(path)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bitnet", "the attention of architecture 'bitnet' is not modelled"),
        ("t5", "the attention of layers 'dec.blk' is not modelled"),
        ("qwen4exp", "the attention of architecture 'qwen4exp' is not modelled"),
    ],
)
def test_what_is_not_modelled_says_so(
    architecture: str, reason: str, write: Callable[..., Path]
) -> None:
    header = read_header(write(architecture))
    name = "blk.1" if architecture != "t5" else "dec.blk.1"
    with pytest.raises(NotModelled, match=reason):
        layer.read_layer(header, name)
    projections = layer.read_projections(header, name)
    assert projections.separate is not None
    assert projections.rows == tuple(len(linear.weight) for linear in projections.separate)


def test_a_tensor_that_no_rule_explains_is_not_passed_over(write: Callable[..., Path]) -> None:
    with pytest.raises(NotModelled, match=r"attn_sinks\.weight: what it does"):
        _one(write("llama", sinks=True))
    with pytest.raises(NotModelled, match=r"attn_q_norm\.weight: what it does"):
        _one(write("llama", qk_norm=True))


def test_a_tensor_that_must_be_there(write: Callable[..., Path]) -> None:
    with pytest.raises(GGUFError, match=r"blk\.1 has no attn_sinks\.weight"):
        _one(write("gpt-oss", sinks=False))
    with pytest.raises(GGUFError, match=r"blk\.1\.attn_q_norm\.weight is missing"):
        _one(write("qwen3", qk_norm=False))


def test_an_output_that_is_not_as_it_must_be(write: Callable[..., Path]) -> None:
    header = read_header(write("llama"))
    spec = attention_spec.read_spec(header, "blk.1")
    assert layer.read_output(header, spec).weight.shape == (64, 64)
    with pytest.raises(GGUFError, match=r"attn_output\.weight has shape \(64, 64\), the metadata"):
        layer.read_output(header, replace(spec, n_embd=32))
    tensors = tuple(tensor for tensor in header.tensors if "attn_output" not in tensor.name)
    with pytest.raises(NotModelled, match=r"blk\.1 has no attn_output\.weight"):
        layer.read_output(replace(header, tensors=tensors), spec)


def test_a_weight_that_must_be_there(write: Callable[..., Path]) -> None:
    path = write("llama")
    with pytest.raises(NotModelled, match=r"\.gguf: blk\.1 has no attn_v\.weight of its own"):
        _one(edited(path, {"blk.1.attn_v.weight"}))
    with pytest.raises(GGUFError, match=r"blk\.1\.attn_q\.weight has 3 dimensions, not 2"):
        _one(edited(path, put={"blk.1.attn_q.weight": zeros(1, 64, 64)}))


def test_whole_rows_are_normed_with_a_bias(write: Callable[..., Path]) -> None:
    """Mpt alone has such norms; llama.cpp fails an assertion on them, so this is by hand."""
    path = write("mpt", layout=_NORM_BIASES)
    one, header = _one(path), read_header(path)
    x = np.random.default_rng(1).standard_normal((1, 3, 64), dtype=np.float32)
    q, k, v = layer.project(one.projections, x, one.spec.clamp)  # [1, 3, 64] each
    heads = layer.positioned(one, q, k, v, np.arange(3)[None])
    for part, row, normed in (("q", q, heads.q), ("k", k, heads.k)):
        weight, bias = (
            read_values(header, f"blk.1.attn_{part}_norm.{kind}") for kind in ("weight", "bias")
        )
        assert weight is not None and bias is not None and bias.any()
        variance = row.var(axis=-1, keepdims=True) + 1e-5
        expected = (row - row.mean(axis=-1, keepdims=True)) / np.sqrt(variance) * weight + bias
        np.testing.assert_allclose(attention.join_heads(normed), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "nomic-bert"])
def test_encoders_see_what_is_to_come(architecture: str, write: Callable[..., Path]) -> None:
    """And bert's attention knows no positions: tokens in another order give the same."""
    path = write(architecture, layout=_LLAMA)
    one, positions = _one(path), np.arange(5)[None]
    output = layer.read_output(read_header(path), one.spec)
    x = np.random.default_rng(1).standard_normal((1, 5, 64), dtype=np.float32)
    plain = _attend(one, output, x, positions)
    turned = _attend(one, output, x[:, ::-1], positions)[:, ::-1]
    assert np.allclose(plain, turned, atol=1e-5) == (architecture == "bert")
    x[:, -1] *= -1
    assert np.abs(_attend(one, output, x, positions) - plain)[:, 0].max() > SEEN


def test_the_window_of_exaone4_32b(write: Callable[..., Path]) -> None:
    """Files that do not name it: 4096 (exaone4.cpp); every fourth layer has none."""
    path = write("exaone4", n_layer=64)
    assert _one(path, "blk.62").spec.window == Window(4096)
    assert _one(path, "blk.63").spec.window is None


def test_a_recurrent_layer_is_no_attention(tmp_path: Path) -> None:
    random_model.write_random_model(tmp_path / "m.gguf", ModelSpec("qwen35"))
    header = read_header(tmp_path / "m.gguf")
    with pytest.raises(NotModelled, match="attn_gate"):
        layer.read_layer(header, "blk.0")
    assert layer.read_layer(header, "blk.1").spec.gated_q


@pytest.mark.parametrize(
    ("architecture", "keys", "error", "reason"),
    [
        ("llama", {"attention.head_count": None}, GGUFError, "head_count' is missing"),
        ("llama", {"embedding_length": "64"}, GGUFError, "a number is expected"),
        ("llama", {"attention.head_count_kv": 4}, GGUFError, r"\(64, 32, 32\) rows, the metadata"),
        ("llama", {"attention.head_count_kv": 3}, GGUFError, "4 heads cannot share 3"),
        (
            "llama",
            {"attention.head_count_kv": [2, 4]},
            NotModelled,
            "head_count_kv: unequal layers",
        ),
        ("llama", {"attention.head_count": 0}, NotModelled, "no attention heads"),
        ("llama", {"attention.key_length": -16}, GGUFError, "metadata of attention"),
        ("llama", {"rope.dimension_count": 15}, GGUFError, "n_rot: expected an even number"),
        ("llama", {"embedding_length": 32}, GGUFError, r"attn_q.weight has shape \(64, 64\)"),
        ("gemma3", {"attention.sliding_window_pattern": "x"}, GGUFError, "metadata of attention"),
        (
            "mimo2",
            {"attention.sliding_window_pattern": None},
            GGUFError,
            r"metadata key 'mimo2\.attention\.sliding_window_pattern' is missing",
        ),
        ("qwen35", {"rope.dimension_sections": None}, GGUFError, "sections: expected"),
        ("gemma3", {"attention.key_length_swa": 8}, NotModelled, "key_length_swa: unequal"),
        ("llama", {"rope.scaling.type": "ntk"}, GGUFError, "rope.scaling.type' is 'ntk'"),
        ("gemma4", {"attention.shared_kv_layers": 1}, NotModelled, "from another layer"),
        ("mimo2", {"attention.value_scale": 0.5}, NotModelled, "value_scale"),
        ("llama4", {"attention.sliding_window": 0}, NotModelled, "llama4 without a window"),
        ("llama", {"nextn_predict_layers": 1}, NotModelled, "no layer of the main model"),
    ],
)
def test_metadata_that_cannot_be_right(
    architecture: str,
    keys: dict[str, Any],
    error: type[GGUFError],
    reason: str,
    write: Callable[..., Path],
) -> None:
    with pytest.raises(error, match=reason) as raised:
        _one(write(architecture, keys=keys))
    assert type(raised.value) is error


# --- several sequences at once -----------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", ["gemma3, attention", "refact", "temperature", "cohere2", "qwen35"]
)
def test_sequences_of_different_length_do_not_meet(architecture: str, tmp_path: Path) -> None:
    """A batch with padding gives each sequence what it gets alone."""
    path = _write(CASES[architecture], tmp_path / "m.gguf")
    one = _one(path)
    output = layer.read_output(read_header(path), one.spec)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 20, one.spec.n_embd), dtype=np.float32)
    lengths = (20, 1, 13)
    together = _attend(one, output, x, attention.padded_positions(lengths, 20))
    assert np.isfinite(together).all()  # padding too
    for seq, length in enumerate(lengths):
        alone = _attend(one, output, x[seq : seq + 1, :length], np.arange(length)[None])
        np.testing.assert_allclose(together[seq, :length], alone[0], rtol=0, atol=2e-6)


def _attend(
    one: AttentionLayer, output: Linear, x: NDArray[Any], positions: NDArray[np.int64]
) -> NDArray[Any]:
    q, k, v = layer.project(one.projections, x, one.spec.clamp)
    heads = layer.positioned(one, q, k, v, positions)
    mask = layer.mask(one.spec, positions, positions)
    attended = attention.attention(heads.q, heads.k, heads.v, mask, one.params)
    return layer.output(output, attended, heads.gate)
