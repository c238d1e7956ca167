"""A synthetic complex of exactly N tokens, built from real residues, nucleotides, ligands and ions.

It needs no files and goes through the same featurisation as a parsed structure. Proteins are compact
chains of helices and strands with ideal backbone geometry, nucleic acids and ligands use dictionary
conformers; chains touch but do not overlap. It is no folded protein: only the statistics that decide
the cost of training (atoms per token, chains, copies, alignment depth, deletions) are realistic.
"""

from __future__ import annotations

import numpy as np

from baselines.data.a3m import Alignment
from baselines.data.assembly import restypes_of
from baselines.data.builders import build_nucleic_acid, build_protein
from baselines.data.ccd import Component, component
from baselines.data.complexes import Complex, build_complex
from baselines.data.geometry import dock
from baselines.data.plan import MIN_TOKENS, ChainPlan, plan_chains
from baselines.data.randomness import Purpose, generator
from baselines.data.schema import GAP, LIGAND, PROTEIN
from baselines.data.structure import Chain, Residue, Structure
from baselines.data.templates import Template
from megafold_bench.errors import UserError

DEFAULT_MSA_DEPTH = 2048
"""About the median depth of real alignments (1.8 thousand rows)."""

_UNRESOLVED = 0.04  # of residues; single side-chain atoms add about 1 %
_HIDE_FROM = 20  # residues: shorter chains are observed whole
_POLYMER_CONTACT = 10.0  # Å between Cα and C1' atoms of different chains
_LIGAND_CONTACT = 3.2  # Å between atoms


def synthetic_complex(
    n_tokens: int, seed: int = 0, msa_depth: int = DEFAULT_MSA_DEPTH, templates: int = 4
) -> Complex:
    """A complex of exactly `n_tokens` tokens; the same arguments give the same complex.

    `msa_depth` counts rows of the alignment, the query included; `templates` are per protein sequence.
    Raises `UserError` for fewer than 16 tokens, no rows, or a negative number of templates.
    """
    if n_tokens < MIN_TOKENS:
        raise UserError(
            f"a synthetic complex of {n_tokens} tokens is too short: ask for at least {MIN_TOKENS}"
        )
    if msa_depth < 1 or templates < 0:
        raise UserError(f"msa depth {msa_depth}, templates {templates}: ask for at least 1 and 0")
    rng = generator(seed, Purpose.SYNTHETIC, 0, n_tokens)
    chains = _place(plan_chains(n_tokens, rng), rng)
    proteins = {chain.sequence: chain for chain in reversed(chains) if chain.kind == PROTEIN}
    alignments = {}
    depth = msa_depth
    for chain in reversed(proteins.values()):
        alignments[chain.name] = synthetic_alignment(restypes_of(chain), depth, rng)
        depth = max(1, int(depth * rng.uniform(0.4, 0.9)))
    found = [
        (chain.name, _perturbed_copy(chain, rng))
        for chain in reversed(proteins.values())
        for _ in range(templates)
    ]
    observed = tuple(_hide(chain, rng) for chain in chains)
    return build_complex(Structure(observed, resolution=2.5), alignments, found)


def _place(plans: list[ChainPlan], rng: np.random.Generator) -> list[Chain]:
    """Build every chain and bring it into contact with those already there."""
    atoms = np.zeros((0, 3))
    marks = np.zeros((0, 3))
    built: dict[tuple[int, tuple[str, ...]], list[dict[str, np.ndarray]]] = {}
    chains = []
    for index, plan in enumerate(plans):
        key = (plan.kind, plan.residues)
        if key not in built:
            built[key] = _build(plan, rng)
        body = built[key]
        polymer = plan.kind != LIGAND
        own = np.concatenate([np.stack(list(residue.values())) for residue in body])
        own_marks = np.stack([residue.get("CA", residue.get("C1'", own[0])) for residue in body])
        if polymer:
            rotation, shift = dock(own_marks, marks, _POLYMER_CONTACT, 8, rng)
        else:
            rotation, shift = dock(own, atoms, _LIGAND_CONTACT, 2, rng)
        residues = tuple(
            Residue(
                number,
                name,
                {atom: tuple((xyz @ rotation.T + shift).tolist()) for atom, xyz in positions.items()},
            )
            for number, (name, positions) in enumerate(zip(plan.residues, body, strict=True), start=1)
        )
        chains.append(Chain(_chain_name(index), plan.kind, residues))
        atoms = np.concatenate([atoms, own @ rotation.T + shift])
        marks = np.concatenate([marks, own_marks @ rotation.T + shift])
    return chains


