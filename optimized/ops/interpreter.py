"""What Triton's CPU interpreter gets wrong, mended before the first kernel is launched in it.

- Loop bounds held in tensors fail with NumPy 2.4 (`__index__` of a one-element array).
- bfloat16, stored as uint16, is truncated instead of rounded, and `tl.dot` multiplies the bit patterns.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_cast = interpreter.InterpreterBuilder.cast_impl
_convert = interpreter.InterpreterBuilder.create_fp_to_fp
_dot = interpreter.InterpreterBuilder.create_dot


def _widen(data: Any) -> Any:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _narrow(data: Any) -> Any:
    exact = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return exact.view(torch.int16).numpy().view(np.uint16)


def _between_bf16_and_fp32(src: Any, dst_type: Any) -> Any:
    pair = (src.dtype.scalar, dst_type.scalar)
    if pair == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(_widen(src.data), tl.float32)
    if pair == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(_narrow(src.data), tl.bfloat16)
    return None


def _patched_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patched_cast(self: Any, src: Any, dst_type: Any) -> Any:
    mended = _between_bf16_and_fp32(src, dst_type)
    return _cast(self, src, dst_type) if mended is None else mended


def _patched_convert(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    mended = _between_bf16_and_fp32(src, dst_type)
    return _convert(self, src, dst_type, rounding_mode) if mended is None else mended


def _patched_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
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
