"""Loss weights of the training stages."""

from __future__ import annotations

from dataclasses import dataclass

from megafold_bench.errors import UserError


@dataclass(frozen=True)
class LossWeights:
    """Total = confidence·(pLDDT + PDE + resolved + pae·PAE) + distogram·L
    + diffusion·(EDM·(MSE + bond·L) + smooth_lddt·L), where EDM is the noise-level weight."""

    confidence: float = 1e-4
    diffusion: float = 4.0
    distogram: float = 0.03
    bond: float = 0.0
    smooth_lddt: float = 1.0
    pae: float = 0.0


STAGES: dict[str, LossWeights] = {
    "initial": LossWeights(),
    "finetune1": LossWeights(bond=1.0, smooth_lddt=0.0),
    "finetune2": LossWeights(bond=1.0, smooth_lddt=0.0),
    "finetune3": LossWeights(diffusion=0.0, distogram=0.0, smooth_lddt=0.0, pae=1.0),
    "all": LossWeights(bond=1.0, pae=1.0),
}
"""The recipe's stages; ``all`` switches every loss on, so that every parameter is trained."""


def stage_weights(stage: str) -> LossWeights:
    """The weights of a stage; raises `UserError` for an unknown one."""
    if stage not in STAGES:
        raise UserError(f"unknown training stage {stage!r}: choose from {', '.join(STAGES)}")
    return STAGES[stage]
