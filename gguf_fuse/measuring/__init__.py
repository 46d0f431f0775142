"""How long things take: ways to do the same in turns, the benchmark in numpy, and its plot.

Imports what lies below: `models`, `attention` and `format`. Prints nothing. A *way* is one of the
functions that are compared; a *row* is their times for one size.
"""
