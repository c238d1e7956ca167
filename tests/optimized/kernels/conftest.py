"""Mends Triton's CPU interpreter, which `tests/conftest.py` has chosen."""

from optimized.ops.interpreter import mend_interpreter

mend_interpreter()
