"""What FUSED has fused that ORIGINAL has separate.

Found anew from ORIGINAL's tensors, not by the rules of `planning`: a mistake there must show here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from gguf_fuse.format.header import Header, TensorInfo

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
        at = len(first) - 1 - self.n_outer
        return first if self.shared else (*first[:at], sum(self.rows), *first[at + 1 :])

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple((1, 1, *part.ne)[-1 - self.n_outer] for part in self.parts)

    @property
    def n_experts(self) -> int:
        """How many times the parts take turns; 1 where there are no experts."""
        first = self.parts[0].ne
        return 1 if self.shared else math.prod(first[len(first) - self.n_outer :])


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
    """Why experts cannot be compared one by one."""
    n_dims = {len(part.ne) for part in made.parts}
    wanted = made.n_outer + 1 + made.name.endswith(".weight")  # a bias has no row length
    if not made.shared and made.n_outer and n_dims != {wanted}:
        return f"{made.name}: is fused, but the original's parts have no experts"
    if made.n_experts > MAX_EXPERTS:
        return f"{made.name}: {made.n_experts} experts; at most {MAX_EXPERTS} can be compared"
    return None
