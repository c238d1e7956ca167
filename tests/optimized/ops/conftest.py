"""Mends Triton's CPU interpreter, which `tests/conftest.py` has chosen, for kernels that tests launch themselves."""

import sys
from pathlib import Path

from optimized.ops.interpreter import mend_interpreter

sys.path.insert(0, str(Path(__file__).parent))

mend_interpreter()
