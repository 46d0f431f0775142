"""A model's metadata and tensors -> what the attention of one layer does, and its weights.

Imports only `attention` and `format`, and nothing that plans or writes. A *layer* is named as its
tensors are ("blk.3"); *keys* are its metadata; a *spec* is what its attention does; *rows* are
those of the weights of Q, K and V.
"""
