"""Synthetic features for the model's tests."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from baselines.af3.config import AF3Config, preset
from baselines.af3.model import AlphaFold3, perturb_zero_parameters
from baselines.data.schema import ATOM_WINDOW, GAP, check_features


def _make_features(
    tokens: int = 12, atoms_per_token: int = 4, rows: int = 5, templates: int = 2, seed: int = 0
) -> dict[str, Tensor]:
    """Two copies of one chain and a ligand of atom tokens, with a template that covers the first chain."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(dtype)

    def normal(*shape: int) -> Tensor:
        return 5.0 * torch.randn(*shape, generator=g)

    third = tokens // 3
    asym = torch.tensor([0] * third + [1] * third + [2] * (tokens - 2 * third), dtype=torch.int32)
    ligand = asym == 2
    residue = torch.cat(
        [torch.arange(1, third + 1), torch.arange(1, third + 1), torch.ones(tokens - 2 * third)]
    )
    counts = torch.where(ligand, 1, atoms_per_token)
    real = int(counts.sum())
    atoms = -(-real // ATOM_WINDOW) * ATOM_WINDOW
    starts = counts.cumsum(0) - counts
    to_token = torch.full((atoms,), tokens - 1)
    to_token[:real] = torch.repeat_interleave(torch.arange(tokens), counts)
    within = (torch.arange(atoms) - starts[to_token]) * (torch.arange(atoms) < real)
    first_ligand = 2 * third
    features = {
        "restype": integers(0, 20, tokens),
        "molecule_type": torch.where(ligand, 3, 0).to(torch.uint8),
        "residue_index": residue.to(torch.int32),
        "token_index": torch.arange(tokens, dtype=torch.int32),
        "asym_id": asym,
        "entity_id": ligand.to(torch.int32),
        "sym_id": (asym == 1).to(torch.int32),
        "token_bonds": torch.tensor([[i, i + 1] for i in range(first_ligand, tokens - 1)]).view(-1, 2),
        "representative_atom": starts,
        "center_atom": starts,
        "frame_atoms": torch.stack((starts, starts, starts), -1),
        "frame_mask": ~ligand,
        "atom_mask": torch.arange(atoms) < real,
        "atom_to_token": to_token,
        "atom_within_token": within.to(torch.uint8),
        "ref_pos": normal(atoms, 3) / 3.0,
        "ref_element": integers(1, 17, atoms),
        "ref_charge": integers(-1, 2, atoms, dtype=torch.float32),
        "ref_atom_name": integers(0, 64, atoms, 4),
        "ref_space_uid": torch.where(ligand, first_ligand, torch.arange(tokens))[to_token].to(torch.int32),
        "msa": integers(0, 22, rows, tokens),
        "msa_deletions": integers(0, 4, rows, tokens),
        "msa_mask": torch.rand(rows, tokens, generator=g) > 0.2,
        "profile": torch.softmax(torch.randn(tokens, 31, generator=g), -1),
        "deletion_mean": torch.rand(tokens, generator=g),
        "template_restype": integers(0, 20, templates, tokens),
        "template_positions": normal(templates, tokens, 4, 3) * 2.0,
        "template_mask": torch.rand(templates, tokens, 4, generator=g) > 0.1,
        "label_positions": normal(2, atoms, 3),
        "label_mask": torch.ones(2, atoms, dtype=torch.bool),
        "atom_permutations": torch.arange(atoms).view(1, -1),
        "resolution": torch.tensor(2.0),
    }
    features["msa_mask"][0] = True
    features["template_mask"][:, asym != 0] = False
    features["template_restype"][:, asym != 0] = GAP
    check_features(features)
    return features


@pytest.fixture
def make_features() -> Callable[..., dict[str, Tensor]]:
    return _make_features


@pytest.fixture
def features() -> dict[str, Tensor]:
    return _make_features()


@pytest.fixture
def tiny_config() -> AF3Config:
    return preset("tiny")


@pytest.fixture
def released_tiny_config(tiny_config: AF3Config) -> AF3Config:
    """The tiny preset with the parameters that the released network owns and never reads."""
    return dataclasses.replace(
        tiny_config,
        atom=dataclasses.replace(tiny_config.atom, unused_pair_embedding=True),
        msa=dataclasses.replace(tiny_config.msa, last_block_updates_msa=True),
    )


@pytest.fixture
def make_model() -> Callable[..., AlphaFold3]:
    def build(config: AF3Config, dtype: torch.dtype = torch.float32) -> AlphaFold3:
        torch.manual_seed(0)
        model = AlphaFold3(config).to(dtype)
        perturb_zero_parameters(model, std=0.1)
        return model

    return build
