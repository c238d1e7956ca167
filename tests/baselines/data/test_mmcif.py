"""Small structures written here: alternative locations, models, waters, unresolved residues, errors."""

import gzip

import numpy as np
import pytest

from baselines.data import InputSpec, describe, folder_spec, load_complex
from baselines.data.ccd import component
from baselines.data.mmcif import read_structure
from baselines.data.schema import LIGAND, PROTEIN, RESTYPES
from megafold_bench.errors import UserError

_NAMES = (
    "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id label_seq_id "
    "pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy auth_seq_id auth_asym_id pdbx_PDB_model_num"
)
COLUMNS = _NAMES.split()


def atoms_of(name, chain, number, shift, model=1, altloc=".", occupancy=1.0, skip=(), seq=None):
    known = component(name)
    rows = []
    for atom, element, xyz in zip(known.atom_names, known.atom_names, known.positions + shift, strict=True):
        if atom not in skip:
            quoted = f'"{atom}"' if "'" in atom else atom
            x, y, z = (f"{value:.3f}" for value in xyz)
            rows.append(
                f"ATOM 1 {'MG' if name == 'MG' else element[0]} {quoted} {altloc} {name} {chain} 1 {number if seq is None else seq} ? "
                f"{x} {y} {z} {occupancy} {number} {chain} {model}"
            )
    return rows


def write(path, rows, sequence=(), links=()):
    text = "data_test\n#\n"
    if sequence:
        text += "loop_\n_pdbx_poly_seq_scheme.asym_id\n_pdbx_poly_seq_scheme.seq_id\n_pdbx_poly_seq_scheme.mon_id\n"
        text += "".join(f"{chain} {number} {name}\n" for chain, number, name in sequence) + "#\n"
    if links:
        keys = "conn_type_id ptnr1_label_asym_id ptnr1_label_seq_id ptnr1_label_comp_id ptnr1_label_atom_id "
        keys += "ptnr2_label_asym_id ptnr2_label_seq_id ptnr2_label_comp_id ptnr2_label_atom_id ptnr1_auth_asym_id "
        keys += "ptnr1_auth_seq_id ptnr2_auth_asym_id ptnr2_auth_seq_id"
        text += (
            "loop_\n" + "".join(f"_struct_conn.{key}\n" for key in keys.split()) + "\n".join(links) + "\n#\n"
        )
    text += "loop_\n" + "".join(f"_atom_site.{column}\n" for column in COLUMNS) + "\n".join(rows) + "\n#\n"
    path.write_text(text)
    return path


def test_unresolved_residues_are_masked_tokens(tmp_path):
    sequence = [("A", 1, "ALA"), ("A", 2, "GLY"), ("A", 3, "SER")]
    rows = atoms_of("ALA", "A", 1, 0) + atoms_of("SER", "A", 3, 7)
    complex_ = load_complex(InputSpec(write(tmp_path / "x.cif", rows, sequence)))
    assert [RESTYPES[code] for code in complex_.restype] == ["ALA", "GLY", "SER"]
    assert complex_.resolved[complex_.center_atom].tolist() == [True, False, True]
    assert np.diff(complex_.token_atoms).tolist() == [5, 4, 7]  # OXT only at the end
    assert complex_.frame_mask.tolist() == [True, False, True]


def test_alternative_locations_models_waters_and_hydrogens(tmp_path):
    rows = atoms_of("ALA", "A", 1, 0, skip=("CB",))
    rows += ["ATOM 1 C CB A ALA A 1 1 ? 1 1 1 0.3 1 A 1", "ATOM 1 C CB B ALA A 1 1 ? 2 2 2 0.7 1 A 1"]
    rows += atoms_of("SER", "A", 2, 5)
    rows += ["ATOM 1 H HA . SER A 1 2 ? 3 3 3 1 2 A 1"]
    rows += ["HETATM 1 O O . HOH W 2 . ? 9 9 9 1 301 W 1"]
    rows += atoms_of("ALA", "A", 1, 50, model=2)
    structure = read_structure(write(tmp_path / "x.cif", rows))
    assert [chain.name for chain in structure.chains] == ["A"]
    assert structure.chains[0].residues[0].positions["CB"] == (2.0, 2.0, 2.0)
    assert len(structure.chains[0].residues) == 2
    assert "HA" not in structure.chains[0].residues[1].positions


