"""A3M alignments to compact arrays, without a Python loop over residues."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baselines.data.files import read_bytes
from baselines.data.schema import DNA, GAP, PROTEIN, RESTYPES, RNA, UNKNOWN_AMINO_ACID, UNKNOWN_BASE
from megafold_bench.errors import UserError

_NEWLINE, _GREATER = ord("\n"), ord(">")
_SPECIES = re.compile(r"OX=(\d+)|TaxID=(\d+)|^(?:sp|tr)\|[^|]+\|[A-Z0-9]+_([A-Z0-9]{3,5})\b")
_INVALID = 255
_IGNORED, _ALIGNED, _INSERTED, _WRONG = range(4)


def _roles() -> np.ndarray:
    """What each byte means inside a sequence."""
    roles = np.full(256, _WRONG, np.uint8)
    roles[list(b"\n\r \t.*\0")] = _IGNORED
    roles[list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ-")] = _ALIGNED
    roles[list(b"abcdefghijklmnopqrstuvwxyz")] = _INSERTED
    return roles


_ROLES = _roles()


@dataclass(frozen=True)
class Alignment:
    """Distinct rows of an alignment; row 0 is the query."""

    rows: np.ndarray
    """Index into RESTYPES, uint8 [S, L]."""
    deletions: np.ndarray
    """Residues deleted before the column, capped at 255, uint8 [S, L]."""
    species: tuple[str, ...]
    """Species of each row as its header gives it; empty where it does not."""


def _codes(kind: int) -> np.ndarray:
    """Residue type by letter for a molecule kind; ambiguous letters as AF3 maps them."""
    codes = np.full(256, _INVALID, np.uint8)
    codes[ord("-")] = GAP
    if kind == PROTEIN:
        codes[ord("A") : ord("Z") + 1] = UNKNOWN_AMINO_ACID
        for index, letter in enumerate("ARNDCQEGHILKMFPSTWYV"):
            codes[ord(letter)] = index
        for letter, meant in {"B": "D", "Z": "E", "U": "C"}.items():
            codes[ord(letter)] = codes[ord(meant)]
        return codes
    codes[ord("A") : ord("Z") + 1] = UNKNOWN_BASE
    prefix = "D" if kind == DNA else ""
    for letter in "AGCT" if kind == DNA else "AGCU":
        codes[ord(letter)] = RESTYPES.index(prefix + letter)
    codes[ord("T" if kind == RNA else "U")] = codes[ord("U" if kind == RNA else "T")]
    return codes


def read_a3m(path: Path, kind: int) -> Alignment:
    """Parse an A3M file (plain or gzip) for a chain of molecule `kind`; duplicate rows are dropped.

    Raises `UserError` when the file is missing, damaged, empty, or its rows differ in length.
    """
    return parse_a3m(read_bytes(path, "alignment"), kind, str(path))


def parse_a3m(content: bytes, kind: int, name: str = "alignment") -> Alignment:
    """`read_a3m` on bytes; `name` is used in errors."""
    data = np.frombuffer(content, np.uint8)
    starts = (
        np.flatnonzero(np.concatenate(([True], data[:-1] == _NEWLINE))) if data.size else np.zeros(0, int)
    )
    is_header = data[starts] == _GREATER
    if not is_header.any():
        raise UserError(f"alignment {name!r} holds no '>' header: give an A3M file")
    ends = np.append(starts[1:], data.size)
    headers = np.flatnonzero(is_header)
    role = _ROLES[data]
    for start, end in zip(starts[headers].tolist(), ends[headers].tolist(), strict=True):
        role[start:end] = _IGNORED
    _check_letters(data, role, name)
    first_byte = starts[headers]
    aligned = np.flatnonzero(role == _ALIGNED)
    upto = np.searchsorted(aligned, np.append(first_byte, data.size))
    lengths = np.diff(upto)
    width = int(lengths[0])
    if width == 0:
        raise UserError(f"alignment {name!r} has an empty first row: the query must come first")
    if (lengths != width).any():
        row = int(np.flatnonzero(lengths != width)[0])
        raise UserError(
            f"alignment {name!r}: row {row + 1} has {int(lengths[row])} aligned columns, the query {width}: "
            "all rows of an A3M must have the same number of capitals and dashes"
        )
    letters = data[aligned].reshape(-1, width)
    inserted = np.cumsum(role == _INSERTED, dtype=np.int32)
    deletions = _deletions(inserted, aligned.reshape(-1, width), first_byte)
    kept = _distinct(letters)
    named = any(mark in content for mark in (b">sp|", b">tr|", b"OX=", b"TaxID="))
    first, last = starts[headers], ends[headers]
    species = tuple(_species(content[first[row] + 1 : last[row]]) if named else "" for row in kept.tolist())
    return Alignment(_codes(kind)[letters[kept]], deletions[kept], species)


def _check_letters(data: np.ndarray, role: np.ndarray, name: str) -> None:
    bad = np.flatnonzero(role == _WRONG)
    if bad.size:
        raise UserError(
            f"alignment {name!r} has {chr(data[bad[0]])!r} in a sequence: A3M allows letters, '-' and '.'"
        )


def _deletions(inserted: np.ndarray, aligned: np.ndarray, first_byte: np.ndarray) -> np.ndarray:
    """Lower-case letters between consecutive aligned columns of each row."""
    before = inserted[aligned]
    counts = np.empty(aligned.shape, np.int32)
    counts[:, 0] = before[:, 0] - inserted[first_byte]
    np.subtract(before[:, 1:], before[:, :-1], out=counts[:, 1:])
    return np.minimum(counts, 255).astype(np.uint8)


def _distinct(letters: np.ndarray) -> np.ndarray:
    """First occurrence of every distinct row, in order."""
    seen: dict[bytes, int] = {}
    for index, row in enumerate(np.ascontiguousarray(letters).view(f"V{letters.shape[1]}")[:, 0].tolist()):
        seen.setdefault(row, index)
    return np.fromiter(seen.values(), np.int64, len(seen))


def _species(header: bytes) -> str:
    match = _SPECIES.search(header.decode("latin-1"))
    return next((group for group in match.groups() if group), "") if match else ""


def check_query(alignment: Alignment, restypes: np.ndarray, chain: str, name: str) -> None:
    """Raise `UserError` unless the first row is the chain's sequence (unknown residues match any)."""
    query = alignment.rows[0]
    if len(query) != len(restypes):
        raise UserError(
            f"alignment {name!r} has a query of {len(query)} residues, chain {chain!r} has {len(restypes)}: "
            "give the alignment of this chain's full sequence"
        )
    unknown = np.isin(query, (UNKNOWN_AMINO_ACID, UNKNOWN_BASE)) | np.isin(
        restypes, (UNKNOWN_AMINO_ACID, UNKNOWN_BASE)
    )
    wrong = np.flatnonzero((query != restypes) & ~unknown)
    if wrong.size:
        at = int(wrong[0])
        raise UserError(
            f"alignment {name!r}: query residue {at + 1} is {RESTYPES[query[at]]}, chain {chain!r} has "
            f"{RESTYPES[restypes[at]]}: give the alignment of this chain's sequence"
        )
