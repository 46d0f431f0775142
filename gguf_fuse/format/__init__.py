"""GGUF itself: what is read (`source`), its header and metadata, ggml's types, shards.

Knows nothing of fusion, and imports nothing above it. Words: a *segment* is a range of bytes of a
source; *ne* are a tensor's dimensions in file order, the row length first; *type* is a ggml type,
*value type* that of a metadata value.
"""
