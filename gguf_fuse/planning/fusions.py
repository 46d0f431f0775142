"""What can be made one tensor: a table. Knows names and dimensions, nothing of files.

Rows of a weight are contiguous, so a joined slice is the first part's rows, then the next one's.
An expert tensor is one such slice for each expert: the join is inside each expert's matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf_fuse.models.names import (
    ATTENTION_PARTS,
    FUSED_ATTENTION,
    attention_layers,
    layers_with_weights,
)

if TYPE_CHECKING:
    from gguf_fuse.format.header import TensorInfo

JOINED = ("weight", "bias")  # suffixes of tensors that are laid end to end
SHARED = ("scale", "input_scale")  # the same values, so the fused tensor has them once
SUFFIXES = (*JOINED, *SHARED)

# They bound what a damaged file can cost. llama.cpp has 512 experts at most, and no file has more
# than some 25,000 in all its layers.
_MAX_SLICES = 1 << 12
_MAX_ALL_SLICES = 1 << 16


@dataclass(frozen=True, slots=True)
class Fusion:
    """Tensors of one layer that can be one.

    words: the parts as messages name them. flag: of the command line. n_dims: of a weight, trailing
    ones not counted (ggml takes dimensions that are missing for ones); a bias has one less.
    """

    words: str
    flag: str
    parts: tuple[str, ...]
    fused: str
    n_dims: int

    @property
    def fused_names(self) -> tuple[str, ...]:
        """How names of fused tensors end."""
        return tuple(f".{self.fused}.{suffix}" for suffix in SUFFIXES)

    def layers(self, tensors: Sequence[TensorInfo]) -> list[str]:
        """Names of the layers that have a weight of a part, or the fused one, in order."""
        if self is QKV:
            return attention_layers(tensors)
        return layers_with_weights(tensors, (*self.parts, self.fused))

    def dims_of(self, suffix: str) -> int:
        """Dimensions that a weight or a bias must have."""
        return self.n_dims if suffix == "weight" else self.n_dims - 1

    def fits(self, ne: tuple[int, ...], suffix: str) -> bool:
        """Whether a weight or a bias has these dimensions; ones may follow."""
        n_dims = self.dims_of(suffix)
        return len(ne) >= n_dims and all(n == 1 for n in ne[n_dims:])

    def rows(self, ne: tuple[int, ...], suffix: str = "weight") -> int:
        """Rows of one slice; 1 where there is no such dimension."""
        return (*ne, 1, 1)[_axis(suffix)]

    def with_rows(self, ne: tuple[int, ...], n_rows: int, suffix: str) -> tuple[int, ...]:
        return (*ne[: _axis(suffix)], n_rows, *ne[_axis(suffix) + 1 :])

    def n_slices(self, ne: tuple[int, ...], suffix: str) -> int:
        """How many times the parts take turns: 1, or the number of experts."""
        return math.prod(ne[_axis(suffix) + 1 :])

    def too_many(self, ne: tuple[int, ...], suffix: str) -> str | None:
        """Why a tensor is neither joined nor split, if it has more slices than are supported."""
        n = self.n_slices(ne, suffix)
        return f"{n} experts; at most {_MAX_SLICES} are supported" if n > _MAX_SLICES else None


def _axis(suffix: str) -> int:
    """The dimension that counts the rows."""
    return 1 if suffix == "weight" else 0


QKV = Fusion("Q, K and V", "--fuse-qkv-weights", ATTENTION_PARTS, FUSED_ATTENTION, n_dims=2)
GATE_UP = Fusion(
    "gate and up of experts",
    "--fuse-gate-up-exps",
    ("ffn_gate_exps", "ffn_up_exps"),
    "ffn_gate_up_exps",
    n_dims=3,
)
FUSIONS = (QKV, GATE_UP)


def too_many_in_all(n_slices: Iterable[int]) -> str | None:
    """Why a file is neither fused nor unfused, if its tensors have so many slices."""
    n = sum(n for n in n_slices if n > 1)
    if n <= _MAX_ALL_SLICES:
        return None
    return f"{n} experts in all layers; at most {_MAX_ALL_SLICES} are supported"


def fusion_of(name: str) -> Fusion | None:
    """The fusion whose fused tensor a name is that of."""
    return next((fusion for fusion in FUSIONS if name.endswith(fusion.fused_names)), None)
