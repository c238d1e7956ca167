"""From one alignment per entity to the rows of the complex.

Chains of one entity share every row. Rows of different entities are paired where their headers name
the same species; all other rows are merged densely, row by row, as AF3 does with unpaired alignments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from baselines.data.a3m import Alignment
from baselines.data.schema import GAP, NUM_RESTYPES

MAX_ROWS = 16384
"""Rows of the merged alignment, as in AF3."""

MAX_PAIRED_ROWS = 8192


def merge_rows(alignments: Mapping[int, Alignment], n_entities: int, max_rows: int = MAX_ROWS) -> np.ndarray:
    """Row of each entity's alignment that every merged row uses, int32 [S, n_entities]; -1 for none.

    Row 0 is the query of all entities. Row 0 of an entity without alignment is its sequence.
    """
    paired = _paired_rows(alignments, n_entities)[: min(MAX_PAIRED_ROWS, max_rows - 1)]
    columns = []
    for entity in range(n_entities):
        depth = len(alignments[entity].rows) if entity in alignments else 1
        unused = np.ones(depth, bool)
        unused[0] = False
        taken = paired[:, entity]
        unused[taken[taken >= 0]] = False
        columns.append(np.flatnonzero(unused))
    depth = min(max((len(column) for column in columns), default=0), max_rows - 1 - len(paired))
    dense = np.full((depth, n_entities), -1, np.int32)
    for entity, column in enumerate(columns):
        dense[: len(column), entity] = column[:depth]
    return np.concatenate([np.zeros((1, n_entities), np.int32), paired, dense])


def _paired_rows(alignments: Mapping[int, Alignment], n_entities: int) -> np.ndarray:
    """Rows paired by species: the k-th of a species with the k-th, most widely shared species first."""
    by_species: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for entity, alignment in alignments.items():
        for index, species in enumerate(alignment.species):
            if species and index > 0:
                by_species[species][entity].append(index)
    shared = [members for members in by_species.values() if len(members) > 1]
    shared.sort(key=lambda members: -len(members))
    rows = []
    for members in shared:
        for rank in range(max(len(listed) for listed in members.values())):
            having = {entity: listed[rank] for entity, listed in members.items() if rank < len(listed)}
            if len(having) > 1:
                row = np.full(n_entities, -1, np.int32)
                row[list(having)] = list(having.values())
                rows.append(row)
    return np.array(rows, np.int32).reshape(-1, n_entities)


def profile(alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    """Residue type frequencies, float32 [L, 31], and mean deletion counts, float32 [L], of all rows."""
    rows = alignment.rows
    width = rows.shape[1]
    flat = (rows + (np.arange(width, dtype=np.int32) * NUM_RESTYPES)[None]).ravel()
    counts = np.bincount(flat, minlength=width * NUM_RESTYPES).reshape(width, NUM_RESTYPES)
    means = alignment.deletions.sum(axis=0, dtype=np.int64) / len(rows)
    return (counts / len(rows)).astype(np.float32), means.astype(np.float32)


def flatten(alignments: Sequence[Alignment]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Alignments one after the other: rows, deletions (uint8, flat), start and width of each."""
    widths = np.array([alignment.rows.shape[1] for alignment in alignments], np.int32)
    sizes = np.array([alignment.rows.size for alignment in alignments], np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    rows = np.concatenate([alignment.rows.ravel() for alignment in alignments])
    deletions = np.concatenate([alignment.deletions.ravel() for alignment in alignments])
    return rows, deletions, starts, widths


def query_alone(restypes: np.ndarray) -> Alignment:
    """The alignment of a chain that has none: its own sequence."""
    rows = restypes.astype(np.uint8)[None]
    return Alignment(rows, np.zeros_like(rows), ("",))


def blank_rows(depth: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`depth` rows that hold nothing: gaps, no deletions, masked."""
    return (
        np.full((depth, n_tokens), GAP, np.uint8),
        np.zeros((depth, n_tokens), np.uint8),
        np.zeros((depth, n_tokens), bool),
    )
