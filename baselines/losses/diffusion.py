"""The losses of the diffusion module: aligned MSE, bonds, smooth LDDT (AF3 SI 3.7.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.alignment import weighted_rigid_align
from baselines.data.schema import LIGAND
from baselines.losses.distogram import pair_distances
from baselines.losses.labels import Features, Labels, alignment_weights, masked_mean
from baselines.losses.lddt import SmoothLDDTTarget, smooth_lddt_loss, smooth_lddt_target

SIGMA_DATA = 16.0
"""Å, the assumed standard deviation of the data."""


@dataclass(frozen=True)
class DiffusionTargets:
    """What all diffusion samples of a step are compared with.

    ``mask`` and ``weights`` [A]; ``bonds`` [E, 2] atoms, ``bond_mask`` [E], ``bond_lengths`` [E] in Å;
    ``lddt`` is None when the smooth LDDT has no weight.
    """

    mask: Tensor
    weights: Tensor
    bonds: Tensor
    bond_mask: Tensor
    bond_lengths: Tensor
    lddt: SmoothLDDTTarget | None


@dataclass(frozen=True)
class DiffusionLosses:
    """Losses per sample, [D] each, unweighted."""

    mse: Tensor
    bond: Tensor
    smooth_lddt: Tensor


def edm_weight(t_hat: Tensor) -> Tensor:
    """(t² + σ²) / (t·σ)² with σ = 16 Å, for noise levels t in Å."""
    return (t_hat.square() + SIGMA_DATA**2) / (t_hat * SIGMA_DATA).square()


@torch.no_grad()
def diffusion_targets(features: Features, labels: Labels, smooth_lddt: bool) -> DiffusionTargets:
    """Prepare the targets once per step; with `smooth_lddt` they hold 5·A² bytes."""
    bonds, bond_mask = ligand_polymer_bonds(features, labels)
    ends = labels.positions[bonds]
    return DiffusionTargets(
        mask=labels.mask,
        weights=alignment_weights(features),
        bonds=bonds,
        bond_mask=bond_mask,
        bond_lengths=(ends[:, 0] - ends[:, 1]).norm(dim=-1),
        lddt=smooth_lddt_target(features, labels) if smooth_lddt else None,
    )


def diffusion_losses(x: Tensor, x_true: Tensor, targets: DiffusionTargets) -> DiffusionLosses:
    """Losses of denoised samples x [D, A, 3] whose truth was moved to x_true [D, A, 3], in the dtype of x.

    MSE: Σ_l w_l |x_l − align(x_true)_l|² / 3, mean over resolved atoms, the truth laid onto the
    prediction without gradient. Bond: mean squared error of ligand–polymer bond lengths.
    """
    resolved = targets.mask
    aligned = weighted_rigid_align(x_true, x.detach(), targets.weights * resolved)
    squared = (x - aligned).square().sum(-1) * targets.weights / 3
    ends = x[:, targets.bonds]
    lengths = _safe_norm(ends[:, :, 0] - ends[:, :, 1])
    smooth = x.new_zeros(x.shape[0]) if targets.lddt is None else smooth_lddt_loss(x, targets.lddt)
    return DiffusionLosses(
        mse=masked_mean(squared, resolved, dim=-1),
        bond=masked_mean((lengths - targets.bond_lengths).square(), targets.bond_mask, dim=-1),
        smooth_lddt=smooth,
    )


@torch.no_grad()
def ligand_polymer_bonds(features: Features, labels: Labels) -> tuple[Tensor, Tensor]:
    """Atoms of every token bond [E, 2] and which of them join a ligand to a polymer and are resolved [E].

    Features name the bonded tokens, not the atoms. A ligand token is one atom; of the polymer token the
    atom nearest to it in the truth is taken, which for a covalent bond is the bonded one.
    """
    first, second = features["token_bonds"].unbind(-1)
    molecule_type, atom_to_token = features["molecule_type"], features["atom_to_token"]
    first_is_ligand = molecule_type[first] == LIGAND
    mixed = first_is_ligand ^ (molecule_type[second] == LIGAND)
    ligand = features["center_atom"][torch.where(first_is_ligand, first, second)]
    polymer_token = torch.where(first_is_ligand, second, first)
    candidates = (atom_to_token == polymer_token[:, None]) & labels.mask
    distances = pair_distances(labels.positions[ligand], labels.positions)
    distances = torch.where(candidates, distances, torch.inf)
    polymer = distances.argmin(-1)
    mask = mixed & candidates.any(-1) & labels.mask[ligand]
    return torch.stack([ligand, polymer], -1), mask


def _safe_norm(x: Tensor) -> Tensor:
    squared = x.square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
