"""Triangle attention (AF3 Algorithms 14 and 15), whole."""

from optimized.ops.triangle_attention.op import supported, triangle_attention
from optimized.ops.triangle_attention.reference import (
    Orientation,
    TriangleAttentionWeights,
    triangle_attention_reference,
)

__all__ = [
    "Orientation",
    "TriangleAttentionWeights",
    "supported",
    "triangle_attention",
    "triangle_attention_reference",
]
