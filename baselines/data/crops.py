"""Which tokens of a complex a sample keeps (AF3 SI 2.7). Every crop has exactly the tokens asked for.

Crops cut where they must: a ligand or modified residue at the edge can lose some of its atoms, as its
atoms are tokens.
"""

from __future__ import annotations

import numpy as np

from baselines.data.complexes import Complex

CROP_KINDS = ("contiguous", "spatial", "interface")


def crop(
    complex_: Complex, n_tokens: int, weights: tuple[float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """Sorted indices of `n_tokens` tokens, int64; the kind of crop is drawn with `weights`.

    Complexes without an interface get a spatial crop where an interface crop is drawn.
    """
    if n_tokens > complex_.n_tokens:
        raise ValueError(f"cannot crop {n_tokens} tokens from {complex_.n_tokens}")
    probabilities = np.array(weights, float)
    kind = CROP_KINDS[int(rng.choice(3, p=probabilities / probabilities.sum()))]
    if n_tokens == complex_.n_tokens:
        return np.arange(n_tokens)
    if kind == "contiguous":
        return contiguous_crop(complex_.asym_id, n_tokens, rng)
    points = complex_.positions[complex_.center_atom]
    resolved = complex_.resolved[complex_.center_atom]
    centres = np.flatnonzero(complex_.interface) if kind == "interface" else np.flatnonzero(resolved)
    if not len(centres):
        centres = np.flatnonzero(resolved)
    if not len(centres):
        return contiguous_crop(complex_.asym_id, n_tokens, rng)
    return spatial_crop(points, resolved, int(rng.choice(centres)), n_tokens)


def contiguous_crop(asym_id: np.ndarray, n_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """A stretch of each chain, chains in random order until the crop is full (AF-Multimer Alg. 1)."""
    order = rng.permutation(int(asym_id.max()) + 1)
    starts = np.searchsorted(asym_id, np.arange(len(order) + 1))
    remaining = len(asym_id)
    chosen: list[np.ndarray] = []
    taken = 0
    for chain in order.tolist():
        length = int(starts[chain + 1] - starts[chain])
        remaining -= length
        most = min(n_tokens - taken, length)
        least = min(length, max(0, n_tokens - taken - remaining))
        size = int(rng.integers(least, most + 1))
        begin = int(starts[chain]) + int(rng.integers(0, length - size + 1))
        chosen.append(np.arange(begin, begin + size))
        taken += size
    return np.sort(np.concatenate(chosen))


def spatial_crop(points: np.ndarray, resolved: np.ndarray, centre: int, n_tokens: int) -> np.ndarray:
    """The tokens nearest to token `centre`; unresolved tokens come last, nearest in order first."""
    index = np.arange(len(points))
    distance = np.linalg.norm(points.astype(np.float64) - points[centre], axis=1)
    distance = np.where(resolved, distance, 1e6 + np.abs(index - centre))
    return np.sort(np.argsort(distance, kind="stable")[:n_tokens])
