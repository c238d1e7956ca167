"""Chains laid out as flat atom and token arrays (AF3 tokenisation, SI 2.6)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from baselines.data.ccd import component
from baselines.data.layout import ResidueLayout, bonded_atoms, lay_out, link_atoms
from baselines.data.schema import LIGAND, PROTEIN, UNKNOWN_AMINO_ACID, UNKNOWN_BASE
from baselines.data.structure import AtomKey, Chain, Structure

MAX_BOND = 2.4
"""Å: AF3 encodes no longer bond."""

INTERFACE_DISTANCE = 15.0
"""Å between centre atoms of different chains."""

_MIN_FRAME_ANGLE = 25.0  # degrees from a straight line


@dataclass(frozen=True)
class AtomTable:
    """All atoms of a structure, and the residues they came from."""

    arrays: dict[str, np.ndarray]
    """The atom fields of `Complex`."""
    residues: tuple[tuple[int, int, ResidueLayout, int], ...]
    """(chain, residue in the chain, layout, first atom) in token order."""
    chains: tuple[Chain, ...]
    entity_of_chain: dict[str, int]
    copy_of_chain: dict[str, int]
    entity_restypes: tuple[np.ndarray, ...]
    """Residue types of each entity, uint8 [L]."""
    bonds: np.ndarray
    """Bonded atoms of all residues and between them, int32 [b, 2]."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TokenTable:
    """All tokens of a structure."""

    arrays: dict[str, np.ndarray]
    """The token fields of `Complex`."""
    whole_residue: np.ndarray
    """The token is a standard residue, bool [N]."""


def lay_out_atoms(structure: Structure) -> AtomTable:
    """Every heavy atom of every residue, in token order, with labels and reference conformers."""
    chains = structure.chains
    entity_of_chain, copy_of_chain = _entities(chains)
    linked: dict[tuple[str, int], set[str]] = defaultdict(set)
    for end in (end for link in structure.links for end in link):
        linked[end[:2]].add(end[2])
    residues: list[tuple[int, int, ResidueLayout, int]] = []
    notes: dict[str, None] = {}
    start = 0
    for chain_index, chain in enumerate(chains):
        for index, residue in enumerate(chain.residues):
            bonded = bonded_atoms(chain, index, linked[chain.name, index])
            layout = lay_out(residue, chain.kind, bonded)
            _note_problems(notes, chain, index, layout)
            residues.append((chain_index, index, layout, start))
            start += len(layout.atom_names)
    arrays = _atom_arrays(chains, residues, start)
    arrays.update(_copies(chains, residues, entity_of_chain, copy_of_chain, start))
    n_entities = max(entity_of_chain.values()) + 1
    first_chain = {entity_of_chain[chain.name]: chain for chain in reversed(chains)}
    restypes = tuple(restypes_of(first_chain[entity]) for entity in range(n_entities))
    bonds = _bonds(structure.links, chains, residues, arrays)
    return AtomTable(
        arrays, tuple(residues), chains, entity_of_chain, copy_of_chain, restypes, bonds, tuple(notes)
    )