def _chain_name(index: int) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return (_chain_name(index // 26 - 1) if index >= 26 else "") + letters[index % 26]


def _build(plan: ChainPlan, rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    known = [_known(name) for name in plan.residues]
    if plan.kind == PROTEIN:
        return build_protein(known, rng)
    if plan.kind == LIGAND:
        return [dict(zip(entry.atom_names, entry.positions.astype(float), strict=True)) for entry in known]
    return build_nucleic_acid(known, rng)


def _known(name: str) -> Component:
    found = component(name)
    if found is None:
        raise LookupError(f"component {name} is missing from the dictionary bundled with biotite")
    return found


def _hide(chain: Chain, rng: np.random.Generator) -> Chain:
    """Leave about 5 % of a polymer unobserved: stretches of residues, and ends of side chains."""
    if chain.kind == LIGAND:
        return chain
    length = len(chain.residues)
    hidden = np.zeros(length, bool)
    target = int(rng.binomial(length, _UNRESOLVED)) if length >= _HIDE_FROM else 0
    while (missing_yet := target - int(hidden.sum())) > 0:
        begin = int(rng.integers(length))
        hidden[begin : begin + int(rng.integers(1, missing_yet + 1))] = True
    residues = []
    for residue, missing in zip(chain.residues, hidden, strict=True):
        positions = dict(residue.positions)
        if missing:
            positions = {}
        elif len(positions) > 5 and rng.random() < 0.03:
            positions = dict(list(positions.items())[: max(5, len(positions) // 2)])
        residues.append(Residue(residue.number, residue.name, positions))
    return Chain(chain.name, chain.kind, tuple(residues))


def synthetic_alignment(query: np.ndarray, depth: int, rng: np.random.Generator) -> Alignment:
    """`depth` rows of homologues of a protein `query` (uint8 [L]).

    Identity falls from 95 % to 25 %, rows cover a part of the query, 0.6–1.6 % of cells follow a deletion.
    """
    length = len(query)
    identity = np.sort(rng.uniform(0.25, 0.95, depth))[::-1]
    rows = np.where(
        rng.random((depth, length)) < identity[:, None], query, rng.integers(0, 20, (depth, length))
    )
    span = rng.uniform(0.4, 1.0, depth) * length
    begin = rng.uniform(0, 1, depth) * (length - span)
    column = np.arange(length)
    covered = (column >= np.floor(begin)[:, None]) & (column < np.ceil(begin + span)[:, None])
    rows = np.where(covered & (rng.random((depth, length)) > 0.03), rows, GAP)
    lengths = np.minimum(rng.geometric(0.15, (depth, length)), 120)
    deletions = np.where(covered & (rng.random((depth, length)) < 0.015), lengths, 0)
    rows[0], deletions[0] = query, 0
    return Alignment(rows.astype(np.uint8), deletions.astype(np.uint8), ("",) * depth)


def _perturbed_copy(chain: Chain, rng: np.random.Generator) -> Template:
    """The chain itself, off by about 1 Å, mutated, and missing some residues."""
    own = restypes_of(chain)
    length = len(own)
    positions = np.zeros((length, 4, 3), np.float32)
    mask = np.zeros((length, 4), bool)
    identity = float(rng.uniform(0.3, 0.95))
    covered = rng.random(length) < rng.uniform(0.7, 1.0)
    for index, residue in enumerate(chain.residues):
        for slot, name in enumerate(("N", "CA", "C", "CB")):
            atom = "CA" if name == "CB" and name not in residue.positions else name
            positions[index, slot] = residue.positions[atom]
            mask[index, slot] = covered[index]
    positions += rng.normal(0, rng.uniform(0.3, 1.5), (length, 1, 3)).astype(np.float32)
    mutated = np.where(rng.random(length) < identity, own, rng.integers(0, 20, length))
    restype = np.where(covered, mutated, GAP).astype(np.uint8)
    return Template(restype, np.where(mask[..., None], positions, 0).astype(np.float32), mask, identity)
