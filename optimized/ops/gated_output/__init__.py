"""The end of an update, fused: sigmoid gate, output projection, shared dropout, residual."""

from optimized.ops.gated_output.conditioned import conditioned_output, conditioned_supported
from optimized.ops.gated_output.op import add_update, gated_output, supported, update_supported
from optimized.ops.gated_output.reference import (
    add_update_reference,
    conditioned_output_reference,
    gated_output_reference,
)

__all__ = [
    "add_update",
    "add_update_reference",
    "conditioned_output",
    "conditioned_output_reference",
    "conditioned_supported",
    "gated_output",
    "gated_output_reference",
    "supported",
    "update_supported",
]
