"""A small hand-made crop that obeys the feature schema: every molecule type, copies, symmetries, a bond."""

from __future__ import annotations

import torch

from baselines.data.schema import DNA, LIGAND, PROTEIN, check_features

# chains as (molecule type, entity, sym, tokens, atoms per token)
CHAINS = [
    (PROTEIN, 0, 0, 6, 5),
    (PROTEIN, 0, 1, 6, 5),
    (DNA, 1, 0, 4, 7),
    (LIGAND, 2, 0, 3, 1),
    (LIGAND, 2, 1, 3, 1),
]
COPIES = 2


def make_features(seed: int = 0, unresolved: float = 0.1, dtype: torch.dtype = torch.float32) -> dict:
    """22 tokens, 96 atoms (94 real), 2 copies, 2 atom permutations (atoms 3 and 4 of each protein residue)."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[tuple[int, int, int, int, int]] = []
    atom_to_token: list[int] = []
    within: list[int] = []
    for asym, (kind, entity, sym, length, atoms) in enumerate(CHAINS):
        for residue in range(length):
            atom_to_token += [len(tokens)] * atoms
            within += list(range(atoms))
            tokens.append((kind, entity, sym, asym, residue + 1))
    n, real = len(tokens), len(atom_to_token)
    a = -(-real // 32) * 32
    pad = a - real
    atom_to_token += [n - 1] * pad
    within += [0] * pad
    kind, entity, sym, asym, residue = (torch.tensor(c) for c in zip(*tokens, strict=True))
    token_of = torch.tensor(atom_to_token)
    first = torch.tensor([atom_to_token.index(t) for t in range(n)])
    size = torch.bincount(token_of[:real], minlength=n)
    offsets = torch.tensor([0, 1, 2])
    single = size == 1
    ligand_frame = torch.stack([first, first, first], -1)
    atom_mask = torch.arange(a) < real

    own = (
        torch.randn(a, 3, generator=generator, dtype=dtype) * 2
        + 6 * torch.randn(n, 3, generator=generator, dtype=dtype)[token_of]
    )
    resolved = (torch.rand(a, generator=generator) >= unresolved) & atom_mask
    positions = torch.zeros(COPIES, a, 3, dtype=dtype)
    mask = torch.zeros(COPIES, a, dtype=torch.bool)
    starts = {(e, s): i for i, (_, e, s, _, _) in enumerate(CHAINS)}
    chain_first = [int((asym == c).nonzero()[0]) for c in range(len(CHAINS))]
    for atom in range(real):
        t = int(token_of[atom])
        for k in range(COPIES):
            other = starts.get((int(entity[t]), k))
            if other is None:
                continue
            counterpart = first[chain_first[other]] + (atom - first[chain_first[int(asym[t])]])
            positions[k, atom], mask[k, atom] = own[counterpart], resolved[counterpart]

    permutation = torch.arange(a).repeat(2, 1)
    for t in range(n):
        if kind[t] == PROTEIN:
            permutation[1, first[t] + 3], permutation[1, first[t] + 4] = first[t] + 4, first[t] + 3
    ligand_start = int((asym == 3).nonzero()[0])
    bonds = torch.tensor([[2, ligand_start], [ligand_start, ligand_start + 1], [8, ligand_start + 3]])
    rows, templates = 5, 2
    features = {
        "restype": torch.where(kind == PROTEIN, 3, torch.where(kind == DNA, 26, 20)).to(torch.uint8),
        "molecule_type": kind.to(torch.uint8),
        "residue_index": residue.int(),
        "token_index": torch.arange(n, dtype=torch.int32),
        "asym_id": asym.int(),
        "entity_id": entity.int(),
        "sym_id": sym.int(),
        "token_bonds": bonds,
        "representative_atom": torch.where(single, first, first + 2),
        "center_atom": torch.where(single, first, first + 1),
        "frame_atoms": torch.where(single[:, None], ligand_frame, first[:, None] + offsets),
        "frame_mask": ~single,
        "atom_mask": atom_mask,
        "atom_to_token": token_of,
        "atom_within_token": torch.tensor(within).to(torch.uint8),
        "ref_pos": torch.randn(a, 3, generator=generator),
        "ref_element": torch.where(atom_mask, 6, 0).to(torch.uint8),
        "ref_charge": (torch.arange(a) % 3 - 1.0) * atom_mask,
        "ref_atom_name": torch.randint(0, 64, (a, 4), generator=generator).to(torch.uint8),
        "ref_space_uid": token_of.int(),
        "msa": torch.randint(0, 20, (rows, n), generator=generator).to(torch.uint8),
        "msa_deletions": torch.randint(0, 2, (rows, n), generator=generator).to(torch.uint8),
        "msa_mask": torch.ones(rows, n, dtype=torch.bool),
        "profile": torch.rand(n, 31, generator=generator),
        "deletion_mean": torch.rand(n, generator=generator),
        "template_restype": torch.randint(0, 20, (templates, n), generator=generator).to(torch.uint8),
        "template_positions": torch.randn(templates, n, 4, 3, generator=generator) * 8,
        "template_mask": torch.rand(templates, n, 4, generator=generator) > 0.2,
        "label_positions": positions.float(),
        "label_mask": mask,
        "atom_permutations": permutation,
        "resolution": torch.tensor(2.0),
    }
    check_features(features)
    if dtype == torch.float64:
        features["label_positions"] = positions
    return features
