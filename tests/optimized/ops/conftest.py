"""Operator tests run Triton's CPU interpreter; it must be chosen before triton is imported."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from interpreter_fixes import mend_interpreter

mend_interpreter()
