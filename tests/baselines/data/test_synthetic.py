"""Synthetic complexes: exact size, realistic statistics, sensible chemistry."""

import time

import numpy as np
import pytest

from baselines.data import SampleConfig, describe, sample_features, synthetic_complex
from baselines.data.schema import DNA, LIGAND, PROTEIN, RNA, check_features
from megafold_bench.errors import UserError

SIZES = (16, 17, 33, 50, 64, 127, 128, 200, 257, 384)


@pytest.mark.parametrize("size", SIZES)
def test_size_and_composition(size):
    complex_ = synthetic_complex(size, seed=size, msa_depth=64)
    counts = describe(complex_)
    assert counts["tokens"] == size
    assert 7.2 <= counts["atoms_per_token"] <= 8.6
    assert counts["max_copies"] >= 2
    kinds = set(complex_.molecule_type.tolist())
    assert {PROTEIN, LIGAND} <= kinds
    assert kinds & {RNA, DNA}
    protein = complex_.molecule_type == PROTEIN
    assert (complex_.sym_id[protein] == 1).any(), "two copies of a protein"
    assert (complex_.ref_element == 12).any(), "an ion"
    assert not len(complex_.notes)
    sizes = check_features(sample_features(complex_, SampleConfig(size), 0, 0, 0))
    assert sizes["S"] == 64


def test_statistics_of_384_tokens():
    complexes = [synthetic_complex(384, seed=seed, msa_depth=1000) for seed in range(4)]
    counts = [describe(complex_) for complex_ in complexes]
    assert all(7.5 <= count["atoms_per_token"] <= 8.4 for count in counts)
    resolved = np.mean([count["resolved_atoms"] / count["atoms"] for count in counts])
    assert 0.92 <= resolved <= 0.98
    for complex_ in complexes:
        assert 0.006 <= (complex_.msa_deletions > 0).mean() <= 0.016
        assert 20 <= complex_.msa_deletions.max() <= 135
        assert len(complex_.msa_rows) == 1000
        assert len(complex_.template_entity) >= 4


def test_bonds_have_the_right_length():
    complex_ = synthetic_complex(200, seed=2, msa_depth=4, templates=0)
    names = ["".join(chr(code + 32) for code in row).strip() for row in complex_.ref_atom_name]
    whole = complex_.resolved
    lengths = {("N", "CA"): 1.458, ("CA", "C"): 1.525, ("C", "O"): 1.231}
    protein = np.flatnonzero((complex_.molecule_type == PROTEIN) & (np.diff(complex_.token_atoms) > 1))
    peptide = []
    for token in protein:
        atoms = range(complex_.token_atoms[token], complex_.token_atoms[token + 1])
        at = {names[atom]: atom for atom in atoms if whole[atom]}
        for (a, b), length in lengths.items():
            if a in at and b in at:
                assert (
                    abs(np.linalg.norm(complex_.positions[at[a]] - complex_.positions[at[b]]) - length) < 0.02
                )
        following = token + 1
        if following in protein and complex_.asym_id[following] == complex_.asym_id[token] and "C" in at:
            first = complex_.token_atoms[following]
            if whole[first] and names[first] == "N":
                peptide.append(np.linalg.norm(complex_.positions[at["C"]] - complex_.positions[first]))
    assert len(peptide) > 100
    np.testing.assert_allclose(peptide, 1.329, atol=0.01)


def test_few_atoms_overlap():
    complex_ = synthetic_complex(200, seed=3, msa_depth=4, templates=0)
    points = complex_.positions[complex_.resolved]
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (distance.min(axis=1) < 1.0).mean() < 0.02
    assert (distance.min(axis=1) > 2.0).mean() < 0.02


def test_nucleotides_are_linked():
    complex_ = synthetic_complex(384, seed=1, msa_depth=4, templates=0)
    names = np.array(["".join(chr(code + 32) for code in row).strip() for row in complex_.ref_atom_name])
    nucleic = np.isin(complex_.molecule_type[complex_.atom_token], (RNA, DNA))
    o3, p = (np.flatnonzero(nucleic & (names == name) & complex_.resolved) for name in ("O3'", "P"))
    lengths = []
    for atom in o3:
        after = p[complex_.atom_token[p] == complex_.atom_token[atom] + 1]
        if (
            len(after)
            and complex_.asym_id[complex_.atom_token[after[0]]] == complex_.asym_id[complex_.atom_token[atom]]
        ):
            lengths.append(np.linalg.norm(complex_.positions[atom] - complex_.positions[after[0]]))
    assert len(lengths) > 10
    np.testing.assert_allclose(lengths, 1.607, atol=0.02)


def test_seeded():
    first, again, other = (synthetic_complex(64, seed=seed, msa_depth=32) for seed in (5, 5, 6))
    assert first.content_hash == again.content_hash != other.content_hash


def test_fast():
    synthetic_complex(16)
    begin = time.perf_counter()
    synthetic_complex(384, seed=0, msa_depth=1024)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(("size", "depth", "templates"), [(15, 4, 0), (64, 0, 0), (64, 4, -1)])
def test_impossible(size, depth, templates):
    with pytest.raises(UserError):
        synthetic_complex(size, msa_depth=depth, templates=templates)
