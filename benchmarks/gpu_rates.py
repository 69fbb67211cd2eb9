"""Kernels that do nothing but exponentials, or multiply-adds: what a GPU can do of each."""

import triton
import triton.language as tl


@triton.jit
def exponentials_kernel(out, rounds):
    """Take 16 exponentials of each of 1,024 numbers, in each round."""
    i = tl.arange(0, 1024)
    values = i * 1e-3
    for _ in range(rounds):
        for _ in tl.static_range(16):
            values = tl.exp2(-values)
    tl.store(out + i, values)


@triton.jit
def multiply_adds_kernel(out, rounds):
    """Do 16 multiply-adds with each of 1,024 numbers, in each round."""
    i = tl.arange(0, 1024)
    values = i * 1e-3
    factor = values * 1e-3
    for _ in range(rounds):
        for _ in tl.static_range(16):
            values = values * factor + 1.0
    tl.store(out + i, values)
