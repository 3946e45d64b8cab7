"""Sequence operators on plain tensors: PyTorch and Triton only, never the longctx package.

Layout is `[B, T, H, D]`; gates are natural logs; states are `[N, H, K, V]` in at least fp32, one
per piece, where pieces are the rows of the batch or, with `cu_seqlens` and B = 1, the ranges
between consecutive cuts.
"""
