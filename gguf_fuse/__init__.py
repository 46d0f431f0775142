"""gguf-fuse: one attn_qkv tensor in place of separate Q, K and V, in GGUF files that exist."""

__version__ = "0.1.0"