def test_ligand_bonded_to_a_protein(tmp_path):
    rows = atoms_of("ASN", "A", 1, 0) + atoms_of("ALA", "A", 2, 4)
    near = component("ASN").positions[component("ASN").atom_names.index("ND2")]
    sugar = component("NAG")
    rows += atoms_of(
        "NAG",
        "B",
        1,
        near - sugar.positions[sugar.atom_names.index("C1")] + [1.4, 0, 0],
        skip=("O1",),
        seq=".",
    )
    link = "covale A 1 ASN ND2 B . NAG C1 A 1 B 1"
    complex_ = load_complex(InputSpec(write(tmp_path / "x.cif", rows, links=[link])))
    assert (complex_.molecule_type == LIGAND).sum() == 14, "O1 leaves"
    bonds = complex_.token_bonds.tolist()
    assert [0, 2] in bonds
    assert len(bonds) == 1 + 14, "one ring: as many bonds as atoms, and the link"


def test_modified_residue_and_ions(tmp_path):
    sequence = [("A", 1, "ALA"), ("A", 2, "MSE"), ("A", 3, "ALA")]
    rows = atoms_of("ALA", "A", 1, 0) + atoms_of("MSE", "A", 2, 0) + atoms_of("ALA", "A", 3, 0)
    rows += atoms_of("MG", "M", 201, 9, seq=".") + atoms_of("MG", "N", 202, 12, seq=".")
    complex_ = load_complex(InputSpec(write(tmp_path / "x.cif", rows, sequence)))
    counts = describe(complex_)
    assert counts["tokens"] == 2 + 8 + 2
    assert (complex_.molecule_type[1:9] == PROTEIN).all()
    assert {RESTYPES[code] for code in complex_.restype[1:9]} == {"MET"}
    assert complex_.sym_id[-2:].tolist() == [0, 1]
    assert complex_.ref_charge[-1] == 2
    assert not complex_.frame_mask[-2:].any()


def test_unknown_component_is_noted(tmp_path):
    rows = [f"HETATM 1 C C{i} . QQQ9 L 1 . ? {i} 0 0 1 1 L 1" for i in range(4)]
    complex_ = load_complex(
        InputSpec(write(tmp_path / "x.cif", rows + atoms_of("ALA", "A", 1, 20) + atoms_of("ALA", "A", 2, 25)))
    )
    assert any("QQQ9 is not in the component dictionary" in note for note in complex_.notes)
    assert describe(complex_)["ligand_tokens"] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete mmCIF"),
        (b"data_x\n#\n_entry.id x\n#\n", "holds no atoms"),
        (b"PDB text, not mmCIF\n", "not a complete mmCIF"),
        (b"\xff\xfe\x00\x01", "not a complete mmCIF"),
    ],
)
def test_no_structure(tmp_path, content, message):
    path = tmp_path / "x.cif"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_complex(InputSpec(path))


def test_only_water(tmp_path):
    with pytest.raises(UserError, match="no atoms besides water"):
        read_structure(write(tmp_path / "x.cif", ["HETATM 1 O O . HOH W 2 . ? 9 9 9 1 301 W 1"]))


def test_a_coordinate_that_is_no_number(tmp_path):
    with pytest.raises(UserError, match="is damaged"):
        read_structure(write(tmp_path / "x.cif", ["ATOM 1 C CA . ALA A 1 1 ? nine 9 9 1 1 A 1"]))


def test_missing_and_misnamed_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_structure(tmp_path / "none.cif")
    (tmp_path / "x.cif.gz").write_text("data_x")
    with pytest.raises(UserError, match="not a gzip file"):
        read_structure(tmp_path / "x.cif.gz")


