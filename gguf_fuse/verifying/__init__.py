"""Two files, ORIGINAL and FUSED: the same bytes, the same numbers?

Imports what stands below it. *Structure* is the bytes of all layers; *numbers* are attention
computed from each file's own weights, of some layers.
"""
