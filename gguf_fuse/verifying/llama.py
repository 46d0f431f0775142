"""Two files in llama.cpp itself: log-probabilities of the same tokens, prompt and generation."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_fuse.format.header import Header
from gguf_fuse.format.source import GGUFError
from gguf_fuse.llama.process import LoadFailed, ask_wheel, available, first_file, n_vocab
from gguf_fuse.verifying.report import Judgement, VerifyOptions

N_PROMPT, N_GEN = 32, 4
UBATCH, SMALL_UBATCH = 512, 8  # tokens that llama.cpp computes at once

Rows = npt.NDArray[np.float64]  # log-probabilities: [1 + N_GEN, n_vocab]


@dataclass(frozen=True)
class _Answer:
    rows: Rows
    backends: str
    device: str


def require_wheel() -> None:
    """Raises GGUFError where `judge` could not run llama.cpp."""
    if not available():
        raise GGUFError(
            "--llama needs xllamacpp, which is not installed: pip install 'gguf-fuse[llama]'"
        )


def judge(original: Header, fused: Header, options: VerifyOptions) -> Judgement:
    """Run each file in a process of its own, FUSED with the tokens that ORIGINAL generates.

    On a CPU the rows must be the same, bit for bit. A GPU computes a fused tensor in other tiles:
    there the limit is twice what ORIGINAL itself differs by when its prompt is computed in smaller
    batches. Raises GGUFError where llama.cpp does not run ORIGINAL.
    """
    options.on_start("llama.cpp", 3)
    tokens = random.Random(options.seed)
    prompt = [tokens.randrange(n_vocab(original)) for _ in range(N_PROMPT)]
    try:
        before = _ask(original, options, prompt, [None] * N_GEN)
    except LoadFailed as failure:
        raise GGUFError(
            f"{original.path}: llama.cpp does not run the original itself, so there is nothing to "
            f"compare: {failure}"
        ) from failure
    options.on_progress(1)
    generated = before.rows[:-1].argmax(axis=1).tolist()
    try:
        after = _ask(fused, options, prompt, generated)
    except LoadFailed as failure:
        verb = "crashes on" if failure.signal else "does not run"
        return Judgement(before.device, f"llama.cpp {verb} the fused file: {failure}")
    options.on_progress(1)
    limit = 0.0
    if before.backends != "CPU" and options.n_gpu_layers != 0:
        other = _ask(original, options, prompt, generated, SMALL_UBATCH)
        limit = 2 * difference(before.rows, other.rows)
    options.on_progress(1)
    return compared(before.rows, after.rows, limit, before.device)


def compared(before: Rows, after: Rows, limit: float, device: str) -> Judgement:
    """The judgement on rows of two files."""
    if before.shape != after.shape:
        shapes = f"{before.shape[1]} tokens, but {after.shape[1]} in the fused file"
        return Judgement(device, f"llama.cpp gives probabilities of {shapes}")
    largest = difference(before, after)
    if largest <= limit:
        return Judgement(device, None, largest, limit)
    pairs = enumerate(zip(before, after, strict=True))
    first = next(row for row, pair in pairs if not difference(*pair) <= limit)
    tokens = "1 generated token" if first == 1 else f"{first} generated tokens"
    place = f"after {tokens if first else 'the prompt'}"
    problem = (
        f"llama.cpp computes other log-probabilities from the fused file: they differ by up to "
        f"{largest:.2g}, limit {limit:.2g}; first {place}"
    )
    return Judgement(device, problem, largest, limit)


def difference(before: Rows, after: Rows) -> float:
    """The largest; nan or infinity where one of them alone is no number."""
    found = np.subtract(before, after, out=np.zeros_like(before), where=before != after)
    return float(np.abs(found).max())


def _ask(
    model: Header,
    options: VerifyOptions,
    prompt: list[int],
    continuation: list[Any],
    n_ubatch: int = UBATCH,
) -> _Answer:
    start = {"path": first_file(model), "n_ctx": 512, "n_threads": options.threads}
    request = {
        "start": start | {"n_gpu_layers": options.n_gpu_layers},
        "tokens": prompt,
        "continuation": continuation,
        "n_ubatch": n_ubatch,
    }
    (answer,) = ask_wheel(request)
    device = answer["gpu_info"] if options.n_gpu_layers != 0 else ""
    return _Answer(np.array(answer["rows"]), answer["backends"], device or answer["cpu_info"])
