"""Which layers are computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from gguf_fuse.format.parser import read_header
from gguf_fuse.verifying.layers import choose_layers, parse_layers
from gguf_fuse.verifying.report import Choice
from tests.conftest import fused_copy

Model = Callable[..., Path]


@pytest.mark.parametrize("text", ["", "x", "0x", "1-", "3-1", "0,,1", "-1", "1 2", "half"])
def test_wrong_layers_are_wrong_usage(text: str) -> None:
    with pytest.raises(ValueError, match="write layers as"):
        parse_layers(text)


def test_layers_are_chosen(model: Model) -> None:
    header = read_header(model(n_layer=12))

    def chosen(text: str) -> list[int]:
        return [int(name[4:]) for name in choose_layers(header, parse_layers(text))]

    assert chosen("0,5-7") == [0, 5, 6, 7]
    assert chosen("all") == chosen("auto") == list(range(12))
    assert chosen("4x") == [0, 4, 7, 11]
    assert chosen("1x") == [0]
    assert chosen("99x") == list(range(12))


def test_a_large_model_is_sampled(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_fuse.verifying.layers.SMALL_MODEL", 1000)
    assert len(choose_layers(read_header(model(n_layer=12)), Choice())) == 4


@pytest.mark.parametrize(("n_layer", "n_chosen"), [(5, 5), (6, 4)])
def test_large_begins_at_16_million(model: Model, n_layer: int, n_chosen: int) -> None:
    """Each layer's Q, K and V have 3 Mi elements: 5 layers are below 2^24, 6 are above."""
    sizes = {"n_embd": 1024, "n_head": 16, "n_head_kv": 16, "n_ff": 32, "types": {"*": T.Q4_0}}
    path = model(n_layer=n_layer, **sizes)
    for same in (path, fused_copy(path)):
        assert len(choose_layers(read_header(same), Choice())) == n_chosen
