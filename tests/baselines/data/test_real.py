"""Real structures: counts, ids, sequences, bonds, templates, and bad input."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from baselines.data import InputSpec, SampleConfig, describe, load_complex, load_folder, sample_features
from baselines.data.schema import DNA, LIGAND, PROTEIN, check_features
from megafold_bench.errors import UserError


# The dictionary gives 209d four atoms that the structure lacks (two sarcosines, two methylvalines), and
# terminal and unresolved side-chain atoms elsewhere: AF3 lays them all out, masked.
@pytest.mark.parametrize(
    ("name", "tokens", "resolved_tokens", "resolved_atoms"),
    [("209d", 82, 78, 408), ("721p", 398, 398, 2708), ("7a4d", 547, 547, 4155)],
)
def test_token_and_atom_counts(real, name, tokens, resolved_tokens, resolved_atoms):
    counts = describe(real[name])
    assert counts["tokens"] == tokens
    assert counts["resolved_tokens"] == resolved_tokens
    assert counts["resolved_atoms"] == resolved_atoms
    assert counts["atoms"] >= resolved_atoms


def test_chains_and_copies_of_721p(real):
    complex_ = real["721p"]
    assert complex_.chain_names.tolist() == ["A", "B", "A:MG167", "A:GNP168", "B:MG167", "B:GNP168"]
    first = np.unique(complex_.asym_id, return_index=True)[1]
    assert complex_.entity_id[first].tolist() == [0, 0, 1, 2, 1, 2]
    assert complex_.sym_id[first].tolist() == [0, 1, 0, 0, 1, 1]
    assert complex_.molecule_type[first].tolist() == [PROTEIN, PROTEIN, *[LIGAND] * 4]
    assert float(complex_.resolution) == 2.0


def test_one_alignment_serves_both_copies(real):
    complex_ = real["721p"]
    config = SampleConfig(398, max_msa_rows=64)
    features = sample_features(complex_, config, 0, 0, 0)
    a, b = (features["asym_id"] == chain for chain in (0, 1))
    assert (features["msa"][:, a] == features["msa"][:, b]).all()
    assert features["msa_mask"][:, a].all()
    assert not features["msa_mask"][1:, features["molecule_type"] == LIGAND].any()
    assert (features["msa"][0] == features["restype"]).all()


def test_template_is_the_chain_itself(real):
    complex_ = real["721p"]
    protein = complex_.molecule_type == PROTEIN
    assert len(complex_.template_entity) == 1
    assert (complex_.template_restype[0, protein] == complex_.restype[protein]).mean() > 0.95
    own = complex_.positions[complex_.center_atom]
    chain = complex_.asym_id == 0
    model = complex_.template_positions[0, chain, 1]
    distance = lambda points: np.linalg.norm(points[:, None] - points[None], axis=-1)  # noqa: E731
    assert np.median(np.abs(distance(own[chain]) - distance(model))) < 1.0


def test_dna_and_modified_residues_of_209d(real):
    complex_ = real["209d"]
    dna = complex_.molecule_type == DNA
    assert dna.sum() == 16
    assert np.diff(complex_.token_atoms)[dna].min() >= 19
    assert (np.diff(complex_.token_atoms)[~dna] == 1).sum() == 62
    pairs = complex_.token_bonds
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert not (dna[pairs]).any()
    graph = np.zeros((82, 82), bool)
    graph[pairs[:, 0], pairs[:, 1]] = True
    degrees = (graph | graph.T).sum(axis=1)
    assert (degrees[~dna] > 0).all(), "the peptide and its rings hang together"


def test_caps_of_7a4d_are_bonded(real):
    complex_ = real["7a4d"]
    assert len(complex_.token_bonds) == 7  # 2 × (ACE: 2 within, 1 to LEU) + LEU–NH2
    nh2 = int(np.flatnonzero(complex_.molecule_type == LIGAND)[0])
    assert nh2 in complex_.token_bonds


def test_bond_lengths(real):
    for complex_ in real.values():
        single = (np.diff(complex_.token_atoms) == 1)[complex_.token_bonds].all(axis=1)
        ends = complex_.center_atom[complex_.token_bonds[single]]
        both = complex_.resolved[ends].all(axis=1)
        length = np.linalg.norm(np.diff(complex_.positions[ends[both]], axis=1)[:, 0], axis=-1)
        assert (length < 2.4).all()


def test_loading_is_deterministic(real, real_folder):
    assert load_folder(real_folder / "209d").content_hash == real["209d"].content_hash
    assert real["721p"].content_hash != real["7a4d"].content_hash


def test_a_384_token_crop_of_7a4d(real):
    sizes = check_features(sample_features(real["7a4d"], SampleConfig(384, max_msa_rows=1024), 0, 0, 0))
    assert sizes["N"] == 384
    assert sizes["S"] == 1024
    assert sizes["K"] <= 2


def _text(real_folder, name="209d"):
    return gzip.decompress((real_folder / name / f"{name}-assembly1.cif.gz").read_bytes()).decode()


@pytest.mark.parametrize("fraction", [0.2, 0.6, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("at_line_end", [True, False])
def test_truncated_mmcif(real_folder, tmp_path, fraction, at_line_end):
    text = _text(real_folder)
    cut = int(len(text) * fraction)
    cut = text.index("\n", cut) + 1 if at_line_end else text.index(" ", text.index("\n", cut)) + 1
    path = tmp_path / "cut.cif"
    path.write_text(text[:cut])
    with pytest.raises(UserError, match=r"cut\.cif") as error:
        load_complex(InputSpec(path))
    assert "\n" not in str(error.value)


def test_truncated_gzip(real_folder, tmp_path):
    path = tmp_path / "cut.cif.gz"
    path.write_bytes((real_folder / "209d" / "209d-assembly1.cif.gz").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged gzip"):
        load_complex(InputSpec(path))


def test_chains_are_checked(real_folder):
    structure = real_folder / "721p" / "721p-assembly1.cif.gz"
    alignment = real_folder / "721p" / "msa_A.a3m.gz"
    with pytest.raises(UserError, match="unknown chain 'Z' for an alignment: choose from A, B"):
        load_complex(InputSpec(structure, {"Z": alignment}))
    with pytest.raises(UserError, match="'A:MG167' is a ligand"):
        load_complex(InputSpec(structure, {"A:MG167": alignment}))
    with pytest.raises(UserError, match="query of 118 residues, chain 'A' has 166"):
        load_complex(InputSpec(structure, {"A": real_folder / "7a4d" / "msa_A.a3m.gz"}))
    with pytest.raises(UserError, match="does not resemble chain 'E'"):
        load_complex(
            InputSpec(real_folder / "7a4d" / "7a4d-assembly1.cif.gz", {}, {"E": (_template(real_folder),)})
        )


def _template(real_folder) -> Path:
    return real_folder / "721p" / "template_AF-P01112-F1-model_v4.cif.gz"


def test_crop_longer_than_the_complex(real):
    with pytest.raises(
        UserError, match=r"crop of 100 tokens is longer than the complex \(82 tokens\): ask for at most 82"
    ):
        sample_features(real["209d"], SampleConfig(100), 0, 0, 0)
