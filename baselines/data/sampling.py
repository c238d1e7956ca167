"""The random half of the data pipeline: one training sample from a complex.

Crop, alignment rows, templates and the placement of reference conformers are drawn from
(seed, epoch, sample) alone, so a sample is the same whatever worker makes it, and in whatever order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from baselines.data import msa
from baselines.data.complexes import Complex
from baselines.data.crops import crop
from baselines.data.randomness import Purpose, generator
from baselines.data.schema import ATOM_WINDOW, FEATURES, GAP
from megafold_bench.errors import UserError


@dataclass(frozen=True)
class SampleConfig:
    """What a training sample looks like."""

    n_tokens: int
    """Tokens of the crop, exactly."""
    crop_weights: tuple[float, float, float] = (0.2, 0.4, 0.4)
    """Of contiguous, spatial and interface crops."""
    max_msa_rows: int = msa.MAX_ROWS
    """Rows drawn from the merged alignment, the query included."""
    min_msa_rows: int = 1
    """Shallower alignments are filled up to this with masked rows."""
    templates: int = 4
    """Templates of every sample; missing ones are masked."""
    atom_multiple: int = ATOM_WINDOW
    """Atoms are padded to a multiple of this, itself a multiple of 32."""

    def __post_init__(self) -> None:
        if self.n_tokens < 1:
            raise UserError(f"a crop of {self.n_tokens} tokens is empty: ask for at least 1")
        if self.max_msa_rows < 1 or self.min_msa_rows < 0:
            raise UserError(f"{self.max_msa_rows} alignment rows: ask for at least 1, the query")
        if self.min_msa_rows > self.max_msa_rows:
            raise UserError(
                f"min_msa_rows {self.min_msa_rows} exceeds max_msa_rows {self.max_msa_rows}: raise the latter"
            )
        if self.templates < 0:
            raise UserError(f"{self.templates} templates: ask for 0 or more")
        if min(self.crop_weights) < 0 or sum(self.crop_weights) <= 0:
            raise UserError(f"crop weights {self.crop_weights} must be non-negative and not all zero")
        if self.atom_multiple < 1 or self.atom_multiple % ATOM_WINDOW:
            raise UserError(f"atom_multiple {self.atom_multiple} must be a multiple of {ATOM_WINDOW}")


def sample_features(
    complex_: Complex, config: SampleConfig, seed: int, epoch: int, sample: int
) -> dict[str, torch.Tensor]:
    """Features of one training sample as `baselines.data.schema.FEATURES` describes them, on the CPU.

    Raises `UserError` when the complex has fewer tokens than the crop.
    """
    if config.n_tokens > complex_.n_tokens:
        raise UserError(
            f"a crop of {config.n_tokens} tokens is longer than the complex ({complex_.n_tokens} tokens): "
            f"ask for at most {complex_.n_tokens}"
        )
    tokens = crop(
        complex_, config.n_tokens, config.crop_weights, generator(seed, Purpose.CROP, epoch, sample)
    )
    gathered = _Gather.of(complex_, tokens, config.atom_multiple)
    arrays = {
        **_token_features(complex_, gathered),
        **_atom_features(complex_, gathered, generator(seed, Purpose.CONFORMERS, epoch, sample)),
        **_msa_features(complex_, tokens, config, generator(seed, Purpose.MSA, epoch, sample)),
        **_template_features(complex_, tokens, config, generator(seed, Purpose.TEMPLATES, epoch, sample)),
        **_labels(complex_, gathered),
    }
    return {
        name: torch.from_numpy(np.asarray(arrays[name], order="C")).to(FEATURES[name].dtype)
        for name in FEATURES
    }


@dataclass(frozen=True)
class _Gather:
    """Where the atoms and tokens of a crop come from and go to."""

    tokens: np.ndarray
    """Tokens kept [N]."""
    atoms: np.ndarray
    """Atoms kept [n]."""
    new_atom: np.ndarray
    """Position in the crop of every atom, -1 where it is not in it."""
    new_token: np.ndarray
    padded: int
    """Atoms after padding."""

    @staticmethod
    def of(complex_: Complex, tokens: np.ndarray, multiple: int) -> _Gather:
        kept = np.zeros(complex_.n_tokens, bool)
        kept[tokens] = True
        atoms = np.flatnonzero(kept[complex_.atom_token])
        new_atom = np.full(complex_.n_atoms, -1, np.int64)
        new_atom[atoms] = np.arange(len(atoms))
        new_token = np.full(complex_.n_tokens, -1, np.int64)
        new_token[tokens] = np.arange(len(tokens))
        return _Gather(tokens, atoms, new_atom, new_token, -(-len(atoms) // multiple) * multiple)

    def pad(self, values: np.ndarray, fill: float | bool = 0) -> np.ndarray:
        """Atom values [n, ...] with padding [A, ...]."""
        padding = [(0, self.padded - len(self.atoms))] + [(0, 0)] * (values.ndim - 1)
        return np.pad(values, padding, constant_values=fill)


def _token_features(complex_: Complex, gathered: _Gather) -> dict[str, np.ndarray]:
    tokens = gathered.tokens
    frames = gathered.new_atom[complex_.frame_atoms[tokens]]
    whole = (frames >= 0).all(axis=1)
    center = gathered.new_atom[complex_.center_atom[tokens]]
    bonds = gathered.new_token[complex_.token_bonds]
    return {
        "restype": complex_.restype[tokens],
        "molecule_type": complex_.molecule_type[tokens],
        "residue_index": complex_.residue_index[tokens],
        "token_index": tokens,
        "asym_id": complex_.asym_id[tokens],
        "entity_id": complex_.entity_id[tokens],
        "sym_id": complex_.sym_id[tokens],
        "token_bonds": bonds[(bonds >= 0).all(axis=1)].reshape(-1, 2),
        "representative_atom": gathered.new_atom[complex_.representative_atom[tokens]],
        "center_atom": center,
        "frame_atoms": np.where(whole[:, None], frames, center[:, None]),
        "frame_mask": complex_.frame_mask[tokens] & whole,
        "profile": complex_.profile[tokens],
        "deletion_mean": complex_.deletion_mean[tokens],
    }


def _atom_features(complex_: Complex, gathered: _Gather, rng: np.random.Generator) -> dict[str, np.ndarray]:
    atoms = gathered.atoms
    own_token = complex_.atom_token[atoms]
    residue, inverse = np.unique(complex_.atom_residue[atoms], return_inverse=True)
    n_residues = int(complex_.atom_residue[-1]) + 1
    placed = _place_conformers(complex_.ref_pos[atoms], inverse, residue, n_residues, rng)
    to_token = gathered.new_token[own_token]
    return {
        "atom_mask": gathered.pad(np.ones(len(atoms), bool)),
        "atom_to_token": gathered.pad(to_token, fill=len(gathered.tokens) - 1),
        "atom_within_token": gathered.pad(atoms - complex_.token_atoms[own_token]),
        "ref_pos": gathered.pad(placed),
        "ref_element": gathered.pad(complex_.ref_element[atoms]),
        "ref_charge": gathered.pad(complex_.ref_charge[atoms]),
        "ref_atom_name": gathered.pad(complex_.ref_atom_name[atoms]),
        "ref_space_uid": gathered.pad(complex_.atom_residue[atoms], fill=n_residues),
    }


def _place_conformers(
    positions: np.ndarray, group: np.ndarray, residue: np.ndarray, n_residues: int, rng: np.random.Generator
) -> np.ndarray:
    """Centre each residue's conformer, rotate it at random and shift it by 1 Å (AF3 Alg. 19).

    Draws are indexed by residue of the complex, so that they do not depend on the crop.
    """
    quaternion = rng.standard_normal((n_residues, 4))[residue]
    shift = rng.standard_normal((n_residues, 3))[residue]
    count = np.bincount(group, minlength=len(residue))
    sums = np.stack([np.bincount(group, positions[:, axis], len(residue)) for axis in range(3)], axis=1)
    centred = positions - (sums / count[:, None])[group]
    rotation = _rotations(quaternion)[group]
    return (np.einsum("aij,aj->ai", rotation, centred) + shift[group]).astype(np.float32)


def _rotations(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrices [n, 3, 3] of quaternions [n, 4] of any length; uniform for normal ones."""
    w, x, y, z = (quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def _msa_features(
    complex_: Complex, tokens: np.ndarray, config: SampleConfig, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The query and a random subset of the other merged rows, in alignment order."""
    available = len(complex_.msa_rows)
    depth = min(available, config.max_msa_rows)
    others = (
        np.sort(rng.choice(available - 1, depth - 1, replace=False)) + 1 if depth > 1 else np.zeros(0, int)
    )
    chosen = complex_.msa_rows[np.concatenate(([0], others)).astype(np.int64)]
    rows, deletions, mask = msa.blank_rows(max(depth, config.min_msa_rows), len(tokens))
    entity, column = complex_.entity_id[tokens], complex_.residue_ordinal[tokens]
    for number in np.unique(entity).tolist():
        columns = np.flatnonzero(entity == number)
        start, stop = complex_.msa_starts[number : number + 2]
        shape = (-1, int(complex_.msa_widths[number]))
        used = np.flatnonzero(chosen[:, number] >= 0)
        place = np.ix_(used, columns)
        source = np.ix_(chosen[used, number], column[columns])
        rows[place] = complex_.msa_residues[start:stop].reshape(shape)[source]
        deletions[place] = complex_.msa_deletions[start:stop].reshape(shape)[source]
        mask[place] = True
    return {"msa": rows, "msa_deletions": deletions, "msa_mask": mask}


def _template_features(
    complex_: Complex, tokens: np.ndarray, config: SampleConfig, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """For each entity a random number of its templates, 0 to all of them, in random order."""
    restype = np.full((config.templates, len(tokens)), GAP, np.uint8)
    positions = np.zeros((config.templates, len(tokens), 4, 3), np.float32)
    mask = np.zeros((config.templates, len(tokens), 4), bool)
    for entity in np.unique(complex_.template_entity).tolist():
        candidates = np.flatnonzero(complex_.template_entity == entity)
        order = rng.permutation(candidates)
        count = min(int(rng.integers(0, len(candidates) + 1)), config.templates)
        mine = np.flatnonzero(complex_.entity_id[tokens] == entity)
        for slot, template in enumerate(order[:count].tolist()):
            restype[slot, mine] = complex_.template_restype[template, tokens[mine]]
            positions[slot, mine] = complex_.template_positions[template, tokens[mine]]
            mask[slot, mine] = complex_.template_mask[template, tokens[mine]]
    return {"template_restype": restype, "template_positions": positions, "template_mask": mask}


def _labels(complex_: Complex, gathered: _Gather) -> dict[str, np.ndarray]:
    atoms = gathered.atoms
    table = complex_.copies[:, complex_.entity_atom[atoms]]
    table = table[: _copies_needed(complex_, gathered.tokens)]
    exists = table >= 0
    label_mask = exists & complex_.resolved[table]
    label_positions = np.where(label_mask[..., None], complex_.positions[table], 0).astype(np.float32)
    tail = gathered.padded - len(atoms)
    return {
        "label_positions": np.pad(label_positions, ((0, 0), (0, tail), (0, 0))),
        "label_mask": np.pad(label_mask, ((0, 0), (0, tail))),
        "atom_permutations": _permutations(complex_, gathered),
        "resolution": complex_.resolution.copy(),
    }


def _copies_needed(complex_: Complex, tokens: np.ndarray) -> int:
    """Copies, in the whole complex, of the most frequent entity of the crop."""
    inside = np.isin(complex_.entity_id, complex_.entity_id[tokens])
    return int(complex_.sym_id[inside].max()) + 1


def _permutations(complex_: Complex, gathered: _Gather) -> np.ndarray:
    """Symmetries of the crop's residues; one that needs an atom that was cropped away is dropped."""
    atoms = gathered.atoms
    moved = gathered.new_atom[complex_.permutations[:, atoms]]
    _, group = np.unique(complex_.atom_residue[atoms], return_inverse=True)
    identity = np.arange(len(atoms))
    for row in moved:
        broken = np.bincount(group, row < 0) > 0
        row[broken[group]] = identity[broken[group]]
    distinct = (moved != identity).any(axis=1)
    distinct[0] = True
    tail = np.arange(len(atoms), gathered.padded)
    kept = moved[distinct]
    return np.concatenate([kept, np.broadcast_to(tail, (len(kept), len(tail)))], axis=1)
