"""Adaptive LayerNorm of the diffusion transformer, fused."""

from optimized.ops.adaptive_layer_norm.op import adaptive_layer_norm, supported
from optimized.ops.adaptive_layer_norm.reference import adaptive_layer_norm_reference

__all__ = ["adaptive_layer_norm", "adaptive_layer_norm_reference", "supported"]
