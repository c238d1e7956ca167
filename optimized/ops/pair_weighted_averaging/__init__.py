"""MSA pair-weighted averaging without copies of its values."""

from optimized.ops.pair_weighted_averaging.op import supported, weighted_average
from optimized.ops.pair_weighted_averaging.reference import weighted_average_reference

__all__ = ["supported", "weighted_average", "weighted_average_reference"]
