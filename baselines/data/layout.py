"""Atoms of a residue as AF3 lays them out, and the tokens they make.

A residue contributes every heavy atom of its dictionary entry, observed or not, except leaving atoms
where it is bonded to another residue (OXT inside a protein chain, OP3 inside a nucleic acid).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from baselines.data.ccd import STANDARD_RESIDUES, Component, atomic_number, component
from baselines.data.schema import DNA, LIGAND, PROTEIN, RNA
from baselines.data.structure import Chain, Residue
from baselines.data.symmetry import automorphisms

PLACEHOLDERS = {PROTEIN: "UNK", RNA: "N", DNA: "DN"}
"""What an unobserved residue is laid out as when the dictionary does not know its name."""

_LINK_ATOMS = {PROTEIN: ("N", "C"), RNA: ("P", "O3'"), DNA: ("P", "O3'")}
_FRAMES = {PROTEIN: ("N", "CA", "C"), RNA: ("C1'", "C3'", "C4'"), DNA: ("C1'", "C3'", "C4'")}
_PURINES = frozenset({"A", "G", "DA", "DG"})
_PYRIMIDINES = frozenset({"C", "U", "DC", "DT"})


@dataclass(frozen=True)
class ResidueLayout:
    """Atoms of one residue and what follows from them; indices are within the residue."""

    atom_names: tuple[str, ...]
    name_codes: np.ndarray
    """``ord(c) - 32`` of the padded names, uint8 [n, 4]."""
    elements: np.ndarray
    charges: np.ndarray
    conformer: np.ndarray
    bonds: np.ndarray
    permutations: np.ndarray
    """Symmetries, int32 [p, n]."""
    one_token: bool
    representative: np.ndarray
    """Representative atom of each token, int32 [t]."""
    center: np.ndarray
    frames: np.ndarray
    """Frame atoms of each token, int32 [t, 3]; -1 where there is no frame."""


def link_atoms(kind: int) -> tuple[str, str]:
    """Names of the atoms by which a polymer residue is bonded to the previous and to the next one."""
    return _LINK_ATOMS[kind]


def bonded_atoms(chain: Chain, index: int, linked: set[str]) -> frozenset[str]:
    """Atoms of residue `index` that are bonded to other residues; `linked` are those of explicit links."""
    names = set(linked)
    if chain.kind != LIGAND:
        first, last = link_atoms(chain.kind)
        if index > 0:
            names.add(first)
        if index + 1 < len(chain.residues):
            names.add(last)
    return frozenset(names)


def lay_out(residue: Residue, kind: int, bonded: frozenset[str]) -> ResidueLayout:
    """The layout of a residue of a molecule of `kind` whose atoms `bonded` are bonded to other residues."""
    known = component(residue.name)
    if known is None and not residue.positions:
        known = component(PLACEHOLDERS[kind])
    if known is None:
        return _layout(_observed_component(residue), kind, frozenset(), bonded)
    dropped = _leaving(known, bonded)
    if kind == LIGAND:
        dropped -= frozenset(residue.positions)
    return _cached_layout(known.name, kind, dropped, bonded)


def _leaving(known: Component, bonded: frozenset[str]) -> frozenset[str]:
    names = known.atom_names
    pairs = {(names[a], names[b]) for a, b in known.bonds.tolist()}
    pairs |= {(b, a) for a, b in pairs}
    return frozenset(
        name
        for name, leaves in zip(names, known.leaving, strict=True)
        if leaves and name not in bonded and any((name, other) in pairs for other in bonded)
    )


def _observed_component(residue: Residue) -> Component:
    """A component the dictionary does not have: observed atoms, no bonds, no conformer."""
    names = tuple(residue.positions)
    elements = [atomic_number(residue.elements.get(name, "")) for name in names]
    return Component(
        name=residue.name,
        atom_names=names,
        elements=np.array(elements, np.uint8),
        charges=np.zeros(len(names), np.float32),
        leaving=np.zeros(len(names), bool),
        positions=np.zeros((len(names), 3), np.float32),
        bonds=np.zeros((0, 2), np.int32),
        kind=LIGAND,
        letter="X",
        conformer="none",
    )


@lru_cache(maxsize=16384)
def _cached_layout(name: str, kind: int, dropped: frozenset[str], bonded: frozenset[str]) -> ResidueLayout:
    known = component(name)
    assert known is not None, name
    return _layout(known, kind, dropped, bonded)


def _layout(known: Component, kind: int, dropped: frozenset[str], bonded: frozenset[str]) -> ResidueLayout:
    kept = np.array([name not in dropped for name in known.atom_names])
    new_index = np.cumsum(kept) - 1
    names = tuple(name for name, keep in zip(known.atom_names, kept, strict=True) if keep)
    bonds = known.bonds[kept[known.bonds].all(axis=1)] if len(known.bonds) else known.bonds
    bonds = new_index[bonds].astype(np.int32)
    positions = known.positions[kept]
    anchored = np.array([name in bonded for name in names])
    one_token = kind != LIGAND and known.name in STANDARD_RESIDUES
    if one_token:
        representative, center, frames = _residue_token(known.name, kind, names)
    else:
        representative = center = np.arange(len(names), dtype=np.int32)
        frames = _atom_frames(positions, known.conformer != "none")
    return ResidueLayout(
        atom_names=names,
        name_codes=np.stack([_name_code(name) for name in names]),
        elements=known.elements[kept],
        charges=known.charges[kept],
        conformer=positions,
        bonds=bonds,
        permutations=automorphisms(known.elements[kept], bonds, anchored, positions),
        one_token=one_token,
        representative=representative,
        center=center,
        frames=frames,
    )


def _name_code(name: str) -> np.ndarray:
    return np.frombuffer(name.upper().ljust(4)[:4].encode("ascii", "replace"), np.uint8) - 32


def _residue_token(name: str, kind: int, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    position = {atom: index for index, atom in enumerate(names)}
    if kind == PROTEIN:
        center = "CA"
        representative = "CB" if "CB" in position and name != "GLY" else "CA"
    else:
        center = "C1'"
        representative = "C4" if name in _PURINES else "C2" if name in _PYRIMIDINES else "C1'"
    frame = [position.get(atom, -1) for atom in _FRAMES[kind]]
    return (
        np.array([position.get(representative, 0)], np.int32),
        np.array([position.get(center, 0)], np.int32),
        np.array([frame if min(frame) >= 0 else [-1] * 3], np.int32),
    )


def _atom_frames(positions: np.ndarray, has_conformer: bool) -> np.ndarray:
    """For each atom: its nearest neighbour, itself, its second nearest, by the reference conformer."""
    size = len(positions)
    if size < 3 or not has_conformer:
        return np.full((size, 3), -1, np.int32)
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")
    return np.stack([nearest[:, 0], np.arange(size), nearest[:, 1]], axis=1).astype(np.int32)
