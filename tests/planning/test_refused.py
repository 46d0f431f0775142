"""Sound files that are refused, with one line that says why; nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from tests import pack
from tests.pack import STRING, UINT8, K, Pair, Q, V, bare, fused, lora, matrix, save, tensor, valid
from tests.server import Run, assert_one_line


@pytest.mark.parametrize("suffix", ["weight", "bias"])
def test_never_two_tensors_of_one_name_in_the_output(suffix: str, run: Run, tmp_path: Path) -> None:
    """An attn_qkv tensor is there already, beside attn_q, attn_k and attn_v of the same suffix."""
    file = valid()
    for name, n in (("q", 32), ("k", 16), ("v", 16), ("qkv", 64)):
        if name == "qkv" or suffix == "bias":
            ne = (n,) if suffix == "bias" else (32, n)
            file.tensors.append(tensor(f"blk.0.attn_{name}.{suffix}", ne))
    path, out = save(file, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    outcome = run("fuse", path, out)
    assert "Traceback" not in outcome.err
    assert outcome.code in (0, 1)
    if outcome.code == 0:  # the other layer was fused
        names = [found.name for found in GGUFReader(out).tensors]
        assert len(set(names)) == len(names)
        assert Q in names


def test_a_lone_fused_bias_is_not_brought_to_life(run: Run, tmp_path: Path) -> None:
    """Unread beside separate weights, it would be added once the weights are fused."""
    file = valid()
    file.tensors.append(tensor("blk.0.attn_qkv.bias", (64,)))
    path, out = save(file, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    outcome = run("fuse", path, out)
    assert outcome.code in (0, 1)
    if outcome.code == 0:
        assert Q in [found.name for found in GGUFReader(out).tensors]


def test_mismatch_is_an_error_when_asked_for(run: Run, tmp_path: Path) -> None:
    half = tensor(V, (32, 16), pack.F16)
    path = save(valid().tensor(V, type=pack.F16, data=half.data), tmp_path / "in.gguf")
    outcome = run("fuse", path, tmp_path / "out", "--on-mismatch", "error")
    assert_one_line(outcome, str(path), "blk.0", "F32, F32, F16")
    assert list(tmp_path.iterdir()) == [path]
    assert run("fuse", path, tmp_path / "out", "--on-mismatch", "skip").code == 0


def test_nothing_to_fuse(run: Run, tmp_path: Path) -> None:
    path = save(bare(Pair("general.architecture", STRING, "llama")), tmp_path / "in.gguf")
    assert_one_line(run("fuse", path, tmp_path / "out"), str(path), "nothing to fuse", code=3)
    assert_one_line(run("unfuse", path, tmp_path / "out"), str(path), "nothing to unfuse", code=3)
    assert list(tmp_path.iterdir()) == [path]


def test_no_room_for_the_record(run: Run, tmp_path: Path) -> None:
    """No file is written that could not be read again: that takes 16,384 pairs at most."""
    file, path, out = valid(), tmp_path / "in.gguf", tmp_path / "out"
    file.pairs += [Pair(f"k{i}", UINT8, 0) for i in range(16_368 - len(file.pairs))]
    save(file, path)
    assert run("fuse", path, out).code == 0
    assert run("inspect", out).code == 0
    save(file.key("one.more", UINT8, 0), path)
    outcome = run("fuse", path, tmp_path / "no")
    assert_one_line(outcome, f"{path}: 16369 metadata pairs leave no room", "16368 would")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("command", ["fuse", "unfuse"])
@pytest.mark.parametrize("general_type", ["adapter", "imatrix"])
def test_no_model(general_type: str, command: str, run: Run, tmp_path: Path) -> None:
    """A model that says it is something else."""
    path = save(valid().key("general.type", STRING, general_type), tmp_path / "in.gguf")
    outcome = run(command, path, tmp_path / "out", "--any-architecture")
    words, code = ("adapter.type", 1) if general_type == "adapter" else ("nothing to", 3)
    assert_one_line(outcome, str(path), words, code=code)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("general_type", ["adapter", "imatrix"])
def test_verify_compares_models_only(general_type: str, run: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "in.gguf", tmp_path / "out"
    save(lora() if general_type == "adapter" else matrix(Q, K, V), path)
    assert run("fuse", path, out).code == 0
    assert_one_line(run("verify", path, out), str(path), general_type, "unfuse")


@pytest.mark.parametrize("general_type", ["adapter", "imatrix"])
def test_experts_are_fused_in_models_only(general_type: str, run: Run, tmp_path: Path) -> None:
    path = save(lora() if general_type == "adapter" else matrix(Q, K, V), tmp_path / "in.gguf")
    outcome = run("fuse", path, tmp_path / "out", "--fuse-gate-up-exps")
    assert_one_line(
        outcome, f"{path}: of general.type '{general_type}' only Q, K and V can be fused"
    )
    assert list(tmp_path.iterdir()) == [path]


REFUSED = {
    "bitnet": "needs separate",  # NEEDS_SEPARATE
    "qwen4exp": "crashes",  # CRASHES
    "gpt2": "fused",  # ALREADY_FUSED
    "mamba": "no attention",  # NO_ATTENTION
    "frobnicate": "not known",  # UNKNOWN
    "LLaMA": "not known",
    "": "not known",
    "\x1b[2J": r"\x1b[2J",
    "clip": "projector",
}


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_is_refused(name: str, run: Run, tmp_path: Path) -> None:
    file = valid().key("general.architecture", STRING, name)
    path, out = save(file, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    outcome = run("fuse", path, out)
    assert_one_line(outcome, str(path), REFUSED[name], "--any-architecture")
    assert list(tmp_path.iterdir()) == [path]
    if name == "clip":  # its loader splits into equal parts: K and V of fewer rows cannot be fused
        for part, n in (("k", 32), ("v", 32)):
            for layer in range(2):
                whole = tensor(f"blk.{layer}.attn_{part}.weight", (32, n))
                file.tensor(str(whole.name), ne=whole.ne, data=whole.data)
        save(file, path)
    assert run("fuse", path, out, "--any-architecture").code == 0
    assert out.read_bytes() == fused(file).pack()


def test_architecture_is_missing(run: Run, tmp_path: Path) -> None:
    file = valid()
    del file.pairs[0]
    path, out = save(file, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    assert_one_line(run("fuse", path, out), str(path), "--any-architecture")
    assert run("fuse", path, out, "--any-architecture").code == 0
    assert out.read_bytes() == fused(file).pack()
