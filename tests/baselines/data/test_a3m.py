"""The vectorised A3M parser against one written letter by letter, and what it refuses."""

import gzip
import re

import numpy as np
import pytest

from baselines.data.a3m import check_query, parse_a3m, read_a3m
from baselines.data.schema import DNA, GAP, PROTEIN, RESTYPES, RNA
from megafold_bench.errors import UserError

LETTERS = "ARNDCQEGHILKMFPSTWYV"


def naive(text):
    rows, deletions = [], []
    for record in text.split(">")[1:]:
        sequence = "".join(record.split("\n")[1:])
        row, counts, pending = [], [], 0
        for letter in sequence:
            if letter.islower():
                pending += 1
            elif letter == "-" or letter.isupper():
                row.append(GAP if letter == "-" else LETTERS.index(letter) if letter in LETTERS else 20)
                counts.append(min(pending, 255))
                pending = 0
        if row not in rows:
            rows.append(row)
            deletions.append(counts)
    return np.array(rows), np.array(deletions)


def random_a3m(rng, depth, length):
    query = "".join(rng.choice(list(LETTERS), length))
    text = f">query\n{query}\n"
    for number in range(depth):
        cells = rng.choice([*LETTERS, "-", "X"], length)
        inserted = [
            "".join(rng.choice(list("acgx"), rng.integers(0, 4))) if rng.random() < 0.2 else "" for _ in cells
        ]
        line = "".join(a + b for a, b in zip(inserted, cells, strict=True)) + "aa"
        at = int(rng.integers(1, len(line)))
        text += f">row{number}\tA-b{number}\n{line[:at]}\n{line[at:]}\n"
    return text


def test_agrees_with_a_naive_parser():
    text = random_a3m(np.random.default_rng(0), 60, 23)
    text += text[text.index(">row3") : text.index(">row5")]
    parsed = parse_a3m(text.encode(), PROTEIN)
    rows, deletions = naive(text)
    assert len(rows) == 61
    np.testing.assert_array_equal(parsed.rows, rows)
    np.testing.assert_array_equal(parsed.deletions, deletions)


def test_agrees_on_a_real_alignment(real_folder):
    content = gzip.decompress((real_folder / "7a4d" / "msa_D.a3m.gz").read_bytes())
    short = b">".join(content.split(b">")[:400])
    rows, deletions = naive(short.decode())
    parsed = parse_a3m(short, PROTEIN)
    np.testing.assert_array_equal(parsed.rows, rows)
    np.testing.assert_array_equal(parsed.deletions, deletions)


def test_long_insertions_saturate():
    parsed = parse_a3m(b">q\nAC\n>r\nA" + b"g" * 300 + b"C", PROTEIN)
    assert parsed.deletions.tolist() == [[0, 0], [0, 255]] or parsed.rows.shape == (1, 2)


def test_windows_line_ends_and_no_final_newline():
    parsed = parse_a3m(b">q\r\nACD\r\n>r\r\nA-dD", PROTEIN)
    assert parsed.rows.tolist() == [[0, 4, 3], [0, GAP, 3]]
    assert parsed.deletions.tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("kind", "text", "names"), [(RNA, b">q\nACGTU\n", "ACGUU"), (DNA, b">q\nACGTU\n", "ACGTT")]
)
def test_nucleotides(kind, text, names):
    prefix = "D" if kind == DNA else ""
    assert [RESTYPES[code] for code in parse_a3m(text, kind).rows[0]] == [prefix + name for name in names]


def test_species_from_headers():
    parsed = parse_a3m(b">q\nAA\n>sp|P1|RAS_HUMAN x\nAC\n>b OX=9606 GN=z\nAD\n>plain\nAE\n", PROTEIN)
    assert parsed.species == ("", "HUMAN", "9606", "")


def test_rows_of_different_length_are_refused():
    with pytest.raises(UserError, match=re.escape("'x.a3m': row 3 has 2 aligned columns, the query 3")):
        parse_a3m(b">q\nACD\n>r\nA-D\n>s\nAC\n", PROTEIN, "x.a3m")


@pytest.mark.parametrize("content", [b"", b"ACD\n", b">q\n\n>r\nA\n", b">q\nA1D\n"])
def test_no_alignment_is_refused(content):
    with pytest.raises(UserError, match=r"x\.a3m"):
        parse_a3m(content, PROTEIN, "x.a3m")


def test_query_must_match_the_chain():
    alignment = parse_a3m(b">q\nACD\n", PROTEIN)
    check_query(alignment, np.array([0, 4, 3], np.uint8), "A", "x.a3m")
    check_query(alignment, np.array([0, 20, 3], np.uint8), "A", "x.a3m")
    with pytest.raises(UserError, match="query residue 2 is CYS, chain 'A' has ARG"):
        check_query(alignment, np.array([0, 1, 3], np.uint8), "A", "x.a3m")
    with pytest.raises(UserError, match="query of 3 residues, chain 'A' has 2"):
        check_query(alignment, np.array([0, 4], np.uint8), "A", "x.a3m")


def test_files(tmp_path):
    plain, packed, wrong = tmp_path / "a.a3m", tmp_path / "a.a3m.gz", tmp_path / "b.a3m.gz"
    plain.write_bytes(b">q\nACD\n")
    packed.write_bytes(gzip.compress(b">q\nACD\n"))
    wrong.write_bytes(b">q\nACD\n")
    assert read_a3m(plain, PROTEIN).rows.tolist() == read_a3m(packed, PROTEIN).rows.tolist()
    with pytest.raises(UserError, match="not a gzip file"):
        read_a3m(wrong, PROTEIN)
    with pytest.raises(UserError, match="does not exist"):
        read_a3m(tmp_path / "none.a3m", PROTEIN)
