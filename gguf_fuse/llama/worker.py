"""The process with the wheel: one request on standard input, one answer on standard output.

Run as a file; it imports neither numpy nor the package, so that it starts fast. What llama.cpp
says goes to standard error.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

REFUSED = 3  # exit status where llama.cpp said no; any other but 0 is a fault of ours

GREEDY = {"temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}


def parameters(path: str, n_ctx: int, n_threads: int = 0, n_gpu_layers: int | None = None) -> Any:
    """What a server is started with. n_threads 0, n_gpu_layers None: llama.cpp's own choice."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = n_ctx
    params.n_parallel = 1
    params.fit_params = False
    # Keep what lies outside a sliding window: else llama.cpp starts over instead of decoding.
    params.swa_full = True
    if n_threads:
        params.cpuparams.n_threads = n_threads
        params.cpuparams_batch.n_threads = n_threads
    if n_gpu_layers is not None:
        params.n_gpu_layers = n_gpu_layers
    if n_gpu_layers == 0:  # nothing at all on a GPU that is there
        params.no_op_offload = params.no_kv_offload = True
    return params


def start(params: Any) -> Any:
    """The server; ends the process with REFUSED where llama.cpp does not load the file."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    try:
        return xllamacpp.Server(params)
    except RuntimeError:  # it says no more than that; llama.cpp's log does
        sys.exit(REFUSED)


def refuse(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(REFUSED)


def log_probabilities(
    server: Any, tokens: Sequence[int], continuation: Sequence[int | None]
) -> list[array.array[float]]:
    """Of the next token after the prompt, and after each token that follows it: rows of [n_vocab].

    Those are really decoded: a batch of one on the cache of the rest. None is the likeliest one.
    """
    tokens = list(tokens)
    rows = [row(server, tokens, cached=False)]
    for given in continuation:
        likeliest = max(range(len(rows[-1])), key=rows[-1].__getitem__)
        tokens.append(likeliest if given is None else given)
        rows.append(row(server, tokens, cached=True))
    return rows


def row(server: Any, tokens: Sequence[int], *, cached: bool) -> array.array[float]:
    """The log-probabilities after `tokens`: [n_vocab]. cached: all but the last are in the cache.

    The server gives none for a sampled token that ends inside a UTF-8 character. What is sampled
    does not matter here, so it is forced to be another token until one does; the probabilities
    are taken before that.
    """
    for forced in [*dict.fromkeys(tokens), 13, 65, 100, 300]:
        request = {"n_predict": 1, "logprobs": 1 << 30, "temperature": 0}
        answer = _complete(server, tokens, cached, logit_bias=[[forced, 1e9]], **request)
        if answer["choices"][0]["logprobs"] is None:
            continue
        _check_evaluated(answer, 1 if cached else len(tokens))
        ranked = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        by_token = sorted((entry["id"], entry["logprob"]) for entry in ranked)
        return array.array("f", (logprob for _, logprob in by_token))
    refuse("no token was found whose probabilities the server gives")


def speeds(
    server: Any, n_prompt: int, n_gen: int, n_depth: int, repetitions: int, n_vocab: int
) -> list[float]:
    """Tokens per second of a prompt of random tokens, or of generation, after `n_depth` tokens."""
    tokens = random.Random(0)
    depth = [tokens.randrange(n_vocab) for _ in range(n_depth)]
    found = []
    for repetition in range(repetitions):
        if depth:  # each time: the state of a recurrent layer cannot be taken back
            _complete(server, depth, True, n_predict=0)
        prompt = [tokens.randrange(n_vocab) for _ in range(n_prompt or 1)]
        prompt[0] = repetition % n_vocab  # so that nothing of the prompt before it is found cached
        answer = _complete(server, depth + prompt, bool(depth), n_predict=n_gen + 1, **GREEDY)
        _check_evaluated(answer, len(prompt))
        if answer["timings"]["predicted_n"] != n_gen + 1:
            refuse(f"generation ended after {answer['timings']['predicted_n']} tokens")
        # The first token of an answer comes out of the prompt: it takes no time of its own.
        ms = answer["timings"]["predicted_ms" if n_gen else "prompt_ms"]
        found.append(1e3 * (n_gen or n_prompt) / ms)
    return found


def _complete(server: Any, tokens: Sequence[int], cached: bool, **settings: Any) -> Any:
    request = {"prompt": list(tokens), "cache_prompt": cached, **settings}
    answer = server.handle_completions(request)
    if "choices" not in answer:
        refuse(json.dumps(answer)[:500])
    return answer


def _check_evaluated(answer: Any, n_tokens: int) -> None:
    """Else it would be another test: the server starts over where its cache does not help."""
    evaluated = answer["timings"]["prompt_n"]
    if evaluated != n_tokens:
        refuse(f"{evaluated} tokens were evaluated, where {n_tokens} were expected")


def _device() -> dict[str, str]:
    """What computes, in llama-bench's words."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    devices = xllamacpp.get_device_info()
    kinds = {device["type"].name.rsplit("_", 1)[-1]: device["description"] for device in devices}
    names = [d["name"].rstrip("0123456789") for d in devices if not d["type"].name.endswith("_CPU")]
    gpu = kinds.get("GPU") or kinds.get("IGPU") or ""
    backends = ",".join(dict.fromkeys(names)) or "CPU"
    return {"backends": backends, "cpu_info": kinds.get("CPU", ""), "gpu_info": gpu}


def _answers(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """start: arguments of `parameters`; with tests, those and repetitions of `speeds`."""
    params = parameters(**request["start"])
    if "tests" not in request:
        params.n_ubatch = request["n_ubatch"]
        server = start(params)
        rows = log_probabilities(server, request["tokens"], request["continuation"])
        yield {"rows": [list(row) for row in rows], **_device()}
        return
    # Copies of old prompts would cost time, and a prompt would be cut where a copy is made.
    params.cache_ram_mib = params.n_ctx_checkpoints = 0
    server = start(params)
    for test in request["tests"]:
        samples = speeds(server, **test, **request["sampling"])
        yield {**test, "samples_ts": samples, **_device()}


def main() -> None:
    """Answers are lines of JSON. Whatever else is printed in this process goes to stderr."""
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for answer in _answers(request):
            print(json.dumps(answer), file=out, flush=True)
    sys.stderr.flush()
    os._exit(0)  # skip what runs at exit: a crash there is none of the file's


if __name__ == "__main__":
    main()
