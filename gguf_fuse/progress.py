"""Who is told how far a long computation is; its steps are bytes, layers or rows."""

from collections.abc import Callable

OnStart = Callable[[str, int], None]  # what begins, and how many steps it has
OnProgress = Callable[[int], None]  # steps that were just done


def ignore(*told: object) -> None:
    """For who does not want to know."""
