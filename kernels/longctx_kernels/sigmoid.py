"""The logistic function of kernels that are otherwise limited by memory."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """To about 3e-7; `1 / y` as `rsqrt(y) ** 2` saves a division, which takes longer than all."""
    root = tl.rsqrt(1 + tl.exp2(x * -1.4426950408889634))
    return root * root
