"""Local distance difference tests: the smooth one that is a loss, the exact one that pLDDT predicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from baselines.data.schema import LIGAND
from baselines.losses.distogram import pair_distances
from baselines.losses.labels import Features, Labels, atom_molecule_type, is_nucleic, masked_mean

THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
RADIUS, NUCLEIC_RADIUS = 15.0, 30.0
"""Å; pairs further apart than this in the truth do not count."""


@dataclass(frozen=True)
class SmoothLDDTTarget:
    """True distances [A, A] float32 and the pairs that count [A, A] bool: once per step, for all samples."""

    distances: Tensor
    mask: Tensor


def smooth_lddt_target(features: Features, labels: Labels) -> SmoothLDDTTarget:
    """Pairs of different resolved atoms within 15 Å, or 30 Å where the first is of DNA or RNA."""
    distances = pair_distances(labels.positions)
    radius = torch.where(is_nucleic(atom_molecule_type(features)), NUCLEIC_RADIUS, RADIUS)
    mask = (distances < radius[:, None]) & labels.mask[:, None] & labels.mask[None, :]
    mask.fill_diagonal_(False)
    return SmoothLDDTTarget(distances, mask)


def smooth_lddt_loss(x: Tensor, target: SmoothLDDTTarget) -> Tensor:
    """1 − smooth LDDT (Algorithm 27) of each sample x [D, A, 3], [D].

    One sample at a time, each recomputed in backward, so the dense A×A intermediates of one sample
    bound the memory: about 10·4·A² bytes.
    """
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    losses = [
        checkpoint(
            _smooth_lddt_one,
            sample,
            target.distances,
            target.mask,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        if needs_grad
        else _smooth_lddt_one(sample, target.distances, target.mask)
        for sample in x.unbind(0)
    ]
    return torch.stack(losses)


def _smooth_lddt_one(x: Tensor, distances: Tensor, mask: Tensor) -> Tensor:
    error = (pair_distances(x) - distances).abs()
    score = torch.zeros_like(error)
    for threshold in THRESHOLDS:
        score = score + torch.sigmoid(threshold - error)
    return 1.0 - masked_mean(score / len(THRESHOLDS), mask)


@torch.no_grad()
def lddt_per_atom(x: Tensor, features: Features, labels: Labels) -> tuple[Tensor, Tensor]:
    """LDDT of each atom of a prediction x [A, 3] (AF3 SI 4.3.1): values in [0, 1] and their mask, [A] each.

    An atom is compared with the centre atoms (CA, C1') of polymer tokens other than itself within 15 Å,
    30 Å for centre atoms of DNA and RNA. The mask is False for unresolved atoms and atoms without a partner.
    """
    center, molecule_type = features["center_atom"], features["molecule_type"]
    truth = pair_distances(labels.positions, labels.positions[center])
    radius = torch.where(is_nucleic(molecule_type), NUCLEIC_RADIUS, RADIUS)
    atom = torch.arange(x.shape[0], device=x.device)
    mask = (truth < radius) & labels.mask[:, None] & labels.mask[center] & (molecule_type != LIGAND)
    mask &= atom[:, None] != center
    error = (pair_distances(x, x[center]) - truth).abs()
    score = sum((error < threshold).to(x.dtype) for threshold in THRESHOLDS) / len(THRESHOLDS)
    return masked_mean(torch.as_tensor(score), mask, dim=-1), labels.mask & mask.any(-1)
