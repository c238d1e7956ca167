"""Symmetries of a residue or ligand: automorphisms of its heavy-atom graph.

Atoms are coloured by element only, because bond orders and charges of a carboxylate or a phosphate
are a convention of the dictionary. A permutation that would invert a stereocentre is no symmetry:
the methyls of valine and the oxygens of a phosphodiester are named by convention (pro-R, pro-S).
Three or more equal terminal atoms on one centre, as in a terminal phosphate, are interchangeable.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

MAX_PERMUTATIONS = 24
"""Permutations kept per residue, the identity included."""

_MAX_CANDIDATES = 512
_PLANAR_VOLUME = 0.5  # Å³: the triple product of three bonds is about 2.5 at a tetrahedral carbon


def automorphisms(
    elements: np.ndarray, bonds: np.ndarray, anchored: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Symmetries of a molecule, int32 [p, n]; entry ``[k, i]`` takes the place of atom i. Row 0 is the identity.

    `elements` [n], `bonds` [b, 2], `anchored` bool [n] (atoms bonded to other residues stay),
    `positions` [n, 3] give the chirality. Molecules with more than MAX_PERMUTATIONS symmetries keep
    those that move the fewest atoms, so that every independent local symmetry is there by itself.
    """
    size = len(elements)
    identity = np.arange(size, dtype=np.int32)
    neighbours: list[set[int]] = [set() for _ in range(size)]
    for first, second in bonds.tolist():
        neighbours[first].add(second)
        neighbours[second].add(first)
    initial = [
        (int(element), index + 1 if anchor else 0)
        for index, (element, anchor) in enumerate(zip(elements, anchored, strict=True))
    ]
    colours = _refine(initial, neighbours)
    if len(set(colours)) == size:
        return identity[None]
    found: dict[tuple[int, ...], None] = {tuple(identity.tolist()): None}
    for first in range(size):
        for second in range(first + 1, size):
            if colours[first] == colours[second]:
                _collect(
                    found, _search(colours, neighbours, (first, second)), positions, neighbours, elements, 1
                )
    _collect(found, _search(colours, neighbours, None), positions, neighbours, elements, _MAX_CANDIDATES)
    permutations = np.array(list(found), np.int32)
    moved = (permutations != identity).sum(axis=1)
    order = np.lexsort((*permutations.T[::-1], moved))
    return permutations[order[:MAX_PERMUTATIONS]]


def _collect(
    found: dict[tuple[int, ...], None],
    candidates: Iterator[tuple[int, ...]],
    positions: np.ndarray,
    neighbours: list[set[int]],
    elements: np.ndarray,
    wanted: int,
) -> None:
    """Add up to `wanted` chirality-preserving candidates to `found`."""
    accepted = 0
    for tried, candidate in enumerate(candidates):
        if tried == _MAX_CANDIDATES or accepted == wanted:
            return
        if _keeps_chirality(candidate, positions, neighbours, elements):
            found.setdefault(candidate, None)
            accepted += 1


def _refine(colours: list[tuple[int, int]], neighbours: list[set[int]]) -> list[int]:
    """Colour refinement: atoms differ when their neighbours' colours do."""
    ranks = {colour: rank for rank, colour in enumerate(sorted(set(colours)))}
    current = [ranks[colour] for colour in colours]
    while True:
        signatures = [
            (own, tuple(sorted(current[n] for n in neighbours[i]))) for i, own in enumerate(current)
        ]
        order = {signature: rank for rank, signature in enumerate(sorted(set(signatures)))}
        refined = [order[signature] for signature in signatures]
        if len(set(refined)) == len(set(current)):
            return refined
        current = refined


def _search(
    colours: list[int], neighbours: list[set[int]], forced: tuple[int, int] | None
) -> Iterator[tuple[int, ...]]:
    """Graph automorphisms, those close to the identity first; `forced` (i, j) demands i → j."""
    size = len(colours)
    order = _connected_order(neighbours, forced[0] if forced else 0)
    image = [-1] * size
    used = [False] * size

    def candidates(atom: int) -> list[int]:
        if forced and atom == forced[0]:
            return [forced[1]]
        placed = [n for n in neighbours[atom] if image[n] >= 0]
        pool: set[int] | range = neighbours[image[placed[0]]] if placed else range(size)
        fitting = [
            c
            for c in pool
            if not used[c] and colours[c] == colours[atom] and all(c in neighbours[image[n]] for n in placed)
        ]
        return sorted(fitting, key=lambda c: (c != atom, c))

    stack = [iter(candidates(order[0]))]
    while stack:
        depth = len(stack) - 1
        atom = order[depth]
        if image[atom] >= 0:
            used[image[atom]] = False
            image[atom] = -1
        choice = next(stack[-1], None)
        if choice is None:
            stack.pop()
            continue
        image[atom], used[choice] = choice, True
        if depth + 1 == size:
            yield tuple(image)
        else:
            stack.append(iter(candidates(order[depth + 1])))


def _connected_order(neighbours: list[set[int]], start: int) -> list[int]:
    """Atoms in breadth-first order from `start`, then from the first atom not reached."""
    order: list[int] = []
    seen: set[int] = set()
    for root in [start, *range(len(neighbours))]:
        if root in seen:
            continue
        queue = [root]
        seen.add(root)
        for atom in queue:
            for neighbour in sorted(neighbours[atom] - seen):
                seen.add(neighbour)
                queue.append(neighbour)
        order.extend(queue)
    return order


def _keeps_chirality(
    permutation: tuple[int, ...], positions: np.ndarray, neighbours: list[set[int]], elements: np.ndarray
) -> bool:
    """Whether every stereocentre keeps its handedness when its neighbours take their images' places."""
    for centre, around in enumerate(neighbours):
        if len(around) < 3 or _spins_freely(around, neighbours, elements):
            continue
        if all(permutation[n] == n for n in around):
            continue
        three = sorted(around)[:3]
        before = _volume(positions, centre, three)
        after = _volume(positions, permutation[centre], [permutation[n] for n in three])
        if min(abs(before), abs(after)) > _PLANAR_VOLUME and before * after < 0:
            return False
    return True


def _spins_freely(around: set[int], neighbours: list[set[int]], elements: np.ndarray) -> bool:
    ends = [int(elements[n]) for n in around if len(neighbours[n]) == 1]
    return any(ends.count(element) >= 3 for element in set(ends))


def _volume(positions: np.ndarray, centre: int, three: list[int]) -> float:
    a, b, c = (positions[n].astype(np.float64) - positions[centre] for n in three)
    return float(np.dot(a, np.cross(b, c)))
