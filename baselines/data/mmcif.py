"""mmCIF and BinaryCIF files to `Structure`.

First model; hydrogens and waters removed; of alternative locations the one with the highest
occupancy, per residue. The polymer sequence is taken from ``pdbx_poly_seq_scheme``, else
``entity_poly_seq``, else from the observed residues. Files whose chain names were rewritten, so that
a ligand carries the name of its polymer, are understood: what is not in the polymer's sequence
becomes a molecule of its own.
"""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baselines.data.ccd import HYDROGENS, STANDARD_RESIDUES, WATERS, component
from baselines.data.files import read_bytes
from baselines.data.schema import LIGAND
from baselines.data.structure import AtomKey, Chain, Residue, Structure
from megafold_bench.errors import UserError

_ABSENT = ("?", ".", "")


@dataclass(frozen=True)
class _Found:
    """A residue found in ``atom_site``, before it is known which molecule it belongs to."""

    chain: str
    sequence_id: int | None
    auth_chain: str
    auth_number: str
    residue: Residue


def read_structure(path: Path) -> Structure:
    """Parse a structure file (mmCIF or BinaryCIF, plain or gzip).

    Raises `UserError` when the file is missing, damaged, truncated or holds no atoms.
    """
    block = _read_block(path)
    if "atom_site" not in block:
        raise UserError(f"structure {str(path)!r} holds no atoms (no atom_site): give a coordinate file")
    try:
        found = _residues(block["atom_site"])
        chains, places = _chains(found, _sequences(block), _branched(block))
        structure = Structure(tuple(chains), tuple(_links(block, places)), _resolution(block))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        reason = str(error).strip("'\"")
        raise UserError(f"structure {str(path)!r} is damaged ({reason}): download it again") from error
    if not structure.chains:
        raise UserError(f"structure {str(path)!r} holds no atoms besides water: give a coordinate file")
    return structure


def _read_block(path: Path) -> Any:
    from biotite.structure.io.pdbx import BinaryCIFFile, CIFFile

    content = read_bytes(path, "structure")
    try:
        if ".bcif" in path.suffixes:
            return BinaryCIFFile.read(io.BytesIO(content)).block
        text = content.decode()
        _check_complete(text)
        return CIFFile.read(io.StringIO(text)).block
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds on damaged input
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"structure {str(path)!r} is not a complete mmCIF file ({reason}): download it again"
        ) from None


def _check_complete(text: str) -> None:
    """Notice files cut between two rows, which parse without complaint.

    Writers that end one category with ``#`` end every category with it.
    """
    last = text.rstrip().rpartition("\n")[2]
    if not text.lstrip().startswith("data_") and "\ndata_" not in text:
        raise ValueError("it has no data_ block")
    if "\n#" in text and not last.startswith("#"):
        raise ValueError(f"it stops after {last[:30]!r}")


def _text(category: Any, *names: str) -> np.ndarray:
    """The first of the columns that exists, as text."""
    for name in names:
        if name in category:
            return category[name].as_array(str)
    raise KeyError(f"no column {names[0]}")


def _optional(category: Any, name: str, default: str) -> np.ndarray:
    return category[name].as_array(str) if name in category else np.full(category.row_count, default)


def _residues(site: Any) -> list[_Found]:
    """Residues with their heavy atoms, grouped in file order."""
    model = _optional(site, "pdbx_PDB_model_num", "1")
    names = _text(site, "label_comp_id", "auth_comp_id")
    element = np.char.upper(_text(site, "type_symbol"))
    keep = (model == model[0]) & ~np.isin(names, tuple(WATERS)) & ~np.isin(element, tuple(HYDROGENS))
    xyz = np.stack([site[f"Cartn_{axis}"].as_array(float) for axis in "xyz"], axis=1)[keep]
    if not np.isfinite(xyz).all():
        raise ValueError("a coordinate is not a number")
    chain = _text(site, "label_asym_id", "auth_asym_id")[keep]
    sequence_id = _text(site, "label_seq_id")[keep]
    auth_chain = _text(site, "auth_asym_id", "label_asym_id")[keep]
    auth_number = _text(site, "auth_seq_id", "label_seq_id")[keep]
    insertion = _optional(site, "pdbx_PDB_ins_code", ".")[keep]
    names, element = names[keep], element[keep]
    atom = _text(site, "label_atom_id", "auth_atom_id")[keep]
    altloc = _optional(site, "label_alt_id", ".")[keep]
    occupancy = _occupancies(site)[keep]
    groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for index, key in enumerate(zip(chain, sequence_id, auth_number, insertion, strict=True)):
        groups[key].append(index)
    residues = []
    for members in groups.values():
        rows = _one_conformer(np.array(members), altloc, occupancy, names)
        first = rows[0]
        number = sequence_id[first]
        sequence = int(number) if number not in _ABSENT else None
        fallback = re.sub(r"\D", "", auth_number[first]) or "1"
        residue = Residue(
            number=sequence if sequence is not None else int(fallback),
            name=str(names[first]),
            positions={str(atom[row]): tuple(xyz[row].tolist()) for row in rows},
            elements={str(atom[row]): str(element[row]) for row in rows},
        )
        key_number = auth_number[first] + ("" if insertion[first] in _ABSENT else insertion[first])
        residues.append(_Found(str(chain[first]), sequence, str(auth_chain[first]), key_number, residue))
    return residues


