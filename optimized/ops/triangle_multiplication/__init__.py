"""Triangle multiplication (AF3 Algorithms 12 and 13), fused."""

from optimized.ops.triangle_multiplication.op import supported, triangle_multiplication
from optimized.ops.triangle_multiplication.reference import (
    JointWeights,
    TriangleWeights,
    triangle_multiplication_reference,
)

__all__ = [
    "JointWeights",
    "TriangleWeights",
    "supported",
    "triangle_multiplication",
    "triangle_multiplication_reference",
]
