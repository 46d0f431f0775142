"""Words that a caller chooses from: of the command line and of the functions alike."""

from typing import Literal

OnMismatch = Literal["skip", "error"]
Reflink = Literal["auto", "always", "never"]
WayName = Literal["raise", "lower"]  # of a recipe
