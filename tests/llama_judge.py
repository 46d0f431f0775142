"""llama.cpp as the judge: what it makes of a GGUF file, through the wheel `xllamacpp`.

Every load runs in a process of its own, so that a crash in llama.cpp is a result and not the end
of the test run. It is forked from one that has imported xllamacpp already, and not numpy: importing
takes longer than all the rest.
"""

from __future__ import annotations

import array
import atexit
import base64
import ctypes
import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from gguf_fuse.llama import worker
from gguf_fuse.llama.process import LoadFailed, available, first_complaint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LoadFailed", "available"]  # for all who ask the judge

CacheType = Literal["f16", "f32", "bf16", "q8_0"]
FlashAttention = Literal["auto", "on", "off"]


def log_probabilities(
    path: Path | str,
    tokens: Sequence[int],
    *,
    n_predict: int = 4,
    continuation: Sequence[int] | None = None,
    prefixes: Sequence[int] = (),
    n_threads: int = 1,
    cache_type: CacheType = "f16",
    flash_attention: FlashAttention = "auto",
    lora: Path | str | None = None,
    n_ctx: int = 512,
    timeout: float = 60.0,
) -> NDArray[np.float32]:
    """Log-probabilities of the next token over the whole vocabulary: [n_rows, n_vocab].

    Rows, in order: one for each length in `prefixes` (that many of `tokens`, as a prompt of its
    own), one for the whole prompt (prefill in one batch), then one for each decoded token
    (really decoded: a batch of one on the cache of the rest). Those are `continuation` if given,
    else `n_predict` greedy ones. Values are llama.cpp's float32, before any sampling rule.

    `tokens` are ids and get no BOS. `cache_type` is that of K and V; with flash attention llama.cpp
    rounds an F32 cache to F16 before each use, so only flash_attention="off" makes "f32" exact.
    `lora` is an adapter file. A row of 128k tokens takes over a second.

    Raises LoadFailed where llama.cpp refuses the file, crashes, or takes over `timeout` seconds.
    """
    request = {
        "task": "log_probabilities",
        "path": str(path),
        "tokens": list(tokens),
        "n_predict": n_predict,
        "continuation": None if continuation is None else list(continuation),
        "prefixes": list(prefixes),
        "n_threads": n_threads,
        "cache_type": cache_type,
        "flash_attention": flash_attention,
        "lora": None if lora is None else str(lora),
        "n_ctx": n_ctx,
    }
    n_rows = len(prefixes) + 1 + (n_predict if continuation is None else len(continuation))
    return _ask(request, timeout).reshape(n_rows, -1)


def image_log_probabilities(
    path: Path | str, mmproj: Path | str, image: bytes, *, timeout: float = 60.0
) -> NDArray[np.float32]:
    """Log-probabilities of the token that follows an image: [n_vocab], from a vocabulary of words.

    `mmproj` is a vision encoder for the model at `path`, `image` a PNG or JPEG file.

    Raises LoadFailed where llama.cpp refuses a file, crashes, or takes over `timeout` seconds.
    """
    request = {
        "task": "image_log_probabilities",
        "path": str(path),
        "mmproj": str(mmproj),
        "image": base64.b64encode(image).decode(),
        "n_threads": 1,
        "cache_type": "f16",
        "flash_attention": "auto",
        "lora": None,
        "n_ctx": 512,
    }
    return _ask(request, timeout)


def embeddings(
    path: Path | str,
    tokens: Sequence[int],
    *,
    n_threads: int = 1,
    flash_attention: FlashAttention = "auto",
    n_ctx: int = 512,
    timeout: float = 60.0,
) -> NDArray[np.float32]:
    """What an encoder makes of each token, as its last layer gives it: [n_tokens, n_embd].

    Neither pooled nor normalised. `tokens` are ids and get no BOS; llama.cpp takes at most 512 of
    them in one batch. With flash attention it rounds K and V to F16.

    Raises LoadFailed where llama.cpp refuses the file, crashes, or takes over `timeout` seconds.
    """
    request = {
        "task": "embeddings",
        "path": str(path),
        "tokens": list(tokens),
        "n_threads": n_threads,
        "cache_type": "f16",
        "flash_attention": flash_attention,
        "lora": None,
        "n_ctx": n_ctx,
    }
    return _ask(request, timeout).reshape(len(tokens), -1)


def drafts(
    path: Path | str, tokens: Sequence[int], *, n_predict: int = 16, timeout: float = 60.0
) -> list[str]:
    """What the layers for further tokens (MTP) propose while `n_predict` tokens are decoded.

    In order, three for each of three places: the token and its probability, as llama.cpp's log has
    them ("129 ( 0.173)").

    Raises LoadFailed where llama.cpp refuses the file or MTP, crashes, or takes over `timeout`.
    """
    request = {
        "task": "drafts",
        "path": str(path),
        "tokens": list(tokens),
        "n_predict": n_predict,
        "n_threads": 1,
        "cache_type": "f16",
        "flash_attention": "auto",
        "lora": None,
        "n_ctx": 512,
    }
    log = _run(request, timeout)
    return re.findall(r"draft candidate +\d+, pos +\d+: +(\d+ \([ \d.]+\))", log)


