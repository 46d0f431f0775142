"""What FUSED has fused that ORIGINAL has separate.

Found anew from ORIGINAL's tensors, not by the rules of `planning`: a mistake there must show here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.types import is_known, type_name
from gguf_fuse.models.keys import integer

# What can be fused: the fused name, the parts, and how many dimensions of a weight stand behind
# its rows: the experts'.
FORMS = (
    ("attn_qkv", ("attn_q", "attn_k", "attn_v"), 0),
    ("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps"), 1),
)
# Tensors for each expert, ffn_gate.0 and on, become one with a dimension more.
STACKS = {"ffn_gate_exps": "ffn_gate", "ffn_up_exps": "ffn_up", "ffn_down_exps": "ffn_down"}
# Each one's rows are compared on their own.
MAX_TURNS = 1 << 12  # of experts or heads, in one tensor
MAX_ALL_TURNS = 1 << 16  # in all layers


class Piece(NamedTuple):
    """Bytes of a part that follow each other in FUSED. label: for people, without the tensor."""

    part: TensorInfo
    label: str
    start: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """A tensor of FUSED, and those of ORIGINAL that it must hold. shared: one value for all.

    n_outer: dimensions behind that of the rows.
    """

    name: str
    parts: tuple[TensorInfo, ...]
    shared: bool
    n_outer: int

    @property
    def ne(self) -> tuple[int, ...]:
        first = self.parts[0].ne
        at = self._at
        return first if self.shared else (*first[:at], sum(self.rows), *first[at + 1 :])

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple((*part.ne, 1, 1)[self._at] for part in self.parts)

    @property
    def recorded(self) -> bool:
        """Whether the record has an entry for it."""
        return True

    @property
    def n_turns(self) -> int:
        """How many times the parts take turns: as many as there are experts, or 1."""
        return 1 if self.shared else math.prod(self.parts[0].ne[self._at + 1 :])

    def beside_rows(self, part: TensorInfo) -> tuple[int, ...]:
        """The dimensions in which all parts must be equal."""
        return part.ne if self.shared else (*part.ne[: self._at], *part.ne[self._at + 1 :])

    @property
    def _at(self) -> int:
        """The dimension of the rows; a bias has no row length before it."""
        return int(self.name.endswith(".weight"))

    def pieces(self) -> Iterator[Piece]:
        """What must follow each other in FUSED; of shared values, what must be there each time."""
        for expert, part in itertools.product(range(self.n_turns), self.parts):
            n_bytes = part.n_bytes // self.n_turns
            layer = self.name.rsplit(".", 2)[0]
            label = part.name.removeprefix(f"{layer}.").rpartition(".")[0]
            if self.n_outer and not self.shared:
                label += f" of expert {expert}"
            yield Piece(part, label, expert * n_bytes, n_bytes)


class Stacked(FusedTensor):
    """Experts, one behind the other."""

    @property
    def ne(self) -> tuple[int, ...]:
        return (*self.parts[0].ne, len(self.parts))

    def beside_rows(self, part: TensorInfo) -> tuple[int, ...]:
        return part.ne


@dataclass(frozen=True, slots=True)
class OfHeads(FusedTensor):
    """A tensor made of ssm_in, which has for each of n_heads its rows of q, k, v and z.

    widths: how many. wanted: which of the four, "qkv" or "z", all heads of one before the next.
    """

    n_heads: int
    widths: Mapping[str, int]
    wanted: str

    @property
    def ne(self) -> tuple[int, ...]:
        n_rows = self.n_heads * sum(self.widths[letter] for letter in self.wanted)
        return self.parts[0].ne[0], n_rows

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(self.widths.values())

    @property
    def n_turns(self) -> int:
        return self.n_heads

    @property
    def recorded(self) -> bool:
        return self.wanted == "z"  # one entry for both tensors

    def pieces(self) -> Iterator[Piece]:
        (ssm_in,) = self.parts
        row_bytes, per_head = ssm_in.n_bytes // ssm_in.ne[1], sum(self.rows)
        for letter, head in itertools.product(self.wanted, range(self.n_heads)):
            row = head * per_head + sum(self.rows[: "qkvz".index(letter)])
            n_bytes = self.widths[letter] * row_bytes
            yield Piece(ssm_in, f"{letter} of head {head}", row * row_bytes, n_bytes)


def find_fused(original: Header, fused: Header) -> tuple[list[FusedTensor], list[str]]:
    """The fused tensors, and why others of FUSED cannot be such."""
    before = {tensor.name: tensor for tensor in original.tensors}
    fusions, problems = _find_of_heads(original, fused.by_name)
    of_heads = {made.name for made in fusions}
    for stack in _find_stacked(before, fused):
        if problem := _shape_problem(stack):
            problems.append(problem)
        else:
            fusions.append(stack)
    for tensor, (form, part_names, n_outer) in itertools.product(fused.tensors, FORMS):
        if tensor.name in of_heads:
            continue
        layer, found, own_suffix = tensor.name.partition(f".{form}.")
        if not found or own_suffix != "weight" or tensor.name in before:
            continue
        for suffix in ("weight", "bias", "scale", "input_scale"):
            names = [f"{layer}.{part}.{suffix}" for part in part_names]
            parts = tuple(before[name] for name in names if name in before)
            if len(parts) == len(names):
                shared = suffix.endswith("scale")
                made = FusedTensor(f"{layer}.{form}.{suffix}", parts, shared, n_outer)
                if made.name in before:
                    problems.append(f"{made.name}: is fused, but the original has its own")
                elif problem := _shape_problem(made):
                    problems.append(problem)
                else:
                    fusions.append(made)
            elif parts or suffix == "weight":
                missing = ", ".join(name for name in names if name not in before)
                problems.append(f"{layer}: is fused, but the original has no {missing}")
    n = sum(made.n_turns for made in fusions if made.n_turns > 1)
    if n > MAX_ALL_TURNS:
        return [], [f"{n} experts or heads in all layers; at most {MAX_ALL_TURNS} can be compared"]
    return fusions, problems


def _find_stacked(before: Mapping[str, TensorInfo], fused: Header) -> Iterator[Stacked]:
    for name in fused.by_name:
        layer, _, own = name.removesuffix(".weight").rpartition(".")
        if name in before or own not in STACKS:
            continue
        names = (f"{layer}.{STACKS[own]}.{expert}.weight" for expert in itertools.count())
        parts = tuple(before[part] for part in itertools.takewhile(before.__contains__, names))
        if parts:
            yield Stacked(name, parts, shared=False, n_outer=0)


def _find_of_heads(
    original: Header, after: Mapping[str, TensorInfo]
) -> tuple[list[FusedTensor], list[str]]:
    """Of each ssm_in that FUSED does not have any more: the two tensors that it must have."""
    made, problems = list[FusedTensor](), list[str]()
    for tensor in original.tensors:
        layer, _, own = tensor.name.rpartition(".ssm_in.")
        names = {f"{layer}.attn_qkv.weight": "qkv", f"{layer}.attn_gate.weight": "z"}
        if own != "weight" or tensor.name in after or after.keys().isdisjoint(names):
            continue
        n_heads, head = (
            integer(original, f"{original.architecture}.ssm.{key}", 0) or 0
            for key in ("group_count", "state_size")
        )
        # What q and k leave is half v, half z.
        left = (*tensor.ne, 1)[1] - 2 * n_heads * head
        if not 0 < n_heads <= MAX_TURNS or left <= 0 or left % (2 * n_heads):
            problems.append(f"{tensor.name}: {n_heads} heads of {head} do not fit {tensor.ne}")
            continue
        v = left // (2 * n_heads)
        widths = {"q": head, "k": head, "v": v, "z": v}
        found = [
            OfHeads(name, (tensor,), False, 0, n_heads, widths, wanted)
            for name, wanted in names.items()
        ]
        if problem := _rows_problem(found[0], tensor):
            problems.append(f"{tensor.name}: is split, but {problem}")
        else:
            made += found
    return made, problems


def _shape_problem(made: FusedTensor) -> str | None:
    """Why parts cannot be compared with their rows in the fused tensor."""
    first = made.parts[0]
    for part in made.parts:
        if problem := None if made.shared else _rows_problem(made, part):
            return f"{made.name}: is fused, but {problem}"
        if made.beside_rows(part) != made.beside_rows(first):
            dimensions = f"{list(part.ne)}, {first.name} {list(first.ne)}"
            return f"{made.name}: is fused, but {part.name} is {dimensions}"
    if made.n_turns > MAX_TURNS:
        return f"{made.name}: {made.n_turns} experts; at most {MAX_TURNS} can be compared"
    return None


def _rows_problem(made: FusedTensor, part: TensorInfo) -> str | None:
    # Without a row length before the rows of a bias. Trailing ones are no dimensions in ggml.
    wanted = made.n_outer + 1 + made.name.endswith(".weight")
    if made.n_outer and len(part.ne) < wanted:
        return "the original's parts have no experts"
    if len(part.ne) < wanted or 0 in part.ne or math.prod(part.ne[wanted:]) != 1:
        return f"{part.name} is {list(part.ne)}, which has no rows to compare"
    if not is_known(part.type):
        return f"the rows of {type_name(part.type)} are not known"
    return None
