"""Losses of the confidence head: how well it predicts the errors of one rollout (AF3 SI 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from baselines.losses.distogram import pair_cross_entropy, pair_distances
from baselines.losses.labels import Features, Labels, masked_mean
from baselines.losses.lddt import lddt_per_atom

PLDDT_BINS = 50
ERROR_BINS = 64
MAX_ERROR = 32.0
"""Å; PAE and PDE bins are 0.5 Å wide, the last takes everything beyond."""
MIN_RESOLUTION, MAX_RESOLUTION = 0.1, 4.0
"""Å; entries outside, and those without a resolution, teach the confidence head nothing."""


class ConfidenceLogits(Protocol):
    """Logits: plddt [A, 50], pae and pde [N, N, 64], resolved [A, 2]."""

    @property
    def plddt(self) -> Tensor: ...  # noqa: D102

    @property
    def pae(self) -> Tensor: ...  # noqa: D102

    @property
    def pde(self) -> Tensor: ...  # noqa: D102

    @property
    def resolved(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class ConfidenceLosses:
    """Unweighted scalars."""

    plddt: Tensor
    pde: Tensor
    resolved: Tensor
    pae: Tensor


def confidence_losses(
    logits: ConfidenceLogits, x: Tensor, features: Features, labels: Labels
) -> ConfidenceLosses:
    """Cross-entropies against the errors of the prediction x [A, 3]; all 0 outside 0.1–4 Å resolution."""
    resolution = features["resolution"]
    applies = ((resolution >= MIN_RESOLUTION) & (resolution <= MAX_RESOLUTION)).float()
    lddt, lddt_mask = lddt_per_atom(x, features, labels)
    plddt_bin = (lddt * PLDDT_BINS).long().clamp(max=PLDDT_BINS - 1)
    pde, pde_mask = distance_errors(x, features, labels)
    pae, pae_mask = aligned_errors(x, features, labels)
    resolved = pair_cross_entropy(logits.resolved, labels.mask.long())
    return ConfidenceLosses(
        plddt=applies * masked_mean(pair_cross_entropy(logits.plddt, plddt_bin), lddt_mask),
        pde=applies * masked_mean(pair_cross_entropy(logits.pde, error_bins(pde)), pde_mask),
        resolved=applies * masked_mean(resolved, features["atom_mask"]),
        pae=applies * masked_mean(pair_cross_entropy(logits.pae, error_bins(pae)), pae_mask),
    )


def error_bins(error: Tensor) -> Tensor:
    """Bin of each error in Å: 64 of 0.5 Å, the last open; int64. NaN falls in the last."""
    index = torch.nan_to_num(error, nan=MAX_ERROR) * (ERROR_BINS / MAX_ERROR)
    return index.clamp(max=ERROR_BINS - 1).long()


@torch.no_grad()
def distance_errors(x: Tensor, features: Features, labels: Labels) -> tuple[Tensor, Tensor]:
    """| |x_i − x_j| − |y_i − y_j| | over representative atoms, [N, N] Å, and where it is defined."""
    atoms = features["representative_atom"]
    mask = labels.mask[atoms]
    error = (pair_distances(x[atoms]) - pair_distances(labels.positions[atoms])).abs()
    return error, mask[:, None] & mask[None, :]


@torch.no_grad()
def aligned_errors(x: Tensor, features: Features, labels: Labels) -> tuple[Tensor, Tensor]:
    """Error of token j's centre atom seen from token i's frame (Algorithm 30), [N, N] Å, and its mask."""
    frame_atoms, center = features["frame_atoms"], features["center_atom"]
    frame_mask = features["frame_mask"] & labels.mask[frame_atoms].all(-1)
    predicted = _in_frames(x[frame_atoms], x[center])
    true = _in_frames(labels.positions[frame_atoms], labels.positions[center])
    error = (predicted - true).square().sum(-1).sqrt()
    return error, frame_mask[:, None] & labels.mask[center][None, :]


def _in_frames(frame_atoms: Tensor, points: Tensor) -> Tensor:
    """Coordinates [N, N, 3] of points [N, 3] in frames built on atoms [N, 3, 3], the origin second (Alg 29)."""
    a, b, c = frame_atoms.unbind(-2)
    w1 = torch.nn.functional.normalize(a - b, dim=-1, eps=1e-8)
    w2 = torch.nn.functional.normalize(c - b, dim=-1, eps=1e-8)
    e1 = torch.nn.functional.normalize(w1 + w2, dim=-1, eps=1e-8)
    e2 = torch.nn.functional.normalize(w2 - w1, dim=-1, eps=1e-8)
    axes = torch.stack([e1, e2, torch.linalg.cross(e1, e2)], dim=-2)
    return torch.einsum("nkc,nmc->nmk", axes, points[None, :, :] - b[:, None, :])
