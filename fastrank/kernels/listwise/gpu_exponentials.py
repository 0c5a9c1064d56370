"""Exponentials that keep their digits, for the sweeps over pairs: float32, without libdevice.

A temperature arrives as rate_hi + rate_lo = 1 / temperature, two float32 numbers, so that no factor of a score is
rounded to float32. The hardware's exp2 rounds its argument, which costs a far pair its digits; the rest of the argument
is kept and given back to first order.
"""

import triton
from triton import language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def join_rate(rate_hi, rate_lo):
    """1 / temperature in float64."""
    return tl.cast(rate_hi, tl.float64) + tl.cast(rate_lo, tl.float64)


@triton.jit
def split_power(rate_hi, rate_lo):
    """log2(e) / temperature as two float32 numbers."""
    power = join_rate(rate_hi, rate_lo) * LOG2_E
    power_hi = power.to(tl.float32)
    return power_hi, (power - power_hi.to(tl.float64)).to(tl.float32)


@triton.jit
def exp_of_minus(distance, power_hi, power_lo):
    """exp(-distance / temperature) for distance >= 0."""
    exponent = distance * power_hi
    rest = tl.fma(distance, power_lo, tl.fma(distance, power_hi, -exponent))
    power = tl.exp2(-exponent)
    return tl.fma(power, rest * -LN_2, power)


@triton.jit
def reciprocal(x):
    """1 / x for x in [1, 2]: one special function and one Newton step, where a division takes six instructions."""
    root = tl.rsqrt(x)
    guess = root * root
    return tl.fma(guess, tl.fma(-x, guess, 1.0), guess)


@triton.jit
def log1p_of_exponential(x):
    """log(1 + x) for x in [0, 1], by a minimax polynomial of log(1 + x) / x: relative error 1e-7 down to 0."""
    y = x * -0.0032440119 + 0.0198513996
    y = y * x - 0.056959413
    y = y * x + 0.106036417
    y = y * x - 0.153055847
    y = y * x + 0.196759358
    y = y * x - 0.249541327
    y = y * x + 0.333299637
    y = y * x - 0.499999017
    y = y * x + 1.0
    return x * y


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, float32."""
    return tl.where(x < 1.0, log1p_of_exponential(x), tl.log(1.0 + x))


@triton.jit
def log1p_in_float64(x):
    return tl.where(x < 1e-5, x * (1.0 - 0.5 * x), tl.log(1.0 + x))


@triton.jit
def weigh_pair(apart, prefers, power_hi, power_lo):
    """exp(-|apart| / temperature), and how wrong a pair is, from 0 to 1.

    apart: score of the column less that of the row. prefers: whether the row's label is the higher one; where neither
    is, the second number means nothing.
    """
    power = exp_of_minus(tl.abs(apart), power_hi, power_lo)
    most = reciprocal(1.0 + power)
    return power, tl.where((apart > 0.0) ^ prefers, power * most, most)