def _occupancies(site: Any) -> np.ndarray:
    if "occupancy" not in site:
        return np.ones(site.row_count)
    return site["occupancy"].as_array(float, 1.0)


def _one_conformer(
    rows: np.ndarray, altloc: np.ndarray, occupancy: np.ndarray, names: np.ndarray
) -> np.ndarray:
    """Rows of one residue without alternatives: common atoms and the location with most occupancy."""
    labels = altloc[rows]
    common = np.isin(labels, _ABSENT)
    if common.all():
        return rows
    candidates = np.unique(labels[~common])
    mean = [occupancy[rows][labels == label].mean() for label in candidates]
    best = candidates[int(np.argmax(mean))]
    kept = rows[common | (labels == best)]
    name = names[rows[labels == best][0]]
    return kept[names[kept] == name]


def _sequences(block: Any) -> dict[str, list[tuple[int, str]]]:
    """Polymer sequence (sequence number, component) by chain name; the first of alternatives."""
    sequences: dict[str, dict[int, str]] = defaultdict(dict)
    if "pdbx_poly_seq_scheme" in block:
        scheme = block["pdbx_poly_seq_scheme"]
        columns = (_text(scheme, "asym_id"), _text(scheme, "seq_id"), _text(scheme, "mon_id"))
        for chain, number, name in zip(*columns, strict=True):
            sequences[str(chain)].setdefault(int(number), str(name))
    elif "entity_poly_seq" in block and "struct_asym" in block:
        listed = block["entity_poly_seq"]
        entities: dict[str, dict[int, str]] = defaultdict(dict)
        columns = (_text(listed, "entity_id"), _text(listed, "num"), _text(listed, "mon_id"))
        for entity, number, name in zip(*columns, strict=True):
            entities[str(entity)].setdefault(int(number), str(name))
        asym = block["struct_asym"]
        for chain, entity in zip(_text(asym, "id"), _text(asym, "entity_id"), strict=True):
            if str(entity) in entities:
                sequences[str(chain)] = entities[str(entity)]
    return {chain: sorted(listed.items()) for chain, listed in sequences.items()}


def _branched(block: Any) -> frozenset[str]:
    """Chains that are one molecule of several residues (glycans)."""
    if "pdbx_branch_scheme" not in block:
        return frozenset()
    return frozenset(str(name) for name in _text(block["pdbx_branch_scheme"], "asym_id"))


def _original(chain: str) -> str:
    """The chain that ``A-2``, a copy in an assembly, was made from."""
    return re.sub(r"-\d+$", "", chain)


def _sequence_of(chain: str, sequences: dict[str, list[tuple[int, str]]]) -> list[tuple[int, str]] | None:
    """The sequence of a chain; ``A-2``, the second copy of an assembly, has that of ``A``."""
    return sequences.get(chain) or sequences.get(_original(chain))


def _chains(
    found: Sequence[_Found], sequences: dict[str, list[tuple[int, str]]], branched: frozenset[str]
) -> tuple[list[Chain], dict[tuple[str, str, str], tuple[str, int]]]:
    """Molecules, and where each residue went: (chain or author chain, number, name) → place."""
    by_chain: dict[str, list[_Found]] = defaultdict(list)
    for entry in found:
        by_chain[entry.chain].append(entry)
    polymers: list[Chain] = []
    others: list[Chain] = []
    places: dict[tuple[str, str, str], tuple[str, int]] = {}
    for name, entries in by_chain.items():
        listed = _sequence_of(name, sequences)
        members = _polymer_members(entries, listed)
        if members:
            slots = listed or [(number, entry.residue.name) for number, entry in members.items()]
            residues = [
                members[number].residue if number in members else Residue(number, residue_name)
                for number, residue_name in slots
            ]
            polymers.append(Chain(name, _polymer_kind(residues), tuple(residues)))
            order = {number: index for index, (number, _) in enumerate(slots)}
            for number, entry in members.items():
                _note_place(places, entry, (name, order[number]))
        used = {id(entry) for entry in members.values()}
        rest = [entry for entry in entries if id(entry) not in used]
        split = bool(members) or (len(rest) > 1 and _original(name) not in branched)
        others.extend(_molecules(name, rest, split, places))
    return polymers + others, places


