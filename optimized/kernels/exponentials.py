"""How many exponentials a second the device takes: the third ceiling of attention beside bytes and FLOPs."""

# ruff: noqa: ANN001, ANN201 (Triton compiles this function: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

BLOCK = 1024
STEPS = 512


@triton.jit
def exponentials_kernel(out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Each of BLOCK numbers is replaced STEPS times by 2^-itself, which stays between 0 and 1."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = at.to(tl.float32) * 1e-9
    for _ in range(STEPS):
        x = tl.exp2(-x)
    tl.store(out_ptr + at, x)
