"""Compare split-KV decode in numpy with PyTorch's scaled_dot_product_attention, where installed.

Both get the same float32 Q, K and V and as many threads, and take turns. PyTorch does it in two
ways: as one would, with enable_gqa, and with the query heads of a group as if they were tokens,
which is faster. What is also timed is reading K and V once, which nobody can undercut.

Examples:

    python scripts/bench_attention.py
    python scripts/bench_attention.py --threads 2 --n-kv 8192,32768 --json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")  # as the command does, see gguf_fuse/cli

import numpy as np

from gguf_fuse.attention.shapes import Floats
from gguf_fuse.attention.softmax import AttentionParams
from gguf_fuse.attention.split import split_attention
from gguf_fuse.attention.threads import blas_threads
from gguf_fuse.machine import COMPUTE_THREADS
from gguf_fuse.measuring.bench import stream
from gguf_fuse.measuring.gain import gain, spread
from gguf_fuse.measuring.timing import interleaved

Way = Callable[[], Any]

WAYS = ("split", "K, V read", "torch", "torch grouped")


def main() -> None:
    options = parse_arguments()
    if options.threads < 1 or options.heads % options.kv_heads:
        raise SystemExit("threads must be at least 1, heads a multiple of kv-heads")
    rows = [measure(n_kv, options) for n_kv in options.n_kv]
    if options.json:
        print(json.dumps({"threads": options.threads, "torch": torch_version(), "rows": rows}))
    else:
        print_table(rows, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=COMPUTE_THREADS)
    parser.add_argument("--n-kv", type=numbers, default=numbers("512,2048,8192,32768"))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="for the repeats of one row")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def torch_version() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return str(torch.__version__)


def measure(n_kv: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row. Times and differences of torch are left out where it is missing."""
    random = np.random.default_rng(n_kv)

    def draw(*shape: int) -> Floats:
        return random.standard_normal(shape, dtype=np.float32)

    q = draw(1, options.heads, 1, options.head_dim)  # [n_seqs, n_head, n_tokens, head_dim]
    k = draw(1, options.kv_heads, n_kv, options.head_dim)  # [n_seqs, n_head_kv, n_kv, head_dim]
    v = draw(1, options.kv_heads, n_kv, options.head_dim)  # [n_seqs, n_head_kv, n_kv, head_dim]
    params = AttentionParams(scale=options.head_dim**-0.5)
    split = functools.partial(split_attention, q, k, v, None, params, n_threads=options.threads)
    ways: dict[str, Way] = {"split": split}
    ways["K, V read"] = functools.partial(stream, (k, v), options.threads)
    torch = torch_ways(q, k, v, options.threads)
    ways |= torch
    with blas_threads(options.threads):
        ms = interleaved(ways, options.seconds)
    row = {
        "n_kv": n_kv,
        "rounds": len(ms["split"]),
        "ms": {way: asdict(spread(ms[way])) for way in ms},
    }
    mine = split().ravel()
    return row | {
        "split_over": {way: asdict(gain(ms[way], ms["split"])) for way in torch},
        "difference": {
            way: float(np.max(np.abs(mine - np.asarray(call()).ravel())))
            for way, call in torch.items()
        },
    }


def torch_ways(q: Floats, k: Floats, v: Floats, threads: int) -> dict[str, Way]:
    """PyTorch's grouped-query attention over the same memory; none where torch is missing."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    own_q, own_k, own_v = (torch.from_numpy(array) for array in (q, k, v))
    grouped_q = own_q.reshape(k.shape[0], k.shape[1], -1, q.shape[3])  # [.., group, head_dim]

    def gqa() -> Any:
        with torch.inference_mode():
            return attend(own_q, own_k, own_v, enable_gqa=True)

    def grouped() -> Any:
        with torch.inference_mode():
            return attend(grouped_q, own_k, own_v)

    return {"torch": gqa, "torch grouped": grouped}


def print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(
        f"decode, {options.heads} heads, {options.kv_heads} KV heads, {options.head_dim} wide, "
        f"{options.threads} threads, torch {torch_version() or 'is not installed'}; median ms of "
        "some rounds, ± half of the middle half\n"
    )
    titles = " ".join(f"{way:>13}" for way in WAYS)
    print(f"{'n_kv':>7} rounds {titles}  split against both")
    for row in rows:
        cells = " ".join(f"{shown(row['ms'].get(way)):>13}" for way in WAYS)
        print(f"{row['n_kv']:>7} {row['rounds']:>6} {cells}  {against_torch(row)}")


def shown(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    half = (spread["high"] - spread["low"]) / 2 / spread["median"]
    return f"{spread['median']:.3f} ±{half:.0%}"


def against_torch(row: dict[str, Any]) -> str:
    found = [f"{each['ratio']:.2f} x {each['word']}" for each in row["split_over"].values()]
    differences = [f"differs by {max(row['difference'].values()):.1e}"] if found else ["-"]
    return "; ".join(found + differences)


if __name__ == "__main__":
    main()
