"""Label permutation: which copy of a chain, and which of its equivalent atoms, a prediction means.

Chains are matched as AlphaFold-Multimer does: an anchor chain of the truth's copies is superposed on the
prediction copy by copy, the other chains take the nearest free copy of their entity, and the anchor copy
with the smallest mean squared error wins. Then, with everything superposed, each residue takes the best of
its atom symmetries. Each chain is matched by itself: a ligand bonded to a polymer need not follow it.

On CUDA the host waits for the device four times: chain table, superposition of the anchor, chain costs,
last superposition. Without copies (K = 1) only the last remains, without symmetries (P = 1) not even it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baselines.alignment import RigidMotion, superpose
from baselines.losses.labels import Features, Labels, make_labels

MIN_ANCHOR_TOKENS = 4
"""Fewer points do not fix a superposition well enough to place other chains by it."""
UNRESOLVED_COST = 1e12
"""Å², cost of a copy with nothing to compare: taken only when no other is free."""


@dataclass(frozen=True)
class ChainTable:
    """The chains of a crop on the host: C chains, N tokens, K copies.

    ``chain_of_token`` [N]; ``entity`` [C]; ``resolved`` [C, K] counts the tokens of the chain whose centre
    atom is resolved in the copy.
    """

    chain_of_token: np.ndarray
    entity: np.ndarray
    resolved: np.ndarray


@torch.no_grad()
def permute_labels(x: Tensor, features: Features) -> Labels:
    """The labels of one sample that fit the prediction x [A, 3] best."""
    copy_of_token = match_chains(x, features)
    return match_atoms(x, features, make_labels(features, copy_of_token))


@torch.no_grad()
def match_chains(x: Tensor, features: Features) -> Tensor:
    """The copy (``sym_id``) of the truth that each token's chain stands for in x [A, 3]; [N] int64."""
    own = features["sym_id"].long()
    if features["label_positions"].shape[0] == 1:
        return own
    center = features["center_atom"]
    positions = features["label_positions"][:, center].double()
    resolved = features["label_mask"][:, center]
    table = chain_table(features, resolved)
    anchor = choose_anchor(table)
    enough = min(MIN_ANCHOR_TOKENS, table.resolved[anchor].max())
    if enough == 0:
        return own
    candidates = np.flatnonzero(table.resolved[anchor] >= enough)
    chains = np.arange(len(table.entity))[:, None]
    in_chain = _upload(table.chain_of_token == chains, x.device)
    predicted = torch.nan_to_num(x[center]).double()
    copies = _upload(candidates, x.device)
    motion = superpose(positions[copies], predicted, resolved[copies] & in_chain[anchor])
    every = RigidMotion(*(part[:, None] for part in (motion.rotation, motion.source, motion.target)))
    squared = (every.apply(positions[None]) - predicted).square().sum(-1)
    squared = torch.where(resolved, squared, 0.0)
    errors = (squared @ in_chain.double().T).transpose(-1, -2).cpu().numpy()
    assignment = best_assignment(table, anchor, candidates, errors)
    return _upload(assignment[table.chain_of_token], x.device)


def chain_table(features: Features, resolved: Tensor) -> ChainTable:
    """Fetch the chains; `resolved` [K, N] tells which tokens have a resolved centre atom in which copy."""
    ids = torch.stack([features["asym_id"], features["entity_id"]])
    host = torch.cat([ids, resolved.to(ids.dtype)]).cpu().numpy()
    _, first, chain_of_token = np.unique(host[0], return_index=True, return_inverse=True)
    counts = np.zeros((len(first), resolved.shape[0]), dtype=np.int64)
    np.add.at(counts, chain_of_token, host[2:].T)
    return ChainTable(chain_of_token, host[1][first], counts)


def choose_anchor(table: ChainTable) -> int:
    """The chain with the fewest resolved copies, among equals the one with the most resolved tokens.

    Chains too small to fix a superposition come last.
    """
    tokens = table.resolved.max(1)
    copies = (table.resolved > 0).sum(1)
    unusable = tokens < min(MIN_ANCHOR_TOKENS, tokens.max())
    return int(np.lexsort((-tokens, copies, unusable))[0])


def best_assignment(table: ChainTable, anchor: int, candidates: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The copy of each chain, [C], for the best of the anchor's `candidates` [J].

    `errors` [J, C, K]: summed squared error in Å² of chain c against copy k after superposing by candidate j.
    """
    best, best_score = np.zeros(len(table.entity), dtype=np.int64), np.inf
    for copy, error in zip(candidates, errors, strict=True):
        assignment = _greedy_assignment(table, anchor, int(copy), error)
        chains = np.arange(len(assignment))
        score = error[chains, assignment].sum() / max(table.resolved[chains, assignment].sum(), 1)
        if score < best_score:
            best, best_score = assignment, score
    return best


def _greedy_assignment(table: ChainTable, anchor: int, anchor_copy: int, error: np.ndarray) -> np.ndarray:
    """Nearest free copy first, entity by entity, the anchor fixed to `anchor_copy`."""
    count = table.resolved
    cost = np.where(count > 0, error / np.maximum(count, 1), UNRESOLVED_COST)
    cost[anchor] = np.inf
    cost[table.entity == table.entity[anchor], anchor_copy] = np.inf
    assignment = np.zeros(len(table.entity), dtype=np.int64)
    assignment[anchor] = anchor_copy
    for entity in np.unique(table.entity):
        chains = np.flatnonzero(table.entity == entity)
        block = cost[chains]
        for _ in range(len(chains) - int(anchor in chains)):
            row, copy = np.unravel_index(np.argmin(block), block.shape)
            assignment[chains[row]] = copy
            block[row], block[:, copy] = np.inf, np.inf
    return assignment


@torch.no_grad()
def match_atoms(x: Tensor, features: Features, labels: Labels) -> Labels:
    """`labels` with the atoms of each residue in the order that fits x [A, 3] best.

    The order is one of ``atom_permutations``, chosen residue by residue for the smallest squared error
    after superposing all labels on the prediction.
    """
    permutations = features["atom_permutations"]
    if permutations.shape[0] == 1:
        return labels
    predicted = torch.nan_to_num(x)
    moved = superpose(labels.positions, predicted, labels.mask).apply(labels.positions).to(x.dtype)
    squared = (moved[permutations] - predicted).square().sum(-1)
    squared = torch.where(labels.mask[permutations], squared, 0.0)
    residue = _runs(features["ref_space_uid"])
    error = torch.zeros_like(squared).index_add_(1, residue, squared)
    choice = error.argmin(0)[residue]
    atom = permutations[choice, torch.arange(x.shape[0], device=x.device)]
    mask = labels.mask[atom] & features["atom_mask"]
    return Labels(torch.where(mask[:, None], labels.positions[atom], 0.0), mask)


def _upload(values: np.ndarray, device: torch.device) -> Tensor:
    """A small array on the device, without waiting for it."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def _runs(ids: Tensor) -> Tensor:
    """Number of the run of equal neighbours each entry is in: compact ids without asking the device."""
    changed = torch.zeros_like(ids, dtype=torch.int64)
    changed[1:] = ids[1:] != ids[:-1]
    return changed.cumsum(0)
