"""Small files of twenty kinds, as a publisher's folder holds them, and what becomes of each."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from gguf_fuse.api import fuse
from tests import pack
from tests.conftest import FAST
from tests.pack import F16, F32, Q4_0, Q8_0, STRING, Content, File
from tests.shards import cut

# Those that are written, and what is said of the others.
FUSED, NOTHING, REFUSED, FAILED = "fused", "nothing to fuse", "refused", "failed"


def _mixed() -> File:
    file = pack.valid()
    v = file.tensors[3]
    file.tensors[3] = replace(pack.tensor(str(v.name), v.ne, F16))
    return file


def _kinds() -> list[tuple[Content, str]]:
    whole = pack.valid().pack()
    return [
        (pack.valid(F32), FUSED),
        (pack.valid(F16), FUSED),
        (pack.valid(Q4_0), FUSED),
        (pack.valid(Q8_0, n_layers=4), FUSED),
        (pack.valid(n_layers=9), FUSED),
        (pack.valid(n_embd=64), FUSED),
        (_mixed(), FUSED),  # of two layers one
        (replace(pack.valid(), order=">"), FUSED),
        (pack.unrecorded(), NOTHING),
        (pack.fused(pack.valid()), NOTHING),
        (pack.lora(), FUSED),
        (pack.matrix("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"), FUSED),
        (pack.matrix("blk.0.attn_output.weight"), NOTHING),
        (pack.valid().key("general.architecture", STRING, "bitnet"), REFUSED),
        (pack.valid().key("general.architecture", STRING, "of-next-year"), REFUSED),
        (b"", FAILED),
        (b"version https://git-lfs.github.com/spec/v1\n", FAILED),
        (whole[: len(whole) // 2], FAILED),
        (b"PK\x03\x04" + bytes(100), FAILED),
        (whole[:24] + bytes(200), FAILED),
    ]


def write_all(folder: Path, n: int) -> dict[str, str]:
    """n files in the folder, in no order of kinds -> what becomes of each, by its stem."""
    kinds = _kinds()
    wanted = {}
    order = [i % len(kinds) for i in range(n)]
    random.Random(1).shuffle(order)
    for number, kind in enumerate(order):
        content, result = kinds[kind]
        below = folder / f"kind-{kind:02d}"
        below.mkdir(parents=True, exist_ok=True)
        path = pack.save(content, below / f"model-{number:03d}.gguf")
        wanted[path.stem] = result
    first, *_ = cut(pack.save(pack.valid(n_layers=4), folder / "whole.gguf"), "set", [5, 13])
    (folder / "whole.gguf").unlink()
    wanted[first.stem] = FUSED
    return wanted


def fused_alone(folder: Path, output: Path) -> dict[str, bytes]:
    """By the name of the output: what single runs of fuse make of the files of a folder."""
    made = {}
    output.mkdir()
    for path in folder.rglob("*.gguf"):
        name = path.name.replace("set-", "set-fused-") if "-of-" in path.name else ""
        target = output / (name or f"{path.stem}-fused.gguf")
        if "00002-of" in path.name:
            continue
        try:
            result = fuse(path, target, options=FAST)
        except Exception:
            continue
        made |= {file.name: file.read_bytes() for file in result.files}
    return made
