"""The tests' random models, for the scripts here.

tests/ is part of the clone and never installed: the clone's root must be on the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.models.architectures import LAYOUTS
from tests.models.random_model import (
    ModelSpec,
    data_bytes,
    spec_of_size,
    unmatched_patterns,
    write_random_model,
)

__all__ = [
    "LAYOUTS",
    "ModelSpec",
    "data_bytes",
    "spec_of_size",
    "unmatched_patterns",
    "write_random_model",
]
