"""Triton's interpreter, as a user gets it who sets TRITON_INTERPRET=1: without what the other tests prepare."""

import os
import subprocess
import sys

CALL = """
import torch
from optimized.ops.layer_norm_linear import layer_norm_linear, layer_norm_linear_reference, supported
x, gamma, beta, w = torch.randn(70, 16), torch.ones(16), torch.zeros(16), torch.randn(16, 16)
x, gamma, beta, w = (t.bfloat16() for t in (x, gamma, beta, w))
assert supported(x, gamma, beta, [w]).ok
(y,) = layer_norm_linear(x, gamma, beta, [w])
(exact,) = layer_norm_linear_reference(*(t.double() for t in (x, gamma, beta)), [w.double()])
print(((y - exact).norm() / exact.norm()).item())
"""


def test_products_in_bf16_are_right():
    """Unmended, the interpreter multiplies the bit patterns."""
    found = subprocess.run(
        [sys.executable, "-c", CALL],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 2**-7
