"""The random half: reproducible, independent of order, exact crops, consistent labels."""

import numpy as np
import pytest
import torch

from baselines.data import SampleConfig, sample_features, synthetic_complex
from baselines.data.crops import contiguous_crop, crop, spatial_crop
from baselines.data.randomness import Purpose, generator
from baselines.data.schema import FEATURES, GAP, LIGAND, PROTEIN, check_features
from megafold_bench.errors import UserError

CONFIG = SampleConfig(96, max_msa_rows=64)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in FEATURES if a[name].dtype != torch.float32) and all(
        np.array_equal(a[name].numpy(), b[name].numpy(), equal_nan=True) for name in FEATURES
    )


def test_same_key_same_bits_in_any_order(synthetic):
    keys = [(0, 0), (0, 1), (1, 0), (7, 123)]
    forward = {key: sample_features(synthetic, CONFIG, 3, *key) for key in keys}
    for key in reversed(keys):
        assert equal(sample_features(synthetic, CONFIG, 3, *key), forward[key])
    again = synthetic_complex(257, seed=1, msa_depth=300)
    assert equal(sample_features(again, CONFIG, 3, 0, 1), forward[0, 1])


def test_epochs_samples_and_seeds_differ(synthetic):
    crops = {}
    for key in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 2, 0), (0, 0, 2)]:
        features = sample_features(synthetic, CONFIG, *key)
        crops[key] = (tuple(features["token_index"].tolist()), features["ref_pos"].numpy().tobytes())
    assert len({tokens for tokens, _ in crops.values()}) >= 4
    assert len({positions for _, positions in crops.values()}) == 6


def test_streams_do_not_disturb_each_other(synthetic):
    shallow = sample_features(synthetic, SampleConfig(96, max_msa_rows=8, templates=1), 0, 0, 0)
    deep = sample_features(synthetic, CONFIG, 0, 0, 0)
    for name in ("token_index", "ref_pos"):
        assert torch.equal(shallow[name], deep[name])


def test_streams_never_overlap():
    draws = {
        generator(s, p, e, k).integers(2**63) for s in (0, 1) for p in Purpose for e in (0, 1) for k in (0, 1)
    }
    assert len(draws) == 2 * len(Purpose) * 4
    with pytest.raises(ValueError, match="negative"):
        generator(-1, Purpose.CROP)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("size", [1, 17, 128, 256, 257])
def test_crops_are_exact(synthetic, weights, size):
    for sample in range(5):
        tokens = crop(synthetic, size, weights, generator(0, Purpose.CROP, 0, sample))
        assert len(tokens) == size
        assert (np.diff(tokens) > 0).all()
        assert tokens[0] >= 0
        assert tokens[-1] < 257


def test_contiguous_crops_are_stretches(synthetic):
    for sample in range(10):
        tokens = contiguous_crop(synthetic.asym_id, 100, generator(0, Purpose.CROP, 0, sample))
        for chain in np.unique(synthetic.asym_id[tokens]):
            mine = tokens[synthetic.asym_id[tokens] == chain]
            assert (np.diff(mine) == 1).all()


def test_spatial_crops_are_balls(synthetic):
    points = synthetic.positions[synthetic.center_atom]
    resolved = synthetic.resolved[synthetic.center_atom]
    tokens = spatial_crop(points, resolved, 40, 60)
    distance = np.linalg.norm(points - points[40], axis=1)
    outside = np.setdiff1d(np.flatnonzero(resolved), tokens)
    assert distance[tokens].max() <= distance[outside].min()
    assert resolved[tokens].all()


def test_interface_crops_hold_an_interface(synthetic):
    for sample in range(5):
        tokens = crop(synthetic, 32, (0, 0, 1), generator(0, Purpose.CROP, 0, sample))
        assert len(np.unique(synthetic.asym_id[tokens])) > 1
        assert synthetic.interface[tokens].any()


