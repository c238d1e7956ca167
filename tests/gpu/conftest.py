"""What every GPU test starts from: float32 products in float32, seeded inputs; the operators' checks can be imported."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "optimized" / "ops"))


@pytest.fixture(autouse=True)
def _exact_fp32() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
