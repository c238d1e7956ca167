"""Coordinates of synthetic polymers from dictionary conformers."""

from __future__ import annotations

import numpy as np

from baselines.data.ccd import Component
from baselines.data.geometry import grow, place_atom, superpose

_N_CA, _CA_C, _C_N, _C_O = 1.458, 1.525, 1.329, 1.231  # Å (Engh and Huber)
_AT_CA, _AT_C, _AT_N, _CA_C_O = np.radians([111.0, 116.6, 121.7, 120.5])
_HELIX, _STRAND = np.radians([-62.0, -42.0]), np.radians([-120.0, 130.0])
_TURNS = np.radians([[-62, -42], [-120, 130], [-75, 145], [57, 39], [-90, 0]])
_CLEARANCE = 7.0  # Å between Cα atoms far apart in the chain

_P_O, _O5_P = 1.607, 1.593  # Å
_AT_O3, _AT_P = np.radians([119.7, 104.0])


def build_protein(residues: list[Component], rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """Heavy atoms in Å by name for each residue of a compact chain of helices, strands and turns."""
    backbone, psi = _backbone(len(residues), rng)
    built = []
    for index, (known, atoms) in enumerate(zip(residues, backbone, strict=True)):
        position = {name: at for at, name in enumerate(known.atom_names)}
        anchor = known.positions[[position["N"], position["CA"], position["C"]]].astype(float)
        moved = superpose(known.positions.astype(float), anchor, atoms)
        named = {name: moved[at] for name, at in position.items() if name != "OXT"}
        named.update(zip(("N", "CA", "C"), atoms, strict=True))
        named["O"] = place_atom(atoms[0], atoms[1], atoms[2], _C_O, _CA_C_O, psi[index] + np.pi)
        if index == len(residues) - 1:
            named["OXT"] = place_atom(atoms[0], atoms[1], atoms[2], 1.25, _CA_C_O, psi[index])
        built.append(named)
    return built


def _backbone(length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """N, CA, C of each residue [length, 3, 3], and ψ of each residue."""
    c = np.array([_CA_C, 0.0, 0.0])
    n = _N_CA * np.array([np.cos(_AT_CA), np.sin(_AT_CA), 0.0])
    start = np.stack([n, np.zeros(3), c])
    sizes = _segments(length - 1, rng)

    def extend(tails: np.ndarray, size: int, trials: int) -> np.ndarray:
        torsions = _torsions(size, trials, rng)
        atoms = [tails[:, 0], tails[:, 1], tails[:, 2]]
        for step in range(size):
            psi, phi = torsions[:, step, 1], torsions[:, step, 0]
            atoms.append(place_atom(atoms[-3], atoms[-2], atoms[-1], _C_N, _AT_C, psi))
            atoms.append(place_atom(atoms[-3], atoms[-2], atoms[-1], _N_CA, _AT_N, np.full(trials, np.pi)))
            atoms.append(place_atom(atoms[-3], atoms[-2], atoms[-1], _CA_C, _AT_CA, phi))
        return np.stack(atoms[3:], axis=1)

    chain = grow(sizes, extend, start, slice(1, None, 3), _CLEARANCE).reshape(length, 3, 3)
    psi = _dihedral(chain[:-1, 0], chain[:-1, 1], chain[:-1, 2], chain[1:, 0])
    return chain, np.append(psi, _STRAND[1])


def _segments(length: int, rng: np.random.Generator) -> list[int]:
    sizes = []
    while length > 0:
        size = min(length, int(rng.integers(5, 15)))
        sizes.append(size)
        length -= size
    return sizes


def _torsions(size: int, trials: int, rng: np.random.Generator) -> np.ndarray:
    """φ, ψ of a turn of three residues and a helix or strand after it [trials, size, 2]."""
    regular = _HELIX if rng.random() < 0.6 else _STRAND
    torsions = np.tile(regular, (trials, size, 1))
    turn = min(3, size)
    torsions[:, :turn] = _TURNS[rng.integers(0, len(_TURNS), (trials, turn))]
    return torsions + rng.normal(0, np.radians(6), torsions.shape)


def _dihedral(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    axis = (c - b) / np.linalg.norm(c - b, axis=-1, keepdims=True)
    first, second = np.cross(b - a, axis), np.cross(axis, d - c)
    return np.arctan2((np.cross(first, second) * axis).sum(-1), (first * second).sum(-1))


def build_nucleic_acid(residues: list[Component], rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """Heavy atoms in Å by name for each nucleotide of a single strand.

    The O3' of the previous nucleotide takes the place of OP3 in the dictionary conformer.
    """
    first = residues[0]
    built = [dict(zip(first.atom_names, first.positions.astype(float), strict=True))]
    for known in residues[1:]:
        position = {name: at for at, name in enumerate(known.atom_names)}
        anchor = known.positions[[position["OP3"], position["P"], position["O5'"]]].astype(float)
        moved = superpose(known.positions.astype(float), anchor, _next_phosphate(built, rng))
        built.append({name: moved[at] for name, at in position.items() if name != "OP3"})
    return built


def _next_phosphate(built: list[dict[str, np.ndarray]], rng: np.random.Generator) -> np.ndarray:
    """O3' and the P and O5' that follow it [3, 3]; torsions ε and ζ are the most roomy of several."""
    last = built[-1]
    trials = 16
    epsilon, zeta = rng.uniform(-np.pi, np.pi, (2, trials))
    c4, c3, o3 = (np.broadcast_to(last[name], (trials, 3)) for name in ("C4'", "C3'", "O3'"))
    phosphorus = place_atom(c4, c3, o3, _P_O, _AT_O3, epsilon)
    oxygen = place_atom(c3, o3, phosphorus, _O5_P, _AT_P, zeta)
    bases = np.stack([atoms["C1'"] for atoms in built] + [atoms["C4'"] for atoms in built])
    ahead = oxygen + 4.0 * (oxygen - phosphorus)
    room = np.linalg.norm(ahead[:, None] - bases[None], axis=-1).min(axis=1)
    best = int(np.argmax(room))
    return np.stack([o3[best], phosphorus[best], oxygen[best]])
