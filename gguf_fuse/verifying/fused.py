"""What FUSED has fused that ORIGINAL has separate.

Found anew from ORIGINAL's tensors, not by the rules of `planning`: a mistake there must show here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from gguf_fuse.format.header import Header, TensorInfo
from gguf_fuse.format.types import is_known, type_name

# What can be fused: the fused name, the parts, and how many dimensions of a weight stand behind
# its rows: the experts'.
FORMS = (
    ("attn_qkv", ("attn_q", "attn_k", "attn_v"), 0),
    ("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps"), 1),
)
# Each one's rows are compared on their own.
MAX_EXPERTS = 1 << 12  # of one tensor
MAX_ALL_EXPERTS = 1 << 16  # of all layers


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
    def n_experts(self) -> int:
        """How many times the parts take turns; 1 where there are no experts."""
        return 1 if self.shared else math.prod(self.parts[0].ne[self._at + 1 :])

    def beside_rows(self, part: TensorInfo) -> tuple[int, ...]:
        """The dimensions in which all parts must be equal."""
        return part.ne if self.shared else (*part.ne[: self._at], *part.ne[self._at + 1 :])

    @property
    def _at(self) -> int:
        """The dimension of the rows; a bias has no row length before it."""
        return int(self.name.endswith(".weight"))


def find_fused(original: Header, fused: Header) -> tuple[list[FusedTensor], list[str]]:
    """The fused tensors, and why others of FUSED cannot be such."""
    before = {tensor.name: tensor for tensor in original.tensors}
    fusions, problems = [], []
    for tensor, (form, part_names, n_outer) in itertools.product(fused.tensors, FORMS):
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
    n_experts = sum(made.n_experts for made in fusions if made.n_outer)
    if n_experts > MAX_ALL_EXPERTS:
        return [], [f"{n_experts} experts in all layers; at most {MAX_ALL_EXPERTS} can be compared"]
    return fusions, problems


def _shape_problem(made: FusedTensor) -> str | None:
    """Why parts cannot be compared with their rows in the fused tensor."""
    first = made.parts[0]
    for part in made.parts:
        if problem := None if made.shared else _rows_problem(made, part):
            return f"{made.name}: is fused, but {problem}"
        if made.beside_rows(part) != made.beside_rows(first):
            dimensions = f"{list(part.ne)}, {first.name} {list(first.ne)}"
            return f"{made.name}: is fused, but {part.name} is {dimensions}"
    if made.n_experts > MAX_EXPERTS:
        return f"{made.name}: {made.n_experts} experts; at most {MAX_EXPERTS} can be compared"
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
