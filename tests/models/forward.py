"""A forward pass in numpy, for small models: what `gguf_fuse.models.layer` reads, made to speak.

Embedding, then per layer attention (all of it from `gguf_fuse.attention` and `models.layer`) and
feed-forward, then the output: enough of llama.cpp's graphs (src/models/*.cpp) to compare
log-probabilities with it, prompt first, then single tokens over a KV cache; or, of an encoder, the
embeddings of all tokens. Everything but attention is kept as plain as it can be.

Axis names are those of `gguf_fuse.attention`; n_seqs is 1 here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_fuse.attention import attend, norms
from gguf_fuse.attention.projections import Linear, apply_gate
from gguf_fuse.attention.shapes import Floats
from gguf_fuse.format.header import Header
from gguf_fuse.format.parser import read_header
from gguf_fuse.models import layer
from gguf_fuse.models.dequantize import read_values
from gguf_fuse.models.layer import AttentionLayer
from gguf_fuse.planning.unfuse import attention_rows
from tests.attention.cases import join_heads

PROMPT_BLOCK = 2048  # tokens

Activation = Callable[[Floats], Floats]


# --- what differs between architectures outside attention --------------------------------------


def silu(x: Floats) -> Floats:
    y: Floats = x / (1 + np.exp(-x))
    return y


def gelu(x: Floats) -> Floats:
    """ggml's (vec.h): looked up in a table from float16 to float16; 0 and x beyond ±10."""
    half = np.clip(x, -10, 10).astype(np.float16).astype(np.float32)
    inner = math.sqrt(2 / math.pi) * half * (1 + 0.044715 * half * half)
    looked_up = (0.5 * half * (1 + np.tanh(inner))).astype(np.float16).astype(x.dtype)
    return np.where(x <= -10, 0, np.where(x >= 10, x, looked_up)).astype(x.dtype)


def relu(x: Floats) -> Floats:
    return np.maximum(x, 0)


def relu_squared(x: Floats) -> Floats:
    return np.square(relu(x))


def xielu(header: Header, index: int) -> Activation:
    """Of one layer, with numbers from the metadata (ggml.c, ggml_xielu; unary-ops.cpp)."""

    def number(name: str) -> float:
        return float(header.metadata[f"xielu.{name}"][index])

    alpha_p = np.log1p(math.exp(number("alpha_p")))
    alpha_n = number("beta") + np.log1p(math.exp(number("alpha_n")))

    def activation(x: Floats) -> Floats:
        low = np.minimum(x, number("eps"))
        y = np.where(x > 0, alpha_p * x * x, (np.expm1(low) - x) * alpha_n) + number("beta") * x
        same: Floats = y.astype(x.dtype)
        return same

    return activation


@dataclass(frozen=True)
class Block:
    """parallel: the feed-forward takes the layer's own input and both are added at once.

    post_norm: "post_attention_norm" norms attention's result; else it is the feed-forward's norm.
    packed: gate and up are one matrix, gate first. Experts are weighted by a softmax over all, and
    for the chosen ones scaled to a sum of 1 (norm_weights; then it does not matter whether the
    softmax is over all). early_router: it sees the layer's input. clipped: gpt-oss's SwiGLU.
    """

    activation: Activation = silu
    parallel: bool = False
    post_norm: bool = True
    packed: bool = False
    weightless_norms: bool = False
    norm_weights: bool = True
    early_router: bool = False
    clipped: bool = False
    embedding_scale: Callable[[_Numbers], float] = lambda numbers: 1.0
    residual_scale: Callable[[_Numbers], float] = lambda numbers: 1.0
    logit_scale: Callable[[_Numbers], float] = lambda numbers: 1.0


_GEMMA = Block(gelu, embedding_scale=lambda numbers: math.sqrt(numbers("embedding_length")))
_GRANITE = Block(
    embedding_scale=lambda numbers: numbers("embedding_scale"),
    residual_scale=lambda numbers: numbers("residual_scale"),
    logit_scale=lambda numbers: 1 / numbers("logit_scale"),
)
_COHERE = Block(parallel=True, logit_scale=lambda numbers: numbers("logit_scale"))

_NO_POST_NORM = ("seed_oss", "glm4moe", "qwen35", "qwen35moe", "qwen3next")

