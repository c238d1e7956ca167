"""Attention with a pair bias shared by all rows (AF3 algorithms 14, 15, 24)."""

from optimized.ops.attention.operator import attention, attention_backward, attention_with_lse, supported

__all__ = ["attention", "attention_backward", "attention_with_lse", "supported"]