def test_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        folder_spec(tmp_path / "none")
    with pytest.raises(UserError, match="exactly one structure, found none"):
        folder_spec(tmp_path)
    (tmp_path / "x.cif.gz").write_bytes(gzip.compress(b"data_x"))
    for name in ("msa_A.a3m", "msa_B-2.a3m.gz", "template_A_1abc.cif", "template_1abc.cif"):
        (tmp_path / name).write_text("")
    spec = folder_spec(tmp_path)
    assert spec.structure.name == "x.cif.gz"
    assert set(spec.msa) == {"A", "B-2"}
    assert [path.name for path in spec.templates["A"]] == ["template_A_1abc.cif"]
    assert [path.name for path in spec.shared_templates] == ["template_1abc.cif"]


def test_assembly_copies_and_entity_sequences(tmp_path):
    """``A-2`` has the sequence of ``A``; without a scheme it comes from the entity."""
    sequence = [("A", 1, "ALA"), ("A", 2, "GLY"), ("A", 3, "SER")]
    rows = [row for chain, shift in (("A", 0), ("A-2", 30)) for row in atoms_of("SER", chain, 3, shift)]
    complex_ = load_complex(InputSpec(write(tmp_path / "x.cif", rows, sequence)))
    assert complex_.chain_names.tolist() == ["A", "A-2"]
    assert complex_.sym_id.tolist() == [0, 0, 0, 1, 1, 1]
    path = write(tmp_path / "y.cif", atoms_of("SER", "A", 3, 0))
    listed = "loop_\n_entity_poly_seq.entity_id\n_entity_poly_seq.num\n_entity_poly_seq.mon_id\n1 1 ALA\n1 2 GLY\n1 3 SER\n#\n"
    asym = "_struct_asym.id A\n_struct_asym.entity_id 1\n#\n"
    path.write_text(path.read_text().replace("data_test\n#\n", "data_test\n#\n" + listed + asym))
    assert read_structure(path).chains[0].sequence == "AGS"


def test_ligands_of_one_chain_are_molecules_of_their_own(tmp_path):
    rows = [*atoms_of("ALA", "A", 1, 0), *atoms_of("ALA", "A", 2, 4)]
    rows += [*atoms_of("MG", "I", 1, 20, seq="."), *atoms_of("MG", "I", 2, 30, seq=".")]
    names = [chain.name for chain in read_structure(write(tmp_path / "x.cif", rows)).chains]
    assert names == ["A", "I:MG1", "I:MG2"]


def test_binary_cif(tmp_path):
    from biotite.structure.io.pdbx import BinaryCIFBlock, BinaryCIFCategory, BinaryCIFFile, CIFFile

    path = write(tmp_path / "x.cif", [*atoms_of("ALA", "A", 1, 0), *atoms_of("GLY", "A", 2, 4)])
    site = CIFFile.read(path).block["atom_site"]
    columns = {name: site[name].as_array(float if name.startswith("Cartn") else str) for name in site}
    binary = BinaryCIFFile({"x": BinaryCIFBlock({"atom_site": BinaryCIFCategory(columns)})})
    binary.write(tmp_path / "x.bcif")
    (tmp_path / "x.bcif.gz").write_bytes(gzip.compress((tmp_path / "x.bcif").read_bytes()))
    hashes = {
        load_complex(InputSpec(tmp_path / name)).content_hash for name in ("x.cif", "x.bcif", "x.bcif.gz")
    }
    assert len(hashes) == 1


def test_two_alignments_of_one_sequence_are_noted(tmp_path):
    rows = [
        row
        for chain, at in (("A", 0), ("B", 30))
        for n in (1, 2)
        for row in atoms_of("ALA", chain, n, at + 4 * n)
    ]
    structure = write(tmp_path / "x.cif", rows)
    (tmp_path / "a.a3m").write_text(">q\nAA\n>r\nAC\n")
    (tmp_path / "b.a3m").write_text(">q\nAA\n>r\nAD\n")
    complex_ = load_complex(InputSpec(structure, {"A": tmp_path / "a.a3m", "B": tmp_path / "b.a3m"}))
    assert "the alignment of chain B is not used" in complex_.notes[0]
    assert len(complex_.msa_rows) == 2
