"""Precision policies: which part of the step runs in which number format."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from megafold_bench.errors import UserError


@dataclass(frozen=True)
class PrecisionPolicy:
    """Whether bf16 autocast is on in the trunk, the diffusion module and the confidence head.

    Parameters, optimiser state and losses are float32 always. The `trunk` covers the input embedder and the
    recycled stack; `diffusion` covers training samples and the rollout. The distogram is float32.
    """

    name: str
    trunk_bf16: bool
    diffusion_bf16: bool
    confidence_bf16: bool

    def trunk(self, device: torch.device) -> AbstractContextManager:
        """The context of one trunk cycle.

        Open a new one for every cycle: autocast keeps the weights it has cast while the context lasts, and
        those cast without gradient in an early cycle would cut the last one off from its parameters.
        """
        return _autocast(device, self.trunk_bf16)

    def diffusion(self, device: torch.device) -> AbstractContextManager:
        """The context of the diffusion module."""
        return _autocast(device, self.diffusion_bf16)

    def confidence(self, device: torch.device) -> AbstractContextManager:
        """The context of the confidence head."""
        return _autocast(device, self.confidence_bf16)


POLICIES = {
    policy.name: policy
    for policy in (
        PrecisionPolicy("bf16", trunk_bf16=True, diffusion_bf16=False, confidence_bf16=True),
        PrecisionPolicy("fp32", trunk_bf16=False, diffusion_bf16=False, confidence_bf16=False),
        PrecisionPolicy("bf16-diffusion", trunk_bf16=True, diffusion_bf16=True, confidence_bf16=True),
    )
}
"""``bf16`` is what Protenix trains with; ``bf16-diffusion`` is a mode of its own, never the default."""


def precision_policy(name: str) -> PrecisionPolicy:
    """The policy called `name`; raises `UserError` for an unknown one."""
    if name not in POLICIES:
        raise UserError(f"unknown precision {name!r}: choose from {', '.join(POLICIES)}")
    return POLICIES[name]


def _autocast(device: torch.device, enabled: bool) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