def _entities(chains: tuple[Chain, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Entity and copy number of each chain: chains of one sequence or composition are copies."""
    numbers: dict[tuple[int, tuple[tuple[int, str], ...]], int] = {}
    seen: dict[int, int] = defaultdict(int)
    entities, copies = {}, {}
    for chain in chains:
        key = (chain.kind, tuple((residue.number, residue.name) for residue in chain.residues))
        entity = numbers.setdefault(key, len(numbers))
        entities[chain.name], copies[chain.name] = entity, seen[entity]
        seen[entity] += 1
    return entities, copies


def restypes_of(chain: Chain) -> np.ndarray:
    """Residue type of each residue, uint8 [L]; ligands are unknown amino acids."""
    unknown = UNKNOWN_AMINO_ACID if chain.kind in (LIGAND, PROTEIN) else UNKNOWN_BASE
    types = np.full(len(chain.residues), unknown, np.uint8)
    if chain.kind != LIGAND:
        for index, residue in enumerate(chain.residues):
            known = component(residue.name)
            if known is not None and known.kind != LIGAND:
                types[index] = known.restype
    return types


def _note_problems(notes: dict[str, None], chain: Chain, index: int, layout: ResidueLayout) -> None:
    residue = chain.residues[index]
    known = component(residue.name)
    if known is None:
        notes.setdefault(f"{residue.name} is not in the component dictionary: no bonds, no conformer")
    elif known.conformer == "none":
        notes.setdefault(f"{residue.name} has no conformer in the dictionary: reference positions are zero")
    for atom in residue.positions:
        if atom not in layout.atom_names and (known is None or atom not in known.atom_names):
            notes.setdefault(f"{residue.name} has no atom {atom} in the dictionary: ignored")


def _atom_arrays(
    chains: tuple[Chain, ...], residues: list[tuple[int, int, ResidueLayout, int]], n_atoms: int
) -> dict[str, np.ndarray]:
    layouts = [layout for _, _, layout, _ in residues]
    positions = np.zeros((n_atoms, 3), np.float32)
    resolved = np.zeros(n_atoms, bool)
    most = max(len(layout.permutations) for layout in layouts)
    permutations = np.broadcast_to(np.arange(n_atoms, dtype=np.int32), (most, n_atoms)).copy()
    for chain, index, layout, start in residues:
        observed = chains[chain].residues[index].positions
        for offset, name in enumerate(layout.atom_names):
            if name in observed:
                positions[start + offset] = observed[name]
                resolved[start + offset] = True
        count, size = layout.permutations.shape
        permutations[:count, start : start + size] = layout.permutations + start
    sizes = [len(layout.atom_names) for layout in layouts]
    tokens_of = [
        np.zeros(n, np.int64) if lo.one_token else np.arange(n) for n, lo in zip(sizes, layouts, strict=True)
    ]
    first_token = np.cumsum([0, *(1 if lo.one_token else n for n, lo in zip(sizes, layouts, strict=True))])
    atom_token = np.concatenate([own + first for own, first in zip(tokens_of, first_token, strict=False)])
    return {
        "atom_token": atom_token.astype(np.int32),
        "atom_residue": np.repeat(np.arange(len(residues), dtype=np.int32), sizes),
        "positions": positions,
        "resolved": resolved,
        "ref_pos": np.concatenate([layout.conformer for layout in layouts]).astype(np.float32),
        "ref_element": np.concatenate([layout.elements for layout in layouts]),
        "ref_charge": np.concatenate([layout.charges for layout in layouts]),
        "ref_atom_name": np.concatenate([layout.name_codes for layout in layouts]),
        "permutations": permutations,
    }


def _copies(
    chains: tuple[Chain, ...],
    residues: list[tuple[int, int, ResidueLayout, int]],
    entity_of_chain: dict[str, int],
    copy_of_chain: dict[str, int],
    n_atoms: int,
) -> dict[str, np.ndarray]:
    """Each atom's number within its entity, and the atom every copy has under that number."""
    numbers: dict[tuple[int, int, str], int] = {}
    entity_atom = np.zeros(n_atoms, np.int32)
    for chain, index, layout, start in residues:
        entity = entity_of_chain[chains[chain].name]
        for offset, name in enumerate(layout.atom_names):
            entity_atom[start + offset] = numbers.setdefault((entity, index, name), len(numbers))
    table = np.full((max(copy_of_chain.values()) + 1, len(numbers)), -1, np.int32)
    for chain, _, layout, start in residues:
        atoms = np.arange(start, start + len(layout.atom_names))
        table[copy_of_chain[chains[chain].name], entity_atom[atoms]] = atoms
    return {"entity_atom": entity_atom, "copies": table}


def _bonds(
    links: tuple[tuple[AtomKey, AtomKey], ...],
    chains: tuple[Chain, ...],
    residues: list[tuple[int, int, ResidueLayout, int]],
    arrays: dict[str, np.ndarray],
) -> np.ndarray:
    """Bonds within residues, along polymers and by explicit links; over-long ones are dropped."""
    place = {(chains[chain].name, index): (layout, start) for chain, index, layout, start in residues}

    def atom(key: AtomKey) -> int:
        layout, start = place[key[0], key[1]]
        return start + layout.atom_names.index(key[2]) if key[2] in layout.atom_names else -1

    pairs = [layout.bonds + start for _, _, layout, start in residues]
    between = list(links)
    for chain in chains:
        if chain.kind == LIGAND:
            continue
        first, last = link_atoms(chain.kind)
        for index in range(len(chain.residues) - 1):
            if chain.residues[index + 1].number == chain.residues[index].number + 1:
                between.append(((chain.name, index, last), (chain.name, index + 1, first)))
    joined = [(atom(first), atom(second)) for first, second in between]
    pairs.append(np.array([pair for pair in joined if min(pair) >= 0], np.int32).reshape(-1, 2))
    bonds = np.concatenate(pairs).astype(np.int32)
    length = np.linalg.norm(arrays["positions"][bonds[:, 0]] - arrays["positions"][bonds[:, 1]], axis=-1)
    known = arrays["resolved"][bonds].all(axis=1)
    return bonds[~known | (length <= MAX_BOND)]


def lay_out_tokens(atoms: AtomTable) -> TokenTable:
    """Tokens: one per standard residue, one per heavy atom of anything else."""
    counts = [1 if layout.one_token else len(layout.atom_names) for _, _, layout, _ in atoms.residues]
    chain_of = np.repeat([chain for chain, _, _, _ in atoms.residues], counts)
    ordinal = np.repeat([index for _, index, _, _ in atoms.residues], counts)
    number = np.repeat([atoms.chains[chain].residues[i].number for chain, i, _, _ in atoms.residues], counts)
    names = [chain.name for chain in atoms.chains]
    entity = np.array([atoms.entity_of_chain[name] for name in names], np.int32)[chain_of]
    copy = np.array([atoms.copy_of_chain[name] for name in names], np.int32)[chain_of]
    kind = np.array([chain.kind for chain in atoms.chains], np.uint8)[chain_of]
    restype = np.concatenate(
        [
            np.zeros(0, np.uint8),
            *(
                np.repeat(atoms.entity_restypes[atoms.entity_of_chain[names[chain]]][index], count)
                for (chain, index, _, _), count in zip(atoms.residues, counts, strict=True)
            ),
        ]
    )
    whole = np.repeat([layout.one_token for _, _, layout, _ in atoms.residues], counts)
    atom_token = atoms.arrays["atom_token"]
    n_tokens = len(whole)
    arrays = {
        "restype": restype,
        "molecule_type": kind,
        "residue_index": number.astype(np.int32),
        "residue_ordinal": ordinal.astype(np.int32),
        "asym_id": chain_of.astype(np.int32),
        "entity_id": entity,
        "sym_id": copy,
        "token_atoms": np.searchsorted(atom_token, np.arange(n_tokens + 1)).astype(np.int32),
        "representative_atom": np.concatenate([lo.representative + at for _, _, lo, at in atoms.residues]),
        "center_atom": np.concatenate([lo.center + at for _, _, lo, at in atoms.residues]),
    }
    arrays["frame_atoms"], arrays["frame_mask"] = _frames(atoms, arrays["center_atom"])
    arrays["interface"] = _interface(atoms, arrays["center_atom"], arrays["asym_id"])
    arrays["token_bonds"] = _token_bonds(atoms.bonds, atom_token, whole)
    return TokenTable(arrays, whole)


def _frames(atoms: AtomTable, center: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frame atoms and whether the frame exists, is resolved and not degenerate (AF3 SI 4.3.2)."""
    local = [np.where(lo.frames >= 0, lo.frames + at, -1) for _, _, lo, at in atoms.residues]
    frames = np.concatenate(local).astype(np.int32)
    exists = frames[:, 0] >= 0
    frames[~exists] = center[~exists, None]
    points = atoms.arrays["positions"][frames].astype(np.float64)
    arm, other = points[:, 0] - points[:, 1], points[:, 2] - points[:, 1]
    norms = np.linalg.norm(arm, axis=1) * np.linalg.norm(other, axis=1)
    cosine = np.divide((arm * other).sum(axis=1), norms, out=np.ones(len(norms)), where=norms > 0)
    bent = np.abs(cosine) < np.cos(np.radians(_MIN_FRAME_ANGLE))
    return frames, exists & atoms.arrays["resolved"][frames].all(axis=1) & bent


def _interface(atoms: AtomTable, center: np.ndarray, chain: np.ndarray) -> np.ndarray:
    points = atoms.arrays["positions"][center]
    resolved = atoms.arrays["resolved"][center]
    near = np.zeros(len(center), bool)
    for start in range(0, len(center), 512):
        rows = slice(start, start + 512)
        close = ((points[rows, None] - points[None]) ** 2).sum(axis=-1) < INTERFACE_DISTANCE**2
        near[rows] = (close & (chain[rows, None] != chain[None]) & resolved[None]).any(axis=1)
    return near & resolved


def _token_bonds(bonds: np.ndarray, atom_token: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Bonded token pairs of which at least one is a single atom (ligands, modified residues)."""
    pairs = np.sort(atom_token[bonds], axis=1).reshape(-1, 2)
    encoded = (pairs[:, 0] != pairs[:, 1]) & ~whole[pairs].all(axis=1)
    return np.unique(pairs[encoded], axis=0).astype(np.int32).reshape(-1, 2)
