"""Outer product mean without the c²-wide intermediate."""

from optimized.ops.outer_product_mean.op import (
    outer_product_mean,
    outer_supported,
    projected_outer,
    supported,
)
from optimized.ops.outer_product_mean.reference import (
    OuterWeights,
    outer_product_mean_reference,
    projected_outer_reference,
)

__all__ = [
    "OuterWeights",
    "outer_product_mean",
    "outer_product_mean_reference",
    "outer_supported",
    "projected_outer",
    "projected_outer_reference",
    "supported",
]