def rewrite_with_llama_cpp(src: Path | str, dst: Path | str, *, timeout: float = 60.0) -> None:
    """Read a GGUF file with its data and write it again, both with llama.cpp's own code.

    Raises LoadFailed where it cannot.
    """
    _run({"task": "rewrite", "src": str(src), "dst": str(dst)}, timeout)


def _ask(request: dict[str, Any], timeout: float) -> NDArray[np.float32]:
    """The numbers that `request` is answered with, all in one row; raises what `_run` does."""
    import numpy as np

    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "numbers.f32"
        _run({**request, "answer": str(answer)}, timeout)
        return np.fromfile(answer, np.float32)


def ggml_type(type_id: int) -> tuple[str, int, int]:
    """What llama.cpp has of a type that it knows: name, elements of a block, bytes of a block."""
    ggml = _ggml()
    name = ggml.ggml_type_name(type_id).decode()
    return name, ggml.ggml_blck_size(type_id), ggml.ggml_type_size(type_id)


# Processes that wait for a request. As many as there ever were threads that asked at once.
_idle: list[subprocess.Popen[str]] = []


def _run(request: dict[str, Any], timeout: float) -> str:
    """Run `request` in a process of its own -> what llama.cpp said meanwhile.

    Raises LoadFailed where llama.cpp fails, RuntimeError where this module does.
    """
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "stderr"
        status = _forked({**request, "log": str(log), "timeout": timeout})
        complaints = log.read_text(errors="replace")
    reason = first_complaint(complaints)
    if status == -signal.SIGALRM:
        raise LoadFailed(reason, "timeout")
    if status < 0:
        raise LoadFailed(reason, signal.Signals(-status).name)
    if status == worker.REFUSED:
        raise LoadFailed(reason)
    if status:
        raise RuntimeError(f"the judge itself failed:\n{complaints}")
    return complaints


def _forked(request: dict[str, Any]) -> int:
    """How the process ended that took the request: its exit status, or minus a signal's number."""
    try:
        judge = _idle.pop()
    except IndexError:
        judge = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )
    assert judge.stdin and judge.stdout
    print(json.dumps(request), file=judge.stdin, flush=True)
    status = int(judge.stdout.readline())
    _idle.append(judge)
    return status


@atexit.register
def _dismiss() -> None:
    for judge in _idle:
        judge.communicate()


# --- in the process of its own -----------------------------------------------------------------


def _main() -> None:
    """Fork for each request, a line of standard input, and answer with how that ended."""
    import xllamacpp  # type: ignore[import-untyped,import-not-found,unused-ignore] # noqa: F401

    for line in sys.stdin:
        if (child := os.fork()) == 0:
            _serve(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _serve(request: dict[str, Any]) -> NoReturn:
    status = 1
    try:
        os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, request["timeout"])
        _answer(request)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
        _flush_log()
    except BaseException:
        traceback.print_exc()
    # Skip what runs at exit: a crash there is none of the file's.
    sys.stderr.flush()
    os._exit(status)


def _answer(request: dict[str, Any]) -> None:
    if request["task"] == "rewrite":
        _rewrite(request["src"], request["dst"])
        return
    if request["task"] == "drafts":
        wanted = {"prompt": request["tokens"], "n_predict": request["n_predict"]}
        _server(request).handle_completions({**wanted, "temperature": 0, "ignore_eos": True})
        _flush_log()
        return
    if request["task"] == "image_log_probabilities":
        rows = [_image_row(_server(request), request["image"])]
    elif request["task"] == "embeddings":
        rows = _embeddings(_server(request), request["tokens"])
    else:
        rows = _rows(_server(request), request)
    Path(request["answer"]).write_bytes(b"".join(row.tobytes() for row in rows))


def _server(request: dict[str, Any]) -> Any:
    import xllamacpp

    params = worker.parameters(request["path"], request["n_ctx"], request["n_threads"], 0)
    params.warmup = False
    params.check_tensors = True
    cache_type = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{request['cache_type'].upper()}")
    params.cache_type_k = cache_type
    params.cache_type_v = cache_type
    params.flash_attn_type = xllamacpp.llama_flash_attn_type(
        {"auto": -1, "off": 0, "on": 1}[request["flash_attention"]]
    )
    if request["task"] == "drafts":
        params.verbosity = 10  # where the proposals are
        kinds = xllamacpp.common_speculative_type
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        params.speculative.draft.n_max = 3
        params.speculative.draft.p_min = 0.0
    if request["task"] == "embeddings":
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    if "mmproj" in request:
        params.mmproj.path = request["mmproj"]
        params.mmproj_use_gpu = False
    if request["lora"] is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path = request["lora"]
        adapter.scale = 1.0
        params.lora_adapters = [adapter]
    return worker.start(params)


