"""What is to be written, decided before the first byte: Header -> Plan. Pure, no I/O of its own.

Here are the fusions and the loaders that read them, fuse and unfuse for models, LoRA adapters and
importance matrices, and the record that the way back needs. May import models and format. Words: a
*fusion* (QKV, GATE_UP) has *parts*; a tensor of a part has a *suffix* (weight, bias, scale,
input_scale); a *loader* reads fused tensors, or needs separate ones.
"""
