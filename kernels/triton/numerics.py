"""Arithmetic that is accurate at the ends of the range of fp32."""

import triton
import triton.language as tl


@triton.jit
def finite_shift(m):
    """The maximum to subtract from exponents; 0 if it is infinite, so that inf - inf does not occur."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1] to 2 ulp however small e is: e times a polynomial fitted at Chebyshev points."""
    y = e * 0.005253457929939032 - 0.02958850748836994
    y = y * e + 0.07836166769266129
    y = y * e - 0.13674770295619965
    y = y * e + 0.19111430644989014
    y = y * e - 0.24844369292259216
    y = y * e + 0.33319270610809326
    y = y * e - 0.49999502301216125
    return e * (y * e + 1.0)
