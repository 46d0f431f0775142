"""How long things take: ways in turns, what their samples tell, the benchmark in numpy, its plot.

Imports what lies below: `models`, `attention` and `format`. Prints nothing. A *way* is one of the
functions that are compared; in a *round* each has its turn; a *row* is their times for one size.
"""
