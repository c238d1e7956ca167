"""Conditioned transition of the diffusion transformer, fused."""

from optimized.ops.conditioned_transition.op import conditioned_transition, supported
from optimized.ops.conditioned_transition.reference import (
    ConditionedWeights,
    conditioned_transition_reference,
)

__all__ = ["ConditionedWeights", "conditioned_transition", "conditioned_transition_reference", "supported"]
