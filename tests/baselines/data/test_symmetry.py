"""Symmetries of residues and ligands."""

import numpy as np
import pytest

from baselines.data import SampleConfig, sample_features
from baselines.data.ccd import component
from baselines.data.symmetry import MAX_PERMUTATIONS, automorphisms


def symmetries(name, without=("OXT",), anchored=()):
    known = component(name)
    keep = np.array([atom not in without for atom in known.atom_names])
    new = np.cumsum(keep) - 1
    bonds = new[known.bonds[keep[known.bonds].all(axis=1)]]
    names = [atom for atom, kept in zip(known.atom_names, keep, strict=True) if kept]
    fixed = np.array([atom in anchored for atom in names])
    return (
        names,
        known.elements[keep],
        bonds,
        automorphisms(known.elements[keep], bonds, fixed, known.positions[keep]),
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ALA", 1),
        ("PHE", 2),
        ("TYR", 2),
        ("ASP", 2),
        ("GLU", 2),
        ("ARG", 2),
        ("VAL", 1),
        ("LEU", 1),
        ("ASN", 1),
        ("HIS", 1),
        ("TRP", 1),
        ("PRO", 1),
    ],
)
def test_amino_acids(name, count):
    assert len(symmetries(name)[3]) == count


def test_which_atoms_swap():
    names, _, _, permutations = symmetries("PHE")
    moved = {names[i] for i in np.flatnonzero(permutations[1] != permutations[0])}
    assert moved == {"CD1", "CD2", "CE1", "CE2"}


def test_phosphates():
    assert len(symmetries("SO4", ())[3]) == MAX_PERMUTATIONS
    assert len(symmetries("GNP", ())[3]) >= 6
    assert len(symmetries("DA", ("OP3",))[3]) == 1, "OP1 and OP2 are named by convention"


@pytest.mark.parametrize("name", ["HEM", "FAD", "ATP", "CIT", "NAG", "C60", "PG4", "CDL", "SF4"])
def test_ligands_map_bonds_to_bonds(name):
    _, elements, bonds, permutations = symmetries(name, ())
    graph = {frozenset(pair) for pair in bonds.tolist()}
    assert (permutations[0] == np.arange(len(elements))).all()
    assert len(permutations) <= MAX_PERMUTATIONS
    assert len(np.unique(permutations, axis=0)) == len(permutations)
    for permutation in permutations:
        assert {frozenset(permutation[list(pair)].tolist()) for pair in graph} == graph
        np.testing.assert_array_equal(elements[permutation], elements)


def test_an_anchored_atom_stays():
    names, _, _, permutations = symmetries("BEN" if component("BEN") else "PHE", (), ())
    assert len(permutations) > 1
    movable = names[int(np.flatnonzero(permutations[1] != permutations[0])[0])]
    _, _, _, fixed = symmetries("BEN" if component("BEN") else "PHE", (), (movable,))
    at = names.index(movable)
    assert (fixed[:, at] == at).all()


def test_samples_permute_within_residues(synthetic):
    for size in (60, 257):
        features = sample_features(synthetic, SampleConfig(size), 0, 0, 1)
        permutations, uid = features["atom_permutations"], features["ref_space_uid"]
        atoms = uid.numel()
        assert permutations[0].tolist() == list(range(atoms))
        assert (permutations.sort(dim=1).values == permutations[0]).all()
        assert (uid[permutations] == uid).all()
        assert (features["ref_element"][permutations] == features["ref_element"]).all()


def test_real_permutations_are_bond_automorphisms(real):
    complex_ = real["721p"]
    ligand = complex_.molecule_type[complex_.atom_token] == 3
    atoms = np.flatnonzero(ligand)
    graph = {frozenset(complex_.center_atom[pair].tolist()) for pair in complex_.token_bonds}
    inside = {pair for pair in graph if pair <= set(atoms.tolist())}
    assert len(complex_.permutations) > 1
    for permutation in complex_.permutations:
        assert {frozenset(permutation[list(pair)].tolist()) for pair in inside} == inside
