"""The exponential in fp32 to the last bit or two, for kernels whose results are fp32.

The hardware has only an approximate 2^x (error 2⁻²²), and rounding x·log₂e before it loses |x|·2⁻²⁴ more.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # ten bits, so that its products with small integers are exact
LN2_REST = tl.constexpr(0.6931471805599453 - 0.693359375)


@triton.jit
def exact_exp(x):
    """exp(x) of fp32 x: a power of two, split off exactly, times a polynomial of the rest; 0 or inf beyond ±200."""
    x = tl.where(x < -200.0, -200.0, x)
    x = tl.where(x > 200.0, 200.0, x)
    n = tl.floor(x * LOG2E + 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_REST
    # Taylor to the seventh power: |r| ≤ 0.35, so the rest is below 2⁻²⁷.
    p = r * (1.0 / 5040.0) + (1.0 / 720.0)
    p = p * r + (1.0 / 120.0)
    p = p * r + (1.0 / 24.0)
    p = p * r + (1.0 / 6.0)
    p = p * r + 0.5
    p = (p * r) * r + r
    # In two factors: 2^n alone would overflow or vanish where the result does not. Powers of integers are exact.
    half = tl.floor(n * 0.5)
    return (p + 1.0) * tl.exp2(half) * tl.exp2(n - half)