def _flush_log() -> None:
    """What llama.cpp says on stderr is written by a thread of its own."""
    ggml = _ggml()
    getattr(ggml, _FLUSH_LOG)(getattr(ggml, _LOG)())


def _rows(server: Any, request: dict[str, Any]) -> list[array.array[float]]:
    tokens, given = request["tokens"], request["continuation"]
    rows = [worker.row(server, tokens[:n], cached=False) for n in request["prefixes"]]
    steps = [None] * request["n_predict"] if given is None else given
    return rows + worker.log_probabilities(server, tokens, steps)


def _image_row(server: Any, image: str) -> array.array[float]:
    """The log-probabilities after an image, given in base 64: [n_vocab]."""
    url = f"data:image/png;base64,{image}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    answer = server.handle_chat_completions(
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 1 << 30,
            "temperature": 0,
            "logit_bias": [[65, 1e9]],
        }
    )
    if "choices" not in answer:
        worker.refuse(json.dumps(answer)[:500])
    ranked = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    by_token = sorted((entry["id"], entry["logprob"]) for entry in ranked)
    return array.array("f", (logprob for _, logprob in by_token))


def _embeddings(server: Any, tokens: list[int]) -> list[array.array[float]]:
    """One row of [n_embd] for each token.

    `handle_embeddings` follows OpenAI's interface, which knows pooled ones only; the server's own
    is reached over HTTP alone.
    """
    address = urllib.parse.urlsplit(server.listening_address)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port)
    body = json.dumps({"content": tokens})
    connection.request("POST", "/embeddings", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    if response.status != http.client.OK:
        worker.refuse(answer.decode("utf-8", "replace")[:500])
    (result,) = json.loads(answer)
    if len(result["embedding"]) != len(tokens):
        worker.refuse(f"{len(result['embedding'])} of {len(tokens)} tokens were evaluated")
    return [array.array("f", row) for row in result["embedding"]]


class _InitParams(ctypes.Structure):
    """llama.cpp's `struct gguf_init_params`."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


# Result and arguments of llama.cpp's functions: "p" pointer, "s" C string, "n" int64, "b" bool.
_LOG, _FLUSH_LOG = "_Z15common_log_mainv", "_Z16common_log_flushP10common_log"  # C++ names
_SIGNATURES = {
    "gguf_init_from_file": "ps*",
    "gguf_init_empty": "p",
    "gguf_set_kv": "-pp",
    "gguf_get_n_tensors": "np",
    "gguf_get_tensor_name": "spn",
    "gguf_add_tensor": "-pp",
    "gguf_write_to_file": "bpsb",
    "ggml_get_tensor": "pps",
    "ggml_type_name": "si",
    "ggml_blck_size": "ni",
    "ggml_type_size": "ni",
    _LOG: "p",
    _FLUSH_LOG: "-p",
}
_C_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "s": ctypes.c_char_p,
    "n": ctypes.c_int64,
    "i": ctypes.c_int,
    "b": ctypes.c_bool,
    "*": _InitParams,
    "-": None,
}


def _ggml() -> ctypes.CDLL:
    """The library inside the wheel, with the signatures of what is called here."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    (library,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    ggml = ctypes.CDLL(str(library))
    for name, signature in _SIGNATURES.items():
        function = getattr(ggml, name)
        function.restype, *function.argtypes = (_C_TYPES[letter] for letter in signature)
    return ggml


def _rewrite(src: str, dst: str) -> None:
    ggml = _ggml()
    data = ctypes.c_void_p()
    file = ggml.gguf_init_from_file(src.encode(), _InitParams(False, ctypes.pointer(data)))
    if not file:
        worker.refuse(f"llama.cpp cannot read {src}")
    # What the reader gives cannot be written as it is: its tensors point nowhere. A new context
    # takes the alignment only from a file, so the metadata goes through one without tensors.
    empty = ggml.gguf_init_empty()
    ggml.gguf_set_kv(empty, file)
    if not ggml.gguf_write_to_file(empty, dst.encode(), False):
        worker.refuse(f"llama.cpp cannot write {dst}")
    copy = ggml.gguf_init_from_file(dst.encode(), _InitParams(True, None))
    for index in range(ggml.gguf_get_n_tensors(file)):
        name = ggml.gguf_get_tensor_name(file, index)
        ggml.gguf_add_tensor(copy, ggml.ggml_get_tensor(data, name))
    if not ggml.gguf_write_to_file(copy, dst.encode(), False):
        worker.refuse(f"llama.cpp cannot write {dst}")


if __name__ == "__main__":
    _main()
