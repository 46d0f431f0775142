"""What can be made one tensor: a table. Knows names and dimensions, nothing of files.

Rows of a weight are contiguous, so a joined slice is the first part's rows, then the next one's.
An expert tensor is one such slice for each expert: the join is inside each expert's matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
MAX_SLICES = 1 << 12
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
    def label(self) -> str:
        """What stands for it where layers are listed."""
        return self.fused

    @property
    def made(self) -> str:
        """What becomes of the parts."""
        return f"fused into {self.fused}"

    @property
    def unmade(self) -> str:
        """What the way back does; of experts one by one, the first and the last are named."""
        first, *others = self.parts
        few = len(others) < 3
        return f"split into {', '.join(self.parts) if few else f'{first} to {others[-1]}'}"

    @property
    def fused_names(self) -> tuple[str, ...]:
        """How names of fused tensors end."""
        return tuple(f".{self.fused}.{suffix}" for suffix in SUFFIXES)

    def layers(self, tensors: Sequence[TensorInfo]) -> list[str]:
        """Names of the layers that have a weight of a part, or the fused one, in order."""
        if self is QKV:
            return attention_layers(tensors)
        return layers_with_weights(tensors, (*self.parts, self.fused))

    @property
    def n_numbers(self) -> int:
        """How many numbers of rows the record has of a fused tensor."""
        return len(self.parts)

    @property
    def stems(self) -> tuple[str, ...]:
        """How names begin of what belongs to a part."""
        return tuple(f"{part}." for part in self.parts)

    def of(self, n_expert: int) -> tuple[Fusion, ...]:
        """What it is in a file with so many experts."""
        return (self,)

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

    def joined_ne(self, parts: Sequence[tuple[int, ...]], suffix: str) -> tuple[int, ...]:
        return self.part_ne(parts[0], sum(self.rows(ne, suffix) for ne in parts), suffix)

    def part_ne(self, ne: tuple[int, ...], n_rows: int, suffix: str) -> tuple[int, ...]:
        """Of a part with so many rows of the joined tensor."""
        return (*ne[: _axis(suffix)], n_rows, *ne[_axis(suffix) + 1 :])

    def can_split(self, ne: tuple[int, ...], suffix: str) -> bool:
        """Whether a joined tensor has these dimensions."""
        return self.fits(ne, suffix)

    def splits(self, ne: tuple[int, ...], rows: Sequence[int], suffix: str) -> bool:
        """Whether these are the rows of its parts."""
        return min(rows) > 0 and sum(rows) == self.rows(ne, suffix)

    def n_slices(self, ne: tuple[int, ...], suffix: str) -> int:
        """How many times the parts take turns: 1, or the number of experts."""
        return math.prod(ne[_axis(suffix) + 1 :])

    def too_many(self, ne: tuple[int, ...], suffix: str) -> str | None:
        """Why a tensor is neither joined nor split, if it has more slices than are supported."""
        n = self.n_slices(ne, suffix)
        return f"{n} experts; at most {MAX_SLICES} are supported" if n > MAX_SLICES else None


class Stack(Fusion):
    """Experts that are tensors of their own, laid one behind the other: one dimension more.

    Files of early 2024 have such; llama.cpp's loaders read stacked ones alone.
    """

    __slots__ = ()

    @property
    def made(self) -> str:
        return f"stacked into {self.fused}"

    @property
    def stems(self) -> tuple[str, ...]:
        """Of experts past the last one, too."""
        return (self.parts[0].rpartition(".")[0] + ".",)

    def layers(self, tensors: Sequence[TensorInfo]) -> list[str]:
        """As of all; but a layer whose experts are stacked was always so."""
        return layers_with_weights(tensors, self.parts)

    def of(self, n_expert: int) -> tuple[Fusion, ...]:
        parts = {name: tuple(f"ffn_{name}.{n}" for n in range(n_expert)) for name in EXPERT_PARTS}
        return tuple(
            replace(self, parts=own, fused=f"ffn_{name}_exps") for name, own in parts.items() if own
        )

    def fits(self, ne: tuple[int, ...], suffix: str) -> bool:
        return len(ne) == self.dims_of(suffix)

    def rows(self, ne: tuple[int, ...], suffix: str = "weight") -> int:
        """Of a part, or of all experts of the stack."""
        return math.prod(ne[_axis(suffix) :])

    def joined_ne(self, parts: Sequence[tuple[int, ...]], suffix: str) -> tuple[int, ...]:
        return (*parts[0], len(parts))

    def part_ne(self, ne: tuple[int, ...], n_rows: int, suffix: str) -> tuple[int, ...]:
        return (*ne[: _axis(suffix)], n_rows)

    def can_split(self, ne: tuple[int, ...], suffix: str) -> bool:
        return len(ne) == self.dims_of(suffix) + 1

    def splits(self, ne: tuple[int, ...], rows: Sequence[int], suffix: str) -> bool:
        return set(rows) == {ne[-2]} and len(rows) == ne[-1]

    def n_slices(self, ne: tuple[int, ...], suffix: str) -> int:
        return 1


class HeadByHead(Fusion):
    """One tensor with the rows of several projections, head by head, made one for each use.

    See `ssm_in`, which does it.
    """

    __slots__ = ()

    @property
    def label(self) -> str:
        return self.parts[0]

    @property
    def made(self) -> str:
        return f"split into {self.words}"

    @property
    def unmade(self) -> str:
        return f"joined into {self.label}"

    @property
    def n_numbers(self) -> int:
        """Of q, k, v and z."""
        return 4

    def layers(self, tensors: Sequence[TensorInfo]) -> list[str]:
        return layers_with_weights(tensors, self.parts)


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
FUSIONS = (QKV, GATE_UP)  # what converters make too, and can be undone without a record
EXPERT_PARTS = ("gate", "up", "down")
EXPERTS = Stack("experts", "--stack-experts", (), "ffn_*_exps", n_dims=2)
SSM_IN = HeadByHead("attn_qkv and attn_gate", "--split-ssm-in", ("ssm_in",), "attn_gate", n_dims=2)
ALL = (*FUSIONS, EXPERTS, SSM_IN)


def too_many_in_all(n_slices: Iterable[int]) -> str | None:
    """Why a file is neither fused nor unfused, if its tensors have so many slices."""
    n = sum(n for n in n_slices if n > 1)
    if n <= _MAX_ALL_SLICES:
        return None
    return f"{n} experts or heads in all layers; at most {_MAX_ALL_SLICES} are supported"


def fusion_of(name: str, stacks: Sequence[Fusion] = EXPERTS.of(1)) -> Fusion | None:
    """The fusion whose fused tensor a name is that of. stacks: those of the file."""
    known = (*FUSIONS, SSM_IN, *stacks)
    return next((fusion for fusion in known if name.endswith(fusion.fused_names)), None)
