"""Transition (AF3 Algorithm 11), fused; in float32 over runs of rows."""

from optimized.ops.transition.op import supported, transition
from optimized.ops.transition.reference import transition_reference

__all__ = ["supported", "transition", "transition_reference"]
