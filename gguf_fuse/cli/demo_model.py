"""The demo's model: a small llama with random weights, which llama.cpp loads. Always the same."""

import contextlib
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import TokenType
from numpy.typing import NDArray

N_LAYER, N_EMBD, N_FF, N_VOCAB, N_CTX = 8, 512, 1024, 320, 4096
N_HEAD, N_HEAD_KV, HEAD_DIM = 8, 2, 64
# As in files of type Q4_K_M, V has more bits in some layers, which then cannot be fused.
MORE_BITS = ("blk.0.attn_v", "blk.7.attn_v")

_LAYER: dict[str, tuple[int, ...]] = {  # shapes in numpy order: rows first
    "attn_norm": (N_EMBD,),
    "attn_q": (N_HEAD * HEAD_DIM, N_EMBD),
    "attn_k": (N_HEAD_KV * HEAD_DIM, N_EMBD),
    "attn_v": (N_HEAD_KV * HEAD_DIM, N_EMBD),
    "attn_output": (N_EMBD, N_HEAD * HEAD_DIM),
    "ffn_norm": (N_EMBD,),
    "ffn_gate": (N_FF, N_EMBD),
    "ffn_up": (N_FF, N_EMBD),
    "ffn_down": (N_EMBD, N_FF),
}
# Where the float16 scales are in a block, in bytes, and values that give random bits a standard
# deviation of 1. The second one of Q4_K is of the minimum, and puts the mean at 0.
_SCALES: dict[T, dict[int, float]] = {T.Q4_K: {0: 1 / 258, 2: 7.5 / 258}, T.Q6_K: {208: 1 / 1366}}


def write_demo_model(path: Path) -> None:
    """Write it to `path`. Raises OSError."""
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(1)
    _add_metadata(writer)
    shapes = {
        "token_embd": (N_VOCAB, N_EMBD),
        "output_norm": (N_EMBD,),
        "output": (N_VOCAB, N_EMBD),
    }
    for layer in range(N_LAYER):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in _LAYER.items()}
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", 1 + 0.2 * random.standard_normal(shape, np.float32))
        else:
            ggml_type = T.Q6_K if name in MORE_BITS else T.Q4_K
            blocks = _blocks(random, shape, ggml_type)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=ggml_type)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _blocks(random: np.random.Generator, shape: tuple[int, ...], ggml_type: T) -> NDArray[np.uint8]:
    """Random bits, shape [rows, bytes of a row]; gguf-py cannot quantize to these types.

    The weights keep the length of what they multiply.
    """
    rows, width = shape
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    data = random.integers(0, 256, (rows * width // block, block_bytes), np.uint8)
    for at, scale in _SCALES[ggml_type].items():
        data[:, at : at + 2] = np.array([scale * width**-0.5], "<f2").view(np.uint8)
    return data.reshape(rows, -1)


def _add_metadata(writer: gguf.GGUFWriter) -> None:
    writer.add_name("random")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    words = [f"\u2581word{number}" for number in range(N_VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + words)
    writer.add_token_scores([-float(number) for number in range(N_VOCAB)])
    writer.add_token_types(types + [TokenType.NORMAL] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
