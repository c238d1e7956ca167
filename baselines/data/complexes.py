"""A complex: everything about a structure that does not depend on the crop or on chance.

`build_complex` is the deterministic half of the data pipeline. A `Complex` holds flat arrays only, so
that it can be stored and memory-mapped as it is; `baselines.data.sampling` draws training samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from baselines.data import msa
from baselines.data.a3m import Alignment
from baselines.data.assembly import AtomTable, TokenTable, lay_out_atoms, lay_out_tokens
from baselines.data.schema import GAP, LIGAND, NUM_RESTYPES
from baselines.data.structure import Structure
from baselines.data.templates import Template

SCHEMA_VERSION = 1
"""Changes whenever the meaning of a `Complex` field does."""


@dataclass(frozen=True)
class Complex:
    """An uncropped, featurised complex.

    N tokens, A atoms (not padded), C chains, M entities, K copies of the most frequent entity, B atoms
    of all entities together, P permutations, E bonds, S merged alignment rows, T templates.
    """

    restype: np.ndarray
    """Index into RESTYPES, uint8 [N]."""
    molecule_type: np.ndarray
    """PROTEIN, RNA, DNA or LIGAND, uint8 [N]."""
    residue_index: np.ndarray
    """Residue number within the chain, int32 [N]."""
    residue_ordinal: np.ndarray
    """Position of the residue in the chain, from 0: the column of its alignment, int32 [N]."""
    asym_id: np.ndarray
    """Chain, int32 [N]."""
    entity_id: np.ndarray
    sym_id: np.ndarray
    token_atoms: np.ndarray
    """First atom of each token and the number of atoms, int32 [N + 1]."""
    representative_atom: np.ndarray
    """int32 [N]."""
    center_atom: np.ndarray
    """int32 [N]."""
    frame_atoms: np.ndarray
    """int32 [N, 3]; where there is no frame, the token's centre three times."""
    frame_mask: np.ndarray
    """bool [N]."""
    interface: np.ndarray
    """The centre is resolved and within 15 Å of another chain's, bool [N]."""
    token_bonds: np.ndarray
    """int32 [E, 2], i < j."""
    atom_token: np.ndarray
    """int32 [A]."""
    atom_residue: np.ndarray
    """Residue or ligand instance, int32 [A]."""
    positions: np.ndarray
    """Å, float32 [A, 3]; 0 where unresolved."""
    resolved: np.ndarray
    """bool [A]."""
    ref_pos: np.ndarray
    """Reference conformers as the dictionary has them, Å, float32 [A, 3]."""
    ref_element: np.ndarray
    """uint8 [A]."""
    ref_charge: np.ndarray
    """float32 [A]."""
    ref_atom_name: np.ndarray
    """uint8 [A, 4]."""
    entity_atom: np.ndarray
    """Number of the atom among the atoms of all entities, int32 [A]."""
    copies: np.ndarray
    """Atom of copy k, -1 where it has none, int32 [K, B]."""
    permutations: np.ndarray
    """Symmetries of each residue, the identity beyond its last, int32 [P, A]."""
    msa_rows: np.ndarray
    """Row of every entity's alignment in merged row s, -1 for none, int32 [S, M]."""
    msa_residues: np.ndarray
    """All alignments, row after row, uint8 flat."""
    msa_deletions: np.ndarray
    """uint8 flat."""
    msa_starts: np.ndarray
    """Start of each entity's alignment in the flat arrays, int64 [M + 1]."""
    msa_widths: np.ndarray
    """Residues of each entity, int32 [M]."""
    profile: np.ndarray
    """float32 [N, 31]."""
    deletion_mean: np.ndarray
    """float32 [N]."""
    template_entity: np.ndarray
    """Entity each template belongs to, int32 [T]."""
    template_restype: np.ndarray
    """uint8 [T, N]."""
    template_positions: np.ndarray
    """N, CA, C, CB in Å, float32 [T, N, 4, 3]."""
    template_mask: np.ndarray
    """bool [T, N, 4]."""
    resolution: np.ndarray
    """Å, float32 []; NaN where the method has none."""
    chain_names: np.ndarray
    """text [C]."""
    notes: np.ndarray
    """What the input lacked and what was done about it, text."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return len(self.restype)

    @property
    def n_atoms(self) -> int:
        """Number of heavy atoms, resolved or not."""
        return len(self.atom_token)

    @property
    def content_hash(self) -> str:
        """SHA-256 over every array and the schema version: equal complexes have equal hashes."""
        digest = hashlib.sha256(f"complex {SCHEMA_VERSION}".encode())
        for item in fields(self):
            array = np.ascontiguousarray(getattr(self, item.name))
            digest.update(f"{item.name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def build_complex(
    structure: Structure,
    alignments: Mapping[str, Alignment] | None = None,
    templates: Sequence[tuple[str, Template]] = (),
) -> Complex:
    """Featurise a structure with alignments by chain name and templates as (chain name, template).

    An alignment or template of one chain serves every chain of its entity. Deterministic.
    """
    atoms = lay_out_atoms(structure)
    tokens = lay_out_tokens(atoms)
    by_entity: dict[int, Alignment] = {}
    unused = []
    for name, alignment in sorted((alignments or {}).items()):
        first = by_entity.setdefault(atoms.entity_of_chain[name], alignment)
        if not np.array_equal(first.rows, alignment.rows):
            unused.append(f"the alignment of chain {name} is not used: an earlier chain has its sequence")
    return Complex(
        **tokens.arrays,
        **atoms.arrays,
        **_alignment_arrays(by_entity, atoms, tokens),
        **_template_arrays(templates, atoms, tokens),
        resolution=np.array(structure.resolution, np.float32),
        chain_names=np.array([chain.name for chain in structure.chains]),
        notes=np.array((*structure.notes, *atoms.notes, *unused), np.str_),
    )


def _alignment_arrays(
    by_entity: Mapping[int, Alignment], atoms: AtomTable, tokens: TokenTable
) -> dict[str, np.ndarray]:
    restypes = atoms.entity_restypes
    complete = [by_entity.get(entity) or msa.query_alone(listed) for entity, listed in enumerate(restypes)]
    residues, deletions, starts, widths = msa.flatten(complete)
    n_tokens = len(tokens.arrays["restype"])
    profile = np.zeros((n_tokens, NUM_RESTYPES), np.float32)
    deletion_mean = np.zeros(n_tokens, np.float32)
    entity_of_token, column = tokens.arrays["entity_id"], tokens.arrays["residue_ordinal"]
    for entity, alignment in enumerate(complete):
        frequencies, means = msa.profile(alignment)
        mine = entity_of_token == entity
        profile[mine] = frequencies[column[mine]]
        deletion_mean[mine] = means[column[mine]]
    return {
        "msa_rows": msa.merge_rows(by_entity, len(complete)),
        "msa_residues": residues,
        "msa_deletions": deletions,
        "msa_starts": starts,
        "msa_widths": widths,
        "profile": profile,
        "deletion_mean": deletion_mean,
    }


def _template_arrays(
    templates: Sequence[tuple[str, Template]], atoms: AtomTable, tokens: TokenTable
) -> dict[str, np.ndarray]:
    entity_of_token, column = tokens.arrays["entity_id"], tokens.arrays["residue_ordinal"]
    n_tokens, count = len(column), len(templates)
    restype = np.full((count, n_tokens), GAP, np.uint8)
    positions = np.zeros((count, n_tokens, 4, 3), np.float32)
    mask = np.zeros((count, n_tokens, 4), bool)
    entities = np.zeros(count, np.int32)
    for index, (chain, template) in enumerate(templates):
        entities[index] = atoms.entity_of_chain[chain]
        mine = (entity_of_token == entities[index]) & tokens.whole_residue
        restype[index, mine] = template.restype[column[mine]]
        positions[index, mine] = template.positions[column[mine]]
        mask[index, mine] = template.mask[column[mine]]
    return {
        "template_entity": entities,
        "template_restype": restype,
        "template_positions": positions,
        "template_mask": mask,
    }


def describe(complex_: Complex) -> dict[str, int | float]:
    """Counts for display: tokens, atoms, chains, alignment depth and the like."""
    n_chains = len(complex_.chain_names)
    kinds = {kind: int((complex_.molecule_type == kind).sum()) for kind in range(4)}
    has_resolved = np.zeros(complex_.n_tokens, bool)
    has_resolved[complex_.atom_token[complex_.resolved]] = True
    return {
        "tokens": complex_.n_tokens,
        "resolved_tokens": int(has_resolved.sum()),
        "protein_tokens": kinds[0],
        "rna_tokens": kinds[1],
        "dna_tokens": kinds[2],
        "ligand_tokens": kinds[LIGAND],
        "atoms": complex_.n_atoms,
        "resolved_atoms": int(complex_.resolved.sum()),
        "atoms_per_token": complex_.n_atoms / complex_.n_tokens,
        "chains": n_chains,
        "entities": len(complex_.msa_widths),
        "max_copies": len(complex_.copies),
        "msa_rows": len(complex_.msa_rows),
        "templates": len(complex_.template_entity),
        "token_bonds": len(complex_.token_bonds),
    }
