"""Attention as llama.cpp computes it, in numpy: projections, norms, RoPE, masks, grouped-query
attention by broadcast, and split-KV decode. Knows nothing of the package: imports only numpy,
threadpoolctl, and its own modules, by relative names.

Axis legend. Every array line says its shape in these words:

    n_seqs      sequences in the batch, each with its own length and positions
    n_tokens    query tokens per sequence: the prompt in prefill, 1 in decode
    n_kv        cells of the KV cache; padding cells are masked
    n_head      query heads
    n_head_kv   K and V heads; n_head is a multiple of it
    group       n_head / n_head_kv query heads share one KV head: query head h reads h // group
    head_dim    width of one head of Q and K
    head_dim_v  width of one head of V, and of the output
    n_embd      width of the hidden state
    n_rot       rotated dimensions of a head, <= head_dim; n_pairs = n_rot / 2
    n_chunks    chunks of KV cells in split-KV decode
    n_tiles     tiles of a chunk: one BLAS call reads one tile, which stays in the cache
    tile        cells of a tile

Shapes are numpy order (GGUF's `ne` reversed): a weight is [rows, n_embd].

A float32 input is computed in float32, a float64 input in float64. Masks are additive and in
llama.cpp's form: 0 where a query sees a cell, -inf where it does not, and -distance instead of 0
under ALiBi. K and V must be finite in masked cells too: 0 * nan is nan.
"""
