"""The features of one training sample: names, dimensions, types, meanings.

Features are *compact*: integers where AF3 writes one-hots, coordinates where it writes distograms,
edge lists where it writes N×N masks. The model expands them on the device. Nothing is batched; a
sample is one crop.

Dimensions: N tokens · A atoms, padded to a multiple of 32 (the atom attention window) · S alignment
rows · T templates · E bonds · K copies of the most frequent entity · P atom permutations.
Masks are boolean, True = keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

ATOM_WINDOW = 32
"""Atoms are padded to a multiple of the query window of atom attention."""

MAX_ATOMS_PER_TOKEN = 24
"""Atoms of the largest standard residue as AF3 lays them out."""

PROTEIN, RNA, DNA, LIGAND = range(4)
"""Values of ``molecule_type``. Ions count as ligands."""

RESTYPES: tuple[str, ...] = (
    *("ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL UNK").split(),
    "-",
    *("A G C U DA DG DC DT N").split(),
)
"""The 31 residue types of the released AF3: 20 amino acids, unknown, gap, 4 RNA, 4 DNA, unknown base."""

UNKNOWN_AMINO_ACID, GAP, UNKNOWN_BASE = 20, 21, 30
NUM_RESTYPES = len(RESTYPES)
NUM_MSA_CLASSES = NUM_RESTYPES + 1


@dataclass(frozen=True)
class Feature:
    """One feature: symbolic or literal dimensions, element type, meaning."""

    dims: tuple[str | int, ...]
    dtype: torch.dtype
    meaning: str


FEATURES: dict[str, Feature] = {
    # tokens
    "restype": Feature(("N",), torch.uint8, "index into RESTYPES"),
    "molecule_type": Feature(("N",), torch.uint8, "PROTEIN, RNA, DNA or LIGAND"),
    "residue_index": Feature(("N",), torch.int32, "residue number within the chain, from 1"),
    "token_index": Feature(("N",), torch.int32, "token number within the complex before cropping"),
    "asym_id": Feature(("N",), torch.int32, "chain instance, from 0, unique in the complex"),
    "entity_id": Feature(("N",), torch.int32, "distinct sequence or molecule, from 0"),
    "sym_id": Feature(("N",), torch.int32, "copy of the entity the chain is, from 0"),
    "token_bonds": Feature(
        ("E", 2), torch.int64, "bonded token pairs (i < j) that AF3 encodes: within and to ligands"
    ),
    "representative_atom": Feature(
        ("N",),
        torch.int64,
        "atom of the distogram: CB (CA in glycine), C4 or C2 of the base, the atom itself",
    ),
    "center_atom": Feature(("N",), torch.int64, "CA, C1' or the atom itself"),
    "frame_atoms": Feature(("N", 3), torch.int64, "the three atoms of the token's frame, origin second"),
    "frame_mask": Feature(("N",), torch.bool, "the frame exists, is resolved and is not degenerate"),
    # atoms
    "atom_mask": Feature(("A",), torch.bool, "False on padding"),
    "atom_to_token": Feature(("A",), torch.int64, "token of the atom; padding points at the last token"),
    "atom_within_token": Feature(("A",), torch.uint8, "position of the atom in its token, < 24"),
    "ref_pos": Feature(
        ("A", 3), torch.float32, "reference conformer in Å, randomly rotated and translated per ref_space_uid"
    ),
    "ref_element": Feature(("A",), torch.uint8, "atomic number, < 128"),
    "ref_charge": Feature(("A",), torch.float32, "formal charge in e"),
    "ref_atom_name": Feature(("A", 4), torch.uint8, "ord(c) - 32 of the padded atom name, < 64"),
    "ref_space_uid": Feature(
        ("A",), torch.int32, "residue or ligand instance whose conformer the atom belongs to"
    ),
    # alignment
    "msa": Feature(("S", "N"), torch.uint8, "index into RESTYPES; row 0 is the query"),
    "msa_deletions": Feature(("S", "N"), torch.uint8, "residues deleted before this column, capped at 255"),
    "msa_mask": Feature(("S", "N"), torch.bool, "False where the row has no sequence for the token's chain"),
    "profile": Feature(
        ("N", NUM_RESTYPES), torch.float32, "frequencies of residue types over the full alignment"
    ),
    "deletion_mean": Feature(("N",), torch.float32, "mean deletion count over the full alignment"),
    # templates
    "template_restype": Feature(
        ("T", "N"), torch.uint8, "residue type of the aligned template residue, GAP if none"
    ),
    "template_positions": Feature(("T", "N", 4, 3), torch.float32, "N, CA, C, CB (CA in glycine) in Å"),
    "template_mask": Feature(("T", "N", 4), torch.bool, "the atom is resolved in the template"),
    # labels
    "label_positions": Feature(
        ("K", "A", 3), torch.float32, "Å; row k is the atom's counterpart in the copy with sym_id k"
    ),
    "label_mask": Feature(("K", "A"), torch.bool, "the counterpart exists and is resolved"),
    "atom_permutations": Feature(
        ("P", "A"),
        torch.int64,
        "atom taking a's place under a symmetry of its residue; row 0 is the identity",
    ),
    "resolution": Feature((), torch.float32, "Å; NaN where the method has none"),
}


def check_features(features: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Raise `ValueError` at the first feature that is missing or has the wrong type or shape.

    Returns the size of each symbolic dimension.
    """
    sizes: dict[str, int] = {}
    for name, spec in FEATURES.items():
        if name not in features:
            raise ValueError(f"feature {name!r} is missing")
        value = features[name]
        if value.dtype != spec.dtype:
            raise ValueError(f"feature {name!r} has dtype {value.dtype}, expected {spec.dtype}")
        if value.ndim != len(spec.dims):
            raise ValueError(f"feature {name!r} has shape {tuple(value.shape)}, expected {spec.dims}")
        for size, dim in zip(value.shape, spec.dims, strict=True):
            expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            if size != expected:
                raise ValueError(f"feature {name!r} has {size} along {dim}, expected {expected}")
    if sizes["A"] % ATOM_WINDOW:
        raise ValueError(f"{sizes['A']} atoms are not a multiple of {ATOM_WINDOW}")
    return sizes
