"""ORIGINAL and FUSED: do they hold the same bytes (`structure`), and compute the same numbers?

May import all below but `writing`: what it verifies must not be found by the code that wrote it.
What is fused is found anew from ORIGINAL's tensors; the record in FUSED is checked, not believed.
"""
