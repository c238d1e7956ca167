"""What every GPU test starts from: float32 products in float32, seeded inputs; the operators' checks can be imported.

Trials are tested first: they watch the whole device, and what this process holds of it would count as another's.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "optimized" / "ops"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "test_harness_gpu" not in item.nodeid)
    for item in items:
        if "two_to_the_31" in item.name:  # tens of GiB each: where tests run side by side, one after another
            item.add_marker(pytest.mark.xdist_group("large"))


@pytest.fixture(autouse=True)
def _exact_fp32() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.cuda.empty_cache()  # the tests past 2**31 elements hold tens of GiB, which tests beside them may need
