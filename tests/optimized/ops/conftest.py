"""Mends Triton's CPU interpreter, which `tests/conftest.py` has chosen."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from interpreter_fixes import mend_interpreter

mend_interpreter()
