"""Template structures aligned to the sequence of a chain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baselines.data.ccd import AMINO_ACID_LETTERS, component
from baselines.data.mmcif import read_structure
from baselines.data.schema import GAP, PROTEIN
from baselines.data.structure import Chain
from megafold_bench.errors import UserError

MAX_TEMPLATES = 4
"""Templates kept per entity."""

MIN_IDENTITY = 0.25
MIN_ALIGNED = 10
"""A chain is a template if this many residues align, at this identity (fewer in shorter chains)."""

_BACKBONE = ("N", "CA", "C", "CB")


@dataclass(frozen=True)
class Template:
    """A template in the residue numbering of the chain it models."""

    restype: np.ndarray
    """Residue type of the aligned residue, GAP if none, uint8 [L]."""
    positions: np.ndarray
    """N, CA, C, CB (CA in glycine) in Å, float32 [L, 4, 3]."""
    mask: np.ndarray
    """bool [L, 4]."""
    identity: float
    """Identical residues over aligned residues."""


def align_template(target: str, template: Chain) -> Template | None:
    """Align the template chain to a protein sequence; None where they are not related.

    Global alignment, BLOSUM62, gap −10/−1, free end gaps.
    """
    import biotite.sequence as seq
    import biotite.sequence.align as align

    own = template.sequence
    letters = "".join(letter if letter in AMINO_ACID_LETTERS else "X" for letter in target)
    theirs = "".join(letter if letter in AMINO_ACID_LETTERS else "X" for letter in own)
    best = align.align_optimal(
        seq.ProteinSequence(letters),
        seq.ProteinSequence(theirs),
        align.SubstitutionMatrix.std_protein_matrix(),
        gap_penalty=(-10, -1),
        terminal_penalty=False,
        max_number=1,
    )[0]
    pairs = best.trace[(best.trace >= 0).all(axis=1)]
    identical = sum(letters[i] == theirs[j] for i, j in pairs)
    identity = identical / max(len(pairs), 1)
    if identity < MIN_IDENTITY or len(pairs) < min(MIN_ALIGNED, len(target)):
        return None
    return _transfer(len(target), template, pairs, identity)


def _transfer(length: int, template: Chain, pairs: np.ndarray, identity: float) -> Template:
    restype = np.full(length, GAP, np.uint8)
    positions = np.zeros((length, 4, 3), np.float32)
    mask = np.zeros((length, 4), bool)
    for target, source in pairs.tolist():
        residue = template.residues[source]
        known = component(residue.name)
        if known is None or known.kind != PROTEIN:
            continue
        restype[target] = known.restype
        for slot, name in enumerate(_BACKBONE):
            atom = "CA" if name == "CB" and known.name == "GLY" else name
            if atom in residue.positions:
                positions[target, slot] = residue.positions[atom]
                mask[target, slot] = True
    return Template(restype, positions, mask, identity)


def read_template(path: Path, target: Chain) -> Template | None:
    """The chain of a structure file that fits the target best; None where none is related.

    Raises `UserError` for an unreadable file and for one without protein.
    """
    candidates = [chain for chain in read_structure(path).chains if chain.kind == PROTEIN]
    if not candidates:
        raise UserError(f"template {str(path)!r} holds no protein chain: give a protein structure")
    aligned = [found for chain in candidates if (found := align_template(target.sequence, chain))]
    if not aligned:
        return None
    return max(aligned, key=lambda found: (found.identity * found.mask[:, 1].sum(), found.identity))
