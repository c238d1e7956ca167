"""The chemical component dictionary: heavy atoms, bonds and conformers of residues and ligands.

The dictionary is the one bundled with biotite; it is read (1–3 s) at the first component asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from baselines.data.schema import DNA, LIGAND, PROTEIN, RESTYPES, RNA, UNKNOWN_AMINO_ACID, UNKNOWN_BASE

WATERS = frozenset({"HOH", "DOD", "WAT", "H2O"})
HYDROGENS = frozenset({"H", "D", "T"})

AMINO_ACIDS = RESTYPES[:20]
AMINO_ACID_LETTERS = "ARNDCQEGHILKMFPSTWYV"
STANDARD_RESIDUES: dict[str, int] = {
    **{name: index for index, name in enumerate(RESTYPES) if len(name) > 1 or name in "AGCU"},
    "N": UNKNOWN_BASE,
    "DN": UNKNOWN_BASE,
}
"""Residues that AF3 makes one token of, with their index into RESTYPES."""

_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm "
    "Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr"
)
_ATOMIC_NUMBERS = {symbol.upper(): number for number, symbol in enumerate(_SYMBOLS.split(), start=1)}


@dataclass(frozen=True)
class Component:
    """Heavy atoms of a residue or ligand, in dictionary order. Coordinates are in Å."""

    name: str
    atom_names: tuple[str, ...]
    elements: np.ndarray
    """Atomic numbers, uint8 [n]."""
    charges: np.ndarray
    """Formal charges in e, float32 [n]."""
    leaving: np.ndarray
    """Atoms lost when the component is bonded to another, bool [n]."""
    positions: np.ndarray
    """One conformer, float32 [n, 3]; zeros where the dictionary has none."""
    bonds: np.ndarray
    """Bonded pairs, int32 [b, 2]."""
    kind: int
    """PROTEIN, RNA, DNA or LIGAND: the polymer the component can be part of."""
    letter: str
    """One-letter code of the component or the standard residue it derives from; ``X`` if none."""
    conformer: str
    """Where `positions` come from: ``ideal``, ``model`` or ``none``."""

    @property
    def restype(self) -> int:
        """Index into RESTYPES; derived residues count as their parent, ligands as unknown."""
        if self.name in STANDARD_RESIDUES:
            return STANDARD_RESIDUES[self.name]
        if self.kind == PROTEIN and self.letter in AMINO_ACID_LETTERS:
            return AMINO_ACID_LETTERS.index(self.letter)
        if self.kind == RNA and self.letter in "AGCU":
            return RESTYPES.index(self.letter)
        if self.kind == DNA and self.letter in "AGCT":
            return RESTYPES.index("D" + self.letter)
        return UNKNOWN_BASE if self.kind in (RNA, DNA) else UNKNOWN_AMINO_ACID


def atomic_number(symbol: str) -> int:
    """Atomic number of an element symbol in any case; 0 for an unknown one."""
    return _ATOMIC_NUMBERS.get(symbol.upper(), 0)


def _column(category: str, name: str, column: str) -> np.ndarray | None:
    from biotite.structure.info import get_from_ccd

    values = get_from_ccd(category, name, column)
    return None if values is None else values.as_array()


def _coordinates(name: str, pattern: str) -> np.ndarray:
    from biotite.structure.info import get_from_ccd

    columns = [get_from_ccd("chem_comp_atom", name, pattern.format(axis)) for axis in "xyz"]
    return np.stack([column.as_array(np.float32, np.nan) for column in columns], axis=1)


def _conformer(name: str, heavy: np.ndarray) -> tuple[np.ndarray, str]:
    sources = {"ideal": "pdbx_model_Cartn_{}_ideal", "model": "model_Cartn_{}"}
    for source, pattern in sources.items():
        positions = _coordinates(name, pattern)[heavy]
        if np.isfinite(positions).all():
            return positions, source
    return np.zeros((int(heavy.sum()), 3), np.float32), "none"


def _kind(chemical_type: str) -> int:
    chemical_type = chemical_type.upper()
    if "PEPTIDE" in chemical_type:
        return PROTEIN
    if "RNA" in chemical_type:
        return RNA
    if "DNA" in chemical_type:
        return DNA
    return LIGAND


def _bonds(name: str, position_of: dict[str, int]) -> np.ndarray:
    first = _column("chem_comp_bond", name, "atom_id_1")
    second = _column("chem_comp_bond", name, "atom_id_2")
    if first is None or second is None:
        return np.zeros((0, 2), np.int32)
    pairs = [
        (position_of[a], position_of[b])
        for a, b in zip(first, second, strict=True)
        if a in position_of and b in position_of
    ]
    return np.array(pairs, np.int32).reshape(-1, 2)


@lru_cache(maxsize=4096)
def component(name: str) -> Component | None:
    """The heavy atoms of component `name`, or None where the dictionary lists no atoms for it."""
    names = _column("chem_comp_atom", name, "atom_id")
    symbols = _column("chem_comp_atom", name, "type_symbol")
    charges = _column("chem_comp_atom", name, "charge")
    leaving = _column("chem_comp_atom", name, "pdbx_leaving_atom_flag")
    if names is None or symbols is None or charges is None or leaving is None:
        return None
    heavy = ~np.isin(symbols, tuple(HYDROGENS))
    if not heavy.any():
        return None
    atom_names = tuple(str(atom) for atom in names[heavy])
    positions, conformer = _conformer(name, heavy)
    chemical_type = _column("chem_comp", name, "type")
    letter = _column("chem_comp", name, "one_letter_code")
    letter_text = "" if letter is None else str(letter[0])
    return Component(
        name=name,
        atom_names=atom_names,
        elements=np.array([atomic_number(symbol) for symbol in symbols[heavy]], np.uint8),
        charges=np.array([_number(charge) for charge in charges[heavy]], np.float32),
        leaving=np.asarray(leaving[heavy] == "Y"),
        positions=positions,
        bonds=_bonds(name, {atom: index for index, atom in enumerate(atom_names)}),
        kind=LIGAND if chemical_type is None else _kind(str(chemical_type[0])),
        letter=letter_text if len(letter_text) == 1 and letter_text.isalpha() else "X",
        conformer=conformer,
    )


def _number(charge: object) -> float:
    text = str(charge)
    return 0.0 if text in ("?", ".", "") else float(text)
