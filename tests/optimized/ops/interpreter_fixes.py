"""What Triton 3.6's CPU interpreter gets wrong, mended for tests.

- Loop bounds held in tensors fail with NumPy 2.4 (`__index__` of a one-element array).
- bfloat16, stored as uint16, is truncated instead of rounded, and `tl.dot` multiplies the bit patterns.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_cast = interpreter.InterpreterBuilder.cast_impl
_convert = interpreter.InterpreterBuilder.create_fp_to_fp
_dot = interpreter.InterpreterBuilder.create_dot


def _widen(data):
    return (data.astype(np.uint32) << 16).view(np.float32)


def _narrow(data):
    exact = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return exact.view(torch.int16).numpy().view(np.uint16)


def _between_bf16_and_fp32(src, dst_type):
    pair = (src.dtype.scalar, dst_type.scalar)
    if pair == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(_widen(src.data), tl.float32)
    if pair == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(_narrow(src.data), tl.bfloat16)
    return None


def _patched_tensor(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patched_cast(self, src, dst_type):
    mended = _between_bf16_and_fp32(src, dst_type)
    return _cast(self, src, dst_type) if mended is None else mended


def _patched_convert(self, src, dst_type, rounding_mode):
    mended = _between_bf16_and_fp32(src, dst_type)
    return _convert(self, src, dst_type, rounding_mode) if mended is None else mended


def _patched_dot(self, a, b, d, *rest):
    wide = [
        interpreter.TensorHandle(_widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
        for t in (a, b)
    ]
    return _dot(self, *wide, d, *rest)


def mend_interpreter() -> None:
    """Put the corrections in place for this process."""
    interpreter._patch_lang_tensor = _patched_tensor
    interpreter.InterpreterBuilder.cast_impl = _patched_cast
    interpreter.InterpreterBuilder.create_fp_to_fp = _patched_convert
    interpreter.InterpreterBuilder.create_dot = _patched_dot