def test_features_agree_with_each_other(synthetic):
    for sample in range(4):
        features = sample_features(synthetic, CONFIG, 0, 0, sample)
        sizes = check_features(features)
        atoms = int(features["atom_mask"].sum())
        to_token = features["atom_to_token"][:atoms]
        assert (torch.diff(to_token) >= 0).all()
        assert to_token.unique().tolist() == list(range(96))
        assert (features["atom_to_token"][atoms:] == 95).all()
        assert int(features["atom_within_token"].max()) < 24
        for name in ("representative_atom", "center_atom"):
            assert torch.equal(features["atom_to_token"][features[name]], torch.arange(96))
        center = features["frame_mask"] & (
            (features["molecule_type"] == PROTEIN) | (features["molecule_type"] == LIGAND)
        )
        assert torch.equal(features["frame_atoms"][center, 1], features["center_atom"][center])
        own = features["sym_id"][to_token].long()
        kept = torch.arange(atoms)
        token = features["token_index"][to_token].long().numpy()
        first = synthetic.token_atoms[token] + features["atom_within_token"][:atoms].numpy()
        np.testing.assert_array_equal(
            features["label_positions"][own, kept].numpy(), synthetic.positions[first]
        )
        assert torch.equal(features["label_mask"][own, kept], torch.from_numpy(synthetic.resolved[first]))
        assert sizes["A"] - atoms < 32
        assert not features["label_mask"][:, atoms:].any()


def test_reference_conformers_keep_their_shape(synthetic):
    features = sample_features(synthetic, SampleConfig(257), 0, 0, 0)
    mask = features["atom_mask"]
    uid, positions = features["ref_space_uid"][mask].numpy(), features["ref_pos"][mask].numpy()
    for residue in (0, 5, int(uid.max())):
        mine = uid == residue
        before, after = synthetic.ref_pos[synthetic.atom_residue == residue], positions[mine]
        distances = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (before, after)]
        np.testing.assert_allclose(*distances, atol=1e-4)
        if len(before) > 1:
            assert not np.allclose(before, after, atol=0.1)


def test_copies_share_names_and_elements(synthetic):
    for row in synthetic.copies:
        has = row >= 0
        numbers = np.flatnonzero(has)
        np.testing.assert_array_equal(synthetic.entity_atom[row[has]], numbers)
        original = synthetic.copies[0, numbers]
        both = original >= 0
        np.testing.assert_array_equal(
            synthetic.ref_atom_name[row[has][both]], synthetic.ref_atom_name[original[both]]
        )
        np.testing.assert_array_equal(
            synthetic.ref_element[row[has][both]], synthetic.ref_element[original[both]]
        )


def test_msa_rows_are_drawn_and_padded(synthetic):
    full = sample_features(synthetic, SampleConfig(64), 0, 0, 0)
    assert len(full["msa"]) == 300
    padded = sample_features(synthetic, SampleConfig(64, max_msa_rows=512, min_msa_rows=512), 0, 0, 0)
    assert len(padded["msa"]) == 512
    assert not padded["msa_mask"][300:].any()
    assert (padded["msa"][300:] == GAP).all()
    few = sample_features(synthetic, SampleConfig(64, max_msa_rows=10), 0, 0, 0)
    assert len(few["msa"]) == 10
    assert torch.equal(few["msa"][0], few["restype"])
    rows = {row.numpy().tobytes() for row in full["msa"]}
    assert all(row.numpy().tobytes() in rows for row in few["msa"])
    torch.testing.assert_close(full["profile"].sum(dim=1), torch.ones(64))


def test_templates_are_drawn(synthetic):
    counts = set()
    for sample in range(12):
        features = sample_features(synthetic, SampleConfig(64, templates=4), 0, 0, sample)
        assert len(features["template_mask"]) == 4
        counts.add(int(features["template_mask"].any(dim=-1).any(dim=-1).sum()))
        assert (features["template_restype"][~features["template_mask"].any(dim=-1)] == GAP).all()
    assert len(counts) > 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_tokens": 0},
        {"n_tokens": 8, "max_msa_rows": 0},
        {"n_tokens": 8, "max_msa_rows": 4, "min_msa_rows": 5},
        {"n_tokens": 8, "templates": -1},
        {"n_tokens": 8, "crop_weights": (0, 0, 0)},
        {"n_tokens": 8, "atom_multiple": 33},
    ],
)
def test_impossible_configurations(wrong):
    with pytest.raises(UserError):
        SampleConfig(**wrong)
