import numpy as np
import pytest
import torch

from baselines.alignment import random_rotations
from baselines.losses.labels import own_labels
from baselines.permutation import ChainTable, choose_anchor, match_chains, permute_labels
from tests.baselines.samples import CHAINS, make_features


def moved(x: torch.Tensor, seed: int) -> torch.Tensor:
    turn = random_rotations(1, torch.Generator().manual_seed(seed))[0]
    return x @ turn.T + torch.tensor([12.0, -3.0, 40.0])


def resolved_features(seed: int, unresolved: float) -> dict:
    return make_features(seed, unresolved=unresolved)


@pytest.mark.parametrize("seed", range(4))
def test_identity_is_kept(seed: int):
    features = resolved_features(seed, 0.0)
    own = own_labels(features)
    found = permute_labels(moved(own.positions, seed), features)
    assert torch.equal(found.positions, own.positions)
    assert torch.equal(found.mask, own.mask)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("swap", [(0,), (2,), (0, 2)])
def test_swapped_copies_are_found(seed: int, swap: tuple[int, ...]):
    """The prediction is the truth with the copies of some entities exchanged."""
    features = resolved_features(seed, 0.0)
    entity, sym = features["entity_id"].long(), features["sym_id"].long()
    swapped = torch.isin(entity, torch.tensor(swap))
    copy = torch.where(swapped, 1 - sym, sym)
    atoms = torch.arange(96)
    truth = features["label_positions"][copy[features["atom_to_token"]], atoms]
    truth = truth * features["atom_mask"][:, None]
    x = moved(truth, seed)
    assert torch.equal(match_chains(x, features), copy)
    found = permute_labels(x, features)
    assert torch.equal(found.positions, truth)
    assert found.mask[features["atom_mask"]].all()


@pytest.mark.parametrize("seed", range(4))
def test_swapped_atoms_are_found_residue_by_residue(seed: int):
    features = resolved_features(seed, 0.0)
    own = own_labels(features).positions
    flip = torch.rand(features["restype"].shape[0], generator=torch.Generator().manual_seed(seed)) < 0.4
    order = torch.where(flip[features["atom_to_token"]], features["atom_permutations"][1], torch.arange(96))
    x = moved(own[order], seed)
    assert not torch.equal(own[order], own)
    assert torch.equal(permute_labels(x, features).positions, own[order])


@pytest.mark.parametrize("seed", range(3))
def test_unresolved_atoms_keep_their_mask(seed: int):
    """Chains and atoms exchanged with holes in the truth: the labels are the holes' too."""
    features = resolved_features(seed, 0.15)
    sym = features["sym_id"].long()
    copy = torch.where(features["entity_id"] == 0, 1 - sym, sym)
    complete = resolved_features(seed, 0.0)
    atoms = torch.arange(96)
    chosen = copy[features["atom_to_token"]]
    x = moved(complete["label_positions"][chosen, atoms], seed)
    found = permute_labels(x, features)
    mask = features["label_mask"][chosen, atoms] & features["atom_mask"]
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.positions[mask], complete["label_positions"][chosen, atoms][mask])


def test_a_prediction_of_nans_does_not_stop_the_step():
    features = resolved_features(0, 0.0)
    found = permute_labels(torch.full((96, 3), torch.nan), features)
    assert torch.isfinite(found.positions).all()


def test_nothing_resolved_keeps_the_own_labels():
    features = resolved_features(0, 0.0)
    features["label_mask"] = torch.zeros_like(features["label_mask"])
    found = permute_labels(torch.randn(96, 3), features)
    assert not found.mask.any()


def test_each_copy_is_used_once():
    features = resolved_features(0, 0.0)
    copy = match_chains(torch.randn(96, 3, generator=torch.Generator().manual_seed(0)), features)
    for entity in range(3):
        used = [int(copy[features["asym_id"] == c][0]) for c, row in enumerate(CHAINS) if row[1] == entity]
        assert len(set(used)) == len(used)


def test_anchor_is_the_least_ambiguous_then_the_largest():
    def table(resolved: list[list[int]]) -> ChainTable:
        return ChainTable(np.arange(0), np.arange(len(resolved)), np.array(resolved))

    assert choose_anchor(table([[50, 50], [20, 0], [30, 0]])) == 2
    assert choose_anchor(table([[50, 50], [1, 0]])) == 0
    assert choose_anchor(table([[1, 1], [2, 2]])) == 1
