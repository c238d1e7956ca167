"""LayerNorm and the linear maps that share it, fused."""

from optimized.ops.layer_norm_linear.op import layer_norm_linear, supported
from optimized.ops.layer_norm_linear.reference import layer_norm_linear_reference

__all__ = ["layer_norm_linear", "layer_norm_linear_reference", "supported"]
