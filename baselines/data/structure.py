"""A structure as it was found: chains, residues, observed heavy atoms, links. No chemistry is added.

Both parsed files and synthetic complexes become a `Structure`; everything after is common to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from baselines.data.ccd import component
from baselines.data.schema import LIGAND

XYZ = tuple[float, float, float]
AtomKey = tuple[str, int, str]
"""Chain name, position of the residue in the chain's residue list, atom name."""


@dataclass(frozen=True)
class Residue:
    """One residue or ligand, observed or not. Positions in Å by atom name."""

    number: int
    name: str
    positions: Mapping[str, XYZ] = field(default_factory=dict)
    elements: Mapping[str, str] = field(default_factory=dict)
    """Element symbols by atom name; used only for components the dictionary does not know."""


@dataclass(frozen=True)
class Chain:
    """A polymer (its whole sequence, resolved or not) or one non-polymer molecule."""

    name: str
    kind: int
    """PROTEIN, RNA, DNA or LIGAND."""
    residues: tuple[Residue, ...]

    @property
    def sequence(self) -> str:
        """One-letter codes of the residues; X where there is none."""
        letters = (component(residue.name) for residue in self.residues)
        return "".join("X" if entry is None else entry.letter for entry in letters)

    @property
    def is_polymer(self) -> bool:
        """Whether alignments and templates can apply."""
        return self.kind != LIGAND


@dataclass(frozen=True)
class Structure:
    """Chains in file order and the covalent links between residues that no polymer implies."""

    chains: tuple[Chain, ...]
    links: tuple[tuple[AtomKey, AtomKey], ...] = ()
    resolution: float = float("nan")
    """Å; NaN where the method has none."""
    notes: tuple[str, ...] = ()
