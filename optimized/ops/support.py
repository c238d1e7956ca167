"""Whether a Triton kernel can run on given tensors, and in words why not."""

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Supported(NamedTuple):
    """Verdict on one call: `ok`, and when it is false the reason (empty otherwise)."""

    ok: bool
    reason: str = ""


SUPPORTED = Supported(True)


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton runs in its CPU interpreter (TRITON_INTERPRET=1), so that CPU tensors reach kernels.

    A constant of the process, so that `torch.compile` need not look into Triton's settings.
    """
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def triton_support(*tensors: Tensor) -> Supported:
    """Whether these tensors (one device, floating point of 16 or 32 bits) can go to a Triton kernel."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return Supported(False, "triton is not installed")
    device = tensors[0].device
    for t in tensors:  # a loop: generators would take a few microseconds of every call
        if t.device != device:
            return Supported(False, "the tensors are on different devices")
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return Supported(False, f"Triton kernels need a CUDA or ROCm device, the input is on {device.type}")
    for t in tensors:
        if t.dtype not in FLOATS:
            return Supported(False, f"dtype {t.dtype} is not one of float32, bfloat16, float16")
    return SUPPORTED