_BLOCKS: dict[str, Block] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma4"), _GEMMA),
    **dict.fromkeys(("granite", "granitemoe", "minicpm"), _GRANITE),
    **dict.fromkeys(("command-r", "cohere2"), _COHERE),
    **dict.fromkeys(("phi2", "gptneox", "falcon"), Block(gelu, parallel=True)),
    **dict.fromkeys(("phi3", "glm4", "chatglm"), Block(packed=True)),
    **dict.fromkeys(("nemotron", "arcee"), Block(relu_squared)),
    "starcoder2": Block(gelu),
    "olmo": Block(weightless_norms=True),
    "gpt-oss": Block(post_norm=False, clipped=True),
    **dict.fromkeys(_NO_POST_NORM, Block(post_norm=False)),
    **dict.fromkeys(("bloom", "mpt"), Block(gelu)),
    **dict.fromkeys(("olmoe", "qwen2moe"), Block(norm_weights=False)),
    "smallthinker": Block(relu, early_router=True),
    **dict.fromkeys(("bert", "jina-bert-v2", "jina-bert-v3"), Block(gelu)),
    "nomic-bert-moe": Block(gelu, norm_weights=False),
}


# --- attention's output ------------------------------------------------------------------------

# llama.cpp's graphs of these do not read its bias.
WITHOUT_OUTPUT_BIAS: tuple[str, ...] = ("ernie4_5", "ernie4_5-moe", "refact")


def read_output(header: Header, name: str) -> Linear:
    """attn_output of layer `name`: weight [n_embd, n_head * head_dim_v]."""
    weight, scale, bias = (
        read_values(header, f"{name}.attn_output.{suffix}")
        for suffix in ("weight", "scale", "bias")
    )
    assert weight is not None
    bias = None if header.architecture in WITHOUT_OUTPUT_BIAS else bias
    return Linear(weight, None if scale is None else float(scale.item()), bias)


def output(weights: Linear, attended: Floats, gate: Floats | None = None) -> Floats:
    """Attention's result [n_seqs, n_head, n_tokens, head_dim_v] -> [n_seqs, n_tokens, n_embd].

    Times sigmoid(gate) where there is one (llama-graph.cpp, build_attn).
    """
    return weights.project(join_heads(attended if gate is None else apply_gate(attended, gate)))


# --- the pass ----------------------------------------------------------------------------------


class _Numbers:
    """Numbers of the metadata, without the "<architecture>." in front."""

    def __init__(self, header: Header) -> None:
        self.header = header

    def __call__(self, key: str, default: float | None = None) -> float:
        value = self.header.metadata.get(f"{self.header.architecture}.{key}", default)
        assert isinstance(value, (int, float)), key
        return value


@dataclass
class Cache:
    """K and V of one layer, [n_seqs, n_head_kv, n_kv, head_dim] and [..., head_dim_v]."""

    k: Floats | None = None
    v: Floats | None = None

    def append(self, k: Floats, v: Floats) -> tuple[Floats, Floats]:
        self.k = k if self.k is None else np.concatenate([self.k, k], axis=2)
        self.v = v if self.v is None else np.concatenate([self.v, v], axis=2)
        return self.k, self.v


