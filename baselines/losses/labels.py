"""What the losses compare with: one position and one mask per atom, and the types of atoms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.data.schema import DNA, LIGAND, RNA

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Labels:
    """The truth for one crop, after a choice of chain copy and atom permutation.

    ``positions`` [A, 3] in Å (0 where unresolved), ``mask`` [A] bool: the atom is real and resolved.
    """

    positions: Tensor
    mask: Tensor


def make_labels(features: Features, copy_of_token: Tensor) -> Labels:
    """The labels when the chain of token i takes the place of copy ``copy_of_token[i]`` ([N] int64)."""
    copy = copy_of_token[features["atom_to_token"]]
    atom = torch.arange(copy.shape[0], device=copy.device)
    mask = features["label_mask"][copy, atom] & features["atom_mask"]
    positions = features["label_positions"][copy, atom]
    return Labels(torch.where(mask[:, None], positions, 0.0), mask)


def own_labels(features: Features) -> Labels:
    """The labels without any permutation: each chain is itself."""
    return make_labels(features, features["sym_id"].long())


def atom_molecule_type(features: Features) -> Tensor:
    """Molecule type of each atom, [A] uint8."""
    return features["molecule_type"][features["atom_to_token"]]


def is_nucleic(molecule_type: Tensor) -> Tensor:
    """Whether each entry is RNA or DNA, bool."""
    return (molecule_type == RNA) | (molecule_type == DNA)


def alignment_weights(features: Features) -> Tensor:
    """Weights of the diffusion loss: 1 for protein, 6 for RNA and DNA, 11 for ligand atoms; [A] float32."""
    molecule_type = atom_molecule_type(features)
    return 1.0 + 5.0 * is_nucleic(molecule_type).float() + 10.0 * (molecule_type == LIGAND).float()


def masked_mean(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of `values` over the True entries of `mask` (broadcast), 0 where there is none.

    Values at False entries are ignored even if they are not finite.
    """
    kept = torch.where(mask, values, 0.0)
    count = mask.expand_as(kept).to(kept.dtype)
    if dim is None:
        return kept.sum() / count.sum().clamp(min=1)
    return kept.sum(dim) / count.sum(dim).clamp(min=1)
