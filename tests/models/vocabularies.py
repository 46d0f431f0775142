"""Made-up vocabularies of any size, as metadata that llama.cpp's tokenizers take."""

from __future__ import annotations

from collections.abc import Sequence

from tests.models.architectures import Value

# Token types as in llama.cpp: 1 normal, 2 unknown, 3 control, 6 byte.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def spm_vocabulary(n_vocab: int) -> dict[str, Value]:
    """A SentencePiece vocabulary: three specials, 256 bytes, then words of syllables."""
    if n_vocab < 259:
        raise ValueError(f"n_vocab {n_vocab}: this vocabulary needs 259 at least")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += _words(n_vocab - len(tokens), "\u2581")
    types = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256]
    types += [_NORMAL] * (n_vocab - len(types))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(n_vocab)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def bpe_vocabulary(n_vocab: int) -> dict[str, Value]:
    """A byte-pair vocabulary as of Llama 3: 256 bytes, words, 256 specials, all merges."""
    if n_vocab < 1024:
        raise ValueError(f"n_vocab {n_vocab}: this vocabulary needs 1024 at least")
    words = _words(n_vocab - 512, "\u0120")
    tokens = _byte_symbols() + words
    bos = len(tokens)
    tokens += ["<|begin_of_text|>", "<|end_of_text|>"]
    tokens += [f"<|reserved_special_token_{i}|>" for i in range(254)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_NORMAL] * bos + [_CONTROL] * 256,
        "tokenizer.ggml.merges": _merges(words),
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": bos + 1,
    }


def _byte_symbols() -> list[str]:
    """The printable stand-ins for the 256 bytes that byte-level BPE uses."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _words(count: int, space: str) -> list[str]:
    """`count` different words of two-letter syllables, shorter ones first.

    Some begin with `space`. All words of one length come before any of the next, so that nearly
    every half of a word is a word too, and merges are as many per token as in real vocabularies.
    """
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    starts = syllables[:40] + [space + s[0] for s in syllables[::5]]
    words: list[str] = []
    tails = [""]
    while len(words) < count:
        longer = [head + tail for tail in tails for head in starts]
        words += longer[: count - len(words)]
        tails = [head + tail for tail in tails for head in syllables[:30]]
    return words


def _merges(words: Sequence[str]) -> list[str]:
    """Every way to join two words, or bytes, into a third one."""
    known = {*words, *_byte_symbols()}
    return [
        f"{word[:cut]} {word[cut:]}"
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in known and word[cut:] in known
    ]