@dataclass
class Forward:
    """One model and its cache. change: alters each layer as it is read, for seeded faults."""

    path: Path
    dtype: type[np.floating[Any]] = np.float32
    change: Callable[[AttentionLayer], AttentionLayer] = lambda one: one
    n_past: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.header = read_header(self.path)
        self.numbers = _Numbers(self.header)
        self.block = _BLOCKS.get(str(self.header.architecture), Block())
        self.tensors = {
            info.name: values
            for info in self.header.tensors
            if ".attn_q" not in info.name and ".attn_k" not in info.name
            if (values := read_values(self.header, info.name)) is not None
        }
        names = [f"blk.{i}" for i in range(int(self.numbers("block_count")))]
        self.layers = [
            self.change(layer.read_layer(self.header, name, attention_rows))
            if self._has_attention(name)
            else None
            for name in names
        ]
        self.outputs = [one and read_output(self.header, one.spec.name) for one in self.layers]
        self.caches = [Cache() for _ in names]
        self.convolved: dict[int, Floats] = {}  # lfm2: [1, n_past, n_embd] by layer

    def log_probabilities(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed tokens, all at once, after those fed before -> [n_vocab] after the last one."""
        x = self.tensors["token_embd.weight"][list(tokens)][None].astype(self.dtype)
        x = x * self.dtype(self.block.embedding_scale(self.numbers))  # [1, n_tokens, n_embd]
        x = self._norm("token_embd_norm", x) if self.header.architecture == "bloom" else x
        positions = np.arange(self.n_past, self.n_past + len(tokens))[None]  # [1, n_tokens]
        for index, one in enumerate(self.layers):
            x = self._layer(index, one, x, positions)
        self.n_past += len(tokens)
        logits = self._logits(x[0, -1:])[0].astype(np.float64)  # [n_vocab]
        logits -= logits.max()
        result: NDArray[np.float32] = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
        return result

    def _has_attention(self, name: str) -> bool:
        names = {info.name for info in self.header.tensors}
        fused = f"{name}.attn_qkv.weight" in names and f"{name}.attn_output.weight" in names
        return f"{name}.attn_q.weight" in names or fused

    def _layer(
        self, index: int, one: AttentionLayer | None, x: Floats, positions: NDArray[np.int64]
    ) -> Floats:
        """x [1, n_tokens, n_embd] -> the same shape."""
        name, block = f"blk.{index}", self.block
        residual = self.dtype(block.residual_scale(self.numbers))
        h = self._norm(f"{name}.attn_norm", x)
        if one is not None:
            attended = self._attention(index, one, h, positions)
        elif f"{name}.shortconv.conv.weight" in self.tensors:
            attended = self._short_convolution(index, h)
        elif f"{name}.ssm_out.weight" in self.tensors:
            assert not self.tensors[f"{name}.ssm_out.weight"].any(), "linear attention"
            attended = np.zeros_like(h)
        else:  # deci: one matrix instead of attention
            attended = self._linear(f"{name}.attn_output", h)
        if block.post_norm:
            attended = self._norm(f"{name}.post_attention_norm", attended)
        if block.parallel:
            own_norm = f"{name}.ffn_norm.weight" in self.tensors
            h = self._norm(f"{name}.ffn_norm", x) if own_norm else h
            return x + attended + self._feed_forward(index, h, h)
        routed = x
        x = x + residual * attended
        h = self._norm(f"{name}.{'ffn_norm' if block.post_norm else 'post_attention_norm'}", x)
        fed = self._feed_forward(index, h, routed if block.early_router else h)
        x = x + residual * self._norm(f"{name}.post_ffw_norm", fed)
        return x * self.tensors.get(f"{name}.layer_output_scale.weight", self.dtype(1))

    def _attention(
        self, index: int, one: AttentionLayer, h: Floats, positions: NDArray[np.int64]
    ) -> Floats:
        q, k, v = one.projections.project(h, one.spec.clamp)
        heads = layer.positioned(one, q, k, v, positions)
        k, v = self.caches[index].append(heads.k, heads.v)
        k_positions = np.arange(k.shape[2])[None]  # [1, n_kv]
        mask = layer.mask(one.spec, positions, k_positions)  # [1, n_tokens, n_kv]
        attended = attend.attention(heads.q, k, v, mask, one.params)
        weights = self.outputs[index]
        assert weights is not None
        return output(weights, attended, heads.gate)

    def _short_convolution(self, index: int, h: Floats) -> Floats:
        """lfm2.cpp: a causal convolution over b · x per channel, times c."""
        name = f"blk.{index}.shortconv"
        b, c, x = np.split(self._linear(f"{name}.in_proj", h), 3, axis=-1)
        kernel = self.tensors[f"{name}.conv.weight"]  # [n_embd, width]
        width, n_tokens = kernel.shape[1], h.shape[1]
        none = np.zeros((1, width - 1, h.shape[2]), h.dtype)
        past = self.convolved.get(index, none)
        seen = np.concatenate([past, b * x], axis=1)  # [1, n_past + n_tokens, n_embd]
        self.convolved[index] = seen
        seen = seen[:, -(width - 1 + n_tokens) :]
        y = sum(kernel[:, i] * seen[:, i : i + n_tokens] for i in range(width))
        return self._linear(f"{name}.out_proj", c * y)

    def _norm(self, name: str, x: Floats) -> Floats:
        """As it is if the file has no such norm."""
        weight, bias = self.tensors.get(f"{name}.weight"), self.tensors.get(f"{name}.bias")
        before = name.endswith((".attn_norm", ".ffn_norm", "output_norm"))
        if weight is None and not (self.block.weightless_norms and before):
            return x
        if f"{self.header.architecture}.attention.layer_norm_epsilon" in self.header.metadata:
            epsilon = self.numbers("attention.layer_norm_epsilon")
            return norms.layer_norm(x, weight, bias, epsilon)
        return norms.rms_norm(x, weight, self.numbers("attention.layer_norm_rms_epsilon"))

    def _linear(self, name: str, x: Floats) -> Floats:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        return Linear(weight, None, bias).project(x)

    def _feed_forward(self, index: int, x: Floats, routed: Floats) -> Floats:
        """x, routed [1, n_tokens, n_embd]: experts are chosen by `routed`."""
        name = f"blk.{index}"
        if f"{name}.ffn_gate_inp.weight" in self.tensors:
            return self._experts(name, x, routed)
        activation = self.block.activation
        if self.header.architecture == "apertus":
            activation = xielu(self.header, index)
        up = self._linear(f"{name}.ffn_up", x)
        if self.block.packed:
            gate, up = np.split(up, 2, axis=-1)
            return self._linear(f"{name}.ffn_down", activation(gate) * up)
        if f"{name}.ffn_gate.weight" in self.tensors:
            up = activation(self._linear(f"{name}.ffn_gate", x)) * up
        else:
            up = activation(up)
        return self._linear(f"{name}.ffn_down", up)

    def _experts(self, name: str, x: Floats, routed: Floats) -> Floats:
        n_used = int(self.numbers("expert_used_count"))
        scores = self._linear(f"{name}.ffn_gate_inp", routed)[0]  # [n_tokens, n_expert]
        out = np.zeros_like(x)
        for token, row in enumerate(scores):
            shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()  # [n_expert]
            chosen = np.argsort(-row, kind="stable")[:n_used]
            total = shares[chosen].sum() if self.block.norm_weights else 1
            for expert in chosen:
                share = shares[expert] / total
                out[0, token] += share * self._expert(name, int(expert), x[0, token])
        if f"{name}.ffn_up_shexp.weight" not in self.tensors:
            return out
        gate = silu(self._linear(f"{name}.ffn_gate_shexp", x))
        shared = self._linear(
            f"{name}.ffn_down_shexp", gate * self._linear(f"{name}.ffn_up_shexp", x)
        )
        share = x @ self.tensors[f"{name}.ffn_gate_inp_shexp.weight"]  # [1, n_tokens]
        out += shared / (1 + np.exp(-share[..., None]))
        return out

    def _expert(self, name: str, expert: int, x: Floats) -> Floats:
        def through(part: str, x: Floats) -> Floats:
            y: Floats = self.tensors[f"{name}.ffn_{part}_exps.weight"][expert] @ x
            bias = self.tensors.get(f"{name}.ffn_{part}_exps.bias")
            return y if bias is None else y + bias[expert]

        up = through("up", x)
        if f"{name}.ffn_gate_exps.weight" not in self.tensors:
            return through("down", self.block.activation(up))
        gate = through("gate", x)
        if not self.block.clipped:
            return through("down", self.block.activation(gate) * up)
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return through("down", gate / (1 + np.exp(-1.702 * gate)) * (up + 1))

    def _logits(self, x: Floats) -> Floats:
        first = str(self.header.architecture).startswith("lfm2")
        x = self._norm("token_embd_norm" if first else "output_norm", x)
        name = "output" if "output.weight" in self.tensors else "token_embd"
        logits = self._linear(name, x) * self.dtype(self.block.logit_scale(self.numbers))
        cap = self.numbers("final_logit_softcapping", 0.0)
        return cap * np.tanh(logits / cap) if cap else logits


class Encoder(Forward):
    """BERT and its kin (bert.cpp): each norm comes after what it norms, all tokens at once."""

    def embeddings(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """What the last layer gives: [n_tokens, n_embd]."""
        x = self.tensors["token_embd.weight"][list(tokens)]  # [n_tokens, n_embd]
        x = x + self.tensors["token_types.weight"][0]  # llama.cpp knows no other
        if self.header.architecture == "bert":
            x = x + self.tensors["position_embd.weight"][: len(tokens)]
        x = self._norm("token_embd_norm", x[None].astype(self.dtype))  # [1, n_tokens, n_embd]
        positions = np.arange(len(tokens))[None]  # [1, n_tokens]
        for index, one in enumerate(self.layers):
            x = self._layer(index, one, x, positions)
        result: NDArray[np.float32] = x[0].astype(np.float32)
        return result

    def _layer(
        self, index: int, one: AttentionLayer | None, x: Floats, positions: NDArray[np.int64]
    ) -> Floats:
        """x [1, n_tokens, n_embd] -> the same shape."""
        assert one is not None
        name = f"blk.{index}"
        h = self._norm(f"{name}.attn_output_norm", x + self._attention(index, one, x, positions))
        if f"{name}.attn_norm_2.weight" in self.tensors:
            h = self._norm(f"{name}.attn_norm_2", x + h)
        return self._norm(f"{name}.layer_output_norm", h + self._feed_forward(index, h, h))


def log_probabilities(
    path: Path,
    tokens: Sequence[int],
    continuation: Sequence[int] = (),
    *,
    dtype: type[np.floating[Any]] = np.float32,
    change: Callable[[AttentionLayer], AttentionLayer] = lambda one: one,
) -> NDArray[np.float32]:
    """One row after the prompt, one after each further token: [1 + len(continuation), n_vocab].

    A long prompt goes in blocks, so that early tokens are not masked against all later ones.
    """
    model = Forward(path, dtype, change)
    for start in range(0, len(tokens), PROMPT_BLOCK):
        row = model.log_probabilities(tokens[start : start + PROMPT_BLOCK])
    return np.stack([row, *(model.log_probabilities([token]) for token in continuation)])


def embeddings(
    path: Path,
    tokens: Sequence[int],
    *,
    change: Callable[[AttentionLayer], AttentionLayer] = lambda one: one,
) -> NDArray[np.float32]:
    """Of an encoder, a row for each token: [n_tokens, n_embd]."""
    return Encoder(path, change=change).embeddings(tokens)
