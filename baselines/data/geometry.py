"""Chains in space: atoms from internal coordinates, rigid placement, growth without collisions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_TRIALS = 12


def place_atom(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, length: float, angle: float, torsion: np.ndarray | float
) -> np.ndarray:
    """The atom d with |c d| = `length` Å, angle b-c-d and torsion a-b-c-d (radians). Points are [..., 3]."""
    axis = _unit(c - b)
    normal = _unit(np.cross(b - a, axis))
    side = np.cross(normal, axis)
    torsion = np.asarray(torsion)[..., None]
    along = -np.cos(angle) * axis
    return c + length * (along + np.sin(angle) * (np.cos(torsion) * side + np.sin(torsion) * normal))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def frame(points: np.ndarray) -> np.ndarray:
    """Right-handed axes [3, 3] (columns) at three points [3, 3]; the second is the origin."""
    first = _unit(points[2] - points[1])
    other = points[0] - points[1]
    second = _unit(other - np.dot(other, first) * first)
    return np.stack([first, second, np.cross(first, second)], axis=1)


def superpose(body: np.ndarray, anchor: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Move `body` [n, 3] as the three `anchor` points are moved onto the three `target` points."""
    rotation = frame(target) @ frame(anchor).T
    return (body - anchor[1]) @ rotation.T + target[1]


def grow(
    segments: list[int],
    extend: Callable[[np.ndarray, int, int], np.ndarray],
    start: np.ndarray,
    marks: slice,
    clearance: float,
) -> np.ndarray:
    """Grow a chain segment by segment, keeping the most compact of the trials that collide with nothing.

    `extend(tails, segment, trials)` continues the last atoms [trials, k, 3] by one segment [trials, n, 3];
    `marks` selects the atoms whose distance to earlier ones must exceed `clearance` Å.
    """
    chain = start
    n_tail = len(start)
    for segment in segments:
        tails = np.broadcast_to(chain[-n_tail:], (_TRIALS, n_tail, 3))
        trials = extend(tails, segment, _TRIALS)
        earlier = chain[marks][:-1]
        chain = np.concatenate([chain, trials[_best_trial(trials[:, marks], earlier, clearance)]])
    return chain


def _best_trial(trials: np.ndarray, earlier: np.ndarray, clearance: float) -> int:
    if not len(earlier):
        return 0
    distance = np.linalg.norm(trials[:, :, None] - earlier[None, None], axis=-1).min(axis=(1, 2))
    spread = np.linalg.norm(trials - earlier.mean(axis=0), axis=-1).mean(axis=1)
    free = distance > clearance
    return int(np.argmin(np.where(free, spread, np.inf))) if free.any() else int(np.argmax(distance))


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A uniformly random rotation matrix [3, 3]."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def dock(
    body: np.ndarray, occupied: np.ndarray, clearance: float, trials: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and shift that bring `body` [n, 3] into contact with `occupied` [m, 3] from a random side.

    No point of the body comes closer than `clearance` Å. Of several `trials` the one nearest to the middle
    is kept. With nothing there the body goes to the origin. Use as ``body @ rotation.T + shift``.
    """
    if not len(occupied):
        return np.eye(3), -body.mean(axis=0)
    middle = occupied.mean(axis=0)
    placements = [_dock_once(body, occupied, clearance, rng) for _ in range(trials)]
    distance = [np.linalg.norm((body @ turn.T + shift).mean(axis=0) - middle) for turn, shift in placements]
    return placements[int(np.argmin(distance))]


def _dock_once(
    body: np.ndarray, occupied: np.ndarray, clearance: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    rotation = random_rotation(rng)
    turned = body @ rotation.T
    direction = _unit(rng.standard_normal(3))
    target = occupied[int(rng.integers(len(occupied)))]
    offset = target - turned.mean(axis=0)
    gap = turned[:, None] + offset - occupied[None]
    along = gap @ direction
    reach = clearance**2 - (gap**2).sum(axis=-1) + along**2
    exits = np.where(reach > 0, -along + np.sqrt(np.maximum(reach, 0)), -np.inf)
    distance = max(float(exits.max()), 0.0)
    return rotation, offset + distance * direction
