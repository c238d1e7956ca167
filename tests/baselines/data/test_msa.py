"""Merging alignments of several chains."""

import numpy as np

from baselines.data.a3m import parse_a3m
from baselines.data.msa import merge_rows, profile
from baselines.data.schema import GAP, PROTEIN


def alignment(*records):
    return parse_a3m("".join(f">{header}\n{row}\n" for header, row in records).encode(), PROTEIN)


def test_unpaired_rows_are_merged_densely():
    a = alignment(("q", "AC"), ("1", "AA"), ("2", "CC"), ("3", "DD"))
    b = alignment(("q", "EE"), ("1", "FF"))
    rows = merge_rows({0: a, 2: b}, 3)
    assert rows.tolist() == [[0, 0, 0], [1, -1, 1], [2, -1, -1], [3, -1, -1]]


def test_rows_of_one_species_are_paired_first():
    a = alignment(("q", "AC"), ("x", "AA"), ("y OX=9", "CC"), ("z OX=7", "DD"), ("w OX=9", "EE"))
    b = alignment(("q", "EE"), ("u OX=9", "FF"), ("v", "GG"))
    rows = merge_rows({0: a, 1: b}, 2)
    assert rows.tolist() == [[0, 0], [2, 1], [1, 2], [3, -1], [4, -1]]


def test_depth_is_capped():
    records = [("q", "AC"), *((str(i), "AC"[i % 2] + "ACDEFGHIKL"[i // 2]) for i in range(12))]
    assert len(merge_rows({0: alignment(*records)}, 1, max_rows=5)) == 5


def test_profile_counts_rows_and_deletions():
    frequencies, deletions = profile(alignment(("q", "AC"), ("1", "AaaC"), ("2", "A-"), ("3", "aCC")))
    assert frequencies[0, 0] == np.float32(2 / 3)
    assert frequencies[1, GAP] == np.float32(1 / 3)
    np.testing.assert_allclose(frequencies.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(deletions, [1 / 3, 0])
