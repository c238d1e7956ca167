"""Which chains a synthetic complex of N tokens has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from baselines.data.ccd import AMINO_ACIDS, component
from baselines.data.schema import DNA, LIGAND, PROTEIN, RNA

MIN_TOKENS = 16

_NUCLEIC_SHARE = 0.07
_ATOMS_PER_TOKEN = 8.0  # between proteins alone (7.8) and proteins with DNA (8.4)
_COMPOSITIONS = 64  # drawn, of which the one with the fitting size is taken
_LIGAND_SHARE = 0.06
_MODIFIED_FROM = 192  # tokens
_PROTEIN_GROUP = 900  # tokens of two copies of one protein and one of another
_NUCLEIC_LENGTH = 60
_LIGANDS = ("FAD", "HEM", "NAD", "GNP", "ATP", "ADP", "AMP", "NAG", "CIT", "GOL", "EDO")
_MODIFIED = ("SEP", "TPO", "MSE", "PTR")
_FREQUENCIES = (
    *(0.0826, 0.0553, 0.0406, 0.0546, 0.0137, 0.0393, 0.0672, 0.0707, 0.0227, 0.0591),
    *(0.0965, 0.0580, 0.0241, 0.0386, 0.0474, 0.0665, 0.0536, 0.0110, 0.0292, 0.0693),
)  # UniProtKB/Swiss-Prot composition, in the order of RESTYPES


@dataclass(frozen=True)
class ChainPlan:
    """The residues of one chain."""

    kind: int
    residues: tuple[str, ...]


def _atoms(name: str) -> int:
    known = component(name)
    if known is None:
        raise LookupError(f"component {name} is missing from the dictionary bundled with biotite")
    return len(known.atom_names)


def plan_chains(n_tokens: int, rng: np.random.Generator) -> list[ChainPlan]:
    """Chains of exactly `n_tokens` tokens: copies of proteins, nucleic acids, ligands, ions."""
    ions = max(1, n_tokens // 400)
    ligands = _ligands(max(4, int(_LIGAND_SHARE * n_tokens)), rng)
    used = ions + sum(_atoms(name) for name in ligands)
    nucleic = max(3, round(_NUCLEIC_SHARE * n_tokens))
    groups = _protein_groups(n_tokens - used - nucleic)
    nucleic += n_tokens - used - nucleic - sum(2 * pair + single for pair, single in groups)
    others = 21.3 * nucleic + used
    size = (_ATOMS_PER_TOKEN * n_tokens - others) / (n_tokens - used - nucleic)
    chains = []
    for number, (pair, single) in enumerate(groups):
        modified = str(rng.choice(_MODIFIED)) if number == 0 and n_tokens >= _MODIFIED_FROM else None
        protein = ChainPlan(PROTEIN, _protein(pair, size, modified, rng))
        chains += [protein, protein]
        if single:
            chains.append(ChainPlan(PROTEIN, _protein(single, size, None, rng)))
    chains += _nucleic_acids(nucleic, rng)
    chains += [ChainPlan(LIGAND, (name,)) for name in ligands]
    return chains + [ChainPlan(LIGAND, ("MG",))] * ions


def _ligands(budget: int, rng: np.random.Generator) -> list[str]:
    """Ligands of at most `budget` heavy atoms, at least one; a random large one first, twice if it fits."""
    fitting = [name for name in _LIGANDS if _atoms(name) <= budget]
    chosen: list[str] = []
    while fitting:
        name = str(rng.choice(fitting[:4]))
        for _ in range(2):
            if _atoms(name) <= budget:
                chosen.append(name)
                budget -= _atoms(name)
        fitting = [name for name in fitting if _atoms(name) <= budget]
    return chosen


def _protein_groups(tokens: int) -> list[tuple[int, int]]:
    """(tokens of a chain present twice, tokens of a chain present once) that add up to `tokens`, or one less."""
    count = -(-tokens // _PROTEIN_GROUP)
    if tokens < 32:
        return [(tokens // 2, 0)]
    shares = [tokens // count + (1 if index < tokens % count else 0) for index in range(count)]
    pairs = [int(0.36 * share) for share in shares]
    return [(pair, share - 2 * pair) for pair, share in zip(pairs, shares, strict=True)]


def _protein(tokens: int, size: float, modified: str | None, rng: np.random.Generator) -> tuple[str, ...]:
    """Residues of `tokens` tokens with about `size` atoms a token; a modified residue has a token per atom."""
    weights = np.array(_FREQUENCIES)
    single = 0 if modified is None else _atoms(modified) - 1
    atoms = np.array([_atoms(name) - 1 for name in AMINO_ACIDS])
    drawn = rng.choice(20, (_COMPOSITIONS, tokens - single), p=weights / weights.sum())
    best = int(np.argmin(np.abs(atoms[drawn].sum(axis=1) + single + 1 - size * tokens)))
    residues = [AMINO_ACIDS[index] for index in drawn[best]]
    if modified is not None:
        residues.insert(int(rng.integers(1, len(residues))), modified)
    return tuple(residues)


def _nucleic_acids(length: int, rng: np.random.Generator) -> list[ChainPlan]:
    """Strands of RNA and DNA in turn; the first kind is drawn."""
    count = -(-length // _NUCLEIC_LENGTH)
    first = int(rng.integers(2))
    strands = []
    for index in range(count):
        size = length // count + (1 if index < length % count else 0)
        kind, names = ((RNA, "A G C U"), (DNA, "DA DG DC DT"))[(index + first) % 2]
        strands.append(ChainPlan(kind, tuple(str(name) for name in rng.choice(names.split(), size))))
    return strands