def _polymer_members(entries: list[_Found], listed: list[tuple[int, str]] | None) -> dict[int, _Found]:
    """Observed residues of the polymer by sequence number."""
    if listed is not None:
        numbers = {number for number, _ in listed}
    else:
        numbers = {entry.sequence_id for entry in entries if entry.sequence_id and _can_polymerise(entry)}
        if len(numbers) == 1 and entries[0].residue.name not in STANDARD_RESIDUES:
            return {}
    members: dict[int, _Found] = {}
    for entry in entries:
        if entry.sequence_id in numbers and entry.sequence_id is not None:
            members.setdefault(entry.sequence_id, entry)
    if not any(_can_polymerise(entry) for entry in members.values()):
        return {}
    return dict(sorted(members.items()))


def _can_polymerise(entry: _Found) -> bool:
    known = component(entry.residue.name)
    return known is not None and known.kind != LIGAND


def _polymer_kind(residues: Sequence[Residue]) -> int:
    kinds = Counter(known.kind for residue in residues if (known := component(residue.name)) is not None)
    del kinds[LIGAND]
    return min(kinds, key=lambda kind: (-kinds[kind], kind))


def _molecules(
    name: str, entries: list[_Found], split: bool, places: dict[tuple[str, str, str], tuple[str, int]]
) -> list[Chain]:
    """Non-polymers of a chain: one molecule of several residues or, when `split`, one each."""
    if not entries:
        return []
    if not split:
        for index, entry in enumerate(entries):
            _note_place(places, entry, (name, index))
        residues = tuple(
            Residue(index, entry.residue.name, entry.residue.positions, entry.residue.elements)
            for index, entry in enumerate(entries, start=1)
        )
        return [Chain(name, LIGAND, residues)]
    molecules = []
    for entry in entries:
        own = f"{name}:{entry.residue.name}{entry.auth_number}"
        _note_place(places, entry, (own, 0))
        single = Residue(1, entry.residue.name, entry.residue.positions, entry.residue.elements)
        molecules.append(Chain(own, LIGAND, (single,)))
    return molecules


def _note_place(
    places: dict[tuple[str, str, str], tuple[str, int]], entry: _Found, place: tuple[str, int]
) -> None:
    name = entry.residue.name
    places.setdefault(("auth:" + entry.auth_chain, entry.auth_number, name), place)
    if entry.sequence_id is not None:
        places[("label:" + entry.chain, str(entry.sequence_id), name)] = place


def _links(block: Any, places: dict[tuple[str, str, str], tuple[str, int]]) -> list[tuple[AtomKey, AtomKey]]:
    """Covalent links of ``struct_conn`` between residues of this file."""
    if "struct_conn" not in block:
        return []
    table = block["struct_conn"]
    kind = _text(table, "conn_type_id")
    symmetry = [_optional(table, f"ptnr{side}_symmetry", "1_555") for side in (1, 2)]
    ends = [_link_ends(table, side, places) for side in (1, 2)]
    links = []
    for row in range(len(kind)):
        first, second = ends[0][row], ends[1][row]
        same_copy = symmetry[0][row] == symmetry[1][row]
        if kind[row].startswith("covale") and same_copy and first and second and first[:2] != second[:2]:
            links.append((first, second))
    return links


def _link_ends(
    table: Any, side: int, places: dict[tuple[str, str, str], tuple[str, int]]
) -> list[AtomKey | None]:
    absent = "?"
    label_chain = _optional(table, f"ptnr{side}_label_asym_id", absent)
    label_number = _optional(table, f"ptnr{side}_label_seq_id", absent)
    auth_chain = _optional(table, f"ptnr{side}_auth_asym_id", absent)
    auth_number = _optional(table, f"ptnr{side}_auth_seq_id", absent)
    insertion = _optional(table, f"pdbx_ptnr{side}_PDB_ins_code", absent)
    name = _text(table, f"ptnr{side}_label_comp_id", f"ptnr{side}_auth_comp_id")
    atom = _text(table, f"ptnr{side}_label_atom_id")
    ends: list[AtomKey | None] = []
    for row in range(len(name)):
        number = auth_number[row] + ("" if insertion[row] in _ABSENT else insertion[row])
        place = places.get(("label:" + label_chain[row], label_number[row], name[row]))
        place = place or places.get(("auth:" + auth_chain[row], number, name[row]))
        ends.append(None if place is None else (place[0], place[1], str(atom[row])))
    return ends


def _resolution(block: Any) -> float:
    for category, column in (
        ("refine", "ls_d_res_high"),
        ("em_3d_reconstruction", "resolution"),
        ("reflns", "d_resolution_high"),
    ):
        if category in block and column in block[category]:
            value = str(block[category][column].as_array(str)[0])
            if re.fullmatch(r"\d+(\.\d*)?", value):
                return float(value)
    return float("nan")
