"""Linear layers in float32 on tensor cores, as three TF32 products."""

from optimized.ops.linear.op import linear, supported
from optimized.ops.linear.reference import linear_reference

__all__ = ["linear", "linear_reference", "supported"]
